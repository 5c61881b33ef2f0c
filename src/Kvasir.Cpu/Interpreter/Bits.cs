using System.Numerics;

namespace Kvasir.Cpu;

/// <summary>What BT, BTS, BTR or BTC does to the bit, as a type argument.</summary>
public interface IBitChange
{
    static abstract bool Writes { get; }

    static abstract ulong Do(ulong value, ulong mask);
}

public struct BitTest : IBitChange
{
    public static bool Writes => false;

    public static ulong Do(ulong value, ulong mask) => value;
}

public struct BitSet : IBitChange
{
    public static bool Writes => true;

    public static ulong Do(ulong value, ulong mask) => value | mask;
}

public struct BitReset : IBitChange
{
    public static bool Writes => true;

    public static ulong Do(ulong value, ulong mask) => value & ~mask;
}

public struct BitComplement : IBitChange
{
    public static bool Writes => true;

    public static ulong Do(ulong value, ulong mask) => value ^ mask;
}

/// <summary>Handlers of BT, BTS, BTR, BTC, BSF and BSR. Only CF (BSF, BSR: ZF) is defined; the others stay as they are.</summary>
public static unsafe class Bits
{
    public static Op* RegisterRegister<TChange, TWidth>(VcpuBlock* s, Op* op)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth => OnRegister<TChange, TWidth>(s, op, (int)TWidth.Get((byte*)s + op->R1));

    public static Op* RegisterImmediate<TChange, TWidth>(VcpuBlock* s, Op* op)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth => OnRegister<TChange, TWidth>(s, op, (int)op->Imm);

    public static Op* MemoryImmediate<TChange, TWidth>(VcpuBlock* s, Op* op)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth =>
        OnMemory<TChange, TWidth>(s, op, Access.Linear(s, op, TWidth.Bytes, TChange.Writes), (int)op->Imm & (TWidth.Bits - 1));

    /// <summary>The register's value is a bit offset from the operand's address, and reaches beyond the operand, down too.</summary>
    public static Op* MemoryRegister<TChange, TWidth>(VcpuBlock* s, Op* op)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth
    {
        long bit = (long)TWidth.SignExtend(TWidth.Get((byte*)s + op->R1));
        ulong offset = Access.Offset(s, op) + (ulong)((bit >> BitOperations.Log2((uint)TWidth.Bits)) * TWidth.Bytes);
        ulong linear = op->Address == AddressKind.Long ? offset + s->SegBase[op->Seg] : Access.LinearLegacy(s, op, offset, TWidth.Bytes, TChange.Writes);
        return OnMemory<TChange, TWidth>(s, op, linear, (int)bit & (TWidth.Bits - 1));
    }

    public static Op* ScanForwardRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => ScanForward<TWidth>(s, op, TWidth.Get((byte*)s + op->R1));

    public static Op* ScanForwardMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        return p == null ? Access.Fault(s, op) : ScanForward<TWidth>(s, op, TWidth.Get(p));
    }

    public static Op* ScanReverseRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => ScanReverse<TWidth>(s, op, TWidth.Get((byte*)s + op->R1));

    public static Op* ScanReverseMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        return p == null ? Access.Fault(s, op) : ScanReverse<TWidth>(s, op, TWidth.Get(p));
    }

    private static Op* OnRegister<TChange, TWidth>(VcpuBlock* s, Op* op, int bit)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        ulong value = TWidth.Get(to);
        ulong mask = 1ul << (bit & (TWidth.Bits - 1));
        LazyFlags.SetCarry(s, (value & mask) != 0);
        if (TChange.Writes)
            TWidth.SetRegister(to, TChange.Do(value, mask));
        return op + 1;
    }

    private static Op* OnMemory<TChange, TWidth>(VcpuBlock* s, Op* op, ulong linear, int bit)
        where TChange : struct, IBitChange
        where TWidth : struct, IWidth
    {
        ulong mask = 1ul << bit;
        if (!TChange.Writes)
        {
            byte* source = Access.Read(s, linear, TWidth.Bytes);
            if (source == null)
                return Access.Fault(s, op);
            LazyFlags.SetCarry(s, (TWidth.Get(source) & mask) != 0);
            return op + 1;
        }
        bool locked = (op->Flags & OpFlags.Lock) != 0;
        byte* p = Access.Modify(s, linear, TWidth.Bytes, locked);
        if (p == null)
            return Access.Fault(s, op);
        ulong old = TWidth.Get(p);
        if (locked)
        {
            while (true)
            {
                ulong seen = TWidth.CompareExchange(p, TChange.Do(old, mask), old);
                if (seen == old)
                    break;
                old = seen;
            }
        }
        else
        {
            TWidth.Put(p, TChange.Do(old, mask));
        }
        LazyFlags.SetCarry(s, (old & mask) != 0);
        Access.Commit(s);
        return op + 1;
    }

    /// <summary>A zero source sets ZF and leaves the destination (AMD says so; Intel's processors do so). A 32-bit one keeps its upper half then.</summary>
    private static Op* ScanForward<TWidth>(VcpuBlock* s, Op* op, ulong value)
        where TWidth : struct, IWidth
    {
        LazyFlags.SetZero(s, value == 0);
        if (value != 0)
            TWidth.SetRegister((byte*)s + op->R0, (ulong)BitOperations.TrailingZeroCount(value));
        return op + 1;
    }

    private static Op* ScanReverse<TWidth>(VcpuBlock* s, Op* op, ulong value)
        where TWidth : struct, IWidth
    {
        LazyFlags.SetZero(s, value == 0);
        if (value != 0)
            TWidth.SetRegister((byte*)s + op->R0, (ulong)BitOperations.Log2(value));
        return op + 1;
    }
}
