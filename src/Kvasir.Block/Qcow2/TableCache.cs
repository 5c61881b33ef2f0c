using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Qcow2;

/// <summary>A piece of a metadata table in memory, as it is on disk.</summary>
internal sealed class TableSlice(int size)
{
    public long Offset { get; set; } = -1;

    public byte[] Data { get; } = new byte[size];

    public bool Dirty { get; set; }

    public bool Recent { get; set; }
}

/// <summary>
/// A bounded write-back cache of table slices, keyed by their place in the file. Used with the image's metadata lock held. It never
/// writes on its own: the owner decides the order in which tables reach the disk, and must flush when nothing clean is left to evict.
/// </summary>
internal sealed class TableCache
{
    private readonly BlockNode _file;
    private readonly int _capacity;
    private readonly Dictionary<long, TableSlice> _byOffset;
    private readonly List<TableSlice> _slices = [];
    private readonly List<TableSlice> _dirtyOrder = [];
    private int _hand;
    private int _dirtyCount;

    public TableCache(BlockNode file, int sliceSize, long capacityBytes)
    {
        _file = file;
        SliceSize = sliceSize;
        _capacity = (int)Math.Clamp(capacityBytes / sliceSize, 8, 1 << 20);
        _byOffset = [];
    }

    public int SliceSize { get; }

    public bool HasDirty => _dirtyCount > 0;

    /// <summary>Whether room can only be made by writing dirty slices back.</summary>
    public bool NeedsFlush => _dirtyCount >= _capacity - 2;

    public bool TryGet(long offset, out TableSlice? slice)
    {
        if (!_byOffset.TryGetValue(offset, out slice))
            return false;
        slice.Recent = true;
        return true;
    }

    /// <summary>The slice at <paramref name="offset"/>, read if need be. <see cref="NeedsFlush"/> must be false.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<TableSlice> LoadAsync(long offset, CancellationToken cancellation)
    {
        TableSlice slice = Claim();
        try
        {
            await _file.ReadAsync(offset, slice.Data, cancellation).ConfigureAwait(false);
        }
        catch
        {
            _slices.Remove(slice);
            _hand = 0;
            throw;
        }
        return Insert(slice, offset);
    }

    /// <summary>A slice of zeros for <paramref name="offset"/>, dirty. <see cref="NeedsFlush"/> must be false.</summary>
    public TableSlice Create(long offset)
    {
        if (!_byOffset.TryGetValue(offset, out TableSlice? slice))
            slice = Insert(Claim(), offset);
        Array.Clear(slice.Data);
        MarkDirty(slice);
        return slice;
    }

    public void MarkDirty(TableSlice slice)
    {
        if (slice.Dirty)
            return;
        slice.Dirty = true;
        _dirtyCount++;
    }

    /// <summary>Writes all dirty slices, neighbours after each other.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask WriteBackAsync(CancellationToken cancellation)
    {
        if (_dirtyCount == 0)
            return;
        _dirtyOrder.Clear();
        foreach (TableSlice slice in _slices)
        {
            if (slice.Dirty)
                _dirtyOrder.Add(slice);
        }
        _dirtyOrder.Sort(static (a, b) => a.Offset.CompareTo(b.Offset));
        foreach (TableSlice slice in _dirtyOrder)
        {
            await _file.WriteAsync(slice.Offset, slice.Data, WriteFlags.None, cancellation).ConfigureAwait(false);
            slice.Dirty = false;
            _dirtyCount--;
        }
    }

    /// <summary>Forgets what lies in a freed or overwritten range.</summary>
    public void Drop(long offset, long length)
    {
        for (long at = offset; at < offset + length; at += SliceSize)
        {
            if (!_byOffset.Remove(at, out TableSlice? slice))
                continue;
            if (slice.Dirty)
                _dirtyCount--;
            slice.Dirty = false;
            slice.Offset = -1;
            slice.Recent = false;
        }
    }

    /// <summary>Forgets everything; dirty slices are lost.</summary>
    public void Clear()
    {
        _byOffset.Clear();
        _slices.Clear();
        _dirtyCount = 0;
        _hand = 0;
    }

    private TableSlice Insert(TableSlice slice, long offset)
    {
        slice.Offset = offset;
        slice.Dirty = false;
        slice.Recent = true;
        _byOffset[offset] = slice;
        return slice;
    }

    /// <summary>A free slice: a new one, or the next clean one that was not used since the clock's hand passed it.</summary>
    private TableSlice Claim()
    {
        if (_slices.Count < _capacity)
        {
            TableSlice fresh = new(SliceSize);
            _slices.Add(fresh);
            return fresh;
        }
        while (true)
        {
            TableSlice slice = _slices[_hand];
            _hand = (_hand + 1) % _slices.Count;
            if (slice.Dirty)
                continue;
            if (slice.Recent)
            {
                slice.Recent = false;
                continue;
            }
            if (slice.Offset >= 0)
                _byOffset.Remove(slice.Offset);
            slice.Offset = -1;
            return slice;
        }
    }
}
