using System;

namespace Kvasir.Devices.Pci;

/// <summary>Registers that every header has (PCI Local Bus specification 3.0, 6.1), and those of type 0.</summary>
public enum PciRegister
{
    VendorId = 0x00,
    DeviceId = 0x02,
    Command = 0x04,
    Status = 0x06,
    Revision = 0x08,
    ClassCode = 0x09,
    CacheLineSize = 0x0c,
    LatencyTimer = 0x0d,
    HeaderType = 0x0e,
    Bar0 = 0x10,
    SubsystemVendorId = 0x2c,
    SubsystemId = 0x2e,
    RomBar = 0x30,
    CapabilityPointer = 0x34,
    InterruptLine = 0x3c,
    InterruptPin = 0x3d,
    FirstCapability = 0x40,
}

/// <summary>Registers of a type 1 header (PCI-to-PCI Bridge Architecture specification 1.2, 3.2).</summary>
public enum PciBridgeRegister
{
    PrimaryBus = 0x18,
    SecondaryBus = 0x19,
    SubordinateBus = 0x1a,
    IoBase = 0x1c,
    IoLimit = 0x1d,
    SecondaryStatus = 0x1e,
    MemoryBase = 0x20,
    MemoryLimit = 0x22,
    PrefetchableBase = 0x24,
    PrefetchableLimit = 0x26,
    PrefetchableBaseUpper = 0x28,
    PrefetchableLimitUpper = 0x2c,
    IoBaseUpper = 0x30,
    IoLimitUpper = 0x32,
    BridgeControl = 0x3e,
}

[Flags]
public enum PciCommand : ushort
{
    None = 0,
    Io = 1 << 0,
    Memory = 1 << 1,
    BusMaster = 1 << 2,
    ParityResponse = 1 << 6,
    Serr = 1 << 8,
    InterruptDisable = 1 << 10,
    Writable = Io | Memory | BusMaster | ParityResponse | Serr | InterruptDisable,
}

[Flags]
public enum PciStatus : ushort
{
    None = 0,
    Interrupt = 1 << 3,
    Capabilities = 1 << 4,

    /// <summary>Error bits, cleared by writing ones.</summary>
    Errors = 0xf900,
}

/// <summary>Capability IDs (PCI Code and ID Assignment specification).</summary>
public enum PciCapabilityId : byte
{
    PowerManagement = 0x01,
    Msi = 0x05,
    Vendor = 0x09,
    BridgeSubsystem = 0x0d,
    Express = 0x10,
    Msix = 0x11,
}

/// <summary>Classes as base class, subclass and interface in 24 bits.</summary>
public static class PciClass
{
    public const uint Scsi = 0x01_0000;
    public const uint OtherStorage = 0x01_8000;
    public const uint Ethernet = 0x02_0000;
    public const uint OtherDisplay = 0x03_8000;
    public const uint HostBridge = 0x06_0000;
    public const uint IsaBridge = 0x06_0100;
    public const uint PciBridge = 0x06_0400;
    public const uint OtherCommunication = 0x07_8000;
    public const uint OtherSystem = 0x08_8000;
    public const uint Unclassified = 0x00_ff00;
}

/// <summary>What a function says of itself.</summary>
/// <param name="Class">See <see cref="PciClass"/>.</param>
public readonly record struct PciIdentity(
    ushort Vendor, ushort Device, uint Class, byte Revision = 0, ushort SubsystemVendor = 0, ushort Subsystem = 0);

/// <summary>Where a function sits: device 0-31 and function 0-7 on its bus.</summary>
public readonly record struct PciSlot(int Device, int Function = 0)
{
    /// <summary>As requester IDs and ECAM have it.</summary>
    public int Devfn => Device << 3 | Function;
}

/// <summary>What a base address register decodes.</summary>
public enum PciBarKind
{
    Io,
    Memory32,
    Memory64,

    /// <summary>64 bits, and reads have no side effects that prefetching could hurt.</summary>
    Prefetchable64,
}
