using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// RET far and IRET in every mode (Intel SDM vol. 2, RET and IRET). False: a fault of the instruction was recorded and nothing changed.
/// </summary>
internal static unsafe class FarReturns
{
    private const ulong AlwaysFromStack = (ulong)(Rflags.Arithmetic | Rflags.TF | Rflags.DF | Rflags.NT);

    /// <summary>RET far, dropping <paramref name="drop"/> bytes of arguments.</summary>
    public static bool TryReturn(SoftVcpu vcpu, int size, ulong drop)
    {
        VcpuBlock* s = vcpu.Block;
        StackCursor stack = StackCursor.Current(vcpu);
        if (!stack.TryPop(size, out ulong offset) || !stack.TryPop(size, out ulong raw))
            return false;
        ushort selector = (ushort)raw;
        if (SegmentLoads.IsRealOrV86(s))
        {
            if (offset > s->SegLimit[SegmentLoads.Cs])
                return Access.Record(s, ExceptionVector.GeneralProtection, 0);
            stack.Skip(drop);
            Stack.SetPointer(s, stack.Pointer);
            s->Rip = offset;
            SegmentLoads.LoadReal(vcpu, SegmentLoads.Cs, selector);
            return true;
        }
        if (!TryReadCode(vcpu, selector, out Descriptor code) || !FarTransfers.TryCheckTarget(vcpu, selector, in code, ref offset))
            return false;
        stack.Skip(drop);
        if ((selector & 3) == (int)s->Cpl)
        {
            if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
                return false;
            ulong same = stack.Pointer;
            Stack.SetPointer(s, same);
            SegmentLoads.SetCode(vcpu, code.ToSegment(selector));
            s->Rip = offset;
            return true;
        }
        if (!stack.TryPop(size, out ulong pointer) || !stack.TryPop(size, out ulong stackRaw))
            return false;
        if (!TryReadOuterStack(vcpu, (ushort)stackRaw, selector & 3, in code, out SegmentState ss) || !DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
            return false;
        SegmentLoads.SetCodeAndStack(vcpu, code.ToSegment(selector), in ss, selector & 3);
        Stack.SetPointer(s, pointer + drop);
        s->Rip = offset;
        SegmentLoads.DropInner(vcpu);
        return true;
    }

    /// <summary>IRET with an operand size in bytes.</summary>
    public static bool TryInterruptReturn(SoftVcpu vcpu, int size, ulong next)
    {
        VcpuBlock* s = vcpu.Block;
        if (SegmentLoads.IsRealOrV86(s))
            return SegmentLoads.IsV86(s) ? TryFromV86(vcpu, size) : TryReal(vcpu, size);
        bool longMode = DescriptorTables.IsLongMode(s);
        if ((s->SystemFlags & (ulong)Rflags.NT) != 0)
        {
            if (longMode)
                return Access.Record(s, ExceptionVector.GeneralProtection, 0);
            if (!vcpu.Mmu.TryReadSystem(TaskState.Linear(vcpu, 0), 2, out ulong link))
                return false;
            return TaskSwitching.TrySwitch(vcpu, (ushort)link, TaskSwitchKind.Return, next, LazyFlags.Read(s), 0);
        }
        StackCursor stack = StackCursor.Current(vcpu);
        if (!stack.TryPop(size, out ulong offset) || !stack.TryPop(size, out ulong raw) || !stack.TryPop(size, out ulong flags))
            return false;
        if ((flags & (ulong)Rflags.VM) != 0 && s->Cpl == 0 && size == 4 && !longMode)
            return TryToV86(vcpu, ref stack, offset, (ushort)raw, flags);

        ushort selector = (ushort)raw;
        int cpl = (int)s->Cpl;
        int newCpl = selector & 3;
        if (!TryReadCode(vcpu, selector, out Descriptor code))
            return false;
        bool is64 = DescriptorTables.Is64(s);
        if (!is64 && newCpl == cpl)
        {
            if (!FarTransfers.TryCheckTarget(vcpu, selector, in code, ref offset) || !DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
                return false;
            Stack.SetPointer(s, stack.Pointer);
            SetFlags(s, flags, size, cpl);
            SegmentLoads.SetCode(vcpu, code.ToSegment(selector));
            s->Rip = offset;
            return true;
        }
        // 64-bit mode pops a stack even where the privilege stays.
        if (!stack.TryPop(size, out ulong pointer) || !stack.TryPop(size, out ulong stackRaw))
            return false;
        if (!FarTransfers.TryCheckTarget(vcpu, selector, in code, ref offset)
            || !TryReadOuterStack(vcpu, (ushort)stackRaw, newCpl, in code, out SegmentState ss)
            || !DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
            return false;
        SetFlags(s, flags, size, cpl);
        SegmentLoads.SetCodeAndStack(vcpu, code.ToSegment(selector), in ss, newCpl);
        Stack.SetPointer(s, pointer);
        s->Rip = offset;
        if (newCpl > cpl)
            SegmentLoads.DropInner(vcpu);
        return true;
    }

    /// <summary>The code segment that a return names: it may not be more privileged than the current level.</summary>
    private static bool TryReadCode(SoftVcpu vcpu, ushort selector, out Descriptor code)
    {
        code = default;
        int rpl = selector & 3;
        if (DescriptorTables.IsNull(selector))
            return Access.Record(vcpu.Block, ExceptionVector.GeneralProtection, 0);
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.GeneralProtection, 0, out code))
            return false;
        bool allowed = code.IsCode && rpl >= (int)vcpu.Block->Cpl && (code.IsConforming ? code.Dpl <= rpl : code.Dpl == rpl);
        if (!allowed)
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        return code.IsPresent || DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
    }

    private static bool TryReadOuterStack(SoftVcpu vcpu, ushort selector, int cpl, in Descriptor code, out SegmentState ss)
    {
        if (DescriptorTables.IsNull(selector) && DescriptorTables.IsLongMode(vcpu.Block) && code.IsLong && cpl != 3 && (selector & 3) == cpl)
        {
            ss = SegmentLoads.Null(selector, cpl);
            return true;
        }
        if (DescriptorTables.IsNull(selector))
        {
            ss = default;
            return Access.Record(vcpu.Block, ExceptionVector.GeneralProtection, 0);
        }
        return SegmentLoads.TryReadStack(vcpu, selector, cpl, ExceptionVector.GeneralProtection, 0, out ss);
    }

    /// <summary>RFLAGS from the stack, as far as the privilege before the return may change them.</summary>
    private static void SetFlags(VcpuBlock* s, ulong flags, int size, int cpl)
    {
        ulong mask = AlwaysFromStack;
        if (size != 2)
            mask |= (ulong)(Rflags.RF | Rflags.AC | Rflags.ID);
        int iopl = (int)(s->SystemFlags >> 12 & 3);
        if (cpl <= iopl)
            mask |= (ulong)Rflags.IF;
        if (cpl == 0)
        {
            mask |= (ulong)Rflags.IOPL;
            if (size != 2)
                mask |= (ulong)(Rflags.VIF | Rflags.VIP);
        }
        LazyFlags.Write(s, (LazyFlags.Read(s) & ~mask) | (flags & mask));
    }

    private static bool TryReal(SoftVcpu vcpu, int size)
    {
        VcpuBlock* s = vcpu.Block;
        StackCursor stack = StackCursor.Current(vcpu);
        if (!stack.TryPop(size, out ulong offset) || !stack.TryPop(size, out ulong selector) || !stack.TryPop(size, out ulong flags))
            return false;
        if (offset > s->SegLimit[SegmentLoads.Cs])
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        Stack.SetPointer(s, stack.Pointer);
        // VIF and VIP stay as they are in real mode.
        const ulong kept = (ulong)(Rflags.VIF | Rflags.VIP);
        SetFlags(s, (flags & ~kept) | (s->SystemFlags & kept), size, 0);
        s->Rip = offset;
        SegmentLoads.LoadReal(vcpu, SegmentLoads.Cs, (ushort)selector);
        return true;
    }

    /// <summary>IRET of an 8086 program: stays in virtual-8086 mode, and needs IOPL 3, or the virtual interrupt flag.</summary>
    private static bool TryFromV86(SoftVcpu vcpu, int size)
    {
        VcpuBlock* s = vcpu.Block;
        bool trusted = (s->SystemFlags & (ulong)Rflags.IOPL) == (ulong)Rflags.IOPL;
        bool extended = size == 2 && (s->Cr4 & (ulong)Cr4.VME) != 0;
        if (!trusted && !extended)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        StackCursor stack = StackCursor.Current(vcpu);
        if (!stack.TryPop(size, out ulong offset) || !stack.TryPop(size, out ulong selector) || !stack.TryPop(size, out ulong flags))
            return false;
        if (offset > s->SegLimit[SegmentLoads.Cs])
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (!trusted)
        {
            bool enables = (flags & (ulong)Rflags.IF) != 0;
            if ((flags & (ulong)Rflags.TF) != 0 || (enables && (s->SystemFlags & (ulong)Rflags.VIP) != 0))
                return Access.Record(s, ExceptionVector.GeneralProtection, 0);
            ulong kept = LazyFlags.Read(s) & ~(AlwaysFromStack | (ulong)Rflags.VIF);
            LazyFlags.Write(s, kept | (flags & AlwaysFromStack) | (enables ? (ulong)Rflags.VIF : 0));
        }
        else
        {
            // The privilege is 3 and IOPL stays 3: IF changes, IOPL, VM, VIF and VIP do not.
            SetFlags(s, flags, size, 3);
        }
        Stack.SetPointer(s, stack.Pointer);
        s->Rip = offset;
        SegmentLoads.LoadReal(vcpu, SegmentLoads.Cs, (ushort)selector);
        return true;
    }

    private static bool TryToV86(SoftVcpu vcpu, ref StackCursor stack, ulong offset, ushort selector, ulong flags)
    {
        VcpuBlock* s = vcpu.Block;
        ushort* selectors = stackalloc ushort[6];
        if (!stack.TryPop(4, out ulong pointer) || !stack.TryPop(4, out ulong ss) || !stack.TryPop(4, out ulong es)
            || !stack.TryPop(4, out ulong ds) || !stack.TryPop(4, out ulong fs) || !stack.TryPop(4, out ulong gs))
            return false;
        if ((uint)offset > 0xffff)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        selectors[SegmentLoads.Es] = (ushort)es;
        selectors[SegmentLoads.Cs] = selector;
        selectors[SegmentLoads.Ss] = (ushort)ss;
        selectors[SegmentLoads.Ds] = (ushort)ds;
        selectors[SegmentLoads.Fs] = (ushort)fs;
        selectors[SegmentLoads.Gs] = (ushort)gs;
        const ulong fromStack = AlwaysFromStack | (ulong)(Rflags.RF | Rflags.AC | Rflags.ID | Rflags.IF | Rflags.IOPL | Rflags.VIF | Rflags.VIP | Rflags.VM);
        LazyFlags.Write(s, (LazyFlags.Read(s) & ~fromStack) | (flags & fromStack));
        s->Cpl = 3;
        for (int i = 0; i < 6; i++)
            vcpu.SetSegment(i, SegmentLoads.Virtual8086(selectors[i]));
        vcpu.UpdateMode();
        vcpu.UpdateAllBounds();
        s->Gpr[4] = (uint)pointer;
        s->Rip = (ushort)offset;
        return true;
    }
}
