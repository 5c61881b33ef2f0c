using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>
/// A Virtual PC / Hyper-V disk (VHD), fixed or dynamic ("Virtual Hard Disk Image Format Specification", 1.0). Integers are big-endian.
/// A dynamic block starts with a bitmap of its sectors; blocks written here are filled whole, so their bitmaps are all ones.
/// </summary>
public sealed class VpcImage : BlockTableImage, IIdentifiedImage
{
    private const int FooterSize = 512;
    private const int DynamicHeaderSize = 1024;
    private const uint TypeFixed = 2;
    private const uint TypeDynamic = 3;
    internal const uint Absent = 0xffff_ffff;
    private const int DefaultBlock = 2 << 20;
    private const long LargestSize = 2040L << 30;

    // Configuration
    private readonly byte[] _footer;
    private readonly bool _fixed;
    private readonly long _tableOffset;
    private readonly int _bitmapBytes;

    // State
    private readonly uint[] _table;
    private readonly HashSet<long> _full = [];
    private long _end;

    private VpcImage(BlockNode file, byte[] footer, bool isFixed, int blockSize, uint[] table, long tableOffset, long size)
        : base(file, blockSize)
    {
        _footer = footer;
        _fixed = isFixed;
        _table = table;
        _tableOffset = tableOffset;
        _bitmapBytes = BitmapBytes(blockSize);
        Length = size;
        // New blocks replace the footer at the end, which moves behind them.
        _end = Math.Max(0, file.Length - FooterSize) & ~511L;
        foreach (uint entry in table)
        {
            if (entry != Absent)
                _end = Math.Max(_end, (entry * 512L) + _bitmapBytes + blockSize);
        }
    }

    public override string Driver => "vpc";

    public override long Length { get; }

    public override int ClusterSize => _fixed ? 0 : TableBlockSize;

    public override bool MayHoldHoles => _fixed;

    Guid IIdentifiedImage.Id => IdOf(_footer);

    public static bool Probe(ReadOnlySpan<byte> start) => start.StartsWith("conectix"u8);

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<VpcImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] footer = await ReadFooterAsync(file, cancellation).ConfigureAwait(false);
        long size = SizeOf(footer);
        switch (TypeOf(footer))
        {
            case TypeFixed:
                if (size > file.Length)
                    throw new BlockException("Fixed VHD is shorter than its size");
                return new VpcImage(file, footer, true, 1 << 20, [], 0, size);
            case TypeDynamic:
                (_, int blockSize, uint[] table, long tableOffset) = await LoadTableAsync(file, footer, cancellation).ConfigureAwait(false);
                return new VpcImage(file, footer, false, blockSize, table, tableOffset, size);
            case uint type:
                throw new BlockException($"Unknown VHD type {type}", BlockErrno.NotSupported);
        }
    }

    /// <summary>The footer, from the end or its copy at the start.</summary>
    internal static async ValueTask<byte[]> ReadFooterAsync(BlockNode file, CancellationToken cancellation)
    {
        if (file.Length < FooterSize)
            throw new BlockException("File too small for a VHD header");
        byte[] footer = new byte[FooterSize];
        await file.ReadAsync(0, footer, cancellation).ConfigureAwait(false);
        if (!Probe(footer))
        {
            await file.ReadAsync((file.Length - FooterSize + 511) & ~511L, footer, cancellation).ConfigureAwait(false);
            if (!Probe(footer))
                throw new BlockException("invalid VPC image");
        }
        if (SizeOf(footer) is < 0 or > LargestSize)
            throw new BlockException("VHD size is out of range", BlockErrno.FileTooBig);
        return footer;
    }

    /// <summary>The dynamic header and the block table of a dynamic or differencing image.</summary>
    internal static async ValueTask<(byte[] Header, int BlockSize, uint[] Table, long TableOffset)> LoadTableAsync(BlockNode file, byte[] footer, CancellationToken cancellation)
    {
        byte[] header = new byte[DynamicHeaderSize];
        long headerOffset = BinaryPrimitives.ReadInt64BigEndian(footer.AsSpan(16));
        if (headerOffset < 0 || headerOffset > file.Length - DynamicHeaderSize)
            throw new BlockException("VHD dynamic header is outside the file");
        await file.ReadAsync(headerOffset, header, cancellation).ConfigureAwait(false);
        if (!header.AsSpan().StartsWith("cxsparse"u8))
            throw new BlockException("VHD dynamic header has no signature");
        uint blockSize = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(32));
        uint entries = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(28));
        long tableOffset = BinaryPrimitives.ReadInt64BigEndian(header.AsSpan(16));
        if (!uint.IsPow2(blockSize) || blockSize is < 4096 or > 256 << 20)
            throw new BlockException($"Invalid block size {blockSize}");
        if (entries > 1 << 26 || tableOffset < 0 || tableOffset > file.Length - (entries * 4L))
            throw new BlockException("VHD block table is too large or outside the file");
        if ((long)entries * blockSize < SizeOf(footer))
            throw new BlockException("Page Table Entries are too few for the disk's size");
        byte[] bytes = new byte[entries * 4];
        await file.ReadAsync(tableOffset, bytes, cancellation).ConfigureAwait(false);
        uint[] table = new uint[entries];
        BinaryPrimitives.ReverseEndianness(MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()), table);
        return (header, (int)blockSize, table, tableOffset);
    }

    /// <summary>What the bitmap in front of a block takes up.</summary>
    internal static int BitmapBytes(int blockSize) => ((blockSize / 512 / 8) + 511) & ~511;

    internal static uint TypeOf(byte[] footer) => BinaryPrimitives.ReadUInt32BigEndian(footer.AsSpan(60));

    internal static Guid IdOf(byte[] footer) => new(footer.AsSpan(68, 16), bigEndian: true);

    /// <summary>Lays out an empty image. The size is rounded up to what cylinders, heads and sectors can say, unless forced.</summary>
    public static async ValueTask<VpcImage> CreateAsync(BlockNode file, long size, bool isFixed, bool forceSize, CancellationToken cancellation = default)
    {
        (int cylinders, int heads, int sectors) = Geometry(size / 512, roundUp: !forceSize);
        long total = forceSize ? size : Math.Max(size, (long)cylinders * heads * sectors * 512);
        if (total > LargestSize)
            throw new BlockException("Disk size too large, max size is 2040 GiB", BlockErrno.FileTooBig);
        byte[] footer = new byte[FooterSize];
        "conectix"u8.CopyTo(footer);
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(8), 2);
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(12), 0x0001_0000);
        BinaryPrimitives.WriteInt64BigEndian(footer.AsSpan(16), isFixed ? -1 : FooterSize);
        Encoding.ASCII.GetBytes(forceSize ? "win " : "kvsr", footer.AsSpan(28));
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(32), 0x0001_0000);
        Encoding.ASCII.GetBytes("Wi2k", footer.AsSpan(36));
        BinaryPrimitives.WriteInt64BigEndian(footer.AsSpan(40), total);
        BinaryPrimitives.WriteInt64BigEndian(footer.AsSpan(48), total);
        BinaryPrimitives.WriteUInt16BigEndian(footer.AsSpan(56), (ushort)cylinders);
        footer[58] = (byte)heads;
        footer[59] = (byte)sectors;
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(60), isFixed ? TypeFixed : TypeDynamic);
        RandomNumberGenerator.Fill(footer.AsSpan(68, 16));
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(64), Checksum(footer));
        await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
        if (isFixed)
        {
            await file.ResizeAsync(total + FooterSize, Preallocation.Off, cancellation).ConfigureAwait(false);
            await file.WriteAsync(total, footer, WriteFlags.None, cancellation).ConfigureAwait(false);
            return await OpenAsync(file, cancellation).ConfigureAwait(false);
        }
        byte[] header = new byte[DynamicHeaderSize];
        long entries = (total + DefaultBlock - 1) / DefaultBlock;
        "cxsparse"u8.CopyTo(header);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(8), -1);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(16), FooterSize + DynamicHeaderSize);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(24), 0x0001_0000);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(28), (uint)entries);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(32), DefaultBlock);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(36), Checksum(header));
        byte[] table = new byte[((entries * 4) + 511) & ~511L];
        table.AsSpan().Fill(0xff);
        await file.WriteAsync(0, footer, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(FooterSize, header, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(FooterSize + DynamicHeaderSize, table, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(FooterSize + DynamicHeaderSize + table.Length, footer, WriteFlags.None, cancellation).ConfigureAwait(false);
        return await OpenAsync(file, cancellation).ConfigureAwait(false);
    }

    private protected override (TableState State, long Host) Locate(long block)
    {
        if (_fixed)
            return (TableState.Present, block * TableBlockSize);
        uint entry = Volatile.Read(ref _table[block]);
        return entry == Absent ? (TableState.Absent, 0) : (TableState.Present, (entry * 512L) + _bitmapBytes);
    }

    private protected override async ValueTask<long> ReserveAsync(long block, CancellationToken cancellation)
    {
        if (_end / 512 >= Absent)
            throw new BlockException($"{FileName} has no room for another block: places in it have 32 bits", BlockErrno.FileTooBig);
        byte[] bitmap = new byte[_bitmapBytes];
        bitmap.AsSpan().Fill(0xff);
        // The footer goes behind the new block before the old one is written over: the file has one at any time.
        await File.WriteAsync(_end + _bitmapBytes + TableBlockSize, _footer, WriteFlags.None, cancellation).ConfigureAwait(false);
        await File.WriteAsync(_end, bitmap, WriteFlags.None, cancellation).ConfigureAwait(false);
        return _end + _bitmapBytes;
    }

    private protected override async ValueTask CommitAsync(long block, long host, CancellationToken cancellation)
    {
        uint entry = (uint)((host - _bitmapBytes) / 512);
        byte[] bytes = new byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(bytes, entry);
        await File.WriteAsync(_tableOffset + (block * 4), bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
        _end = host + TableBlockSize;
        Volatile.Write(ref _table[block], entry);
    }

    /// <summary>Sectors that another program left out of a block's bitmap are in it before they are written: whoever goes by the bitmap would not see them.</summary>
    private protected override ValueTask WritingAsync(long block, long host, CancellationToken cancellation)
    {
        if (_fixed)
            return default;
        lock (_full)
        {
            if (_full.Contains(block))
                return default;
        }
        return FillBitmapAsync(block, host - _bitmapBytes, cancellation);
    }

    private async ValueTask FillBitmapAsync(long block, long at, CancellationToken cancellation)
    {
        byte[] bitmap = new byte[_bitmapBytes];
        await File.ReadAsync(at, bitmap, cancellation).ConfigureAwait(false);
        if (bitmap.AsSpan(0, Math.Max(1, TableBlockSize / 512 / 8)).ContainsAnyExcept((byte)0xff))
        {
            bitmap.AsSpan().Fill(0xff);
            await File.WriteAsync(at, bitmap, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        lock (_full)
            _full.Add(block);
    }

    /// <summary>Images of Virtual PC mean the geometry's size, those of most other programs the size field.</summary>
    internal static long SizeOf(byte[] footer)
    {
        long geometry = (long)BinaryPrimitives.ReadUInt16BigEndian(footer.AsSpan(56)) * footer[58] * footer[59] * 512;
        string creator = Encoding.ASCII.GetString(footer, 28, 4);
        bool bySize = creator is "win " or "qem2" or "d2v " or "tap\0" or "CTXS" or "vs  " or "kvsr" || geometry >= 65535L * 16 * 255 * 512;
        return bySize ? BinaryPrimitives.ReadInt64BigEndian(footer.AsSpan(48)) : geometry;
    }

    private static uint Checksum(ReadOnlySpan<byte> data)
    {
        uint sum = 0;
        foreach (byte value in data)
            sum += value;
        return ~sum;
    }

    /// <summary>Cylinders, heads and sectors for a number of sectors (the specification's appendix).</summary>
    private static (int Cylinders, int Heads, int Sectors) Geometry(long total, bool roundUp)
    {
        (int, int, int) result = GeometryOf(total);
        for (long more = 0; roundUp && (long)result.Item1 * result.Item2 * result.Item3 < total && result.Item1 < 65535; more += 1)
            result = GeometryOf(total + more);
        return result;
    }

    private static (int Cylinders, int Heads, int Sectors) GeometryOf(long total)
    {
        total = Math.Min(total, 65535L * 16 * 255);
        int sectors;
        int heads;
        long cylinderHeads;
        if (total >= 65535L * 16 * 63)
        {
            sectors = 255;
            heads = 16;
            cylinderHeads = total / sectors;
        }
        else
        {
            sectors = 17;
            cylinderHeads = total / sectors;
            heads = Math.Max(4, (int)((cylinderHeads + 1023) / 1024));
            if (cylinderHeads >= heads * 1024L || heads > 16)
            {
                sectors = 31;
                heads = 16;
                cylinderHeads = total / sectors;
            }
            if (cylinderHeads >= heads * 1024L)
            {
                sectors = 63;
                heads = 16;
                cylinderHeads = total / sectors;
            }
        }
        return ((int)(cylinderHeads / heads), heads, sectors);
    }
}
