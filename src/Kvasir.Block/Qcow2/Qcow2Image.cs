using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Linux;

namespace Kvasir.Block.Qcow2;

/// <summary>How a qcow2 image is opened.</summary>
public sealed record Qcow2Options
{
    public bool ReadOnly { get; init; }

    /// <summary>The header, where it has been read; null: it is read.</summary>
    internal Qcow2Header? Header { get; init; }

    /// <summary>The passphrase of an encrypted image; null: data cannot be read.</summary>
    public ReadOnlyMemory<byte>? Passphrase { get; init; }

    /// <summary>Most bytes of L2 tables kept in memory.</summary>
    public long L2CacheBytes { get; init; } = 32L << 20;

    /// <summary>Most bytes of reference counts kept in memory.</summary>
    public long RefcountCacheBytes { get; init; } = 1L << 20;

    /// <summary>Whether the space of freed clusters is given back to the file below.</summary>
    public bool Discard { get; init; } = true;

    /// <summary>Overrides the image's own lazy-refcounts flag.</summary>
    public bool? LazyRefcounts { get; init; }

    /// <summary>The external data file, for images that have one; owned.</summary>
    public BlockNode? DataFile { get; init; }

    /// <summary>Open although the image is marked dirty or corrupt, and leave it so (check).</summary>
    public bool ForCheck { get; init; }
}

/// <summary>
/// A qcow2 image, versions 2 and 3 (QEMU's docs/interop/qcow2.txt).
/// <para>
/// Order on disk. Data and increased reference counts go first, then (after a flush of the file) new refcount blocks' table
/// entries, then L2 tables, then L1 entries, and only when those are stable are counts decreased. So a crash at any write leaves at
/// most clusters that are counted and unused.
/// </para>
/// <para>
/// Threads. One metadata lock guards the tables and is never held while guest data moves; a write that allocates holds its range of
/// guest clusters from the allocation until its L2 entries are set; one that writes to a cluster where it is counts as under way, and no
/// cluster that was dropped meanwhile gets another owner before it ends. Lock order: range, then metadata.
/// </para>
/// </summary>
public sealed partial class Qcow2Image : BlockNode
{
    private const ulong CopiedFlag = 1ul << 63;
    private const ulong CompressedFlag = 1ul << 62;
    private const ulong ZeroFlag = 1;
    private const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;
    private const int SectorSize = 512;

    // Configuration
    private readonly Qcow2Header _header;
    private readonly Qcow2Options _options;
    private readonly int _clusterBits;
    private readonly int _clusterSize;
    private readonly int _entryBytes;
    private readonly int _l2Bits;
    private readonly int _subclusterBits;
    private readonly bool _lazyRefcounts;

    // Wiring
    private readonly BlockNode _file;
    private readonly BlockNode? _dataFile;
    private readonly TableCache _l2Cache;
    private readonly Qcow2Codec _codec;
    private readonly SectorCipher? _cipher;
    private BlockNode? _backing;

    // State
    private readonly AsyncMutex _lock = new();
    private readonly RangeLock _allocating = new();
    private readonly InPlaceWrites _inPlaceWrites = new();
    private readonly HashSet<long> _metadata = [];
    private readonly SortedSet<int> _dirtyL1 = [];
    private RefcountTable _refcounts;
    private ulong[] _l1;
    private Qcow2BitmapTracker? _tracker;
    private bool _corrupt;
    private bool _closed;
    private bool? _mayHoldHoles;
    private List<Qcow2Snapshot> _snapshots = [];

    private Qcow2Image(BlockNode file, Qcow2Header header, Qcow2Options options, ulong[] l1, ulong[] refcountTable, SectorCipher? cipher)
    {
        _file = file;
        _header = header;
        _options = options;
        _clusterBits = header.ClusterBits;
        _clusterSize = header.ClusterSize;
        _entryBytes = header.L2EntryBytes;
        _l2Bits = _clusterBits - (header.HasExtendedL2 ? 4 : 3);
        _subclusterBits = header.HasExtendedL2 ? _clusterBits - 5 : _clusterBits;
        _lazyRefcounts = header.Version >= 3 && (options.LazyRefcounts ?? (header.Compatible & Qcow2Compatible.LazyRefcounts) != 0);
        _l1 = l1;
        _cipher = cipher;
        _codec = new Qcow2Codec(header.Compression);
        _dataFile = options.DataFile;
        _l2Cache = new TableCache(file, Math.Min(_clusterSize, 4096), options.L2CacheBytes);
        _refcounts = new RefcountTable(file, header, refcountTable, options.RefcountCacheBytes);
        _corrupt = (header.Incompatible & Qcow2Incompatible.Corrupt) != 0;
        RegisterMetadata();
    }

    /// <summary>What an L2 entry says of a subcluster.</summary>
    private enum Kind
    {
        /// <summary>Nothing here; the backing file shows.</summary>
        Unallocated,

        /// <summary>The cluster has a place, but this subcluster still shows the backing file.</summary>
        UnallocatedReserved,
        Zero,

        /// <summary>Reads as zeros and has a place.</summary>
        ZeroReserved,
        Normal,
        Compressed,
    }

    public override string Driver => "qcow2";

    public override long Length => _header.Size;

    public override BlockNode File => _file;

    public override BlockNode? Backing => _backing;

    public override bool IsReadOnly => _options.ReadOnly || _file.IsReadOnly;

    public override int ClusterSize => _clusterSize;

    public override int RequestAlignment => _header.Encryption == Qcow2Encryption.None ? 1 : SectorSize;

    public override bool IsZeroWhenCreated => true;

    public override bool MayHoldHoles => _mayHoldHoles ?? false;

    public override bool HasFastZero => _header.Version >= 3;

    /// <summary>The external data file; null: data lies in the image file.</summary>
    public BlockNode? DataFile => _dataFile;

    public override BlockNode? DataFileAt(long offset) => DataNode;

    public int SubclusterSize => 1 << _subclusterBits;

    public string? BackingFileName => _header.BackingFile;

    public string? BackingFormat => _header.BackingFormat;

    public Qcow2Encryption Encryption => _header.Encryption;

    public Qcow2Compression CompressionType => _header.Compression;

    public int RefcountBits => 1 << _header.RefcountOrder;

    public int Version => _header.Version;

    public bool HasExtendedL2 => _header.HasExtendedL2;

    public bool IsDirty => (_header.Incompatible & Qcow2Incompatible.Dirty) != 0;

    public bool IsCorrupt => _corrupt;

    public bool LazyRefcounts => (_header.Compatible & Qcow2Compatible.LazyRefcounts) != 0;

    public string? DataFileName => _header.DataFile;

    public bool DataFileIsRaw => (_header.Autoclear & Qcow2Autoclear.DataFileRaw) != 0;

    /// <summary>The crypto header's place in the file, for tools that change key slots.</summary>
    public (long Offset, long Length) CryptoHeader => (_header.CryptoOffset, _header.CryptoLength);

    public LuksHeader? Luks { get; private init; }

    internal Qcow2Header Header => _header;

    private BlockNode DataNode => _dataFile ?? _file;

    /// <summary>Opens an image.</summary>
    /// <param name="file">Where the image lies; owned once this returns.</param>
    /// <param name="options">How.</param>
    /// <param name="cancellation">Ends the opening early.</param>
    /// <exception cref="BlockException">The image is damaged, unsupported, or its passphrase is wrong.</exception>
    public static async ValueTask<Qcow2Image> OpenAsync(BlockNode file, Qcow2Options options, CancellationToken cancellation = default)
    {
        Qcow2Header header = options.Header ?? await Qcow2Header.ReadAsync(file, cancellation).ConfigureAwait(false);
        if ((header.Incompatible & Qcow2Incompatible.Corrupt) != 0 && !options.ReadOnly && !options.ForCheck)
            throw new BlockException("qcow2: Image is corrupt; cannot be opened read/write", BlockErrno.Access);
        if (header.HasDataFile != (options.DataFile is not null) && !options.ForCheck)
            throw new BlockException(header.HasDataFile ? "'data-file' is required for this image" : "'data-file' can only be set for images with an external data file");
        ulong[] refcountTable = await RefcountTable.LoadTableAsync(file, header, cancellation).ConfigureAwait(false);
        ulong[] l1 = await LoadL1Async(file, header.L1Offset, header.L1Size, cancellation).ConfigureAwait(false);
        (SectorCipher? cipher, LuksHeader? luks) = await OpenCipherAsync(file, header, options, cancellation).ConfigureAwait(false);
        Qcow2Image image = new(file, header, options, l1, refcountTable, cipher) { Luks = luks };
        image._snapshots = await image.LoadSnapshotsAsync(cancellation).ConfigureAwait(false);
        if (!image.IsReadOnly && !options.ForCheck)
        {
            await image.PrepareWritingAsync(cancellation).ConfigureAwait(false);
            if (header.BitmapCount > 0)
                image._tracker = await Qcow2BitmapTracker.CreateAsync(image, cancellation).ConfigureAwait(false);
        }
        return image;
    }

    /// <summary>Gives the image its backing file; owned from now on.</summary>
    public void SetBacking(BlockNode? backing) => _backing = backing;

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if (IsReadOnly)
            return;
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await FlushTablesAsync(cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
        if (_dataFile is not null)
            await _dataFile.FlushAsync(cancellation).ConfigureAwait(false);
        await _file.FlushAsync(cancellation).ConfigureAwait(false);
    }

    public override async ValueTask DisposeAsync()
    {
        if (_closed)
            return;
        _closed = true;
        try
        {
            if (!IsReadOnly && !_corrupt)
            {
                if (_tracker is not null)
                    await _tracker.StoreAsync().ConfigureAwait(false);
                await CloseTablesAsync().ConfigureAwait(false);
            }
        }
        finally
        {
            _codec.Dispose();
            if (_dataFile is not null)
                await _dataFile.DisposeAsync().ConfigureAwait(false);
            await base.DisposeAsync().ConfigureAwait(false);
        }
    }

    /// <summary>
    /// Gives the bits of a recording bitmap (least significant bit of a byte first) and begins it afresh, for an incremental backup of the
    /// disk as it is now. The caller keeps requests away meanwhile (<see cref="BlockBackend.SwapAsync"/>).
    /// </summary>
    /// <exception cref="BlockException">There is no such bitmap, or it does not record.</exception>
    public async ValueTask<byte[]> TakeBitmapAsync(string name) =>
        (_tracker is null ? null : await _tracker.TakeAsync(name).ConfigureAwait(false)) ?? throw new BlockException($"Dirty bitmap '{name}' not found, or it does not record", BlockErrno.NoEntry);

    /// <summary>Puts bits back that <see cref="TakeBitmapAsync"/> gave, after a backup that failed.</summary>
    public void PutBackBitmap(string name, byte[] bits) => _tracker?.PutBack(name, bits);

    /// <summary>A recording bitmap's bits as they are now; false where nothing was written yet.</summary>
    internal bool TryBitmapRun(string name, long offset, long length, out (long Length, bool Dirty) run)
    {
        run = default;
        return _tracker?.TryRun(name, offset, length, out run) ?? false;
    }

    /// <summary>Reads of the VM state, which lies past the end of the disk.</summary>
    public ValueTask ReadVmStateAsync(long offset, Memory<byte> buffer, CancellationToken cancellation = default) =>
        ReadCoreAsync(VmStateOffset + offset, buffer, cancellation);

    /// <summary>Writes of the VM state, which lies past the end of the disk and goes with the next snapshot.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask WriteVmStateAsync(long offset, ReadOnlyMemory<byte> buffer, CancellationToken cancellation = default)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await GrowL1Async(VmStateOffset + offset + buffer.Length, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
        await WriteCoreAsync(VmStateOffset + offset, buffer, WriteFlags.None, cancellation).ConfigureAwait(false);
    }

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        // Most requests lie in one run whose table is in memory: they go on without a state machine of their own.
        if (TryFind(offset, buffer.Length, out Mapping mapping) && mapping.Length == buffer.Length)
        {
            switch (mapping.Kind)
            {
                case Kind.Normal when _header.Encryption == Qcow2Encryption.None:
                    return DataNode.ReadAsync(mapping.Host, buffer, cancellation);
                case Kind.Zero or Kind.ZeroReserved:
                    buffer.Span.Clear();
                    return default;
                case Kind.Unallocated or Kind.UnallocatedReserved when _backing is null:
                    buffer.Span.Clear();
                    return default;
                case Kind.Unallocated or Kind.UnallocatedReserved when offset + buffer.Length <= _backing.Length:
                    return _backing.ReadAsync(offset, buffer, cancellation);
                default:
                    break;
            }
        }
        return ReadRunsAsync(offset, buffer, cancellation);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadRunsAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            Mapping mapping;
            await _lock.EnterAsync().ConfigureAwait(false);
            try
            {
                mapping = await FindAsync(offset, buffer.Length, cancellation).ConfigureAwait(false);
            }
            finally
            {
                _lock.Exit();
            }
            int length = (int)mapping.Length;
            Memory<byte> part = buffer[..length];
            switch (mapping.Kind)
            {
                case Kind.Normal:
                    await DataNode.ReadAsync(mapping.Host, part, cancellation).ConfigureAwait(false);
                    if (_header.Encryption != Qcow2Encryption.None)
                        Cipher.Decrypt(CipherSector(offset, mapping.Host), part.Span);
                    break;
                case Kind.Zero or Kind.ZeroReserved:
                    part.Span.Clear();
                    break;
                case Kind.Compressed:
                    await ReadCompressedAsync(offset, mapping.Entry, part, cancellation).ConfigureAwait(false);
                    break;
                default:
                    await ReadBackingAsync(offset, part, cancellation).ConfigureAwait(false);
                    break;
            }
            buffer = buffer[length..];
            offset += length;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            _mayHoldHoles ??= await IsSparseAsync(cancellation).ConfigureAwait(false);
            Mapping first = await FindAsync(offset, length, cancellation).ConfigureAwait(false);
            long total = first.Length;
            while (total < length && first.Kind != Kind.Compressed)
            {
                Mapping next = await FindAsync(offset + total, length - total, cancellation).ConfigureAwait(false);
                if (next.Kind != first.Kind || (HasPlace(first.Kind) && next.Host != first.Host + total))
                    break;
                total += next.Length;
            }
            BlockFlags flags = first.Kind switch
            {
                Kind.Normal => BlockFlags.Data | BlockFlags.Allocated | (_header.Encryption == Qcow2Encryption.None ? BlockFlags.OffsetValid : BlockFlags.None),
                Kind.Compressed => BlockFlags.Data | BlockFlags.Allocated | BlockFlags.Compressed,
                Kind.Zero => BlockFlags.Zero | BlockFlags.Allocated,
                Kind.ZeroReserved => BlockFlags.Zero | BlockFlags.Allocated | (_header.Encryption == Qcow2Encryption.None ? BlockFlags.OffsetValid : BlockFlags.None),
                Kind.UnallocatedReserved when _header.Encryption == Qcow2Encryption.None => (_backing is null ? BlockFlags.Zero : BlockFlags.None) | BlockFlags.OffsetValid,
                _ => _backing is null ? BlockFlags.Zero : BlockFlags.None,
            };
            return new BlockStatus(total, flags, HasPlace(first.Kind) ? first.Host : 0);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>
    /// Whether the image counts many more clusters than its file has space for (a ninth, and two at the least): then it was preallocated, and
    /// what is data for the tables may be holes. Only so long as it takes is counted.
    /// </summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<bool> IsSparseAsync(CancellationToken cancellation)
    {
        long allocated = _file.AllocatedBytes;
        if (allocated < 0)
            return false;
        long space = allocated >> _clusterBits;
        long enough = Math.Max(space * 10 / 9, space + 2);
        long end = (_file.Length + _clusterSize - 1) >> _clusterBits;
        long counted = 0;
        for (long cluster = 0; cluster < end && counted < enough && counted + (end - cluster) >= enough; cluster++)
            counted += await _refcounts.GetAsync(cluster, cancellation).ConfigureAwait(false) != 0 ? 1 : 0;
        return counted >= enough;
    }

    private static bool HasPlace(Kind kind) => kind is Kind.Normal or Kind.ZeroReserved or Kind.UnallocatedReserved;

    private static async ValueTask<ulong[]> LoadL1Async(BlockNode file, long offset, int entries, CancellationToken cancellation)
    {
        byte[] bytes = new byte[entries * 8];
        await file.ReadAsync(offset, bytes, cancellation).ConfigureAwait(false);
        ulong[] table = new ulong[entries];
        BinaryPrimitives.ReverseEndianness(MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()), table);
        return table;
    }

    private static async ValueTask<(SectorCipher? Cipher, LuksHeader? Luks)> OpenCipherAsync(
        BlockNode file, Qcow2Header header, Qcow2Options options, CancellationToken cancellation)
    {
        switch (header.Encryption)
        {
            case Qcow2Encryption.Aes:
                if (!options.ReadOnly && !options.ForCheck)
                    throw new BlockException("Images with the legacy AES encryption can only be read; convert them to LUKS", BlockErrno.NotSupported);
                return (options.Passphrase is ReadOnlyMemory<byte> secret ? SectorCipher.LegacyAes(secret.Span) : null, null);
            case Qcow2Encryption.Luks:
                if (header.CryptoOffset == 0)
                    throw new BlockException("Encryption header not present, but the image is marked as encrypted");
                LuksHeader luks = await LuksHeader.ReadAsync(file, header.CryptoOffset, header.CryptoLength, cancellation).ConfigureAwait(false);
                SectorCipher? cipher = options.Passphrase is ReadOnlyMemory<byte> passphrase
                    ? await luks.UnlockAsync(file, header.CryptoOffset, passphrase, cancellation).ConfigureAwait(false)
                    : null;
                return (cipher, luks);
            default:
                return (null, null);
        }
    }

    private SectorCipher Cipher => _cipher ?? throw new BlockException("Parameter 'encrypt.key-secret' is required for cipher", BlockErrno.Access);

    /// <summary>Where the VM state begins: past the end of the disk, at a table's start.</summary>
    public long VmStateOffset
    {
        get
        {
            long perTable = 1L << (_l2Bits + _clusterBits);
            return (_header.Size + perTable - 1) / perTable * perTable;
        }
    }

    /// <summary>LUKS counts sectors of the file, the legacy format those of the guest.</summary>
    private ulong CipherSector(long guest, long host) => (ulong)(_header.Encryption == Qcow2Encryption.Luks ? host : guest) / SectorSize;

    private void RegisterMetadata()
    {
        _metadata.Clear();
        _metadata.Add(0);
        _refcounts.MetadataClusters.Clear();
        _refcounts.RegisterMetadata();
        for (long at = 0; at < _header.L1Size * 8L; at += _clusterSize)
            _metadata.Add((_header.L1Offset + at) >> _clusterBits);
        foreach (ulong entry in _l1)
        {
            if ((entry & OffsetMask) != 0)
                _metadata.Add((long)(entry & OffsetMask) >> _clusterBits);
        }
        if (_header.SnapshotCount > 0)
            _metadata.Add(_header.SnapshotsOffset >> _clusterBits);
    }

    /// <summary>Fails a write that would hit the image's own tables: a damaged or hostile image maps guest data onto them.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask CheckOverlapAsync(long host, long length)
    {
        if (!HitsMetadata(host, length))
            return;
        for (long cluster = host >> _clusterBits; cluster <= (host + length - 1) >> _clusterBits; cluster++)
        {
            if (_metadata.Contains(cluster) || _refcounts.MetadataClusters.Contains(cluster))
            {
                await MarkCorruptAsync().ConfigureAwait(false);
                throw BlockException.Corrupt(
                    $"qcow2: Marking image as corrupt: Preventing invalid write on metadata at cluster 0x{cluster:x}; further corruption events will be suppressed");
            }
        }
    }

    private bool HitsMetadata(long host, long length)
    {
        if (_dataFile is not null)
            return false;
        for (long cluster = host >> _clusterBits; cluster <= (host + length - 1) >> _clusterBits; cluster++)
        {
            if (_metadata.Contains(cluster) || _refcounts.MetadataClusters.Contains(cluster))
                return true;
        }
        return false;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask MarkCorruptAsync()
    {
        if (_corrupt)
            return;
        _corrupt = true;
        if (_header.Version < 3 || IsReadOnly)
            return;
        _header.Incompatible |= Qcow2Incompatible.Corrupt;
        await WriteHeaderAsync(default).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadBackingAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        if (_backing is BlockNode backing && offset < backing.Length)
        {
            int there = (int)Math.Min(buffer.Length, backing.Length - offset);
            await backing.ReadAsync(offset, buffer[..there], cancellation).ConfigureAwait(false);
            buffer = buffer[there..];
        }
        buffer.Span.Clear();
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadCompressedAsync(long offset, ulong entry, Memory<byte> buffer, CancellationToken cancellation)
    {
        (long host, int size) = CompressedExtent(entry);
        using AlignedBuffer data = AlignedBuffer.Rent(size);
        using AlignedBuffer cluster = AlignedBuffer.Rent(_clusterSize);
        await _file.ReadAsync(host, data.Memory[..size], cancellation).ConfigureAwait(false);
        if (!_codec.Expand(data.Memory.Span[..size], cluster.Memory.Span[.._clusterSize]))
            throw BlockException.Corrupt($"The compressed cluster at 0x{host:x} of {FileName} is damaged");
        cluster.Memory.Slice((int)(offset & (_clusterSize - 1)), buffer.Length).CopyTo(buffer);
    }

    /// <summary>Place and size of a compressed cluster's data (docs/interop/qcow2.txt, "Compressed Clusters Descriptor").</summary>
    private (long Host, int Size) CompressedExtent(ulong entry)
    {
        int shift = 62 - (_clusterBits - 8);
        long host = (long)(entry & ((1ul << shift) - 1));
        int sectors = (int)((entry >> shift) & ((1ul << (_clusterBits - 8)) - 1)) + 1;
        return (host, (sectors * SectorSize) - (int)(host & (SectorSize - 1)));
    }

    /// <summary>What is at a guest offset, and for how many bytes. Metadata lock held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<Mapping> FindAsync(long offset, long length, CancellationToken cancellation)
    {
        long l1Index = offset >> (_l2Bits + _clusterBits);
        long tableEnd = (l1Index + 1) << (_l2Bits + _clusterBits);
        if (l1Index >= _l1.Length || (_l1[l1Index] & OffsetMask) == 0)
        {
            while (tableEnd < offset + length && ++l1Index < _l1.Length && (_l1[l1Index] & OffsetMask) == 0)
                tableEnd += 1L << (_l2Bits + _clusterBits);
            return new Mapping(Kind.Unallocated, 0, Math.Min(length, tableEnd - offset), 0, false);
        }
        TableSlice slice = await L2SliceAsync(offset, cancellation).ConfigureAwait(false);
        return MapInSlice(slice, offset, length);
    }

    /// <summary>The same, if nothing has to be waited for.</summary>
    private bool TryFind(long offset, long length, out Mapping mapping)
    {
        mapping = default;
        if (!_lock.TryEnter())
            return false;
        try
        {
            long l1Index = offset >> (_l2Bits + _clusterBits);
            if (l1Index >= _l1.Length || (_l1[l1Index] & OffsetMask) == 0)
            {
                long tableEnd = (l1Index + 1) << (_l2Bits + _clusterBits);
                mapping = new Mapping(Kind.Unallocated, 0, Math.Min(length, tableEnd - offset), 0, false);
                return true;
            }
            if (!TrySlice(offset, out TableSlice? slice))
                return false;
            mapping = MapInSlice(slice!, offset, length);
            return true;
        }
        finally
        {
            _lock.Exit();
        }
    }

    private bool TrySlice(long offset, out TableSlice? slice)
    {
        long table = (long)(_l1[offset >> (_l2Bits + _clusterBits)] & OffsetMask);
        long index = (offset >> _clusterBits) & ((1L << _l2Bits) - 1);
        slice = null;
        return (table & (_clusterSize - 1)) == 0 && _l2Cache.TryGet(table + ((index * _entryBytes) & ~(_l2Cache.SliceSize - 1L)), out slice);
    }

    private Mapping MapInSlice(TableSlice slice, long offset, long length)
    {
        int index = IndexInSlice(offset);
        int entries = _l2Cache.SliceSize / _entryBytes;
        Kind kind = KindAt(slice, index, offset, out ulong entry);
        bool copied = (entry & CopiedFlag) != 0;
        if (kind == Kind.Compressed)
            return new Mapping(kind, 0, Math.Min(length, _clusterSize - (offset & (_clusterSize - 1))), entry, false);
        long host = HostOf(entry, offset, kind);
        long unit = 1L << _subclusterBits;
        long total = unit - (offset & (unit - 1));
        while (total < length)
        {
            long next = offset + total;
            if ((next & (_clusterSize - 1)) == 0 && ++index == entries)
                break;
            if (KindAt(slice, index, next, out ulong nextEntry) != kind || (nextEntry & CopiedFlag) != 0 != copied)
                break;
            if (HasPlace(kind) && HostOf(nextEntry, next, kind) != host + total)
                break;
            total += unit;
        }
        return new Mapping(kind, host, Math.Min(total, length), entry, copied);
    }

    private Kind KindAt(TableSlice slice, int index, long offset, out ulong entry)
    {
        entry = BinaryPrimitives.ReadUInt64BigEndian(slice.Data.AsSpan(index * _entryBytes));
        if ((entry & CompressedFlag) != 0)
            return _dataFile is null ? Kind.Compressed : throw BlockException.Corrupt("Compressed cluster in an image with an external data file");
        bool placed = (entry & OffsetMask) != 0 || (_dataFile is not null && (entry & CopiedFlag) != 0);
        if (!_header.HasExtendedL2)
        {
            if ((entry & ZeroFlag) != 0 && _header.Version >= 3)
                return placed ? Kind.ZeroReserved : Kind.Zero;
            return placed ? Kind.Normal : Kind.Unallocated;
        }
        ulong bitmap = BinaryPrimitives.ReadUInt64BigEndian(slice.Data.AsSpan((index * _entryBytes) + 8));
        int sub = (int)((offset >> _subclusterBits) & 31);
        bool allocated = (bitmap & (1ul << sub)) != 0;
        bool zero = (bitmap & (1ul << (sub + 32))) != 0;
        if ((allocated && zero) || (allocated && !placed))
            throw BlockException.Corrupt($"Invalid subcluster bitmap {bitmap:x16} for guest offset 0x{offset:x}");
        if (zero)
            return placed ? Kind.ZeroReserved : Kind.Zero;
        if (allocated)
            return Kind.Normal;
        return placed ? Kind.UnallocatedReserved : Kind.Unallocated;
    }

    private long HostOf(ulong entry, long offset, Kind kind)
    {
        if (!HasPlace(kind))
            return 0;
        long host = (long)(entry & OffsetMask);
        if ((host & (_clusterSize - 1)) != 0)
            throw BlockException.Corrupt($"Cluster allocation offset 0x{host:x} unaligned (guest offset: 0x{offset:x})");
        return host + (offset & (_clusterSize - 1));
    }

    private int IndexInSlice(long offset) => (int)((offset >> _clusterBits) & ((_l2Cache.SliceSize / _entryBytes) - 1));

    /// <summary>The slice of the L2 table for a guest offset, whose table exists.</summary>
    private ValueTask<TableSlice> L2SliceAsync(long offset, CancellationToken cancellation)
    {
        long table = (long)(_l1[offset >> (_l2Bits + _clusterBits)] & OffsetMask);
        if ((table & (_clusterSize - 1)) != 0)
            throw BlockException.Corrupt($"L2 table offset 0x{table:x} unaligned (L1 index: 0x{offset >> (_l2Bits + _clusterBits):x})");
        long index = (offset >> _clusterBits) & ((1L << _l2Bits) - 1);
        long place = table + ((index * _entryBytes) & ~(_l2Cache.SliceSize - 1L));
        if (_l2Cache.TryGet(place, out TableSlice? slice))
            return new ValueTask<TableSlice>(slice!);
        return LoadL2Async(place, cancellation);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<TableSlice> LoadL2Async(long place, CancellationToken cancellation)
    {
        if (_l2Cache.NeedsFlush)
            await FlushTablesAsync(cancellation).ConfigureAwait(false);
        return await _l2Cache.LoadAsync(place, cancellation).ConfigureAwait(false);
    }

    private readonly record struct Mapping(Kind Kind, long Host, long Length, ulong Entry, bool Copied);
}
