using System;
using System.Buffers.Binary;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>A VirtualBox disk image, version 1.1, dynamic or static. Integers are little-endian.</summary>
public sealed class VdiImage : BlockTableImage
{
    private const uint Signature = 0xbeda107f;
    private const uint Version11 = 0x0001_0001;
    private const int HeaderSize = 512;
    private const int BlockSize = 1 << 20;
    private const uint Absent = 0xffff_ffff;
    private const uint Discarded = 0xffff_fffe;
    private const int MostBlocks = 0x3fff_ffff / 4;
    private const uint TypeDynamic = 1;
    private const uint TypeStatic = 2;

    // State
    private readonly byte[] _header;
    private readonly uint[] _table;
    private readonly long _tableOffset;
    private readonly long _dataOffset;
    private readonly long _size;
    private uint _allocated;

    private VdiImage(BlockNode file, byte[] header, uint[] table)
        : base(file, BlockSize)
    {
        _header = header;
        _table = table;
        _tableOffset = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x154));
        _dataOffset = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x158));
        _size = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(0x170));
        _allocated = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x184));
        // Where the header counts less than the table has, new blocks would go over old ones.
        foreach (uint entry in table)
        {
            if (entry < Discarded && entry >= _allocated)
                _allocated = entry + 1;
        }
    }

    public override string Driver => "vdi";

    public override long Length => (_size + 511) & ~511L;

    public override bool MayHoldHoles => BinaryPrimitives.ReadUInt32LittleEndian(_header.AsSpan(0x4c)) == TypeStatic;

    public static bool Probe(ReadOnlySpan<byte> start) => start.Length >= 68 && BinaryPrimitives.ReadUInt32LittleEndian(start[64..]) == Signature;

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<VdiImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        if (!Probe(header))
            throw new BlockException("Image not in VDI format");
        if (BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(68)) != Version11)
            throw new BlockException("unsupported VDI image: its version is not 1.1", BlockErrno.NotSupported);
        long size = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(0x170));
        uint blocks = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x180));
        uint tableOffset = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x154));
        uint dataOffset = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x158));
        if (BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(0x178)) != BlockSize)
            throw new BlockException("unsupported VDI image: its block size is not 1 MiB", BlockErrno.NotSupported);
        if (blocks > MostBlocks || size < 0 || size > (long)blocks * BlockSize)
            throw new BlockException($"unsupported VDI image: disk size {size} does not fit {blocks} blocks");
        if (tableOffset % 512 != 0 || dataOffset % 512 != 0)
            throw new BlockException("unsupported VDI image: table or data offset unaligned", BlockErrno.NotSupported);
        if (header.AsSpan(0x1a8, 16).ContainsAnyExcept((byte)0) || header.AsSpan(0x1b8, 16).ContainsAnyExcept((byte)0))
            throw new BlockException("unsupported VDI image: it has a parent or link", BlockErrno.NotSupported);
        if (tableOffset + (blocks * 4L) > file.Length + 512)
            throw new BlockException("VDI block table is outside the file");
        byte[] bytes = new byte[blocks * 4];
        await file.ReadAsync(tableOffset, bytes, cancellation).ConfigureAwait(false);
        return new VdiImage(file, header, MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()).ToArray());
    }

    /// <summary>Lays out an empty image.</summary>
    public static async ValueTask<VdiImage> CreateAsync(BlockNode file, long size, bool isStatic, CancellationToken cancellation = default)
    {
        long blocks = (size + BlockSize - 1) / BlockSize;
        if (blocks > MostBlocks)
            throw new BlockException($"Unsupported VDI image size (size is 0x{size:x}, max supported is 0x{(long)MostBlocks * BlockSize:x})", BlockErrno.NotSupported);
        byte[] header = new byte[HeaderSize];
        Encoding.ASCII.GetBytes("<<< Kvasir VM Virtual Disk Image >>>\n", header);
        long tableBytes = ((blocks * 4) + 511) & ~511L;
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x40), Signature);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x44), Version11);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x48), 0x180);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x4c), isStatic ? TypeStatic : TypeDynamic);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x154), HeaderSize);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x158), (uint)(HeaderSize + tableBytes));
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x168), 512);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(0x170), size);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x178), BlockSize);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x180), (uint)blocks);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(0x184), isStatic ? (uint)blocks : 0);
        RandomNumberGenerator.Fill(header.AsSpan(0x188, 16));
        byte[] table = new byte[tableBytes];
        Span<uint> entries = MemoryMarshal.Cast<byte, uint>(table.AsSpan());
        for (int i = 0; i < blocks; i++)
            entries[i] = isStatic ? (uint)i : Absent;
        await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
        await file.WriteAsync(0, header, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(HeaderSize, table, WriteFlags.None, cancellation).ConfigureAwait(false);
        if (isStatic)
            await file.ResizeAsync(HeaderSize + tableBytes + (blocks * BlockSize), Preallocation.Off, cancellation).ConfigureAwait(false);
        return await OpenAsync(file, cancellation).ConfigureAwait(false);
    }

    private protected override (TableState State, long Host) Locate(long block)
    {
        uint entry = Volatile.Read(ref _table[block]);
        if (entry == Absent)
            return (TableState.Absent, 0);
        return entry == Discarded ? (TableState.Zero, 0) : (TableState.Present, _dataOffset + ((long)entry * BlockSize));
    }

    private protected override ValueTask<long> ReserveAsync(long block, CancellationToken cancellation) =>
        _allocated < MostBlocks ? new(_dataOffset + ((long)_allocated * BlockSize))
            : throw BlockException.Corrupt($"{FileName} says that it holds {_allocated} blocks, more than an image may have");

    private protected override async ValueTask CommitAsync(long block, long host, CancellationToken cancellation)
    {
        uint entry = (uint)((host - _dataOffset) / BlockSize);
        byte[] bytes = new byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, entry);
        await File.WriteAsync(_tableOffset + (block * 4), bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
        _allocated++;
        BinaryPrimitives.WriteUInt32LittleEndian(_header.AsSpan(0x184), _allocated);
        await File.WriteAsync(0x184, _header.AsMemory(0x184, 4), WriteFlags.None, cancellation).ConfigureAwait(false);
        Volatile.Write(ref _table[block], entry);
    }
}
