using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Near control transfers, and how one block goes on in another.</summary>
public static unsafe class Branches
{
    /// <summary>A branch target cut to the operand size in <see cref="OpFlags.SizeShift"/>.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Cut(Op* op, ulong target) => (op->Flags >> OpFlags.SizeShift & 15) switch
    {
        8 => target,
        4 => (uint)target,
        _ => (ushort)target,
    };

    /// <summary>A near jump through a computed target: continues in its block where it is known and nothing is pending.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Op* Jump(VcpuBlock* s, ulong target)
    {
        JumpEntry* entry = s->JumpCache + Mmu.JumpIndex(target);
        if (entry->Rip == target && entry->Key == s->JumpKey && s->Pending == 0)
        {
            s->BlockRip = target;
            return entry->First;
        }
        s->Rip = target;
        if (s->Pending != 0)
            return null;
        return BlockLookup.Find(s);
    }

    /// <summary>A direct branch that is taken. Targets in the block's own page are linked once; others go through the jump cache.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Op* Taken(VcpuBlock* s, Op* op)
    {
        s->Retired += op->Ordinal;
        Op* link = (Op*)op->Disp;
        if (link != null && s->Pending == 0)
        {
            s->BlockRip += (ulong)op->Imm;
            return link;
        }
        return TakenSlow(s, op);
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static Op* TakenSlow(VcpuBlock* s, Op* op)
    {
        ulong from = s->BlockRip;
        ulong target = Cut(op, from + (ulong)op->Imm);
        if (s->Pending != 0)
        {
            s->Rip = target;
            return null;
        }
        // In 64-bit mode the code segment's base does not count; elsewhere a base that is no multiple of a page moves the page's borders.
        ulong segment = (s->Mode & CodeMode.SizeMask) == CodeMode.Code64 ? 0 : s->SegBase[1];
        bool linkable = (from + segment ^ target + segment) >> 12 == 0 && target == from + (ulong)op->Imm && (s->Mode & CodeMode.CodeLimited) == 0;
        if (!linkable)
            return Jump(s, target);
        int epoch = BlockLookup.Epoch(s);
        Op* first = Jump(s, target);
        if (first != null && !BlockLookup.CrossesPages(first) && epoch == BlockLookup.Epoch(s))
            op->Disp = (long)first;
        return first;
    }

    /// <summary>Every operation of a block whose code changed: looks the instruction up anew.</summary>
    public static Op* Stale(VcpuBlock* s, Op* op)
    {
        s->Retired += (ulong)(op->Ordinal - 1);
        ulong rip = Access.CurrentRip(s, op);
        JumpEntry* entry = s->JumpCache + Mmu.JumpIndex(rip);
        if (entry->Rip == rip)
            entry->Key = 0;
        return Jump(s, rip);
    }

    /// <summary>The end of a block that did not end in a branch.</summary>
    public static Op* EndOfBlock(VcpuBlock* s, Op* op)
    {
        s->Retired += (ulong)(op->Ordinal - 1);
        return Jump(s, Access.CurrentRip(s, op));
    }

    public static Op* JumpRelative(VcpuBlock* s, Op* op) => Taken(s, op);

    /// <summary>Jcc; counts in <see cref="Op.Aux"/> how often it is taken. (Several vCPUs may lose counts to each other.)</summary>
    public static Op* JumpIf<TCondition>(VcpuBlock* s, Op* op)
        where TCondition : struct, ICondition
    {
        if (!TCondition.Test(s))
            return op + 1;
        op->Aux++;
        return Taken(s, op);
    }

    public static Op* JumpRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong target = TWidth.Get((byte*)s + op->R0);
        if (!CheckTarget(s, target))
            return Access.Fault(s, op);
        s->Retired += op->Ordinal;
        return Jump(s, target);
    }

    public static Op* JumpMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        ulong target = TWidth.Get(p);
        if (!CheckTarget(s, target))
            return Access.Fault(s, op);
        s->Retired += op->Ordinal;
        return Jump(s, target);
    }

    public static Op* CallRelative<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if (!Stack.Push<TWidth>(s, Access.NextRip(s, op)))
            return Access.StackFault(s, op);
        return Taken(s, op);
    }

    public static Op* CallRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => CallTo<TWidth>(s, op, TWidth.Get((byte*)s + op->R0));

    public static Op* CallMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        return p == null ? Access.Fault(s, op) : CallTo<TWidth>(s, op, TWidth.Get(p));
    }

    /// <summary>RET, with <see cref="Op.Imm"/> bytes of arguments to drop.</summary>
    public static Op* Return<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong pointer = Stack.Pointer(s);
        byte* p = Access.Read(s, Stack.Linear(s, pointer, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.StackFault(s, op);
        ulong target = TWidth.Get(p);
        if (!CheckTarget(s, target))
            return Access.Fault(s, op);
        Stack.SetPointer(s, pointer + (ulong)TWidth.Bytes + (ulong)op->Imm);
        s->Retired += op->Ordinal;
        return Jump(s, target);
    }

    /// <summary>LOOP, LOOPE, LOOPNE: <see cref="Op.Aux"/> 0, 1 (ZF), 2 (not ZF). The counter's width is the address size.</summary>
    public static Op* Loop<TCounter>(VcpuBlock* s, Op* op)
        where TCounter : struct, IWidth
    {
        ulong count = TCounter.Get((byte*)&s->Gpr[1]) - 1;
        TCounter.SetRegister((byte*)&s->Gpr[1], count);
        bool taken = TCounter.Truncate(count) != 0 && (op->Aux == 0 || LazyFlags.Zero(s) == (op->Aux == 1));
        return taken ? Taken(s, op) : op + 1;
    }

    /// <summary>JCXZ, JECXZ, JRCXZ.</summary>
    public static Op* JumpIfCounterZero<TCounter>(VcpuBlock* s, Op* op)
        where TCounter : struct, IWidth => TCounter.Get((byte*)&s->Gpr[1]) == 0 ? Taken(s, op) : op + 1;

    /// <summary>A target outside the code segment, or not canonical, is the branch's own #GP.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool CheckTarget(VcpuBlock* s, ulong target)
    {
        bool good = (s->Mode & CodeMode.SizeMask) == CodeMode.Code64 ? Mmu.IsCanonical(target) : target <= s->SegLimit[1];
        return good || Access.Record(s, ExceptionVector.GeneralProtection, 0);
    }

    private static Op* CallTo<TWidth>(VcpuBlock* s, Op* op, ulong target)
        where TWidth : struct, IWidth
    {
        if (!CheckTarget(s, target))
            return Access.Fault(s, op);
        if (!Stack.Push<TWidth>(s, Access.NextRip(s, op)))
            return Access.StackFault(s, op);
        s->Retired += op->Ordinal;
        return Jump(s, target);
    }
}
