using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Jobs;

/// <summary>
/// A job that copies a disk in use to another one, by a map of what it has left to do.
/// <para>
/// A journal takes a range for done only when the target has been flushed after its copy: what a target keeps in memory until then (tables that point to the data) ends
/// with the process.
/// </para>
/// </summary>
public abstract class CopyJob : BlockJob
{
    private const int LargestBuffer = 1 << 20;

    private readonly BlockBackend _backend;
    private readonly long _settleBytes;
    private readonly AsyncMutex _settling = new();
    private readonly Lock _lock = new();
    private JobFilter? _filter;
    private BlockNode? _source;
    private List<(long Offset, long Length)> _unsettled = [];
    private long _unsettledBytes;
    private long _total;

    private protected CopyJob(BlockBackend backend, BlockNode target, DirtyMap? map, int granularity, long speed, long settleBytes)
    {
        _backend = backend;
        _settleBytes = settleBytes;
        Target = target;
        Map = map ?? new DirtyMap(backend.Length, granularity);
        WantsAll = map is null;
        Speed = speed;
    }

    public override long Total => Interlocked.Read(ref _total);

    private protected BlockBackend Backend => _backend;

    private protected BlockNode Source => _source!;

    private protected BlockNode Target { get; }

    private protected DirtyMap Map { get; }

    private protected bool WantsAll { get; }

    /// <summary>The target is the disk now: neither does it leave the graph nor is it closed.</summary>
    private protected bool Pivoted { get; set; }

    /// <summary>Puts the job's filter above the disk and begins.</summary>
    /// <exception cref="BlockException">The target is too short.</exception>
    private protected async ValueTask EnterAsync()
    {
        if (Target.Length < _backend.Length)
            throw new BlockException($"The target has {Target.Length} bytes, the disk {_backend.Length}");
        await _backend.SwapAsync(async node =>
        {
            _source = node;
            _filter = new JobFilter(node);
            Watch(_filter);
            if (WantsAll)
                await Map.SetAllAsync().ConfigureAwait(false);
            await Map.BeginAsync().ConfigureAwait(false);
            _total = Map.DirtyBytes;
            return _filter;
        }).ConfigureAwait(false);
        Begin();
    }

    /// <summary>Says what the job wants to be told of.</summary>
    private protected abstract void Watch(JobFilter filter);

    protected override async ValueTask LeaveAsync()
    {
        try
        {
            if (!Pivoted)
            {
                await _backend.SwapAsync(node => new ValueTask<BlockNode>(ReferenceEquals(node, _filter) ? _source! : node)).ConfigureAwait(false);
                try
                {
                    // What was copied until a cancellation need not be copied again.
                    if (Map.HasJournal)
                        await SettleAsync().ConfigureAwait(false);
                }
                finally
                {
                    await Target.DisposeAsync().ConfigureAwait(false);
                }
            }
        }
        finally
        {
            await Map.DisposeAsync().ConfigureAwait(false);
        }
    }

    /// <summary>Copies a range, leaving out what need not be stored.</summary>
    /// <param name="offset">First byte.</param>
    /// <param name="length">Bytes.</param>
    /// <param name="stop">What this image and those below decide is left out; null: nothing is.</param>
    /// <param name="cancellation">Ends it early.</param>
    private protected async ValueTask CopyRangeAsync(long offset, long length, BlockNode? stop, CancellationToken cancellation)
    {
        (long start, long bytes) = (offset, length);
        using AlignedBuffer buffer = AlignedBuffer.Rent((int)Math.Min(length, LargestBuffer));
        while (length > 0)
        {
            ChainExtent extent = await ChainStatus.AtAsync(Source, offset, length, stop, cancellation).ConfigureAwait(false);
            long part = Math.Max(1, Math.Min(extent.Length, length));
            if (extent.Node is not null && (extent.Flags & BlockFlags.Zero) != 0)
            {
                await Target.WriteZeroesAsync(offset, part, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
            }
            else if (extent.Node is not null)
            {
                part = Math.Min(part, LargestBuffer);
                Memory<byte> data = buffer.Memory[..(int)part];
                await Source.ReadAsync(offset, data, cancellation).ConfigureAwait(false);
                if (data.Span.ContainsAnyExcept((byte)0))
                    await Target.WriteAsync(offset, data, WriteFlags.None, cancellation).ConfigureAwait(false);
                else
                    await Target.WriteZeroesAsync(offset, part, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
            }
            offset += part;
            length -= part;
        }
        if (!Map.HasJournal)
            return;
        bool many;
        lock (_lock)
        {
            _unsettled.Add((start, bytes));
            _unsettledBytes += bytes;
            many = _unsettledBytes >= _settleBytes;
        }
        if (many)
            await SettleAsync().ConfigureAwait(false);
    }

    /// <summary>Whether the journal does not have a part of a range for done although it was copied.</summary>
    private protected bool IsUnsettled(long offset, long length)
    {
        lock (_lock)
            return _unsettled.Exists(range => offset < range.Offset + range.Length && range.Offset < offset + length);
    }

    /// <summary>Makes all copies so far stable, and lets the journal know.</summary>
    private protected async ValueTask SettleAsync()
    {
        await _settling.EnterAsync().ConfigureAwait(false);
        try
        {
            List<(long Offset, long Length)> ranges;
            lock (_lock)
                ranges = [.. _unsettled];
            await Target.FlushAsync().ConfigureAwait(false);
            foreach ((long offset, long length) in ranges)
                await Map.DoneAsync(offset, length).ConfigureAwait(false);
            // Only now: until here a guest's write to one of them has to wait.
            lock (_lock)
            {
                _unsettled = _unsettled.GetRange(ranges.Count, _unsettled.Count - ranges.Count);
                foreach ((_, long length) in ranges)
                    _unsettledBytes -= length;
            }
        }
        finally
        {
            _settling.Exit();
        }
    }
}
