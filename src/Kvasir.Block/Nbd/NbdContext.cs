using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;

namespace Kvasir.Block.Nbd;

/// <summary>A kind of block status that an export offers (a metadata context of the NBD protocol).</summary>
/// <param name="name">Its name: a namespace, a colon, and what that namespace calls it.</param>
public abstract class NbdContext(string name)
{
    public string Name => name;

    /// <summary>What holds for the bytes from an offset on: how many of them, at most <paramref name="length"/>, and the flags that the context defines.</summary>
    public abstract ValueTask<(long Length, uint State)> AtAsync(long offset, long length, CancellationToken cancellation);
}

/// <summary>"base:allocation": holes and zeros, through the whole backing chain.</summary>
internal sealed class NbdAllocationContext(BlockNode node) : NbdContext(NbdProtocol.BaseAllocation)
{
    public override async ValueTask<(long Length, uint State)> AtAsync(long offset, long length, CancellationToken cancellation)
    {
        BlockStatus status = await ChainStatus.MergedAsync(node, offset, length, cancellation).ConfigureAwait(false);
        return (status.Length, (status.IsData ? 0 : NbdProtocol.StateHole) | (status.IsZero ? NbdProtocol.StateZero : 0));
    }
}

/// <summary>"qemu:allocation-depth": which image of the chain decides, counted from 1 at the top; 0: none does.</summary>
/// <param name="node">The top image.</param>
public sealed class NbdDepthContext(BlockNode node) : NbdContext("qemu:allocation-depth")
{
    public override async ValueTask<(long Length, uint State)> AtAsync(long offset, long length, CancellationToken cancellation)
    {
        uint depth = 1;
        for (BlockNode? image = node; image is not null; image = image.Backing, depth++)
        {
            // What a short backing image does not reach reads as zeros because it ends: it is the one that decides.
            if (offset >= image.Length)
                return (length, depth);
            BlockStatus status = await image.StatusAsync(offset, Math.Min(length, image.Length - offset), cancellation).ConfigureAwait(false);
            length = Math.Min(length, status.Length);
            if (status.IsAllocated)
                return (length, depth);
        }
        return (length, 0);
    }
}

/// <summary>"qemu:dirty-bitmap:NAME": what changed since a persistent bitmap of a qcow2 image began. A bitmap that records goes on while it is shown.</summary>
public sealed class NbdBitmapContext : NbdContext
{
    private const uint Dirty = 1;

    private readonly Qcow2Image _image;
    private readonly Qcow2BitmapInfo _bitmap;
    private readonly byte[] _bits;

    private NbdBitmapContext(Qcow2Image image, Qcow2BitmapInfo bitmap, byte[] bits)
        : base($"qemu:dirty-bitmap:{bitmap.Name}")
    {
        _image = image;
        _bitmap = bitmap;
        _bits = bits;
    }

    /// <summary>Finds a bitmap in an image or in the nearest below it that has one of this name. To be called before the image is written to.</summary>
    /// <exception cref="BlockException">There is none, or it was left unfinished by a crash.</exception>
    public static async ValueTask<NbdBitmapContext> OpenAsync(BlockNode top, string name, CancellationToken cancellation = default)
    {
        for (BlockNode? node = top; node is not null; node = node.Backing)
        {
            if (node is not Qcow2Image image)
                continue;
            IReadOnlyList<Qcow2BitmapInfo> bitmaps = await Qcow2Bitmaps.ListAsync(image, cancellation).ConfigureAwait(false);
            foreach (Qcow2BitmapInfo bitmap in bitmaps)
            {
                if (bitmap.Name != name)
                    continue;
                if (bitmap.InUse)
                    throw new BlockException($"Bitmap '{name}' is inconsistent and cannot be used");
                return new NbdBitmapContext(image, bitmap, await Qcow2Bitmaps.ReadBitsAsync(image, bitmap, cancellation).ConfigureAwait(false));
            }
        }
        throw new BlockException($"Bitmap '{name}' is not found", BlockErrno.NoEntry);
    }

    public override ValueTask<(long Length, uint State)> AtAsync(long offset, long length, CancellationToken cancellation)
    {
        if (!_image.TryBitmapRun(_bitmap.Name, offset, length, out (long Length, bool Dirty) run))
            run = Qcow2BitmapTracker.RunAt(_bits, _bitmap.GranularityBits, offset, length);
        return new ValueTask<(long Length, uint State)>((run.Length, run.Dirty ? Dirty : 0));
    }
}
