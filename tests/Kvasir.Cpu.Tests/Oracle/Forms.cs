using System;
using System.Collections.Generic;
using System.Globalization;
using System.Runtime.Intrinsics.X86;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>One instruction form in one mode.</summary>
/// <param name="Mode">16, 32 or 64.</param>
internal readonly record struct Form(int Mode, Code Code)
{
    /// <summary>Stands for whole blocks of instructions.</summary>
    public bool IsBlock => Code == Code.INVALID;

    /// <summary>What <see cref="ToString"/> gave.</summary>
    public static Form Parse(string mode, string code) =>
        new(int.Parse(mode, CultureInfo.InvariantCulture), code == "block" ? Code.INVALID : Enum.Parse<Code>(code));

    public override string ToString() => IsBlock ? $"{Mode}/block" : $"{Mode}/{Code}";
}

/// <summary>Which forms are run on both processors, and why others are not.</summary>
internal static class Forms
{
    private static readonly HashSet<CpuidFeature> Offered =
    [
        CpuidFeature.INTEL8086, CpuidFeature.INTEL186, CpuidFeature.INTEL286, CpuidFeature.INTEL386, CpuidFeature.INTEL486, CpuidFeature.X64,
        CpuidFeature.CMOV, CpuidFeature.CX8, CpuidFeature.CMPXCHG16B, CpuidFeature.FPU, CpuidFeature.FPU287, CpuidFeature.FPU387, CpuidFeature.MMX,
        CpuidFeature.SSE, CpuidFeature.SSE2, CpuidFeature.SSE3, CpuidFeature.SSSE3, CpuidFeature.SSE4_1, CpuidFeature.SSE4_2, CpuidFeature.AES,
        CpuidFeature.PCLMULQDQ, CpuidFeature.AVX, CpuidFeature.AVX2, CpuidFeature.FMA, CpuidFeature.F16C, CpuidFeature.BMI1, CpuidFeature.BMI2,
        CpuidFeature.LZCNT, CpuidFeature.POPCNT, CpuidFeature.ADX, CpuidFeature.MOVBE, CpuidFeature.SHA, CpuidFeature.GFNI, CpuidFeature.VAES,
        CpuidFeature.VPCLMULQDQ, CpuidFeature.FXSR, CpuidFeature.XSAVE, CpuidFeature.XSAVEOPT, CpuidFeature.XSAVEC, CpuidFeature.FSGSBASE,
        CpuidFeature.MULTIBYTENOP, CpuidFeature.PAUSE, CpuidFeature.PREFETCHW, CpuidFeature.CLFSH, CpuidFeature.CLFLUSHOPT, CpuidFeature.CLWB,
        CpuidFeature.SMAP, CpuidFeature.MSR,
    ];

    private static readonly bool s_hostShowsGfni = ((uint)X86Base.CpuId(7, 0).Ecx >> 8 & 1) != 0;

    /// <summary>No operations on processors without their feature, or while it is off.</summary>
    private static readonly HashSet<Mnemonic> Hints =
    [
        Mnemonic.Endbr32, Mnemonic.Endbr64, Mnemonic.Rdsspd, Mnemonic.Rdsspq, Mnemonic.Cldemote, Mnemonic.Prefetchit0, Mnemonic.Prefetchit1,
        Mnemonic.Prefetchwt1,
    ];

    private static readonly Dictionary<Mnemonic, string> Left = new()
    {
        [Mnemonic.Cpuid] = "answers for the host's model",
        [Mnemonic.Rdtsc] = "time",
        [Mnemonic.Rdtscp] = "time",
        [Mnemonic.Rdpmc] = "counters",
        [Mnemonic.Rdpid] = "number of the host's processor",
        [Mnemonic.Rdrand] = "random",
        [Mnemonic.Rdseed] = "random",
        [Mnemonic.Xgetbv] = "the host's XCR0 has components that are not offered",
        [Mnemonic.Syscall] = "enters the host's kernel",
        [Mnemonic.Sysenter] = "enters the host's kernel",
        [Mnemonic.Sysret] = "privileged; the host's kernel decides",
        [Mnemonic.Sysexit] = "privileged; the host's kernel decides",
        [Mnemonic.Int] = "enters the host's kernel where a gate allows it",
        [Mnemonic.Int1] = "the host's debug trap; traps have cases of their own",
        [Mnemonic.Int3] = "a trap through the IDT, not a fault; traps have cases of their own",
        [Mnemonic.Into] = "a trap through the IDT, not a fault; traps have cases of their own",
        [Mnemonic.Iret] = "far transfer",
        [Mnemonic.Iretd] = "far transfer",
        [Mnemonic.Iretq] = "far transfer",
        [Mnemonic.Retf] = "far transfer",
        [Mnemonic.Sgdt] = "UMIP: the host's kernel emulates it",
        [Mnemonic.Sidt] = "UMIP: the host's kernel emulates it",
        [Mnemonic.Sldt] = "UMIP: the host's kernel emulates it",
        [Mnemonic.Smsw] = "UMIP: the host's kernel emulates it",
        [Mnemonic.Str] = "UMIP: the host's kernel emulates it",
        [Mnemonic.Xbegin] = "transactional memory is not offered",
    };

    /// <summary>Every form to run in a mode, in order of code.</summary>
    public static List<Form> All(int mode)
    {
        List<Form> forms = [];
        foreach (Code code in Enum.GetValues<Code>())
        {
            if (WhyNot(code, mode) == null)
                forms.Add(new Form(mode, code));
        }
        return forms;
    }

    /// <summary>Why a form is not run on both processors; null: it is.</summary>
    public static string? WhyNot(Code code, int mode)
    {
        OpCodeInfo info = code.ToOpCode();
        if (!info.IsInstruction)
            return "not an instruction";
        if (info.Encoding is not (EncodingKind.Legacy or EncodingKind.VEX))
            return "encoding is not offered";
        if (mode switch { 16 => !info.Mode16, 32 => !info.Mode32, _ => !info.Mode64 })
            return "not in this mode";
        if (info.Fwait)
            return "two instructions: FWAIT and another";
        if (info.DecoderOption is not (DecoderOptions.None or DecoderOptions.AMD))
            return "decodes only for other processors";
        foreach (CpuidFeature feature in code.CpuidFeatures())
        {
            if (!Offered.Contains(feature) && !Hints.Contains(code.Mnemonic()))
                return "feature is not offered";
            // A host's hypervisor may hide what its processor executes all the same: the guest is told of neither.
            if (feature == CpuidFeature.GFNI && !s_hostShowsGfni)
                return "the host's CPUID hides the feature";
        }
        for (int i = 0; i < info.OpCount; i++)
        {
            if (info.GetOpKind(i) is OpCodeOperandKind.farbr2_2 or OpCodeOperandKind.farbr4_2)
                return "far transfer";
        }
        if (Left.TryGetValue(code.Mnemonic(), out string? reason))
            return reason;
        return code switch
        {
            Code.Jmp_m1616 or Code.Jmp_m1632 or Code.Jmp_m1664 or Code.Call_m1616 or Code.Call_m1632 or Code.Call_m1664 => "far transfer",
            Code.Movsxd_r16_rm16 => "the vendors read different widths",
            Code.Ud0 or Code.Ud0_r16_rm16 or Code.Ud0_r32_rm32 or Code.Ud0_r64_rm64 or Code.Ud1_r16_rm16 or Code.Ud1_r32_rm32 or Code.Ud1_r64_rm64
                => "the vendors decode different lengths",
            Code.Reservednop_rm16_r16_0F0D or Code.Reservednop_rm32_r32_0F0D or Code.Reservednop_rm64_r64_0F0D
                => "the vendors differ: no operation, or an invalid register form of PREFETCH",
            _ => null,
        };
    }
}
