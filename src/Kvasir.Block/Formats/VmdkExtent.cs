using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>
/// One extent of a VMDK: flat (a window of a file), zero, or sparse (grains found through a directory of grain tables; "Virtual Disk
/// Format 5.0", hosted sparse extents). Integers are little-endian. Table entries are written through at once, data before them.
/// </summary>
internal sealed class VmdkExtent : IAsyncDisposable
{
    public const uint Magic = 0x564d_444b;
    public const int HeaderSize = 512;

    private const uint FlagZeroGrain = 1 << 2;
    private const uint FlagCompressed = 1 << 16;
    private const uint FlagMarkers = 1 << 17;
    private const ulong DirectoryAtEnd = ulong.MaxValue;
    private const int LargestDirectory = 16 << 20;
    private const int MostCachedTables = 2048;
    private const uint ZeroGrain = 1;

    // Configuration
    private readonly BlockNode? _node;
    private readonly bool _owns;
    private readonly long _flatOffset;
    private readonly bool _sparse;
    private readonly uint[] _directory = [];
    private readonly uint[] _redundant = [];
    private readonly int _tableEntries;
    private readonly uint _flags;

    // State
    private readonly AsyncMutex _lock = new();
    private readonly Dictionary<uint, uint[]> _tables = [];
    private long _end = -1;

    private VmdkExtent(BlockNode? node, bool owns, long length, long flatOffset)
    {
        _node = node;
        _owns = owns;
        Length = length;
        _flatOffset = flatOffset;
    }

    private VmdkExtent(BlockNode node, bool owns, Header header, uint[] directory, uint[] redundant)
    {
        _node = node;
        _owns = owns;
        _sparse = true;
        Length = header.Capacity * 512;
        GrainSize = (int)(header.GrainSectors * 512);
        _tableEntries = (int)header.TableEntries;
        _flags = header.Flags;
        _directory = directory;
        _redundant = redundant;
    }

    public enum GrainState
    {
        Absent,
        Zero,
        Present,
        Compressed,
    }

    /// <summary>Bytes of the disk it holds.</summary>
    public long Length { get; }

    /// <summary>Bytes of a grain; 0 for flat extents.</summary>
    public int GrainSize { get; }

    public bool IsSparse => _sparse;

    public bool IsCompressed => (_flags & FlagCompressed) != 0;

    public string FileName => _node?.FileName ?? string.Empty;

    /// <summary>The extent's own file; null for zero extents.</summary>
    public BlockNode? Node => _node;

    public static VmdkExtent Flat(BlockNode node, long length, long offset) => new(node, owns: true, length, offset);

    public static VmdkExtent Zero(long length) => new(null, owns: false, length, 0);

    /// <summary>Opens a sparse extent.</summary>
    /// <exception cref="BlockException">Its header or its directory is damaged.</exception>
    public static async ValueTask<VmdkExtent> SparseAsync(BlockNode node, bool owns, CancellationToken cancellation)
    {
        byte[] bytes = new byte[HeaderSize];
        await node.ReadAsync(0, bytes, cancellation).ConfigureAwait(false);
        Header header = Header.Parse(bytes);
        if (header.DirectorySector == DirectoryAtEnd)
        {
            // The real header is the footer: end of stream marker last, footer before it.
            if (node.Length < 1024 + HeaderSize)
                throw new BlockException("VMDK footer is missing");
            await node.ReadAsync(((node.Length + 511) & ~511L) - 1024, bytes, cancellation).ConfigureAwait(false);
            header = Header.Parse(bytes);
            if (header.DirectorySector == DirectoryAtEnd)
                throw new BlockException("VMDK footer does not say where the grain directory is");
        }
        long grains = (header.Capacity + header.GrainSectors - 1) / header.GrainSectors;
        long tables = (grains + header.TableEntries - 1) / header.TableEntries;
        if (tables > LargestDirectory)
            throw new BlockException("VMDK grain directory is too large", BlockErrno.FileTooBig);
        uint[] directory = await LoadAsync(node, (long)header.DirectorySector * 512, (int)tables, cancellation).ConfigureAwait(false);
        bool redundant = (header.Flags & 2) != 0 && header.RedundantSector is > 0 and < DirectoryAtEnd && !node.IsReadOnly;
        uint[] second = redundant ? await LoadAsync(node, (long)header.RedundantSector * 512, (int)tables, cancellation).ConfigureAwait(false) : [];
        return new VmdkExtent(node, owns, header, directory, second);
    }

    /// <summary>The descriptor that a sparse extent's file carries; empty: none.</summary>
    public static async ValueTask<(long At, byte[] Text)> EmbeddedDescriptorAsync(BlockNode node, CancellationToken cancellation)
    {
        byte[] bytes = new byte[HeaderSize];
        await node.ReadAsync(0, bytes, cancellation).ConfigureAwait(false);
        Header header = Header.Parse(bytes);
        long offset = header.DescriptorSector * 512;
        long size = header.DescriptorSectors * 512;
        if (offset == 0 || size == 0)
            return (0, []);
        if (size > VmdkDescriptor.LargestSize || offset > node.Length - size)
            throw new BlockException("VMDK descriptor is too large or outside the file");
        byte[] text = new byte[size];
        await node.ReadAsync(offset, text, cancellation).ConfigureAwait(false);
        return (offset, text);
    }

    public async ValueTask DisposeAsync()
    {
        if (_owns && _node is not null)
            await _node.DisposeAsync().ConfigureAwait(false);
    }

    public ValueTask FlushAsync(CancellationToken cancellation) => _node?.FlushAsync(cancellation) ?? default;

    /// <summary>What a byte is part of, and for how many bytes that holds.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public async ValueTask<(GrainState State, long Host, long Length)> LocateAsync(long offset, long length, CancellationToken cancellation)
    {
        length = Math.Min(length, Length - offset);
        if (_node is null)
            return (GrainState.Zero, 0, length);
        if (!_sparse)
            return (GrainState.Present, _flatOffset + offset, length);
        long grain = offset / GrainSize;
        long within = offset % GrainSize;
        long index = grain / _tableEntries;
        long left = ((index + 1) * _tableEntries * GrainSize) - offset;
        uint table = _directory[index];
        if (table == 0)
            return (GrainState.Absent, 0, Math.Min(length, left));
        uint[] entries = await TableAsync(table, cancellation).ConfigureAwait(false);
        int at = (int)(grain % _tableEntries);
        uint first = Volatile.Read(ref entries[at]);
        GrainState state = StateOf(first);
        long run = GrainSize - within;
        long step = GrainSize / 512;
        while (run < length && state != GrainState.Compressed && ++at < _tableEntries)
        {
            uint next = Volatile.Read(ref entries[at]);
            if (StateOf(next) != state || (state == GrainState.Present && next != first + (step * ((run + within) / GrainSize))))
                break;
            run += GrainSize;
        }
        return (state, state is GrainState.Present or GrainState.Compressed ? (first * 512L) + (state == GrainState.Present ? within : 0) : 0, Math.Min(run, length));
    }

    /// <summary>Expands the grain at a place in the file, or as much of it as is asked for.</summary>
    public async ValueTask ReadCompressedAsync(long host, Memory<byte> grain, CancellationToken cancellation)
    {
        byte[] head = new byte[12];
        bool markers = (_flags & FlagMarkers) != 0;
        if (markers)
            await _node!.ReadAsync(host, head, cancellation).ConfigureAwait(false);
        uint size = BinaryPrimitives.ReadUInt32LittleEndian(head.AsSpan(8));
        // Without markers the size is not stored: what a grain may need at most is read.
        int start = markers ? head.Length : 0;
        if (!markers)
            size = (uint)Math.Clamp(_node!.Length - host, 1, GrainSize + 1024);
        else if (size == 0 || size > LargestRecord)
            throw BlockException.Corrupt($"The compressed grain at 0x{host:x} of {FileName} is damaged");
        byte[] packed = new byte[size];
        await _node!.ReadAsync(host + start, packed, cancellation).ConfigureAwait(false);
        if (!ZlibBlock.Expand(packed, grain.Span))
            throw BlockException.Corrupt($"The compressed grain at 0x{host:x} of {FileName} is damaged");
    }

    /// <summary>Gives a grain a place and its content. The content is a whole grain.</summary>
    public async ValueTask StoreAsync(long offset, ReadOnlyMemory<byte> grain, bool compressed, CancellationToken cancellation)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_end < 0)
                _end = await FindEndAsync(cancellation).ConfigureAwait(false);
            long host = _end;
            if (host / 512 > uint.MaxValue)
                throw new BlockException("The VMDK's file is full", BlockErrno.FileTooBig);
            if (compressed)
            {
                byte[] packed = ZlibBlock.Compress(grain.Span);
                byte[] record = new byte[(12 + packed.Length + 511) & ~511];
                BinaryPrimitives.WriteInt64LittleEndian(record, offset / 512);
                BinaryPrimitives.WriteInt32LittleEndian(record.AsSpan(8), packed.Length);
                packed.CopyTo(record, 12);
                await _node!.WriteAsync(host, record, WriteFlags.None, cancellation).ConfigureAwait(false);
                _end = host + record.Length;
            }
            else
            {
                await _node!.WriteAsync(host, grain, WriteFlags.None, cancellation).ConfigureAwait(false);
                _end = host + grain.Length;
            }
            await EnterAsync(offset, (uint)(host / 512), cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>Marks a grain as zeros, where the extent's flags allow that.</summary>
    public async ValueTask<bool> TryZeroAsync(long offset, CancellationToken cancellation)
    {
        if ((_flags & FlagZeroGrain) == 0)
            return false;
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            await EnterAsync(offset, ZeroGrain, cancellation).ConfigureAwait(false);
            return true;
        }
        finally
        {
            _lock.Exit();
        }
    }

    private GrainState StateOf(uint entry) => entry switch
    {
        0 => GrainState.Absent,
        ZeroGrain when (_flags & FlagZeroGrain) != 0 => GrainState.Zero,
        _ => IsCompressed ? GrainState.Compressed : GrainState.Present,
    };

    private static async ValueTask<uint[]> LoadAsync(BlockNode node, long offset, int entries, CancellationToken cancellation)
    {
        if (offset < 0 || offset > node.Length - (entries * 4L))
            throw new BlockException("VMDK grain directory is outside the file");
        byte[] bytes = new byte[entries * 4];
        await node.ReadAsync(offset, bytes, cancellation).ConfigureAwait(false);
        uint[] table = new uint[entries];
        MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()).CopyTo(table);
        return table;
    }

    /// <summary>
    /// Where a new grain can go: behind the file and behind whatever a table names, as after a crash a table's entry may be there and its grain not.
    /// With the lock held.
    /// </summary>
    private async ValueTask<long> FindEndAsync(CancellationToken cancellation)
    {
        long end = _node!.Length;
        int tableBytes = _tableEntries * 4;
        byte[] bytes = new byte[tableBytes];
        foreach (uint[] directory in (uint[][])[_directory, _redundant])
        {
            foreach (uint table in directory)
            {
                if (table == 0)
                    continue;
                end = Math.Max(end, (table * 512L) + tableBytes);
                if (ReferenceEquals(directory, _redundant) || table * 512L >= _node.Length)
                    continue;
                await _node.ReadAsync(table * 512L, bytes.AsMemory(0, (int)Math.Min(tableBytes, _node.Length - (table * 512L))), cancellation).ConfigureAwait(false);
                foreach (uint entry in MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()))
                {
                    if (StateOf(entry) == GrainState.Present)
                        end = Math.Max(end, (entry * 512L) + GrainSize);
                    else if (StateOf(entry) == GrainState.Compressed && entry * 512L >= _node.Length)
                        end = Math.Max(end, (entry * 512L) + LargestRecord);
                }
            }
        }
        return (end + 511) & ~511L;
    }

    private long LargestRecord => (2L * GrainSize) + 4096;

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<uint[]> TableAsync(uint sector, CancellationToken cancellation)
    {
        lock (_tables)
        {
            if (_tables.TryGetValue(sector, out uint[]? cached))
                return cached;
        }
        // With the lock: a table that is read while a writer changes it would stay in memory as it was before.
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            return await LoadTableAsync(sector, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>A table from memory, or from the file. With the lock held: only so does a table that somebody writes stay the one in memory.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<uint[]> LoadTableAsync(uint sector, CancellationToken cancellation)
    {
        lock (_tables)
        {
            if (_tables.TryGetValue(sector, out uint[]? cached))
                return cached;
        }
        long offset = sector * 512L;
        if (offset > _node!.Length)
            throw BlockException.Corrupt($"A grain table of {FileName} is outside the file");
        byte[] bytes = new byte[_tableEntries * 4];
        await _node.ReadAsync(offset, bytes.AsMemory(0, (int)Math.Min(bytes.Length, _node.Length - offset)), cancellation).ConfigureAwait(false);
        uint[] table = new uint[_tableEntries];
        MemoryMarshal.Cast<byte, uint>(bytes.AsSpan()).CopyTo(table);
        lock (_tables)
        {
            if (_tables.Count >= MostCachedTables)
                _tables.Clear();
            _tables.Add(sector, table);
        }
        return table;
    }

    private async ValueTask EnterAsync(long offset, uint value, CancellationToken cancellation)
    {
        long grain = offset / GrainSize;
        long index = grain / _tableEntries;
        int at = (int)(grain % _tableEntries);
        if (_directory[index] == 0)
            throw new BlockException("This VMDK's grain tables are not laid out in advance; it can only be read", BlockErrno.NotSupported);
        uint[] entries = await LoadTableAsync(_directory[index], cancellation).ConfigureAwait(false);
        byte[] bytes = new byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, value);
        if (_redundant.Length > 0 && _redundant[index] != 0)
            await _node!.WriteAsync((_redundant[index] * 512L) + (at * 4L), bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
        await _node!.WriteAsync((_directory[index] * 512L) + (at * 4L), bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
        Volatile.Write(ref entries[at], value);
    }

    /// <summary>The fields of a sparse extent's header that matter.</summary>
    internal readonly record struct Header(
        uint Version, uint Flags, long Capacity, long GrainSectors, long DescriptorSector, long DescriptorSectors, uint TableEntries, ulong RedundantSector, ulong DirectorySector)
    {
        /// <exception cref="BlockException">A field has a value that no image has.</exception>
        public static Header Parse(ReadOnlySpan<byte> bytes)
        {
            if (BinaryPrimitives.ReadUInt32LittleEndian(bytes) != Magic)
                throw new BlockException("invalid VMDK image");
            Header header = new(
                BinaryPrimitives.ReadUInt32LittleEndian(bytes[4..]), BinaryPrimitives.ReadUInt32LittleEndian(bytes[8..]), BinaryPrimitives.ReadInt64LittleEndian(bytes[12..]),
                BinaryPrimitives.ReadInt64LittleEndian(bytes[20..]), BinaryPrimitives.ReadInt64LittleEndian(bytes[28..]), BinaryPrimitives.ReadInt64LittleEndian(bytes[36..]),
                BinaryPrimitives.ReadUInt32LittleEndian(bytes[44..]), BinaryPrimitives.ReadUInt64LittleEndian(bytes[48..]), BinaryPrimitives.ReadUInt64LittleEndian(bytes[56..]));
            if (header.Version is 0 or > 3)
                throw new BlockException($"Unsupported VMDK version {header.Version}", BlockErrno.NotSupported);
            if (header.Capacity is <= 0 or > long.MaxValue / 512)
                throw new BlockException("VMDK capacity is out of range");
            if (header.GrainSectors is < 1 or > 1 << 16 || (header.GrainSectors & (header.GrainSectors - 1)) != 0)
                throw new BlockException("Invalid VMDK grain size, image may be corrupt");
            if (header.TableEntries is < 1 or > 512)
                throw new BlockException("VMDK grain table size is out of range");
            if (header.DescriptorSector is < 0 or > long.MaxValue / 1024 || header.DescriptorSectors is < 0 or > long.MaxValue / 1024)
                throw new BlockException("VMDK descriptor is outside the file");
            if (header.DirectorySector != DirectoryAtEnd && header.DirectorySector > long.MaxValue / 1024)
                throw new BlockException("VMDK grain directory is outside the file");
            if (BinaryPrimitives.ReadUInt16LittleEndian(bytes[77..]) > 1)
                throw new BlockException("VMDK compression is of an unknown kind", BlockErrno.NotSupported);
            return header;
        }
    }
}
