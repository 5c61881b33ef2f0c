using System;
using System.Diagnostics;
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
            options.Size("limits." + key) ?? options.Size("throttling." + key) ?? options.Size(shortKey) ?? 0;
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

/// <summary>Slows requests down to given rates. Requests wait before they start, in the order in which they came.</summary>
public sealed class ThrottleNode(BlockNode file, ThrottleLimits limits) : BlockNode
{
    private readonly Bucket[] _read =
    [
        new(limits.BytesPerSecond, limits.BurstSeconds, bytes: true), new(limits.ReadBytesPerSecond, limits.BurstSeconds, bytes: true),
        new(limits.RequestsPerSecond, limits.BurstSeconds, bytes: false), new(limits.ReadRequestsPerSecond, limits.BurstSeconds, bytes: false),
    ];

    private Bucket[]? _write;

    public override string Driver => "throttle";

    public override long Length => file.Length;

    public override BlockNode File => file;

    public override bool IsGrowable => file.IsGrowable;

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        file.ResizeAsync(length, preallocation, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await WaitAsync(_read, buffer.Length, cancellation).ConfigureAwait(false);
        await file.ReadAsync(offset, buffer, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await WaitAsync(WriteBuckets, buffer.Length, cancellation).ConfigureAwait(false);
        await file.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await WaitAsync(WriteBuckets, length, cancellation).ConfigureAwait(false);
        await file.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await WaitAsync(WriteBuckets, 0, cancellation).ConfigureAwait(false);
        await file.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => file.StatusAsync(offset, length, cancellation);

    // The totals are shared between both directions.
    private Bucket[] WriteBuckets => _write ??=
    [
        _read[0], new(limits.WriteBytesPerSecond, limits.BurstSeconds, bytes: true),
        _read[2], new(limits.WriteRequestsPerSecond, limits.BurstSeconds, bytes: false),
    ];

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private static async ValueTask WaitAsync(Bucket[] buckets, long bytes, CancellationToken cancellation)
    {
        TimeSpan wait = TimeSpan.Zero;
        foreach (Bucket bucket in buckets)
        {
            TimeSpan own = bucket.Take(bytes);
            wait = own > wait ? own : wait;
        }
        if (wait > TimeSpan.Zero)
            await Task.Delay(wait, cancellation).ConfigureAwait(false);
    }

    /// <summary>A leaky bucket: what was taken drains at the rate; above the burst level, takers wait until it is down again.</summary>
    private sealed class Bucket(double rate, double burstSeconds, bool bytes)
    {
        private readonly Lock _lock = new();
        private double _level;
        private long _last = Stopwatch.GetTimestamp();

        public TimeSpan Take(long length)
        {
            if (rate <= 0)
                return TimeSpan.Zero;
            lock (_lock)
            {
                long now = Stopwatch.GetTimestamp();
                _level = Math.Max(0, _level - (Stopwatch.GetElapsedTime(_last, now).TotalSeconds * rate));
                _last = now;
                double before = _level;
                _level += bytes ? length : 1;
                double excess = before - (rate * burstSeconds);
                return excess <= 0 ? TimeSpan.Zero : TimeSpan.FromSeconds(excess / rate);
            }
        }
    }
}
