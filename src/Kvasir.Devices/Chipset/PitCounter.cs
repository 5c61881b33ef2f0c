using System;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// One counter of an Intel 8254 (datasheet order number 231164, "Mode Definitions"). Times are CLK pulses since the VM's clock
/// began; nothing ticks: the
/// count and OUT are derived from when the counting element was loaded.
/// </summary>
public record struct PitCounter
{
    /// <summary>No such moment.</summary>
    public const long Never = long.MaxValue;

    /// <summary>Mode 0 to 5.</summary>
    public byte Mode;

    /// <summary>RW of the control word: 1 low byte, 2 high byte, 3 low then high; 0 before the first control word.</summary>
    public byte Access;

    public bool Bcd;
    public bool Gate;

    /// <summary>The count in the counting element, 1 to 65,536 (10,000 in BCD); 0 before the first.</summary>
    public int Count;

    /// <summary>When the counting element was or will be loaded; <see cref="Never"/> while it waits for a count or a trigger.</summary>
    public long Loaded;

    /// <summary>The count register: what the next load takes.</summary>
    public int NextCount;

    /// <summary>When a running periodic mode takes <see cref="NextCount"/>.</summary>
    public long NextAt;

    /// <summary>Gate low in modes 0, 2, 3 and 4: pulses counted so far, or -1 while it counts.</summary>
    public long Held;

    /// <summary>The low byte of a count of which the high byte is still to come.</summary>
    public byte WriteLow;

    public bool WriteHigh;
    public bool ReadHigh;

    /// <summary>Bytes of <see cref="Latch"/> that are still to be read.</summary>
    public byte LatchBytes;

    public ushort Latch;
    public bool StatusLatched;
    public byte Status;

    private readonly int Modulus => Bcd ? 10_000 : 65_536;

    /// <summary>How long OUT is high in mode 3.</summary>
    private readonly int HighHalf => (Count + 1) / 2;

    /// <summary>A counter that was never programmed.</summary>
    public static PitCounter AtPowerOn(bool gate) => new() { Gate = gate, Loaded = Never, NextAt = Never, Held = -1 };

    /// <summary>The OUT pin.</summary>
    public bool Output(long now)
    {
        Settle(now);
        if (Mode is 2 or 3 && !Gate)
            return true;
        long e = Elapsed(now);
        if (e < 0)
            return Mode != 0;
        return Mode switch
        {
            0 => e >= Count,
            1 => e >= Count,
            2 => e % Count != Count - 1,
            3 => e % Count < HighHalf,
            // The strobe lasts one pulse, whether the gate lets the count go on or not.
            _ => e != Count || Held >= 0,
        };
    }

    /// <summary>The counting element as a guest reads it.</summary>
    public ushort Value(long now)
    {
        Settle(now);
        long e = Elapsed(now);
        long value;
        if (e < 0)
        {
            value = Loaded == Never ? NextCount : Count;
        }
        else
        {
            switch (Mode)
            {
                case 2:
                    value = Count - e % Count;
                    break;
                case 3:
                    long phase = e % Count;
                    value = (Count & ~1) - 2 * (phase < HighHalf ? phase : phase - HighHalf);
                    break;
                default:
                    value = (Count - e) % Modulus;
                    break;
            }
        }
        if (value < 0)
            value += Modulus;
        value %= Modulus;
        return Bcd ? ToBcd((int)value) : (ushort)value;
    }

    /// <summary>The first rising edge of OUT after a moment, as things stand.</summary>
    public readonly long NextRise(long after)
    {
        if (Loaded == Never || Held >= 0 || (Mode is 2 or 3 && !Gate))
            return Never;
        long rise = RiseAfter(after);
        if (NextAt == Never || rise <= NextAt)
            return rise;
        PitCounter then = this;
        then.Settle(NextAt);
        return then.RiseAfter(Math.Max(after, NextAt));
    }

    /// <summary>A control word for this counter.</summary>
    public void SetMode(byte control)
    {
        bool gate = Gate;
        ushort latch = Latch;
        this = AtPowerOn(gate);
        Latch = latch;
        Access = (byte)(control >> 4 & 3);
        // Modes 2 and 3 may be written with the third bit set.
        int mode = control >> 1 & 7;
        Mode = (byte)(mode > 5 ? mode & 3 : mode);
        Bcd = (control & 1) != 0;
    }

    /// <summary>A byte of the count.</summary>
    public void Write(byte value, long now)
    {
        Settle(now);
        switch (Access)
        {
            case 1:
                LoadCount(value, now);
                break;
            case 2:
                LoadCount((ushort)(value << 8), now);
                break;
            case 3 when !WriteHigh:
                WriteLow = value;
                WriteHigh = true;
                // The first of two bytes stops mode 0 and lowers OUT.
                if (Mode == 0)
                    Loaded = Never;
                break;
            case 3:
                WriteHigh = false;
                LoadCount((ushort)(WriteLow | value << 8), now);
                break;
            default:
                break;
        }
    }

    public byte Read(long now)
    {
        if (StatusLatched)
        {
            StatusLatched = false;
            return Status;
        }
        if (LatchBytes > 0)
        {
            bool high = Access == 2 || (Access == 3 && LatchBytes == 1);
            LatchBytes--;
            return (byte)(high ? Latch >> 8 : Latch);
        }
        ushort value = Value(now);
        switch (Access)
        {
            case 1:
                return (byte)value;
            case 2:
                return (byte)(value >> 8);
            default:
                bool second = ReadHigh;
                ReadHigh = !second;
                return (byte)(second ? value >> 8 : value);
        }
    }

    /// <summary>The counter latch command; a latch that was not read yet stays.</summary>
    public void LatchCount(long now)
    {
        if (LatchBytes > 0)
            return;
        Latch = Value(now);
        LatchBytes = (byte)(Access == 3 ? 2 : 1);
    }

    /// <summary>The status part of the read-back command.</summary>
    public void LatchStatus(long now)
    {
        if (StatusLatched)
            return;
        bool output = Output(now);
        bool isNull = Loaded == Never || now < Loaded || NextAt != Never;
        Status = (byte)((output ? 0x80 : 0) | (isNull ? 0x40 : 0) | Access << 4 | Mode << 1 | (Bcd ? 1 : 0));
        StatusLatched = true;
    }

    public void SetGate(bool gate, long now)
    {
        Settle(now);
        if (gate == Gate)
            return;
        Gate = gate;
        switch (Mode)
        {
            case 0 or 4 when Loaded != Never:
                if (!gate)
                {
                    Held = Math.Max(now - Loaded, 0);
                }
                else
                {
                    // A load that is still to come is not put off.
                    Loaded = Math.Max(Loaded, now - Held);
                    Held = -1;
                }
                break;
            case 2 or 3 when !gate && Loaded != Never:
                Held = Math.Max(now - Loaded, 0);
                NextAt = Never;
                break;
            case 1 or 2 or 3 or 5 when gate && NextCount != 0:
                // A trigger: the next pulse loads the newest count.
                Count = NextCount;
                NextAt = Never;
                Held = -1;
                Loaded = now + 1;
                break;
            default:
                break;
        }
    }

    /// <summary>Pulses counted since the load; negative before it.</summary>
    private readonly long Elapsed(long now)
    {
        if (Loaded == Never)
            return -1;
        return Held >= 0 ? Held : now - Loaded;
    }

    private readonly long RiseAfter(long after) => Mode switch
    {
        0 or 1 => Loaded + Count > after ? Loaded + Count : Never,
        2 or 3 => Count < 2 ? Never : after < Loaded ? Loaded + Count : Loaded + ((after - Loaded) / Count + 1) * Count,
        _ => Loaded + Count + 1 > after ? Loaded + Count + 1 : Never,
    };

    private void LoadCount(ushort raw, long now)
    {
        int count = Bcd ? FromBcd(raw) : raw;
        NextCount = count == 0 ? Modulus : count;
        bool running = Loaded != Never;
        switch (Mode)
        {
            case 0:
            case 4:
                Count = NextCount;
                Loaded = now + 1;
                Held = Gate ? -1 : 0;
                break;
            case 2:
            case 3:
                if (running && Gate)
                {
                    NextAt = now < Loaded ? Loaded : EndOfPhase(now);
                }
                else if (Gate)
                {
                    Count = NextCount;
                    Loaded = now + 1;
                }
                break;
            default:
                // Modes 1 and 5 load at the next trigger.
                break;
        }
    }

    /// <summary>When the current cycle of mode 2, or half-cycle of mode 3, ends.</summary>
    private readonly long EndOfPhase(long now)
    {
        long phase = (now - Loaded) % Count;
        long start = now - phase;
        return Mode == 3 && phase < HighHalf ? start + HighHalf : start + Count;
    }

    /// <summary>Takes over a count whose moment has come.</summary>
    private void Settle(long now)
    {
        if (NextAt > now)
            return;
        bool low = Mode == 3 && NextAt > Loaded && (NextAt - Loaded) % Count != 0;
        Count = NextCount;
        // At the end of a high half the new count begins with its low half.
        Loaded = low ? NextAt - HighHalf : NextAt;
        NextAt = Never;
    }

    private static int FromBcd(ushort raw) =>
        ((raw >> 12) * 1000 + (raw >> 8 & 0xf) * 100 + (raw >> 4 & 0xf) * 10 + (raw & 0xf)) % 10_000;

    private static ushort ToBcd(int value) => (ushort)(value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10);
}
