using System.Runtime.CompilerServices;
using System.Threading;

namespace Kvasir.Cpu;

/// <summary>An operand size, as a type argument: handlers are compiled once for each. Values travel zero-extended in 64 bits.</summary>
public unsafe interface IWidth
{
    static abstract int Bytes { get; }

    /// <summary>Bits of the operand.</summary>
    static abstract int Bits { get; }

    /// <summary>Reads from memory or a register's own bytes.</summary>
    static abstract ulong Get(byte* p);

    /// <summary>Writes memory.</summary>
    static abstract void Put(byte* p, ulong value);

    /// <summary>Writes a register by the architecture's rule: 32-bit writes clear the upper half, narrower ones leave the rest.</summary>
    static abstract void SetRegister(byte* p, ulong value);

    static abstract ulong Truncate(ulong value);

    static abstract ulong SignExtend(ulong value);

    /// <summary>The <see cref="VcpuBlock.LazyAux"/> bits of a vector of carries out of each bit.</summary>
    static abstract uint Carries(ulong vector);

    /// <summary>Atomic compare and exchange; gives what was there.</summary>
    static abstract ulong CompareExchange(byte* p, ulong value, ulong comparand);

    static abstract ulong Exchange(byte* p, ulong value);
}

public unsafe struct W8 : IWidth
{
    public static int Bytes => 1;

    public static int Bits => 8;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Get(byte* p) => *p;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Put(byte* p, ulong value) => *p = (byte)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetRegister(byte* p, ulong value) => *p = (byte)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Truncate(ulong value) => (byte)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong SignExtend(ulong value) => (ulong)(sbyte)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Carries(ulong vector) => ((uint)vector & 0xc0) << 24 | ((uint)vector & 8);

    public static ulong CompareExchange(byte* p, ulong value, ulong comparand) => Interlocked.CompareExchange(ref *p, (byte)value, (byte)comparand);

    public static ulong Exchange(byte* p, ulong value) => Interlocked.Exchange(ref *p, (byte)value);
}

public unsafe struct W16 : IWidth
{
    public static int Bytes => 2;

    public static int Bits => 16;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Get(byte* p) => *(ushort*)p;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Put(byte* p, ulong value) => *(ushort*)p = (ushort)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetRegister(byte* p, ulong value) => *(ushort*)p = (ushort)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Truncate(ulong value) => (ushort)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong SignExtend(ulong value) => (ulong)(short)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Carries(ulong vector) => ((uint)vector & 0xc000) << 16 | ((uint)vector & 8);

    public static ulong CompareExchange(byte* p, ulong value, ulong comparand) => Interlocked.CompareExchange(ref *(ushort*)p, (ushort)value, (ushort)comparand);

    public static ulong Exchange(byte* p, ulong value) => Interlocked.Exchange(ref *(ushort*)p, (ushort)value);
}

public unsafe struct W32 : IWidth
{
    public static int Bytes => 4;

    public static int Bits => 32;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Get(byte* p) => *(uint*)p;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Put(byte* p, ulong value) => *(uint*)p = (uint)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetRegister(byte* p, ulong value) => *(ulong*)p = (uint)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Truncate(ulong value) => (uint)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong SignExtend(ulong value) => (ulong)(int)value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Carries(ulong vector) => (uint)vector & 0xc000_0008;

    public static ulong CompareExchange(byte* p, ulong value, ulong comparand) => Interlocked.CompareExchange(ref *(uint*)p, (uint)value, (uint)comparand);

    public static ulong Exchange(byte* p, ulong value) => Interlocked.Exchange(ref *(uint*)p, (uint)value);
}

public unsafe struct W64 : IWidth
{
    public static int Bytes => 8;

    public static int Bits => 64;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Get(byte* p) => *(ulong*)p;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Put(byte* p, ulong value) => *(ulong*)p = value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetRegister(byte* p, ulong value) => *(ulong*)p = value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Truncate(ulong value) => value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong SignExtend(ulong value) => value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static uint Carries(ulong vector) => ((uint)(vector >> 32) & 0xc000_0000) | ((uint)vector & 8);

    public static ulong CompareExchange(byte* p, ulong value, ulong comparand) => Interlocked.CompareExchange(ref *(ulong*)p, value, comparand);

    public static ulong Exchange(byte* p, ulong value) => Interlocked.Exchange(ref *(ulong*)p, value);
}

/// <summary>One of the sixteen conditions of Jcc, SETcc and CMOVcc, as a type argument.</summary>
public unsafe interface ICondition
{
    static abstract bool Test(VcpuBlock* s);
}

public unsafe struct Overflow : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Overflow(s);
}

public unsafe struct NotOverflow : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Overflow(s);
}

public unsafe struct Below : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Carry(s);
}

public unsafe struct AboveOrEqual : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Carry(s);
}

public unsafe struct Equal : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Zero(s);
}

public unsafe struct NotEqual : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Zero(s);
}

public unsafe struct BelowOrEqual : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Carry(s) || LazyFlags.Zero(s);
}

public unsafe struct Above : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Carry(s) && !LazyFlags.Zero(s);
}

public unsafe struct Negative : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Sign(s);
}

public unsafe struct NotNegative : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Sign(s);
}

public unsafe struct ParityEven : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Parity(s);
}

public unsafe struct ParityOdd : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Parity(s);
}

public unsafe struct Less : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Sign(s) != LazyFlags.Overflow(s);
}

public unsafe struct GreaterOrEqual : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Sign(s) == LazyFlags.Overflow(s);
}

public unsafe struct LessOrEqual : ICondition
{
    public static bool Test(VcpuBlock* s) => LazyFlags.Zero(s) || LazyFlags.Sign(s) != LazyFlags.Overflow(s);
}

public unsafe struct Greater : ICondition
{
    public static bool Test(VcpuBlock* s) => !LazyFlags.Zero(s) && LazyFlags.Sign(s) == LazyFlags.Overflow(s);
}
