using System;

namespace Kvasir.X86;

/// <summary>CR0 (Intel SDM vol. 3, "Control Registers").</summary>
[Flags]
public enum Cr0 : ulong
{
    None = 0,
    PE = 1ul << 0,
    MP = 1ul << 1,
    EM = 1ul << 2,
    TS = 1ul << 3,
    ET = 1ul << 4,
    NE = 1ul << 5,
    WP = 1ul << 16,
    AM = 1ul << 18,
    NW = 1ul << 29,
    CD = 1ul << 30,
    PG = 1ul << 31,
}

/// <summary>CR4.</summary>
[Flags]
public enum Cr4 : ulong
{
    None = 0,
    VME = 1ul << 0,
    PVI = 1ul << 1,
    TSD = 1ul << 2,
    DE = 1ul << 3,
    PSE = 1ul << 4,
    PAE = 1ul << 5,
    MCE = 1ul << 6,
    PGE = 1ul << 7,
    PCE = 1ul << 8,
    OSFXSR = 1ul << 9,
    OSXMMEXCPT = 1ul << 10,
    UMIP = 1ul << 11,
    LA57 = 1ul << 12,
    VMXE = 1ul << 13,
    SMXE = 1ul << 14,
    FSGSBASE = 1ul << 16,
    PCIDE = 1ul << 17,
    OSXSAVE = 1ul << 18,
    SMEP = 1ul << 20,
    SMAP = 1ul << 21,
    PKE = 1ul << 22,
    CET = 1ul << 23,
    PKS = 1ul << 24,
}

/// <summary>IA32_EFER (C0000080h).</summary>
[Flags]
public enum Efer : ulong
{
    None = 0,
    SCE = 1ul << 0,
    LME = 1ul << 8,
    LMA = 1ul << 10,
    NXE = 1ul << 11,
    SVME = 1ul << 12,
    LMSLE = 1ul << 13,
    FFXSR = 1ul << 14,
    TCE = 1ul << 15,
}

/// <summary>RFLAGS.</summary>
[Flags]
public enum Rflags : ulong
{
    None = 0,
    CF = 1ul << 0,
    Fixed1 = 1ul << 1,
    PF = 1ul << 2,
    AF = 1ul << 4,
    ZF = 1ul << 6,
    SF = 1ul << 7,
    TF = 1ul << 8,
    IF = 1ul << 9,
    DF = 1ul << 10,
    OF = 1ul << 11,
    IOPL = 3ul << 12,
    NT = 1ul << 14,
    RF = 1ul << 16,
    VM = 1ul << 17,
    AC = 1ul << 18,
    VIF = 1ul << 19,
    VIP = 1ul << 20,
    ID = 1ul << 21,

    /// <summary>CF, PF, AF, ZF, SF, OF.</summary>
    Arithmetic = CF | PF | AF | ZF | SF | OF,
}

/// <summary>Exception vectors (Intel SDM vol. 3, "Exceptions and Interrupts").</summary>
public enum ExceptionVector : byte
{
    DivideError = 0,
    Debug = 1,
    Nmi = 2,
    Breakpoint = 3,
    Overflow = 4,
    BoundRange = 5,
    InvalidOpcode = 6,
    DeviceNotAvailable = 7,
    DoubleFault = 8,
    CoprocessorOverrun = 9,
    InvalidTss = 10,
    SegmentNotPresent = 11,
    StackFault = 12,
    GeneralProtection = 13,
    PageFault = 14,
    FloatingPoint = 16,
    AlignmentCheck = 17,
    MachineCheck = 18,
    SimdFloatingPoint = 19,
    Virtualization = 20,
    ControlProtection = 21,
}

/// <summary>Error code bits of a page fault.</summary>
[Flags]
public enum PageFaultCode : uint
{
    None = 0,
    Present = 1 << 0,
    Write = 1 << 1,
    User = 1 << 2,
    Reserved = 1 << 3,
    Fetch = 1 << 4,
}

/// <summary>Bits of a page-table entry, any level.</summary>
[Flags]
public enum PageEntry : ulong
{
    None = 0,
    Present = 1ul << 0,
    Writable = 1ul << 1,
    User = 1ul << 2,
    WriteThrough = 1ul << 3,
    CacheDisable = 1ul << 4,
    Accessed = 1ul << 5,
    Dirty = 1ul << 6,
    Large = 1ul << 7,
    Global = 1ul << 8,
    NoExecute = 1ul << 63,
}

/// <summary>Segment attributes, as in bits 8-23 of a descriptor's second double word without the limit bits.</summary>
[Flags]
public enum SegmentAttributes : uint
{
    None = 0,
    TypeMask = 0xf,
    Accessed = 1 << 0,

    /// <summary>Data: writable. Code: readable.</summary>
    WritableOrReadable = 1 << 1,

    /// <summary>Data: expands down. Code: conforming.</summary>
    ExpandDownOrConforming = 1 << 2,
    Code = 1 << 3,

    /// <summary>S: code or data; clear for a system descriptor.</summary>
    CodeOrData = 1 << 4,
    DplMask = 3 << 5,
    Present = 1 << 7,
    Available = 1 << 12,
    Long = 1 << 13,

    /// <summary>D for code, B for stacks and expand-down data.</summary>
    Default32 = 1 << 14,
    Granularity = 1 << 15,

    /// <summary>Not architectural: the register was loaded with a null selector.</summary>
    Unusable = 1 << 16,
}

/// <summary>Types of system descriptors (S clear).</summary>
public enum SystemDescriptorType
{
    Tss16Available = 1,
    Ldt = 2,
    Tss16Busy = 3,
    CallGate16 = 4,
    TaskGate = 5,
    InterruptGate16 = 6,
    TrapGate16 = 7,
    Tss32Available = 9,
    Tss32Busy = 11,
    CallGate32 = 12,
    InterruptGate32 = 14,
    TrapGate32 = 15,
}
