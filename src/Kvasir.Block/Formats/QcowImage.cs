using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>
/// The first version of QEMU's copy-on-write format; read-only. Two levels of tables as qcow2 has them, without reference counts; integers are big-endian.
/// </summary>
public sealed class QcowImage : BlockNode, IOverlayFormat
{
    private const uint Magic = 0x5146_49fb;
    private const int HeaderSize = 48;
    private const int LongestName = 1023;
    private const long LargestL1Bytes = 32 << 20;
    private const ulong CompressedFlag = 1ul << 63;
    private const int SectorSize = 512;
    private const int MostCachedTables = 64;

    private readonly int _clusterBits;
    private readonly int _l2Bits;
    private readonly ulong[] _l1;
    private readonly SectorCipher? _cipher;
    private readonly Qcow2Codec _codec = new(Qcow2Compression.Zlib);
    private readonly Dictionary<ulong, ulong[]> _tables = [];
    private BlockNode? _backing;

    private QcowImage(BlockNode file, int clusterBits, int l2Bits, ulong[] l1, long size, bool encrypted, SectorCipher? cipher, string? backing)
    {
        File = file;
        _clusterBits = clusterBits;
        _l2Bits = l2Bits;
        _l1 = l1;
        _cipher = cipher;
        Length = size;
        IsEncrypted = encrypted;
        BackingFileName = backing;
    }

    public override string Driver => "qcow";

    public override BlockNode File { get; }

    public override BlockNode? Backing => _backing;

    public override long Length { get; }

    public override int ClusterSize => 1 << _clusterBits;

    public override int RequestAlignment => IsEncrypted ? SectorSize : 1;

    public override bool IsReadOnly => true;

    public bool IsEncrypted { get; }

    public string? BackingFileName { get; }

    /// <summary>The header has no place for it.</summary>
    public string? BackingFormat => null;

    public static bool Probe(ReadOnlySpan<byte> start) =>
        start.Length >= HeaderSize && BinaryPrimitives.ReadUInt32BigEndian(start) == Magic && BinaryPrimitives.ReadUInt32BigEndian(start[4..]) == 1;

    public void SetBacking(BlockNode? backing) => _backing = backing;

    /// <summary>Opens an image.</summary>
    /// <param name="file">Where it lies; owned once this returns.</param>
    /// <param name="passphrase">Of an encrypted image; null: its data cannot be read.</param>
    /// <param name="cancellation">Ends the opening early.</param>
    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<QcowImage> OpenAsync(BlockNode file, ReadOnlyMemory<byte>? passphrase, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        if (BinaryPrimitives.ReadUInt32BigEndian(header) != Magic)
            throw new BlockException("Image not in qcow format");
        uint version = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(4));
        if (version != 1)
            throw new BlockException($"qcow (v{version}) does not support qcow version {version}" + (version is 2 or 3 ? "\nTry qcow2 instead." : string.Empty), BlockErrno.NotSupported);
        ulong nameOffset = BinaryPrimitives.ReadUInt64BigEndian(header.AsSpan(8));
        uint nameLength = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(16));
        ulong size = BinaryPrimitives.ReadUInt64BigEndian(header.AsSpan(24));
        int clusterBits = header[32];
        int l2Bits = header[33];
        uint encryption = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(36));
        ulong l1Offset = BinaryPrimitives.ReadUInt64BigEndian(header.AsSpan(40));
        if (size is <= 1 or > long.MaxValue)
            throw new BlockException("Image size is too small (must be at least 2 bytes)", BlockErrno.Invalid);
        if (clusterBits is < 9 or > 16)
            throw new BlockException("Cluster size must be between 512 and 64k", BlockErrno.Invalid);
        if (l2Bits is < 6 or > 13)
            throw new BlockException("L2 table size must be between 512 and 64k", BlockErrno.Invalid);
        if (encryption > 1)
            throw new BlockException("invalid encryption method in qcow header", BlockErrno.Invalid);
        ulong entries = ((size - 1) >> (clusterBits + l2Bits)) + 1;
        if (entries > LargestL1Bytes / 8 || l1Offset > (ulong)file.Length || (ulong)file.Length - l1Offset < entries * 8)
            throw new BlockException("Image too large: its first table does not fit into the file", BlockErrno.Invalid);
        string? backing = null;
        if (nameOffset != 0 && nameLength != 0)
        {
            if (nameLength > LongestName || nameOffset > (ulong)file.Length || (ulong)file.Length - nameOffset < nameLength)
                throw new BlockException("Backing file name too long", BlockErrno.Invalid);
            byte[] name = new byte[nameLength];
            await file.ReadAsync((long)nameOffset, name, cancellation).ConfigureAwait(false);
            backing = Encoding.UTF8.GetString(name);
        }
        ulong[] l1 = await LoadAsync(file, (long)l1Offset, (int)entries, cancellation).ConfigureAwait(false);
        SectorCipher? cipher = encryption == 1 && passphrase is ReadOnlyMemory<byte> secret ? SectorCipher.LegacyAes(secret.Span) : null;
        return new QcowImage(file, clusterBits, l2Bits, l1, (long)size, encryption == 1, cipher, backing);
    }

    public override async ValueTask DisposeAsync()
    {
        _codec.Dispose();
        await base.DisposeAsync().ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            (ulong entry, long run) = await LocateAsync(offset, buffer.Length, cancellation).ConfigureAwait(false);
            Memory<byte> part = buffer[..(int)run];
            if (entry == 0)
            {
                await ReadBelowAsync(_backing, offset, part, cancellation).ConfigureAwait(false);
            }
            else if ((entry & CompressedFlag) != 0)
            {
                await ReadCompressedAsync(offset, entry, part, cancellation).ConfigureAwait(false);
            }
            else
            {
                SectorCipher? cipher = IsEncrypted ? _cipher ?? throw new BlockException("Parameter 'encrypt.key-secret' is required for cipher", BlockErrno.Access) : null;
                await File.ReadAsync((long)entry + (offset & (ClusterSize - 1)), part, cancellation).ConfigureAwait(false);
                cipher?.Decrypt((ulong)offset / SectorSize, part.Span);
            }
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        (ulong entry, long run) = await LocateAsync(offset, length, cancellation).ConfigureAwait(false);
        if (entry == 0)
            return new BlockStatus(run, _backing is null ? BlockFlags.Zero : BlockFlags.None);
        if ((entry & CompressedFlag) != 0)
            return new BlockStatus(run, BlockFlags.Data | BlockFlags.Allocated | BlockFlags.Compressed);
        return IsEncrypted
            ? new BlockStatus(run, BlockFlags.Data | BlockFlags.Allocated)
            : new BlockStatus(run, BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid, (long)entry + (offset & (ClusterSize - 1)));
    }

    private static async ValueTask<ulong[]> LoadAsync(BlockNode file, long offset, int entries, CancellationToken cancellation)
    {
        byte[] bytes = new byte[entries * 8];
        await file.ReadAsync(offset, bytes, cancellation).ConfigureAwait(false);
        ulong[] table = new ulong[entries];
        BinaryPrimitives.ReverseEndianness(MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()), table);
        return table;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadCompressedAsync(long offset, ulong entry, Memory<byte> buffer, CancellationToken cancellation)
    {
        int shift = 63 - _clusterBits;
        long host = (long)(entry & ((1ul << shift) - 1));
        int size = (int)((entry >> shift) & ((1ul << _clusterBits) - 1));
        if (host > File.Length - size)
            throw BlockException.Corrupt($"A compressed cluster of {FileName} is outside the file");
        using AlignedBuffer data = AlignedBuffer.Rent(Math.Max(size, 1));
        using AlignedBuffer cluster = AlignedBuffer.Rent(ClusterSize);
        await File.ReadAsync(host, data.Memory[..size], cancellation).ConfigureAwait(false);
        if (!_codec.Expand(data.Memory.Span[..size], cluster.Memory.Span[..ClusterSize]))
            throw BlockException.Corrupt($"The compressed cluster at 0x{host:x} of {FileName} is damaged");
        cluster.Memory.Slice((int)(offset & (ClusterSize - 1)), buffer.Length).CopyTo(buffer);
    }

    /// <summary>The table entry of a byte's cluster, 0 where there is none, and for how many bytes that holds.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<(ulong Entry, long Run)> LocateAsync(long offset, long length, CancellationToken cancellation)
    {
        long span = 1L << (_clusterBits + _l2Bits);
        ulong table = _l1[offset >> (_clusterBits + _l2Bits)];
        length = Math.Min(length, span - (offset & (span - 1)));
        if (table == 0)
            return (0, length);
        ulong[]? entries;
        lock (_tables)
            _tables.TryGetValue(table, out entries);
        if (entries is null)
        {
            if (table > (ulong)File.Length)
                throw BlockException.Corrupt($"A table of {FileName} is outside the file");
            entries = await LoadAsync(File, (long)table, 1 << _l2Bits, cancellation).ConfigureAwait(false);
            lock (_tables)
            {
                if (_tables.Count >= MostCachedTables)
                    _tables.Clear();
                _tables[table] = entries;
            }
        }
        int index = (int)((offset & (span - 1)) >> _clusterBits);
        ulong first = entries[index];
        long run = ClusterSize - (offset & (ClusterSize - 1));
        if ((first & CompressedFlag) != 0)
            return (first, Math.Min(run, length));
        if (first > (ulong)File.Length)
            throw BlockException.Corrupt($"A cluster of {FileName} is outside the file");
        for (ulong next = first; run < length && ++index < entries.Length; run += ClusterSize)
        {
            next += first == 0 ? 0 : (ulong)ClusterSize;
            if (entries[index] != next)
                break;
        }
        return (first, Math.Min(run, length));
    }
}
