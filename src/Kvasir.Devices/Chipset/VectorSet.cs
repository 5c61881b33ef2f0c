using System;
using System.Numerics;

namespace Kvasir.Devices.Chipset;

/// <summary>A set of interrupt vectors: the 256-bit IRR, ISR and TMR of a local APIC.</summary>
public record struct VectorSet
{
    public ulong Word0;
    public ulong Word1;
    public ulong Word2;
    public ulong Word3;

    /// <summary>The highest vector in the set, or -1 where it is empty.</summary>
    public readonly int Highest
    {
        get
        {
            if (Word3 != 0)
                return 255 - BitOperations.LeadingZeroCount(Word3);
            if (Word2 != 0)
                return 191 - BitOperations.LeadingZeroCount(Word2);
            if (Word1 != 0)
                return 127 - BitOperations.LeadingZeroCount(Word1);
            return Word0 != 0 ? 63 - BitOperations.LeadingZeroCount(Word0) : -1;
        }
    }

    public readonly bool Contains(int vector) => (Word(vector >> 6) >> (vector & 63) & 1) != 0;

    public void Add(int vector)
    {
        ulong bit = 1ul << (vector & 63);
        switch (vector >> 6)
        {
            case 0: Word0 |= bit; break;
            case 1: Word1 |= bit; break;
            case 2: Word2 |= bit; break;
            default: Word3 |= bit; break;
        }
    }

    public void Remove(int vector)
    {
        ulong mask = ~(1ul << (vector & 63));
        switch (vector >> 6)
        {
            case 0: Word0 &= mask; break;
            case 1: Word1 &= mask; break;
            case 2: Word2 &= mask; break;
            default: Word3 &= mask; break;
        }
    }

    /// <summary>One of the eight 32-bit registers that show the set, lowest vectors first.</summary>
    public readonly uint Register(int index)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)index, 7u);
        return (uint)(Word(index >> 1) >> (index & 1) * 32);
    }

    private readonly ulong Word(int index) => index switch
    {
        0 => Word0,
        1 => Word1,
        2 => Word2,
        _ => Word3,
    };
}
