using System;
using System.Buffers.Binary;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>
/// A disk of Bochs that grows ("Redolog", "Growing"; Bochs' developer documentation, "Harddisk redologs"); read-only. A catalog has a number for each
/// extent; an extent is a bitmap of its sectors and then the sectors. Integers are little-endian.
/// </summary>
public sealed class BochsImage : DifferencingImage
{
    private const int HeaderSize = 512;
    private const int SectorSize = 512;
    private const uint Version1 = 0x0001_0000;
    private const uint Version2 = 0x0002_0000;
    private const uint Absent = 0xffff_ffff;
    private const int MostExtents = 1 << 20;
    private const uint LargestExtent = 8 << 20;

    // Far above a bit for each sector of the largest extent; with it the place of no extent wraps.
    private const uint LargestBitmap = 1 << 20;

    private readonly uint[] _catalog;
    private readonly long _dataOffset;
    private readonly long _bitmapBytes;
    private readonly long _extentBytes;

    private BochsImage(BlockNode file, uint[] catalog, int extent, long dataOffset, long bitmapBytes, long length)
        : base(file, "bochs", extent, SectorSize, null, [])
    {
        _catalog = catalog;
        _dataOffset = dataOffset;
        _bitmapBytes = bitmapBytes;
        _extentBytes = extent;
        Length = length;
    }

    public override long Length { get; }

    /// <summary>Sectors are allocated one by one.</summary>
    public override int ClusterSize => 0;

    public static bool Probe(ReadOnlySpan<byte> start) => start.Length >= HeaderSize
        && Text(start[..32]).SequenceEqual("Bochs Virtual HD Image"u8) && Text(start.Slice(32, 16)).SequenceEqual("Redolog"u8) && Text(start.Slice(48, 16)).SequenceEqual("Growing"u8)
        && BinaryPrimitives.ReadUInt32LittleEndian(start[64..]) is Version1 or Version2;

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<BochsImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        if (!Probe(header))
            throw new BlockException("Image not in Bochs format");
        uint Field(int at) => BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(at));
        // The second version has a time between the extent's size and the disk's.
        ulong size = BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(Field(64) == Version1 ? 84 : 88));
        (uint catalogOffset, uint entries, uint bitmap, uint extent) = (Field(68), Field(72), Field(76), Field(80));
        if (entries > MostExtents)
            throw new BlockException("Catalog size is too large", BlockErrno.FileTooBig);
        if (extent < SectorSize)
            throw new BlockException($"Extent size must be at least {SectorSize}");
        if (!BitOperations.IsPow2(extent))
            throw new BlockException($"Extent size {extent} is not a power of two");
        if (extent > LargestExtent)
            throw new BlockException($"Extent size {extent} is too large");
        // In sectors, of which there are few enough for no sum to wrap.
        (ulong sectors, uint perExtent) = (size / SectorSize, extent / SectorSize);
        if (entries < (sectors + perExtent - 1) / perExtent)
            throw new BlockException("Catalog size is too small for this disk size");
        if (bitmap > LargestBitmap)
            throw new BlockException($"Bitmap size {bitmap} is too large");
        if (catalogOffset + (entries * 4L) > file.Length)
            throw new BlockException("The catalog is outside the file");
        byte[] bytes = new byte[entries * 4];
        await file.ReadAsync(catalogOffset, bytes, cancellation).ConfigureAwait(false);
        uint[] catalog = MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()).ToArray();
        long bitmapBytes = bitmap == 0 ? SectorSize : ((long)bitmap + SectorSize - 1) & ~(SectorSize - 1L);
        return new BochsImage(file, catalog, (int)extent, catalogOffset + bytes.Length, bitmapBytes, (long)sectors * SectorSize);
    }

    private protected override (DifferencingState State, long Host, long Bitmap) Locate(long block)
    {
        uint entry = _catalog[block];
        if (entry == Absent)
            return (DifferencingState.Parent, 0, 0);
        long at = _dataOffset + (entry * (_bitmapBytes + _extentBytes));
        return (DifferencingState.Partial, at + _bitmapBytes, at);
    }

    private protected override bool IsOwn(byte[] bitmap, int sector) => (bitmap[sector / 8] & (1 << (sector % 8))) != 0;

    private static ReadOnlySpan<byte> Text(ReadOnlySpan<byte> field) => field.IndexOf((byte)0) is int end and >= 0 ? field[..end] : field;
}
