using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>A differencing VHDX ([MS-VHDX]): blocks that are its own, its parent's, or in part, as its sector bitmap blocks say.</summary>
public sealed class VhdxDifferencing : DifferencingImage, IIdentifiedImage
{
    private const int BitmapBlock = 1 << 20;
    private const ulong StateAbsent = 0;

    private readonly VhdxLayout _layout;
    private readonly ulong[] _bat;

    private VhdxDifferencing(BlockNode file, VhdxLayout layout, ulong[] bat, string parent, IReadOnlyList<Guid> parentIds)
        : base(file, "vhdx", (int)layout.BlockSize, (int)layout.SectorSize, parent, parentIds)
    {
        _layout = layout;
        _bat = bat;
    }

    public override long Length => _layout.Size;

    Guid IIdentifiedImage.Id => _layout.DataWriteGuid;

    /// <summary>Opens a VHDX of any type.</summary>
    /// <exception cref="BlockException">The image is damaged or of an unknown kind, or a differencing one is to be written.</exception>
    public static async ValueTask<BlockNode> OpenAnyAsync(BlockNode file, bool readOnly, CancellationToken cancellation)
    {
        (VhdxLayout layout, VhdxLog log, ulong[] bat) = await VhdxImage.LoadAsync(file, cancellation).ConfigureAwait(false);
        if (!layout.HasParent)
            return VhdxImage.Make(file, layout, log, bat);
        if (!readOnly)
            throw new BlockException("Differencing VHDXs can only be read: convert it, or make a qcow2 overlay over it", BlockErrno.ReadOnly);
        List<Guid> ids = [];
        foreach (string key in (string[])["parent_linkage", "parent_linkage2"])
        {
            if (layout.Locator.TryGetValue(key, out string? text) && Guid.TryParse(text, out Guid id))
                ids.Add(id);
        }
        if (ids.Count == 0)
            throw new BlockException("The VHDX parent locator does not say which disk the parent is");
        ParentSearch search = new();
        foreach (string key in (string[])["relative_path", "volume_path", "absolute_win32_path"])
        {
            if (layout.Locator.TryGetValue(key, out string? name))
                search.Add(name);
        }
        string parent = await search.FindAsync(
            file,
            async candidate => ids.Contains((await VhdxLayout.LoadAsync(candidate, cancellation).ConfigureAwait(false)).DataWriteGuid)).ConfigureAwait(false);
        VhdxDifferencing image = new(file, layout, bat, parent, ids);
        image.CheckTable();
        return image;
    }

    private protected override (DifferencingState State, long Host, long Bitmap) Locate(long block)
    {
        ulong entry = _bat[_layout.BatIndex(block)];
        long host = (long)(entry & VhdxImage.OffsetMask);
        return (entry & VhdxImage.StateMask) switch
        {
            VhdxImage.StatePresent => (DifferencingState.Present, host, 0),
            VhdxImage.StatePartial => (DifferencingState.Partial, host, BitmapOf(block)),
            StateAbsent => (DifferencingState.Parent, 0, 0),
            // Trimmed, or zeros: the parent does not show through.
            _ => (DifferencingState.Zero, 0, 0),
        };
    }

    // The first sector's bit is the first byte's lowest.
    private protected override bool IsOwn(byte[] bitmap, int sector) => (bitmap[sector / 8] & (1 << (sector % 8))) != 0;

    /// <summary>The entry of the sector bitmap of a block's chunk.</summary>
    private ulong BitmapEntry(long block) => _bat[((block / _layout.ChunkRatio + 1) * (_layout.ChunkRatio + 1)) - 1];

    private long BitmapOf(long block) =>
        (long)(BitmapEntry(block) & VhdxImage.OffsetMask) + (block % _layout.ChunkRatio * (_layout.BlockSize / _layout.SectorSize / 8));

    private void CheckTable()
    {
        List<VhdxPlace> places = [];
        long lastChunk = -1;
        for (long block = 0; block < _layout.Blocks; block++)
        {
            ulong entry = _bat[_layout.BatIndex(block)];
            ulong state = entry & VhdxImage.StateMask;
            if (state is VhdxImage.StatePresent or VhdxImage.StatePartial)
                places.Add(new VhdxPlace((long)(entry & VhdxImage.OffsetMask), _layout.BlockSize, VhdxPlaceKind.Block, block));
            if (state != VhdxImage.StatePartial || block / _layout.ChunkRatio == lastChunk)
                continue;
            lastChunk = block / _layout.ChunkRatio;
            if ((BitmapEntry(block) & VhdxImage.StateMask) != VhdxImage.StatePresent)
                throw new BlockException("VHDX block is partially present, but its sector bitmap is not there");
            places.Add(new VhdxPlace((long)(BitmapEntry(block) & VhdxImage.OffsetMask), BitmapBlock, VhdxPlaceKind.Bitmap, lastChunk));
        }
        _layout.CheckPlaces(places, File.Length);
    }
}
