namespace Kvasir.Cpu;

/// <summary>A register of a CPUID leaf that holds feature bits.</summary>
public enum CpuidWord
{
    Leaf1Edx,
    Leaf1Ecx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    LeafDEax,
    Extended1Ecx,
    Extended1Edx,
    Extended8Ebx,
    Extended21Eax,
    Extended7Edx,
    Leaf6Eax,
    Count,
}

/// <summary>
/// A CPUID feature that Kvasir handles: word number × 32 + bit (Intel SDM vol. 2, CPUID; AMD64 APM vol. 3, appendix E).
/// </summary>
public enum CpuFeature
{
    // 1.EDX
    Fpu = 0,
    Vme = 1,
    De = 2,
    Pse = 3,
    Tsc = 4,
    Msr = 5,
    Pae = 6,
    Mce = 7,
    Cx8 = 8,
    Apic = 9,
    Sep = 11,
    Mtrr = 12,
    Pge = 13,
    Mca = 14,
    Cmov = 15,
    Pat = 16,
    Pse36 = 17,
    Clflush = 19,
    Mmx = 23,
    Fxsr = 24,
    Sse = 25,
    Sse2 = 26,
    SelfSnoop = 27,
    Htt = 28,

    // 1.ECX
    Sse3 = 32 + 0,
    Pclmulqdq = 32 + 1,
    Ssse3 = 32 + 9,
    Fma = 32 + 12,
    Cx16 = 32 + 13,
    Pcid = 32 + 17,
    Sse41 = 32 + 19,
    Sse42 = 32 + 20,
    X2Apic = 32 + 21,
    Movbe = 32 + 22,
    Popcnt = 32 + 23,
    TscDeadline = 32 + 24,
    Aes = 32 + 25,
    Xsave = 32 + 26,
    Osxsave = 32 + 27,
    Avx = 32 + 28,
    F16c = 32 + 29,
    Rdrand = 32 + 30,
    Hypervisor = 32 + 31,

    // 7.0.EBX
    Fsgsbase = 64 + 0,
    TscAdjust = 64 + 1,
    Bmi1 = 64 + 3,
    Avx2 = 64 + 5,
    FdpExceptionOnly = 64 + 6,
    Smep = 64 + 7,
    Bmi2 = 64 + 8,
    Erms = 64 + 9,
    Invpcid = 64 + 10,
    ZeroFcsFds = 64 + 13,
    Rdseed = 64 + 18,
    Adx = 64 + 19,
    Smap = 64 + 20,
    Clflushopt = 64 + 23,
    Clwb = 64 + 24,
    Sha = 64 + 29,

    // 7.0.ECX
    Umip = 96 + 2,
    Gfni = 96 + 8,
    Vaes = 96 + 9,
    Vpclmulqdq = 96 + 10,
    Rdpid = 96 + 22,

    // 7.0.EDX
    Fsrm = 128 + 4,
    SpecCtrl = 128 + 26,
    Stibp = 128 + 27,
    ArchCapabilities = 128 + 29,

    // D.1.EAX
    Xsaveopt = 160 + 0,
    Xsavec = 160 + 1,
    Xgetbv1 = 160 + 2,
    Xsaves = 160 + 3,

    // 80000001h.ECX
    Lahf = 192 + 0,
    CmpLegacy = 192 + 1,
    Cr8Legacy = 192 + 4,
    Lzcnt = 192 + 5,
    MisalignSse = 192 + 7,
    Prefetchw = 192 + 8,
    TopologyExtensions = 192 + 22,

    // 80000001h.EDX
    Syscall = 224 + 11,
    Nx = 224 + 20,
    MmxExtensions = 224 + 22,
    Pdpe1gb = 224 + 26,
    Rdtscp = 224 + 27,
    LongMode = 224 + 29,

    // 80000008h.EBX
    Wbnoinvd = 256 + 9,
    AmdIbpb = 256 + 12,
    AmdIbrs = 256 + 14,
    AmdStibp = 256 + 15,
    AmdSsbNo = 256 + 26,
    AmdBtcNo = 256 + 29,

    // 80000021h.EAX
    LfenceSerializes = 288 + 2,
    NullSelectorClearsBase = 288 + 6,
    AutomaticIbrs = 288 + 8,
    SrsoNo = 288 + 29,

    // 80000007h.EDX
    InvariantTsc = 320 + 8,

    // 6.EAX
    Arat = 352 + 2,
}

/// <summary>Where a feature comes from, and which vendor's processors have it.</summary>
internal enum FeatureOrigin
{
    /// <summary>Instructions that run as the host's own: the host must have it.</summary>
    Host,

    /// <summary>Kvasir does it itself.</summary>
    Emulated,

    /// <summary>Kvasir does it itself; Intel's processors have it.</summary>
    EmulatedIntel,

    /// <summary>Kvasir does it itself; AMD's processors have it.</summary>
    EmulatedAmd,

    /// <summary>The host must have it; AMD's processors have it.</summary>
    HostAmd,
}
