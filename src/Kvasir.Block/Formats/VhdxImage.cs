using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>
/// A Hyper-V disk (VHDX, [MS-VHDX]), fixed or dynamic. The block allocation table is in memory; its changes reach the file with a flush,
/// by way of the log and after the data, so that a crash at any write leaves a good image.
/// </summary>
public sealed class VhdxImage : BlockTableImage, IIdentifiedImage
{
    private const int Page = 4096;
    internal const ulong StateMask = 7;
    internal const ulong OffsetMask = ~0xf_fffful;
    internal const ulong StateZero = 2;
    internal const ulong StateUnmapped = 3;
    internal const ulong StatePresent = 6;
    internal const ulong StatePartial = 7;

    // Wiring
    private readonly VhdxLayout _layout;
    private readonly VhdxLog _log;

    // State
    private readonly ulong[] _bat;
    private readonly SortedSet<int> _dirtyPages = [];
    private readonly AsyncMutex _flush = new();
    private long _end;
    private bool _changed;

    private VhdxImage(BlockNode file, VhdxLayout layout, VhdxLog log, ulong[] bat)
        : base(file, (int)layout.BlockSize)
    {
        _layout = layout;
        _log = log;
        _bat = bat;
        _end = (Math.Max(file.Length, layout.MetadataEnd) + (1 << 20) - 1) & ~((1L << 20) - 1);
    }

    public override string Driver => "vhdx";

    public override long Length => _layout.Size;

    Guid IIdentifiedImage.Id => _layout.DataWriteGuid;

    public static bool Probe(ReadOnlySpan<byte> start) => start.StartsWith("vhdxfile"u8);

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<VhdxImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        (VhdxLayout layout, VhdxLog log, ulong[] bat) = await LoadAsync(file, cancellation).ConfigureAwait(false);
        if (layout.HasParent)
            throw new BlockException("It is a differencing VHDX", BlockErrno.NotSupported);
        return Make(file, layout, log, bat);
    }

    /// <summary>Reads all but the blocks of a VHDX of any type.</summary>
    internal static async ValueTask<(VhdxLayout Layout, VhdxLog Log, ulong[] Bat)> LoadAsync(BlockNode file, CancellationToken cancellation)
    {
        byte[] start = new byte[8];
        await file.ReadAsync(0, start.AsMemory(0, (int)Math.Min(8, file.Length)), cancellation).ConfigureAwait(false);
        if (!Probe(start))
            throw new BlockException("Image is not in VHDX format");
        VhdxLayout layout = await VhdxLayout.LoadAsync(file, cancellation).ConfigureAwait(false);
        VhdxLog log = new(file, layout);
        await log.ReplayAsync(cancellation).ConfigureAwait(false);
        await layout.LoadRegionsAsync(file, cancellation).ConfigureAwait(false);
        // In a differencing image each chunk ends with the entry of its sector bitmap ([MS-VHDX] 2.5).
        long entries = layout.HasParent
            ? (layout.Blocks + layout.ChunkRatio - 1) / layout.ChunkRatio * (layout.ChunkRatio + 1)
            : layout.Blocks + ((layout.Blocks - 1) / layout.ChunkRatio);
        if (entries * 8 > layout.BatLength || layout.BatOffset > file.Length - (entries * 8))
            throw new BlockException("VHDX block allocation table is too small for the disk, or outside the file");
        byte[] bytes = new byte[(entries * 8 + Page - 1) & ~(Page - 1L)];
        await file.ReadAsync(layout.BatOffset, bytes.AsMemory(0, (int)Math.Min(bytes.Length, file.Length - layout.BatOffset)), cancellation).ConfigureAwait(false);
        ulong[] bat = new ulong[bytes.Length / 8];
        MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()).CopyTo(bat);
        return (layout, log, bat);
    }

    internal static VhdxImage Make(BlockNode file, VhdxLayout layout, VhdxLog log, ulong[] bat)
    {
        VhdxImage image = new(file, layout, log, bat);
        image.CheckTable(layout.Blocks);
        return image;
    }

    /// <summary>Lays out an empty image.</summary>
    /// <param name="file">The file; owned.</param>
    /// <param name="size">Disk size in bytes.</param>
    /// <param name="blockSize">Size of a block; 0: chosen by the disk's size.</param>
    /// <param name="isFixed">Whether all blocks have their place from the start.</param>
    /// <param name="logSize">Bytes of the log, a multiple of 1 MiB.</param>
    /// <param name="cancellation">Ends the creation early.</param>
    public static async ValueTask<VhdxImage> CreateAsync(BlockNode file, long size, long blockSize, bool isFixed, long logSize, CancellationToken cancellation = default)
    {
        if (size > VhdxLayout.LargestDisk)
            throw new BlockException("Image size too large; max of 64TB", BlockErrno.FileTooBig);
        if (blockSize == 0)
            blockSize = size > 32L << 40 ? 64 << 20 : size > 100L << 30 ? 32 << 20 : size > 1L << 30 ? 16 << 20 : 8 << 20;
        if (blockSize is < 1 << 20 or > 256 << 20 || (blockSize & (blockSize - 1)) != 0)
            throw new BlockException("Block size must be a power of two between 1 MB and 256 MB");
        if (logSize is < 1 << 20 or > 64 << 20 || logSize % (1 << 20) != 0)
            throw new BlockException("Log size must be a multiple of 1 MB, at most 64 MB");
        long chunk = (1L << 23) * 512 / blockSize;
        long blocks = Math.Max(1, (size + blockSize - 1) / blockSize);
        long entries = blocks + ((blocks - 1) / chunk);
        long logAt = 1 << 20;
        long metadataAt = logAt + logSize;
        long batAt = metadataAt + (1 << 20);
        long batLength = ((entries * 8) + (1 << 20) - 1) & ~((1L << 20) - 1);
        long dataAt = batAt + batLength;
        await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
        await file.ResizeAsync(dataAt + (isFixed ? blocks * blockSize : 0), Preallocation.Off, cancellation).ConfigureAwait(false);
        if (isFixed)
        {
            byte[] bat = new byte[entries * 8];
            for (long block = 0; block < blocks; block++)
                BinaryPrimitives.WriteUInt64LittleEndian(bat.AsSpan((int)((block + (block / chunk)) * 8)), (ulong)(dataAt + (block * blockSize)) | StatePresent);
            await file.WriteAsync(batAt, bat, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        await file.WriteAsync(metadataAt, Metadata((uint)blockSize, isFixed, size), WriteFlags.None, cancellation).ConfigureAwait(false);
        byte[] regions = Regions(batAt, (uint)batLength, metadataAt);
        await file.WriteAsync(VhdxLayout.RegionTable1, regions, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(VhdxLayout.RegionTable2, regions, WriteFlags.None, cancellation).ConfigureAwait(false);
        byte[] header = new byte[VhdxLayout.HeaderSize];
        BinaryPrimitives.WriteUInt32LittleEndian(header, VhdxLayout.HeaderSignature);
        Guid.NewGuid().TryWriteBytes(header.AsSpan(16, 16));
        Guid.NewGuid().TryWriteBytes(header.AsSpan(32, 16));
        BinaryPrimitives.WriteUInt16LittleEndian(header.AsSpan(66), 1);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(68), (uint)logSize);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(72), logAt);
        foreach ((long at, ulong sequence) in new[] { (VhdxLayout.Header1, 1ul), (VhdxLayout.Header2, 2ul) })
        {
            BinaryPrimitives.WriteUInt64LittleEndian(header.AsSpan(8), sequence);
            BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(4), VhdxLayout.Checksum(header, 4));
            await file.WriteAsync(at, header, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        byte[] identifier = new byte[520];
        "vhdxfile"u8.CopyTo(identifier);
        Encoding.Unicode.GetBytes("Kvasir", identifier.AsSpan(8));
        await file.WriteAsync(0, identifier, WriteFlags.None, cancellation).ConfigureAwait(false);
        return await OpenAsync(file, cancellation).ConfigureAwait(false);
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        await _flush.EnterAsync().ConfigureAwait(false);
        try
        {
            for (bool first = true; ; first = false)
            {
                List<(long Offset, ReadOnlyMemory<byte> Page)> pages = TakeDirty();
                if (pages.Count == 0 && !first)
                    return;
                try
                {
                    // What these pages point at is in the file by now, and stable before they are.
                    long stable = File.Length;
                    await File.FlushAsync(cancellation).ConfigureAwait(false);
                    if (pages.Count > 0)
                        await _log.CommitAsync(pages, stable, cancellation).ConfigureAwait(false);
                }
                catch
                {
                    PutBack(pages);
                    throw;
                }
            }
        }
        finally
        {
            _flush.Exit();
        }
    }

    public override async ValueTask DisposeAsync()
    {
        try
        {
            if (!IsReadOnly)
            {
                await FlushAsync().ConfigureAwait(false);
                await _log.CloseAsync(CancellationToken.None).ConfigureAwait(false);
            }
        }
        finally
        {
            await base.DisposeAsync().ConfigureAwait(false);
        }
    }

    private protected override (TableState State, long Host) Locate(long block)
    {
        ulong entry = Volatile.Read(ref _bat[Index(block)]);
        return (entry & StateMask) switch
        {
            StatePresent or StatePartial => (TableState.Present, (long)(entry & OffsetMask)),
            StateZero or StateUnmapped => (TableState.Zero, 0),
            _ => (TableState.Absent, 0),
        };
    }

    private protected override ValueTask ChangeAsync(CancellationToken cancellation) => Volatile.Read(ref _changed) ? default : ChangeFirstAsync(cancellation);

    private protected override ValueTask<long> ReserveAsync(long block, CancellationToken cancellation) => new(_end);

    private protected override ValueTask CommitAsync(long block, long host, CancellationToken cancellation)
    {
        _end = host + TableBlockSize;
        int index = Index(block);
        lock (_dirtyPages)
        {
            Volatile.Write(ref _bat[index], (ulong)host | StatePresent);
            _dirtyPages.Add(index * 8 / Page);
        }
        return default;
    }

    /// <summary>Who opens the file afterwards sees by these numbers that it is another one than before ([MS-VHDX] 2.2.2).</summary>
    private async ValueTask ChangeFirstAsync(CancellationToken cancellation)
    {
        // The log's header is written with this lock held, too.
        await _flush.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_changed)
                return;
            await _layout.WriteHeaderAsync(File, null, newContent: true, cancellation).ConfigureAwait(false);
            Volatile.Write(ref _changed, true);
        }
        finally
        {
            _flush.Exit();
        }
    }

    private static byte[] Metadata(uint blockSize, bool isFixed, long size)
    {
        byte[] region = new byte[VhdxLayout.MetadataTableSize + 64];
        "metadata"u8.CopyTo(region);
        BinaryPrimitives.WriteUInt16LittleEndian(region.AsSpan(10), 5);
        int at = VhdxLayout.MetadataTableSize;
        int index = 0;
        void Item(Guid id, int length, uint flags)
        {
            Span<byte> entry = region.AsSpan(32 + (index++ * 32), 32);
            id.TryWriteBytes(entry);
            BinaryPrimitives.WriteInt32LittleEndian(entry[16..], at);
            BinaryPrimitives.WriteInt32LittleEndian(entry[20..], length);
            BinaryPrimitives.WriteUInt32LittleEndian(entry[24..], flags);
        }

        Item(VhdxLayout.FileParameters, 8, 4);
        BinaryPrimitives.WriteUInt32LittleEndian(region.AsSpan(at), blockSize);
        BinaryPrimitives.WriteUInt32LittleEndian(region.AsSpan(at + 4), isFixed ? 1u : 0);
        at += 8;
        Item(VhdxLayout.DiskSize, 8, 6);
        BinaryPrimitives.WriteInt64LittleEndian(region.AsSpan(at), size);
        at += 8;
        Item(VhdxLayout.Page83, 16, 6);
        Guid.NewGuid().TryWriteBytes(region.AsSpan(at, 16));
        at += 16;
        Item(VhdxLayout.LogicalSector, 4, 6);
        BinaryPrimitives.WriteUInt32LittleEndian(region.AsSpan(at), 512);
        at += 4;
        Item(VhdxLayout.PhysicalSector, 4, 6);
        BinaryPrimitives.WriteUInt32LittleEndian(region.AsSpan(at), 4096);
        return region;
    }

    private static byte[] Regions(long bat, uint batLength, long metadata)
    {
        byte[] table = new byte[VhdxLayout.RegionTableSize];
        BinaryPrimitives.WriteUInt32LittleEndian(table, VhdxLayout.RegionSignature);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(8), 2);
        VhdxLayout.BatRegion.TryWriteBytes(table.AsSpan(16, 16));
        BinaryPrimitives.WriteInt64LittleEndian(table.AsSpan(32), bat);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(40), batLength);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(44), 1);
        VhdxLayout.MetadataRegion.TryWriteBytes(table.AsSpan(48, 16));
        BinaryPrimitives.WriteInt64LittleEndian(table.AsSpan(64), metadata);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(72), 1 << 20);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(76), 1);
        BinaryPrimitives.WriteUInt32LittleEndian(table.AsSpan(4), VhdxLayout.Checksum(table, 4));
        return table;
    }

    private int Index(long block) => _layout.BatIndex(block);

    private List<(long Offset, ReadOnlyMemory<byte> Page)> TakeDirty()
    {
        List<(long Offset, ReadOnlyMemory<byte> Page)> pages = [];
        lock (_dirtyPages)
        {
            while (_dirtyPages.Count > 0 && pages.Count < _log.LargestEntry)
            {
                int page = _dirtyPages.Min;
                _dirtyPages.Remove(page);
                byte[] bytes = MemoryMarshal.AsBytes(_bat.AsSpan(page * (Page / 8), Page / 8)).ToArray();
                pages.Add((_layout.BatOffset + ((long)page * Page), bytes));
            }
        }
        return pages;
    }

    /// <summary>Pages that did not reach the file are for the next flush.</summary>
    private void PutBack(List<(long Offset, ReadOnlyMemory<byte> Page)> pages)
    {
        lock (_dirtyPages)
        {
            foreach ((long offset, _) in pages)
                _dirtyPages.Add((int)((offset - _layout.BatOffset) / Page));
        }
    }

    private void CheckTable(long blocks)
    {
        List<VhdxPlace> places = [];
        for (long block = 0; block < blocks; block++)
        {
            ulong entry = _bat[Index(block)];
            if ((entry & StateMask) == StatePartial)
                throw new BlockException("VHDX block is partially present, but there is no parent");
            if ((entry & StateMask) != StatePresent)
                continue;
            long host = (long)(entry & OffsetMask);
            places.Add(new VhdxPlace(host, TableBlockSize, VhdxPlaceKind.Block, block));
            _end = Math.Max(_end, host + TableBlockSize);
        }
        _layout.CheckPlaces(places, File.Length);
    }
}
