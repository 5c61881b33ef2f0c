using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

[Flags]
public enum Qcow2Incompatible : ulong
{
    None = 0,
    Dirty = 1 << 0,
    Corrupt = 1 << 1,
    DataFile = 1 << 2,
    CompressionType = 1 << 3,
    ExtendedL2 = 1 << 4,
    Known = Dirty | Corrupt | DataFile | CompressionType | ExtendedL2,
}

[Flags]
public enum Qcow2Compatible : ulong
{
    None = 0,
    LazyRefcounts = 1 << 0,
}

[Flags]
public enum Qcow2Autoclear : ulong
{
    None = 0,
    Bitmaps = 1 << 0,
    DataFileRaw = 1 << 1,
}

public enum Qcow2Compression : byte
{
    Zlib = 0,
    Zstd = 1,
}

public enum Qcow2Encryption : uint
{
    None = 0,
    Aes = 1,
    Luks = 2,
}

/// <summary>A header extension that is kept as it is.</summary>
internal sealed record Qcow2Extension(uint Type, byte[] Data);

/// <summary>
/// The header of a qcow2 file with its extensions (QEMU's docs/interop/qcow2.txt, "Header"). Integers are big-endian. Parsing checks
/// every field that later code trusts.
/// </summary>
internal sealed class Qcow2Header
{
    public const uint Magic = 0x514649fb;
    public const int Version2Length = 72;
    public const int Version3Length = 112;
    public const long LargestL1Bytes = 32L << 20;
    public const long LargestRefcountTableBytes = 8L << 20;
    public const int LargestSnapshotCount = 65536;
    public const int LargestBitmapCount = 65535;

    private const int FirstRead = 4096;
    private const uint ExtensionEnd = 0;
    private const uint ExtensionBackingFormat = 0xe2792aca;
    private const uint ExtensionFeatureNames = 0x6803f857;
    private const uint ExtensionBitmaps = 0x23852875;
    private const uint ExtensionCrypto = 0x0537be77;
    private const uint ExtensionDataFile = 0x44415441;
    private const int LargestBackingName = 1023;

    public int Version { get; set; } = 3;

    public string? BackingFile { get; set; }

    public string? BackingFormat { get; set; }

    public string? DataFile { get; set; }

    public int ClusterBits { get; set; } = 16;

    public long Size { get; set; }

    public Qcow2Encryption Encryption { get; set; }

    public int L1Size { get; set; }

    public long L1Offset { get; set; }

    public long RefcountTableOffset { get; set; }

    public int RefcountTableClusters { get; set; }

    public int SnapshotCount { get; set; }

    public long SnapshotsOffset { get; set; }

    public Qcow2Incompatible Incompatible { get; set; }

    public Qcow2Compatible Compatible { get; set; }

    public Qcow2Autoclear Autoclear { get; set; }

    public int RefcountOrder { get; set; } = 4;

    public Qcow2Compression Compression { get; set; }

    public long CryptoOffset { get; set; }

    public long CryptoLength { get; set; }

    public int BitmapCount { get; set; }

    public long BitmapDirectoryOffset { get; set; }

    public long BitmapDirectorySize { get; set; }

    public List<Qcow2Extension> Unknown { get; } = [];

    public int ClusterSize => 1 << ClusterBits;

    public bool HasExtendedL2 => (Incompatible & Qcow2Incompatible.ExtendedL2) != 0;

    public bool HasDataFile => (Incompatible & Qcow2Incompatible.DataFile) != 0;

    public int L2EntryBytes => HasExtendedL2 ? 16 : 8;

    /// <summary>Whether a file starts like a qcow2 image of a version this code knows.</summary>
    public static bool Probe(ReadOnlySpan<byte> start) =>
        start.Length >= 8 && BinaryPrimitives.ReadUInt32BigEndian(start) == Magic && BinaryPrimitives.ReadUInt32BigEndian(start[4..]) >= 2;

    /// <param name="data">The file's start: its first cluster, or as much as there is of it.</param>
    /// <exception cref="BlockException">The header is not one this code can trust.</exception>
    public static Qcow2Header Parse(ReadOnlySpan<byte> data)
    {
        if (data.Length < Version2Length || BinaryPrimitives.ReadUInt32BigEndian(data) != Magic)
            throw new BlockException("Image is not in qcow2 format");
        Qcow2Header header = new() { Version = (int)BinaryPrimitives.ReadUInt32BigEndian(data[4..]) };
        if (header.Version is < 2 or > 3)
            throw new BlockException($"Unsupported qcow2 version {(uint)header.Version}", BlockErrno.NotSupported);
        header.ClusterBits = (int)BinaryPrimitives.ReadUInt32BigEndian(data[20..]);
        if (header.ClusterBits is < 9 or > 21)
            throw new BlockException($"Unsupported cluster size: 2^{(uint)header.ClusterBits}");
        int headerLength = Version2Length;
        if (header.Version == 3)
        {
            if (data.Length < 104)
                throw new BlockException("qcow2 header too short");
            header.Incompatible = (Qcow2Incompatible)BinaryPrimitives.ReadUInt64BigEndian(data[72..]);
            header.Compatible = (Qcow2Compatible)BinaryPrimitives.ReadUInt64BigEndian(data[80..]);
            header.Autoclear = (Qcow2Autoclear)BinaryPrimitives.ReadUInt64BigEndian(data[88..]);
            header.RefcountOrder = (int)BinaryPrimitives.ReadUInt32BigEndian(data[96..]);
            uint length = BinaryPrimitives.ReadUInt32BigEndian(data[100..]);
            if (length < 104)
                throw new BlockException("qcow2 header too short");
            if (length > header.ClusterSize || length > data.Length)
                throw new BlockException("qcow2 header exceeds cluster size");
            headerLength = (int)length;
            if (length > 104)
                header.Compression = (Qcow2Compression)data[104];
        }
        ulong unknownBits = (ulong)(header.Incompatible & ~Qcow2Incompatible.Known);
        if (unknownBits != 0)
            throw new BlockException($"Unsupported qcow2 feature(s): Unknown incompatible feature: {unknownBits:x}", BlockErrno.NotSupported);
        if (header.RefcountOrder is < 0 or > 6)
            throw new BlockException("Reference count entry width too large; may not exceed 64 bits");
        bool compressionBit = (header.Incompatible & Qcow2Incompatible.CompressionType) != 0;
        if (header.Compression > Qcow2Compression.Zstd)
            throw new BlockException($"qcow2: unknown compression type: {(int)header.Compression}", BlockErrno.NotSupported);
        if (compressionBit != (header.Compression != Qcow2Compression.Zlib))
            throw new BlockException("qcow2: Compression type incompatible feature bit must be set exactly when the type is not zlib");
        if (header.HasExtendedL2 && header.ClusterBits < 14)
            throw new BlockException("Cluster size too small for extended L2 entries: 16k is the least");
        header.ReadFixed(data);
        header.ReadExtensions(data, headerLength);
        return header;
    }

    /// <summary>Reads a file's header: of the first cluster no more than it takes up.</summary>
    /// <exception cref="BlockException">It is none, or damaged.</exception>
    public static async ValueTask<Qcow2Header> ReadAsync(BlockNode file, CancellationToken cancellation)
    {
        byte[] start = new byte[(int)Math.Clamp(file.Length, 512, FirstRead)];
        await file.ReadAsync(0, start, cancellation).ConfigureAwait(false);
        int cluster = 1 << Math.Clamp(start[23] & 31, 9, 21);
        if (cluster > start.Length && file.Length > start.Length && !HoldsAll(start, cluster))
        {
            start = new byte[(int)Math.Min(cluster, file.Length)];
            await file.ReadAsync(0, start, cancellation).ConfigureAwait(false);
        }
        return Parse(start.AsSpan(0, Math.Min(start.Length, cluster)));
    }

    /// <summary>Whether all that the first cluster says lies within its first bytes.</summary>
    private static bool HoldsAll(ReadOnlySpan<byte> start, int cluster)
    {
        ulong nameOffset = BinaryPrimitives.ReadUInt64BigEndian(start[8..]);
        uint nameLength = BinaryPrimitives.ReadUInt32BigEndian(start[16..]);
        if (nameOffset != 0 && (nameOffset > (ulong)start.Length || nameLength > (ulong)start.Length - nameOffset))
            return false;
        int end = nameOffset != 0 ? (int)nameOffset : cluster;
        long position = BinaryPrimitives.ReadUInt32BigEndian(start[4..]) == 2 ? Version2Length : BinaryPrimitives.ReadUInt32BigEndian(start[100..]);
        while (position + 8 <= end)
        {
            if (position + 8 > start.Length)
                return false;
            if (BinaryPrimitives.ReadUInt32BigEndian(start[(int)position..]) == ExtensionEnd)
                return true;
            position += 8 + (((long)BinaryPrimitives.ReadUInt32BigEndian(start[((int)position + 4)..]) + 7) & ~7L);
        }
        // The last one may end beyond what there is.
        return position <= start.Length;
    }

    /// <summary>The header, its extensions and the backing file's name as the file's first cluster holds them.</summary>
    /// <exception cref="BlockException">They do not fit.</exception>
    public byte[] Serialize()
    {
        byte[] cluster = new byte[Math.Max(ClusterSize, 512)];
        Span<byte> data = cluster;
        BinaryPrimitives.WriteUInt32BigEndian(data, Magic);
        BinaryPrimitives.WriteUInt32BigEndian(data[4..], (uint)Version);
        BinaryPrimitives.WriteUInt32BigEndian(data[20..], (uint)ClusterBits);
        BinaryPrimitives.WriteInt64BigEndian(data[24..], Size);
        BinaryPrimitives.WriteUInt32BigEndian(data[32..], (uint)Encryption);
        BinaryPrimitives.WriteInt32BigEndian(data[36..], L1Size);
        BinaryPrimitives.WriteInt64BigEndian(data[40..], L1Offset);
        BinaryPrimitives.WriteInt64BigEndian(data[48..], RefcountTableOffset);
        BinaryPrimitives.WriteInt32BigEndian(data[56..], RefcountTableClusters);
        BinaryPrimitives.WriteInt32BigEndian(data[60..], SnapshotCount);
        BinaryPrimitives.WriteInt64BigEndian(data[64..], SnapshotsOffset);
        int position = Version2Length;
        if (Version >= 3)
        {
            BinaryPrimitives.WriteUInt64BigEndian(data[72..], (ulong)Incompatible);
            BinaryPrimitives.WriteUInt64BigEndian(data[80..], (ulong)Compatible);
            BinaryPrimitives.WriteUInt64BigEndian(data[88..], (ulong)Autoclear);
            BinaryPrimitives.WriteInt32BigEndian(data[96..], RefcountOrder);
            BinaryPrimitives.WriteInt32BigEndian(data[100..], Version3Length);
            data[104] = (byte)Compression;
            position = Version3Length;
        }
        if (BackingFormat is not null)
            position = Put(cluster, position, ExtensionBackingFormat, Encoding.UTF8.GetBytes(BackingFormat));
        if (DataFile is not null)
            position = Put(cluster, position, ExtensionDataFile, Encoding.UTF8.GetBytes(DataFile));
        if (CryptoOffset != 0)
        {
            byte[] crypto = new byte[16];
            BinaryPrimitives.WriteInt64BigEndian(crypto, CryptoOffset);
            BinaryPrimitives.WriteInt64BigEndian(crypto.AsSpan(8), CryptoLength);
            position = Put(cluster, position, ExtensionCrypto, crypto);
        }
        if (BitmapCount > 0)
        {
            byte[] bitmaps = new byte[24];
            BinaryPrimitives.WriteInt32BigEndian(bitmaps, BitmapCount);
            BinaryPrimitives.WriteInt64BigEndian(bitmaps.AsSpan(8), BitmapDirectorySize);
            BinaryPrimitives.WriteInt64BigEndian(bitmaps.AsSpan(16), BitmapDirectoryOffset);
            position = Put(cluster, position, ExtensionBitmaps, bitmaps);
        }
        foreach (Qcow2Extension extension in Unknown)
            position = Put(cluster, position, extension.Type, extension.Data);
        // The feature names are a courtesy to older readers: a small cluster may have no room for them.
        byte[] names = FeatureNames();
        int nameBytes = BackingFile is null ? 0 : Encoding.UTF8.GetByteCount(BackingFile);
        if (Version >= 3 && position + 8 + names.Length + 8 + nameBytes <= ClusterSize)
            position = Put(cluster, position, ExtensionFeatureNames, names);
        position = Put(cluster, position, ExtensionEnd, []);
        if (BackingFile is not null)
        {
            byte[] name = Encoding.UTF8.GetBytes(BackingFile);
            if (name.Length > LargestBackingName || position + name.Length > ClusterSize)
                throw new BlockException("Backing file name too long", BlockErrno.Invalid);
            name.CopyTo(data[position..]);
            BinaryPrimitives.WriteInt64BigEndian(data[8..], position);
            BinaryPrimitives.WriteInt32BigEndian(data[16..], name.Length);
        }
        return cluster;
    }

    private static int Put(byte[] cluster, int position, uint type, byte[] content)
    {
        int padded = (content.Length + 7) & ~7;
        if (position + 8 + padded > cluster.Length)
            throw new BlockException("The qcow2 header does not fit into one cluster", BlockErrno.NoSpace);
        BinaryPrimitives.WriteUInt32BigEndian(cluster.AsSpan(position), type);
        BinaryPrimitives.WriteInt32BigEndian(cluster.AsSpan(position + 4), content.Length);
        content.CopyTo(cluster, position + 8);
        return position + 8 + padded;
    }

    private static byte[] FeatureNames()
    {
        (byte Type, byte Bit, string Name)[] features =
        [
            (0, 0, "dirty bit"), (0, 1, "corrupt bit"), (0, 2, "external data file"), (0, 3, "compression type"),
            (0, 4, "extended L2 entries"), (1, 0, "lazy refcounts"), (2, 0, "bitmaps"), (2, 1, "raw external data"),
        ];
        byte[] table = new byte[features.Length * 48];
        for (int i = 0; i < features.Length; i++)
        {
            table[i * 48] = features[i].Type;
            table[(i * 48) + 1] = features[i].Bit;
            Encoding.ASCII.GetBytes(features[i].Name, table.AsSpan((i * 48) + 2));
        }
        return table;
    }

    private void ReadFixed(ReadOnlySpan<byte> data)
    {
        Size = BinaryPrimitives.ReadInt64BigEndian(data[24..]);
        if (Size < 0)
            throw new BlockException("Image size is too large", BlockErrno.FileTooBig);
        Encryption = (Qcow2Encryption)BinaryPrimitives.ReadUInt32BigEndian(data[32..]);
        if (Encryption > Qcow2Encryption.Luks)
            throw new BlockException($"Unsupported encryption method {(uint)Encryption}");
        uint l1Size = BinaryPrimitives.ReadUInt32BigEndian(data[36..]);
        if (l1Size > LargestL1Bytes / 8)
            throw new BlockException("Active L1 table too large", BlockErrno.FileTooBig);
        L1Size = (int)l1Size;
        long bytesPerTable = (long)(ClusterSize / L2EntryBytes) << ClusterBits;
        if (L1Size < (Size / bytesPerTable) + (Size % bytesPerTable != 0 ? 1 : 0))
            throw new BlockException("L1 table is too small");
        L1Offset = TableOffset(data[40..], L1Size * 8L, "Active L1 table");
        uint tableClusters = BinaryPrimitives.ReadUInt32BigEndian(data[56..]);
        if (tableClusters > LargestRefcountTableBytes >> ClusterBits)
            throw new BlockException("Image does not contain a usable refcount table: it is too large", BlockErrno.FileTooBig);
        if (tableClusters == 0)
            throw new BlockException("Image does not contain a reference count table");
        RefcountTableClusters = (int)tableClusters;
        RefcountTableOffset = TableOffset(data[48..], (long)RefcountTableClusters << ClusterBits, "Reference count table");
        uint snapshots = BinaryPrimitives.ReadUInt32BigEndian(data[60..]);
        if (snapshots > LargestSnapshotCount)
            throw new BlockException("Snapshot table too large", BlockErrno.FileTooBig);
        SnapshotCount = (int)snapshots;
        SnapshotsOffset = TableOffset(data[64..], SnapshotCount * 40L, "Snapshot table");
        ulong nameOffset = BinaryPrimitives.ReadUInt64BigEndian(data[8..]);
        uint nameLength = BinaryPrimitives.ReadUInt32BigEndian(data[16..]);
        if (nameOffset != 0)
        {
            if (nameOffset > (ulong)ClusterSize)
                throw new BlockException("Invalid backing file offset");
            if (nameLength > LargestBackingName || nameOffset + nameLength > (ulong)Math.Min(ClusterSize, data.Length))
                throw new BlockException("Backing file name too long");
            if (nameLength > 0)
                BackingFile = Encoding.UTF8.GetString(data.Slice((int)nameOffset, (int)nameLength));
        }
    }

    private long TableOffset(ReadOnlySpan<byte> field, long bytes, string what)
    {
        long offset = BinaryPrimitives.ReadInt64BigEndian(field);
        if (offset < 0 || offset > long.MaxValue - bytes || (bytes > 0 && (offset & (ClusterSize - 1)) != 0))
            throw new BlockException($"{what} offset invalid");
        return offset;
    }

    private void ReadExtensions(ReadOnlySpan<byte> data, int position)
    {
        ulong nameOffset = BinaryPrimitives.ReadUInt64BigEndian(data[8..]);
        int end = Math.Min(data.Length, nameOffset != 0 ? (int)nameOffset : ClusterSize);
        while (position + 8 <= end)
        {
            uint type = BinaryPrimitives.ReadUInt32BigEndian(data[position..]);
            uint length = BinaryPrimitives.ReadUInt32BigEndian(data[(position + 4)..]);
            position += 8;
            if (type == ExtensionEnd)
                return;
            if (length > end - position)
                throw new BlockException($"Header extension too large: type {type:x8}, {length} bytes");
            ReadOnlySpan<byte> content = data.Slice(position, (int)length);
            ReadExtension(type, content);
            position += ((int)length + 7) & ~7;
        }
    }

    private void ReadExtension(uint type, ReadOnlySpan<byte> content)
    {
        switch (type)
        {
            case ExtensionBackingFormat:
                if (content.Length > 31)
                    throw new BlockException("ERROR: ext_backing_format: len=" + content.Length + " too large (>=32)");
                BackingFormat = Encoding.UTF8.GetString(content);
                break;
            case ExtensionDataFile:
                DataFile = Encoding.UTF8.GetString(content);
                break;
            case ExtensionFeatureNames:
                break;
            case ExtensionCrypto:
                if (content.Length != 16)
                    throw new BlockException("CRYPTO header extension size " + content.Length + ", but expected size 16");
                CryptoOffset = BinaryPrimitives.ReadInt64BigEndian(content);
                CryptoLength = BinaryPrimitives.ReadInt64BigEndian(content[8..]);
                if (CryptoOffset <= 0 || CryptoOffset % ClusterSize != 0 || CryptoLength is < 592 or > 1L << 30 || CryptoOffset > long.MaxValue - CryptoLength)
                    throw new BlockException("Encryption header offset or length invalid");
                break;
            case ExtensionBitmaps:
                ReadBitmapExtension(content);
                break;
            default:
                Unknown.Add(new Qcow2Extension(type, content.ToArray()));
                break;
        }
    }

    private void ReadBitmapExtension(ReadOnlySpan<byte> content)
    {
        // Bitmaps written by a program that then lost track of the image are void: the autoclear bit says so.
        if ((Autoclear & Qcow2Autoclear.Bitmaps) == 0)
            return;
        if (content.Length != 24)
            throw new BlockException("bitmaps_ext: Invalid extension length");
        uint count = BinaryPrimitives.ReadUInt32BigEndian(content);
        BitmapDirectorySize = BinaryPrimitives.ReadInt64BigEndian(content[8..]);
        BitmapDirectoryOffset = BinaryPrimitives.ReadInt64BigEndian(content[16..]);
        if (count is 0 or > LargestBitmapCount)
            throw new BlockException("bitmaps_ext: Invalid number of bitmaps");
        BitmapCount = (int)count;
        if (BitmapDirectoryOffset <= 0 || BitmapDirectoryOffset % ClusterSize != 0)
            throw new BlockException("bitmaps_ext: Invalid bitmap directory offset");
        if (BitmapDirectorySize <= 0 || BitmapDirectorySize > 64L << 20 || BitmapDirectoryOffset > long.MaxValue - BitmapDirectorySize)
            throw new BlockException("bitmaps_ext: Invalid bitmap directory size");
    }
}
