using System.Numerics;
using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// The six arithmetic flags in lazy form. <see cref="VcpuBlock.LazyResult"/> is the last result, sign-extended; <see cref="VcpuBlock.LazyAux"/> holds
/// the carry out of the result's top bit (bit 31: CF), the carry into it (bit 30: OF is bit 31 XOR bit 30), the carry out of bit 3 (bit 3: AF), a byte that is XORed into the
/// result's low byte before its parity is taken (bits 8-15) and an inversion of the sign (bit 16). ZF, SF and PF follow from the result.
/// </summary>
public static unsafe class LazyFlags
{
    private const uint CarryBit = 1u << 31;
    private const uint CarryInBit = 1u << 30;
    private const uint AdjustBit = 1u << 3;
    private const uint SignInversion = 1u << 16;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Carry(VcpuBlock* s) => (int)s->LazyAux < 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Overflow(VcpuBlock* s) => (int)(s->LazyAux ^ s->LazyAux << 1) < 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Zero(VcpuBlock* s) => s->LazyResult == 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Sign(VcpuBlock* s) => ((s->LazyResult >> 63) ^ (s->LazyAux >> 16 & 1)) != 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Parity(VcpuBlock* s) => (BitOperations.PopCount((uint)(byte)s->LazyResult ^ (s->LazyAux >> 8 & 0xff)) & 1) == 0;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Adjust(VcpuBlock* s) => (s->LazyAux & AdjustBit) != 0;

    /// <summary>The arithmetic flags in their places of RFLAGS.</summary>
    public static ulong Arithmetic(VcpuBlock* s)
    {
        ulong flags = 0;
        if (Carry(s))
            flags |= (ulong)Rflags.CF;
        if (Parity(s))
            flags |= (ulong)Rflags.PF;
        if (Adjust(s))
            flags |= (ulong)Rflags.AF;
        if (Zero(s))
            flags |= (ulong)Rflags.ZF;
        if (Sign(s))
            flags |= (ulong)Rflags.SF;
        if (Overflow(s))
            flags |= (ulong)Rflags.OF;
        return flags;
    }

    /// <summary>All of RFLAGS.</summary>
    public static ulong Read(VcpuBlock* s) => s->SystemFlags | Arithmetic(s);

    /// <summary>Sets the six arithmetic flags from their places in RFLAGS; other bits are ignored.</summary>
    public static void SetArithmetic(VcpuBlock* s, ulong flags)
    {
        // A zero result has even parity, a one odd parity: the parity byte inverts where that is not what is asked for.
        bool zero = (flags & (ulong)Rflags.ZF) != 0;
        bool parity = (flags & (ulong)Rflags.PF) != 0;
        uint aux = zero == parity ? 0u : 0x100u;
        if ((flags & (ulong)Rflags.SF) != 0)
            aux |= SignInversion;
        if ((flags & (ulong)Rflags.AF) != 0)
            aux |= AdjustBit;
        bool carry = (flags & (ulong)Rflags.CF) != 0;
        bool overflow = (flags & (ulong)Rflags.OF) != 0;
        if (carry)
            aux |= CarryBit;
        if (carry != overflow)
            aux |= CarryInBit;
        s->LazyResult = zero ? 0u : 1u;
        s->LazyAux = aux;
    }

    /// <summary>Sets all of RFLAGS. The caller has masked what the current privilege may change, and looks at TF, IF, AC and VM itself.</summary>
    public static void Write(VcpuBlock* s, ulong flags)
    {
        SetArithmetic(s, flags);
        s->SystemFlags = (flags & ~(ulong)Rflags.Arithmetic) | (ulong)Rflags.Fixed1;
    }

    /// <summary>Changes CF alone.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetCarry(VcpuBlock* s, bool carry) => SetCarryOverflow(s, carry, Overflow(s));

    /// <summary>Changes CF and OF alone.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetCarryOverflow(VcpuBlock* s, bool carry, bool overflow)
    {
        uint c = carry ? 1u : 0u;
        uint o = overflow ? 1u : 0u;
        s->LazyAux = (s->LazyAux & ~(CarryBit | CarryInBit)) | c << 31 | (c ^ o) << 30;
    }

    /// <summary>Changes ZF alone; the other five flags stay.</summary>
    public static void SetZero(VcpuBlock* s, bool zero)
    {
        ulong flags = Arithmetic(s) & ~(ulong)Rflags.ZF;
        SetArithmetic(s, zero ? flags | (ulong)Rflags.ZF : flags);
    }

    /// <summary>Result flags from a sign-extended result, CF and OF given, AF clear: shifts, multiplications, bit instructions.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetResult(VcpuBlock* s, ulong signExtended, bool carry, bool overflow)
    {
        uint c = carry ? 1u : 0u;
        uint o = overflow ? 1u : 0u;
        s->LazyResult = signExtended;
        s->LazyAux = c << 31 | (c ^ o) << 30;
    }
}
