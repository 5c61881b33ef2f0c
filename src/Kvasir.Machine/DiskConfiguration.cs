using Kvasir.Block;
using Kvasir.Block.Filters;
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
    /// <summary>Path of the image, or a name that <see cref="Image.OpenAsync(string, OpenOptions, System.Threading.CancellationToken)"/> takes.</summary>
    public required string Path { get; init; }

    /// <summary>What the monitor knows the disk by.</summary>
    public required string Name { get; init; }

    /// <summary>The image's format; null: by its content where that is safe.</summary>
    public string? Format { get; init; }

    public DiskBus Bus { get; init; }

    /// <summary>It is a CD.</summary>
    public bool IsCd { get; init; }

    public bool ReadOnly { get; init; }

    /// <summary>Writes are kept aside and thrown away at the end.</summary>
    public bool Snapshot { get; init; }

    public CacheMode Cache { get; init; } = CacheMode.Writeback;

    /// <summary>Discards free space in the image.</summary>
    public bool Discard { get; init; } = true;

    public string Serial { get; init; } = "";

    /// <summary>Request queues; 0: one for each processor, up to 8.</summary>
    public int Queues { get; init; }

    /// <summary>Null: no limit.</summary>
    public ThrottleLimits? Limits { get; init; }

    public ErrorPolicy WriteError { get; init; } = ErrorPolicy.StopOnNoSpace;

    public ErrorPolicy ReadError { get; init; } = ErrorPolicy.Report;

    public int LogicalBlock { get; init; } = 512;

    public int PhysicalBlock { get; init; } = 4096;
}
