using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>A two-operand operation that sets the arithmetic flags, as a type argument. Operands are zero-extended; so is the result.</summary>
public unsafe interface IBinaryOperation
{
    static abstract ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth;
}

public unsafe struct Add : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth
    {
        ulong r = TWidth.Truncate(a + b);
        s->LazyResult = TWidth.SignExtend(r);
        s->LazyAux = TWidth.Carries((a & b) | ((a | b) & ~r));
        return r;
    }
}

public unsafe struct AddWithCarry : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth
    {
        ulong r = TWidth.Truncate(a + b + (s->LazyAux >> 31));
        s->LazyResult = TWidth.SignExtend(r);
        s->LazyAux = TWidth.Carries((a & b) | ((a | b) & ~r));
        return r;
    }
}

public unsafe struct Subtract : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth
    {
        ulong r = TWidth.Truncate(a - b);
        s->LazyResult = TWidth.SignExtend(r);
        s->LazyAux = TWidth.Carries((~a & b) | (~(a ^ b) & r));
        return r;
    }
}

public unsafe struct SubtractWithBorrow : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth
    {
        ulong r = TWidth.Truncate(a - b - (s->LazyAux >> 31));
        s->LazyResult = TWidth.SignExtend(r);
        s->LazyAux = TWidth.Carries((~a & b) | (~(a ^ b) & r));
        return r;
    }
}

public unsafe struct And : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth => Logic.Result<TWidth>(s, a & b);
}

public unsafe struct Or : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth => Logic.Result<TWidth>(s, a | b);
}

public unsafe struct Xor : IBinaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a, ulong b)
        where TWidth : struct, IWidth => Logic.Result<TWidth>(s, a ^ b);
}

internal static unsafe class Logic
{
    /// <summary>Flags of a logical operation: CF and OF clear, AF (undefined) clear.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Result<TWidth>(VcpuBlock* s, ulong value)
        where TWidth : struct, IWidth
    {
        s->LazyResult = TWidth.SignExtend(value);
        s->LazyAux = 0;
        return TWidth.Truncate(value);
    }
}

/// <summary>A one-operand operation, as a type argument.</summary>
public unsafe interface IUnaryOperation
{
    static abstract ulong Do<TWidth>(VcpuBlock* s, ulong a)
        where TWidth : struct, IWidth;
}

/// <summary>INC: CF stays.</summary>
public unsafe struct Increment : IUnaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a)
        where TWidth : struct, IWidth
    {
        uint carry = s->LazyAux & 1u << 31;
        ulong r = TWidth.Truncate(a + 1);
        s->LazyResult = TWidth.SignExtend(r);
        uint vector = TWidth.Carries(a & ~r);
        // OF is the difference of the two top carries; both change together when CF is put back.
        uint overflow = (vector ^ vector << 1) & 1u << 31;
        s->LazyAux = (vector & 8) | carry | (carry ^ overflow) >> 1;
        return r;
    }
}

/// <summary>DEC: CF stays.</summary>
public unsafe struct Decrement : IUnaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a)
        where TWidth : struct, IWidth
    {
        uint carry = s->LazyAux & 1u << 31;
        ulong r = TWidth.Truncate(a - 1);
        s->LazyResult = TWidth.SignExtend(r);
        uint vector = TWidth.Carries((~a & 1) | (~(a ^ 1) & r));
        uint overflow = (vector ^ vector << 1) & 1u << 31;
        s->LazyAux = (vector & 8) | carry | (carry ^ overflow) >> 1;
        return r;
    }
}

public unsafe struct Negate : IUnaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a)
        where TWidth : struct, IWidth => Subtract.Do<TWidth>(s, 0, a);
}

/// <summary>NOT: no flags.</summary>
public unsafe struct Complement : IUnaryOperation
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Do<TWidth>(VcpuBlock* s, ulong a)
        where TWidth : struct, IWidth => TWidth.Truncate(~a);
}

/// <summary>Handlers of ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT for every kind of operands.</summary>
public static unsafe class Arithmetic
{
    public static Op* RegisterRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TOperation.Do<TWidth>(s, TWidth.Get(to), TWidth.Get((byte*)s + op->R1)));
        return op + 1;
    }

    public static Op* RegisterImmediate<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TOperation.Do<TWidth>(s, TWidth.Get(to), TWidth.Truncate((ulong)op->Imm)));
        return op + 1;
    }

    public static Op* RegisterMemory<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TOperation.Do<TWidth>(s, TWidth.Get(to), TWidth.Get(p)));
        return op + 1;
    }

    public static Op* MemoryRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth => OnMemory<TOperation, TWidth>(s, op, TWidth.Get((byte*)s + op->R0));

    public static Op* MemoryImmediate<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth => OnMemory<TOperation, TWidth>(s, op, TWidth.Truncate((ulong)op->Imm));

    public static Op* LockedRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth => OnLocked<TOperation, TWidth>(s, op, TWidth.Get((byte*)s + op->R0));

    public static Op* LockedImmediate<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth => OnLocked<TOperation, TWidth>(s, op, TWidth.Truncate((ulong)op->Imm));

    // CMP and TEST: the operation without its result.

    public static Op* CompareRegisterRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        TOperation.Do<TWidth>(s, TWidth.Get((byte*)s + op->R0), TWidth.Get((byte*)s + op->R1));
        return op + 1;
    }

    public static Op* CompareRegisterImmediate<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        TOperation.Do<TWidth>(s, TWidth.Get((byte*)s + op->R0), TWidth.Truncate((ulong)op->Imm));
        return op + 1;
    }

    public static Op* CompareRegisterMemory<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TOperation.Do<TWidth>(s, TWidth.Get((byte*)s + op->R0), TWidth.Get(p));
        return op + 1;
    }

    public static Op* CompareMemoryRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TOperation.Do<TWidth>(s, TWidth.Get(p), TWidth.Get((byte*)s + op->R0));
        return op + 1;
    }

    public static Op* CompareMemoryImmediate<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TOperation.Do<TWidth>(s, TWidth.Get(p), TWidth.Truncate((ulong)op->Imm));
        return op + 1;
    }

    public static Op* UnaryRegister<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IUnaryOperation
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TOperation.Do<TWidth>(s, TWidth.Get(to)));
        return op + 1;
    }

    public static Op* UnaryMemory<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IUnaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.Put(p, TOperation.Do<TWidth>(s, TWidth.Get(p)));
        Access.Commit(s);
        return op + 1;
    }

    public static Op* UnaryLocked<TOperation, TWidth>(VcpuBlock* s, Op* op)
        where TOperation : struct, IUnaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes, locked: true);
        if (p == null)
            return Access.Fault(s, op);
        ulong savedResult = s->LazyResult;
        uint savedAux = s->LazyAux;
        ulong old = TWidth.Get(p);
        while (true)
        {
            ulong seen = TWidth.CompareExchange(p, TOperation.Do<TWidth>(s, old), old);
            if (seen == old)
                break;
            old = seen;
            s->LazyResult = savedResult;
            s->LazyAux = savedAux;
        }
        Access.Commit(s);
        return op + 1;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Op* OnMemory<TOperation, TWidth>(VcpuBlock* s, Op* op, ulong operand)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.Put(p, TOperation.Do<TWidth>(s, TWidth.Get(p), operand));
        Access.Commit(s);
        return op + 1;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Op* OnLocked<TOperation, TWidth>(VcpuBlock* s, Op* op, ulong operand)
        where TOperation : struct, IBinaryOperation
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes, locked: true);
        if (p == null)
            return Access.Fault(s, op);
        // ADC and SBB read the carry: each try starts from the flags as they were.
        ulong savedResult = s->LazyResult;
        uint savedAux = s->LazyAux;
        ulong old = TWidth.Get(p);
        while (true)
        {
            ulong seen = TWidth.CompareExchange(p, TOperation.Do<TWidth>(s, old, operand), old);
            if (seen == old)
                break;
            old = seen;
            s->LazyResult = savedResult;
            s->LazyAux = savedAux;
        }
        Access.Commit(s);
        return op + 1;
    }
}
