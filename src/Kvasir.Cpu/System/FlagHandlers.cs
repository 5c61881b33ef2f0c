using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of the system flags: CLI, STI, PUSHF, POPF, CLAC, STAC, and HLT.</summary>
internal static unsafe class FlagHandlers
{
    private const ulong PushedMask = ~(ulong)(Rflags.VM | Rflags.RF);

    /// <summary>What POPF may change at any privilege, apart from IF and IOPL.</summary>
    private const ulong Popped16 = (ulong)(Rflags.Arithmetic | Rflags.TF | Rflags.DF | Rflags.NT);
    private const ulong Popped32 = Popped16 | (ulong)(Rflags.AC | Rflags.ID);

    private static int Iopl(VcpuBlock* s) => (int)(s->SystemFlags >> 12 & 3);

    /// <summary>Whether IF itself is the program's to change; else VIF may be, or neither.</summary>
    private static bool OwnsInterruptFlag(VcpuBlock* s) => (int)s->Cpl <= Iopl(s);

    /// <summary>VME in virtual-8086 mode, PVI at CPL 3: CLI and STI act on VIF.</summary>
    private static bool HasVirtualFlag(VcpuBlock* s) => SegmentLoads.IsV86(s)
        ? (s->Cr4 & (ulong)Cr4.VME) != 0
        : s->Cpl == 3 && (s->Cr4 & (ulong)Cr4.PVI) != 0;

    public static Op* ClearInterrupts(VcpuBlock* s, Op* op)
    {
        if (OwnsInterruptFlag(s))
            s->SystemFlags &= ~(ulong)Rflags.IF;
        else if (HasVirtualFlag(s))
            s->SystemFlags &= ~(ulong)Rflags.VIF;
        else
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        return op + 1;
    }

    /// <summary>STI: where it enables interrupts, they wait for the next instruction.</summary>
    public static Op* SetInterrupts(VcpuBlock* s, Op* op)
    {
        if (OwnsInterruptFlag(s))
        {
            if ((s->SystemFlags & (ulong)Rflags.IF) != 0)
                return op + 1;
            s->SystemFlags |= (ulong)Rflags.IF;
            SoftVcpu.From(s).InterruptShadow = true;
            return Access.Leave(s, op);
        }
        if (!HasVirtualFlag(s) || (s->SystemFlags & (ulong)Rflags.VIP) != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        s->SystemFlags |= (ulong)Rflags.VIF;
        return op + 1;
    }

    public static Op* Push<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ulong image = LazyFlags.Read(s) & PushedMask;
        if (SegmentLoads.IsV86(s) && Iopl(s) < 3)
        {
            if (TWidth.Bytes != 2 || (s->Cr4 & (ulong)Cr4.VME) == 0)
                return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
            bool virtualFlag = (image & (ulong)Rflags.VIF) != 0;
            image = (image & ~(ulong)Rflags.IF) | (ulong)Rflags.IOPL | (virtualFlag ? (ulong)Rflags.IF : 0);
        }
        return Stack.Push<TWidth>(s, image) ? op + 1 : Access.StackFault(s, op);
    }

    public static Op* Pop<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        bool virtual8086 = SegmentLoads.IsV86(s);
        bool extended = virtual8086 && Iopl(s) < 3;
        if (extended && (TWidth.Bytes != 2 || (s->Cr4 & (ulong)Cr4.VME) == 0))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        ulong rsp = s->Gpr[4];
        if (!Stack.Pop<TWidth>(s, out ulong image))
            return Access.StackFault(s, op);
        ulong mask = TWidth.Bytes == 2 ? Popped16 : Popped32;
        if (extended)
        {
            bool enables = (image & (ulong)Rflags.IF) != 0;
            if ((image & (ulong)Rflags.TF) != 0 || (enables && (s->SystemFlags & (ulong)Rflags.VIP) != 0))
            {
                s->Gpr[4] = rsp;
                return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
            }
            mask |= (ulong)Rflags.VIF;
            image = (image & ~(ulong)Rflags.VIF) | (enables ? (ulong)Rflags.VIF : 0);
        }
        else
        {
            if (OwnsInterruptFlag(s))
                mask |= (ulong)Rflags.IF;
            if (s->Cpl == 0)
                mask |= (ulong)Rflags.IOPL;
        }
        ulong old = s->SystemFlags;
        LazyFlags.Write(s, (LazyFlags.Read(s) & ~(mask | (ulong)Rflags.RF)) | (image & mask));
        ulong now = s->SystemFlags;
        if (((old ^ now) & (ulong)Rflags.AC) != 0)
            SoftVcpu.From(s).Mmu.UpdateRights();
        // Only what the execution loop looks at ends the block.
        bool matters = (now & (ulong)Rflags.TF) != 0 || (~old & now & (ulong)Rflags.IF) != 0;
        return matters ? Access.Leave(s, op) : op + 1;
    }

    /// <summary>CLAC, STAC: supervisor code opens and closes user pages to itself.</summary>
    public static Op* ClearAccessControl(VcpuBlock* s, Op* op) => SetAccessControl(s, op, 0);

    public static Op* SetAccessControl(VcpuBlock* s, Op* op) => SetAccessControl(s, op, (ulong)Rflags.AC);

    private static Op* SetAccessControl(VcpuBlock* s, Op* op, ulong value)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (s->Cpl != 0 || !vcpu.Model.Has(CpuFeature.Smap))
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        s->SystemFlags = (s->SystemFlags & ~(ulong)Rflags.AC) | value;
        vcpu.Mmu.UpdateRights();
        return op + 1;
    }

    public static Op* Halt(VcpuBlock* s, Op* op)
    {
        if (s->Cpl != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        SoftVcpu.From(s).Halt();
        return Access.Leave(s, op);
    }
}
