using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

/// <summary>An internal snapshot: an L1 table of its own and what it says of itself.</summary>
public sealed record Qcow2Snapshot
{
    public string Id { get; init; } = string.Empty;

    public string Name { get; init; } = string.Empty;

    /// <summary>Unix time, seconds and nanoseconds.</summary>
    public uint Seconds { get; init; }

    public uint Nanoseconds { get; init; }

    /// <summary>Guest run time in nanoseconds.</summary>
    public ulong VmClock { get; init; }

    public long VmStateSize { get; init; }

    /// <summary>Disk size at the time.</summary>
    public long DiskSize { get; init; }

    /// <summary>Executed instructions; all ones: not known.</summary>
    public ulong InstructionCount { get; init; } = ulong.MaxValue;

    internal long L1Offset { get; init; }

    internal int L1Size { get; init; }

    /// <summary>Extra data past the fields known here, kept as it is.</summary>
    internal byte[] UnknownExtra { get; init; } = [];
}

/// <summary>Internal snapshots. The caller drains guest requests first.</summary>
public sealed partial class Qcow2Image
{
    private const long LargestSnapshotTable = 64L << 20;

    public IReadOnlyList<Qcow2Snapshot> Snapshots => _snapshots;

    /// <summary>Finds a snapshot by id, else by name.</summary>
    public Qcow2Snapshot? FindSnapshot(string idOrName)
    {
        foreach (Qcow2Snapshot snapshot in _snapshots)
        {
            if (snapshot.Id == idOrName)
                return snapshot;
        }
        foreach (Qcow2Snapshot snapshot in _snapshots)
        {
            if (snapshot.Name == idOrName)
                return snapshot;
        }
        return null;
    }

    /// <summary>Keeps the disk's present content under a name.</summary>
    public async ValueTask<Qcow2Snapshot> CreateSnapshotAsync(
        string name, DateTimeOffset time, long vmStateSize = 0, ulong vmClock = 0, CancellationToken cancellation = default)
    {
        CheckSnapshotsPossible();
        if (_snapshots.Count >= Qcow2Header.LargestSnapshotCount)
            throw new BlockException("Too many snapshots", BlockErrno.FileTooBig);
        await EnterAloneAsync().ConfigureAwait(false);
        try
        {
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            await CheckCountsAsync(_l1, cancellation).ConfigureAwait(false);
            bool marked = await MarkUnsettledAsync(cancellation).ConfigureAwait(false);
            // "Not mine alone" is true of a cluster with one owner as well, so this flag goes first and the counts after it.
            await SetCopiedFlagsAsync(clear: true, cancellation).ConfigureAwait(false);
            await CountTableAsync(_l1, 1, cancellation).ConfigureAwait(false);
            long clusters = Math.Max(1, ((_l1.Length * 8L) + _clusterSize - 1) >> _clusterBits);
            long offset = await _refcounts.AllocateAsync(clusters, cancellation).ConfigureAwait(false);
            byte[] copy = new byte[clusters << _clusterBits];
            BinaryPrimitives.ReverseEndianness(_l1, MemoryMarshal.Cast<byte, ulong>(copy.AsSpan())[.._l1.Length]);
            await _file.WriteAsync(offset, copy, WriteFlags.None, cancellation).ConfigureAwait(false);
            await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
            await _file.FlushAsync(cancellation).ConfigureAwait(false);
            Qcow2Snapshot snapshot = new()
            {
                Id = NextSnapshotId(),
                Name = name,
                Seconds = (uint)time.ToUnixTimeSeconds(),
                Nanoseconds = (uint)(time.Ticks % TimeSpan.TicksPerSecond * 100),
                VmClock = vmClock,
                VmStateSize = vmStateSize,
                DiskSize = Length,
                InstructionCount = 0,
                L1Offset = offset,
                L1Size = _l1.Length,
            };
            await WriteSnapshotTableAsync([.. _snapshots, snapshot], cancellation).ConfigureAwait(false);
            await SettleAsync(marked, cancellation).ConfigureAwait(false);
            return snapshot;
        }
        finally
        {
            ExitAlone();
        }
    }

    /// <summary>
    /// Counts and their flags cannot change in one step. While they do, the image is marked dirty as with lazy reference counts: whoever
    /// opens it after a crash puts the counts right.
    /// </summary>
    private async ValueTask<bool> MarkUnsettledAsync(CancellationToken cancellation)
    {
        if (_header.Version < 3 || IsDirty)
            return false;
        _header.Incompatible |= Qcow2Incompatible.Dirty;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        return true;
    }

    private async ValueTask SettleAsync(bool marked, CancellationToken cancellation)
    {
        if (!marked)
            return;
        await FlushAllAsync(cancellation).ConfigureAwait(false);
        await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        _header.Incompatible &= ~Qcow2Incompatible.Dirty;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
    }

    /// <summary>Makes the disk what it was at a snapshot.</summary>
    public async ValueTask ApplySnapshotAsync(Qcow2Snapshot snapshot, CancellationToken cancellation = default)
    {
        CheckSnapshotsPossible();
        if (_tracker is not null)
            await _tracker.RecordAsync(0, Length).ConfigureAwait(false);
        await EnterAloneAsync().ConfigureAwait(false);
        try
        {
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            ulong[] source = await LoadL1Async(_file, snapshot.L1Offset, snapshot.L1Size, cancellation).ConfigureAwait(false);
            await CheckCountsAsync(source, cancellation).ConfigureAwait(false);
            bool marked = await MarkUnsettledAsync(cancellation).ConfigureAwait(false);
            long perTable = 1L << (_l2Bits + _clusterBits);
            int needed = (int)((snapshot.DiskSize / perTable) + (snapshot.DiskSize % perTable != 0 ? 1 : 0));
            ulong[] table = new ulong[Math.Max(Math.Max(needed, source.Length), _l1.Length)];
            for (int i = 0; i < source.Length; i++)
                table[i] = source[i] & ~CopiedFlag;
            ulong[] old = _l1;
            await CountTableAsync(table, 1, cancellation).ConfigureAwait(false);
            await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
            _header.Size = snapshot.DiskSize;
            await ReplaceL1Async(table, cancellation).ConfigureAwait(false);
            await CountTableAsync(old, -1, cancellation).ConfigureAwait(false);
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            await SetCopiedFlagsAsync(clear: false, cancellation).ConfigureAwait(false);
            await SettleAsync(marked, cancellation).ConfigureAwait(false);
            RegisterMetadata();
        }
        finally
        {
            ExitAlone();
        }
    }

    public async ValueTask DeleteSnapshotAsync(Qcow2Snapshot snapshot, CancellationToken cancellation = default)
    {
        CheckSnapshotsPossible();
        await EnterAloneAsync().ConfigureAwait(false);
        try
        {
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            bool marked = await MarkUnsettledAsync(cancellation).ConfigureAwait(false);
            List<Qcow2Snapshot> rest = [.. _snapshots];
            rest.Remove(snapshot);
            ulong[] table = await LoadL1Async(_file, snapshot.L1Offset, snapshot.L1Size, cancellation).ConfigureAwait(false);
            await WriteSnapshotTableAsync(rest, cancellation).ConfigureAwait(false);
            await CountTableAsync(table, -1, cancellation).ConfigureAwait(false);
            if (snapshot.L1Size > 0)
                _refcounts.FreeLater(snapshot.L1Offset, snapshot.L1Size * 8L);
            await FlushAllAsync(cancellation).ConfigureAwait(false);
            await SetCopiedFlagsAsync(clear: false, cancellation).ConfigureAwait(false);
            await SettleAsync(marked, cancellation).ConfigureAwait(false);
        }
        finally
        {
            ExitAlone();
        }
    }

    /// <summary>A read-only view of a snapshot's disk, which borrows this image's file.</summary>
    public async ValueTask<Qcow2Image> OpenSnapshotAsync(Qcow2Snapshot snapshot, CancellationToken cancellation = default)
    {
        await FlushAsync(cancellation).ConfigureAwait(false);
        Qcow2Image view = await OpenAsync(new BorrowedNode(_file), _options with { ReadOnly = true, DataFile = _dataFile is null ? null : new BorrowedNode(_dataFile) }, cancellation)
            .ConfigureAwait(false);
        view._header.Size = snapshot.DiskSize;
        view._l1 = await LoadL1Async(_file, snapshot.L1Offset, snapshot.L1Size, cancellation).ConfigureAwait(false);
        if (_backing is not null)
            view.SetBacking(new BorrowedNode(_backing));
        return view;
    }

    /// <summary>Takes the metadata lock with no write under way: one that has found its place must not end in what a snapshot shares by then.</summary>
    private async ValueTask EnterAloneAsync()
    {
        await _allocating.AcquireAsync(0, long.MaxValue).ConfigureAwait(false);
        await _lock.EnterAsync().ConfigureAwait(false);
        await _inPlaceWrites.WaitAsync().ConfigureAwait(false);
    }

    private void ExitAlone()
    {
        _lock.Exit();
        _allocating.Release(0, long.MaxValue);
    }

    private void CheckSnapshotsPossible()
    {
        if (IsReadOnly)
            throw ReadOnlyError();
        FailIfCorrupt();
        if (_dataFile is not null)
            throw new BlockException("Internal snapshots are not possible with an external data file", BlockErrno.NotSupported);
    }

    private async ValueTask FlushAllAsync(CancellationToken cancellation)
    {
        // Else a free that waits for a write could not be applied.
        await _inPlaceWrites.WaitAsync().ConfigureAwait(false);
        do
        {
            await FlushTablesAsync(cancellation).ConfigureAwait(false);
            await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
        }
        while (_refcounts.HasPendingFrees || _refcounts.HasDirty);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
    }

    private string NextSnapshotId()
    {
        ulong largest = 0;
        foreach (Qcow2Snapshot snapshot in _snapshots)
        {
            if (ulong.TryParse(snapshot.Id, NumberStyles.None, CultureInfo.InvariantCulture, out ulong id))
                largest = Math.Max(largest, id);
        }
        return (largest + 1).ToString(CultureInfo.InvariantCulture);
    }

    /// <summary>Adds or (later, when stable) drops one reference for all that an L1 table leads to.</summary>
    /// <summary>Fails where a narrow count could not take one more reference from a table, before anything is changed.</summary>
    private async ValueTask CheckCountsAsync(ulong[] table, CancellationToken cancellation)
    {
        // Wider counts do not run over: there are fewer snapshots than that, and compressed neighbours.
        if (_header.RefcountOrder <= 3)
            await CountTableAsync(table, 0, cancellation, []).ConfigureAwait(false);
    }

    private async ValueTask CountTableAsync(ulong[] table, int change, CancellationToken cancellation, Dictionary<long, ulong>? probed = null)
    {
        byte[] l2 = new byte[_clusterSize];
        foreach (ulong l1Entry in table)
        {
            long place = (long)(l1Entry & OffsetMask);
            if (place == 0)
                continue;
            if ((place & (_clusterSize - 1)) != 0)
                throw BlockException.Corrupt($"L2 table offset 0x{place:x} unaligned");
            await _file.ReadAsync(place, l2, cancellation).ConfigureAwait(false);
            for (int at = 0; at < l2.Length; at += _entryBytes)
            {
                ulong entry = BinaryPrimitives.ReadUInt64BigEndian(l2.AsSpan(at));
                if (change < 0)
                {
                    FreeEntry(entry);
                }
                else if ((entry & CompressedFlag) != 0)
                {
                    (long host, int size) = CompressedExtent(entry);
                    long first = host >> _clusterBits;
                    await AddReferencesAsync(first, ((host + size - 1) >> _clusterBits) - first + 1, probed, cancellation).ConfigureAwait(false);
                }
                else if ((entry & OffsetMask) != 0)
                {
                    await AddReferencesAsync((long)(entry & OffsetMask) >> _clusterBits, 1, probed, cancellation).ConfigureAwait(false);
                }
            }
            if (change < 0)
                _refcounts.FreeLater(place, _clusterSize);
            else
                await AddReferencesAsync(place >> _clusterBits, 1, probed, cancellation).ConfigureAwait(false);
        }
    }

    private async ValueTask AddReferencesAsync(long first, long count, Dictionary<long, ulong>? probed, CancellationToken cancellation)
    {
        if (probed is null)
        {
            await _refcounts.AddAsync(first, count, cancellation).ConfigureAwait(false);
            return;
        }
        for (long cluster = first; cluster < first + count; cluster++)
        {
            ulong added = probed.GetValueOrDefault(cluster) + 1;
            probed[cluster] = added;
            if (await _refcounts.GetAsync(cluster, cancellation).ConfigureAwait(false) + added > _refcounts.LargestCount)
                throw new BlockException($"The reference count of cluster {cluster} would overflow: the image counts with {RefcountBits} bits (amend refcount_bits=)", BlockErrno.Invalid);
        }
    }

    /// <summary>Sets the "mine alone" flags of the active tables by the counts, or clears them all. Tables are flushed before.</summary>
    internal async ValueTask SetCopiedFlagsAsync(bool clear, CancellationToken cancellation)
    {
        byte[] l2 = new byte[_clusterSize];
        for (int i = 0; i < _l1.Length; i++)
        {
            long place = (long)(_l1[i] & OffsetMask);
            if (place == 0)
                continue;
            bool mine = !clear && await _refcounts.GetAsync(place >> _clusterBits, cancellation).ConfigureAwait(false) == 1;
            ulong wanted = (ulong)place | (mine ? CopiedFlag : 0);
            if (_l1[i] != wanted)
            {
                _l1[i] = wanted;
                _dirtyL1.Add(i);
            }
            // A shared table is not this image's to change, and its entries' flags are clear already.
            if (!mine && !clear)
                continue;
            await _file.ReadAsync(place, l2, cancellation).ConfigureAwait(false);
            if (await FlagEntriesAsync(l2, clear, cancellation).ConfigureAwait(false))
            {
                await _file.WriteAsync(place, l2, WriteFlags.None, cancellation).ConfigureAwait(false);
                _l2Cache.Drop(place, _clusterSize);
            }
        }
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        await FlushTablesAsync(cancellation).ConfigureAwait(false);
    }

    private async ValueTask<bool> FlagEntriesAsync(byte[] l2, bool clear, CancellationToken cancellation)
    {
        bool changed = false;
        for (int at = 0; at < l2.Length; at += _entryBytes)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(l2.AsSpan(at));
            if ((entry & CompressedFlag) != 0 || (entry & OffsetMask) == 0)
                continue;
            bool alone = !clear && await _refcounts.GetAsync((long)(entry & OffsetMask) >> _clusterBits, cancellation).ConfigureAwait(false) == 1;
            ulong flagged = alone ? entry | CopiedFlag : entry & ~CopiedFlag;
            if (flagged == entry)
                continue;
            BinaryPrimitives.WriteUInt64BigEndian(l2.AsSpan(at), flagged);
            changed = true;
        }
        return changed;
    }

    private async ValueTask<List<Qcow2Snapshot>> LoadSnapshotsAsync(CancellationToken cancellation)
    {
        List<Qcow2Snapshot> snapshots = [];
        long offset = _header.SnapshotsOffset;
        byte[] fixedPart = new byte[40];
        for (int i = 0; i < _header.SnapshotCount; i++)
        {
            offset = (offset + 7) & ~7L;
            if (offset - _header.SnapshotsOffset > LargestSnapshotTable || offset >= _file.Length)
                throw new BlockException("Snapshot table is too large or outside the file", BlockErrno.FileTooBig);
            await _file.ReadAsync(offset, fixedPart, cancellation).ConfigureAwait(false);
            int idLength = BinaryPrimitives.ReadUInt16BigEndian(fixedPart.AsSpan(12));
            int nameLength = BinaryPrimitives.ReadUInt16BigEndian(fixedPart.AsSpan(14));
            uint extraLength = BinaryPrimitives.ReadUInt32BigEndian(fixedPart.AsSpan(36));
            if (extraLength > 1024)
                throw new BlockException("Too much extra metadata in snapshot table entry");
            byte[] rest = new byte[extraLength + (uint)idLength + (uint)nameLength];
            await _file.ReadAsync(offset + 40, rest, cancellation).ConfigureAwait(false);
            snapshots.Add(ParseSnapshot(fixedPart, rest, (int)extraLength, idLength, nameLength));
            offset += 40 + rest.Length;
        }
        return snapshots;
    }

    private Qcow2Snapshot ParseSnapshot(byte[] head, byte[] rest, int extraLength, int idLength, int nameLength)
    {
        long l1Offset = BinaryPrimitives.ReadInt64BigEndian(head);
        uint l1Size = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(8));
        if (l1Size > Qcow2Header.LargestL1Bytes / 8)
            throw new BlockException("Snapshot L1 table too large", BlockErrno.FileTooBig);
        if (l1Offset < 0 || l1Offset > long.MaxValue - (l1Size * 8L) || (l1Offset & (_clusterSize - 1)) != 0)
            throw new BlockException("Snapshot L1 table offset invalid");
        ReadOnlySpan<byte> extra = rest.AsSpan(0, extraLength);
        long diskSize = extraLength >= 16 ? BinaryPrimitives.ReadInt64BigEndian(extra[8..]) : Length;
        if (diskSize < 0 || diskSize > (long)l1Size << Math.Min(_l2Bits + _clusterBits, 39))
            diskSize = Math.Min(Math.Max(diskSize, 0), (long)l1Size << (_l2Bits + _clusterBits));
        return new Qcow2Snapshot
        {
            L1Offset = l1Offset,
            L1Size = (int)l1Size,
            Seconds = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(16)),
            Nanoseconds = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(20)),
            VmClock = BinaryPrimitives.ReadUInt64BigEndian(head.AsSpan(24)),
            VmStateSize = extraLength >= 8 ? Math.Max(0, BinaryPrimitives.ReadInt64BigEndian(extra)) : BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(32)),
            DiskSize = diskSize,
            InstructionCount = extraLength >= 24 ? BinaryPrimitives.ReadUInt64BigEndian(extra[16..]) : ulong.MaxValue,
            UnknownExtra = extraLength > 24 ? extra[24..].ToArray() : [],
            Id = Encoding.UTF8.GetString(rest, extraLength, idLength),
            Name = Encoding.UTF8.GetString(rest, extraLength + idLength, nameLength),
        };
    }

    /// <summary>Writes the table to a new place, then lets the header point to it. Metadata lock held.</summary>
    private async ValueTask WriteSnapshotTableAsync(List<Qcow2Snapshot> snapshots, CancellationToken cancellation)
    {
        byte[] table = SerializeSnapshots(snapshots);
        if (table.Length > LargestSnapshotTable)
            throw new BlockException("Snapshot table too large", BlockErrno.FileTooBig);
        long oldOffset = _header.SnapshotsOffset;
        long oldBytes = SerializeSnapshots(_snapshots).Length;
        long offset = 0;
        if (table.Length > 0)
        {
            offset = await _refcounts.AllocateAsync((table.Length + _clusterSize - 1) >> _clusterBits, cancellation).ConfigureAwait(false);
            await _file.WriteAsync(offset, table, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        await FlushRefcountsAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
        _header.SnapshotCount = snapshots.Count;
        _header.SnapshotsOffset = offset;
        await WriteHeaderAsync(cancellation).ConfigureAwait(false);
        if (oldBytes > 0)
            _refcounts.FreeLater(oldOffset, oldBytes);
        _snapshots = snapshots;
        RegisterMetadata();
    }

    private static byte[] SerializeSnapshots(List<Qcow2Snapshot> snapshots)
    {
        using MemoryStream table = new();
        byte[] head = new byte[40];
        byte[] extra = new byte[24];
        foreach (Qcow2Snapshot snapshot in snapshots)
        {
            while ((table.Length & 7) != 0)
                table.WriteByte(0);
            byte[] id = Encoding.UTF8.GetBytes(snapshot.Id);
            byte[] name = Encoding.UTF8.GetBytes(snapshot.Name);
            BinaryPrimitives.WriteInt64BigEndian(head, snapshot.L1Offset);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(8), snapshot.L1Size);
            BinaryPrimitives.WriteUInt16BigEndian(head.AsSpan(12), checked((ushort)id.Length));
            BinaryPrimitives.WriteUInt16BigEndian(head.AsSpan(14), checked((ushort)name.Length));
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(16), snapshot.Seconds);
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(20), snapshot.Nanoseconds);
            BinaryPrimitives.WriteUInt64BigEndian(head.AsSpan(24), snapshot.VmClock);
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(32), snapshot.VmStateSize <= uint.MaxValue ? (uint)snapshot.VmStateSize : 0);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(36), extra.Length + snapshot.UnknownExtra.Length);
            BinaryPrimitives.WriteInt64BigEndian(extra, snapshot.VmStateSize);
            BinaryPrimitives.WriteInt64BigEndian(extra.AsSpan(8), snapshot.DiskSize);
            BinaryPrimitives.WriteUInt64BigEndian(extra.AsSpan(16), snapshot.InstructionCount);
            table.Write(head);
            table.Write(extra);
            table.Write(snapshot.UnknownExtra);
            table.Write(id);
            table.Write(name);
        }
        return table.ToArray();
    }
}
