using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>SYSCALL, SYSRET, SYSENTER and SYSEXIT, with the differences between the vendors' manuals.</summary>
internal static unsafe class FastSystemCalls
{
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rsp = 4;
    private const int R11 = 11;

    /// <summary>SYSCALL: Intel knows it in 64-bit mode only, AMD in compatibility and legacy mode too.</summary>
    public static Op* Syscall(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        bool is64 = DescriptorTables.Is64(s);
        bool offered = (s->Efer & (ulong)Efer.SCE) != 0 && (is64 || (vcpu.Model.IsAmd && (s->Cr0 & (ulong)Cr0.PE) != 0));
        if (!offered)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        MsrFile msrs = vcpu.Msrs;
        ulong next = Access.NextRip(s, op);
        ushort selector = (ushort)(msrs.Star >> 32 & 0xfffc);
        bool longMode = DescriptorTables.IsLongMode(s);
        if (longMode)
        {
            s->Gpr[Rcx] = next;
            s->Gpr[R11] = LazyFlags.Read(s) & ~(ulong)Rflags.RF;
            s->Rip = is64 ? msrs.Lstar : msrs.Cstar;
            LazyFlags.Write(s, LazyFlags.Read(s) & ~(msrs.Fmask | (ulong)Rflags.RF));
        }
        else
        {
            s->Gpr[Rcx] = (uint)next;
            s->Rip = (uint)msrs.Star;
            s->SystemFlags &= ~(ulong)(Rflags.IF | Rflags.VM | Rflags.RF);
        }
        if ((s->SystemFlags & (ulong)Rflags.TF) == 0)
            vcpu.Debug.SuppressStep();
        SegmentLoads.SetCodeAndStack(vcpu, SegmentLoads.FlatCode(selector, 0, longMode), SegmentLoads.FlatStack((ushort)(selector + 8), 0), 0);
        if (!longMode)
            vcpu.UpdateAllBounds();
        return Access.Transferred(s, op);
    }

    /// <summary>SYSRET with a 32-bit operand size: to 32-bit code.</summary>
    public static Op* Sysret32(VcpuBlock* s, Op* op) => Sysret(s, op, to64: false);

    /// <summary>SYSRET with REX.W: to 64-bit code.</summary>
    public static Op* Sysret64(VcpuBlock* s, Op* op) => Sysret(s, op, to64: true);

    private static Op* Sysret(VcpuBlock* s, Op* op, bool to64)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        bool amd = vcpu.Model.IsAmd;
        bool is64 = DescriptorTables.Is64(s);
        bool offered = (s->Efer & (ulong)Efer.SCE) != 0 && (is64 || (amd && (s->Cr0 & (ulong)Cr0.PE) != 0 && !SegmentLoads.IsV86(s)));
        if (!offered)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        // Intel refuses a bad return address while still in the kernel; AMD lets the fetch in user mode fault.
        if (s->Cpl != 0 || (to64 && !amd && !Mmu.IsCanonical(s->Gpr[Rcx])))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        ushort selector = (ushort)(vcpu.Msrs.Star >> 48);
        ushort code = (ushort)((to64 ? selector + 16 : selector) | 3);
        if (DescriptorTables.IsLongMode(s))
        {
            const ulong restored = 0x3c_7fd7;
            LazyFlags.Write(s, s->Gpr[R11] & restored);
        }
        else
        {
            s->SystemFlags |= (ulong)Rflags.IF;
        }
        s->Rip = to64 ? s->Gpr[Rcx] : (uint)s->Gpr[Rcx];
        SegmentLoads.SetCodeAndStack(vcpu, SegmentLoads.FlatCode(code, 3, to64), SegmentLoads.FlatStack((ushort)((selector + 8) | 3), 3), 3);
        return Access.Transferred(s, op);
    }

    /// <summary>SYSENTER: AMD does not have it in long mode.</summary>
    public static Op* Sysenter(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        MsrFile msrs = vcpu.Msrs;
        bool longMode = DescriptorTables.IsLongMode(s);
        if (longMode && vcpu.Model.IsAmd)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        if ((s->Cr0 & (ulong)Cr0.PE) == 0 || (msrs.SysenterCs & 0xfffc) == 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        ushort selector = (ushort)(msrs.SysenterCs & 0xfffc);
        s->SystemFlags &= ~(ulong)(Rflags.VM | Rflags.IF | Rflags.RF);
        s->Rip = longMode ? msrs.SysenterEip : (uint)msrs.SysenterEip;
        SegmentLoads.SetCodeAndStack(vcpu, SegmentLoads.FlatCode(selector, 0, longMode), SegmentLoads.FlatStack((ushort)(selector + 8), 0), 0);
        vcpu.UpdateAllBounds();
        s->Gpr[Rsp] = longMode ? msrs.SysenterEsp : (uint)msrs.SysenterEsp;
        return Access.Transferred(s, op);
    }

    public static Op* Sysexit32(VcpuBlock* s, Op* op) => Sysexit(s, op, to64: false);

    public static Op* Sysexit64(VcpuBlock* s, Op* op) => Sysexit(s, op, to64: true);

    private static Op* Sysexit(VcpuBlock* s, Op* op, bool to64)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (DescriptorTables.IsLongMode(s) && vcpu.Model.IsAmd)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        ulong rip = s->Gpr[Rdx];
        ulong rsp = s->Gpr[Rcx];
        bool bad = (s->Cr0 & (ulong)Cr0.PE) == 0 || s->Cpl != 0 || (vcpu.Msrs.SysenterCs & 0xfffc) == 0
            || (to64 && (!Mmu.IsCanonical(rip) || !Mmu.IsCanonical(rsp)));
        if (bad)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        int selector = (int)(vcpu.Msrs.SysenterCs & 0xfffc) + (to64 ? 32 : 16);
        s->Rip = to64 ? rip : (uint)rip;
        s->Gpr[Rsp] = to64 ? rsp : (uint)rsp;
        SegmentLoads.SetCodeAndStack(vcpu, SegmentLoads.FlatCode((ushort)(selector | 3), 3, to64), SegmentLoads.FlatStack((ushort)((selector + 8) | 3), 3), 3);
        return Access.Transferred(s, op);
    }
}
