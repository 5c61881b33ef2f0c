using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers that load and store segment registers. <see cref="Op.Aux"/> is the segment's number.</summary>
internal static unsafe class SegmentHandlers
{
    private const int Rsp = 4;

    /// <summary>MOV from a segment register to a general one, zero-extended to its size.</summary>
    public static Op* MoveToRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        TWidth.SetRegister((byte*)s + op->R0, s->SegSelector[op->Aux]);
        return op + 1;
    }

    public static Op* MoveToMemory(VcpuBlock* s, Op* op) =>
        Access.Store16(s, Access.Linear(s, op, 2, write: true), s->SegSelector[op->Aux]) ? op + 1 : Access.Fault(s, op);

    /// <summary>MOV to a data segment register from a general one.</summary>
    public static Op* LoadFromRegister(VcpuBlock* s, Op* op) => Load(s, op, *(ushort*)((byte*)s + op->R0));

    public static Op* LoadFromMemory(VcpuBlock* s, Op* op)
    {
        byte* p = Access.Read(s, Access.Linear(s, op, 2, write: false), 2);
        return p == null ? Access.Fault(s, op) : Load(s, op, *(ushort*)p);
    }

    private static Op* Load(VcpuBlock* s, Op* op, ushort selector)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!SegmentLoads.TryLoad(vcpu, op->Aux, selector))
            return Access.Fault(s, op);
        return op->Aux == SegmentLoads.Ss ? ShadowAfterStack(vcpu, s, op) : op + 1;
    }

    /// <summary>MOV SS and POP SS hold off interrupts and debug traps, so that the next instruction can set the stack pointer.</summary>
    private static Op* ShadowAfterStack(SoftVcpu vcpu, VcpuBlock* s, Op* op)
    {
        vcpu.InterruptShadow = true;
        vcpu.DebugShadow = true;
        return Access.Leave(s, op);
    }

    /// <summary>PUSH of a segment register. With a 32-bit or 64-bit operand Intel writes the lower 16 bits of the slot only, AMD all of it.</summary>
    public static Op* Push<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        ushort selector = s->SegSelector[op->Aux];
        if (TWidth.Bytes == 2 || SoftVcpu.From(s).Model.IsAmd)
            return Stack.Push<TWidth>(s, selector) ? op + 1 : Access.StackFault(s, op);
        ulong pointer = Stack.Cut(s, Stack.Pointer(s) - (ulong)TWidth.Bytes);
        if (!Access.Store16(s, Stack.Linear(s, pointer, 2, write: true), selector))
            return Access.StackFault(s, op);
        Stack.SetPointer(s, pointer);
        return op + 1;
    }

    public static Op* Pop<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ulong rsp = s->Gpr[Rsp];
        if (!Stack.Pop<TWidth>(s, out ulong value))
            return Access.StackFault(s, op);
        if (!SegmentLoads.TryLoad(vcpu, op->Aux, (ushort)value))
        {
            s->Gpr[Rsp] = rsp;
            return Access.Fault(s, op);
        }
        return op->Aux == SegmentLoads.Ss ? ShadowAfterStack(vcpu, s, op) : op + 1;
    }

    /// <summary>LDS, LES, LFS, LGS, LSS: offset into a register, selector into a segment register.</summary>
    public static Op* LoadFarPointer<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if (!TryReadFarPointer(s, op, TWidth.Bytes, out ulong offset, out ushort selector))
            return Access.Fault(s, op);
        if (!SegmentLoads.TryLoad(SoftVcpu.From(s), op->Aux, selector))
            return Access.Fault(s, op);
        TWidth.SetRegister((byte*)s + op->R0, offset);
        return op->Aux == SegmentLoads.Ss ? Access.Leave(s, op) : op + 1;
    }

    /// <summary>Reads m16:16, m16:32 or m16:64. False: a fault was recorded.</summary>
    public static bool TryReadFarPointer(VcpuBlock* s, Op* op, int size, out ulong offset, out ushort selector)
    {
        offset = 0;
        selector = 0;
        byte* p = Access.Read(s, Access.Linear(s, op, size + 2, write: false), size + 2);
        if (p == null)
            return false;
        offset = size switch
        {
            2 => *(ushort*)p,
            4 => *(uint*)p,
            _ => *(ulong*)p,
        };
        selector = *(ushort*)(p + size);
        return true;
    }

    // FS and GS bases.

    /// <summary>RDFSBASE, RDGSBASE: #UD unless CR4.FSGSBASE.</summary>
    public static Op* ReadBase<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if ((s->Cr4 & (ulong)Cr4.FSGSBASE) == 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        TWidth.SetRegister((byte*)s + op->R0, s->SegBase[op->Aux]);
        return op + 1;
    }

    public static Op* WriteBase<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if ((s->Cr4 & (ulong)Cr4.FSGSBASE) == 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        ulong value = TWidth.Get((byte*)s + op->R0);
        if (!Mmu.IsCanonical(value))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        s->SegBase[op->Aux] = value;
        return op + 1;
    }

    public static Op* SwapGs(VcpuBlock* s, Op* op)
    {
        if (s->Cpl != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        MsrFile msrs = SoftVcpu.From(s).Msrs;
        ulong kernel = msrs.KernelGsBase;
        msrs.KernelGsBase = s->SegBase[SegmentLoads.Gs];
        s->SegBase[SegmentLoads.Gs] = kernel;
        return op + 1;
    }
}
