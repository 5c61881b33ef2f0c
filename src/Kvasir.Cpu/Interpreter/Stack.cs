using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>The stack as instructions of the current mode see it: RSP, ESP or SP in segment SS.</summary>
public static unsafe class Stack
{
    private const int Rsp = 4;
    private const int Ss = 2;

    /// <summary>The stack pointer, cut to the stack's width.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Pointer(VcpuBlock* s)
    {
        uint mode = s->Mode;
        if ((mode & CodeMode.SizeMask) == CodeMode.Code64)
            return s->Gpr[Rsp];
        return (mode & CodeMode.Stack32) != 0 ? (uint)s->Gpr[Rsp] : (ushort)s->Gpr[Rsp];
    }

    /// <summary>Sets the stack pointer's bits that the stack's width covers.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void SetPointer(VcpuBlock* s, ulong value)
    {
        uint mode = s->Mode;
        if ((mode & CodeMode.SizeMask) == CodeMode.Code64)
            s->Gpr[Rsp] = value;
        else if ((mode & CodeMode.Stack32) != 0)
            s->Gpr[Rsp] = (uint)value;
        else
            *(ushort*)&s->Gpr[Rsp] = (ushort)value;
    }

    /// <summary>The linear address of a stack offset, limits checked.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Linear(VcpuBlock* s, ulong offset, int size, bool write)
    {
        if ((s->Mode & CodeMode.SizeMask) == CodeMode.Code64)
            return offset;
        return Access.LegacySegment(s, Ss, Cut(s, offset), size, write);
    }

    /// <summary>An offset cut to the stack's width.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Cut(VcpuBlock* s, ulong offset)
    {
        uint mode = s->Mode;
        if ((mode & CodeMode.SizeMask) == CodeMode.Code64)
            return offset;
        return (mode & CodeMode.Stack32) != 0 ? (uint)offset : (ushort)offset;
    }

    /// <summary>Pushes a value of the type's size. False: a fault was recorded and nothing changed.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Push<TWidth>(VcpuBlock* s, ulong value)
        where TWidth : struct, IWidth
    {
        ulong pointer = Cut(s, Pointer(s) - (ulong)TWidth.Bytes);
        byte* p = Access.Overwrite(s, Linear(s, pointer, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
            return false;
        TWidth.Put(p, value);
        Access.Commit(s);
        SetPointer(s, pointer);
        return true;
    }

    /// <summary>Pops a value of the type's size. False: a fault was recorded and nothing changed.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Pop<TWidth>(VcpuBlock* s, out ulong value)
        where TWidth : struct, IWidth
    {
        ulong pointer = Pointer(s);
        byte* p = Access.Read(s, Linear(s, pointer, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
        {
            value = 0;
            return false;
        }
        value = TWidth.Get(p);
        SetPointer(s, pointer + (ulong)TWidth.Bytes);
        return true;
    }

    public static Op* PushRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => Push<TWidth>(s, TWidth.Get((byte*)s + op->R0)) ? op + 1 : Access.StackFault(s, op);

    public static Op* PushImmediate<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => Push<TWidth>(s, (ulong)op->Imm) ? op + 1 : Access.StackFault(s, op);

    public static Op* PushMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        return Push<TWidth>(s, TWidth.Get(p)) ? op + 1 : Access.StackFault(s, op);
    }

    public static Op* PopRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if (!Pop<TWidth>(s, out ulong value))
            return Access.StackFault(s, op);
        TWidth.SetRegister((byte*)s + op->R0, value);
        return op + 1;
    }

    /// <summary>POP to memory: an address that uses RSP sees it after the pop (Intel SDM vol. 2, POP).</summary>
    public static Op* PopMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong before = s->Gpr[Rsp];
        if (!Pop<TWidth>(s, out ulong value))
            return Access.StackFault(s, op);
        byte* p = Access.Overwrite(s, Access.Linear(s, op, TWidth.Bytes, write: true), TWidth.Bytes);
        if (p == null)
        {
            s->Gpr[Rsp] = before;
            return Access.Fault(s, op);
        }
        TWidth.Put(p, value);
        Access.Commit(s);
        return op + 1;
    }

    /// <summary>PUSHA: all eight registers, with SP as it was before.</summary>
    public static Op* PushAll<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong old = s->Gpr[Rsp];
        for (int i = 0; i < 8; i++)
        {
            if (!Push<TWidth>(s, i == Rsp ? old : s->Gpr[i]))
            {
                s->Gpr[Rsp] = old;
                return Access.StackFault(s, op);
            }
        }
        return op + 1;
    }

    /// <summary>POPA: the stored SP is skipped.</summary>
    public static Op* PopAll<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong old = s->Gpr[Rsp];
        ulong* values = stackalloc ulong[8];
        for (int i = 7; i >= 0; i--)
        {
            if (!Pop<TWidth>(s, out values[i]))
            {
                s->Gpr[Rsp] = old;
                return Access.StackFault(s, op);
            }
        }
        for (int i = 0; i < 8; i++)
        {
            if (i != Rsp)
                TWidth.SetRegister((byte*)&s->Gpr[i], values[i]);
        }
        return op + 1;
    }

    /// <summary>LEAVE: RSP takes RBP (stack width), then RBP is popped (operand size).</summary>
    public static Op* Leave<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong frame = Cut(s, s->Gpr[5]);
        byte* p = Access.Read(s, Linear(s, frame, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.StackFault(s, op);
        TWidth.SetRegister((byte*)&s->Gpr[5], TWidth.Get(p));
        SetPointer(s, frame + (ulong)TWidth.Bytes);
        return op + 1;
    }

    /// <summary>ENTER: <see cref="Op.Imm"/> is the frame's size, <see cref="Op.Aux"/> the nesting level (Intel SDM vol. 2, ENTER).</summary>
    public static Op* Enter<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong oldRsp = s->Gpr[Rsp];
        int level = op->Aux & 31;
        bool good = Push<TWidth>(s, s->Gpr[5]);
        // The whole register, whatever of it the stack segment uses: the operand size decides what of it is pushed and kept.
        ulong frame = s->Gpr[Rsp];
        ulong link = s->Gpr[5];
        for (int i = 1; good && i < level; i++)
        {
            link = Cut(s, link - (ulong)TWidth.Bytes);
            byte* p = Access.Read(s, Linear(s, link, TWidth.Bytes, write: false), TWidth.Bytes);
            good = p != null && Push<TWidth>(s, TWidth.Get(p));
        }
        if (good && level > 0)
            good = Push<TWidth>(s, frame);
        ulong end = Cut(s, Pointer(s) - (ulong)op->Imm);
        // The new top must be writable: the instruction faults here rather than the next push.
        good = good && Access.Modify(s, Linear(s, end, TWidth.Bytes, write: true), TWidth.Bytes) != null;
        Access.Commit(s);
        if (!good)
        {
            s->Gpr[Rsp] = oldRsp;
            return Access.StackFault(s, op);
        }
        TWidth.SetRegister((byte*)&s->Gpr[5], frame);
        SetPointer(s, end);
        return op + 1;
    }
}
