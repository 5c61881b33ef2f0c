using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Jobs;

/// <summary>How a <see cref="BackupJob"/> works.</summary>
public sealed record BackupOptions
{
    public int Granularity { get; init; } = 64 << 10;

    public long Speed { get; init; }

    /// <summary>With a journal: bytes after whose copy the target is flushed and the journal told, so the most that a restart copies again.</summary>
    public long SettleBytes { get; init; } = 64 << 20;

    /// <summary>What to copy: of a dirty bitmap for an incremental backup, or what a journal brought back; null: everything.</summary>
    public DirtyMap? Map { get; init; }
}

/// <summary>
/// Copies a disk in use as it is at the job's start: what the guest is about to change is copied first, and with a journal flushed at the target, as it cannot be had
/// again. A copy that fails ends the job and not the guest's write.
/// </summary>
public sealed class BackupJob : CopyJob
{
    private const int LargestPart = 1 << 20;

    private readonly RangeLock _copying = new();
    private BlockException? _failure;

    private BackupJob(BlockBackend backend, BlockNode target, BackupOptions options)
        : base(backend, target, options.Map, options.Granularity, options.Speed, options.SettleBytes)
    {
    }

    public override string Kind => "backup";

    public override long Done => Math.Max(0, Total - Map.DirtyBytes);

    /// <summary>Starts a backup of the disk as it is now.</summary>
    /// <param name="backend">The disk in use.</param>
    /// <param name="target">Where to; at least as long. Owned by the job, and closed with it.</param>
    /// <param name="options">How.</param>
    /// <exception cref="BlockException">The target is too short.</exception>
    public static async ValueTask<BackupJob> StartAsync(BlockBackend backend, BlockNode target, BackupOptions options)
    {
        BackupJob job = new(backend, target, options);
        await job.EnterAsync().ConfigureAwait(false);
        return job;
    }

    private protected override void Watch(JobFilter filter) => filter.Before = BeforeGuestAsync;

    protected override async Task RunAsync()
    {
        while (Volatile.Read(ref _failure) is null && Map.TryPeek(out long offset))
        {
            long length = Math.Min(LargestPart, Map.Length - offset);
            await PaceAsync(length).ConfigureAwait(false);
            await CopyAsync(offset, length, Cancellation).ConfigureAwait(false);
        }
        // The last copies before guest writes may still be under way.
        await _copying.AcquireAsync(0, long.MaxValue).ConfigureAwait(false);
        _copying.Release(0, long.MaxValue);
        if (Volatile.Read(ref _failure) is BlockException failure)
            throw failure;
        await SettleAsync().ConfigureAwait(false);
    }

    private async ValueTask BeforeGuestAsync(long offset, long length)
    {
        if (Volatile.Read(ref _failure) is not null)
            return;
        try
        {
            await CopyAsync(offset, length, CancellationToken.None).ConfigureAwait(false);
            if (IsUnsettled(offset, length))
                await SettleAsync().ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            Volatile.Write(ref _failure, error);
        }
    }

    /// <summary>Copies the dirty units of a range that nobody copied yet; when it ends, all of them are at the target.</summary>
    private async ValueTask CopyAsync(long offset, long length, CancellationToken cancellation)
    {
        long unit = Map.Granularity;
        long start = offset & ~(unit - 1);
        long end = Math.Min((offset + length + unit - 1) & ~(unit - 1), Map.Length);
        await _copying.AcquireAsync(start, end).ConfigureAwait(false);
        try
        {
            for (long at = start; at < end;)
            {
                long run = 0;
                while (at + run < end && Map.TakeRange(at + run, 1))
                    run += Math.Min(unit, end - at - run);
                if (run == 0)
                {
                    at += unit;
                    continue;
                }
                try
                {
                    await CopyRangeAsync(at, run, null, cancellation).ConfigureAwait(false);
                }
                catch
                {
                    await Map.SetAsync(at, run).ConfigureAwait(false);
                    throw;
                }
                at += run;
            }
        }
        finally
        {
            _copying.Release(start, end);
        }
    }
}
