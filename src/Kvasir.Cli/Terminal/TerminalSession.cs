using System;
using System.Runtime.InteropServices;
using Kvasir.Linux;

namespace Kvasir.Cli.Terminal;

/// <summary>
/// The terminal in raw mode, from construction until <see cref="Dispose"/>. It follows the process through being stopped and continued, and a
/// small watcher process puts the terminal back where this one is killed or crashes.
/// </summary>
internal sealed class TerminalSession : IDisposable
{
    private readonly object _lock = new();
    private readonly TerminalMode _before;
    private readonly TerminalMode _raw;
    private readonly TerminalWatcher? _watcher;
    private readonly PosixSignalRegistration _continued;
    private readonly PosixSignalRegistration _stopped;
    private bool _active;

    /// <exception cref="LinuxException">Standard input is no terminal.</exception>
    public TerminalSession()
    {
        _before = TerminalMode.Get(FileDescriptor.StandardInput);
        _raw = _before.Raw();
        _watcher = TerminalWatcher.Start();
        _continued = PosixSignalRegistration.Create(PosixSignal.SIGCONT, _ => Reenter());
        // In raw mode Ctrl-Z is the guest's; this is somebody's kill -TSTP.
        _stopped = PosixSignalRegistration.Create(PosixSignal.SIGTSTP, context =>
        {
            context.Cancel = true;
            lock (_lock)
            {
                if (_active)
                    _before.Apply(FileDescriptor.StandardInput);
            }
            ProcessIdentity.StopSelf();
        });
        lock (_lock)
        {
            _active = true;
            _raw.Apply(FileDescriptor.StandardInput);
        }
    }

    public void Dispose()
    {
        lock (_lock)
        {
            if (!_active)
                return;
            _active = false;
            _before.Apply(FileDescriptor.StandardInput);
        }
        _watcher?.Dispose();
        _continued.Dispose();
        _stopped.Dispose();
    }

    private void Reenter()
    {
        lock (_lock)
        {
            if (_active)
                _raw.Apply(FileDescriptor.StandardInput);
        }
    }
}
