using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Jobs;

/// <summary>How a <see cref="BackupJob"/> works.</summary>
public sealed record BackupOptions
{
    public int Granularity { get; init; } = 64 << 10;

    public long Speed { get; init; }

    /// <summary>What to copy: of a dirty bitmap for an incremental backup, or what a journal brought back; null: everything.</summary>
    public DirtyMap? Map { get; init; }
}

/// <summary>
/// Copies a disk in use as it is at the job's start: what the guest is about to change is copied first. A copy that fails ends the job
/// and not the guest's write.
/// </summary>
public sealed class BackupJob : BlockJob
{
    private const int LargestPart = 1 << 20;

    private readonly BlockBackend _backend;
    private readonly BlockNode _target;
    private readonly DirtyMap _map;
    private readonly bool _wantsAll;
    private readonly RangeLock _copying = new();
    private JobFilter? _filter;
    private BlockNode? _source;
    private BlockException? _failure;
    private long _total;

    private BackupJob(BlockBackend backend, BlockNode target, BackupOptions options)
    {
        _backend = backend;
        _target = target;
        Speed = options.Speed;
        _map = options.Map ?? new DirtyMap(backend.Length, options.Granularity);
        _wantsAll = options.Map is null;
    }

    public override string Kind => "backup";

    public override long Total => Interlocked.Read(ref _total);

    public override long Done => Math.Max(0, Total - _map.DirtyBytes);

    /// <summary>Starts a backup of the disk as it is now.</summary>
    /// <param name="backend">The disk in use.</param>
    /// <param name="target">Where to; at least as long. Owned by the job, and closed with it.</param>
    /// <param name="options">How.</param>
    /// <exception cref="BlockException">The target is too short.</exception>
    public static async ValueTask<BackupJob> StartAsync(BlockBackend backend, BlockNode target, BackupOptions options)
    {
        if (target.Length < backend.Length)
            throw new BlockException($"The target has {target.Length} bytes, the disk {backend.Length}");
        BackupJob job = new(backend, target, options);
        await backend.SwapAsync(async node =>
        {
            job._source = node;
            job._filter = new JobFilter(node) { Before = job.BeforeGuestAsync };
            if (job._wantsAll)
                await job._map.SetAllAsync().ConfigureAwait(false);
            job._total = job._map.DirtyBytes;
            return job._filter;
        }).ConfigureAwait(false);
        job.Begin();
        return job;
    }

    protected override async Task RunAsync()
    {
        while (Volatile.Read(ref _failure) is null && _map.TryPeek(out long offset))
        {
            long length = Math.Min(LargestPart, _map.Length - offset);
            await PaceAsync(length).ConfigureAwait(false);
            await CopyAsync(offset, length, Cancellation).ConfigureAwait(false);
        }
        // The last copies before guest writes may still be under way.
        await _copying.AcquireAsync(0, long.MaxValue).ConfigureAwait(false);
        _copying.Release(0, long.MaxValue);
        if (Volatile.Read(ref _failure) is BlockException failure)
            throw failure;
        await _target.FlushAsync(Cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask LeaveAsync()
    {
        await _backend.SwapAsync(node => new ValueTask<BlockNode>(ReferenceEquals(node, _filter) ? _source! : node)).ConfigureAwait(false);
        await _target.DisposeAsync().ConfigureAwait(false);
        await _map.DisposeAsync().ConfigureAwait(false);
    }

    private async ValueTask BeforeGuestAsync(long offset, long length)
    {
        if (Volatile.Read(ref _failure) is not null)
            return;
        try
        {
            await CopyAsync(offset, length, CancellationToken.None).ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            Volatile.Write(ref _failure, error);
        }
    }

    /// <summary>Copies the dirty units of a range that nobody copied yet; when it ends, all of them are at the target.</summary>
    private async ValueTask CopyAsync(long offset, long length, CancellationToken cancellation)
    {
        long unit = _map.Granularity;
        long start = offset & ~(unit - 1);
        long end = Math.Min((offset + length + unit - 1) & ~(unit - 1), _map.Length);
        await _copying.AcquireAsync(start, end).ConfigureAwait(false);
        try
        {
            for (long at = start; at < end;)
            {
                long run = 0;
                while (at + run < end && _map.TakeRange(at + run, 1))
                    run += Math.Min(unit, end - at - run);
                if (run == 0)
                {
                    at += unit;
                    continue;
                }
                try
                {
                    await JobCopy.RangeAsync(_source!, _target, at, run, null, cancellation).ConfigureAwait(false);
                }
                catch
                {
                    await _map.SetAsync(at, run).ConfigureAwait(false);
                    throw;
                }
                // Before the guest may change them: a restart must not copy them again.
                await _map.DoneAsync(at, run).ConfigureAwait(false);
                at += run;
            }
        }
        finally
        {
            _copying.Release(start, end);
        }
    }
}
