using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of CPUID, MSRs, counters, random numbers and caches.</summary>
internal static unsafe class ProcessorHandlers
{
    private const int Rax = 0;
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rbx = 3;

    /// <summary>Instructions that only ring 0 may execute and that change nothing here: WBINVD, INVD, WBNOINVD.</summary>
    public static Op* NothingPrivileged(VcpuBlock* s, Op* op) =>
        s->Cpl == 0 ? op + 1 : Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);

    public static Op* Cpuid(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        CpuidResult result = vcpu.Model.Cpuid((uint)s->Gpr[Rax], (uint)s->Gpr[Rcx], vcpu);
        s->Gpr[Rax] = result.Eax;
        s->Gpr[Rbx] = result.Ebx;
        s->Gpr[Rcx] = result.Ecx;
        s->Gpr[Rdx] = result.Edx;
        return op + 1;
    }

    public static Op* ReadMsr(VcpuBlock* s, Op* op)
    {
        if (s->Cpl != 0 || !SoftVcpu.From(s).Msrs.TryRead((uint)s->Gpr[Rcx], out ulong value))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        s->Gpr[Rax] = (uint)value;
        s->Gpr[Rdx] = value >> 32;
        return op + 1;
    }

    public static Op* WriteMsr(VcpuBlock* s, Op* op)
    {
        uint number = (uint)s->Gpr[Rcx];
        ulong value = (uint)s->Gpr[Rax] | s->Gpr[Rdx] << 32;
        if (s->Cpl != 0 || !SoftVcpu.From(s).Msrs.TryWrite(number, value))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        // Thread-local bases are written often and change no mode.
        return number is Msr.FsBase or Msr.GsBase or Msr.KernelGsBase ? op + 1 : Access.Leave(s, op);
    }

    private static bool TryTimeStamp(VcpuBlock* s) =>
        s->Cpl == 0 || (s->Cr4 & (ulong)Cr4.TSD) == 0 || (s->Cr0 & (ulong)Cr0.PE) == 0 || Access.Record(s, ExceptionVector.GeneralProtection, 0);

    public static Op* ReadTimeStamp(VcpuBlock* s, Op* op)
    {
        if (!TryTimeStamp(s))
            return Access.Fault(s, op);
        ulong tsc = SoftVcpu.From(s).Tsc;
        s->Gpr[Rax] = (uint)tsc;
        s->Gpr[Rdx] = tsc >> 32;
        return op + 1;
    }

    public static Op* ReadTimeStampAndProcessor(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!vcpu.Model.Has(CpuFeature.Rdtscp))
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        if (!TryTimeStamp(s))
            return Access.Fault(s, op);
        ulong tsc = vcpu.Tsc;
        s->Gpr[Rax] = (uint)tsc;
        s->Gpr[Rdx] = tsc >> 32;
        s->Gpr[Rcx] = (uint)vcpu.Msrs.TscAux;
        return op + 1;
    }

    /// <summary>RDPID: as wide as the mode.</summary>
    public static Op* ReadProcessorId(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!vcpu.Model.Has(CpuFeature.Rdpid))
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        *(ulong*)((byte*)s + op->R0) = vcpu.Msrs.TscAux;
        return op + 1;
    }

    /// <summary>RDPMC: there are no counters to name.</summary>
    public static Op* ReadPerformanceCounter(VcpuBlock* s, Op* op) => Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);

    public static Op* Random<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => Entropy<TWidth>(s, op, CpuFeature.Rdrand);

    public static Op* Seed<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => Entropy<TWidth>(s, op, CpuFeature.Rdseed);

    /// <summary>Numbers come from the host kernel's generator and always succeed: CF set, the other flags clear.</summary>
    private static Op* Entropy<TWidth>(VcpuBlock* s, Op* op, CpuFeature feature)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!vcpu.Model.Has(feature))
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        TWidth.SetRegister((byte*)s + op->R0, vcpu.Random.Next());
        LazyFlags.SetArithmetic(s, (ulong)Rflags.CF);
        return op + 1;
    }

    public static Op* InvalidOpcode(VcpuBlock* s, Op* op) => Access.Raise(s, op, ExceptionVector.InvalidOpcode);
}
