using System;
using System.Collections.Generic;
using Kvasir.Cli.Terminal;
using Kvasir.Devices.Serial;
using Kvasir.Linux;
using Kvasir.Machine;

namespace Kvasir.Cli;

/// <summary>The other side of debug consoles and virtio consoles: the file or socket that each names, or standard error.</summary>
internal sealed class DebugOutputs : IDisposable
{
    private readonly List<IDisposable> _opened = [];
    private readonly List<UnixSocketBackend> _sockets = [];

    /// <exception cref="CommandException">The file cannot be made.</exception>
    public ICharacterBackend Open(DeviceSetting device)
    {
        if (device.Settings.TryGetValue("unix", out string? socket))
        {
            UnixSocketBackend listening = new(socket);
            _opened.Add(listening);
            _sockets.Add(listening);
            return listening;
        }
        StreamBackend backend = device.Settings.TryGetValue("file", out string? path)
            ? SerialConnection.OpenFile($"--device {device.Name}", path)
            : new StreamBackend(Console.OpenStandardError());
        _opened.Add(backend);
        return backend;
    }

    /// <summary>Lets input in.</summary>
    public void Start()
    {
        foreach (UnixSocketBackend socket in _sockets)
            socket.Start();
    }

    public void Dispose()
    {
        foreach (IDisposable backend in _opened)
            backend.Dispose();
    }
}
