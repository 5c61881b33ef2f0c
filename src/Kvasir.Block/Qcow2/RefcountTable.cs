using System;
using System.Buffers;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Qcow2;

/// <summary>
/// The reference counts of a qcow2 file's clusters and the allocator on top of them. Used with the image's metadata lock held.
/// Increments go to the cache at once; decrements are kept back until the tables that dropped the reference are stable (see
/// <see cref="Qcow2Image"/>), so a cluster is never reused while something on disk still points to it.
/// </summary>
internal sealed class RefcountTable
{
    private TableSlice? _last;
    private const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;
    private const long LargestOffset = 1L << 56;

    // Configuration
    private readonly BlockNode _file;
    private readonly Qcow2Header _header;
    private readonly int _clusterBits;
    private readonly int _order;
    private readonly int _blockShift;
    private readonly TableCache _cache;

    // State
    private readonly List<(long Cluster, long Count)> _pendingFrees = [];
    private int _elderFrees;
    private readonly SortedSet<int> _dirtyEntries = [];
    private ulong[] _table;
    private bool _tableMoved;
    private long _freeHint;
    private long _freeByte;

    public RefcountTable(BlockNode file, Qcow2Header header, ulong[] table, long cacheBytes)
    {
        _file = file;
        _header = header;
        _table = table;
        _clusterBits = header.ClusterBits;
        _order = header.RefcountOrder;
        _blockShift = _clusterBits + 3 - _order;
        _cache = new TableCache(file, Math.Min(header.ClusterSize, 4096), cacheBytes);
        AllocatedEnd = RoundUp(file.Length);
    }

    /// <summary>No allocation has gone past this byte yet: what is after it in a growable file reads as zeros.</summary>
    public long AllocatedEnd { get; private set; }

    /// <summary>Take a damaged table entry for an absent block rather than fail (check).</summary>
    public bool Tolerant { get; init; }

    public bool HasDirty => _cache.HasDirty || _dirtyEntries.Count > 0 || _tableMoved;

    public bool HasNewBlocks => _dirtyEntries.Count > 0 || _tableMoved;

    public bool HasPendingFrees => _pendingFrees.Count > 0;

    public int PendingFreeRuns => _pendingFrees.Count;

    public ReadOnlySpan<ulong> Table => _table;

    public ulong LargestCount => _order == 6 ? ulong.MaxValue : (1ul << (1 << _order)) - 1;

    /// <summary>Clusters of the refcount structures themselves, for the overlap check.</summary>
    public HashSet<long> MetadataClusters { get; } = [];

    public static async ValueTask<ulong[]> LoadTableAsync(BlockNode file, Qcow2Header header, CancellationToken cancellation)
    {
        int length = header.RefcountTableClusters << header.ClusterBits;
        byte[] bytes = ArrayPool<byte>.Shared.Rent(length);
        try
        {
            await file.ReadAsync(header.RefcountTableOffset, bytes.AsMemory(0, length), cancellation).ConfigureAwait(false);
            ulong[] table = new ulong[length / 8];
            BinaryPrimitives.ReverseEndianness(MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan(0, length)), table);
            return table;
        }
        finally
        {
            ArrayPool<byte>.Shared.Return(bytes);
        }
    }

    public void RegisterMetadata()
    {
        for (long i = 0; i < _header.RefcountTableClusters; i++)
            MetadataClusters.Add((_header.RefcountTableOffset >> _clusterBits) + i);
        foreach (ulong entry in _table)
        {
            if ((entry & OffsetMask) != 0)
                MetadataClusters.Add((long)(entry & OffsetMask) >> _clusterBits);
        }
    }

    /// <summary>A cluster's count as the file will have it, pending frees not yet taken off.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<ulong> GetAsync(long cluster, CancellationToken cancellation)
    {
        long block = cluster >> _blockShift;
        if (block >= _table.Length || (_table[block] & OffsetMask) == 0)
            return 0;
        if (Tolerant && ((long)_table[block] & ((1L << _clusterBits) - 1)) != 0)
            return 0;
        TableSlice slice = await SliceAsync(cluster, cancellation).ConfigureAwait(false);
        return Read(slice.Data, IndexInSlice(cluster));
    }

    /// <summary>A count, if its block is in memory or there is none.</summary>
    public bool TryGetCached(long cluster, out ulong value)
    {
        value = 0;
        long block = cluster >> _blockShift;
        if (block >= _table.Length || (_table[block] & OffsetMask) == 0)
            return true;
        long place = (long)(_table[block] & OffsetMask);
        if ((place & ((1L << _clusterBits) - 1)) != 0)
            return false;
        long byteInBlock = ((cluster & ((1L << _blockShift) - 1)) << _order) >> 3;
        long offset = place + (byteInBlock & ~(_cache.SliceSize - 1L));
        if (_last?.Offset != offset && !_cache.TryGet(offset, out _last))
            return false;
        value = Read(_last!.Data, IndexInSlice(cluster));
        return true;
    }

    /// <summary>Adds one reference to each of <paramref name="count"/> clusters.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask AddAsync(long cluster, long count, CancellationToken cancellation)
    {
        await EnsureBlocksAsync(cluster, count, cancellation).ConfigureAwait(false);
        for (long i = 0; i < count; i++)
        {
            TableSlice slice = await SliceAsync(cluster + i, cancellation).ConfigureAwait(false);
            int index = IndexInSlice(cluster + i);
            ulong value = Read(slice.Data, index);
            if (value == LargestCount)
                throw new BlockException($"The reference count of cluster {cluster + i} would overflow", BlockErrno.Invalid);
            Write(slice.Data, index, value + 1);
            _cache.MarkDirty(slice);
        }
        AllocatedEnd = Math.Max(AllocatedEnd, (cluster + count) << _clusterBits);
    }

    /// <summary>Sets a count outright (repair).</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask SetAsync(long cluster, ulong value, CancellationToken cancellation)
    {
        await EnsureBlocksAsync(cluster, 1, cancellation).ConfigureAwait(false);
        TableSlice slice = await SliceAsync(cluster, cancellation).ConfigureAwait(false);
        Write(slice.Data, IndexInSlice(cluster), value);
        _cache.MarkDirty(slice);
        if (value == 0)
            _freeHint = Math.Min(_freeHint, cluster);
    }

    /// <summary>Allocates clusters in one run and returns its first byte.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<long> AllocateAsync(long count, CancellationToken cancellation)
    {
        while (true)
        {
            long first = await FindFreeAsync(count, _freeHint, cancellation).ConfigureAwait(false);
            if ((first + count) << _clusterBits >= LargestOffset)
                throw new BlockException("The image file has reached its largest size", BlockErrno.FileTooBig);
            if (!HasBlocks(first, count))
            {
                // New blocks may have taken clusters of the run: look again.
                await EnsureBlocksAsync(first, count, cancellation).ConfigureAwait(false);
                continue;
            }
            await AddAsync(first, count, cancellation).ConfigureAwait(false);
            if (count == 1 || first == _freeHint)
                _freeHint = first + count;
            return first << _clusterBits;
        }
    }

    /// <summary>Allocates bytes for a compressed cluster, several of which share a host cluster.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<long> AllocateBytesAsync(int size, CancellationToken cancellation)
    {
        int clusterSize = 1 << _clusterBits;
        if (_freeByte != 0)
        {
            long cluster = _freeByte >> _clusterBits;
            int used = (int)(_freeByte & (clusterSize - 1));
            if (await GetAsync(cluster, cancellation).ConfigureAwait(false) < LargestCount && used + size <= clusterSize)
            {
                await AddAsync(cluster, 1, cancellation).ConfigureAwait(false);
                long at = _freeByte;
                _freeByte = used + size == clusterSize ? 0 : _freeByte + size;
                return at;
            }
        }
        long fresh = await AllocateAsync(1, cancellation).ConfigureAwait(false);
        long start = fresh;
        if (_freeByte != 0 && RoundUp(_freeByte) == fresh && await GetAsync(_freeByte >> _clusterBits, cancellation).ConfigureAwait(false) < LargestCount)
        {
            // The new cluster follows the half-full one: the data spans both.
            await AddAsync(_freeByte >> _clusterBits, 1, cancellation).ConfigureAwait(false);
            start = _freeByte;
        }
        _freeByte = start + size;
        if ((_freeByte & (clusterSize - 1)) == 0)
            _freeByte = 0;
        return start;
    }

    /// <summary>Takes one reference off each cluster of a byte range, once what dropped it is stable.</summary>
    public void FreeLater(long offset, long length)
    {
        long first = offset >> _clusterBits;
        long count = ((offset + length + (1L << _clusterBits) - 1) >> _clusterBits) - first;
        if (_pendingFrees.Count > _elderFrees && _pendingFrees[^1] is (long cluster, long run) && cluster + run == first)
            _pendingFrees[^1] = (cluster, run + count);
        else
            _pendingFrees.Add((first, count));
    }

    /// <summary>Takes an allocation back that nothing on disk ever pointed to.</summary>
    public ValueTask FreeNowAsync(long offset, long count, CancellationToken cancellation) =>
        DecrementAsync(offset >> _clusterBits, count, null, cancellation);

    /// <summary>The frees that are pending now are elder ones from here on.</summary>
    public void AgeFrees() => _elderFrees = _pendingFrees.Count;

    /// <summary>Applies pending frees, and reports each run of clusters that became free.</summary>
    /// <param name="all">Not only the elder ones.</param>
    /// <param name="freed">Gets first byte and length of each run.</param>
    /// <param name="cancellation">Ends it early.</param>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask ApplyFreesAsync(bool all, Action<long, long>? freed, CancellationToken cancellation)
    {
        (long Cluster, long Count)[] frees = all ? [.. _pendingFrees] : [.. _pendingFrees[.._elderFrees]];
        _pendingFrees.RemoveRange(0, frees.Length);
        _elderFrees = 0;
        foreach ((long cluster, long count) in frees)
            await DecrementAsync(cluster, count, freed, cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes the count blocks, but not yet the table's entries for new ones.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask WriteBlocksAsync(CancellationToken cancellation)
    {
        if (_tableMoved)
            await PlaceTableAsync(cancellation).ConfigureAwait(false);
        await _cache.WriteBackAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes the table. True: it moved, and the header must now point to it.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<bool> WriteTableAsync(CancellationToken cancellation)
    {
        if (_tableMoved)
        {
            byte[] bytes = new byte[_table.Length * 8];
            BinaryPrimitives.ReverseEndianness(_table, MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()));
            await _file.WriteAsync(_header.RefcountTableOffset, bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
            _dirtyEntries.Clear();
            _tableMoved = false;
            return true;
        }
        byte[] entry = new byte[8];
        foreach (int index in _dirtyEntries)
        {
            BinaryPrimitives.WriteUInt64BigEndian(entry, _table[index]);
            await _file.WriteAsync(_header.RefcountTableOffset + (index * 8L), entry, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        _dirtyEntries.Clear();
        return false;
    }

    private static long Advance(long value, long unit) => (value + unit) & ~(unit - 1);

    private long RoundUp(long offset) => (offset + (1L << _clusterBits) - 1) & ~((1L << _clusterBits) - 1);

    private int IndexInSlice(long cluster)
    {
        int entriesPerSlice = (_cache.SliceSize << 3) >> _order;
        return (int)(cluster & (entriesPerSlice - 1));
    }

    private ulong Read(byte[] data, int index) => _order switch
    {
        6 => BinaryPrimitives.ReadUInt64BigEndian(data.AsSpan(index * 8)),
        5 => BinaryPrimitives.ReadUInt32BigEndian(data.AsSpan(index * 4)),
        4 => BinaryPrimitives.ReadUInt16BigEndian(data.AsSpan(index * 2)),
        3 => data[index],
        _ => (ulong)(data[(index << _order) >> 3] >> ((index << _order) & 7)) & LargestCount,
    };

    private void Write(byte[] data, int index, ulong value) => Store(data, index, _order, value);

    /// <summary>Puts a count of 1 &lt;&lt; order bits into a block.</summary>
    internal static void Store(byte[] data, int index, int order, ulong value)
    {
        switch (order)
        {
            case 6:
                BinaryPrimitives.WriteUInt64BigEndian(data.AsSpan(index * 8), value);
                break;
            case 5:
                BinaryPrimitives.WriteUInt32BigEndian(data.AsSpan(index * 4), (uint)value);
                break;
            case 4:
                BinaryPrimitives.WriteUInt16BigEndian(data.AsSpan(index * 2), (ushort)value);
                break;
            case 3:
                data[index] = (byte)value;
                break;
            default:
                int bit = index << order;
                int shift = bit & 7;
                int mask = (1 << (1 << order)) - 1;
                data[bit >> 3] = (byte)((data[bit >> 3] & ~(mask << shift)) | ((int)value << shift));
                break;
        }
    }

    private ValueTask<TableSlice> SliceAsync(long cluster, CancellationToken cancellation)
    {
        ulong entry = _table[cluster >> _blockShift];
        long block = (long)(entry & OffsetMask);
        if ((block & ((1L << _clusterBits) - 1)) != 0 || block == 0)
            throw BlockException.Corrupt($"Refblock offset 0x{block:x} unaligned (reftable index: 0x{cluster >> _blockShift:x})");
        long byteInBlock = ((cluster & ((1L << _blockShift) - 1)) << _order) >> 3;
        long offset = block + (byteInBlock & ~(_cache.SliceSize - 1L));
        if (_cache.TryGet(offset, out TableSlice? slice))
            return new ValueTask<TableSlice>(slice!);
        return LoadAsync(offset, cancellation);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<TableSlice> LoadAsync(long offset, CancellationToken cancellation)
    {
        // Count blocks may reach the disk at any time: they hold increments nothing uses yet, and decrements of what is gone.
        if (_cache.NeedsFlush)
            await _cache.WriteBackAsync(cancellation).ConfigureAwait(false);
        return await _cache.LoadAsync(offset, cancellation).ConfigureAwait(false);
    }

    /// <summary>The first run of free clusters from <paramref name="from"/> on. Areas without a count block are free.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<long> FindFreeAsync(long count, long from, CancellationToken cancellation)
    {
        long run = 0;
        long cluster = from;
        while (run < count)
        {
            long block = cluster >> _blockShift;
            if (block >= _table.Length)
            {
                run += count;
                cluster += count;
                continue;
            }
            if ((_table[block] & OffsetMask) == 0)
            {
                long next = Advance(cluster, 1L << _blockShift);
                run += next - cluster;
                cluster = next;
                continue;
            }
            TableSlice slice = await SliceAsync(cluster, cancellation).ConfigureAwait(false);
            int entries = (_cache.SliceSize << 3) >> _order;
            for (int index = IndexInSlice(cluster); index < entries && run < count; index++, cluster++)
                run = Read(slice.Data, index) == 0 ? run + 1 : 0;
        }
        return cluster - run;
    }

    private bool HasBlocks(long first, long count)
    {
        for (long block = first >> _blockShift; block <= (first + count - 1) >> _blockShift; block++)
        {
            if (block >= _table.Length || (_table[block] & OffsetMask) == 0)
                return false;
        }
        return true;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask EnsureBlocksAsync(long first, long count, CancellationToken cancellation)
    {
        for (long block = (first + count - 1) >> _blockShift; block >= first >> _blockShift; block--)
        {
            if (block >= _table.Length || (_table[block] & OffsetMask) == 0)
                await CreateBlockAsync(block, first + count, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>Gives a stretch of clusters its count block, put at or after <paramref name="from"/>.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask CreateBlockAsync(long block, long from, CancellationToken cancellation)
    {
        long place;
        while (true)
        {
            place = await FindFreeAsync(1, from, cancellation).ConfigureAwait(false);
            long owner = place >> _blockShift;
            if (owner == block || (owner < _table.Length && (_table[owner] & OffsetMask) != 0))
                break;
            // The place lies in a stretch that has no block either: that one goes first, and counts itself.
            await CreateBlockAsync(owner, place, cancellation).ConfigureAwait(false);
            from = place + 1;
        }
        if (block >= _table.Length)
            GrowTable(block);
        long offset = place << _clusterBits;
        for (long at = 0; at < 1L << _clusterBits; at += _cache.SliceSize)
        {
            if (_cache.NeedsFlush)
                await _cache.WriteBackAsync(cancellation).ConfigureAwait(false);
            _ = _cache.Create(offset + at);
        }
        _table[block] = (ulong)offset;
        _dirtyEntries.Add((int)block);
        MetadataClusters.Add(place);
        TableSlice slice = await SliceAsync(place, cancellation).ConfigureAwait(false);
        Write(slice.Data, IndexInSlice(place), 1);
        _cache.MarkDirty(slice);
        AllocatedEnd = Math.Max(AllocatedEnd, (place + 1) << _clusterBits);
    }

    private void GrowTable(long block)
    {
        int perCluster = (1 << _clusterBits) / 8;
        long entries = Math.Max(block + 1, _table.Length + (_table.Length / 2L));
        entries = (entries + perCluster - 1) / perCluster * perCluster;
        if (entries * 8 > Qcow2Header.LargestRefcountTableBytes)
            throw new BlockException("The image's reference count table has reached its largest size", BlockErrno.FileTooBig);
        Array.Resize(ref _table, (int)entries);
        _tableMoved = true;
    }

    /// <summary>Finds the grown table a new home; the old one is freed once the header has let go of it.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask PlaceTableAsync(CancellationToken cancellation)
    {
        long perCluster = (1L << _clusterBits) / 8;
        long offset;
        long clusters;
        while (true)
        {
            clusters = (_table.Length + perCluster - 1) / perCluster;
            offset = await AllocateAsync(clusters, cancellation).ConfigureAwait(false);
            if ((_table.Length + perCluster - 1) / perCluster == clusters)
                break;
            await FreeNowAsync(offset, clusters, cancellation).ConfigureAwait(false);
        }
        FreeLater(_header.RefcountTableOffset, (long)_header.RefcountTableClusters << _clusterBits);
        for (long i = 0; i < _header.RefcountTableClusters; i++)
            MetadataClusters.Remove((_header.RefcountTableOffset >> _clusterBits) + i);
        for (long i = 0; i < clusters; i++)
            MetadataClusters.Add((offset >> _clusterBits) + i);
        _header.RefcountTableOffset = offset;
        _header.RefcountTableClusters = (int)clusters;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask DecrementAsync(long cluster, long count, Action<long, long>? freed, CancellationToken cancellation)
    {
        long runStart = -1;
        for (long i = cluster; i < cluster + count; i++)
        {
            long block = i >> _blockShift;
            ulong value = 0;
            TableSlice? slice = null;
            if (block < _table.Length && (_table[block] & OffsetMask) != 0)
            {
                slice = await SliceAsync(i, cancellation).ConfigureAwait(false);
                value = Read(slice.Data, IndexInSlice(i));
            }
            // A count of zero here means the image was inconsistent already; 'check' reports it, nothing is made worse.
            if (value > 0)
            {
                Write(slice!.Data, IndexInSlice(i), value - 1);
                _cache.MarkDirty(slice);
            }
            if (value != 1)
            {
                if (runStart >= 0)
                    freed?.Invoke(runStart << _clusterBits, (i - runStart) << _clusterBits);
                runStart = -1;
                continue;
            }
            _freeHint = Math.Min(_freeHint, i);
            if (_freeByte >> _clusterBits == i)
                _freeByte = 0;
            if (runStart < 0)
                runStart = i;
        }
        if (runStart >= 0)
            freed?.Invoke(runStart << _clusterBits, (cluster + count - runStart) << _clusterBits);
    }
}
