using System;
using System.Numerics;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>A fast, seedable source of random values (xoshiro256**), and of the values that instructions tend to be wrong for.</summary>
internal struct Dice
{
    private ulong _a;
    private ulong _b;
    private ulong _c;
    private ulong _d;

    public Dice(ulong seed)
    {
        _a = Spread(ref seed);
        _b = Spread(ref seed);
        _c = Spread(ref seed);
        _d = Spread(ref seed);
    }

    /// <summary>A seed for one case out of many: every part changes all of it.</summary>
    public static ulong Seed(ulong seed, ulong mode, ulong form, ulong index)
    {
        ulong state = seed;
        ulong result = Spread(ref state);
        state = result ^ mode;
        result = Spread(ref state);
        state = result ^ form;
        result = Spread(ref state);
        state = result ^ index;
        return Spread(ref state);
    }

    public ulong Next()
    {
        ulong result = BitOperations.RotateLeft(_b * 5, 7) * 9;
        ulong t = _b << 17;
        _c ^= _a;
        _d ^= _b;
        _b ^= _c;
        _a ^= _d;
        _c ^= t;
        _d = BitOperations.RotateLeft(_d, 45);
        return result;
    }

    /// <summary>0 to <paramref name="count"/> - 1.</summary>
    public int Below(int count) => (int)((UInt128)Next() * (uint)count >> 64);

    public bool Percent(int chance) => Below(100) < chance;

    /// <summary>An integer: random, near a boundary of some width, a power of two, small, or like digits.</summary>
    public ulong Integer()
    {
        switch (Below(10))
        {
            case 0:
                return (ulong)(long)(Below(40) - 20);
            case 1:
            {
                int width = 8 << Below(4);
                ulong top = width == 64 ? ulong.MaxValue : (1ul << width) - 1;
                ulong value = Below(4) switch
                {
                    0 => top,
                    1 => top >> 1,
                    2 => (top >> 1) + 1,
                    _ => 0,
                };
                return value + (ulong)(long)(Below(3) - 1);
            }
            case 2:
                return (1ul << Below(64)) + (ulong)(long)(Below(3) - 1);
            case 3:
                return Next() & 0x0f0f_0f0f_0f0f_0f0f;
            case 4:
                return (ulong)(long)(int)Next();
            case 5:
                return Next() >> Below(64);
            case 6:
                return Percent(50) ? 0 : ulong.MaxValue;
            default:
                return Next();
        }
    }

    /// <summary>A double: ordinary, an integer, extreme, denormal, infinite, NaN, zero.</summary>
    public ulong Double()
    {
        ulong sign = Next() & 1ul << 63;
        switch (Below(14))
        {
            case 0:
                return sign;
            case 1:
                return sign | 0x7ff0ul << 48;
            case 2:
                return sign | 0x7ff8ul << 48 | Next() >> 13;
            case 3:
                return sign | 0x7ff0ul << 48 | Next() >> 13 | 1;
            case 4:
                return sign | Next() >> 12 >> Below(52);
            case 5:
                return sign | 0x7fe0ul << 48 | Next() >> 11;
            case 6:
                return sign | 0x0010ul << 48 | Next() >> 12;
            case 7:
                return (ulong)System.BitConverter.DoubleToInt64Bits(Below(2000) - 1000);
            case 8:
                return (ulong)System.BitConverter.DoubleToInt64Bits((long)Integer());
            case 9:
                return sign | (ulong)(1023 - 70 + Below(140)) << 52 | Next() >> 12;
            case 10:
                return (ulong)System.BitConverter.DoubleToInt64Bits((Below(2000) - 1000) * 0.5);
            case 11:
                return Next();
            default:
                return sign | (ulong)(1023 - 4 + Below(8)) << 52 | Next() >> 12;
        }
    }

    /// <summary>A float, as <see cref="Double"/>.</summary>
    public uint Single()
    {
        uint sign = (uint)(Next() >> 63) << 31;
        uint random = (uint)(Next() >> 32);
        return Below(13) switch
        {
            0 => sign,
            1 => sign | 0x7f80_0000,
            2 => sign | 0x7fc0_0000 | random >> 10,
            3 => sign | 0x7f80_0000 | random >> 10 | 1,
            4 => sign | random >> 9 >> Below(23),
            5 => sign | 0x7f00_0000 | random >> 9,
            6 => sign | 0x0080_0000 | random >> 9,
            7 => System.BitConverter.SingleToUInt32Bits(Below(2000) - 1000),
            8 => System.BitConverter.SingleToUInt32Bits((int)Integer()),
            9 => sign | (uint)(127 - 40 + Below(80)) << 23 | random >> 9,
            10 => System.BitConverter.SingleToUInt32Bits((Below(2000) - 1000) * 0.5f),
            11 => random,
            _ => sign | (uint)(127 - 4 + Below(8)) << 23 | random >> 9,
        };
    }

    /// <summary>An 80-bit value's sign and exponent and its significand, those of no valid format among them.</summary>
    public (ulong Significand, ushort Exponent) Extended()
    {
        ushort sign = (ushort)(Next() & 0x8000);
        ulong significand = Next() | 1ul << 63;
        return Below(16) switch
        {
            0 => (0, sign),
            1 => (1ul << 63, (ushort)(sign | 0x7fff)),
            2 => (significand | 1ul << 62, (ushort)(sign | 0x7fff)),
            3 => (significand & ~(1ul << 62) | 1, (ushort)(sign | 0x7fff)),
            4 => (significand >> 1 >> Below(63), sign),
            5 => (significand, sign),
            6 => (significand, (ushort)(sign | 0x7ffe)),
            7 => (significand, (ushort)(sign | 1)),
            8 => (significand >> 1, (ushort)(sign | 0x4000)),
            9 => (significand >> 1, (ushort)(sign | 0x7fff)),
            10 => (Next(), (ushort)Next()),
            11 => FromDouble(Below(2000) - 1000),
            12 => FromDouble((Below(2000) - 1000) * 0.5),
            13 => (significand, (ushort)(sign | 0x3fff - 70 + Below(140))),
            _ => (significand, (ushort)(sign | 0x3fff - 3 + Below(6))),
        };
    }

    /// <summary>Eight bytes of vector or memory contents of some flavour.</summary>
    public ulong Lane(Flavour flavour) => flavour switch
    {
        Flavour.Single => Single() | (ulong)Single() << 32,
        Flavour.Double => Double(),
        Flavour.Bytes => Percent(50) ? Next() & 0x0303_0303_0303_0303 : Next() & 0x8f8f_8f8f_8f8f_8f8f,
        Flavour.Integer => Percent(50) ? Integer() : (uint)Integer() | Integer() << 32,
        _ => Next(),
    };

    public Flavour AnyFlavour() => (Flavour)Below(5);

    private static (ulong Significand, ushort Exponent) FromDouble(double value)
    {
        ulong bits = System.BitConverter.DoubleToUInt64Bits(value);
        ushort sign = (ushort)(bits >> 48 & 0x8000);
        int exponent = (int)(bits >> 52 & 0x7ff);
        return exponent == 0 ? (0, sign) : (1ul << 63 | bits << 11, (ushort)(sign | exponent - 1023 + 16383));
    }

    private static ulong Spread(ref ulong state)
    {
        state += 0x9e37_79b9_7f4a_7c15;
        ulong z = state;
        z = (z ^ z >> 30) * 0xbf58_476d_1ce4_e5b9;
        z = (z ^ z >> 27) * 0x94d0_49bb_1331_11eb;
        return z ^ z >> 31;
    }
}

/// <summary>What vector registers and memory hold in a case.</summary>
internal enum Flavour
{
    Random,
    Integer,
    Bytes,
    Single,
    Double,
}
