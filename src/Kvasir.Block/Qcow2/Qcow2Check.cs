using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

[Flags]
public enum CheckRepair
{
    None = 0,
    Leaks = 1,
    Errors = 2,
    All = Leaks | Errors,
}

/// <summary>What a check found; the fields are those of `qemu-img check --output=json`.</summary>
public sealed record CheckResult
{
    public long Corruptions { get; set; }

    public long Leaks { get; set; }

    public long CorruptionsFixed { get; set; }

    public long LeaksFixed { get; set; }

    public long CheckErrors { get; set; }

    public long ImageEndOffset { get; set; }

    public long TotalClusters { get; set; }

    public long AllocatedClusters { get; set; }

    public long FragmentedClusters { get; set; }

    public long CompressedClusters { get; set; }
}

/// <summary>
/// Checks an image: counts all references afresh, compares with the stored counts and flags, and repairs where asked. Memory is
/// bounded by the clusters that are referenced or exist, two bytes each.
/// </summary>
internal sealed class Qcow2Check
{
    private const ulong CopiedFlag = 1ul << 63;
    private const ulong CompressedFlag = 1ul << 62;
    private const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;
    private const ulong L1Reserved = 0x7f00_0000_0000_01ff;
    private const ulong L2Reserved = 0x3f00_0000_0000_01fe;
    private const int ChunkBits = 16;

    private readonly Qcow2Image _image;
    private readonly BlockNode _file;
    private readonly Qcow2Header _header;
    private readonly CheckRepair _repair;
    private readonly Action<string>? _report;
    private readonly CheckResult _result = new();
    private readonly Dictionary<long, ushort[]> _counted = [];
    private readonly HashSet<long> _walkedTables = [];
    private readonly long _fileClusters;
    private byte[]? _l2;
    private long _lastContiguous;
    private long _lastKey = -1;
    private ushort[] _lastChunk = [];
    private bool _rewritten;

    private Qcow2Check(Qcow2Image image, CheckRepair repair, Action<string>? report)
    {
        _image = image;
        _file = image.File;
        _header = image.Header;
        _repair = repair;
        _report = report;
        _fileClusters = (_file.Length + _header.ClusterSize - 1) >> _header.ClusterBits;
    }

    private bool RepairErrors => (_repair & CheckRepair.Errors) != 0;

    /// <param name="image">A quiescent image.</param>
    /// <param name="repair">What to repair.</param>
    /// <param name="report">Gets one line for each finding.</param>
    /// <param name="cancellation">Ends the check early.</param>
    public static async ValueTask<CheckResult> RunAsync(Qcow2Image image, CheckRepair repair, Action<string>? report, CancellationToken cancellation)
    {
        Qcow2Check check = new(image, repair, report);
        await image.FlushForCheckAsync(cancellation).ConfigureAwait(false);
        await check.CountAsync(cancellation).ConfigureAwait(false);
        await check.CompareAsync(cancellation).ConfigureAwait(false);
        if (check._rewritten || check._result.CorruptionsFixed + check._result.LeaksFixed > 0)
            await image.ReloadTablesAsync(cancellation).ConfigureAwait(false);
        if (repair == CheckRepair.All && check._result.CheckErrors == 0 && check._result.Corruptions == 0)
            await image.ClearTroubleBitsAsync(cancellation).ConfigureAwait(false);
        return check._result;
    }

    private async ValueTask CountAsync(CancellationToken cancellation)
    {
        Count(0, 1, "header");
        await WalkL1Async(_header.L1Offset, _header.L1Size, active: true, "active", cancellation).ConfigureAwait(false);
        foreach (Qcow2Snapshot snapshot in _image.Snapshots)
            await WalkL1Async(snapshot.L1Offset, snapshot.L1Size, active: false, "snapshot '" + snapshot.Name + "'", cancellation).ConfigureAwait(false);
        if (_header.SnapshotCount > 0)
            Count(_header.SnapshotsOffset, _image.SnapshotTableBytes, "snapshot table");
        if (_header.CryptoOffset != 0)
            Count(_header.CryptoOffset, _header.CryptoLength, "encryption header");
        await WalkBitmapsAsync(cancellation).ConfigureAwait(false);
        Count(_header.RefcountTableOffset, (long)_header.RefcountTableClusters << _header.ClusterBits, "refcount table");
        await WalkRefcountTableAsync(cancellation).ConfigureAwait(false);
        long perCluster = _header.ClusterSize;
        _result.TotalClusters = (_header.Size + perCluster - 1) / perCluster;
    }

    private async ValueTask WalkRefcountTableAsync(CancellationToken cancellation)
    {
        ulong[] table = await RefcountTable.LoadTableAsync(_file, _header, cancellation).ConfigureAwait(false);
        for (int i = 0; i < table.Length; i++)
        {
            long place = (long)(table[i] & OffsetMask);
            if (place == 0)
                continue;
            if ((place & (_header.ClusterSize - 1)) != 0 || (table[i] & ~OffsetMask) != 0)
            {
                await BadRefblockAsync(i, $"ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted", cancellation).ConfigureAwait(false);
                continue;
            }
            if (place >> _header.ClusterBits >= _fileClusters)
            {
                await BadRefblockAsync(i, $"ERROR refcount block {i} is outside image", cancellation).ConfigureAwait(false);
                continue;
            }
            Count(place, _header.ClusterSize, "refcount block");
            if (Counted(place >> _header.ClusterBits) > 1)
                await BadRefblockAsync(i, $"ERROR refcount block {i} refcount={Counted(place >> _header.ClusterBits)}", cancellation).ConfigureAwait(false);
        }
    }

    private async ValueTask BadRefblockAsync(int index, string text, CancellationToken cancellation)
    {
        if (!RepairErrors)
        {
            Corruption(text);
            return;
        }
        _report?.Invoke("Repairing " + text[6..]);
        byte[] zero = new byte[8];
        await _file.WriteAsync(_header.RefcountTableOffset + (index * 8L), zero, WriteFlags.None, cancellation).ConfigureAwait(false);
        _result.CorruptionsFixed++;
        _rewritten = true;
    }

    private async ValueTask WalkL1Async(long offset, int entries, bool active, string owner, CancellationToken cancellation)
    {
        if (entries == 0)
            return;
        Count(offset, entries * 8L, "L1 table");
        byte[] l1 = new byte[entries * 8];
        await _file.ReadAsync(offset, l1, cancellation).ConfigureAwait(false);
        for (int i = 0; i < entries; i++)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(l1.AsSpan(i * 8));
            long place = (long)(entry & OffsetMask);
            if (place == 0)
                continue;
            if ((entry & L1Reserved) != 0)
                Corruption($"ERROR found L1 entry with reserved bits set: {entry:x}");
            if ((place & (_header.ClusterSize - 1)) != 0)
            {
                Corruption($"ERROR l2_offset={place:x}: Table is not cluster aligned; L1 entry corrupted");
                continue;
            }
            if (!Count(place, _header.ClusterSize, "L2 table"))
                continue;
            await WalkL2Async(place, (long)i << (_header.ClusterBits + _header.ClusterBits - (_header.HasExtendedL2 ? 4 : 3)), active, owner, cancellation)
                .ConfigureAwait(false);
        }
    }

    private async ValueTask WalkL2Async(long place, long guestBase, bool active, string owner, CancellationToken cancellation)
    {
        _walkedTables.Add(place);
        // Runs are looked at table by table, as QEMU counts them.
        _lastContiguous = 0;
        byte[] l2 = _l2 ??= new byte[_header.ClusterSize];
        await _file.ReadAsync(place, l2, cancellation).ConfigureAwait(false);
        bool changed = false;
        for (int at = 0; at < l2.Length; at += _header.L2EntryBytes)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(l2.AsSpan(at));
            ulong bitmap = _header.HasExtendedL2 ? BinaryPrimitives.ReadUInt64BigEndian(l2.AsSpan(at + 8)) : 0;
            if ((entry & CompressedFlag) != 0)
            {
                CheckCompressed(entry, active);
                continue;
            }
            long host = (long)(entry & OffsetMask);
            if ((entry & L2Reserved) != 0)
                Corruption($"ERROR found l2 entry with reserved bits set: {entry:x}");
            if ((bitmap & (bitmap >> 32) & uint.MaxValue) != 0)
                Corruption($"ERROR offset={host:x}: Allocated cluster has corrupted subcluster allocation bitmap");
            // In a data file of its own a cluster may lie at 0.
            if (host == 0 && (!_header.HasDataFile || (entry & (CopiedFlag | 1)) != CopiedFlag))
                continue;
            if ((host & (_header.ClusterSize - 1)) != 0)
            {
                if (RepairErrors && _header.Version >= 3 && !_header.HasExtendedL2 && (entry & 1) != 0)
                {
                    BinaryPrimitives.WriteUInt64BigEndian(l2.AsSpan(at), 1);
                    _report?.Invoke($"Repairing offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted.");
                    _result.CorruptionsFixed++;
                    changed = true;
                    continue;
                }
                Corruption($"ERROR offset={host:x}: Cluster is not properly aligned; L2 entry corrupted.");
                continue;
            }
            if (active)
                CountActive(host);
            if (!_header.HasDataFile && !TryCountCluster(host))
                _ = Count(host, _header.ClusterSize, owner + " data at " + (guestBase + ((long)(at / _header.L2EntryBytes) << _header.ClusterBits)));
        }
        if (changed)
        {
            await _file.WriteAsync(place, l2, WriteFlags.None, cancellation).ConfigureAwait(false);
            _rewritten = true;
        }
    }

    private void CheckCompressed(ulong entry, bool active)
    {
        if ((entry & CopiedFlag) != 0)
            Corruption($"ERROR: coffset={entry & ((1ul << 54) - 1):x}: copied flag must never be set for compressed clusters");
        if (_header.HasDataFile)
        {
            Corruption("ERROR compressed cluster in an image with an external data file");
            return;
        }
        int shift = 62 - (_header.ClusterBits - 8);
        long host = (long)(entry & ((1ul << shift) - 1));
        long sectors = (long)((entry >> shift) & ((1ul << (_header.ClusterBits - 8)) - 1)) + 1;
        Count(host & ~511L, sectors * 512, "compressed cluster");
        if (!active)
            return;
        _result.AllocatedClusters++;
        _result.CompressedClusters++;
        // Compressed clusters are fragmented by nature, as they take less than a cluster each.
        _result.FragmentedClusters++;
    }

    private void CountActive(long host)
    {
        _result.AllocatedClusters++;
        if (_lastContiguous != 0 && _lastContiguous != host)
            _result.FragmentedClusters++;
        _lastContiguous = host + _header.ClusterSize;
    }

    private async ValueTask WalkBitmapsAsync(CancellationToken cancellation)
    {
        if (_header.BitmapCount == 0)
            return;
        Count(_header.BitmapDirectoryOffset, _header.BitmapDirectorySize, "bitmap directory");
        foreach (Qcow2BitmapInfo bitmap in await Qcow2Bitmaps.LoadDirectoryAsync(_image, cancellation).ConfigureAwait(false))
        {
            if (bitmap.TableEntries == 0)
                continue;
            Count(bitmap.TableOffset, bitmap.TableEntries * 8L, "bitmap table");
            ulong[] table = await Qcow2Bitmaps.LoadTableAsync(_file, bitmap, cancellation).ConfigureAwait(false);
            foreach (ulong entry in table)
            {
                long place = (long)(entry & OffsetMask);
                if (place != 0)
                    Count(place, _header.ClusterSize, "bitmap data");
            }
        }
    }

    private async ValueTask CompareAsync(CancellationToken cancellation)
    {
        RefcountTable stored = await _image.LoadRefcountsAsync(cancellation).ConfigureAwait(false);
        long highest = 0;
        bool wrote = false;
        for (long cluster = 0; cluster < _fileClusters; cluster++)
        {
            ulong counted = Counted(cluster);
            if (!stored.TryGetCached(cluster, out ulong value))
                value = await stored.GetAsync(cluster, cancellation).ConfigureAwait(false);
            if (counted != 0 || value != 0)
                highest = cluster;
            if (counted == value)
                continue;
            bool leak = value > counted;
            bool fix = (leak && (_repair & CheckRepair.Leaks) != 0) || (!leak && RepairErrors);
            string kind = fix ? "Repairing" : leak ? "Leaked" : "ERROR";
            _report?.Invoke($"{kind} cluster {cluster} refcount={value} reference={counted}");
            if (fix)
            {
                await stored.SetAsync(cluster, counted, cancellation).ConfigureAwait(false);
                wrote = true;
                if (leak)
                    _result.LeaksFixed++;
                else
                    _result.CorruptionsFixed++;
            }
            else if (leak)
            {
                _result.Leaks++;
            }
            else
            {
                _result.Corruptions++;
            }
        }
        if (wrote)
        {
            await _image.StoreRepairedRefcountsAsync(stored, cancellation).ConfigureAwait(false);
            _rewritten = true;
        }
        await CheckFlagsAsync(stored, cancellation).ConfigureAwait(false);
        _result.ImageEndOffset = (highest + 1) << _header.ClusterBits;
    }

    /// <summary>The "copied" flag must be set exactly where the count is one.</summary>
    private async ValueTask CheckFlagsAsync(RefcountTable stored, CancellationToken cancellation)
    {
        byte[] l1 = new byte[_header.L1Size * 8];
        await _file.ReadAsync(_header.L1Offset, l1, cancellation).ConfigureAwait(false);
        byte[] l2 = new byte[_header.ClusterSize];
        bool l1Changed = false;
        for (int i = 0; i < _header.L1Size; i++)
        {
            ulong entry = BinaryPrimitives.ReadUInt64BigEndian(l1.AsSpan(i * 8));
            long place = (long)(entry & OffsetMask);
            if (place == 0 || (place & (_header.ClusterSize - 1)) != 0 || !_walkedTables.Contains(place))
                continue;
            if (await FlagWrongAsync(stored, entry, $"OFLAG_COPIED L2 cluster: l1_index={i}, l1_entry={entry:x}", cancellation).ConfigureAwait(false))
            {
                BinaryPrimitives.WriteUInt64BigEndian(l1.AsSpan(i * 8), entry ^ CopiedFlag);
                l1Changed = true;
            }
            await _file.ReadAsync(place, l2, cancellation).ConfigureAwait(false);
            bool l2Changed = false;
            for (int at = 0; at < l2.Length; at += _header.L2EntryBytes)
            {
                ulong data = BinaryPrimitives.ReadUInt64BigEndian(l2.AsSpan(at));
                if ((data & CompressedFlag) != 0 || (data & OffsetMask) == 0 || _header.HasDataFile || ((long)(data & OffsetMask) & (_header.ClusterSize - 1)) != 0)
                    continue;
                if (stored.TryGetCached((long)(data & OffsetMask) >> _header.ClusterBits, out ulong count) && (count == 1) == ((data & CopiedFlag) != 0))
                    continue;
                if (!await FlagWrongAsync(stored, data, $"OFLAG_COPIED data cluster: l2_entry={data:x}", cancellation).ConfigureAwait(false))
                    continue;
                BinaryPrimitives.WriteUInt64BigEndian(l2.AsSpan(at), data ^ CopiedFlag);
                l2Changed = true;
            }
            if (l2Changed)
                await _file.WriteAsync(place, l2, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        if (l1Changed)
            await _file.WriteAsync(_header.L1Offset, l1, WriteFlags.None, cancellation).ConfigureAwait(false);
    }

    private async ValueTask<bool> FlagWrongAsync(RefcountTable stored, ulong entry, string what, CancellationToken cancellation)
    {
        ulong count = await stored.GetAsync((long)(entry & OffsetMask) >> _header.ClusterBits, cancellation).ConfigureAwait(false);
        if ((count == 1) == ((entry & CopiedFlag) != 0))
            return false;
        if (!RepairErrors)
        {
            Corruption($"ERROR {what} refcount={count}");
            return false;
        }
        _report?.Invoke($"Repairing {what} refcount={count}");
        _result.CorruptionsFixed++;
        _rewritten = true;
        return true;
    }

    private void Corruption(string text)
    {
        _report?.Invoke(text);
        _result.Corruptions++;
    }

    /// <summary>Counts a reference to an aligned cluster in the part of the file that was counted in last.</summary>
    private bool TryCountCluster(long host)
    {
        long cluster = host >> _header.ClusterBits;
        if (cluster >> ChunkBits != _lastKey || cluster >= _fileClusters)
            return false;
        ref ushort count = ref _lastChunk[(int)(cluster & ((1 << ChunkBits) - 1))];
        if (count < ushort.MaxValue)
            count++;
        return true;
    }

    /// <summary>Counts a reference to each cluster of a range; false when it lies outside the file.</summary>
    private bool Count(long offset, long length, string what)
    {
        long first = offset >> _header.ClusterBits;
        long last = (offset + Math.Max(length, 1) - 1) >> _header.ClusterBits;
        if (offset < 0 || offset + length - _file.Length >= _header.ClusterSize)
        {
            Corruption($"ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x{offset:x} size 0x{length:x} ({what})");
            return false;
        }
        for (long cluster = first; cluster <= last; cluster++)
        {
            long key = cluster >> ChunkBits;
            if (!_counted.TryGetValue(key, out ushort[]? chunk))
                _counted[key] = chunk = new ushort[1 << ChunkBits];
            (_lastKey, _lastChunk) = (key, chunk);
            int index = (int)(cluster & ((1 << ChunkBits) - 1));
            if (chunk[index] < ushort.MaxValue)
                chunk[index]++;
        }
        return true;
    }

    private ulong Counted(long cluster)
    {
        long key = cluster >> ChunkBits;
        if (key == _lastKey)
            return _lastChunk[(int)(cluster & ((1 << ChunkBits) - 1))];
        if (!_counted.TryGetValue(key, out ushort[]? chunk))
            return 0;
        (_lastKey, _lastChunk) = (key, chunk);
        return chunk[(int)(cluster & ((1 << ChunkBits) - 1))];
    }
}
