using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Jobs;

/// <summary>How a <see cref="MirrorJob"/> works.</summary>
public sealed record MirrorOptions
{
    /// <summary>Bytes of the unit that is copied again when a part of it changes.</summary>
    public int Granularity { get; init; } = 64 << 10;

    /// <summary>Copies under way at once.</summary>
    public int Workers { get; init; } = 8;

    public long Speed { get; init; }

    /// <summary>With a journal: bytes after whose copy the target is flushed and the journal told, so the most that a restart copies again.</summary>
    public long SettleBytes { get; init; } = 64 << 20;

    /// <summary>Copy only what lies above this image of the chain, which the target shows as well; null: everything.</summary>
    public BlockNode? Base { get; init; }

    /// <summary>Work on what this map has left (one that a journal brought back); null: on everything.</summary>
    public DirtyMap? Map { get; init; }

    /// <summary>When it completes, the disk goes on with the target; else the target is a copy of that moment, and is closed.</summary>
    public bool Pivot { get; init; } = true;
}

/// <summary>
/// Copies a disk in use to another one until both agree, and keeps them so; on <see cref="BlockJob.Complete"/> the disk goes on with the
/// target. With the chain's own base as the target it commits an overlay that is in use.
/// </summary>
public sealed class MirrorJob : CopyJob
{
    private const int LargestPart = 1 << 20;

    private readonly MirrorOptions _options;
    private TaskCompletionSource _changed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private long _inFlight;

    private MirrorJob(BlockBackend backend, BlockNode target, MirrorOptions options)
        : base(backend, target, options.Map, options.Granularity, options.Speed, options.SettleBytes) => _options = options;

    public override string Kind => _options.Base is null ? "mirror" : "commit";

    public override long Done => Math.Max(0, Total - Map.DirtyBytes - Interlocked.Read(ref _inFlight));

    /// <summary>Starts a mirror.</summary>
    /// <param name="backend">The disk in use.</param>
    /// <param name="target">Where to; at least as long. Owned by the job.</param>
    /// <param name="options">How.</param>
    /// <exception cref="BlockException">The target is too short.</exception>
    public static async ValueTask<MirrorJob> StartAsync(BlockBackend backend, BlockNode target, MirrorOptions options)
    {
        MirrorJob job = new(backend, target, options);
        await job.EnterAsync().ConfigureAwait(false);
        return job;
    }

    private protected override void Watch(JobFilter filter)
    {
        filter.Before = Map.SetAsync;
        filter.After = OnChangedAsync;
    }

    protected override async Task RunAsync()
    {
        List<Task> running = [];
        try
        {
            while (true)
            {
                while (running.Count < _options.Workers && Map.TryTake(LargestPart, out long offset, out long length))
                    running.Add(CopyGuardedAsync(offset, length));
                if (running.Count > 0)
                {
                    Task first = await Task.WhenAny(running).ConfigureAwait(false);
                    running.Remove(first);
                    await first.ConfigureAwait(false);
                    continue;
                }
                TaskCompletionSource changed = new(TaskCreationOptions.RunContinuationsAsynchronously);
                Volatile.Write(ref _changed, changed);
                // Whoever changes something from here on ends this wait, or this thread sees the change.
                Interlocked.MemoryBarrier();
                if (!Map.IsEmpty)
                    continue;
                await SettleAsync().ConfigureAwait(false);
                if (await WaitReadyAsync(changed.Task).ConfigureAwait(false))
                {
                    await FinishAsync().ConfigureAwait(false);
                    return;
                }
            }
        }
        finally
        {
            await Task.WhenAll(running).ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        }
    }

    private async ValueTask OnChangedAsync(long offset, long length)
    {
        await Map.SetAsync(offset, length).ConfigureAwait(false);
        Volatile.Read(ref _changed).TrySetResult();
    }

    private async Task CopyGuardedAsync(long offset, long length)
    {
        Interlocked.Add(ref _inFlight, length);
        try
        {
            await PaceAsync(length).ConfigureAwait(false);
            await CopyRangeAsync(offset, length, _options.Base, Cancellation).ConfigureAwait(false);
        }
        catch
        {
            await Map.SetAsync(offset, length).ConfigureAwait(false);
            throw;
        }
        finally
        {
            Interlocked.Add(ref _inFlight, -length);
        }
    }

    /// <summary>With the guest's requests held: what is still dirty, then the change of disks.</summary>
    private async ValueTask FinishAsync()
    {
        await Backend.SwapAsync(async node =>
        {
            while (Map.TryTake(LargestPart, out long offset, out long length))
                await CopyRangeAsync(offset, length, _options.Base, CancellationToken.None).ConfigureAwait(false);
            await SettleAsync().ConfigureAwait(false);
            if (!_options.Pivot)
                return node;
            Pivoted = true;
            return Target;
        }).ConfigureAwait(false);
        // The old chain is closed only now: a failure above leaves the guest on it.
        if (Pivoted)
            await Source.DisposeAsync().ConfigureAwait(false);
    }
}
