using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Block.Jobs;

/// <summary>
/// Copies what the images below an overlay show into the overlay, while it is in use, and then drops them from the chain. What is copied
/// already counts when the job is started again, so a crash costs nothing.
/// </summary>
public sealed class StreamJob : BlockJob
{
    private const int LargestPart = 1 << 20;

    private readonly BlockBackend _backend;
    private readonly Qcow2Image _top;
    private readonly BlockNode? _base;
    private JobFilter? _filter;
    private BlockNode? _below;
    private long _done;

    private StreamJob(BlockBackend backend, Qcow2Image top, BlockNode? basis)
    {
        _backend = backend;
        _top = top;
        _base = basis;
    }

    public override string Kind => "stream";

    public override long Total => _top.Length;

    public override long Done => Interlocked.Read(ref _done);

    /// <summary>Starts to stream into the disk's top image.</summary>
    /// <param name="backend">The disk in use; its top node is a qcow2 image.</param>
    /// <param name="basis">The image of the chain that stays below; null: none.</param>
    /// <param name="speed">Bytes per second; 0: no limit.</param>
    /// <exception cref="BlockException">The top is no qcow2 image, or the base is not below it.</exception>
    public static async ValueTask<StreamJob> StartAsync(BlockBackend backend, BlockNode? basis, long speed)
    {
        StreamJob? job = null;
        await backend.SwapAsync(node =>
        {
            if (node is not Qcow2Image top)
                throw new BlockException($"Driver '{node.Driver}' cannot take in its backing file", BlockErrno.NotSupported);
            BlockNode? below = top.Backing;
            while (basis is not null && below is not null && !ReferenceEquals(below, basis))
                below = below.Backing;
            if (basis is not null && below is null)
                throw new BlockException("The base is not in the disk's backing chain");
            job = new StreamJob(backend, top, basis) { Speed = speed, _below = node, _filter = new JobFilter(node) };
            return new ValueTask<BlockNode>(job._filter);
        }).ConfigureAwait(false);
        job!.Begin();
        return job;
    }

    protected override async Task RunAsync()
    {
        using AlignedBuffer buffer = AlignedBuffer.Rent(LargestPart);
        for (long offset = 0; offset < _top.Length;)
        {
            ChainExtent extent = await ChainStatus.AtAsync(_top, offset, _top.Length - offset, _base, Cancellation).ConfigureAwait(false);
            long length = Math.Max(1, extent.Length);
            bool zero = (extent.Flags & BlockFlags.Zero) != 0;
            // The overlay has it, or nobody above the base does, or nothing will be below that could show.
            if (extent.Depth > 0 && extent.Node is not null && !(zero && _base is null))
            {
                length = Math.Min(length, LargestPart - (offset & (LargestPart - 1)));
                await PaceAsync(length).ConfigureAwait(false);
                await CopyAsync(offset, length, buffer.Memory).ConfigureAwait(false);
            }
            Cancellation.ThrowIfCancellationRequested();
            offset += length;
            Interlocked.Exchange(ref _done, offset);
        }
        await _top.FlushAsync(Cancellation).ConfigureAwait(false);
        await _backend.SwapAsync(async node =>
        {
            (string? name, string? format) = _base is null ? (null, null) : (_base.FileName, _base.Driver);
            await _top.ChangeBackingNameAsync(name, format).ConfigureAwait(false);
            await DropBetweenAsync().ConfigureAwait(false);
            return node;
        }).ConfigureAwait(false);
    }

    protected override async ValueTask LeaveAsync() =>
        await _backend.SwapAsync(node => new ValueTask<BlockNode>(ReferenceEquals(node, _filter) ? _below! : node)).ConfigureAwait(false);

    private async ValueTask CopyAsync(long offset, long length, Memory<byte> buffer)
    {
        await _filter!.HoldAsync(offset, length).ConfigureAwait(false);
        try
        {
            // The guest may have written here since the look at it: then the overlay has it, and that counts.
            for (long at = offset; at < offset + length;)
            {
                BlockStatus status = await _top.StatusAsync(at, offset + length - at, Cancellation).ConfigureAwait(false);
                long part = Math.Max(1, status.Length);
                if (!status.IsAllocated)
                {
                    Memory<byte> data = buffer[..(int)part];
                    await _top.ReadAsync(at, data, Cancellation).ConfigureAwait(false);
                    if (data.Span.ContainsAnyExcept((byte)0))
                        await _top.WriteAsync(at, data, WriteFlags.None, Cancellation).ConfigureAwait(false);
                    else
                        await _top.WriteZeroesAsync(at, part, ZeroFlags.MayUnmap, Cancellation).ConfigureAwait(false);
                }
                at += part;
            }
        }
        finally
        {
            _filter.Release(offset, length);
        }
    }

    /// <summary>Closes the images between the overlay and the base.</summary>
    private async ValueTask DropBetweenAsync()
    {
        BlockNode? old = _top.Backing;
        _top.SetBacking(_base);
        if (old is null || ReferenceEquals(old, _base))
            return;
        BlockNode last = old;
        while (last.Backing is BlockNode next && !ReferenceEquals(next, _base))
            last = next;
        if (_base is not null)
            Image.SetBacking(last, null);
        await old.DisposeAsync().ConfigureAwait(false);
    }
}
