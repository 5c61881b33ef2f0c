using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Whether a class of instructions may execute now (Intel SDM vol. 2, "Exceptions Type" tables), as a type argument of handlers.</summary>
internal unsafe interface IGate
{
    /// <summary>False: #UD, #NM or #MF was recorded.</summary>
    static abstract bool Open(VcpuBlock* s);
}

/// <summary>General registers and memory only.</summary>
internal unsafe struct NoGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) => true;
}

/// <summary>Legacy SSE.</summary>
internal unsafe struct SseGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) =>
        ((s->Cr0 & (ulong)(Cr0.EM | Cr0.TS)) == 0 && (s->Cr4 & (ulong)Cr4.OSFXSR) != 0) || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s)
    {
        bool undefined = (s->Cr0 & (ulong)Cr0.EM) != 0 || (s->Cr4 & (ulong)Cr4.OSFXSR) == 0;
        return Access.Record(s, undefined ? ExceptionVector.InvalidOpcode : ExceptionVector.DeviceNotAvailable);
    }
}

/// <summary>VEX-encoded vector instructions.</summary>
internal unsafe struct AvxGate : IGate
{
    private const ulong SseAndAvx = 6;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) =>
        ((s->Cr0 & (ulong)Cr0.TS) == 0 && (s->Cr4 & (ulong)Cr4.OSXSAVE) != 0 && (s->Xcr0 & SseAndAvx) == SseAndAvx) || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s)
    {
        bool undefined = (s->Cr4 & (ulong)Cr4.OSXSAVE) == 0 || (s->Xcr0 & SseAndAvx) != SseAndAvx;
        return Access.Record(s, undefined ? ExceptionVector.InvalidOpcode : ExceptionVector.DeviceNotAvailable);
    }
}

/// <summary>MMX registers.</summary>
internal unsafe struct MmxGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) => ((s->Cr0 & (ulong)(Cr0.EM | Cr0.TS)) == 0 && !X87State.IsPending(s)) || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s)
    {
        if ((s->Cr0 & (ulong)Cr0.EM) != 0)
            return Access.Record(s, ExceptionVector.InvalidOpcode);
        if ((s->Cr0 & (ulong)Cr0.TS) != 0)
            return Access.Record(s, ExceptionVector.DeviceNotAvailable);
        return SoftVcpu.From(s).Vectors.ReportPending();
    }
}

/// <summary>MMX and XMM registers together.</summary>
internal unsafe struct MmxSseGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) => SseGate.Open(s) && MmxGate.Open(s);
}

/// <summary>x87 instructions.</summary>
internal unsafe struct X87Gate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) => ((s->Cr0 & (ulong)(Cr0.EM | Cr0.TS)) == 0 && !X87State.IsPending(s)) || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s) => X87ControlGate.Open(s) && SoftVcpu.From(s).Vectors.ReportPending();
}

/// <summary>x87 instructions that do not look for pending exceptions (FNINIT, FNSTSW and their like).</summary>
internal unsafe struct X87ControlGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) =>
        (s->Cr0 & (ulong)(Cr0.EM | Cr0.TS)) == 0 || Access.Record(s, ExceptionVector.DeviceNotAvailable);
}

/// <summary>FXSAVE, FXRSTOR: whatever CR4.OSFXSR says.</summary>
internal unsafe struct FxsaveGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) => (s->Cr0 & (ulong)(Cr0.EM | Cr0.TS)) == 0 || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s) => Access.Record(s, ExceptionVector.DeviceNotAvailable);
}

/// <summary>The XSAVE family.</summary>
internal unsafe struct XsaveGate : IGate
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Open(VcpuBlock* s) =>
        ((s->Cr0 & (ulong)Cr0.TS) == 0 && (s->Cr4 & (ulong)Cr4.OSXSAVE) != 0) || Refuse(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool Refuse(VcpuBlock* s) =>
        Access.Record(s, (s->Cr4 & (ulong)Cr4.OSXSAVE) == 0 ? ExceptionVector.InvalidOpcode : ExceptionVector.DeviceNotAvailable);
}
