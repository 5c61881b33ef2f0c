using System.Buffers.Binary;
using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>Handlers of MOV, MOVZX, MOVSX, LEA, XCHG, XADD, CMPXCHG, CMOVcc, SETcc, BSWAP, CBW and kin, XLAT.</summary>
public static unsafe class Moves
{
    public static Op* Nop(VcpuBlock* s, Op* op) => op + 1;

    public static Op* RegisterRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        TWidth.SetRegister((byte*)s + op->R0, TWidth.Get((byte*)s + op->R1));
        return op + 1;
    }

    public static Op* RegisterImmediate<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        TWidth.SetRegister((byte*)s + op->R0, (ulong)op->Imm);
        return op + 1;
    }

    public static Op* RegisterMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.SetRegister((byte*)s + op->R0, TWidth.Get(p));
        return op + 1;
    }

    public static Op* MemoryRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Overwrite(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.Put(p, TWidth.Get((byte*)s + op->R0));
        Access.Commit(s);
        return op + 1;
    }

    public static Op* MemoryImmediate<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Overwrite(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.Put(p, (ulong)op->Imm);
        Access.Commit(s);
        return op + 1;
    }

    public static Op* ZeroExtendRegister<TFrom, TTo>(VcpuBlock* s, Op* op)
        where TFrom : struct, IWidth
        where TTo : struct, IWidth
    {
        TTo.SetRegister((byte*)s + op->R0, TFrom.Get((byte*)s + op->R1));
        return op + 1;
    }

    public static Op* ZeroExtendMemory<TFrom, TTo>(VcpuBlock* s, Op* op)
        where TFrom : struct, IWidth
        where TTo : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TFrom.Bytes, write: false), TFrom.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TTo.SetRegister((byte*)s + op->R0, TFrom.Get(p));
        return op + 1;
    }

    public static Op* SignExtendRegister<TFrom, TTo>(VcpuBlock* s, Op* op)
        where TFrom : struct, IWidth
        where TTo : struct, IWidth
    {
        TTo.SetRegister((byte*)s + op->R0, TFrom.SignExtend(TFrom.Get((byte*)s + op->R1)));
        return op + 1;
    }

    public static Op* SignExtendMemory<TFrom, TTo>(VcpuBlock* s, Op* op)
        where TFrom : struct, IWidth
        where TTo : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TFrom.Bytes, write: false), TFrom.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TTo.SetRegister((byte*)s + op->R0, TFrom.SignExtend(TFrom.Get(p)));
        return op + 1;
    }

    public static Op* LoadAddress<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong offset = Access.Offset(s, op);
        if (op->Address != AddressKind.Long)
            offset = Access.CutOffset(op->Address, offset);
        TWidth.SetRegister((byte*)s + op->R0, offset);
        return op + 1;
    }

    public static Op* ExchangeRegisters<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* a = (byte*)s + op->R0;
        byte* b = (byte*)s + op->R1;
        ulong old = TWidth.Get(a);
        ulong other = TWidth.Get(b);
        TWidth.SetRegister(a, other);
        TWidth.SetRegister(b, old);
        return op + 1;
    }

    /// <summary>XCHG with memory is locked, prefix or not.</summary>
    public static Op* ExchangeMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes, locked: true);
        if (p == null)
            return Access.Fault(s, op);
        byte* register = (byte*)s + op->R0;
        TWidth.SetRegister(register, TWidth.Exchange(p, TWidth.Get(register)));
        Access.Commit(s);
        return op + 1;
    }

    public static Op* ExchangeAddRegisters<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        byte* from = (byte*)s + op->R1;
        ulong old = TWidth.Get(to);
        ulong sum = Add.Do<TWidth>(s, old, TWidth.Get(from));
        TWidth.SetRegister(from, old);
        TWidth.SetRegister(to, sum);
        return op + 1;
    }

    public static Op* ExchangeAddMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes, locked: (op->Flags & OpFlags.Lock) != 0);
        if (p == null)
            return Access.Fault(s, op);
        byte* register = (byte*)s + op->R0;
        ulong operand = TWidth.Get(register);
        ulong old = TWidth.Get(p);
        while (true)
        {
            ulong seen = TWidth.CompareExchange(p, TWidth.Truncate(old + operand), old);
            if (seen == old)
                break;
            old = seen;
        }
        Add.Do<TWidth>(s, old, operand);
        TWidth.SetRegister(register, old);
        Access.Commit(s);
        return op + 1;
    }

    public static Op* CompareExchangeRegisters<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        ulong old = TWidth.Get(to);
        ulong accumulator = TWidth.Get((byte*)s);
        Subtract.Do<TWidth>(s, accumulator, old);
        if (accumulator == old)
            TWidth.SetRegister(to, TWidth.Get((byte*)s + op->R1));
        else
            TWidth.SetRegister((byte*)s, old);
        return op + 1;
    }

    public static Op* CompareExchangeMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Modify(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes, locked: (op->Flags & OpFlags.Lock) != 0);
        if (p == null)
            return Access.Fault(s, op);
        ulong accumulator = TWidth.Get((byte*)s);
        ulong old = TWidth.CompareExchange(p, TWidth.Get((byte*)s + op->R0), accumulator);
        Access.Commit(s);
        Subtract.Do<TWidth>(s, accumulator, old);
        if (accumulator != old)
            TWidth.SetRegister((byte*)s, old);
        return op + 1;
    }

    /// <summary>CMOVcc: a 32-bit form clears the upper half even where it does not move; a memory operand is read in any case.</summary>
    public static Op* ConditionalRegister<TCondition, TWidth>(VcpuBlock* s, Op* op)
        where TCondition : struct, ICondition
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TWidth.Get(TCondition.Test(s) ? (byte*)s + op->R1 : to));
        return op + 1;
    }

    public static Op* ConditionalMemory<TCondition, TWidth>(VcpuBlock* s, Op* op)
        where TCondition : struct, ICondition
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, TWidth.Get(TCondition.Test(s) ? p : to));
        return op + 1;
    }

    public static Op* SetRegister<TCondition>(VcpuBlock* s, Op* op)
        where TCondition : struct, ICondition
    {
        *((byte*)s + op->R0) = TCondition.Test(s) ? (byte)1 : (byte)0;
        return op + 1;
    }

    public static Op* SetMemory<TCondition>(VcpuBlock* s, Op* op)
        where TCondition : struct, ICondition
    {
        byte value = TCondition.Test(s) ? (byte)1 : (byte)0;
        return Access.Store8(s, Access.Linear(s, op, 1, write: true), value) ? op + 1 : Access.Fault(s, op);
    }

    public static Op* ByteSwap32(VcpuBlock* s, Op* op)
    {
        ulong* register = (ulong*)((byte*)s + op->R0);
        *register = BinaryPrimitives.ReverseEndianness((uint)*register);
        return op + 1;
    }

    public static Op* ByteSwap64(VcpuBlock* s, Op* op)
    {
        ulong* register = (ulong*)((byte*)s + op->R0);
        *register = BinaryPrimitives.ReverseEndianness(*register);
        return op + 1;
    }

    /// <summary>BSWAP of a 16-bit register is undefined; processors clear it.</summary>
    public static Op* ByteSwap16(VcpuBlock* s, Op* op)
    {
        *(ushort*)((byte*)s + op->R0) = 0;
        return op + 1;
    }

    /// <summary>CBW, CWDE, CDQE.</summary>
    public static Op* ExtendAccumulator<TFrom, TTo>(VcpuBlock* s, Op* op)
        where TFrom : struct, IWidth
        where TTo : struct, IWidth
    {
        TTo.SetRegister((byte*)s, TFrom.SignExtend(TFrom.Get((byte*)s)));
        return op + 1;
    }

    /// <summary>CWD, CDQ, CQO.</summary>
    public static Op* SpreadSign<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        TWidth.SetRegister((byte*)&s->Gpr[2], (ulong)((long)TWidth.SignExtend(TWidth.Get((byte*)s)) >> 63));
        return op + 1;
    }

    /// <summary>XLAT: AL takes the byte at BX + AL; the operation's base is BX.</summary>
    public static Op* Translate(VcpuBlock* s, Op* op)
    {
        ulong offset = Access.Offset(s, op) + (byte)s->Gpr[0];
        ulong linear = op->Address == AddressKind.Long ? offset + s->SegBase[op->Seg] : Access.LinearLegacy(s, op, offset, 1, write: false);
        byte* p = Access.Read(s, linear, 1);
        if (p == null)
            return Access.Fault(s, op);
        *(byte*)s = *p;
        return op + 1;
    }

    public static Op* LoadFlagsToAh(VcpuBlock* s, Op* op)
    {
        *((byte*)s + 1) = (byte)(LazyFlags.Read(s) & 0xd7);
        return op + 1;
    }

    public static Op* StoreAhToFlags(VcpuBlock* s, Op* op)
    {
        const ulong affected = 0xd5;
        LazyFlags.SetArithmetic(s, (LazyFlags.Arithmetic(s) & ~affected) | (*((byte*)s + 1) & affected));
        return op + 1;
    }

    public static Op* SetCarry(VcpuBlock* s, Op* op)
    {
        LazyFlags.SetCarry(s, true);
        return op + 1;
    }

    public static Op* ClearCarry(VcpuBlock* s, Op* op)
    {
        LazyFlags.SetCarry(s, false);
        return op + 1;
    }

    public static Op* ComplementCarry(VcpuBlock* s, Op* op)
    {
        LazyFlags.SetCarry(s, !LazyFlags.Carry(s));
        return op + 1;
    }

    public static Op* SetDirection(VcpuBlock* s, Op* op)
    {
        s->SystemFlags |= (ulong)X86.Rflags.DF;
        return op + 1;
    }

    public static Op* ClearDirection(VcpuBlock* s, Op* op)
    {
        s->SystemFlags &= ~(ulong)X86.Rflags.DF;
        return op + 1;
    }

    /// <summary>SALC (undocumented): AL takes all copies of CF.</summary>
    public static Op* SetAlFromCarry(VcpuBlock* s, Op* op)
    {
        *(byte*)s = LazyFlags.Carry(s) ? (byte)0xff : (byte)0;
        return op + 1;
    }
}
