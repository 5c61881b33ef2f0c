using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>What lies at a place in a VHDX.</summary>
internal enum VhdxPlaceKind
{
    Block,
    Bitmap,
    Metadata,
}

/// <summary>A stretch of a VHDX's file.</summary>
/// <param name="Host">Its first byte.</param>
/// <param name="Length">Its bytes.</param>
/// <param name="Kind">What it is.</param>
/// <param name="Index">Which block, or which chunk's bitmap.</param>
internal readonly record struct VhdxPlace(long Host, long Length, VhdxPlaceKind Kind, long Index);

/// <summary>The headers, regions and metadata of a VHDX ([MS-VHDX] 2.2 to 2.6). Integers are little-endian.</summary>
internal sealed class VhdxLayout
{
    public const int HeaderSize = 4096;
    public const int RegionTableSize = 65536;
    public const long Header1 = 0x1_0000;
    public const long Header2 = 0x2_0000;
    public const long RegionTable1 = 0x3_0000;
    public const long RegionTable2 = 0x4_0000;
    public const int MetadataTableSize = 65536;
    public const uint HeaderSignature = 0x6461_6568;
    public const uint RegionSignature = 0x6967_6572;
    public const long LargestDisk = 64L << 40;

    public static readonly Guid BatRegion = new("2DC27766-F623-4200-9D64-115E9BFD4A08");
    public static readonly Guid MetadataRegion = new("8B7CA206-4790-4B9A-B8FE-575F050F886E");
    public static readonly Guid FileParameters = new("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
    public static readonly Guid DiskSize = new("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
    public static readonly Guid Page83 = new("BECA12AB-B2E6-4523-93EF-C309E000C746");
    public static readonly Guid LogicalSector = new("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
    public static readonly Guid PhysicalSector = new("CDA348C7-445D-4471-9CC9-E9885251C556");
    public static readonly Guid ParentLocator = new("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");

    private readonly List<(long Start, long End)> _taken = [];

    private static readonly Guid VhdxLocatorType = new("B04AEFB7-D19E-4A81-B789-25B8E9445913");

    private const int LargestLocator = 1 << 20;
    private const int MostRegions = 2047;
    private const int MostMetadata = 2047;
    private const uint LargestBat = 512 << 20;

    /// <summary>The current header's bytes.</summary>
    public byte[] Header { get; private init; } = [];

    /// <summary>Whether the current one is the first.</summary>
    public bool FirstIsCurrent { get; set; }

    /// <summary>Where everything ends that is not a block.</summary>
    public long MetadataEnd { get; private set; }

    public long BatOffset { get; private set; }

    public long BatLength { get; private set; }

    public uint BlockSize { get; private set; }

    public bool HasParent { get; private set; }

    public long Size { get; private set; }

    public uint SectorSize { get; private set; }

    /// <summary>What a differencing image says of its parent.</summary>
    public Dictionary<string, string> Locator { get; } = new(StringComparer.Ordinal);

    /// <summary>Changes with the disk's content; overlays remember it.</summary>
    public Guid DataWriteGuid => new(Header.AsSpan(32, 16));

    public Guid LogGuid => new(Header.AsSpan(48, 16));

    public uint LogLength => BinaryPrimitives.ReadUInt32LittleEndian(Header.AsSpan(68));

    public long LogOffset => BinaryPrimitives.ReadInt64LittleEndian(Header.AsSpan(72));

    /// <summary>Blocks that one sector bitmap entry of the BAT stands for.</summary>
    public long ChunkRatio => (1L << 23) * SectorSize / BlockSize;

    public long Blocks => (Size + BlockSize - 1) / BlockSize;

    /// <summary>A block's place in the BAT, where each chunk's sector bitmap has an entry too.</summary>
    public int BatIndex(long block) => (int)(block + (block / ChunkRatio));

    public static uint Checksum(ReadOnlySpan<byte> data, int fieldAt)
    {
        uint sum = Crc(uint.MaxValue, data[..fieldAt]);
        sum = Crc(sum, stackalloc byte[4]);
        return ~Crc(sum, data[(fieldAt + 4)..]);
    }

    /// <summary>Reads everything but the BAT.</summary>
    /// <exception cref="BlockException">The image is damaged or needs what this reader lacks.</exception>
    public static async ValueTask<VhdxLayout> LoadAsync(BlockNode file, CancellationToken cancellation)
    {
        byte[] first = new byte[HeaderSize];
        byte[] second = new byte[HeaderSize];
        if (file.Length < RegionTable2 + RegionTableSize)
            throw new BlockException("VHDX file is too short");
        await file.ReadAsync(Header1, first, cancellation).ConfigureAwait(false);
        await file.ReadAsync(Header2, second, cancellation).ConfigureAwait(false);
        bool good1 = IsHeader(first);
        bool good2 = IsHeader(second);
        if (!good1 && !good2)
            throw new BlockException("No valid VHDX header found");
        bool firstWins = good1 && (!good2 || Sequence(first) >= Sequence(second));
        VhdxLayout layout = new() { Header = firstWins ? first : second, FirstIsCurrent = firstWins };
        if (layout.LogOffset < 1 << 20 || layout.LogOffset % (1 << 20) != 0 || layout.LogLength % (1 << 20) != 0 || layout.LogLength is 0 or > 64 << 20)
            throw new BlockException("VHDX log is out of range");
        return layout;
    }

    /// <summary>Reads the regions and the metadata, after the log was replayed.</summary>
    public async ValueTask LoadRegionsAsync(BlockNode file, CancellationToken cancellation)
    {
        long metadata = await LoadRegionTableAsync(file, cancellation).ConfigureAwait(false);
        await LoadMetadataAsync(file, metadata, cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes the header that is not current, with a higher sequence number, and makes it current.</summary>
    public async ValueTask WriteHeaderAsync(BlockNode file, Guid? log, bool newContent, CancellationToken cancellation)
    {
        BinaryPrimitives.WriteUInt64LittleEndian(Header.AsSpan(8), Sequence(Header) + 1);
        if (log is Guid guid)
            guid.TryWriteBytes(Header.AsSpan(48, 16));
        if (newContent)
        {
            Guid.NewGuid().TryWriteBytes(Header.AsSpan(16, 16));
            Guid.NewGuid().TryWriteBytes(Header.AsSpan(32, 16));
        }
        BinaryPrimitives.WriteUInt32LittleEndian(Header.AsSpan(4), Checksum(Header, 4));
        await file.WriteAsync(FirstIsCurrent ? Header2 : Header1, Header, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.FlushAsync(cancellation).ConfigureAwait(false);
        FirstIsCurrent = !FirstIsCurrent;
    }

    /// <summary>No block lies on the headers, the log, a region or another block, or behind the end of the file.</summary>
    /// <param name="places">Where each block lies.</param>
    /// <param name="fileLength">Where the file ends.</param>
    public void CheckPlaces(List<VhdxPlace> places, long fileLength)
    {
        foreach ((long start, long end) in _taken)
            places.Add(new VhdxPlace(start, end - start, VhdxPlaceKind.Metadata, 0));
        places.Sort((a, b) => a.Host.CompareTo(b.Host));
        for (int i = 0; i < places.Count; i++)
        {
            VhdxPlace place = places[i];
            if (i > 0 && place.Host < places[i - 1].Host + places[i - 1].Length)
            {
                VhdxPlace other = places[i - 1];
                throw place.Kind == VhdxPlaceKind.Metadata ? Misplaced(other) : other.Kind == VhdxPlaceKind.Metadata ? Misplaced(place) : new BlockException("VHDX blocks overlap");
            }
            if (place.Kind != VhdxPlaceKind.Metadata && place.Host > fileLength)
                throw Misplaced(place);
        }
    }

    private static BlockException Misplaced(VhdxPlace place) =>
        new($"VHDX {(place.Kind == VhdxPlaceKind.Bitmap ? "sector bitmap" : "block")} {place.Index} lies at 0x{place.Host:x}, on metadata or outside the file");

    /// <summary>Keys and values, as UTF-16 ([MS-VHDX] 2.6.2.6).</summary>
    private void ReadLocator(ReadOnlySpan<byte> locator)
    {
        if (new Guid(locator[..16]) != VhdxLocatorType)
            throw new BlockException("The VHDX parent locator is of a type that is not known", BlockErrno.NotSupported);
        int count = BinaryPrimitives.ReadUInt16LittleEndian(locator[18..]);
        if (20 + (count * 12) > locator.Length)
            throw new BlockException("The VHDX parent locator is damaged");
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> entry = locator.Slice(20 + (i * 12), 12);
            Locator[LocatorText(locator, BinaryPrimitives.ReadUInt32LittleEndian(entry), BinaryPrimitives.ReadUInt16LittleEndian(entry[8..]))] =
                LocatorText(locator, BinaryPrimitives.ReadUInt32LittleEndian(entry[4..]), BinaryPrimitives.ReadUInt16LittleEndian(entry[10..]));
        }
    }

    private static string LocatorText(ReadOnlySpan<byte> locator, uint offset, int length) => offset <= locator.Length - length
        ? Encoding.Unicode.GetString(locator.Slice((int)offset, length))
        : throw new BlockException("The VHDX parent locator is damaged");

    private static ulong Sequence(byte[] header) => BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(8));

    private static bool IsHeader(byte[] header) =>
        BinaryPrimitives.ReadUInt32LittleEndian(header) == HeaderSignature
        && BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(4)) == Checksum(header, 4)
        && BinaryPrimitives.ReadUInt16LittleEndian(header.AsSpan(66)) == 1;

    private static uint Crc(uint sum, ReadOnlySpan<byte> data)
    {
        foreach (ulong word in MemoryMarshal.Cast<byte, ulong>(data))
            sum = BitOperations.Crc32C(sum, word);
        foreach (byte value in data[(data.Length & ~7)..])
            sum = BitOperations.Crc32C(sum, value);
        return sum;
    }

    private async ValueTask<long> LoadRegionTableAsync(BlockNode file, CancellationToken cancellation)
    {
        byte[] table = new byte[RegionTableSize];
        bool good = false;
        foreach (long at in new[] { RegionTable1, RegionTable2 })
        {
            await file.ReadAsync(at, table, cancellation).ConfigureAwait(false);
            good = BinaryPrimitives.ReadUInt32LittleEndian(table) == RegionSignature && BinaryPrimitives.ReadUInt32LittleEndian(table.AsSpan(4)) == Checksum(table, 4);
            if (good)
                break;
        }
        uint count = BinaryPrimitives.ReadUInt32LittleEndian(table.AsSpan(8));
        if (!good || count > MostRegions)
            throw new BlockException("No valid VHDX region table found");
        long metadata = 0;
        if (LogOffset > long.MaxValue - LogLength)
            throw new BlockException("VHDX log is out of range");
        List<(long Start, long End)> taken = _taken;
        taken.AddRange([(0, 1 << 20), (LogOffset, LogOffset + LogLength)]);
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> entry = table.AsSpan(16 + (i * 32), 32);
            Guid kind = new(entry[..16]);
            long offset = BinaryPrimitives.ReadInt64LittleEndian(entry[16..]);
            uint length = BinaryPrimitives.ReadUInt32LittleEndian(entry[24..]);
            if (offset < 1 << 20 || offset % (1 << 20) != 0 || length % (1 << 20) != 0 || length == 0 || offset > long.MaxValue - length)
                throw new BlockException("A VHDX region is out of range");
            foreach ((long start, long end) in taken)
            {
                if (offset < end && start < offset + length)
                    throw new BlockException("VHDX regions overlap");
            }
            taken.Add((offset, offset + length));
            if (kind == BatRegion)
                (BatOffset, BatLength) = (offset, length);
            else if (kind == MetadataRegion)
                metadata = offset;
            else if ((BinaryPrimitives.ReadUInt32LittleEndian(entry[28..]) & 1) != 0)
                throw new BlockException($"VHDX has a required region {kind} that is not known", BlockErrno.NotSupported);
        }
        foreach ((_, long end) in taken)
            MetadataEnd = Math.Max(MetadataEnd, end);
        if (BatOffset == 0 || metadata == 0)
            throw new BlockException("VHDX lacks its BAT or its metadata region");
        if (BatLength > LargestBat)
            throw new BlockException("VHDX block allocation table is too large", BlockErrno.FileTooBig);
        return metadata;
    }

    private async ValueTask LoadMetadataAsync(BlockNode file, long metadata, CancellationToken cancellation)
    {
        byte[] table = new byte[MetadataTableSize];
        await file.ReadAsync(metadata, table.AsMemory(0, (int)Math.Clamp(file.Length - metadata, 0, table.Length)), cancellation).ConfigureAwait(false);
        int count = BinaryPrimitives.ReadUInt16LittleEndian(table.AsSpan(10));
        if (!table.AsSpan().StartsWith("metadata"u8) || count > MostMetadata)
            throw new BlockException("VHDX metadata table is damaged");
        for (int i = 0; i < count; i++)
        {
            Memory<byte> entry = table.AsMemory(32 + (i * 32), 32);
            Guid item = new(entry.Span[..16]);
            uint offset = BinaryPrimitives.ReadUInt32LittleEndian(entry.Span[16..]);
            uint length = BinaryPrimitives.ReadUInt32LittleEndian(entry.Span[20..]);
            uint flags = BinaryPrimitives.ReadUInt32LittleEndian(entry.Span[24..]);
            if (item == Page83 || item == PhysicalSector)
                continue;
            if (item == ParentLocator)
            {
                if (length is < 20 or > LargestLocator || offset < MetadataTableSize || metadata + offset > file.Length - length)
                    throw new BlockException("The VHDX parent locator is out of range");
                byte[] locator = new byte[length];
                await file.ReadAsync(metadata + offset, locator, cancellation).ConfigureAwait(false);
                ReadLocator(locator);
                continue;
            }
            bool known = item == FileParameters || item == DiskSize || item == LogicalSector;
            if (!known && (flags & 4) != 0)
                throw new BlockException($"VHDX has a required metadata item {item} that is not known", BlockErrno.NotSupported);
            if (!known)
                continue;
            if (length is 0 or > 16 || offset < MetadataTableSize || metadata + offset > file.Length - length)
                throw new BlockException("A VHDX metadata item is out of range");
            byte[] value = new byte[16];
            await file.ReadAsync(metadata + offset, value.AsMemory(0, (int)length), cancellation).ConfigureAwait(false);
            if (item == FileParameters)
            {
                BlockSize = BinaryPrimitives.ReadUInt32LittleEndian(value);
                HasParent = (BinaryPrimitives.ReadUInt32LittleEndian(value.AsSpan(4)) & 2) != 0;
            }
            else if (item == DiskSize)
            {
                Size = BinaryPrimitives.ReadInt64LittleEndian(value);
            }
            else
            {
                SectorSize = BinaryPrimitives.ReadUInt32LittleEndian(value);
            }
        }
        if (BlockSize is < 1 << 20 or > 256 << 20 || !BitOperations.IsPow2(BlockSize) || SectorSize is not (512 or 4096) || Size <= 0 || Size > LargestDisk || Size % SectorSize != 0)
            throw new BlockException("VHDX block, sector or disk size is out of range");
    }
}
