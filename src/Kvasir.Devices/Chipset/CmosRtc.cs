using System;
using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The MC146818 real-time clock and CMOS memory of a PC, ports 70h/71h (Motorola MC146818 datasheet; century in byte 32h).
/// </summary>
/// <remarks>
/// The registers are the clock: an update cycle adds a second to whatever they hold, so a guest may set them in any order.
/// Updates that nobody
/// waited for are made up for at the next access.
/// </remarks>
public sealed class CmosRtc : IPortDevice, IStateful<CmosRtc.State>, IResettable
{
    public const ushort IndexPort = 0x70;
    public const ushort DataPort = 0x71;

    private const int Size = 128;
    private const long Second = 1_000_000_000;

    /// <summary>
    /// tBUC + tUC at 32.768 kHz: UIP is set 244 µs before an update cycle of 1,984 µs, at the end of which the registers change.
    /// </summary>
    private const long UpdateTime = 2_228_000;

    private enum Register : byte
    {
        Seconds = 0x00,
        SecondsAlarm = 0x01,
        Minutes = 0x02,
        MinutesAlarm = 0x03,
        Hours = 0x04,
        HoursAlarm = 0x05,
        DayOfWeek = 0x06,
        DayOfMonth = 0x07,
        Month = 0x08,
        Year = 0x09,
        A = 0x0a,
        B = 0x0b,
        C = 0x0c,
        D = 0x0d,
        Century = 0x32,
    }

    [Flags]
    private enum RegisterB : byte
    {
        None = 0,
        DaylightSavings = 1 << 0,
        Hours24 = 1 << 1,
        Binary = 1 << 2,
        SquareWave = 1 << 3,
        UpdateEnded = 1 << 4,
        Alarm = 1 << 5,
        Periodic = 1 << 6,
        Set = 1 << 7,
        Interrupts = UpdateEnded | Alarm | Periodic,
    }

    private const byte UpdateInProgress = 1 << 7;
    private const byte ValidRam = 1 << 7;
    private const byte InterruptRequest = 1 << 7;
    private const byte Pm = 1 << 7;

    /// <summary>Divider 010 (32.768 kHz), rate 0110 (1,024 Hz): what a BIOS sets.</summary>
    private const byte DefaultA = 0x26;

    /// <summary>The 128 bytes: clock, control and memory.</summary>
    [InlineArray(Size)]
    public struct Bytes : IEquatable<Bytes>
    {
        private byte _first;

        public readonly bool Equals(Bytes other) => ((ReadOnlySpan<byte>)this).SequenceEqual(other);

        public override readonly bool Equals(object? obj) => obj is Bytes other && Equals(other);

        public override readonly int GetHashCode() => HashCode.Combine(this[0], this[Size - 1]);

        public static bool operator ==(Bytes a, Bytes b) => a.Equals(b);

        public static bool operator !=(Bytes a, Bytes b) => !a.Equals(b);
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State
    {
        public Bytes Memory;
        public byte Index;

        /// <summary>When the last update cycle ended, in guest nanoseconds; the next ends a second later.</summary>
        public long Updated;

        /// <summary>When the periodic divider was last looked at, in guest nanoseconds.</summary>
        public long PeriodicSeen;
    }

    // Wiring
    private readonly VmClock _clock;
    private readonly VmTimer _timer;
    private readonly IIrqLine _irq;

    // State
    private readonly Lock _lock = new();
    private State _state;

    /// <summary>Makes a clock that shows the VM's wall time (UTC).</summary>
    /// <param name="irq">ISA interrupt request 8, or an HPET's gate before it.</param>
    public CmosRtc(VmClock clock, IIrqLine irq)
    {
        _clock = clock;
        _irq = irq;
        _timer = clock.CreateTimer(OnTimer);
        Set(Register.A, DefaultA);
        Set(Register.B, (byte)RegisterB.Hours24);
        Set(Register.D, ValidRam);
        DateTimeOffset wall = clock.WallNow;
        SetTime(wall.UtcDateTime);
        long now = clock.Now;
        _state.Updated = now - wall.UtcDateTime.TimeOfDay.Ticks % TimeSpan.TicksPerSecond * 100;
        _state.PeriodicSeen = now;
    }

    /// <summary>The alarm or another interrupt happened while enabled. For waking a sleeping machine.</summary>
    public bool InterruptPending
    {
        get
        {
            lock (_lock)
                return (Get(Register.C) & InterruptRequest) != 0;
        }
    }

    private bool Running => (Flags & RegisterB.Set) == 0 && (Get(Register.A) & 0x70) <= 0x20;

    private RegisterB Flags => (RegisterB)Get(Register.B);

    /// <summary>Nanoseconds between periodic interrupts times 32,768; 0 where there are none.</summary>
    private long PeriodTicks
    {
        get
        {
            int rate = Get(Register.A) & 0xf;
            return rate == 0 || (Get(Register.A) & 0x70) > 0x20 ? 0 : rate < 3 ? 1 << (rate + 6) : 1 << (rate - 1);
        }
    }

    /// <summary>Claims ports 70h and 71h.</summary>
    public void Map(PortBus bus) => bus.Map(IndexPort, 2, this);

    /// <summary>Sets a byte of CMOS memory, as the board's set-up would (0Eh to 7Fh).</summary>
    public void SetMemory(byte index, byte value)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(index, (byte)0x0e);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(index, (byte)0x7f);
        lock (_lock)
            _state.Memory[index] = value;
    }

    /// <summary>Reads a byte of CMOS memory as the guest left it.</summary>
    public byte GetMemory(byte index)
    {
        lock (_lock)
            return _state.Memory[index & 0x7f];
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        if (port != DataPort)
            return 0xff;
        lock (_lock)
        {
            CatchUp();
            Register register = (Register)_state.Index;
            switch (register)
            {
                case Register.A:
                    return (uint)(Get(Register.A) & 0x7f) | (Updating() ? (uint)UpdateInProgress : 0);
                case Register.C:
                    byte flags = Get(Register.C);
                    Set(Register.C, 0);
                    _irq.Set(false);
                    return flags;
                default:
                    return Get(register);
            }
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        byte data = (byte)value;
        lock (_lock)
        {
            if (port != DataPort)
            {
                // Bit 7 masks NMIs, of which this board's ports raise none.
                _state.Index = (byte)(data & 0x7f);
                return;
            }
            CatchUp();
            Register register = (Register)_state.Index;
            switch (register)
            {
                case Register.A:
                    WriteA(data);
                    break;
                case Register.B:
                    WriteB(data);
                    break;
                case Register.C:
                case Register.D:
                    break;
                default:
                    Set(register, data);
                    break;
            }
            ArmTimer();
        }
    }

    /// <summary>The RESET pin: interrupts off, time and memory kept.</summary>
    public void Reset()
    {
        lock (_lock)
        {
            CatchUp();
            Set(Register.B, (byte)(Flags & ~(RegisterB.Interrupts | RegisterB.SquareWave)));
            Set(Register.C, 0);
            _irq.Set(false);
            ArmTimer();
        }
    }

    public State Save()
    {
        lock (_lock)
        {
            CatchUp();
            return _state;
        }
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            _state.Index &= 0x7f;
            _irq.Set((Get(Register.C) & InterruptRequest) != 0);
            ArmTimer();
        }
    }

    private byte Get(Register register) => _state.Memory[(int)register];

    private void Set(Register register, byte value) => _state.Memory[(int)register] = value;

    private bool Updating() => Running && _clock.Now >= _state.Updated + Second - UpdateTime;

    private void WriteA(byte value)
    {
        bool wasReset = (Get(Register.A) & 0x70) > 0x20;
        Set(Register.A, (byte)(value & 0x7f));
        bool isReset = (value & 0x70) > 0x20;
        // The first update comes half a second after the divider is released.
        if (wasReset && !isReset)
            _state.Updated = _clock.Now - Second / 2;
        _state.PeriodicSeen = _clock.Now;
    }

    private void WriteB(byte value)
    {
        if ((value & (byte)RegisterB.Set) != 0)
            value &= (byte)~RegisterB.UpdateEnded;
        Set(Register.B, value);
        Raise(0);
    }

    private void OnTimer()
    {
        lock (_lock)
        {
            CatchUp();
            ArmTimer();
        }
    }

    /// <summary>Does everything that should have happened by now.</summary>
    private void CatchUp()
    {
        long now = _clock.Now;
        byte raised = 0;
        if (PeriodTicks != 0)
        {
            if (PeriodicIndex(now) != PeriodicIndex(_state.PeriodicSeen))
                raised |= (byte)RegisterB.Periodic;
        }
        _state.PeriodicSeen = now;
        long seconds = (now - _state.Updated) / Second;
        if (seconds > 0)
        {
            _state.Updated += seconds * Second;
            if (Running)
                raised |= Update(seconds);
        }
        Raise(raised);
    }

    private long PeriodicIndex(long at) => (long)VmClock.ToTicks(at, 32_768) / PeriodTicks;

    /// <summary>Sets flags in register C and the line from what is enabled.</summary>
    private void Raise(byte flags)
    {
        byte c = (byte)((Get(Register.C) | flags) & (byte)RegisterB.Interrupts);
        if ((c & Get(Register.B)) != 0)
            c |= InterruptRequest;
        Set(Register.C, c);
        _irq.Set((c & InterruptRequest) != 0);
    }

    /// <summary>Runs update cycles.</summary>
    /// <returns>The flags that they set.</returns>
    private byte Update(long seconds)
    {
        byte raised = (byte)RegisterB.UpdateEnded;
        // After a day every time of day has been seen by the alarm; the rest can be added in one go.
        const long day = 86_400;
        if (seconds > 2 * day)
        {
            long whole = seconds / day - 1;
            for (long i = 0; i < Math.Min(whole, 400_000); i++)
                NextDay();
            seconds -= whole * day;
        }
        for (long i = 0; i < seconds; i++)
        {
            AddSecond();
            if (AlarmMatches())
                raised |= (byte)RegisterB.Alarm;
        }
        return raised;
    }

    private bool AlarmMatches() =>
        Matches(Register.SecondsAlarm, Register.Seconds) && Matches(Register.MinutesAlarm, Register.Minutes)
        && Matches(Register.HoursAlarm, Register.Hours);

    /// <summary>An alarm byte of C0h to FFh matches anything.</summary>
    private bool Matches(Register alarm, Register time) => Get(alarm) >= 0xc0 || Get(alarm) == Get(time);

    private void AddSecond()
    {
        if (Increment(Register.Seconds, 59, 0) || Increment(Register.Minutes, 59, 0))
            return;
        if (NextHour())
            NextDay();
    }

    /// <summary>Adds one to a register.</summary>
    /// <returns>False where it began anew at <paramref name="first"/> after <paramref name="last"/>.</returns>
    private bool Increment(Register register, int last, int first)
    {
        int value = Decode(Get(register));
        bool goesOn = value < last;
        Set(register, Encode(goesOn ? value + 1 : first));
        return goesOn;
    }

    /// <returns>True at midnight.</returns>
    private bool NextHour()
    {
        int hour = DecodeHour(Get(Register.Hours));
        hour = hour >= 23 ? 0 : hour + 1;
        Set(Register.Hours, EncodeHour(hour));
        return hour == 0;
    }

    private void NextDay()
    {
        _ = Increment(Register.DayOfWeek, 7, 1);
        if (Increment(Register.DayOfMonth, DaysInMonth(), 1))
            return;
        if (Increment(Register.Month, 12, 1) || Increment(Register.Year, 99, 0))
            return;
        _ = Increment(Register.Century, 99, 0);
    }

    private int DaysInMonth()
    {
        int year = Decode(Get(Register.Year)) % 100 + Decode(Get(Register.Century)) % 100 * 100;
        int month = Decode(Get(Register.Month));
        return month is < 1 or > 12 ? 31 : DateTime.DaysInMonth(Math.Clamp(year, 1, 9999), month);
    }

    private int Decode(byte value) => (Flags & RegisterB.Binary) != 0 ? value : (value >> 4) * 10 + (value & 0xf);

    private byte Encode(int value) => (byte)((Flags & RegisterB.Binary) != 0 ? value : value / 10 << 4 | value % 10);

    private int DecodeHour(byte value)
    {
        if ((Flags & RegisterB.Hours24) != 0)
            return Decode(value);
        int hour = Decode((byte)(value & ~Pm)) % 12;
        return (value & Pm) != 0 ? hour + 12 : hour;
    }

    private byte EncodeHour(int hour)
    {
        if ((Flags & RegisterB.Hours24) != 0)
            return Encode(hour);
        byte value = Encode(hour % 12 == 0 ? 12 : hour % 12);
        return hour >= 12 ? (byte)(value | Pm) : value;
    }

    private void SetTime(DateTime time)
    {
        Set(Register.Seconds, Encode(time.Second));
        Set(Register.Minutes, Encode(time.Minute));
        Set(Register.Hours, EncodeHour(time.Hour));
        Set(Register.DayOfWeek, Encode((int)time.DayOfWeek + 1));
        Set(Register.DayOfMonth, Encode(time.Day));
        Set(Register.Month, Encode(time.Month));
        Set(Register.Year, Encode(time.Year % 100));
        Set(Register.Century, Encode(time.Year / 100));
    }

    /// <summary>Wakes for the next event that an interrupt is enabled for; everything else is made up for when it is looked at.</summary>
    private void ArmTimer()
    {
        long next = long.MaxValue;
        if ((Flags & RegisterB.Periodic) != 0 && PeriodTicks != 0)
            next = VmClock.ToNanoseconds((ulong)((PeriodicIndex(_state.PeriodicSeen) + 1) * PeriodTicks), 32_768);
        if ((Flags & (RegisterB.UpdateEnded | RegisterB.Alarm)) != 0 && Running)
            next = Math.Min(next, _state.Updated + Second);
        if (next == long.MaxValue)
            _timer.Disarm();
        else
            _timer.Arm(next);
    }
}
