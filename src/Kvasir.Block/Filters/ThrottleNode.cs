using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Filters;

/// <summary>Limits of a throttle group; 0: no limit. Bursts are how much may be taken at once after a rest.</summary>
public sealed record ThrottleLimits
{
    public double BytesPerSecond { get; init; }

    public double ReadBytesPerSecond { get; init; }

    public double WriteBytesPerSecond { get; init; }

    public double RequestsPerSecond { get; init; }

    public double ReadRequestsPerSecond { get; init; }

    public double WriteRequestsPerSecond { get; init; }

    /// <summary>Seconds of full rate that may be used up at once.</summary>
    public double BurstSeconds { get; init; } = 0.1;

    /// <summary>Whether anything is limited.</summary>
    public bool IsLimited => BytesPerSecond + ReadBytesPerSecond + WriteBytesPerSecond + RequestsPerSecond + ReadRequestsPerSecond + WriteRequestsPerSecond > 0;

    /// <summary>Reads QEMU's names of the limits: "limits.bps-total", "throttling.iops-read", "bps_wr", ...</summary>
    public static ThrottleLimits FromOptions(ImageOptions options)
    {
        double Get(string key, string shortKey) =>
            options.Size("limits." + key) ?? options.Size("throttling." + key) ?? options.Size("x-" + key) ?? options.Size(shortKey) ?? 0;
        double length = options.Size("limits.burst-seconds") ?? 0;
        return new ThrottleLimits
        {
            BytesPerSecond = Get("bps-total", "bps"),
            ReadBytesPerSecond = Get("bps-read", "bps_rd"),
            WriteBytesPerSecond = Get("bps-write", "bps_wr"),
            RequestsPerSecond = Get("iops-total", "iops"),
            ReadRequestsPerSecond = Get("iops-read", "iops_rd"),
            WriteRequestsPerSecond = Get("iops-write", "iops_wr"),
            BurstSeconds = length > 0 ? length : 0.1,
        };
    }
}

/// <summary>Slows requests down to given rates. Requests wait before they start, in the order in which they came; nodes of one group share the rates.</summary>
public sealed class ThrottleNode(BlockNode file, ThrottleGroup group) : BlockNode
{
    public ThrottleNode(BlockNode file, ThrottleLimits limits)
        : this(file, new ThrottleGroup(limits))
    {
    }

    public override string Driver => "throttle";

    public override long Length => file.Length;

    public override BlockNode File => file;

    public override bool IsGrowable => file.IsGrowable;

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        file.ResizeAsync(length, preallocation, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: false, buffer.Length, cancellation).ConfigureAwait(false);
        await file.ReadAsync(offset, buffer, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, buffer.Length, cancellation).ConfigureAwait(false);
        await file.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, length, cancellation).ConfigureAwait(false);
        await file.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, 0, cancellation).ConfigureAwait(false);
        await file.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => file.StatusAsync(offset, length, cancellation);
}
