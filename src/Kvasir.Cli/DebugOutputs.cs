using System;
using System.Collections.Generic;
using Kvasir.Devices.Serial;
using Kvasir.Linux;
using Kvasir.Machine;

namespace Kvasir.Cli;

/// <summary>Where debug consoles write: the file that each names, or standard error.</summary>
internal sealed class DebugOutputs : IDisposable
{
    private readonly List<IDisposable> _opened = [];

    /// <exception cref="CommandException">The file cannot be made.</exception>
    public ICharacterBackend Open(DeviceSetting device)
    {
        StreamBackend backend = device.Settings.TryGetValue("file", out string? path)
            ? SerialConnection.OpenFile("--device debugcon", path)
            : new StreamBackend(Console.OpenStandardError());
        _opened.Add(backend);
        return backend;
    }

    public void Dispose()
    {
        foreach (IDisposable backend in _opened)
            backend.Dispose();
    }
}
