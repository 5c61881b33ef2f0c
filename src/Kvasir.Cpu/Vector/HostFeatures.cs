using System.Runtime.Intrinsics.X86;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>What the host processor can execute: an instruction that it lacks is #UD for the guest too, whatever the guest was told.</summary>
public static class HostFeatures
{
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) Leaf0 = X86Base.CpuId(0, 0);
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) Leaf1 = X86Base.CpuId(1, 0);
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) Leaf7 = Leaf0.Eax >= 7 ? X86Base.CpuId(7, 0) : default;
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) Leaf7Sub1 = Leaf7.Eax >= 1 ? X86Base.CpuId(7, 1) : default;
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) LeafD1 = Leaf0.Eax >= 13 ? X86Base.CpuId(13, 1) : default;
    private static readonly (int Eax, int Ebx, int Ecx, int Edx) Extended1 = X86Base.CpuId(unchecked((int)0x8000_0001), 0);

    /// <summary>The host is AMD's or Hygon's.</summary>
    public static bool IsAmd { get; } = Leaf0.Ebx is 0x6874_7541 or 0x6f67_7948;

    /// <summary>XSAVE, and the kernel has enabled it.</summary>
    public static bool Xsave { get; } = Bit(Leaf1.Ecx, 27);

    /// <summary>AVX, and the kernel lets it be used.</summary>
    public static bool Avx { get; } = Bit(Leaf1.Ecx, 27) && Bit(Leaf1.Ecx, 28);

    /// <summary>The x87 code and data selectors read as zero (CPUID.7.0:EBX[13]).</summary>
    public static bool SelectorsDeprecated { get; } = Bit(Leaf7.Ebx, 13);

    /// <summary>The x87 data pointer changes only with an unmasked exception (CPUID.7.0:EBX[6]).</summary>
    public static bool DataPointerOnExceptionOnly { get; } = Bit(Leaf7.Ebx, 6);

    /// <summary>State components that a guest may enable in XCR0.</summary>
    public static ulong Xcr0Mask { get; } = Avx ? 7ul : 3ul;

    /// <summary>Whether the host can execute an instruction.</summary>
    public static bool Supports(in Instruction instruction)
    {
        foreach (CpuidFeature feature in instruction.CpuidFeatures)
        {
            if (!Supports(feature))
                return false;
        }
        return true;
    }

    private static bool Supports(CpuidFeature feature) => feature switch
    {
        CpuidFeature.INTEL8086 or CpuidFeature.INTEL286 or CpuidFeature.INTEL386 or CpuidFeature.INTEL486 => true,
        CpuidFeature.FPU or CpuidFeature.FPU287 or CpuidFeature.FPU387 or CpuidFeature.X64 or CpuidFeature.CX8 or CpuidFeature.CMOV => true,
        CpuidFeature.MMX or CpuidFeature.FXSR or CpuidFeature.SSE or CpuidFeature.SSE2 or CpuidFeature.CLFSH => true,
        CpuidFeature.SSE3 => Bit(Leaf1.Ecx, 0),
        CpuidFeature.PCLMULQDQ => Bit(Leaf1.Ecx, 1),
        CpuidFeature.SSSE3 => Bit(Leaf1.Ecx, 9),
        CpuidFeature.FMA => Avx && Bit(Leaf1.Ecx, 12),
        CpuidFeature.CMPXCHG16B => Bit(Leaf1.Ecx, 13),
        CpuidFeature.SSE4_1 => Bit(Leaf1.Ecx, 19),
        CpuidFeature.SSE4_2 => Bit(Leaf1.Ecx, 20),
        CpuidFeature.MOVBE => Bit(Leaf1.Ecx, 22),
        CpuidFeature.POPCNT => Bit(Leaf1.Ecx, 23),
        CpuidFeature.AES => Bit(Leaf1.Ecx, 25),
        CpuidFeature.XSAVE => Bit(Leaf1.Ecx, 26),
        CpuidFeature.AVX => Avx,
        CpuidFeature.F16C => Avx && Bit(Leaf1.Ecx, 29),
        CpuidFeature.BMI1 => Bit(Leaf7.Ebx, 3),
        CpuidFeature.AVX2 => Avx && Bit(Leaf7.Ebx, 5),
        CpuidFeature.BMI2 => Bit(Leaf7.Ebx, 8),
        CpuidFeature.ADX => Bit(Leaf7.Ebx, 19),
        CpuidFeature.CLFLUSHOPT => Bit(Leaf7.Ebx, 23),
        CpuidFeature.CLWB => Bit(Leaf7.Ebx, 24),
        CpuidFeature.SHA => Bit(Leaf7.Ebx, 29),
        CpuidFeature.GFNI => Bit(Leaf7.Ecx, 8),
        CpuidFeature.VAES => Avx && Bit(Leaf7.Ecx, 9),
        CpuidFeature.VPCLMULQDQ => Avx && Bit(Leaf7.Ecx, 10),
        CpuidFeature.CLDEMOTE => true,
        CpuidFeature.SHA512 => Avx && Bit(Leaf7Sub1.Eax, 0),
        CpuidFeature.SM3 => Avx && Bit(Leaf7Sub1.Eax, 1),
        CpuidFeature.SM4 => Avx && Bit(Leaf7Sub1.Eax, 2),
        CpuidFeature.AVX_VNNI => Avx && Bit(Leaf7Sub1.Eax, 4),
        CpuidFeature.AVX_IFMA => Avx && Bit(Leaf7Sub1.Eax, 23),
        CpuidFeature.AVX_VNNI_INT8 => Avx && Bit(Leaf7Sub1.Edx, 4),
        CpuidFeature.AVX_NE_CONVERT => Avx && Bit(Leaf7Sub1.Edx, 5),
        CpuidFeature.AVX_VNNI_INT16 => Avx && Bit(Leaf7Sub1.Edx, 10),
        CpuidFeature.XSAVEOPT => Bit(LeafD1.Eax, 0),
        CpuidFeature.XSAVEC => Bit(LeafD1.Eax, 1),
        CpuidFeature.XSAVES => Bit(LeafD1.Eax, 3),
        CpuidFeature.LZCNT => Bit(Extended1.Ecx, 5),
        CpuidFeature.SSE4A => Bit(Extended1.Ecx, 6),
        CpuidFeature.PREFETCHW => true,
        _ => false,
    };

    private static bool Bit(int register, int bit) => (register >> bit & 1) != 0;
}
