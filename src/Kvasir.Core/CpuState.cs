using System.Runtime.CompilerServices;

namespace Kvasir.Core;

/// <summary>A segment register with its hidden part (Intel SDM vol. 3, "Segment Descriptors").</summary>
/// <param name="Selector">The visible selector.</param>
/// <param name="Base">Linear base address.</param>
/// <param name="Limit">The last valid offset, in bytes (granularity applied).</param>
/// <param name="Attributes">
/// Bits 0-3 type, 4 S, 5-6 DPL, 7 P, 12 AVL, 13 L, 14 D/B, 15 G: bits 8-23 of a descriptor's second double word with the limit bits zero;
/// bit 16 set: the register holds no usable segment (a null selector was loaded).
/// </param>
public record struct SegmentState(ushort Selector, ulong Base, uint Limit, uint Attributes);

/// <summary>GDTR or IDTR.</summary>
public record struct TableState(ulong Base, ushort Limit);

[InlineArray(16)]
public struct GeneralRegisters
{
    private ulong _first;
}

/// <summary>Fixed-range MTRRs in the order 250h, 258h, 259h, 268h-26Fh.</summary>
[InlineArray(11)]
public struct FixedMtrrs
{
    private ulong _first;
}

/// <summary>Variable-range MTRRs: base and mask of range 0, 1, ... 7 (200h-20Fh).</summary>
[InlineArray(16)]
public struct VariableMtrrs
{
    private ulong _first;
}

/// <summary>The vector and floating-point state in the standard (non-compacted) XSAVE format: 512 bytes legacy, 64 header, 256 YMM upper halves.</summary>
[InlineArray(104)]
public struct XsaveImage
{
    private ulong _first;
}

/// <summary>What a vCPU is doing (Intel SDM vol. 3, "Multiple-Processor Management").</summary>
public enum VcpuActivity : byte
{
    Active,
    Halted,
    WaitForSipi,
    Shutdown,
}

/// <summary>
/// All architectural state of one vCPU outside its local APIC. It crosses between accelerators, loaders, snapshots and debuggers.
/// Registers are in encoding order: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.
/// </summary>
public record struct CpuState
{
    public GeneralRegisters Gpr;
    public ulong Rip;
    public ulong Rflags;

    public SegmentState Es;
    public SegmentState Cs;
    public SegmentState Ss;
    public SegmentState Ds;
    public SegmentState Fs;
    public SegmentState Gs;
    public SegmentState Ldtr;
    public SegmentState Tr;
    public TableState Gdtr;
    public TableState Idtr;

    public ulong Cr0;
    public ulong Cr2;
    public ulong Cr3;
    public ulong Cr4;
    public ulong Xcr0;
    public ulong Dr0;
    public ulong Dr1;
    public ulong Dr2;
    public ulong Dr3;
    public ulong Dr6;
    public ulong Dr7;

    public ulong Efer;
    public ulong Star;
    public ulong Lstar;
    public ulong Cstar;
    public ulong Fmask;
    public ulong KernelGsBase;
    public ulong SysenterCs;
    public ulong SysenterEsp;
    public ulong SysenterEip;
    public ulong Pat;
    public ulong TscAux;
    public ulong TscAdjust;
    public ulong Xss;
    public ulong MiscEnable;
    public ulong SpecCtrl;
    public ulong MtrrDefType;
    public FixedMtrrs MtrrFixed;
    public VariableMtrrs MtrrVariable;

    /// <summary>The time stamp counter minus what <see cref="VmClock"/> gives for the moment of saving.</summary>
    public long TscOffset;

    public XsaveImage Xsave;

    public VcpuActivity Activity;

    /// <summary>Interrupts are held off for one instruction (STI, MOV SS).</summary>
    public bool InterruptShadow;

    /// <summary>An NMI handler runs: further NMIs wait for its IRET.</summary>
    public bool NmiBlocked;

    public bool NmiPending;

    /// <summary>The state after power-on or RESET (Intel SDM vol. 3, table "IA-32 and Intel 64 Processor States Following Power-up").</summary>
    /// <param name="signature">Family, model and stepping as CPUID leaf 1 gives them in EAX; RESET leaves them in EDX.</param>
    public static CpuState AtReset(uint signature = 0)
    {
        const uint codeAttributes = 0x9b;
        const uint dataAttributes = 0x93;
        CpuState s = default;
        s.Gpr[2] = signature;
        s.Rip = 0xfff0;
        s.Rflags = 2;
        s.Cs = new SegmentState(0xf000, 0xffff_0000, 0xffff, codeAttributes);
        s.Ds = s.Es = s.Fs = s.Gs = s.Ss = new SegmentState(0, 0, 0xffff, dataAttributes);
        s.Ldtr = new SegmentState(0, 0, 0xffff, 0x82);
        s.Tr = new SegmentState(0, 0, 0xffff, 0x8b);
        s.Gdtr = s.Idtr = new TableState(0, 0xffff);
        s.Cr0 = 0x6000_0010;
        s.Xcr0 = 1;
        s.Dr6 = 0xffff_0ff0;
        s.Dr7 = 0x400;
        s.Pat = 0x0007_0406_0007_0406;
        s.MiscEnable = 1;
        s.Xsave = InitialXsave();
        return s;
    }

    /// <summary>XSAVE state at reset: FCW 40h, all registers zero and tagged valid, MXCSR 1F80h.</summary>
    private static XsaveImage InitialXsave()
    {
        XsaveImage image = default;
        image[0] = 0x0000_00ff_0000_0040;
        image[3] = 0x0000_ffff_0000_1f80;
        image[64] = 3;
        return image;
    }
}
