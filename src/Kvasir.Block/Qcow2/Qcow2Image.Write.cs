using System;
using System.Buffers.Binary;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Qcow2;

/// <summary>Writes, zeroes, discards: everything that changes where guest data lies.</summary>
public sealed partial class Qcow2Image
{
    private const int LargestCipherPart = 1 << 20;

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        if (flags == WriteFlags.None && !_corrupt && _tracker is null && _header.Encryption == Qcow2Encryption.None && TryFindInPlace(offset, buffer.Length, out long host, out int generation))
            return WriteInPlaceAsync(host, buffer, generation, cancellation);
        return WriteRunsAsync(offset, buffer, flags, cancellation);
    }

    private ValueTask WriteInPlaceAsync(long host, ReadOnlyMemory<byte> buffer, int generation, CancellationToken cancellation)
    {
        ValueTask write;
        try
        {
            write = DataNode.WriteAsync(host, buffer, WriteFlags.None, cancellation);
        }
        catch
        {
            _inPlaceWrites.End(generation);
            throw;
        }
        if (!write.IsCompletedSuccessfully)
            return EndInPlaceAsync(write, generation);
        write.GetAwaiter().GetResult();
        _inPlaceWrites.End(generation);
        return default;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask EndInPlaceAsync(ValueTask write, int generation)
    {
        try
        {
            await write.ConfigureAwait(false);
        }
        finally
        {
            _inPlaceWrites.End(generation);
        }
    }

    /// <summary>Where a write goes that lies in one run of clusters of the image's own, whose table is in memory. Where there is a place, the write counts as begun.</summary>
    private bool TryFindInPlace(long offset, long length, out long host, out int generation)
    {
        host = 0;
        generation = 0;
        if (!_lock.TryEnter())
            return false;
        try
        {
            long l1Index = offset >> (_l2Bits + _clusterBits);
            if (l1Index >= _l1.Length || (_l1[l1Index] & CopiedFlag) == 0 || !TrySlice(offset, out TableSlice? slice))
                return false;
            Mapping mapping = MapInSlice(slice!, offset, length);
            host = mapping.Host;
            if (mapping is not { Kind: Kind.Normal, Copied: true } || mapping.Length != length || HitsMetadata(host, length))
                return false;
            generation = _inPlaceWrites.Begin();
            return true;
        }
        finally
        {
            _lock.Exit();
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteRunsAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        FailIfCorrupt();
        // The VM state past the disk's end is nothing that a backup wants.
        if (_tracker is not null && offset < Length)
            await _tracker.RecordAsync(offset, buffer.Length).ConfigureAwait(false);
        if ((flags & WriteFlags.Compressed) != 0)
        {
            await WriteCompressedAsync(offset, buffer, cancellation).ConfigureAwait(false);
            buffer = default;
        }
        while (!buffer.IsEmpty)
        {
            long wanted = _cipher is null ? buffer.Length : Math.Min(buffer.Length, LargestCipherPart);
            WritePlan plan;
            int generation = 0;
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                plan = await PlanWriteAsync(offset, wanted, cancellation).ConfigureAwait(false);
                if (plan.Length != 0 && !plan.NeedsLink)
                    generation = _inPlaceWrites.Begin();
            }
            finally
            {
                _lock.Exit();
            }
            if (plan.Length == 0)
            {
                // Another request is giving these clusters their place: look again when it is done.
                await _allocating.AcquireAsync(plan.First, plan.Last).ConfigureAwait(false);
                _allocating.Release(plan.First, plan.Last);
                continue;
            }
            ReadOnlyMemory<byte> part = buffer[..(int)plan.Length];
            if (!plan.NeedsLink)
                await EndInPlaceAsync(WriteHostAsync(offset, plan.Host, part, flags, cancellation), generation).ConfigureAwait(false);
            else
                await WriteAndLinkAsync(offset, part, plan, flags, cancellation).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
        if ((flags & WriteFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        FailIfCorrupt();
        if (_tracker is not null)
            await _tracker.RecordAsync(offset, length).ConfigureAwait(false);
        long unit = 1L << _subclusterBits;
        long end = offset + length;
        // The end of the disk may lie inside a cluster, whose rest is not the guest's.
        long aligned = (offset + unit - 1) & ~(unit - 1);
        long stop = end == Length ? (end + unit - 1) & ~(unit - 1) : end & ~(unit - 1);
        if (stop <= aligned || (_header.Version < 3 && _backing is not null))
        {
            await ZeroByDataAsync(offset, length, flags, cancellation).ConfigureAwait(false);
        }
        else
        {
            if (aligned > offset)
                await ZeroByDataAsync(offset, aligned - offset, flags, cancellation).ConfigureAwait(false);
            await ZeroUnitsAsync(aligned, stop, (flags & ZeroFlags.MayUnmap) != 0, cancellation).ConfigureAwait(false);
            if (end > stop)
                await ZeroByDataAsync(stop, end - stop, flags, cancellation).ConfigureAwait(false);
        }
        if ((flags & ZeroFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        FailIfCorrupt();
        // Version 2 cannot say that a cluster reads as zeros: without it, what the backing file had there once would show again.
        if (_header.Version < 3 && _backing is not null)
            return;
        if (_tracker is not null)
            await _tracker.RecordAsync(offset, length).ConfigureAwait(false);
        long end = offset + length;
        long start = (offset + _clusterSize - 1) & ~(_clusterSize - 1L);
        long stop = end == Length ? (end + _clusterSize - 1) & ~(_clusterSize - 1L) : end & ~(_clusterSize - 1L);
        await DropClustersAsync(start, stop, DropMode.Discard, cancellation).ConfigureAwait(false);
    }

    private enum DropMode
    {
        /// <summary>Guest's discard: reads as zeros afterwards where the image can say so.</summary>
        Discard,

        /// <summary>Zeros, space given back.</summary>
        Zero,

        /// <summary>As if never written; the backing file shows.</summary>
        Forget,
    }

    private void FailIfCorrupt()
    {
        if (_corrupt)
            throw BlockException.Corrupt($"{FileName} is marked corrupt; nothing is written to it any more");
        if (_header.Encryption == Qcow2Encryption.Luks && _cipher is null)
            throw new BlockException("Parameter 'encrypt.key-secret' is required for cipher", BlockErrno.Access);
    }

    /// <summary>Decides where the start of a write goes, allocating if need be. Metadata lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<WritePlan> PlanWriteAsync(long offset, long length, CancellationToken cancellation)
    {
        long l1Index = offset >> (_l2Bits + _clusterBits);
        if (l1Index >= _l1.Length)
            throw new BlockException($"write at 0x{offset:x} is outside the image's L1 table", BlockErrno.Io);
        bool writableTable = (_l1[l1Index] & CopiedFlag) != 0 && (_l1[l1Index] & OffsetMask) != 0;
        Mapping mapping = new(Kind.Unallocated, 0, length, 0, false);
        if ((_l1[l1Index] & OffsetMask) != 0)
        {
            TableSlice current = await L2SliceAsync(offset, cancellation).ConfigureAwait(false);
            mapping = MapInSlice(current, offset, length);
            if (writableTable && mapping is { Kind: Kind.Normal, Copied: true })
            {
                await CheckOverlapAsync(mapping.Host, mapping.Length).ConfigureAwait(false);
                return new WritePlan(mapping.Host, mapping.Length, 0, 0, false, false, false);
            }
        }
        // The run of clusters to give a place ends with the L2 slice at the latest.
        long sliceSpan = (long)(_l2Cache.SliceSize / _entryBytes) << _clusterBits;
        long sliceEnd = (offset & ~(sliceSpan - 1)) + sliceSpan;
        length = Math.Min(length, sliceEnd - offset);
        long first = offset & ~(_clusterSize - 1L);
        bool inPlace = mapping.Copied && mapping.Kind is Kind.ZeroReserved or Kind.UnallocatedReserved && (mapping.Entry & CopiedFlag) != 0;
        if (inPlace || (mapping.Copied && HasPlace(mapping.Kind)))
        {
            // The cluster has a place of its own; only its (sub)clusters' flags change.
            length = Math.Min(mapping.Length, _header.HasExtendedL2 ? _clusterSize - (offset & (_clusterSize - 1)) : mapping.Length);
            long lastInPlace = (offset + length + _clusterSize - 1) & ~(_clusterSize - 1L);
            if (!_allocating.TryAcquire(first, lastInPlace))
                return new WritePlan(0, 0, first, lastInPlace, false, false, false);
            try
            {
                await MakeTableWritableAsync(l1Index, cancellation).ConfigureAwait(false);
                await CheckOverlapAsync(mapping.Host, length).ConfigureAwait(false);
            }
            catch
            {
                _allocating.Release(first, lastInPlace);
                throw;
            }
            return new WritePlan(mapping.Host, length, first, lastInPlace, true, false, true);
        }
        length = await AllocatableAsync(offset, length, mapping, cancellation).ConfigureAwait(false);
        long last = (offset + length + _clusterSize - 1) & ~(_clusterSize - 1L);
        if (!_allocating.TryAcquire(first, last))
            return new WritePlan(0, 0, first, last, false, false, false);
        try
        {
            await MarkDirtyAsync(cancellation).ConfigureAwait(false);
            await MakeTableWritableAsync(l1Index, cancellation).ConfigureAwait(false);
            if (_dataFile is not null)
            {
                // There a cluster comes back to the place where it was: what waits to be discarded must not take the new data with it.
                for (long cluster = first; cluster < last && _dataDiscards.Count > 0; cluster += _clusterSize)
                    _dataDiscards.Remove(cluster);
                return new WritePlan(offset, length, first, last, true, false, false);
            }
            long end = _refcounts.AllocatedEnd;
            long host = await _refcounts.AllocateAsync((last - first) >> _clusterBits, cancellation).ConfigureAwait(false);
            bool untouched = host >= end && _file.IsGrowable;
            return new WritePlan(host + (offset - first), length, first, last, true, untouched, false);
        }
        catch
        {
            _allocating.Release(first, last);
            throw;
        }
    }

    /// <summary>How much of a write needs new clusters: up to the next cluster that can be written where it is.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<long> AllocatableAsync(long offset, long length, Mapping first, CancellationToken cancellation)
    {
        long l1Index = offset >> (_l2Bits + _clusterBits);
        if ((_l1[l1Index] & OffsetMask) == 0)
            return length;
        TableSlice slice = await L2SliceAsync(offset, cancellation).ConfigureAwait(false);
        long total = Math.Min(length, _clusterSize - (offset & (_clusterSize - 1)));
        _ = first;
        while (total < length)
        {
            long next = offset + total;
            Kind kind = KindAt(slice, IndexInSlice(next), next, out ulong entry);
            if (HasPlace(kind) && (entry & CopiedFlag) != 0)
                break;
            total += Math.Min(_clusterSize, length - total);
        }
        return total;
    }

    /// <summary>Writes data with what surrounds it in its new clusters, then points the L2 entries at them.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteAndLinkAsync(long offset, ReadOnlyMemory<byte> data, WritePlan plan, WriteFlags flags, CancellationToken cancellation)
    {
        bool linked = false;
        try
        {
            long unit = 1L << _subclusterBits;
            long start = offset & ~(unit - 1);
            long end = (offset + data.Length + unit - 1) & ~(unit - 1);
            await WriteWithSurroundingsAsync(offset, data, plan, start, end, flags, cancellation).ConfigureAwait(false);
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                await LinkAsync(start, end, plan, cancellation).ConfigureAwait(false);
                linked = true;
            }
            finally
            {
                _lock.Exit();
            }
        }
        finally
        {
            if (!linked && !plan.InPlace && _dataFile is null)
                await TakeBackAsync(plan).ConfigureAwait(false);
            _allocating.Release(plan.First, plan.Last);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask TakeBackAsync(WritePlan plan)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            long host = plan.Host & ~(_clusterSize - 1L);
            await _refcounts.FreeNowAsync(host, (plan.Last - plan.First) >> _clusterBits, CancellationToken.None).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteWithSurroundingsAsync(
        long offset, ReadOnlyMemory<byte> data, WritePlan plan, long start, long end, WriteFlags flags, CancellationToken cancellation)
    {
        int head = (int)(offset - start);
        int tail = (int)(end - offset - data.Length);
        if (head + tail == 0 || (plan.Untouched && await SurroundingsAreZeroAsync(start, head, offset + data.Length, tail, cancellation).ConfigureAwait(false)))
        {
            await WriteHostAsync(offset, plan.Host, data, flags, cancellation).ConfigureAwait(false);
            return;
        }
        long host = plan.Host - head;
        using AlignedBuffer buffer = AlignedBuffer.Rent(Math.Max(head + data.Length + tail, 1));
        if (head + (long)data.Length + tail <= 1 << 20)
        {
            Memory<byte> whole = buffer.Memory[..(head + data.Length + tail)];
            await ReadOldAsync(start, whole[..head], cancellation).ConfigureAwait(false);
            data.CopyTo(whole[head..]);
            await ReadOldAsync(offset + data.Length, whole[(head + data.Length)..], cancellation).ConfigureAwait(false);
            await WriteHostAsync(start, host, whole, flags, cancellation).ConfigureAwait(false);
            return;
        }
        if (head > 0)
        {
            await ReadOldAsync(start, buffer.Memory[..head], cancellation).ConfigureAwait(false);
            await WriteHostAsync(start, host, buffer.Memory[..head], flags, cancellation).ConfigureAwait(false);
        }
        await WriteHostAsync(offset, plan.Host, data, flags, cancellation).ConfigureAwait(false);
        if (tail > 0)
        {
            await ReadOldAsync(offset + data.Length, buffer.Memory[..tail], cancellation).ConfigureAwait(false);
            await WriteHostAsync(offset + data.Length, plan.Host + data.Length, buffer.Memory[..tail], flags, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>What the guest sees now around a write, also past the end of the disk, where only zeros are.</summary>
    private ValueTask ReadOldAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) =>
        buffer.IsEmpty ? default : ReadCoreAsync(offset, buffer, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<bool> SurroundingsAreZeroAsync(long headOffset, int head, long tailOffset, int tail, CancellationToken cancellation)
    {
        // Ciphertext of zeros is not zeros.
        if (_cipher is not null)
            return false;
        return (head == 0 || await ReadsZeroAsync(headOffset, head, cancellation).ConfigureAwait(false))
            && (tail == 0 || await ReadsZeroAsync(tailOffset, tail, cancellation).ConfigureAwait(false));
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<bool> ReadsZeroAsync(long offset, long length, CancellationToken cancellation)
    {
        while (length > 0)
        {
            Mapping mapping;
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                mapping = await FindAsync(offset, length, cancellation).ConfigureAwait(false);
            }
            finally
            {
                _lock.Exit();
            }
            switch (mapping.Kind)
            {
                case Kind.Zero or Kind.ZeroReserved:
                    break;
                case Kind.Unallocated or Kind.UnallocatedReserved:
                    if (_backing is not null && offset < _backing.Length)
                    {
                        BlockStatus status = await _backing.StatusAsync(offset, mapping.Length, cancellation).ConfigureAwait(false);
                        if (!status.IsZero || status.Length < Math.Min(mapping.Length, _backing.Length - offset))
                            return false;
                    }
                    break;
                default:
                    return false;
            }
            offset += mapping.Length;
            length -= mapping.Length;
        }
        return true;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteHostAsync(long guest, long host, ReadOnlyMemory<byte> data, WriteFlags flags, CancellationToken cancellation)
    {
        // A forced write needs the tables as well: the flush at the request's end takes both.
        _ = flags;
        if (_cipher is null)
        {
            await DataNode.WriteAsync(host, data, WriteFlags.None, cancellation).ConfigureAwait(false);
            return;
        }
        using AlignedBuffer secret = AlignedBuffer.Rent(data.Length);
        Memory<byte> cipherText = secret.Memory[..data.Length];
        data.CopyTo(cipherText);
        _cipher.Encrypt(CipherSector(guest, host), cipherText.Span);
        await DataNode.WriteAsync(host, cipherText, WriteFlags.None, cancellation).ConfigureAwait(false);
    }

    /// <summary>Points the L2 entries of [start, end) at the plan's clusters. Metadata lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask LinkAsync(long start, long end, WritePlan plan, CancellationToken cancellation)
    {
        long hostBase = (plan.Host & ~(_clusterSize - 1L)) - plan.First;
        TableSlice slice = await L2SliceAsync(start, cancellation).ConfigureAwait(false);
        for (long cluster = start & ~(_clusterSize - 1L); cluster < end; cluster += _clusterSize)
        {
            int index = IndexInSlice(cluster);
            ulong old = BinaryPrimitives.ReadUInt64BigEndian(slice.Data.AsSpan(index * _entryBytes));
            ulong entry = (ulong)(hostBase + cluster) | CopiedFlag;
            BinaryPrimitives.WriteUInt64BigEndian(slice.Data.AsSpan(index * _entryBytes), entry);
            if (_header.HasExtendedL2)
            {
                ulong bitmap = (old & CompressedFlag) != 0 ? uint.MaxValue : BitmapAt(slice, index);
                ulong mask = SubclusterMask(Math.Max(start, cluster) - cluster, Math.Min(end, cluster + _clusterSize) - cluster);
                if (!plan.InPlace)
                {
                    // The write brought only its own subclusters along: the others that the old cluster stored follow now.
                    await CarrySubclustersAsync(cluster, old, bitmap, mask, hostBase + cluster, cancellation).ConfigureAwait(false);
                }
                BinaryPrimitives.WriteUInt64BigEndian(slice.Data.AsSpan((index * _entryBytes) + 8), (bitmap | mask) & ~(mask << 32));
            }
            _l2Cache.MarkDirty(slice);
            if (!plan.InPlace)
                FreeEntry(old);
        }
    }

    /// <summary>Copies the allocated subclusters that a new cluster takes over from its shared or compressed predecessor.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask CarrySubclustersAsync(long guest, ulong old, ulong bitmap, ulong written, long host, CancellationToken cancellation)
    {
        uint carry = (uint)bitmap & ~(uint)written;
        if (carry == 0)
            return;
        int unit = 1 << _subclusterBits;
        using AlignedBuffer buffer = AlignedBuffer.Rent(_clusterSize);
        if ((old & CompressedFlag) != 0)
        {
            (long from, int size) = CompressedExtent(old);
            using AlignedBuffer packed = AlignedBuffer.Rent(size);
            await _file.ReadAsync(from, packed.Memory[..size], cancellation).ConfigureAwait(false);
            if (!_codec.Expand(packed.Memory.Span[..size], buffer.Memory.Span[.._clusterSize]))
                throw BlockException.Corrupt($"The compressed cluster at 0x{from:x} of {FileName} is damaged");
        }
        else
        {
            long from = (long)(old & OffsetMask);
            await DataNode.ReadAsync(from, buffer.Memory[.._clusterSize], cancellation).ConfigureAwait(false);
            _cipher?.Decrypt(CipherSector(guest, from), buffer.Memory.Span[.._clusterSize]);
        }
        for (int i = 0; i < 32; i++)
        {
            if ((carry & (1u << i)) != 0)
                await WriteHostAsync(guest + ((long)i * unit), host + ((long)i * unit), buffer.Memory.Slice(i * unit, unit), WriteFlags.None, cancellation).ConfigureAwait(false);
        }
    }

    private ulong BitmapAt(TableSlice slice, int index) => BinaryPrimitives.ReadUInt64BigEndian(slice.Data.AsSpan((index * _entryBytes) + 8));

    private ulong SubclusterMask(long start, long end)
    {
        int first = (int)(start >> _subclusterBits);
        int last = (int)((end - 1) >> _subclusterBits);
        return (uint)((((1ul << (last - first + 1)) - 1) << first) & uint.MaxValue);
    }

    /// <summary>Drops the reference that an L2 entry held, once the entry's change is stable.</summary>
    private void FreeEntry(ulong entry)
    {
        if ((entry & CompressedFlag) != 0)
        {
            (long host, int size) = CompressedExtent(entry);
            _refcounts.FreeLater(host, size);
        }
        else if ((entry & OffsetMask) != 0 && _dataFile is null)
        {
            _refcounts.FreeLater((long)(entry & OffsetMask), _clusterSize);
        }
    }

    /// <summary>Gives an L1 entry a table that may be changed: a new one, or a copy of one that a snapshot shares. Lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask MakeTableWritableAsync(long l1Index, CancellationToken cancellation)
    {
        ulong entry = _l1[l1Index];
        long old = (long)(entry & OffsetMask);
        if (old != 0 && (entry & CopiedFlag) != 0)
            return;
        await MarkDirtyAsync(cancellation).ConfigureAwait(false);
        long table = await _refcounts.AllocateAsync(1, cancellation).ConfigureAwait(false);
        if (old == 0)
        {
            for (long at = 0; at < _clusterSize; at += _l2Cache.SliceSize)
            {
                if (_l2Cache.NeedsFlush)
                    await FlushTablesAsync(cancellation).ConfigureAwait(false);
                _ = _l2Cache.Create(table + at);
            }
        }
        else
        {
            using AlignedBuffer copy = AlignedBuffer.Rent(_clusterSize);
            await _file.ReadAsync(old, copy.Memory[.._clusterSize], cancellation).ConfigureAwait(false);
            await _file.WriteAsync(table, copy.Memory[.._clusterSize], WriteFlags.None, cancellation).ConfigureAwait(false);
            _l2Cache.Drop(table, _clusterSize);
            _refcounts.FreeLater(old, _clusterSize);
        }
        _l1[l1Index] = (ulong)table | CopiedFlag;
        _dirtyL1.Add((int)l1Index);
        _metadata.Add(table >> _clusterBits);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ZeroByDataAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        while (length > 0)
        {
            long part = Math.Min(length, _clusterSize - (offset & (_clusterSize - 1)));
            if (!await ReadsZeroAsync(offset, part, cancellation).ConfigureAwait(false))
                await WriteZeroDataAsync(offset, part, flags & ZeroFlags.NoFallback, cancellation).ConfigureAwait(false);
            offset += part;
            length -= part;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ZeroUnitsAsync(long start, long stop, bool unmap, CancellationToken cancellation)
    {
        if (!_header.HasExtendedL2)
        {
            await DropClustersAsync(start, stop, DropMode.Zero, cancellation, keepPlace: !unmap && _header.Version >= 3).ConfigureAwait(false);
            return;
        }
        long wholeStart = (start + _clusterSize - 1) & ~(_clusterSize - 1L);
        long wholeStop = stop >= Length ? (stop + _clusterSize - 1) & ~(_clusterSize - 1L) : stop & ~(_clusterSize - 1L);
        if (wholeStop <= wholeStart)
        {
            await ZeroSubclustersAsync(start, stop, cancellation).ConfigureAwait(false);
            return;
        }
        await ZeroSubclustersAsync(start, wholeStart, cancellation).ConfigureAwait(false);
        await DropClustersAsync(wholeStart, wholeStop, DropMode.Zero, cancellation, keepPlace: !unmap).ConfigureAwait(false);
        await ZeroSubclustersAsync(wholeStop, stop, cancellation).ConfigureAwait(false);
    }

    /// <summary>Marks some subclusters of one or two clusters as zeros.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ZeroSubclustersAsync(long start, long stop, CancellationToken cancellation)
    {
        while (start < stop)
        {
            long cluster = start & ~(_clusterSize - 1L);
            long end = Math.Min(stop, cluster + _clusterSize);
            await _allocating.AcquireAsync(cluster, cluster + _clusterSize).ConfigureAwait(false);
            bool asData = false;
            try
            {
                await _lock.EnterAsync().ConfigureAwait(false);
                try
                {
                    long l1Index = cluster >> (_l2Bits + _clusterBits);
                    await MakeTableWritableAsync(l1Index, cancellation).ConfigureAwait(false);
                    TableSlice slice = await L2SliceAsync(cluster, cancellation).ConfigureAwait(false);
                    int index = IndexInSlice(cluster);
                    ulong entry = BinaryPrimitives.ReadUInt64BigEndian(slice.Data.AsSpan(index * _entryBytes));
                    asData = (entry & CompressedFlag) != 0;
                    if (!asData)
                    {
                        Span<byte> field = slice.Data.AsSpan((index * _entryBytes) + 8, 8);
                        ulong mask = SubclusterMask(start - cluster, end - cluster);
                        BinaryPrimitives.WriteUInt64BigEndian(field, (BinaryPrimitives.ReadUInt64BigEndian(field) & ~mask) | (mask << 32));
                        _l2Cache.MarkDirty(slice);
                    }
                }
                finally
                {
                    _lock.Exit();
                }
            }
            finally
            {
                _allocating.Release(cluster, cluster + _clusterSize);
            }
            if (asData)
                await WriteZeroDataAsync(start, end - start, ZeroFlags.None, cancellation).ConfigureAwait(false);
            start = end;
        }
    }

    /// <summary>Takes whole clusters out of use.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask DropClustersAsync(long start, long stop, DropMode mode, CancellationToken cancellation, bool keepPlace = false)
    {
        if (stop <= start)
            return;
        long first = start;
        await _allocating.AcquireAsync(first, stop).ConfigureAwait(false);
        try
        {
            long sliceSpan = (long)(_l2Cache.SliceSize / _entryBytes) << _clusterBits;
            while (start < stop)
            {
                long end = Math.Min(stop, (start & ~(sliceSpan - 1)) + sliceSpan);
                await _lock.EnterAsync().ConfigureAwait(false);
                try
                {
                    await DropInSliceAsync(start, end, mode, keepPlace, cancellation).ConfigureAwait(false);
                    if (_refcounts.PendingFreeRuns > 4096)
                        await FlushTablesAsync(cancellation).ConfigureAwait(false);
                }
                finally
                {
                    _lock.Exit();
                }
                start = end;
            }
        }
        finally
        {
            _allocating.Release(first, stop);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask DropInSliceAsync(long start, long end, DropMode mode, bool keepPlace, CancellationToken cancellation)
    {
        long l1Index = start >> (_l2Bits + _clusterBits);
        bool zeroes = mode != DropMode.Forget && _header.Version >= 3;
        // Nothing stored, and nothing below that would show: zeros already.
        if (l1Index >= _l1.Length || ((_l1[l1Index] & OffsetMask) == 0 && (_backing is null || mode == DropMode.Forget)))
            return;
        await MakeTableWritableAsync(l1Index, cancellation).ConfigureAwait(false);
        TableSlice slice = await L2SliceAsync(start, cancellation).ConfigureAwait(false);
        for (long cluster = start; cluster < end; cluster += _clusterSize)
        {
            int index = IndexInSlice(cluster);
            Span<byte> data = slice.Data.AsSpan(index * _entryBytes, _entryBytes);
            ulong old = BinaryPrimitives.ReadUInt64BigEndian(data);
            ulong oldBitmap = _header.HasExtendedL2 ? BinaryPrimitives.ReadUInt64BigEndian(data[8..]) : 0;
            bool placed = (old & OffsetMask) != 0 && (old & CompressedFlag) == 0;
            bool keep = keepPlace && placed && (old & CopiedFlag) != 0;
            bool stored = placed || (old & CompressedFlag) != 0 || (_dataFile is not null && (old & CopiedFlag) != 0);
            if (!stored && _backing is null && mode != DropMode.Forget)
                continue;
            ulong entry = keep ? old & ~ZeroFlag : 0;
            ulong bitmap = 0;
            if (zeroes && _header.HasExtendedL2)
                bitmap = 0xffff_ffff_0000_0000;
            else if (zeroes)
                entry |= ZeroFlag;
            if (entry == old && bitmap == oldBitmap)
                continue;
            BinaryPrimitives.WriteUInt64BigEndian(data, entry);
            if (_header.HasExtendedL2)
                BinaryPrimitives.WriteUInt64BigEndian(data[8..], bitmap);
            _l2Cache.MarkDirty(slice);
            if (keep)
                continue;
            FreeEntry(old);
            if (_dataFile is not null && stored && _options.Discard)
                _dataDiscards.Add(cluster);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteCompressedAsync(long offset, ReadOnlyMemory<byte> buffer, CancellationToken cancellation)
    {
        if (_dataFile is not null)
            throw new BlockException("Compressed clusters are not possible with an external data file", BlockErrno.NotSupported);
        if (_cipher is not null || _header.Encryption != Qcow2Encryption.None)
            throw new BlockException("Compression and encryption not supported at the same time", BlockErrno.NotSupported);
        if ((offset & (_clusterSize - 1)) != 0)
            throw new BlockException("A compressed write must start at a cluster", BlockErrno.Invalid);
        while (!buffer.IsEmpty)
        {
            int part = Math.Min(buffer.Length, _clusterSize);
            if (part < _clusterSize && offset + part < Length)
                throw new BlockException("A compressed write must cover whole clusters", BlockErrno.Invalid);
            await WriteOneCompressedAsync(offset, buffer[..part], cancellation).ConfigureAwait(false);
            buffer = buffer[part..];
            offset += part;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteOneCompressedAsync(long offset, ReadOnlyMemory<byte> data, CancellationToken cancellation)
    {
        using AlignedBuffer packed = AlignedBuffer.Rent(_clusterSize);
        int size;
        if (data.Length == _clusterSize)
        {
            size = _codec.Compress(data.Span, packed.Memory.Span[..(_clusterSize - 1)]);
        }
        else
        {
            using AlignedBuffer padded = AlignedBuffer.Rent(_clusterSize);
            padded.Memory.Span[.._clusterSize].Clear();
            data.CopyTo(padded.Memory);
            size = _codec.Compress(padded.Memory.Span[.._clusterSize], packed.Memory.Span[..(_clusterSize - 1)]);
        }
        if (size <= 0)
        {
            await WriteCoreAsync(offset, data, WriteFlags.None, cancellation).ConfigureAwait(false);
            return;
        }
        await _allocating.AcquireAsync(offset, offset + _clusterSize).ConfigureAwait(false);
        try
        {
            long host;
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                await MarkDirtyAsync(cancellation).ConfigureAwait(false);
                await MakeTableWritableAsync(offset >> (_l2Bits + _clusterBits), cancellation).ConfigureAwait(false);
                host = await _refcounts.AllocateBytesAsync(size, cancellation).ConfigureAwait(false);
            }
            finally
            {
                _lock.Exit();
            }
            await _file.WriteAsync(host, packed.Memory[..size], WriteFlags.None, cancellation).ConfigureAwait(false);
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                int shift = 62 - (_clusterBits - 8);
                ulong sectors = (ulong)(((host + size - 1) / SectorSize) - (host / SectorSize));
                TableSlice slice = await L2SliceAsync(offset, cancellation).ConfigureAwait(false);
                Span<byte> field = slice.Data.AsSpan(IndexInSlice(offset) * _entryBytes, _entryBytes);
                ulong old = BinaryPrimitives.ReadUInt64BigEndian(field);
                BinaryPrimitives.WriteUInt64BigEndian(field, CompressedFlag | (sectors << shift) | (ulong)host);
                if (_header.HasExtendedL2)
                    BinaryPrimitives.WriteUInt64BigEndian(field[8..], 0);
                _l2Cache.MarkDirty(slice);
                FreeEntry(old);
            }
            finally
            {
                _lock.Exit();
            }
        }
        finally
        {
            _allocating.Release(offset, offset + _clusterSize);
        }
    }

    /// <summary>What becomes of a write's start.</summary>
    /// <param name="Host">Where its first byte goes.</param>
    /// <param name="Length">How many bytes this holds for; 0: wait for [First, Last) and ask again.</param>
    /// <param name="First">First guest byte of the clusters held.</param>
    /// <param name="Last">End of the clusters held.</param>
    /// <param name="NeedsLink">L2 entries must be set afterwards.</param>
    /// <param name="Untouched">The new clusters lie where the file has never been written: they read as zeros.</param>
    /// <param name="InPlace">The clusters keep their place.</param>
    private readonly record struct WritePlan(long Host, long Length, long First, long Last, bool NeedsLink, bool Untouched, bool InPlace);
}
