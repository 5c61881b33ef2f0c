using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>Which image of a chain a run of bytes comes from.</summary>
/// <param name="Length">Bytes the answer holds for.</param>
/// <param name="Flags">What they are.</param>
/// <param name="Depth">0 for the top image, 1 for its backing file...</param>
/// <param name="Node">The image that decides; null: none does.</param>
/// <param name="HostOffset">Where in that image's file.</param>
public readonly record struct ChainExtent(long Length, BlockFlags Flags, int Depth, BlockNode? Node, long HostOffset);

/// <summary>Block status through a whole backing chain.</summary>
public static class ChainStatus
{
    /// <summary>The status of the run at <paramref name="offset"/>, from the image of the chain that decides it, down to but not into <paramref name="stop"/>.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public static async ValueTask<ChainExtent> AtAsync(BlockNode top, long offset, long length, BlockNode? stop = null, CancellationToken cancellation = default)
    {
        length = Math.Min(length, top.Length - offset);
        int depth = 0;
        BlockNode above = top;
        BlockStatus over = default;
        for (BlockNode? node = top; node is not null && !ReferenceEquals(node, stop); above = node, node = node.Backing, depth++)
        {
            if (offset >= node.Length)
            {
                // Past the end of a short image below there are zeros, which are the overlay's own.
                return new ChainExtent(length, BlockFlags.Zero | (over.Flags & BlockFlags.OffsetValid), Math.Max(0, depth - 1), above, over.HostOffset);
            }
            BlockStatus status = await node.StatusAsync(offset, Math.Min(length, node.Length - offset), cancellation).ConfigureAwait(false);
            if (status.IsAllocated || node.Backing is null)
            {
                BlockFlags flags = status.Flags;
                if (node.MayHoldHoles && status.IsData && status.HasOffset && !status.IsZero && node.DataFileAt(offset) is HostFile file)
                {
                    // Preallocated space that was never written: the format calls it data, the file knows better.
                    BlockStatus below = await file.StatusAsync(status.HostOffset, status.Length, cancellation).ConfigureAwait(false);
                    if (below.Length > 0)
                        status = status with { Length = Math.Min(status.Length, below.Length) };
                    // The last cluster may reach past the end of the file, where nothing was written yet.
                    flags |= below.IsZero || below.Length == 0 ? BlockFlags.Zero : BlockFlags.None;
                }
                return new ChainExtent(status.Length, flags, depth, node, status.HostOffset);
            }
            length = Math.Min(length, status.Length);
            over = status;
        }
        return new ChainExtent(length, BlockFlags.None, depth, null, 0);
    }

    /// <summary>
    /// What a filter or a raw image says of the node below it: where that has a backing file, what shows through from there is part of what is below. The
    /// answer reaches the end of the node at most.
    /// </summary>
    public static async ValueTask<BlockStatus> BelowAsync(BlockNode below, long offset, long length, CancellationToken cancellation = default)
    {
        if (below.Backing is null)
            return await below.StatusAsync(offset, length, cancellation).ConfigureAwait(false);
        if (offset >= below.Length || length <= 0)
            return new BlockStatus(0, BlockFlags.None);
        BlockStatus status = await MergedAsync(below, offset, length, cancellation).ConfigureAwait(false);
        // Places are those of one of the images' files, not of the node's.
        return status with { Flags = (status.Flags & ~BlockFlags.OffsetValid) | BlockFlags.Allocated | (status.IsData ? BlockFlags.None : BlockFlags.Zero) };
    }

    /// <summary>The chain's status as one image's would be.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public static async ValueTask<BlockStatus> MergedAsync(BlockNode top, long offset, long length, CancellationToken cancellation = default)
    {
        ChainExtent extent = await AtAsync(top, offset, length, null, cancellation).ConfigureAwait(false);
        BlockFlags flags = extent.Flags;
        if ((flags & (BlockFlags.Data | BlockFlags.Zero)) == (BlockFlags.Data | BlockFlags.Zero))
            flags &= ~BlockFlags.Data;
        return new BlockStatus(extent.Length, flags);
    }
}
