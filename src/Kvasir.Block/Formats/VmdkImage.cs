using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Formats;

/// <summary>How a new VMDK is laid out.</summary>
public enum VmdkLayout
{
    MonolithicSparse,
    MonolithicFlat,
    StreamOptimized,
}

/// <summary>One file of a VMDK, for tools.</summary>
/// <param name="FileName">Its path.</param>
/// <param name="Length">Bytes of the disk in it.</param>
/// <param name="ClusterSize">Bytes of a grain; 0: flat.</param>
/// <param name="IsCompressed">Grains are compressed.</param>
/// <param name="Format">FLAT, ZERO, or empty for sparse.</param>
public sealed record VmdkExtentInfo(string FileName, long Length, int ClusterSize, bool IsCompressed, string Format)
{
    /// <summary>It is another file than the descriptor's.</summary>
    public bool IsOwnFile { get; init; }

    /// <summary>Bytes it takes on its medium; -1 where unknown.</summary>
    public long AllocatedBytes { get; init; }
}

/// <summary>
/// A VMware disk ("Virtual Disk Format 5.0"): sparse, flat or stream-optimised, in one or many files, with a parent where it is a delta.
/// Files that a descriptor names are looked for beside it and nowhere else: the text comes with the image, and may name anything.
/// </summary>
public sealed class VmdkImage : BlockNode, IOverlayFormat
{
    private const int GrainSectors = 128;
    private const int TableEntries = 512;
    private const int DescriptorSectors = 20;

    // Wiring
    private readonly VmdkExtent[] _extents;
    private readonly VmdkDescriptor _descriptor;
    private readonly RangeLock _storing = new();
    private readonly long _cidAt;
    private BlockNode? _backing;

    // State
    private readonly AsyncMutex _changing = new();
    private bool _changed;
    private uint _cid;

    /// <param name="file">The image's file.</param>
    /// <param name="descriptor">What it says of itself.</param>
    /// <param name="descriptorAt">Where in the file it says so.</param>
    /// <param name="extents">Its parts.</param>
    private VmdkImage(BlockNode file, VmdkDescriptor descriptor, long descriptorAt, VmdkExtent[] extents)
    {
        File = file;
        _descriptor = descriptor;
        _cidAt = descriptor.CidAt < 0 ? -1 : descriptorAt + descriptor.CidAt;
        _cid = descriptor.Cid;
        _extents = extents;
        foreach (VmdkExtent extent in extents)
        {
            if (extent.Length > long.MaxValue - Length)
                throw new BlockException("The extents of the VMDK are too large", BlockErrno.FileTooBig);
            Length += extent.Length;
            ClusterSize = Math.Max(ClusterSize, extent.GrainSize);
        }
    }

    public override string Driver => "vmdk";

    public override BlockNode File { get; }

    public override BlockNode? Backing => _backing;

    public override long Length { get; }

    public override int ClusterSize { get; }

    public override bool IsZeroWhenCreated => true;

    public override bool MayHoldHoles => _extents.Length > 0 && !_extents[0].IsSparse;

    public override bool HasFastZero => false;

    public string? BackingFileName => _descriptor.ParentFileName;

    public string? BackingFormat => BackingFileName is null ? null : "vmdk";

    /// <summary>An id of the content: changes with the first write after an opening, and overlays remember it.</summary>
    public uint Cid => _cid;

    public uint ParentCid => _descriptor.ParentCid;

    /// <summary>Whether grains are stored compressed (stream-optimised).</summary>
    public bool IsCompressed => _extents.Length > 0 && _extents[0].IsCompressed;

    public string CreateType => _descriptor.CreateType;

    /// <summary>The files that the disk consists of.</summary>
    public IReadOnlyList<VmdkExtentInfo> ExtentList
    {
        get
        {
            List<VmdkExtentInfo> list = [];
            foreach (VmdkExtent extent in _extents)
            {
                list.Add(new VmdkExtentInfo(extent.FileName, extent.Length, extent.GrainSize, extent.IsCompressed, extent.IsSparse ? string.Empty : extent.Node is null ? "ZERO" : "FLAT")
                {
                    IsOwnFile = !ReferenceEquals(extent.Node, File),
                    AllocatedBytes = extent.Node?.AllocatedBytes ?? -1,
                });
            }
            return list;
        }
    }

    public static bool Probe(ReadOnlySpan<byte> start) =>
        (start.Length >= 4 && BinaryPrimitives.ReadUInt32LittleEndian(start) == VmdkExtent.Magic) || VmdkDescriptor.Probe(start);

    public void SetBacking(BlockNode? backing) => _backing = backing;

    public override long AllocatedBytes
    {
        get
        {
            long total = File.AllocatedBytes;
            foreach (VmdkExtent extent in _extents)
                total += ReferenceEquals(extent.Node, File) ? 0 : Math.Max(0, extent.Node?.AllocatedBytes ?? 0);
            return total;
        }
    }

    public override BlockNode? DataFileAt(long offset) => Find(offset).Extent.Node;

    /// <summary>Opens an image; the file may be a sparse extent with its descriptor inside, or a descriptor alone.</summary>
    /// <exception cref="BlockException">The image is damaged or of an unknown kind.</exception>
    public static async ValueTask<VmdkImage> OpenAsync(BlockNode file, OpenOptions options, CancellationToken cancellation = default)
    {
        byte[] start = new byte[(int)Math.Min(512, file.Length)];
        await file.ReadAsync(0, start, cancellation).ConfigureAwait(false);
        if (!Probe(start))
            throw new BlockException("invalid VMDK image");
        if (!VmdkDescriptor.Probe(start))
        {
            (long at, byte[] content) = await VmdkExtent.EmbeddedDescriptorAsync(file, cancellation).ConfigureAwait(false);
            VmdkDescriptor embedded = VmdkDescriptor.Parse(content);
            VmdkExtent extent = await VmdkExtent.SparseAsync(file, owns: false, cancellation).ConfigureAwait(false);
            return new VmdkImage(file, embedded, at, [extent]);
        }
        if (file.Length > VmdkDescriptor.LargestSize)
            throw new BlockException("VMDK descriptor is too large", BlockErrno.FileTooBig);
        byte[] text = new byte[file.Length];
        await file.ReadAsync(0, text, cancellation).ConfigureAwait(false);
        VmdkDescriptor descriptor = VmdkDescriptor.Parse(text);
        if (descriptor.Extents.Count == 0)
            throw new BlockException("VMDK descriptor names no extent");
        List<VmdkExtent> extents = [];
        try
        {
            foreach (VmdkExtentLine line in descriptor.Extents)
                extents.Add(await OpenExtentAsync(file.FileName, line, options, cancellation).ConfigureAwait(false));
            return new VmdkImage(file, descriptor, 0, [.. extents]);
        }
        catch
        {
            foreach (VmdkExtent extent in extents)
                await extent.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Lays out an empty image.</summary>
    /// <param name="file">The file, or the descriptor's file for a flat image; owned.</param>
    /// <param name="size">Disk size in bytes.</param>
    /// <param name="layout">Which kind.</param>
    /// <param name="zeroedGrain">Whether grains can be marked as zeros.</param>
    /// <param name="flat">The data's file for a flat image, created already and as long as the disk; owned.</param>
    /// <param name="cancellation">Ends the creation early.</param>
    public static async ValueTask<VmdkImage> CreateAsync(BlockNode file, long size, VmdkLayout layout, bool zeroedGrain, BlockNode? flat, VmdkHardware? hardware = null, CancellationToken cancellation = default)
    {
        uint cid = BinaryPrimitives.ReadUInt32LittleEndian(RandomNumberGenerator.GetBytes(4)) & 0x7fff_ffff;
        long sectors = (size + 511) / 512;
        if (layout == VmdkLayout.MonolithicFlat)
        {
            string line = string.Create(CultureInfo.InvariantCulture, $"RW {sectors} FLAT \"{NameOf(flat!)}\" 0");
            byte[] text = Encoding.UTF8.GetBytes(VmdkDescriptor.Write("monolithicFlat", sectors, line, cid, hardware ?? new VmdkHardware()));
            await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
            await file.WriteAsync(0, text, WriteFlags.None, cancellation).ConfigureAwait(false);
            return new VmdkImage(file, VmdkDescriptor.Parse(text), 0, [VmdkExtent.Flat(flat!, sectors * 512, 0)]);
        }
        bool stream = layout == VmdkLayout.StreamOptimized;
        long grains = (sectors + GrainSectors - 1) / GrainSectors;
        long tables = Math.Max(1, (grains + TableEntries - 1) / TableEntries);
        if (sectors > 1L << 40 || tables > 1 << 24)
            throw new BlockException("Disk size too large for a VMDK", BlockErrno.FileTooBig);
        long directorySectors = ((tables * 4) + 511) / 512;
        long tableSectors = TableEntries * 4 / 512;
        long redundantAt = 1 + DescriptorSectors;
        long directoryAt = redundantAt + directorySectors + (tables * tableSectors);
        long dataAt = (directoryAt + directorySectors + (tables * tableSectors) + GrainSectors - 1) / GrainSectors * GrainSectors;
        byte[] header = new byte[VmdkExtent.HeaderSize];
        BinaryPrimitives.WriteUInt32LittleEndian(header, VmdkExtent.Magic);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(4), stream ? 3u : zeroedGrain ? 2u : 1u);
        BinaryPrimitives.WriteUInt32LittleEndian(header.AsSpan(8), 3u | (zeroedGrain ? 4u : 0) | (stream ? 0x3_0000u : 0));
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(12), sectors);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(20), GrainSectors);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(28), 1);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(36), DescriptorSectors);
        BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(44), TableEntries);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(48), redundantAt);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(56), directoryAt);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(64), dataAt);
        "\n \r\n"u8.CopyTo(header.AsSpan(73));
        BinaryPrimitives.WriteUInt16LittleEndian(header.AsSpan(77), (ushort)(stream ? 1 : 0));
        byte[] descriptor = new byte[DescriptorSectors * 512];
        string extentLine = string.Create(CultureInfo.InvariantCulture, $"RW {sectors} SPARSE \"{NameOf(file)}\"");
        string description = VmdkDescriptor.Write(stream ? "streamOptimized" : "monolithicSparse", sectors, extentLine, cid, hardware ?? new VmdkHardware());
        if (Encoding.UTF8.GetByteCount(description) > descriptor.Length)
            throw new BlockException("The file's name is too long for a VMDK descriptor");
        Encoding.UTF8.GetBytes(description, descriptor);
        await file.ResizeAsync(0, Preallocation.Off, cancellation).ConfigureAwait(false);
        await file.ResizeAsync(dataAt * 512, Preallocation.Off, cancellation).ConfigureAwait(false);
        foreach (long at in new[] { redundantAt, directoryAt })
        {
            byte[] directory = new byte[directorySectors * 512];
            Span<uint> entries = MemoryMarshal.Cast<byte, uint>(directory.AsSpan());
            for (int i = 0; i < tables; i++)
                entries[i] = (uint)(at + directorySectors + (i * tableSectors));
            await file.WriteAsync(at * 512, directory, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        await file.WriteAsync(512, descriptor, WriteFlags.None, cancellation).ConfigureAwait(false);
        await file.WriteAsync(0, header, WriteFlags.None, cancellation).ConfigureAwait(false);
        return await OpenAsync(file, new OpenOptions { ReadOnly = false }, cancellation).ConfigureAwait(false);
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        foreach (VmdkExtent extent in _extents)
            await extent.FlushAsync(cancellation).ConfigureAwait(false);
    }

    public override async ValueTask DisposeAsync()
    {
        foreach (VmdkExtent extent in _extents)
            await extent.DisposeAsync().ConfigureAwait(false);
        await base.DisposeAsync().ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            (VmdkExtent extent, long within) = Find(offset);
            (VmdkExtent.GrainState state, long host, long run) = await extent.LocateAsync(within, buffer.Length, cancellation).ConfigureAwait(false);
            Memory<byte> part = buffer[..(int)run];
            switch (state)
            {
                case VmdkExtent.GrainState.Present:
                    await extent.Node!.ReadAsync(host, part, cancellation).ConfigureAwait(false);
                    break;
                case VmdkExtent.GrainState.Compressed:
                    using (AlignedBuffer grain = AlignedBuffer.Rent(extent.GrainSize))
                    {
                        // QEMU compresses only as much of the last grain as the disk reaches into.
                        int whole = (int)Math.Min(extent.GrainSize, extent.Length - (within - (within % extent.GrainSize)));
                        await extent.ReadCompressedAsync(host, grain.Memory[..whole], cancellation).ConfigureAwait(false);
                        grain.Memory.Slice((int)(within % extent.GrainSize), part.Length).CopyTo(part);
                    }
                    break;
                case VmdkExtent.GrainState.Absent when _backing is VmdkImage parent && parent.Cid != ParentCid:
                    throw new BlockException($"The parent '{parent.FileName}' has been written since '{FileName}' was made over it: its CID is {parent.Cid:x8} and not {ParentCid:x8}", BlockErrno.Invalid);
                case VmdkExtent.GrainState.Absent when _backing is BlockNode backing && offset < backing.Length:
                    int there = (int)Math.Min(part.Length, backing.Length - offset);
                    await backing.ReadAsync(offset, part[..there], cancellation).ConfigureAwait(false);
                    part.Span[there..].Clear();
                    break;
                default:
                    part.Span.Clear();
                    break;
            }
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        bool compressed = (flags & WriteFlags.Compressed) != 0;
        if (!_changed)
            await ChangeAsync(cancellation).ConfigureAwait(false);
        while (!buffer.IsEmpty)
        {
            (VmdkExtent extent, long within) = Find(offset);
            if (compressed && !extent.IsCompressed)
                throw new BlockException("Compression needs a VMDK of subformat streamOptimized", BlockErrno.NotSupported);
            (VmdkExtent.GrainState state, long host, long run) = await extent.LocateAsync(within, buffer.Length, cancellation).ConfigureAwait(false);
            if (state == VmdkExtent.GrainState.Present)
            {
                await extent.Node!.WriteAsync(host, buffer[..(int)run], WriteFlags.None, cancellation).ConfigureAwait(false);
            }
            else if (!extent.IsSparse)
            {
                throw new BlockException("A VMDK's zero extent cannot be written", BlockErrno.NotSupported);
            }
            else
            {
                run = Math.Min(buffer.Length, extent.GrainSize - (within % extent.GrainSize));
                run = Math.Min(run, extent.Length - within);
                await StoreAsync(extent, offset, within, buffer[..(int)run], cancellation).ConfigureAwait(false);
            }
            buffer = buffer[(int)run..];
            offset += run;
        }
        if ((flags & WriteFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        if (!_changed)
            await ChangeAsync(cancellation).ConfigureAwait(false);
        while (length > 0)
        {
            (VmdkExtent extent, long within) = Find(offset);
            (VmdkExtent.GrainState state, _, long run) = await extent.LocateAsync(within, length, cancellation).ConfigureAwait(false);
            bool zero = state == VmdkExtent.GrainState.Zero || (state == VmdkExtent.GrainState.Absent && (_backing is null || offset >= _backing.Length));
            if (!zero)
            {
                bool whole = extent.IsSparse && within % extent.GrainSize == 0 && run >= extent.GrainSize;
                run = whole ? extent.GrainSize : extent.IsSparse ? Math.Min(run, extent.GrainSize - (within % extent.GrainSize)) : run;
                bool marked = false;
                if (whole)
                {
                    await _storing.AcquireAsync(offset, offset + run).ConfigureAwait(false);
                    try
                    {
                        marked = await extent.TryZeroAsync(within, cancellation).ConfigureAwait(false);
                    }
                    finally
                    {
                        _storing.Release(offset, offset + run);
                    }
                }
                if (!marked)
                    await WriteZeroDataAsync(offset, run, flags & ZeroFlags.NoFallback, cancellation).ConfigureAwait(false);
            }
            offset += run;
            length -= run;
        }
        if ((flags & ZeroFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        (VmdkExtent extent, long within) = Find(offset);
        (VmdkExtent.GrainState state, long host, long run) = await extent.LocateAsync(within, length, cancellation).ConfigureAwait(false);
        BlockFlags flags = state switch
        {
            VmdkExtent.GrainState.Present => BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid,
            VmdkExtent.GrainState.Compressed => BlockFlags.Data | BlockFlags.Allocated | BlockFlags.Compressed,
            VmdkExtent.GrainState.Zero => BlockFlags.Zero | BlockFlags.Allocated,
            _ => _backing is null ? BlockFlags.Zero : BlockFlags.None,
        };
        return new BlockStatus(run, flags, (flags & BlockFlags.OffsetValid) != 0 ? host : 0);
    }

    /// <summary>A file's name as the descriptor has it, which has no way to write some of them.</summary>
    private static string NameOf(BlockNode file)
    {
        string name = Path.GetFileName(file.FileName);
        return name.AsSpan().ContainsAnyInRange('\0', '\x1f') || name.Contains('"', StringComparison.Ordinal)
            ? throw new BlockException("The file's name has quotes or control characters, which a VMDK descriptor cannot hold")
            : name;
    }

    /// <summary>Gives the content a new id before it changes first: overlays that were made over the old content are known by that.</summary>
    private async ValueTask ChangeAsync(CancellationToken cancellation)
    {
        await _changing.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_changed)
                return;
            uint cid = BinaryPrimitives.ReadUInt32LittleEndian(RandomNumberGenerator.GetBytes(4)) & 0x7fff_ffff;
            if (_cidAt >= 0)
            {
                await File.WriteAsync(_cidAt, Encoding.ASCII.GetBytes(cid.ToString("x8", CultureInfo.InvariantCulture)), WriteFlags.None, cancellation).ConfigureAwait(false);
                _cid = cid;
            }
            _changed = true;
        }
        finally
        {
            _changing.Exit();
        }
    }

    private static async ValueTask<VmdkExtent> OpenExtentAsync(string descriptor, VmdkExtentLine line, OpenOptions options, CancellationToken cancellation)
    {
        if (line.Kind == "ZERO")
            return VmdkExtent.Zero(line.Sectors * 512);
        if (line.Kind is not ("FLAT" or "VMFS" or "SPARSE"))
            throw new BlockException($"Unsupported extent type '{line.Kind}'", BlockErrno.NotSupported);
        if (line.Access == "NOACCESS")
            throw new BlockException($"Extent '{line.FileName}' may not be accessed", BlockErrno.Access);
        if (line.FileName.Length == 0 || line.FileName.Contains('/', StringComparison.Ordinal) || line.FileName is "." or "..")
            throw new BlockException($"VMDK descriptor names the extent '{line.FileName}', which is not a file beside it; such images are refused", BlockErrno.Access);
        string folder = Image.StripProtocol(descriptor);
        int slash = folder.LastIndexOf('/');
        OpenOptions below = line.Access == "RDONLY" ? options with { ReadOnly = true } : options;
        BlockNode node = await Image.OpenProtocolAsync(string.Concat("file:", folder.AsSpan(0, slash + 1), line.FileName), below, new ImageOptions(), cancellation).ConfigureAwait(false);
        try
        {
            if (line.Kind != "SPARSE")
            {
                if (line.Offset * 512 > node.Length - (line.Sectors * 512))
                    throw new BlockException($"Extent '{line.FileName}' is shorter than its descriptor says");
                return VmdkExtent.Flat(node, line.Sectors * 512, line.Offset * 512);
            }
            return await VmdkExtent.SparseAsync(node, owns: true, cancellation).ConfigureAwait(false);
        }
        catch
        {
            await node.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    private (VmdkExtent Extent, long Within) Find(long offset)
    {
        foreach (VmdkExtent extent in _extents)
        {
            if (offset < extent.Length)
                return (extent, offset);
            offset -= extent.Length;
        }
        throw new BlockException("request outside the VMDK's extents", BlockErrno.Io);
    }

    /// <summary>Stores a whole grain: what a write changes of it, and around that what was there.</summary>
    private async ValueTask StoreAsync(VmdkExtent extent, long offset, long within, ReadOnlyMemory<byte> data, CancellationToken cancellation)
    {
        long grainStart = offset - (within % extent.GrainSize);
        await _storing.AcquireAsync(grainStart, grainStart + extent.GrainSize).ConfigureAwait(false);
        try
        {
            (VmdkExtent.GrainState state, long host, _) = await extent.LocateAsync(within, data.Length, cancellation).ConfigureAwait(false);
            if (state == VmdkExtent.GrainState.Present)
            {
                // Another write gave the grain its place meanwhile.
                await extent.Node!.WriteAsync(host, data, WriteFlags.None, cancellation).ConfigureAwait(false);
                return;
            }
            using AlignedBuffer buffer = AlignedBuffer.Rent(extent.GrainSize);
            Memory<byte> grain = buffer.Memory[..extent.GrainSize];
            int there = (int)Math.Min(extent.GrainSize, Length - grainStart);
            if (data.Length < there)
                await ReadCoreAsync(grainStart, grain[..there], cancellation).ConfigureAwait(false);
            grain.Span[there..].Clear();
            data.CopyTo(grain[(int)(within % extent.GrainSize)..]);
            await extent.StoreAsync(within - (within % extent.GrainSize), grain, extent.IsCompressed, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _storing.Release(grainStart, grainStart + extent.GrainSize);
        }
    }
}
