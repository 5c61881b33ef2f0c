using System;

namespace Kvasir.Devices.Chipset;

/// <summary>What the guest may see of a local APIC (CPUID and the version register must agree with it).</summary>
/// <param name="X2Apic">IA32_APIC_BASE.EXTD can be set.</param>
/// <param name="TscDeadline">The timer has the TSC-deadline mode.</param>
/// <param name="Cmci">There is a seventh local vector, for corrected machine checks.</param>
/// <param name="PhysicalAddressBits">MAXPHYADDR: higher bits of IA32_APIC_BASE are reserved.</param>
/// <param name="TimerSpacing">
/// Nanoseconds that are between two timer interrupts at least, later ones being put off. 0 but on hosts so slow that a guest would do nothing else than serve its timer.
/// </param>
public sealed record LocalApicFeatures(bool X2Apic = true, bool TscDeadline = true, bool Cmci = false, int PhysicalAddressBits = 46, long TimerSpacing = 0);

/// <summary>Bits of IA32_APIC_BASE (1Bh).</summary>
[Flags]
public enum ApicBase : ulong
{
    None = 0,

    /// <summary>BSP: this is the boot processor.</summary>
    BootProcessor = 1 << 8,

    /// <summary>EXTD: x2APIC mode.</summary>
    X2Apic = 1 << 10,

    /// <summary>EN: the APIC is there.</summary>
    Enable = 1 << 11,
}

/// <summary>The local vector table's entries, for sources inside the processor.</summary>
public enum LocalVector : byte
{
    Cmci,
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

public sealed partial class LocalApic
{
    /// <summary>Ticks a second of the timer before its divider. Boards that report a bus frequency report this one.</summary>
    public const ulong TimerFrequency = 1_000_000_000;

    /// <summary>Where the registers are after reset.</summary>
    public const ulong DefaultAddress = 0xfee0_0000;

    /// <summary>A periodic timer wakes the host no oftener than this, in nanoseconds; a faster one gets its interrupts merged.</summary>
    private const long MinimumPeriod = 50_000;

    private const uint MsrApicBase = 0x1b;
    private const uint MsrTscDeadline = 0x6e0;
    private const uint MsrX2ApicFirst = 0x800;
    private const uint MsrX2ApicLast = 0x8ff;

    private const uint DefaultSpurious = 0xff;

    /// <summary>Offsets in the register page; an x2APIC register's MSR is 800h plus the offset divided by 16.</summary>
    private enum Register : uint
    {
        Id = 0x020,
        Version = 0x030,
        TaskPriority = 0x080,
        ArbitrationPriority = 0x090,
        ProcessorPriority = 0x0a0,
        Eoi = 0x0b0,
        RemoteRead = 0x0c0,
        LogicalDestination = 0x0d0,
        DestinationFormat = 0x0e0,
        Spurious = 0x0f0,
        InService = 0x100,
        TriggerMode = 0x180,
        Request = 0x200,
        ErrorStatus = 0x280,
        LvtCmci = 0x2f0,
        Command = 0x300,
        CommandHigh = 0x310,
        LvtTimer = 0x320,
        LvtThermal = 0x330,
        LvtPerformance = 0x340,
        LvtLint0 = 0x350,
        LvtLint1 = 0x360,
        LvtError = 0x370,
        InitialCount = 0x380,
        CurrentCount = 0x390,
        DivideConfiguration = 0x3e0,
        SelfIpi = 0x3f0,
    }

    [Flags]
    private enum Svr : uint
    {
        None = 0,
        Enable = 1 << 8,
        FocusDisabled = 1 << 9,
        SuppressEoiBroadcast = 1 << 12,
        Writable = 0xff | Enable | FocusDisabled | SuppressEoiBroadcast,
    }

    [Flags]
    private enum Lvt : uint
    {
        None = 0,
        DeliveryStatus = 1 << 12,
        ActiveLow = 1 << 13,
        RemoteIrr = 1 << 14,
        LevelTriggered = 1 << 15,
        Masked = 1 << 16,
        ReadOnly = DeliveryStatus | RemoteIrr,
        WritableTimer = 0xff | Masked | (3 << 17),
        WritableSource = 0x7ff | Masked,
        WritablePin = 0x7ff | ActiveLow | LevelTriggered | Masked,
        WritableError = 0xff | Masked,
    }

    private enum TimerMode : uint
    {
        OneShot = 0,
        Periodic = 1,
        TscDeadline = 2,
        Reserved = 3,
    }

    [Flags]
    private enum Errors : uint
    {
        None = 0,
        SendIllegalVector = 1 << 5,
        ReceiveIllegalVector = 1 << 6,
        IllegalRegister = 1 << 7,
    }

    /// <summary>The interrupt command register.</summary>
    private readonly record struct Command(ulong Value)
    {
        /// <summary>Bits that raise #GP when written in x2APIC mode.</summary>
        public const ulong Reserved = 0xfff3_2000;

        public byte Vector => (byte)Value;

        public DeliveryMode Mode => (DeliveryMode)(Value >> 8 & 7);

        public bool Logical => (Value & 1 << 11) != 0;

        public bool Assert => (Value & 1 << 14) != 0;

        public bool LevelTriggered => (Value & 1 << 15) != 0;

        public DestinationShorthand Shorthand => (DestinationShorthand)(Value >> 18 & 3);

        public uint WideDestination => (uint)(Value >> 32);

        public uint Destination => (uint)(Value >> 56);
    }
}
