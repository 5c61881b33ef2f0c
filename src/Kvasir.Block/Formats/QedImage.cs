using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Numerics;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>QEMU's former enhanced disk format (docs/interop/qed_spec.rst); read-only. Integers are little-endian.</summary>
public sealed class QedImage : BlockNode, IOverlayFormat
{
    private const uint Magic = 0x0044_4551;
    private const int HeaderSize = 64;
    private const ulong FeatureBacking = 1;
    private const ulong FeatureBackingRaw = 4;
    private const ulong KnownFeatures = 7;
    private const long ZeroCluster = 1;
    private const int MostCachedBytes = 32 << 20;

    private readonly int _clusterSize;
    private readonly int _entries;
    private readonly ulong[] _l1;
    private readonly Dictionary<ulong, ulong[]> _tables = [];
    private BlockNode? _backing;

    private QedImage(BlockNode file, int clusterSize, int entries, ulong[] l1, long size, string? backing, string? backingFormat)
    {
        File = file;
        _clusterSize = clusterSize;
        _entries = entries;
        _l1 = l1;
        Length = size;
        BackingFileName = backing;
        BackingFormat = backingFormat;
    }

    public override string Driver => "qed";

    public override BlockNode File { get; }

    public override BlockNode? Backing => _backing;

    public override long Length { get; }

    public override int ClusterSize => _clusterSize;

    /// <summary>What one table of the second level maps.</summary>
    internal long TableSpan => (long)_entries * _clusterSize;

    public override bool IsReadOnly => true;

    public string? BackingFileName { get; }

    public string? BackingFormat { get; }

    public static bool Probe(ReadOnlySpan<byte> start) => start.Length >= HeaderSize && BinaryPrimitives.ReadUInt32LittleEndian(start) == Magic;

    public void SetBacking(BlockNode? backing) => _backing = backing;

    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<QedImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        if (!Probe(header))
            throw new BlockException("Image not in QED format");
        uint clusterSize = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(4));
        uint tableSize = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(8));
        ulong features = BinaryPrimitives.ReadUInt64LittleEndian(header.AsSpan(16));
        long l1Offset = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(40));
        long size = BinaryPrimitives.ReadInt64LittleEndian(header.AsSpan(48));
        if ((features & ~KnownFeatures) != 0)
            throw new BlockException($"Unsupported QED features: {features & ~KnownFeatures:x}", BlockErrno.NotSupported);
        if (clusterSize is < 4096 or > 64 << 20 || !BitOperations.IsPow2(clusterSize) || tableSize is < 1 or > 16 || !BitOperations.IsPow2(tableSize) || (long)clusterSize * tableSize > 64 << 20)
            throw new BlockException("QED cluster or table size is out of range");
        int entries = (int)(clusterSize * tableSize / 8);
        Int128 most = (Int128)entries * entries * clusterSize;
        if (size < 0 || size % 512 != 0 || size > most || l1Offset < clusterSize || l1Offset % clusterSize != 0 || l1Offset > file.Length - (entries * 8L))
            throw new BlockException("QED disk size or table is out of range");
        string? backing = null;
        if ((features & FeatureBacking) != 0)
        {
            uint offset = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(56));
            uint length = BinaryPrimitives.ReadUInt32LittleEndian(header.AsSpan(60));
            if (length is 0 or > 1023 || offset > file.Length - length)
                throw new BlockException("QED backing file name is out of range");
            byte[] name = new byte[length];
            await file.ReadAsync(offset, name, cancellation).ConfigureAwait(false);
            backing = Encoding.UTF8.GetString(name);
        }
        ulong[] l1 = await LoadAsync(file, l1Offset, entries, cancellation).ConfigureAwait(false);
        return new QedImage(file, (int)clusterSize, entries, l1, size, backing, (features & FeatureBackingRaw) != 0 ? "raw" : null);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            (long host, long run) = await LocateAsync(offset, buffer.Length, cancellation).ConfigureAwait(false);
            Memory<byte> part = buffer[..(int)run];
            if (host > ZeroCluster)
            {
                await File.ReadAsync(host, part, cancellation).ConfigureAwait(false);
            }
            else
            {
                await ReadBelowAsync(host == 0 ? _backing : null, offset, part, cancellation).ConfigureAwait(false);
            }
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        (long host, long run) = await LocateAsync(offset, length, cancellation).ConfigureAwait(false);
        return host switch
        {
            0 => new BlockStatus(run, _backing is null ? BlockFlags.Zero : BlockFlags.None),
            ZeroCluster => new BlockStatus(run, BlockFlags.Zero | BlockFlags.Allocated),
            _ => new BlockStatus(run, BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid, host),
        };
    }

    private static async ValueTask<ulong[]> LoadAsync(BlockNode file, long offset, int entries, CancellationToken cancellation)
    {
        byte[] bytes = new byte[entries * 8];
        await file.ReadAsync(offset, bytes, cancellation).ConfigureAwait(false);
        ulong[] table = new ulong[entries];
        MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()).CopyTo(table);
        return table;
    }

    /// <summary>Where a byte lies: 0 nowhere, 1 zeros, else its place; and for how many bytes that holds.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<(long Host, long Run)> LocateAsync(long offset, long length, CancellationToken cancellation)
    {
        long span = (long)_entries * _clusterSize;
        ulong table = _l1[offset / span];
        length = Math.Min(length, span - (offset % span));
        if (table == 0)
            return (0, length);
        ulong[]? entries;
        lock (_tables)
            _tables.TryGetValue(table, out entries);
        if (entries is null)
        {
            if (table > (ulong)File.Length || table % (uint)_clusterSize != 0)
                throw BlockException.Corrupt($"A table of {FileName} is outside the file");
            entries = await LoadAsync(File, (long)table, _entries, cancellation).ConfigureAwait(false);
            lock (_tables)
            {
                if (_tables.Count >= Math.Max(1, MostCachedBytes / (_entries * sizeof(ulong))))
                    _tables.Clear();
                _tables[table] = entries;
            }
        }
        long index = offset % span / _clusterSize;
        long within = offset % _clusterSize;
        long first = (long)entries[index];
        long run = _clusterSize - within;
        if (first < 0 || (first > ZeroCluster && first > File.Length))
            throw BlockException.Corrupt($"A cluster of {FileName} is outside the file");
        while (run < length && ++index < _entries && (long)entries[index] == (first > ZeroCluster ? first + run + within : first))
            run += _clusterSize;
        return (first > ZeroCluster ? first + within : first, Math.Min(run, length));
    }
}
