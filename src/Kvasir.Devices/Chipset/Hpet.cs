using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The high precision event timer (IA-PC HPET specification 1.0a): a 64-bit counter at 100 MHz and comparators, the first one
/// periodic or all
/// of them. Nothing ticks: the counter is derived from the VM's clock.
/// </summary>
/// <remarks>
/// With legacy replacement, comparators 0 and 1 take the interrupt requests 0 and 8 away from the PIT and the RTC, which are
/// therefore wired through here.
/// Lock order: PIT and RTC, this, interrupt controllers.
/// </remarks>
public sealed partial class Hpet : IMmioDevice, IStateful<Hpet.State>, IResettable
{
    /// <summary>Bytes of its region, at FED00000h.</summary>
    public const ulong RegionSize = 0x400;

    /// <summary>Comparators: the specification asks for three at least.</summary>
    public const int ComparatorCount = 3;

    /// <summary>Nanoseconds a tick.</summary>
    private const long Tick = 10;

    private const long MinimumPeriod = 50_000;

    private const int LineCount = 32;

    /// <summary>One comparator.</summary>
    public record struct Comparator
    {
        /// <summary>The writable bits of its configuration.</summary>
        public ulong Configuration;

        public ulong Value;
        public ulong Period;

        /// <summary>FSB route: data low, address high.</summary>
        public ulong Message;

        /// <summary>
        /// When the counter reaches <see cref="Value"/>, in guest nanoseconds; <see cref="long.MaxValue"/> while it stands.
        /// </summary>
        public long MatchAt;
    }

    [InlineArray(ComparatorCount)]
    public struct Comparators : IEquatable<Comparators>
    {
        private Comparator _first;

        public readonly bool Equals(Comparators other) => this[0] == other[0] && this[1] == other[1] && this[2] == other[2];

        public override readonly bool Equals(object? obj) => obj is Comparators other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[1], this[2]);

        public static bool operator ==(Comparators a, Comparators b) => a.Equals(b);

        public static bool operator !=(Comparators a, Comparators b) => !a.Equals(b);
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public ulong Configuration;
        public uint InterruptStatus;

        /// <summary>The counter at <see cref="Since"/>, from when on it runs if it does.</summary>
        public ulong Counter;

        public long Since;
        public Comparators Timers;

        /// <summary>Levels of the PIT's and the RTC's wires.</summary>
        public bool PitLevel;

        public bool RtcLevel;
    }

    // Configuration
    private readonly uint _routes;

    // Wiring
    private readonly VmClock _clock;
    private readonly IIrqLine _irq0;
    private readonly IIrqLine _irq8;
    private readonly IIrqLine?[] _lines = new IIrqLine?[LineCount];
    private readonly IMsiSink? _msi;
    private readonly VmTimer[] _timers = new VmTimer[ComparatorCount];
    private readonly IIrqLine?[] _asserted = new IIrqLine?[ComparatorCount];

    // State
    private readonly Lock _lock = new();
    private State _state;

    /// <param name="irq0">ISA interrupt request 0.</param>
    /// <param name="irq8">ISA interrupt request 8.</param>
    /// <param name="lines">I/O APIC inputs by number; a comparator can be routed to those that are not null.</param>
    /// <param name="msi">Takes FSB interrupts; without it they are not offered.</param>
    public Hpet(VmClock clock, IIrqLine irq0, IIrqLine irq8, ReadOnlySpan<IIrqLine?> lines, IMsiSink? msi = null)
    {
        _clock = clock;
        _irq0 = irq0;
        _irq8 = irq8;
        _msi = msi;
        lines[..Math.Min(lines.Length, LineCount)].CopyTo(_lines);
        for (int i = 0; i < LineCount; i++)
            _routes |= _lines[i] is null ? 0 : 1u << i;
        for (int i = 0; i < ComparatorCount; i++)
        {
            int number = i;
            _timers[i] = clock.CreateTimer(() => OnTimer(number));
        }
        PitIrq = IrqLine.From(SetPit);
        RtcIrq = IrqLine.From(SetRtc);
        ResetState();
    }

    /// <summary>Hears when legacy replacement begins or ends, for a PIT that is not wired to <see cref="PitIrq"/>. With the HPET's lock held.</summary>
    public Action<bool>? LegacyChanged { get; init; }

    /// <summary>Where the PIT's counter 0 is wired to: interrupt request 0, except in legacy replacement mode.</summary>
    public IIrqLine PitIrq { get; }

    /// <summary>Where the RTC is wired to: interrupt request 8, except in legacy replacement mode.</summary>
    public IIrqLine RtcIrq { get; }

    private bool Enabled => (_state.Configuration & (ulong)General.Enable) != 0;

    private bool Legacy => (_state.Configuration & (ulong)General.LegacyReplacement) != 0;

    public ulong Read(ulong offset, AccessSize size)
    {
        lock (_lock)
            return ReadRegister(offset & ~7ul) >> (int)(offset & 7) * 8;
    }

    public void Write(ulong offset, AccessSize size, ulong value)
    {
        int shift = (int)(offset & 7) * 8;
        ulong mask = (size == AccessSize.Qword ? ulong.MaxValue : (1ul << (int)size * 8) - 1) << shift;
        lock (_lock)
            WriteRegister(offset & ~7ul, value << shift & mask, mask);
    }

    public void Reset()
    {
        lock (_lock)
        {
            bool legacy = Legacy;
            bool pit = _state.PitLevel;
            bool rtc = _state.RtcLevel;
            ResetState();
            _state.PitLevel = pit;
            _state.RtcLevel = rtc;
            for (int i = 0; i < ComparatorCount; i++)
                Refresh(i);
            if (legacy)
                PassLegacy();
        }
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            for (int i = 0; i < ComparatorCount; i++)
            {
                Arm(i);
                DriveLine(i);
            }
            PassLegacy();
        }
    }

    private void ResetState()
    {
        _state = default;
        for (int i = 0; i < ComparatorCount; i++)
        {
            _state.Timers[i].Value = ulong.MaxValue;
            _state.Timers[i].MatchAt = long.MaxValue;
        }
    }

    private ulong Counter() => Enabled ? _state.Counter + (ulong)((_clock.Now - _state.Since) / Tick) : _state.Counter;

    private ulong ReadRegister(ulong offset)
    {
        switch ((Register)offset)
        {
            case Register.Capabilities:
                // Revision 1, three comparators, 64 bits, legacy replacement, Intel; the tick in femtoseconds above.
                return (ulong)(Tick * 1_000_000) << 32 | 0x8086ul << 16 | 1 << 15 | 1 << 13 | (ComparatorCount - 1) << 8 | 1;
            case Register.Configuration:
                return _state.Configuration;
            case Register.InterruptStatus:
                for (int i = 0; i < ComparatorCount; i++)
                    Service(i);
                return _state.InterruptStatus;
            case Register.Counter:
                return Counter();
            default:
                return TryTimer(offset, out int number, out TimerRegister register) ? ReadTimer(number, register) : 0;
        }
    }

    private ulong ReadTimer(int number, TimerRegister register)
    {
        Service(number);
        ref Comparator timer = ref _state.Timers[number];
        return register switch
        {
            TimerRegister.Configuration => timer.Configuration | (ulong)_routes << 32 | (ulong)(Timer.PeriodicCapable | Timer.Wide)
                | (_msi is null ? 0 : (ulong)Timer.MessageCapable),
            TimerRegister.Comparator => Is32(timer) ? (uint)timer.Value : timer.Value,
            TimerRegister.Message => timer.Message,
            _ => 0,
        };
    }

    private void WriteRegister(ulong offset, ulong value, ulong mask)
    {
        switch ((Register)offset)
        {
            case Register.Configuration:
                SetConfiguration((_state.Configuration & ~mask) | value);
                break;
            case Register.InterruptStatus:
                _state.InterruptStatus &= ~(uint)value;
                for (int i = 0; i < ComparatorCount; i++)
                    DriveLine(i);
                break;
            case Register.Counter:
                // Only a halted counter may be written.
                if (Enabled)
                    break;
                _state.Counter = (_state.Counter & ~mask) | value;
                break;
            default:
                if (TryTimer(offset, out int number, out TimerRegister register))
                    WriteTimer(number, register, value, mask);
                break;
        }
    }

    private void SetConfiguration(ulong value)
    {
        bool wasEnabled = Enabled;
        bool wasLegacy = Legacy;
        for (int i = 0; i < ComparatorCount; i++)
            Service(i);
        ulong counter = Counter();
        long now = _clock.Now;
        // A part of a tick that had gone by goes on with the counter.
        long part = wasEnabled ? (now - _state.Since) % Tick : 0;
        _state.Configuration = value & (ulong)General.Writable;
        _state.Counter = counter;
        _state.Since = now - part;
        for (int i = 0; i < ComparatorCount; i++)
            Refresh(i);
        if (wasLegacy != Legacy)
            PassLegacy();
    }

    private void WriteTimer(int number, TimerRegister register, ulong value, ulong mask)
    {
        Service(number);
        ref Comparator timer = ref _state.Timers[number];
        switch (register)
        {
            case TimerRegister.Configuration:
                SetTimerConfiguration(number, ((timer.Configuration & ~mask) | value) & (ulong)Timer.Writable);
                break;
            case TimerRegister.Comparator:
                WriteComparator(ref timer, value, mask);
                break;
            case TimerRegister.Message:
                timer.Message = (timer.Message & ~mask) | value;
                break;
            default:
                break;
        }
        Refresh(number);
    }

    private void SetTimerConfiguration(int number, ulong value)
    {
        ref Comparator timer = ref _state.Timers[number];
        if (_msi is null)
            value &= ~(ulong)Timer.MessageEnable;
        timer.Configuration = value;
        if (Is32(timer))
        {
            timer.Value = (uint)timer.Value;
            timer.Period = (uint)timer.Period;
        }
        if ((value & (ulong)Timer.LevelTriggered) == 0)
            _state.InterruptStatus &= ~(1u << number);
    }

    /// <summary>
    /// A periodic comparator takes its period from each write, and its next match too where SET_VALUE was written before.
    /// </summary>
    private static void WriteComparator(ref Comparator timer, ulong value, ulong mask)
    {
        if (Is32(timer))
        {
            // The upper half does not exist.
            mask = (uint)mask;
            value = (uint)value;
            if (mask == 0)
                return;
        }
        bool periodic = (timer.Configuration & (ulong)Timer.Periodic) != 0;
        if (!periodic || (timer.Configuration & (ulong)Timer.SetValue) != 0)
            timer.Value = (timer.Value & ~mask) | value;
        if (periodic)
            timer.Period = (timer.Period & ~mask) | value;
        timer.Configuration &= ~(ulong)Timer.SetValue;
    }

    private static bool Is32(in Comparator timer) => (timer.Configuration & (ulong)Timer.Mode32) != 0;

    private static bool TryTimer(ulong offset, out int number, out TimerRegister register)
    {
        ulong at = offset - (ulong)Register.FirstTimer;
        number = (int)(at / (ulong)TimerRegister.Stride);
        register = (TimerRegister)(at % (ulong)TimerRegister.Stride);
        return offset >= (ulong)Register.FirstTimer && at < ComparatorCount * (ulong)TimerRegister.Stride;
    }

    private void OnTimer(int number)
    {
        lock (_lock)
        {
            Service(number);
            Arm(number);
        }
    }

    /// <summary>Acts on a match that has come.</summary>
    private void Service(int number)
    {
        ref Comparator timer = ref _state.Timers[number];
        long now = _clock.Now;
        if (now < timer.MatchAt)
            return;
        ulong wrap = Is32(timer) ? uint.MaxValue : ulong.MaxValue;
        ulong since = (ulong)((now - timer.MatchAt) / Tick);
        if ((timer.Configuration & (ulong)Timer.Periodic) != 0 && timer.Period != 0)
        {
            // Matches that nobody came for in time are merged into one.
            ulong steps = since / timer.Period + 1;
            timer.Value = (timer.Value + steps * timer.Period) & wrap;
            timer.MatchAt = AddTicks(timer.MatchAt, (UInt128)steps * timer.Period);
        }
        else
        {
            ulong turns = Is32(timer) ? since / (1ul << 32) + 1 : 0;
            timer.MatchAt = turns == 0 ? long.MaxValue : AddTicks(timer.MatchAt, (UInt128)turns << 32);
        }
        Interrupt(number);
    }

    private static long AddTicks(long at, UInt128 ticks)
    {
        UInt128 end = (UInt128)(ulong)at + ticks * Tick;
        return end >= long.MaxValue ? long.MaxValue : (long)end;
    }

    /// <summary>Derives when the comparator matches next, from its registers.</summary>
    private void Refresh(int number)
    {
        ref Comparator timer = ref _state.Timers[number];
        timer.MatchAt = long.MaxValue;
        if (Enabled)
        {
            ulong left = timer.Value - Counter();
            if (Is32(timer))
                left = (uint)left;
            long tick = _clock.Now - (_clock.Now - _state.Since) % Tick;
            timer.MatchAt = AddTicks(tick, left);
        }
        Service(number);
        Arm(number);
        DriveLine(number);
    }

    private void Arm(int number)
    {
        ref Comparator timer = ref _state.Timers[number];
        if (timer.MatchAt == long.MaxValue || (timer.Configuration & (ulong)Timer.InterruptEnable) == 0)
        {
            _timers[number].Disarm();
            return;
        }
        bool fast = (timer.Configuration & (ulong)Timer.Periodic) != 0 && timer.Period < MinimumPeriod / Tick;
        _timers[number].Arm(fast ? Math.Max(timer.MatchAt, _clock.Now + MinimumPeriod) : timer.MatchAt);
    }

    private void Interrupt(int number)
    {
        Timer configuration = (Timer)_state.Timers[number].Configuration;
        if ((configuration & Timer.LevelTriggered) != 0)
        {
            _state.InterruptStatus |= 1u << number;
            DriveLine(number);
        }
        else if ((configuration & Timer.InterruptEnable) != 0)
        {
            if ((configuration & Timer.MessageEnable) != 0)
                _msi?.Send(_state.Timers[number].Message >> 32, (uint)_state.Timers[number].Message);
            else
                LineOf(number)?.Pulse();
        }
    }

    private IIrqLine? LineOf(int number)
    {
        if (Legacy && number < 2)
            return number == 0 ? _irq0 : _irq8;
        return _lines[(int)(_state.Timers[number].Configuration & (ulong)Timer.RouteMask) >> 9];
    }

    /// <summary>Holds the wire of a level-triggered comparator, and lets go of one that it held before.</summary>
    private void DriveLine(int number)
    {
        Timer configuration = (Timer)_state.Timers[number].Configuration;
        bool asserted = Enabled && (_state.InterruptStatus & 1u << number) != 0
            && (configuration & (Timer.InterruptEnable | Timer.LevelTriggered)) == (Timer.InterruptEnable | Timer.LevelTriggered)
            && (configuration & Timer.MessageEnable) == 0;
        IIrqLine? line = asserted ? LineOf(number) : null;
        if (_asserted[number] == line)
            return;
        _asserted[number]?.Set(false);
        _asserted[number] = line;
        line?.Set(true);
    }

    private void SetPit(bool asserted)
    {
        lock (_lock)
        {
            _state.PitLevel = asserted;
            if (!Legacy)
                _irq0.Set(asserted);
        }
    }

    private void SetRtc(bool asserted)
    {
        lock (_lock)
        {
            _state.RtcLevel = asserted;
            if (!Legacy)
                _irq8.Set(asserted);
        }
    }

    /// <summary>Hands interrupt requests 0 and 8 to whoever has them now.</summary>
    private void PassLegacy()
    {
        LegacyChanged?.Invoke(Legacy);
        for (int i = 0; i < 2; i++)
        {
            IIrqLine line = i == 0 ? _irq0 : _irq8;
            if (_asserted[i] == line)
                continue;
            line.Set(!Legacy && (i == 0 ? _state.PitLevel : _state.RtcLevel));
        }
    }
}
