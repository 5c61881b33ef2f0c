using System;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Machine;

namespace Kvasir.Cli;

/// <summary>
/// What signals mean to a running VM. SIGTERM presses the power button, and where the guest does not listen for it, at a second one, or the end of the grace time, pulls the plug. SIGINT, SIGQUIT and
/// SIGHUP (the terminal is gone) pull it at once: on a raw terminal Ctrl-C is the guest's, so SIGINT is somebody's kill, or Ctrl-C at a pipe.
/// </summary>
internal sealed class SignalHandling : IDisposable
{
    /// <summary>timeout(1) signals a process and then its group: one request, though it comes twice.</summary>
    private const int SameMilliseconds = 500;

    // Wiring
    private readonly IMachineControl _machine;
    private readonly Action<string> _say;
    private readonly TimeSpan _grace;
    private readonly PosixSignalRegistration[] _registrations;

    // State
    private readonly Timer _patience;
    private long _asked;

    public SignalHandling(IMachineControl machine, TimeSpan grace, Action<string> say)
    {
        _machine = machine;
        _grace = grace;
        _say = say;
        _patience = new Timer(_ => GiveUp());
        _registrations =
        [
            PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnTerminate),
            PosixSignalRegistration.Create(PosixSignal.SIGINT, OnStop),
            PosixSignalRegistration.Create(PosixSignal.SIGQUIT, OnStop),
            PosixSignalRegistration.Create(PosixSignal.SIGHUP, OnStop),
        ];
    }

    public void Dispose()
    {
        foreach (PosixSignalRegistration registration in _registrations)
            registration.Dispose();
        _patience.Dispose();
    }

    private void OnTerminate(PosixSignalContext context)
    {
        context.Cancel = true;
        long now = Environment.TickCount64;
        long asked = Interlocked.CompareExchange(ref _asked, now, 0);
        if (asked != 0)
        {
            if (now - asked > SameMilliseconds)
                _machine.Stop();
            return;
        }
        if (!_machine.PressPowerButton())
        {
            // Firmware, a kernel without ACPI, or one that stands paused at its first instruction: nobody would answer.
            _machine.Stop();
            return;
        }
        _say($"kvasir: asking the guest to shut down; in {_grace.TotalSeconds:0} s, or at the next SIGTERM, the VM ends");
        _patience.Change(_grace, Timeout.InfiniteTimeSpan);
    }

    private void OnStop(PosixSignalContext context)
    {
        context.Cancel = true;
        _machine.Stop();
    }

    private void GiveUp()
    {
        _say("kvasir: the guest did not shut down in time");
        _machine.Stop();
    }
}
