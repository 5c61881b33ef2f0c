using System;
using System.IO;
using Kvasir.Cli.Options;
using Kvasir.Cli.Terminal;
using Kvasir.Devices.Serial;
using Kvasir.Machine;

namespace Kvasir.Cli;

/// <summary>The back end that <c>--serial</c> asks for.</summary>
internal sealed class SerialConnection : IDisposable
{
    private readonly StdioBackend? _stdio;
    private readonly UnixSocketBackend? _socket;

    /// <exception cref="CommandException">The file or socket cannot be made.</exception>
    public SerialConnection(SerialSetting setting, bool interactive)
    {
        switch (setting.Kind)
        {
            case SerialKind.Stdio:
                Backend = _stdio = new StdioBackend(interactive);
                break;
            case SerialKind.Null:
                Backend = new NullBackend();
                break;
            case SerialKind.File:
                Backend = OpenFile("--serial", setting.Path);
                break;
            case SerialKind.UnixSocket:
                Backend = _socket = new UnixSocketBackend(setting.Path);
                break;
            default:
                break;
        }
    }

    /// <summary>Null for a machine without the port.</summary>
    public ICharacterBackend? Backend { get; }

    /// <summary>Makes a back end that writes a new file.</summary>
    /// <exception cref="CommandException">It cannot be made.</exception>
    public static StreamBackend OpenFile(string option, string path)
    {
        try
        {
            return StreamBackend.CreateFile(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new CommandException(ExitCode.Usage, $"{option}: cannot write '{path}': {FileFault.Reason(e)}", e);
        }
    }

    /// <summary>Gives the terminal's keys something to act on. Before <see cref="Start"/>.</summary>
    public void Monitor(IMachineControl machine, NetworkMonitor network)
    {
        if (_stdio is not null)
            _stdio.Monitor = new ConsoleMonitor(machine, _stdio.Print, network);
    }

    /// <summary>Lets input in.</summary>
    public void Start()
    {
        _stdio?.Start();
        _socket?.Start();
    }

    public void Dispose() => (Backend as IDisposable)?.Dispose();
}
