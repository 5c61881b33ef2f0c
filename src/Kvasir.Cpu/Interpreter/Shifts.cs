using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>A shift or rotation by a count already masked to 5 bits (6 for 64-bit operands) and not zero, as a type argument.</summary>
public unsafe interface IShift
{
    static abstract ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth;
}

public unsafe struct ShiftLeft : IShift
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        ulong r = count >= TWidth.Bits ? 0 : TWidth.Truncate(a << count);
        bool carry = count <= TWidth.Bits && (a >> (TWidth.Bits - count) & 1) != 0;
        bool sign = (r >> (TWidth.Bits - 1)) != 0;
        LazyFlags.SetResult(s, TWidth.SignExtend(r), carry, sign != carry);
        return r;
    }
}

public unsafe struct ShiftRight : IShift
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        ulong r = count >= TWidth.Bits ? 0 : a >> count;
        bool carry = count <= TWidth.Bits && (a >> (count - 1) & 1) != 0;
        LazyFlags.SetResult(s, TWidth.SignExtend(r), carry, count == 1 && (a >> (TWidth.Bits - 1)) != 0);
        return r;
    }
}

public unsafe struct ShiftArithmetic : IShift
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        long value = (long)TWidth.SignExtend(a);
        ulong r = TWidth.Truncate((ulong)(value >> count));
        bool carry = (value >> (count - 1) & 1) != 0;
        LazyFlags.SetResult(s, TWidth.SignExtend(r), carry, overflow: false);
        return r;
    }
}

public unsafe struct RotateLeft : IShift
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        int n = count & (TWidth.Bits - 1);
        ulong r = n == 0 ? a : TWidth.Truncate(a << n | a >> (TWidth.Bits - n));
        bool carry = (r & 1) != 0;
        LazyFlags.SetCarryOverflow(s, carry, carry != (r >> (TWidth.Bits - 1) != 0));
        return r;
    }
}

public unsafe struct RotateRight : IShift
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        int n = count & (TWidth.Bits - 1);
        ulong r = n == 0 ? a : TWidth.Truncate(a >> n | a << (TWidth.Bits - n));
        bool carry = r >> (TWidth.Bits - 1) != 0;
        LazyFlags.SetCarryOverflow(s, carry, carry != ((r >> (TWidth.Bits - 2) & 1) != 0));
        return r;
    }
}

/// <summary>RCL: rotates through CF, one bit wider than the operand.</summary>
public unsafe struct RotateCarryLeft : IShift
{
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        int n = count % (TWidth.Bits + 1);
        bool carry = LazyFlags.Carry(s);
        for (int i = 0; i < n; i++)
        {
            bool top = a >> (TWidth.Bits - 1) != 0;
            a = TWidth.Truncate(a << 1 | (carry ? 1u : 0u));
            carry = top;
        }
        LazyFlags.SetCarryOverflow(s, carry, carry != (a >> (TWidth.Bits - 1) != 0));
        return a;
    }
}

/// <summary>RCR: rotates through CF, one bit wider than the operand.</summary>
public unsafe struct RotateCarryRight : IShift
{
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, int count)
        where TWidth : struct, IWidth
    {
        int n = count % (TWidth.Bits + 1);
        bool carry = LazyFlags.Carry(s);
        for (int i = 0; i < n; i++)
        {
            bool low = (a & 1) != 0;
            a = a >> 1 | (carry ? 1ul << (TWidth.Bits - 1) : 0);
            carry = low;
        }
        bool overflow = (a >> (TWidth.Bits - 1) != 0) != ((a >> (TWidth.Bits - 2) & 1) != 0);
        LazyFlags.SetCarryOverflow(s, carry, overflow);
        return a;
    }
}

/// <summary>Handlers of shifts, rotations and double shifts. A count of zero changes neither operand nor flags (Intel SDM vol. 2, SAL/SAR/SHL/SHR).</summary>
public static unsafe class Shifts
{
    private const int Rcx = 8;

    public static Op* RegisterImmediate<TShift, TWidth>(VcpuBlock* s, Op* op)
        where TShift : struct, IShift
        where TWidth : struct, IWidth => OnRegister<TShift, TWidth>(s, op, (int)op->Imm);

    public static Op* RegisterCl<TShift, TWidth>(VcpuBlock* s, Op* op)
        where TShift : struct, IShift
        where TWidth : struct, IWidth => OnRegister<TShift, TWidth>(s, op, *((byte*)s + Rcx));

    public static Op* MemoryImmediate<TShift, TWidth>(VcpuBlock* s, Op* op)
        where TShift : struct, IShift
        where TWidth : struct, IWidth => OnMemory<TShift, TWidth>(s, op, (int)op->Imm);

    public static Op* MemoryCl<TShift, TWidth>(VcpuBlock* s, Op* op)
        where TShift : struct, IShift
        where TWidth : struct, IWidth => OnMemory<TShift, TWidth>(s, op, *((byte*)s + Rcx));

    /// <summary>SHLD with the count in <see cref="Op.Imm"/>, or in CL where <see cref="Op.Aux"/> is set; R0 destination, R1 source.</summary>
    public static Op* DoubleLeftRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        int count = Count<TWidth>(s, op);
        ulong value = TWidth.Get(to);
        TWidth.SetRegister(to, count == 0 ? value : DoubleLeft<TWidth>(s, value, TWidth.Get((byte*)s + op->R1), count));
        return op + 1;
    }

    public static Op* DoubleRightRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        int count = Count<TWidth>(s, op);
        ulong value = TWidth.Get(to);
        TWidth.SetRegister(to, count == 0 ? value : DoubleRight<TWidth>(s, value, TWidth.Get((byte*)s + op->R1), count));
        return op + 1;
    }

    public static Op* DoubleLeftMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        int count = Count<TWidth>(s, op);
        if (count != 0)
            TWidth.Put(p, DoubleLeft<TWidth>(s, TWidth.Get(p), TWidth.Get((byte*)s + op->R1), count));
        Access.Commit(s);
        return op + 1;
    }

    public static Op* DoubleRightMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        int count = Count<TWidth>(s, op);
        if (count != 0)
            TWidth.Put(p, DoubleRight<TWidth>(s, TWidth.Get(p), TWidth.Get((byte*)s + op->R1), count));
        Access.Commit(s);
        return op + 1;
    }

    private static int Count<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => (op->Aux != 0 ? *((byte*)s + Rcx) : (int)op->Imm) & (TWidth.Bytes == 8 ? 63 : 31);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Op* OnRegister<TShift, TWidth>(VcpuBlock* s, Op* op, int count)
        where TShift : struct, IShift
        where TWidth : struct, IWidth
    {
        count &= TWidth.Bytes == 8 ? 63 : 31;
        byte* to = (byte*)s + op->R0;
        ulong value = TWidth.Get(to);
        // A 32-bit destination has its upper half cleared even when the count is zero.
        TWidth.SetRegister(to, count == 0 ? value : TShift.Do<TWidth>(s, value, count));
        return op + 1;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Op* OnMemory<TShift, TWidth>(VcpuBlock* s, Op* op, int count)
        where TShift : struct, IShift
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        count &= TWidth.Bytes == 8 ? 63 : 31;
        if (count != 0)
            TWidth.Put(p, TShift.Do<TWidth>(s, TWidth.Get(p), count));
        Access.Commit(s);
        return op + 1;
    }

    private static ulong DoubleLeft<TWidth>(VcpuBlock* s, ulong a, ulong b, int count)
        where TWidth : struct, IWidth
    {
        ulong r;
        bool carry;
        if (TWidth.Bits == 16 && count > 16)
        {
            // Undefined by the manual; processors shift the concatenation a:b:a.
            r = TWidth.Truncate(b << (count - 16) | a >> (32 - count));
            carry = (b >> (32 - count) & 1) != 0;
        }
        else
        {
            r = TWidth.Truncate(a << count | (count == TWidth.Bits ? b : b >> (TWidth.Bits - count)));
            carry = (a >> (TWidth.Bits - count) & 1) != 0;
        }
        bool overflow = ((a ^ r) >> (TWidth.Bits - 1) & 1) != 0;
        LazyFlags.SetResult(s, TWidth.SignExtend(r), carry, overflow);
        return r;
    }

    private static ulong DoubleRight<TWidth>(VcpuBlock* s, ulong a, ulong b, int count)
        where TWidth : struct, IWidth
    {
        ulong r;
        bool carry;
        if (TWidth.Bits == 16 && count > 16)
        {
            r = TWidth.Truncate(b >> (count - 16) | a << (32 - count));
            carry = (b >> (count - 17) & 1) != 0;
        }
        else
        {
            r = TWidth.Truncate((count == TWidth.Bits ? 0 : a >> count) | (count == TWidth.Bits ? b : b << (TWidth.Bits - count)));
            carry = (a >> (count - 1) & 1) != 0;
        }
        bool overflow = ((a ^ r) >> (TWidth.Bits - 1) & 1) != 0;
        LazyFlags.SetResult(s, TWidth.SignExtend(r), carry, overflow);
        return r;
    }
}
