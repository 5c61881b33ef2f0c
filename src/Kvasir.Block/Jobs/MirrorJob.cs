using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Jobs;

/// <summary>How a <see cref="MirrorJob"/> works.</summary>
public sealed record MirrorOptions
{
    /// <summary>Bytes of the unit that is copied again when a part of it changes.</summary>
    public int Granularity { get; init; } = 64 << 10;

    /// <summary>Copies under way at once.</summary>
    public int Workers { get; init; } = 8;

    public long Speed { get; init; }

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
public sealed class MirrorJob : BlockJob
{
    private const int LargestPart = 1 << 20;

    private readonly BlockBackend _backend;
    private readonly BlockNode _target;
    private readonly MirrorOptions _options;
    private readonly DirtyMap _map;
    private JobFilter? _filter;
    private BlockNode? _source;
    private TaskCompletionSource _changed = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private long _total;
    private long _inFlight;
    private bool _pivoted;

    private MirrorJob(BlockBackend backend, BlockNode target, MirrorOptions options)
    {
        _backend = backend;
        _target = target;
        _options = options;
        Speed = options.Speed;
        _map = options.Map ?? new DirtyMap(backend.Length, options.Granularity);
    }

    public override string Kind => _options.Base is null ? "mirror" : "commit";

    public override long Total => Interlocked.Read(ref _total);

    public override long Done => Math.Max(0, Total - _map.DirtyBytes - Interlocked.Read(ref _inFlight));

    /// <summary>Starts a mirror.</summary>
    /// <param name="backend">The disk in use.</param>
    /// <param name="target">Where to; at least as long. Owned by the job.</param>
    /// <param name="options">How.</param>
    /// <exception cref="BlockException">The target is too short.</exception>
    public static async ValueTask<MirrorJob> StartAsync(BlockBackend backend, BlockNode target, MirrorOptions options)
    {
        if (target.Length < backend.Length)
            throw new BlockException($"The target has {target.Length} bytes, the disk {backend.Length}");
        MirrorJob job = new(backend, target, options);
        await backend.SwapAsync(async node =>
        {
            job._source = node;
            job._filter = new JobFilter(node)
            {
                Before = (offset, length) => job._map.SetAsync(offset, length),
                After = job.OnChangedAsync,
            };
            if (options.Map is null)
                await job._map.SetAllAsync().ConfigureAwait(false);
            job._total = job._map.DirtyBytes;
            return job._filter;
        }).ConfigureAwait(false);
        job.Begin();
        return job;
    }

    protected override async Task RunAsync()
    {
        List<Task> running = [];
        try
        {
            while (true)
            {
                while (running.Count < _options.Workers && _map.TryTake(LargestPart, out long offset, out long length))
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
                if (!_map.IsEmpty)
                    continue;
                await _target.FlushAsync(Cancellation).ConfigureAwait(false);
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

    protected override async ValueTask LeaveAsync()
    {
        if (!_pivoted)
        {
            await _backend.SwapAsync(node => new ValueTask<BlockNode>(ReferenceEquals(node, _filter) ? _source! : node)).ConfigureAwait(false);
            await _target.DisposeAsync().ConfigureAwait(false);
        }
        await _map.DisposeAsync().ConfigureAwait(false);
    }

    private async ValueTask OnChangedAsync(long offset, long length)
    {
        await _map.SetAsync(offset, length).ConfigureAwait(false);
        Volatile.Read(ref _changed).TrySetResult();
    }

    private async Task CopyGuardedAsync(long offset, long length)
    {
        Interlocked.Add(ref _inFlight, length);
        try
        {
            await PaceAsync(length).ConfigureAwait(false);
            await CopyAsync(offset, length, Cancellation).ConfigureAwait(false);
            await _map.DoneAsync(offset, length).ConfigureAwait(false);
        }
        catch
        {
            await _map.SetAsync(offset, length).ConfigureAwait(false);
            throw;
        }
        finally
        {
            Interlocked.Add(ref _inFlight, -length);
        }
    }

    private ValueTask CopyAsync(long offset, long length, CancellationToken cancellation) =>
        JobCopy.RangeAsync(_source!, _target, offset, length, _options.Base, cancellation);

    /// <summary>With the guest's requests held: what is still dirty, then the change of disks.</summary>
    private async ValueTask FinishAsync()
    {
        await _backend.SwapAsync(async node =>
        {
            while (_map.TryTake(LargestPart, out long offset, out long length))
            {
                await CopyAsync(offset, length, CancellationToken.None).ConfigureAwait(false);
                await _map.DoneAsync(offset, length).ConfigureAwait(false);
            }
            await _target.FlushAsync().ConfigureAwait(false);
            if (!_options.Pivot)
                return node;
            _pivoted = true;
            return _target;
        }).ConfigureAwait(false);
        // The old chain is closed only now: a failure above leaves the guest on it.
        if (_pivoted)
            await _source!.DisposeAsync().ConfigureAwait(false);
    }
}

/// <summary>One range from a chain to another disk, leaving out what need not be stored.</summary>
internal static class JobCopy
{
    private const int LargestBuffer = 1 << 20;

    /// <summary>Copies a range.</summary>
    /// <param name="source">The chain's top.</param>
    /// <param name="target">Where to.</param>
    /// <param name="offset">First byte.</param>
    /// <param name="length">Bytes.</param>
    /// <param name="stop">What this image and those below decide is left out; null: nothing is.</param>
    /// <param name="cancellation">Ends it early.</param>
    public static async ValueTask RangeAsync(BlockNode source, BlockNode target, long offset, long length, BlockNode? stop, CancellationToken cancellation)
    {
        using AlignedBuffer buffer = AlignedBuffer.Rent((int)Math.Min(length, LargestBuffer));
        while (length > 0)
        {
            ChainExtent extent = await ChainStatus.AtAsync(source, offset, length, stop, cancellation).ConfigureAwait(false);
            long part = Math.Max(1, Math.Min(extent.Length, length));
            if (extent.Node is not null && (extent.Flags & BlockFlags.Zero) != 0)
            {
                await target.WriteZeroesAsync(offset, part, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
            }
            else if (extent.Node is not null)
            {
                part = Math.Min(part, LargestBuffer);
                Memory<byte> data = buffer.Memory[..(int)part];
                await source.ReadAsync(offset, data, cancellation).ConfigureAwait(false);
                if (data.Span.ContainsAnyExcept((byte)0))
                    await target.WriteAsync(offset, data, WriteFlags.None, cancellation).ConfigureAwait(false);
                else
                    await target.WriteZeroesAsync(offset, part, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
            }
            offset += part;
            length -= part;
        }
    }
}
