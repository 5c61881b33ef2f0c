namespace Kvasir.Kvm;

/// <summary>Requests of the KVM interface that Kvasir makes (linux/kvm.h; Documentation/virt/kvm/api.rst). The number encodes direction and size.</summary>
public enum KvmRequest : uint
{
    // On /dev/kvm
    GetApiVersion = 0xae00,
    CreateVm = 0xae01,
    GetMsrIndexList = 0xc004_ae02,
    CheckExtension = 0xae03,
    GetVcpuMapSize = 0xae04,
    GetSupportedCpuid = 0xc008_ae05,

    // On a VM
    CreateVcpu = 0xae41,
    GetDirtyLog = 0x4010_ae42,
    SetUserMemoryRegion = 0x4020_ae46,
    SetTssAddress = 0xae47,
    SetIdentityMapAddress = 0x4008_ae48,
    CreateIrqChip = 0xae60,
    SetIrqLine = 0x4008_ae61,
    GetIrqChip = 0xc208_ae62,
    SetIrqChip = 0x8208_ae63,
    RegisterCoalesced = 0x4010_ae67,
    SetGsiRouting = 0x4008_ae6a,
    SetIrqFd = 0x4020_ae76,
    CreatePit = 0x4040_ae77,
    SetIoEventFd = 0x4040_ae79,
    SetClock = 0x4030_ae7b,
    GetClock = 0x8030_ae7c,
    GetPit = 0x8070_ae9f,
    SetPit = 0x4070_aea0,
    EnableCapability = 0x4068_aea3,
    SignalMsi = 0x4020_aea5,
    SetMsrFilter = 0x4188_aec6,
    ResetDirtyRings = 0xaec7,

    // On a vCPU
    Run = 0xae80,
    GetRegisters = 0x8090_ae81,
    SetRegisters = 0x4090_ae82,
    GetSpecialRegisters = 0x8138_ae83,
    SetSpecialRegisters = 0x4138_ae84,
    Translate = 0xc018_ae85,
    Interrupt = 0x4004_ae86,
    GetMsrs = 0xc008_ae88,
    SetMsrs = 0x4008_ae89,
    GetLocalApic = 0x8400_ae8e,
    SetLocalApic = 0x4400_ae8f,
    SetCpuid = 0x4008_ae90,
    GetCpuid = 0xc008_ae91,
    GetActivity = 0x8004_ae98,
    SetActivity = 0x4004_ae99,
    Nmi = 0xae9a,
    SetGuestDebug = 0x4048_ae9b,
    GetEvents = 0x8040_ae9f,
    SetEvents = 0x4040_aea0,
    GetDebugRegisters = 0x8080_aea1,
    SetDebugRegisters = 0x4080_aea2,
    GetTscFrequency = 0xaea3,
    GetXsave = 0x9000_aea4,
    SetXsave = 0x5000_aea5,
    GetXcrs = 0x8188_aea6,
    SetXcrs = 0x4188_aea7,
    TellOfPause = 0xaead,
}

/// <summary>Numbers for <see cref="KvmRequest.CheckExtension"/>.</summary>
public enum KvmCapability
{
    UserMemory = 3,
    CoalescedMmio = 15,
    AdjustClock = 39,
    VcpuEvents = 41,
    DebugRegisters = 50,
    Xsave = 55,
    Xcrs = 56,
    TscDeadlineTimer = 72,
    SyncRegisters = 74,
    ReadOnlyMemory = 81,
    SplitIrqChip = 121,
    IoEventFdAnyLength = 122,
    X2ApicApi = 129,
    ImmediateExit = 136,
    NestedState = 157,
    CoalescedPio = 162,
    UserSpaceMsr = 188,
    MsrFilter = 189,
    DirtyRing = 192,
    ExitOnEmulationFailure = 204,
    DirtyRingAcquireRelease = 223,
}

/// <summary>Why KVM_RUN came back.</summary>
public enum KvmExitReason : uint
{
    Unknown = 0,
    Exception = 1,
    Io = 2,
    Hypercall = 3,
    Debug = 4,
    Halt = 5,
    Mmio = 6,
    InterruptWindow = 7,
    Shutdown = 8,
    FailedEntry = 9,
    Interrupted = 10,
    SetTaskPriority = 11,
    InternalError = 17,
    EndOfInterrupt = 26,
    ReadMsr = 29,
    WriteMsr = 30,
    DirtyRingFull = 31,
}

/// <summary>What an exit with <see cref="KvmExitReason.InternalError"/> is about.</summary>
internal enum KvmInternalError : uint
{
    EmulationFailure = 1,
    SimultaneousExceptions = 2,
    EventDelivery = 3,
    UnexpectedExit = 4,
}

/// <summary>Numbers of errors (errno(3)) that the KVM interface gives a meaning.</summary>
internal static class Errno
{
    public const int NotFound = 2;
    public const int Interrupted = 4;
    public const int NoSuchDevice = 6;
    public const int TooBig = 7;
    public const int Again = 11;
    public const int Denied = 13;
    public const int BadAddress = 14;
    public const int Busy = 16;
    public const int NoDevice = 19;
    public const int Invalid = 22;
    public const int NotATerminal = 25;
}
