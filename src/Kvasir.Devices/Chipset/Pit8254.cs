using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The Intel 8254 interval timer of a PC, ports 40h-43h: counter 0 drives an interrupt line, counter 1 once refreshed memory, counter 2 is
/// gated by port 61h and sounds the speaker.
/// </summary>
/// <remarks>
/// The line of counter 0 shows each rise of OUT as a fall and a rise at that moment; in between it stays high. Rises closer together than
/// 50 µs, or that the host came too late for, are merged.
/// </remarks>
public sealed class Pit8254 : IPortDevice, IStateful<Pit8254.State>, IResettable
{
    /// <summary>CLK of all counters, in Hz.</summary>
    public const ulong Frequency = 1_193_182;

    private const long MinimumPeriod = 50_000;

    private const ushort Counter0 = 0x40;
    private const ushort Counter1 = 0x41;
    private const ushort Counter2 = 0x42;
    private const ushort Control = 0x43;

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public PitCounter Counter0;
        public PitCounter Counter1;
        public PitCounter Counter2;

        /// <summary>The pulse up to which rises of counter 0 have been shown on its line.</summary>
        public long Shown;
    }

    // Wiring
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private readonly IIrqLine _irq;

    // State
    private readonly Lock _lock = new();
    private State _state = PowerOn();

    /// <param name="clock">Everything is derived from it.</param>
    /// <param name="irq">ISA interrupt request 0, or an HPET's gate before it.</param>
    public Pit8254(VmClock clock, IIrqLine irq)
    {
        _clock = clock;
        _irq = irq;
        _timer = clock.CreateTimer(OnTimer);
    }

    /// <summary>OUT of counter 2, as port 61h shows it.</summary>
    public bool Output2
    {
        get
        {
            lock (_lock)
                return _state.Counter2.Output(Now());
        }
    }

    /// <summary>Claims ports 40h-43h.</summary>
    public void Map(PortBus bus) => bus.Map(Counter0, 4, this);

    /// <summary>GATE of counter 2, from port 61h. The other gates are tied high.</summary>
    public void SetGate2(bool gate)
    {
        lock (_lock)
            _state.Counter2.SetGate(gate, Now());
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            switch (port)
            {
                case Counter0:
                    return _state.Counter0.Read(Now());
                case Counter1:
                    return _state.Counter1.Read(Now());
                case Counter2:
                    return _state.Counter2.Read(Now());
                default:
                    // The control word register cannot be read.
                    return 0xff;
            }
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        byte data = (byte)value;
        lock (_lock)
        {
            long now = Now();
            switch (port)
            {
                case Counter0:
                    ShowRises(now);
                    _state.Counter0.Write(data, now);
                    DriveLine(now);
                    break;
                case Counter1:
                    _state.Counter1.Write(data, now);
                    break;
                case Counter2:
                    _state.Counter2.Write(data, now);
                    break;
                case Control:
                    WriteControl(data, now);
                    break;
                default:
                    break;
            }
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            _state = PowerOn();
            _timer.Disarm();
            _irq.Set(false);
        }
    }

    public State Save()
    {
        lock (_lock)
        {
            ShowRises(Now());
            return _state;
        }
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            DriveLine(Now());
        }
    }

    private static State PowerOn() => new()
    {
        Counter0 = PitCounter.AtPowerOn(gate: true),
        Counter1 = PitCounter.AtPowerOn(gate: true),
        Counter2 = PitCounter.AtPowerOn(gate: false),
    };

    private long Now() => (long)VmClock.ToTicks(_clock.Now, Frequency);

    private void WriteControl(byte control, long now)
    {
        switch (control >> 6)
        {
            case 0:
                ShowRises(now);
                SetMode(ref _state.Counter0, control, now);
                DriveLine(now);
                break;
            case 1:
                SetMode(ref _state.Counter1, control, now);
                break;
            case 2:
                SetMode(ref _state.Counter2, control, now);
                break;
            default:
                ReadBack(ref _state.Counter0, control, 1 << 1, now);
                ReadBack(ref _state.Counter1, control, 1 << 2, now);
                ReadBack(ref _state.Counter2, control, 1 << 3, now);
                break;
        }
    }

    private static void SetMode(ref PitCounter counter, byte control, long now)
    {
        if ((control & 0x30) == 0)
            counter.LatchCount(now);
        else
            counter.SetMode(control);
    }

    /// <summary>The read-back command: bits 5 and 4 low latch count and status of the chosen counters.</summary>
    private static void ReadBack(ref PitCounter counter, byte control, int select, long now)
    {
        if ((control & select) == 0)
            return;
        if ((control & 0x20) == 0)
            counter.LatchCount(now);
        if ((control & 0x10) == 0)
            counter.LatchStatus(now);
    }

    private void OnTimer()
    {
        lock (_lock)
        {
            long now = Now();
            ShowRises(now);
            ArmTimer(now);
        }
    }

    /// <summary>Shows rises of OUT since the last time on the line, several as one.</summary>
    private void ShowRises(long now)
    {
        bool rose = _state.Counter0.NextRise(_state.Shown) <= now;
        _state.Shown = now;
        // Brings a count that was waiting for the end of its cycle into force.
        _ = _state.Counter0.Output(now);
        if (!rose)
            return;
        _irq.Set(false);
        _irq.Set(true);
    }

    private void DriveLine(long now)
    {
        _state.Shown = Math.Max(_state.Shown, now);
        // A strobe of one pulse is shown by its rise alone.
        _irq.Set(_state.Counter0.Mode >= 2 || _state.Counter0.Output(now));
        ArmTimer(now);
    }

    private void ArmTimer(long now)
    {
        long rise = _state.Counter0.NextRise(now);
        if (rise == PitCounter.Never)
        {
            _timer.Disarm();
            return;
        }
        long deadline = VmClock.ToNanoseconds((ulong)rise, Frequency);
        _timer.Arm(_state.Counter0.Mode is 2 or 3 ? Math.Max(deadline, _clock.Now + PeriodicDelay()) : deadline);
    }

    /// <summary>Holds fast periodic counts to what the host can bear.</summary>
    private long PeriodicDelay() =>
        VmClock.ToNanoseconds((ulong)_state.Counter0.Count, Frequency) < MinimumPeriod ? MinimumPeriod : 0;
}
