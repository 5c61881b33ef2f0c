using System;
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>A Parallels expandable disk (QEMU's docs/interop/parallels.txt); read-only. Integers are little-endian.</summary>
public sealed class ParallelsImage : BlockTableImage
{
    private const int HeaderSize = 64;
    private const int MostEntries = 64 << 20;

    private readonly uint[] _table;
    private readonly long _multiplier;

    private ParallelsImage(BlockNode file, int clusterSize, uint[] table, long multiplier, long size)
        : base(file, clusterSize)
    {
        _table = table;
        _multiplier = multiplier;
        Length = size;
    }

    public override string Driver => "parallels";

    public override long Length { get; }

    public override int ClusterSize => 0;

    /// <summary>The unit that the table maps.</summary>
    internal long UnitSize => TableBlockSize;

    /// <summary>How many units the table has places for.</summary>
    internal long Units => _table.Length;

    public override bool IsReadOnly => true;

    public static bool Probe(ReadOnlySpan<byte> start) =>
        start.Length >= HeaderSize && (start.StartsWith("WithoutFreeSpace"u8) || start.StartsWith("WithouFreSpacExt"u8)) && BinaryPrimitives.ReadUInt32LittleEndian(start[16..]) == 2;

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<ParallelsImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        if (!Probe(header))
            throw new BlockException("Image not in Parallels format");
        bool extended = header.AsSpan().StartsWith("WithouFreSpacExt"u8);
        uint tracks = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(28));
        uint entries = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(32));
        long sectors = extended ? BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(36)) : BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(36));
        if (tracks is 0 or > (256 << 20) / 512)
            throw new BlockException("Invalid image: cluster size is zero or too large");
        if (entries > MostEntries || HeaderSize + (entries * 4L) > file.Length)
            throw new BlockException("Catalog too large, or outside the file");
        if (sectors < 0 || sectors > (long)entries * tracks)
            throw new BlockException("Invalid image: the catalog is too small for the disk");
        byte[] bytes = new byte[entries * 4];
        await file.ReadAsync(HeaderSize, bytes, cancellation).ConfigureAwait(false);
        uint[] table = new uint[entries];
        MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()).CopyTo(table);
        return new ParallelsImage(file, (int)tracks * 512, table, extended ? tracks * 512L : 512, sectors * 512);
    }

    private protected override (TableState State, long Host) Locate(long block)
    {
        uint entry = _table[block];
        return entry == 0 ? (TableState.Absent, 0) : (TableState.Present, entry * _multiplier);
    }

    private protected override ValueTask<long> ReserveAsync(long block, CancellationToken cancellation) => throw ReadOnlyError();

    private protected override ValueTask CommitAsync(long block, long host, CancellationToken cancellation) => throw ReadOnlyError();
}
