using System;

namespace Kvasir.Devices.Virtio;

/// <summary>Device types (virtio 1.2, ch. 5).</summary>
public enum VirtioType : ushort
{
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Scsi = 8,
    Transport9P = 9,
    Gpu = 16,
    Input = 18,
    Vsock = 19,
    Memory = 24,
    FileSystem = 26,
}

/// <summary>Device status (virtio 1.2, 2.1).</summary>
[Flags]
public enum VirtioStatus : byte
{
    None = 0,
    Acknowledge = 1,
    Driver = 2,
    DriverOk = 4,
    FeaturesOk = 8,
    NeedsReset = 64,
    Failed = 128,
}

/// <summary>Feature bits that do not depend on the type (virtio 1.2, ch. 6; the legacy ones 6.3).</summary>
[Flags]
public enum VirtioFeatures : ulong
{
    None = 0,
    NotifyOnEmpty = 1ul << 24,
    AnyLayout = 1ul << 27,
    IndirectDescriptors = 1ul << 28,
    EventIndex = 1ul << 29,
    Version1 = 1ul << 32,
    PackedRing = 1ul << 34,
    NotificationData = 1ul << 38,
    RingReset = 1ul << 40,
}

/// <summary>Descriptor flags (virtio 1.2, 2.7.5 and 2.8.1).</summary>
[Flags]
internal enum DescriptorFlags : ushort
{
    None = 0,
    Next = 1,
    Write = 2,
    Indirect = 4,

    /// <summary>Packed rings only.</summary>
    Available = 1 << 7,

    /// <summary>Packed rings only.</summary>
    Used = 1 << 15,
}
