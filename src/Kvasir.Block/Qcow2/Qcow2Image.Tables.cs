using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Qcow2;

/// <summary>The order in which tables reach the disk, header changes, growth and shrinking.</summary>
public sealed partial class Qcow2Image
{
    private readonly List<(long Offset, long Length)> _freed = [];
    private readonly HashSet<long> _dataDiscards = [];

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public override async ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        if (IsReadOnly)
            throw ReadOnlyError();
        if (length < 0 || length % SectorSize != 0)
            throw new BlockException("The new size must be a multiple of 512");
        if (_snapshots.Count > 0 && _header.Version < 3)
            throw new BlockException("Can't resize a v2 image which has snapshots", BlockErrno.NotSupported);
        if (_header.BitmapCount > 0 && length != Length)
        {
            // Bits that were recorded go into the file first, and recording begins afresh with the new size.
            if (_tracker is not null)
                await _tracker.StoreAsync().ConfigureAwait(false);
            _tracker = null;
            await Qcow2Bitmaps.ResizeAsync(this, length, cancellation).ConfigureAwait(false);
        }
        long old = Length;
        if (length < old)
        {
            if (preallocation != Preallocation.Off)
                throw new BlockException("Preallocation can't be used for shrinking an image");
            long start = (length + _clusterSize - 1) & ~(_clusterSize - 1L);
            await DropClustersAsync(start, (old + _clusterSize - 1) & ~(_clusterSize - 1L), DropMode.Forget, cancellation).ConfigureAwait(false);
            // What remains of the last cluster must read as zeros if the disk grows again.
            if (length < start && length < old)
                await WriteZeroesCoreAsync(length, Math.Min(start, old) - length, ZeroFlags.None, cancellation).ConfigureAwait(false);
        }
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await GrowL1Async(length, cancellation).ConfigureAwait(false);
            await FlushTablesAsync(cancellation).ConfigureAwait(false);
            _header.Size = length;
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
        if (_header.BitmapCount > 0 && _tracker is null)
            _tracker = await Qcow2BitmapTracker.CreateAsync(this, cancellation).ConfigureAwait(false);
        if (_dataFile is not null && length != _dataFile.Length)
            await _dataFile.ResizeAsync(length, preallocation is Preallocation.Metadata ? Preallocation.Off : preallocation, cancellation).ConfigureAwait(false);
        if (length <= old)
            return;
        // A backing file longer than the old size must not show through the new area.
        if (_backing is not null && preallocation == Preallocation.Off)
            await HideBackingAsync(old, length, cancellation).ConfigureAwait(false);
        if (preallocation != Preallocation.Off)
            await PreallocateAsync(old, length, preallocation, cancellation).ConfigureAwait(false);
    }

    /// <summary>Gives every cluster of a range its place, without writing it (or, for falloc and full, with its space).</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    internal async ValueTask PreallocateAsync(long start, long end, Preallocation mode, CancellationToken cancellation)
    {
        long offset = start & ~(_clusterSize - 1L);
        long top = 0;
        while (offset < end)
        {
            await _lock.EnterAsync().ConfigureAwait(false);
            WritePlan plan;
            try
            {
                plan = await PlanWriteAsync(offset, end - offset, cancellation).ConfigureAwait(false);
                if (plan.NeedsLink)
                {
                    long last = plan.Last;
                    if (!plan.InPlace)
                        await LinkAsync(plan.First, last, plan, cancellation).ConfigureAwait(false);
                    _allocating.Release(plan.First, plan.Last);
                    top = Math.Max(top, plan.Host + (plan.Last - plan.First));
                }
            }
            finally
            {
                _lock.Exit();
            }
            // Clusters that were in use before must not show what they held.
            if (plan.NeedsLink && !plan.InPlace && _dataFile is null && (mode == Preallocation.Full || !plan.Untouched))
                await WriteZerosToHostAsync(plan.First, plan.Host & ~(_clusterSize - 1L), plan.Last - plan.First, cancellation).ConfigureAwait(false);
            offset += plan.Length;
        }
        await FlushAsync(cancellation).ConfigureAwait(false);
        if (_dataFile is null && top > _file.Length)
            await _file.ResizeAsync(top, mode == Preallocation.Falloc ? Preallocation.Falloc : Preallocation.Off, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteZerosToHostAsync(long guest, long host, long length, CancellationToken cancellation)
    {
        byte[] zeros = new byte[1 << 20];
        for (long at = 0; at < length; at += zeros.Length)
        {
            ReadOnlyMemory<byte> part = zeros.AsMemory(0, (int)Math.Min(zeros.Length, length - at));
            await WriteHostAsync(guest + at, host + at, part, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>Writes the header as it is in memory.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    internal async ValueTask WriteHeaderAsync(CancellationToken cancellation)
    {
        await _file.WriteAsync(0, _header.Serialize(), WriteFlags.None, cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Changes which backing file the header names (rebase).</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask ChangeBackingNameAsync(string? name, string? format, CancellationToken cancellation = default)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            _header.BackingFile = name;
            _header.BackingFormat = name is null ? null : format;
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>Forgets all content, so that the backing file shows everywhere (after a commit).</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask MakeEmptyAsync(CancellationToken cancellation = default)
    {
        await DropClustersAsync(0, (Length + _clusterSize - 1) & ~(_clusterSize - 1L), DropMode.Forget, cancellation).ConfigureAwait(false);
        await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask HideBackingAsync(long start, long end, CancellationToken cancellation)
    {
        if (_backing is null || _backing.Length <= start)
            return;
        await WriteZeroesCoreAsync(start, Math.Min(end, _backing.Length) - start, ZeroFlags.None, cancellation).ConfigureAwait(false);
    }

    /// <summary>Clears autoclear bits of features this code does not keep up, and repairs an image that was not closed.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask PrepareWritingAsync(CancellationToken cancellation)
    {
        Qcow2Autoclear known = Qcow2Autoclear.Bitmaps | Qcow2Autoclear.DataFileRaw;
        if ((_header.Autoclear & ~known) != 0)
        {
            _header.Autoclear &= known;
            await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        }
        if (IsDirty)
            _ = await Qcow2Check.RunAsync(this, CheckRepair.All, null, cancellation).ConfigureAwait(false);
    }

    /// <summary>With lazy reference counts: says in the header that they may be behind, before the first one is.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask MarkDirtyAsync(CancellationToken cancellation)
    {
        if (!_lazyRefcounts || IsDirty)
            return;
        _header.Incompatible |= Qcow2Incompatible.Dirty;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Writes all dirty tables in the order that a crash cannot hurt (see the type's remarks). Metadata lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    internal async ValueTask FlushTablesAsync(CancellationToken cancellation)
    {
        if (_corrupt)
            return;
        bool lazy = _lazyRefcounts && IsDirty && !_closed;
        if (!lazy)
            await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
        if (_l2Cache.HasDirty)
        {
            if (_dataFile is not null)
                await _dataFile.FlushAsync(cancellation).ConfigureAwait(false);
            await _file.FlushAsync(cancellation).ConfigureAwait(false);
            await _l2Cache.WriteBackAsync(cancellation).ConfigureAwait(false);
        }
        if (_dirtyL1.Count > 0)
        {
            await _file.FlushAsync(cancellation).ConfigureAwait(false);
            byte[] entry = new byte[8];
            foreach (int index in _dirtyL1)
            {
                BinaryPrimitives.WriteUInt64BigEndian(entry, _l1[index]);
                await _file.WriteAsync(_header.L1Offset + (index * 8L), entry, WriteFlags.None, cancellation).ConfigureAwait(false);
            }
            _dirtyL1.Clear();
        }
        if (_refcounts.HasPendingFrees)
        {
            await _file.FlushAsync(cancellation).ConfigureAwait(false);
            _freed.Clear();
            await ApplyFreesAsync(cancellation).ConfigureAwait(false);
            if (_options.Discard)
            {
                foreach ((long offset, long length) in _freed)
                {
                    long end = Math.Min(offset + length, _file.Length);
                    if (end > offset)
                        await _file.DiscardAsync(offset, end - offset, cancellation).ConfigureAwait(false);
                }
            }
        }
        if (_dataDiscards.Count > 0 && _dataFile is not null)
        {
            foreach (long offset in _dataDiscards)
            {
                long end = Math.Min(offset + _clusterSize, _dataFile.Length);
                if (end > offset)
                    await _dataFile.DiscardAsync(offset, end - offset, cancellation).ConfigureAwait(false);
            }
            _dataDiscards.Clear();
        }
    }

    /// <summary>Takes dropped clusters' counts down, so far as no write may still be on its way to them.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ApplyFreesAsync(CancellationToken cancellation)
    {
        if (!_inPlaceWrites.EldersEnded)
            return;
        bool all = _inPlaceWrites.AllEnded;
        await _refcounts.ApplyFreesAsync(all, OnFreed, cancellation).ConfigureAwait(false);
        if (all)
            return;
        _inPlaceWrites.Age();
        _refcounts.AgeFrees();
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask FlushRefcountsAsync(CancellationToken cancellation)
    {
        if (!_refcounts.HasDirty)
            return;
        await _refcounts.WriteBlocksAsync(cancellation).ConfigureAwait(false);
        if (!_refcounts.HasNewBlocks)
            return;
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        if (!await _refcounts.WriteTableAsync(cancellation).ConfigureAwait(false))
            return;
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
    }

    private void OnFreed(long offset, long length)
    {
        _freed.Add((offset, length));
        for (long cluster = offset >> _clusterBits; cluster < (offset + length) >> _clusterBits; cluster++)
        {
            if (_metadata.Remove(cluster))
                _l2Cache.Drop(cluster << _clusterBits, _clusterSize);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask CloseTablesAsync()
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            // The first round makes everything stable and takes the freed clusters' counts down, the second writes those counts.
            await FlushTablesAsync(CancellationToken.None).ConfigureAwait(false);
            await FlushRefcountsAsync(CancellationToken.None).ConfigureAwait(false);
            if (_dataFile is not null && !_dataFile.IsReadOnly)
                await _dataFile.FlushAsync(CancellationToken.None).ConfigureAwait(false);
            await _file.FlushAsync(CancellationToken.None).ConfigureAwait(false);
            if (IsDirty && !_options.ForCheck)
            {
                _header.Incompatible &= ~Qcow2Incompatible.Dirty;
                await WriteHeaderAsync(CancellationToken.None).ConfigureAwait(false);
            }
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>Makes the L1 table long enough for a size: a copy in a new place, then the header. Metadata lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask GrowL1Async(long size, CancellationToken cancellation)
    {
        long perTable = 1L << (_l2Bits + _clusterBits);
        long needed = (size / perTable) + (size % perTable != 0 ? 1 : 0);
        if (needed <= _l1.Length)
            return;
        if (needed * 8 > Qcow2Header.LargestL1Bytes)
            throw new BlockException("The image size is too large for file format 'qcow2' (try using a larger cluster size)", BlockErrno.FileTooBig);
        ulong[] table = new ulong[needed];
        _l1.CopyTo(table, 0);
        await FlushTablesAsync(cancellation).ConfigureAwait(false);
        await ReplaceL1Async(table, cancellation).ConfigureAwait(false);
    }

    /// <summary>Puts a new active L1 table on disk and lets the header point to it. Metadata lock held, tables flushed.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReplaceL1Async(ulong[] table, CancellationToken cancellation)
    {
        long bytes = Math.Max(table.Length * 8L, 1);
        long clusters = (bytes + _clusterSize - 1) >> _clusterBits;
        long offset = await _refcounts.AllocateAsync(clusters, cancellation).ConfigureAwait(false);
        byte[] data = new byte[clusters << _clusterBits];
        BinaryPrimitives.ReverseEndianness(table, MemoryMarshal.Cast<byte, ulong>(data.AsSpan())[..table.Length]);
        await _file.WriteAsync(offset, data, WriteFlags.None, cancellation).ConfigureAwait(false);
        await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        long oldOffset = _header.L1Offset;
        long oldBytes = _header.L1Size * 8L;
        _header.L1Offset = offset;
        _header.L1Size = table.Length;
        _l1 = table;
        _dirtyL1.Clear();
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        if (oldBytes > 0)
            _refcounts.FreeLater(oldOffset, oldBytes);
        RegisterMetadata();
    }
}
