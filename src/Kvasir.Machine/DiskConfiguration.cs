using Kvasir.Block;
using Kvasir.Devices.Storage;

namespace Kvasir.Machine;

/// <summary>Where a disk hangs.</summary>
public enum DiskBus
{
    Virtio,
    Scsi,
}

/// <summary>A disk or CD of the VM, as configured.</summary>
public sealed record DiskConfiguration
{
    /// <summary>Path or address of the image.</summary>
    public required string Path { get; init; }

    /// <summary>How it is opened.</summary>
    public BackendOptions Options { get; init; } = new() { Probe = true };

    /// <summary>What the guest and the monitor see of it.</summary>
    public required DiskSettings Settings { get; init; }

    public DiskBus Bus { get; init; }

    /// <summary>Firmware tries disks in ascending order; null: after those that have a number.</summary>
    public int? BootIndex { get; init; }

    /// <summary>Request queues; 0: one for each processor, up to 8.</summary>
    public int Queues { get; init; }
}
