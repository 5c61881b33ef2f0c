using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Filters;

/// <summary>Stores in an image what reads find in its backing file, in whole clusters, so that it is read from there once.</summary>
public sealed class CopyOnReadNode(BlockNode image) : BlockNode
{
    private const int LargestCopy = 1 << 20;

    private readonly RangeLock _ranges = new();
    private readonly long _unit = Math.Clamp(image.ClusterSize, 512, LargestCopy);

    public override string Driver => image.Driver;

    public override BlockNode File => image;

    public override BlockNode? Backing => image.Backing;

    public override long Length => image.Length;

    public override int RequestAlignment => image.RequestAlignment;

    public override int ClusterSize => image.ClusterSize;

    public override bool HasFastZero => image.HasFastZero;

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        image.ResizeAsync(length, preallocation, cancellation);

#pragma warning disable CA2215 // The image closes its own backing file, which the base class would close a second time.
    public override ValueTask DisposeAsync()
    {
        GC.SuppressFinalize(this);
        return image.DisposeAsync();
    }
#pragma warning restore CA2215

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        long start = offset / _unit * _unit;
        long end = (offset + buffer.Length + _unit - 1) / _unit * _unit;
        await _ranges.AcquireAsync(start, end).ConfigureAwait(false);
        try
        {
            await FillAsync(start, Math.Min(end, Length), cancellation).ConfigureAwait(false);
            await image.ReadAsync(offset, buffer, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _ranges.Release(start, end);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await _ranges.AcquireAsync(offset, offset + buffer.Length).ConfigureAwait(false);
        try
        {
            await image.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _ranges.Release(offset, offset + buffer.Length);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await _ranges.AcquireAsync(offset, offset + length).ConfigureAwait(false);
        try
        {
            await image.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _ranges.Release(offset, offset + length);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await _ranges.AcquireAsync(offset, offset + length).ConfigureAwait(false);
        try
        {
            await image.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _ranges.Release(offset, offset + length);
        }
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => image.StatusAsync(offset, length, cancellation);

    /// <summary>Gives the image what its backing file has in a range of whole clusters.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask FillAsync(long offset, long end, CancellationToken cancellation)
    {
        while (offset < end)
        {
            BlockStatus status = await image.StatusAsync(offset, end - offset, cancellation).ConfigureAwait(false);
            long run = Math.Max(1, status.Length);
            if (!status.IsAllocated)
            {
                run = Math.Min(run, LargestCopy);
                using AlignedBuffer copy = AlignedBuffer.Rent((int)run);
                Memory<byte> data = copy.Memory[..(int)run];
                await image.ReadAsync(offset, data, cancellation).ConfigureAwait(false);
                if (data.Span.ContainsAnyExcept((byte)0))
                    await image.WriteAsync(offset, data, WriteFlags.None, cancellation).ConfigureAwait(false);
                else
                    await image.WriteZeroesAsync(offset, run, ZeroFlags.MayUnmap, cancellation).ConfigureAwait(false);
            }
            offset += run;
        }
    }
}
