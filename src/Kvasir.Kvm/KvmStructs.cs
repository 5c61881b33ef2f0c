using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Kvasir.Kvm;

// Layouts of linux/kvm.h on x86-64. Padding is spelled out where the compiler would not put it by itself.

[StructLayout(LayoutKind.Sequential)]
internal struct KvmRegisters
{
    public ulong Rax, Rbx, Rcx, Rdx, Rsi, Rdi, Rsp, Rbp, R8, R9, R10, R11, R12, R13, R14, R15, Rip, Rflags;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmSegment
{
    public ulong Base;
    public uint Limit;
    public ushort Selector;
    public byte Type, Present, Dpl, Db, S, L, G, Avl, Unusable, Padding;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmTable
{
    public ulong Base;
    public ushort Limit;
    private readonly ushort _padding0, _padding1, _padding2;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmSpecialRegisters
{
    public KvmSegment Cs, Ds, Es, Fs, Gs, Ss, Tr, Ldt;
    public KvmTable Gdt, Idt;
    public ulong Cr0, Cr2, Cr3, Cr4, Cr8, Efer, ApicBase;
    public ulong Interrupts0, Interrupts1, Interrupts2, Interrupts3;
}

[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct KvmEvents
{
    public const uint NmiPendingValid = 1;
    public const uint ShadowValid = 4;

    [FieldOffset(0)] public byte ExceptionInjected;
    [FieldOffset(1)] public byte ExceptionVector;
    [FieldOffset(2)] public byte ExceptionHasCode;
    [FieldOffset(3)] public byte ExceptionPending;
    [FieldOffset(4)] public uint ExceptionCode;
    [FieldOffset(8)] public byte InterruptInjected;
    [FieldOffset(9)] public byte InterruptVector;
    [FieldOffset(10)] public byte InterruptSoft;
    [FieldOffset(11)] public byte Shadow;
    [FieldOffset(12)] public byte NmiInjected;
    [FieldOffset(13)] public byte NmiPending;
    [FieldOffset(14)] public byte NmiMasked;
    [FieldOffset(16)] public uint SipiVector;
    [FieldOffset(20)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 128)]
internal struct KvmDebugRegisters
{
    [FieldOffset(0)] public ulong Dr0;
    [FieldOffset(8)] public ulong Dr1;
    [FieldOffset(16)] public ulong Dr2;
    [FieldOffset(24)] public ulong Dr3;
    [FieldOffset(32)] public ulong Dr6;
    [FieldOffset(40)] public ulong Dr7;
}

[InlineArray(512)]
internal struct KvmXsave
{
    private ulong _first;
}

[StructLayout(LayoutKind.Explicit, Size = 392)]
internal struct KvmXcrs
{
    [FieldOffset(0)] public uint Count;
    [FieldOffset(8)] public uint Number;
    [FieldOffset(16)] public ulong Value;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmMsrEntry
{
    public uint Index;
    private readonly uint _reserved;
    public ulong Value;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmCpuidEntry
{
    public const uint SignificantIndex = 1;

    public uint Function, Index, Flags, Eax, Ebx, Ecx, Edx;
    private readonly uint _padding0, _padding1, _padding2;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmMemoryRegion
{
    public const uint LogDirtyPages = 1;
    public const uint ReadOnly = 2;

    public uint Slot, Flags;
    public ulong GuestAddress, Size, HostAddress;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmDirtyLog
{
    public uint Slot;
    private readonly uint _padding;
    public ulong Bitmap;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmDirtyEntry
{
    public uint Flags, Slot;
    public ulong Offset;
}

[StructLayout(LayoutKind.Explicit, Size = 104)]
internal struct KvmEnableCapability
{
    [FieldOffset(0)] public uint Capability;
    [FieldOffset(8)] public ulong Argument0;
}

[StructLayout(LayoutKind.Explicit, Size = 392)]
internal struct KvmMsrFilter
{
    [FieldOffset(0)] public uint Flags;
    [FieldOffset(8)] public KvmMsrFilterRange Range0;
    [FieldOffset(32)] public KvmMsrFilterRange Range1;
    [FieldOffset(56)] public KvmMsrFilterRange Range2;
}

[StructLayout(LayoutKind.Sequential)]
internal struct KvmMsrFilterRange
{
    public const uint Read = 1;
    public const uint Write = 2;

    public uint Flags, Count, Base;
    private readonly uint _padding;
    public ulong Bitmap;
}

[StructLayout(LayoutKind.Explicit, Size = 72)]
internal struct KvmGuestDebug
{
    public const uint Enable = 1;
    public const uint SingleStep = 2;
    public const uint HardwareBreakpoints = 0x2_0000;

    [FieldOffset(0)] public uint Control;
    [FieldOffset(8)] public ulong Dr0;
    [FieldOffset(16)] public ulong Dr1;
    [FieldOffset(24)] public ulong Dr2;
    [FieldOffset(32)] public ulong Dr3;
    [FieldOffset(40)] public ulong Dr6;
    [FieldOffset(64)] public ulong Dr7;
}

[StructLayout(LayoutKind.Explicit, Size = 32)]
internal struct KvmMsi
{
    [FieldOffset(0)] public uint AddressLow;
    [FieldOffset(4)] public uint AddressHigh;
    [FieldOffset(8)] public uint Data;
    [FieldOffset(12)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 8)]
internal struct KvmIrqLevel
{
    [FieldOffset(0)] public uint Gsi;
    [FieldOffset(4)] public uint Level;
}

/// <summary>One row of the table that says where a numbered interrupt goes.</summary>
[StructLayout(LayoutKind.Explicit, Size = 48)]
internal struct KvmIrqRoute
{
    public const uint ToChip = 1;
    public const uint ToMessage = 2;

    [FieldOffset(0)] public uint Gsi;
    [FieldOffset(4)] public uint Type;
    [FieldOffset(16)] public uint Chip;
    [FieldOffset(20)] public uint Pin;
    [FieldOffset(16)] public uint AddressLow;
    [FieldOffset(20)] public uint AddressHigh;
    [FieldOffset(24)] public uint Data;
}

/// <summary>The state of an 8259 or the I/O APIC.</summary>
[StructLayout(LayoutKind.Explicit, Size = 520)]
internal unsafe struct KvmIrqChipState
{
    [FieldOffset(0)] public uint Chip;
    [FieldOffset(8)] public fixed byte Union[512];
}

[StructLayout(LayoutKind.Explicit, Size = 112)]
internal struct KvmPitState
{
    public const uint ReplacedByHpet = 1;

    [FieldOffset(72)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct KvmPitConfiguration
{
    public const uint WithSpeakerPort = 1;

    [FieldOffset(0)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 32)]
internal struct KvmIrqFd
{
    public const uint Deassign = 1;

    [FieldOffset(0)] public int Fd;
    [FieldOffset(4)] public uint Gsi;
    [FieldOffset(8)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 64)]
internal struct KvmIoEventFd
{
    public const uint MatchData = 1;
    public const uint Port = 2;
    public const uint Deassign = 4;

    [FieldOffset(0)] public ulong Match;
    [FieldOffset(8)] public ulong Address;
    [FieldOffset(16)] public uint Length;
    [FieldOffset(20)] public int Fd;
    [FieldOffset(24)] public uint Flags;
}

[InlineArray(256)]
internal struct KvmLocalApicState
{
    private uint _first;
}

[StructLayout(LayoutKind.Explicit, Size = 24)]
internal struct KvmTranslation
{
    [FieldOffset(0)] public ulong LinearAddress;
    [FieldOffset(8)] public ulong PhysicalAddress;
    [FieldOffset(16)] public byte Valid;
}

[StructLayout(LayoutKind.Explicit, Size = 48)]
internal struct KvmClockData
{
    [FieldOffset(0)] public ulong Clock;
    [FieldOffset(8)] public uint Flags;
}

[StructLayout(LayoutKind.Explicit, Size = 16)]
internal struct KvmCoalescedZone
{
    [FieldOffset(0)] public ulong Address;
    [FieldOffset(8)] public uint Size;
    [FieldOffset(12)] public uint IsPort;
}

/// <summary>A write that KVM kept for later.</summary>
[StructLayout(LayoutKind.Explicit, Size = 24)]
internal struct KvmCoalescedWrite
{
    [FieldOffset(0)] public ulong Address;
    [FieldOffset(8)] public uint Length;
    [FieldOffset(12)] public uint IsPort;
    [FieldOffset(16)] public ulong Data;
}

/// <summary>Registers that KVM leaves in the shared page when it comes back, and takes from there when it is told that they were changed (KVM_CAP_SYNC_REGS).</summary>
[StructLayout(LayoutKind.Sequential)]
internal struct KvmSyncRegisters
{
    public const ulong All = 7;

    public KvmRegisters General;
    public KvmSpecialRegisters Special;
    public KvmEvents Events;
}

/// <summary>The page that KVM and user space share for one vCPU.</summary>
[StructLayout(LayoutKind.Explicit)]
internal struct KvmRunPage
{
    [FieldOffset(0)] public byte RequestInterruptWindow;
    [FieldOffset(1)] public byte ImmediateExit;
    [FieldOffset(8)] public KvmExitReason ExitReason;
    [FieldOffset(12)] public byte ReadyForInterrupt;
    [FieldOffset(13)] public byte InterruptFlag;
    [FieldOffset(16)] public ulong Cr8;
    [FieldOffset(24)] public ulong ApicBase;

    // Port I/O
    [FieldOffset(32)] public byte IoIsWrite;
    [FieldOffset(33)] public byte IoSize;
    [FieldOffset(34)] public ushort IoPort;
    [FieldOffset(36)] public uint IoCount;
    [FieldOffset(40)] public ulong IoDataOffset;

    // Memory-mapped I/O
    [FieldOffset(32)] public ulong MmioAddress;
    [FieldOffset(40)] public ulong MmioData;
    [FieldOffset(48)] public uint MmioLength;
    [FieldOffset(52)] public byte MmioIsWrite;

    // Model-specific registers
    [FieldOffset(32)] public byte MsrError;
    [FieldOffset(40)] public uint MsrReason;
    [FieldOffset(44)] public uint MsrIndex;
    [FieldOffset(48)] public ulong MsrData;

    // Trouble
    [FieldOffset(32)] public ulong FailedEntryReason;
    [FieldOffset(32)] public KvmInternalError InternalError;
    [FieldOffset(36)] public uint InternalDataCount;
    [FieldOffset(40)] public ulong InternalData0;
    [FieldOffset(48)] public ulong InternalData1;
    [FieldOffset(56)] public ulong InternalData2;

    // End of a level-triggered interrupt
    [FieldOffset(32)] public byte EndedVector;

    // Registers
    [FieldOffset(288)] public ulong ValidRegisters;
    [FieldOffset(296)] public ulong DirtyRegisters;
    [FieldOffset(304)] public KvmSyncRegisters Registers;

    // Guest debug
    [FieldOffset(40)] public ulong DebugPc;
    [FieldOffset(48)] public ulong DebugDr6;
}
