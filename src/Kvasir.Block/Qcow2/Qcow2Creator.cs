using System;
using System.Buffers.Binary;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;

namespace Kvasir.Block.Qcow2;

/// <summary>What a new qcow2 image is to be (qemu-img create's options).</summary>
public sealed record Qcow2CreateOptions
{
    public long Size { get; init; }

    public int Version { get; init; } = 3;

    public int ClusterSize { get; init; } = 65536;

    public int RefcountBits { get; init; } = 16;

    public bool LazyRefcounts { get; init; }

    public bool ExtendedL2 { get; init; }

    public Qcow2Compression Compression { get; init; }

    public Preallocation Preallocation { get; init; }

    public string? BackingFile { get; init; }

    public string? BackingFormat { get; init; }

    /// <summary>Name of the external data file for the header; null: none.</summary>
    public string? DataFileName { get; init; }

    public BlockNode? DataFile { get; init; }

    public bool DataFileRaw { get; init; }

    public LuksCreateOptions? Luks { get; init; }
}

/// <summary>Lays out new qcow2 images and reckons their size.</summary>
public static class Qcow2Creator
{
    /// <summary>Writes an empty image into a file, which is emptied first, and opens it.</summary>
    /// <exception cref="BlockException">The options make no image.</exception>
    public static async ValueTask<Qcow2Image> CreateAsync(BlockNode file, Qcow2CreateOptions options, CancellationToken cancellation = default)
    {
        Validate(options);
        int clusterBits = int.Log2(options.ClusterSize);
        Qcow2Header header = new()
        {
            Version = options.Version,
            ClusterBits = clusterBits,
            Size = 0,
            RefcountOrder = int.Log2(options.RefcountBits),
            Compression = options.Compression,
            BackingFile = options.BackingFile,
            BackingFormat = options.BackingFormat,
            DataFile = options.DataFileName,
            RefcountTableOffset = options.ClusterSize,
            RefcountTableClusters = 1,
        };
        if (options.LazyRefcounts)
            header.Compatible |= Qcow2Compatible.LazyRefcounts;
        if (options.ExtendedL2)
            header.Incompatible |= Qcow2Incompatible.ExtendedL2;
        if (options.Compression != Qcow2Compression.Zlib)
            header.Incompatible |= Qcow2Incompatible.CompressionType;
        if (options.DataFile is not null)
            header.Incompatible |= Qcow2Incompatible.DataFile;
        if (options.DataFileRaw)
            header.Autoclear |= Qcow2Autoclear.DataFileRaw;
        // Header, refcount table and its first block: three clusters that count themselves.
        int cluster = options.ClusterSize;
        byte[] start = new byte[3 * cluster];
        BinaryPrimitives.WriteInt64BigEndian(start.AsSpan(cluster), 2L * cluster);
        for (int i = 0; i < 3; i++)
            PutRefcount(start.AsSpan(2 * cluster), i, options.RefcountBits);
        header.Serialize().AsSpan(0, Math.Min(cluster, 3 * cluster)).CopyTo(start);
        if (file.IsGrowable)
            await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
        await file.WriteAsync(0, start, WriteFlags.None, cancellation).ConfigureAwait(false);
        Qcow2Image image = await Qcow2Image.OpenAsync(file, new Qcow2Options { DataFile = options.DataFile, Passphrase = options.Luks?.Passphrase }, cancellation).ConfigureAwait(false);
        if (options.Luks is not null)
        {
            await image.FormatLuksAsync(options.Luks, cancellation).ConfigureAwait(false);
            await image.FlushAsync(cancellation).ConfigureAwait(false);
            // The cipher belongs to the opened image: open it again with its new header.
            await image.CloseKeepingFileAsync().ConfigureAwait(false);
            image = await Qcow2Image.OpenAsync(file, new Qcow2Options { DataFile = options.DataFile, Passphrase = options.Luks.Passphrase }, cancellation).ConfigureAwait(false);
        }
        if (options.DataFileRaw && options.DataFile is not null && options.Preallocation == Preallocation.Off && options.BackingFile is null)
            await image.ResizeAsync(options.Size, Preallocation.Metadata, cancellation).ConfigureAwait(false);
        else
            await image.ResizeAsync(options.Size, options.Preallocation, cancellation).ConfigureAwait(false);
        return image;
    }

    /// <summary>Bytes an image needs: with the given amount of data, and filled up (qemu-img measure).</summary>
    public static (long Required, long FullyAllocated) Measure(Qcow2CreateOptions options, long dataBytes)
    {
        Validate(options with { Size = options.Size });
        long full = FileSize(options, options.Size);
        long required = full - Clusters(options.Size, options.ClusterSize) * options.ClusterSize + dataBytes;
        return (options.Preallocation is Preallocation.Falloc or Preallocation.Full ? full : required, full);
    }

    private static long Clusters(long bytes, int clusterSize) => (bytes / clusterSize) + (bytes % clusterSize != 0 ? 1 : 0);

    /// <summary>Size of a fully allocated image, with all its tables.</summary>
    private static long FileSize(Qcow2CreateOptions options, long size)
    {
        int cluster = options.ClusterSize;
        long aligned = Clusters(size, cluster) * cluster;
        long metadata = cluster;
        long l2Entries = RoundUp(aligned / cluster, cluster / (options.ExtendedL2 ? 16 : 8));
        metadata += l2Entries * (options.ExtendedL2 ? 16 : 8);
        long l1Entries = RoundUp(l2Entries * (options.ExtendedL2 ? 16 : 8) / cluster, cluster / 8);
        metadata += l1Entries * 8;
        if (options.Luks is not null)
            metadata += RoundUp(LuksHeader.HeaderBytes(options.Luks), cluster);
        // Refcount blocks count themselves and their table: go round until that settles.
        long perBlock = (long)cluster * 8 / options.RefcountBits;
        long clusters = (metadata + aligned) / cluster;
        long table = 0;
        long blocks = 0;
        long before;
        long total = 0;
        do
        {
            before = total;
            blocks = (clusters + table + blocks + perBlock - 1) / perBlock;
            table = (blocks + (cluster / 8) - 1) / (cluster / 8);
            total = clusters + blocks + table;
        }
        while (total != before);
        metadata += (blocks + table) * cluster;
        return metadata + aligned;
    }

    private static long RoundUp(long value, long unit) => (value + unit - 1) / unit * unit;

    private static void Validate(Qcow2CreateOptions options)
    {
        if (!int.IsPow2(options.ClusterSize) || options.ClusterSize is < 512 or > 2 << 20)
            throw new BlockException("Cluster size must be a power of two between 512 and 2048k");
        if (options.Size < 0 || options.Size % 512 != 0)
            throw new BlockException("Image size must be a multiple of 512 bytes");
        if (!int.IsPow2(options.RefcountBits) || options.RefcountBits > 64)
            throw new BlockException("Refcount width must be a power of two and may not exceed 64 bits");
        if (options.Version < 3 && options.RefcountBits != 16)
            throw new BlockException("Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)");
        if (options.Version < 3 && options.LazyRefcounts)
            throw new BlockException("Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)");
        if (options.Version < 3 && options.Compression != Qcow2Compression.Zlib)
            throw new BlockException("Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)");
        if (options.ExtendedL2 && options.Version < 3)
            throw new BlockException("Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)");
        if (options.ExtendedL2 && options.ClusterSize < 16384)
            throw new BlockException("Extended L2 entries are only supported with cluster sizes of at least 16384 bytes");
        if (options.DataFile is not null && options.Version < 3)
            throw new BlockException("External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)");
        if (options.DataFileRaw && options.DataFile is null && options.DataFileName is null)
            throw new BlockException("data-file-raw requires data-file");
        if (options.DataFileRaw && options.BackingFile is not null)
            throw new BlockException("Backing file and data-file-raw cannot be used at the same time");
        if (options.BackingFile is not null && options.Preallocation != Preallocation.Off && !options.ExtendedL2)
            throw new BlockException("Backing file and preallocation can only be used at the same time if extended_l2 is on");
    }

    private static void PutRefcount(Span<byte> block, int index, int bits)
    {
        switch (bits)
        {
            case >= 8:
                block[((index + 1) * bits / 8) - 1] = 1;
                break;
            default:
                block[index * bits / 8] |= (byte)(1 << (index * bits % 8));
                break;
        }
    }
}
