using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Qcow2;

/// <summary>A persistent dirty bitmap as the directory describes it (docs/interop/qcow2.txt, "Bitmap directory").</summary>
public sealed record Qcow2BitmapInfo
{
    public string Name { get; init; } = string.Empty;

    /// <summary>Logarithm of the bytes one bit stands for.</summary>
    public int GranularityBits { get; init; } = 16;

    /// <summary>The image was not closed after the bitmap was changed: it cannot be trusted.</summary>
    public bool InUse { get; init; }

    /// <summary>Writes are recorded in it.</summary>
    public bool Auto { get; init; }

    internal long TableOffset { get; init; }

    internal int TableEntries { get; init; }

    internal byte[] Extra { get; init; } = [];
}

/// <summary>Reads and changes an image's persistent bitmaps. The caller drains guest requests first.</summary>
public static class Qcow2Bitmaps
{
    private const ulong OffsetMask = 0x00ff_ffff_ffff_fe00;
    private const uint FlagInUse = 1;
    private const uint FlagAuto = 2;
    private const uint KnownFlags = FlagInUse | FlagAuto | 4;
    private const int LargestName = 1023;

    /// <summary>All bitmaps.</summary>
    public static async ValueTask<IReadOnlyList<Qcow2BitmapInfo>> ListAsync(Qcow2Image image, CancellationToken cancellation = default) =>
        await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);

    public static async ValueTask AddAsync(Qcow2Image image, string name, int granularityBits, bool enabled, CancellationToken cancellation = default)
    {
        if (image.Version < 3)
            throw new BlockException("Cannot store dirty bitmaps in qcow2 v2 files", BlockErrno.NotSupported);
        if (granularityBits is < 9 or > 31)
            throw new BlockException("Granularity is outside its range of 512 bytes to 2 GiB");
        if (name.Length == 0 || Encoding.UTF8.GetByteCount(name) > LargestName)
            throw new BlockException("Bitmap name is empty or too long");
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        if (Find(bitmaps, name) >= 0)
            throw new BlockException($"Bitmap already exists: {name}", BlockErrno.Exists);
        long bits = (image.Length + (1L << granularityBits) - 1) >> granularityBits;
        int entries = checked((int)(((bits + 7) / 8 + image.ClusterSize - 1) / image.ClusterSize));
        long offset = await WriteTableAsync(image, new ulong[entries], cancellation).ConfigureAwait(false);
        bitmaps.Add(new Qcow2BitmapInfo { Name = name, GranularityBits = granularityBits, Auto = enabled, TableOffset = offset, TableEntries = entries });
        await StoreDirectoryAsync(image, bitmaps, cancellation).ConfigureAwait(false);
    }

    public static async ValueTask RemoveAsync(Qcow2Image image, string name, CancellationToken cancellation = default)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        int index = Require(bitmaps, name);
        Qcow2BitmapInfo bitmap = bitmaps[index];
        ulong[] table = await LoadTableAsync(image.File, bitmap, cancellation).ConfigureAwait(false);
        bitmaps.RemoveAt(index);
        await StoreDirectoryAsync(image, bitmaps, cancellation).ConfigureAwait(false);
        await FreeAsync(image, bitmap, table, cancellation).ConfigureAwait(false);
    }

    /// <summary>Makes all bits zero.</summary>
    public static async ValueTask ClearAsync(Qcow2Image image, string name, CancellationToken cancellation = default)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        Qcow2BitmapInfo bitmap = Usable(bitmaps[Require(bitmaps, name)]);
        await ReplaceBitsAsync(image, bitmaps, bitmap, new byte[BytesOf(image, bitmap)], cancellation).ConfigureAwait(false);
    }

    public static async ValueTask EnableAsync(Qcow2Image image, string name, bool enabled, CancellationToken cancellation = default)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        int index = Require(bitmaps, name);
        bitmaps[index] = Usable(bitmaps[index]) with { Auto = enabled };
        await StoreDirectoryAsync(image, bitmaps, cancellation).ConfigureAwait(false);
    }

    /// <summary>Sets in one bitmap all that is set in another, of this image or a different one.</summary>
    public static async ValueTask MergeAsync(Qcow2Image image, string name, Qcow2Image sourceImage, string source, CancellationToken cancellation = default)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        Qcow2BitmapInfo target = Usable(bitmaps[Require(bitmaps, name)]);
        List<Qcow2BitmapInfo> others = ReferenceEquals(image, sourceImage) ? bitmaps : await LoadDirectoryAsync(sourceImage, cancellation).ConfigureAwait(false);
        Qcow2BitmapInfo from = Usable(others[Require(others, source)]);
        if (image.Length != sourceImage.Length)
            throw new BlockException($"Bitmaps are of different sizes (destination size is {image.Length}, source size is {sourceImage.Length}) and can't be merged");
        byte[] bits = await ReadBitsAsync(image, target, cancellation).ConfigureAwait(false);
        byte[] added = await ReadBitsAsync(sourceImage, from, cancellation).ConfigureAwait(false);
        long sourceBits = (sourceImage.Length + (1L << from.GranularityBits) - 1) >> from.GranularityBits;
        for (long bit = 0; bit < sourceBits; bit++)
        {
            if ((added[bit >> 3] & (1 << (int)(bit & 7))) == 0)
                continue;
            long first = (bit << from.GranularityBits) >> target.GranularityBits;
            long last = (Math.Min((bit + 1) << from.GranularityBits, image.Length) - 1) >> target.GranularityBits;
            for (long set = first; set <= last; set++)
                bits[set >> 3] |= (byte)(1 << (int)(set & 7));
        }
        await ReplaceBitsAsync(image, bitmaps, target, bits, cancellation).ConfigureAwait(false);
    }

    /// <summary>Most bytes that copies of an image's bitmaps take in an image with another cluster size (measure).</summary>
    public static async ValueTask<long> MeasureAsync(Qcow2Image image, int clusterSize, CancellationToken cancellation = default)
    {
        long bytes = 0;
        long directory = 0;
        foreach (Qcow2BitmapInfo bitmap in await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false))
        {
            if (bitmap.InUse)
                continue;
            long clusters = (BytesOf(image, bitmap) + clusterSize - 1L) / clusterSize;
            bytes += (clusters * clusterSize) + (((clusters * 8) + clusterSize - 1) / clusterSize * clusterSize);
            directory += (24 + Encoding.UTF8.GetByteCount(bitmap.Name) + 7) & ~7;
        }
        return bytes + ((directory + clusterSize - 1) / clusterSize * clusterSize);
    }

    /// <summary>Cuts or fills up all bitmaps for a new disk size; what is new is not dirty. The header has the old size still.</summary>
    internal static async ValueTask ResizeAsync(Qcow2Image image, long length, CancellationToken cancellation)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        foreach (Qcow2BitmapInfo bitmap in bitmaps.ToArray())
        {
            if (bitmap.InUse)
                throw new BlockException($"Cannot resize: bitmap '{bitmap.Name}' is inconsistent: remove it first", BlockErrno.NotSupported);
            byte[] bits = await ReadBitsAsync(image, bitmap, cancellation).ConfigureAwait(false);
            long count = (length + (1L << bitmap.GranularityBits) - 1) >> bitmap.GranularityBits;
            Array.Resize(ref bits, checked((int)((count + 7) / 8)));
            if ((count & 7) != 0)
                bits[^1] &= (byte)((1 << (int)(count & 7)) - 1);
            await ReplaceBitsAsync(image, bitmaps, bitmap, bits, cancellation).ConfigureAwait(false);
        }
    }

    /// <summary>The bitmap's bits, least significant bit of a byte first.</summary>
    public static async ValueTask<byte[]> ReadBitsAsync(Qcow2Image image, Qcow2BitmapInfo bitmap, CancellationToken cancellation = default)
    {
        byte[] bits = new byte[BytesOf(image, bitmap)];
        ulong[] table = await LoadTableAsync(image.File, bitmap, cancellation).ConfigureAwait(false);
        for (int i = 0; i < table.Length && (long)i * image.ClusterSize < bits.Length; i++)
        {
            Memory<byte> part = bits.AsMemory(i * image.ClusterSize, Math.Min(image.ClusterSize, bits.Length - (i * image.ClusterSize)));
            long place = (long)(table[i] & OffsetMask);
            if (place != 0)
                await image.File.ReadAsync(place, part, cancellation).ConfigureAwait(false);
            else if ((table[i] & 1) != 0)
                part.Span.Fill(0xff);
        }
        return bits;
    }

    /// <summary>Stores new bits for a bitmap.</summary>
    public static async ValueTask WriteBitsAsync(Qcow2Image image, string name, byte[] bits, CancellationToken cancellation = default)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, cancellation).ConfigureAwait(false);
        await ReplaceBitsAsync(image, bitmaps, bitmaps[Require(bitmaps, name)], bits, cancellation).ConfigureAwait(false);
    }

    /// <summary>Marks bitmaps as in use, stable in the file.</summary>
    internal static async ValueTask BeginRecordingAsync(Qcow2Image image, IReadOnlyList<Qcow2BitmapInfo> recording)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, default).ConfigureAwait(false);
        for (int i = 0; i < bitmaps.Count; i++)
        {
            foreach (Qcow2BitmapInfo info in recording)
            {
                if (bitmaps[i].Name == info.Name)
                    bitmaps[i] = bitmaps[i] with { InUse = true };
            }
        }
        await StoreDirectoryAsync(image, bitmaps, default).ConfigureAwait(false);
        await image.File.FlushAsync().ConfigureAwait(false);
    }

    /// <summary>Stores what was recorded and takes the mark off.</summary>
    internal static async ValueTask FinishRecordingAsync(Qcow2Image image, string name, byte[] bits)
    {
        List<Qcow2BitmapInfo> bitmaps = await LoadDirectoryAsync(image, default).ConfigureAwait(false);
        int index = Find(bitmaps, name);
        // A bitmap that was removed meanwhile has nothing to store.
        if (index < 0)
            return;
        bitmaps[index] = bitmaps[index] with { InUse = false };
        await ReplaceBitsAsync(image, bitmaps, bitmaps[index], bits, default).ConfigureAwait(false);
    }

    internal static async ValueTask<List<Qcow2BitmapInfo>> LoadDirectoryAsync(Qcow2Image image, CancellationToken cancellation)
    {
        List<Qcow2BitmapInfo> bitmaps = [];
        Qcow2Header header = image.Header;
        if (header.BitmapCount == 0)
            return bitmaps;
        byte[] directory = new byte[header.BitmapDirectorySize];
        await image.File.ReadAsync(header.BitmapDirectoryOffset, directory, cancellation).ConfigureAwait(false);
        int at = 0;
        while (at + 24 <= directory.Length)
        {
            ReadOnlySpan<byte> entry = directory.AsSpan(at);
            long tableOffset = BinaryPrimitives.ReadInt64BigEndian(entry);
            uint tableEntries = BinaryPrimitives.ReadUInt32BigEndian(entry[8..]);
            uint flags = BinaryPrimitives.ReadUInt32BigEndian(entry[12..]);
            int nameLength = BinaryPrimitives.ReadUInt16BigEndian(entry[18..]);
            uint extraLength = BinaryPrimitives.ReadUInt32BigEndian(entry[20..]);
            if (extraLength > directory.Length || at + 24 + extraLength + nameLength > directory.Length || nameLength is 0 or > LargestName)
                throw new BlockException("Broken bitmap directory");
            if (entry[16] != 1 || (flags & ~KnownFlags) != 0 || entry[17] is < 9 or > 31)
                throw new BlockException("Bitmap directory entry of an unknown kind");
            if (tableEntries > 1 << 24 || tableOffset < 0 || tableOffset % header.ClusterSize != 0 || tableOffset > long.MaxValue - (tableEntries * 8L))
                throw new BlockException("Bitmap table is too large or misplaced");
            bitmaps.Add(new Qcow2BitmapInfo
            {
                TableOffset = tableOffset,
                TableEntries = (int)tableEntries,
                GranularityBits = entry[17],
                InUse = (flags & FlagInUse) != 0,
                Auto = (flags & FlagAuto) != 0,
                Extra = entry.Slice(24, (int)extraLength).ToArray(),
                Name = Encoding.UTF8.GetString(entry.Slice(24 + (int)extraLength, nameLength)),
            });
            at += (24 + (int)extraLength + nameLength + 7) & ~7;
        }
        if (bitmaps.Count != header.BitmapCount)
            throw new BlockException("Bitmap directory does not hold as many bitmaps as the header says");
        return bitmaps;
    }

    internal static async ValueTask<ulong[]> LoadTableAsync(BlockNode file, Qcow2BitmapInfo bitmap, CancellationToken cancellation)
    {
        byte[] bytes = new byte[bitmap.TableEntries * 8];
        await file.ReadAsync(bitmap.TableOffset, bytes, cancellation).ConfigureAwait(false);
        ulong[] table = new ulong[bitmap.TableEntries];
        BinaryPrimitives.ReverseEndianness(MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()), table);
        return table;
    }

    private static int Find(List<Qcow2BitmapInfo> bitmaps, string name) => bitmaps.FindIndex(b => b.Name == name);

    private static int Require(List<Qcow2BitmapInfo> bitmaps, string name)
    {
        int index = Find(bitmaps, name);
        return index >= 0 ? index : throw new BlockException($"Dirty bitmap '{name}' not found", BlockErrno.NoEntry);
    }

    private static Qcow2BitmapInfo Usable(Qcow2BitmapInfo bitmap) => !bitmap.InUse
        ? bitmap
        : throw new BlockException($"Bitmap '{bitmap.Name}' is inconsistent and cannot be used; try block-dirty-bitmap-remove to delete this bitmap from disk");

    private static int BytesOf(Qcow2Image image, Qcow2BitmapInfo bitmap) =>
        checked((int)((((image.Length + (1L << bitmap.GranularityBits) - 1) >> bitmap.GranularityBits) + 7) / 8));

    private static async ValueTask ReplaceBitsAsync(
        Qcow2Image image, List<Qcow2BitmapInfo> bitmaps, Qcow2BitmapInfo bitmap, byte[] bits, CancellationToken cancellation)
    {
        ulong[] old = await LoadTableAsync(image.File, bitmap, cancellation).ConfigureAwait(false);
        ulong[] table = new ulong[(bits.Length + image.ClusterSize - 1) / image.ClusterSize];
        byte[] cluster = new byte[image.ClusterSize];
        for (int i = 0; i < table.Length; i++)
        {
            int length = Math.Min(image.ClusterSize, bits.Length - (i * image.ClusterSize));
            ReadOnlyMemory<byte> part = bits.AsMemory(i * image.ClusterSize, length);
            if (!part.Span.ContainsAnyExcept((byte)0))
                continue;
            cluster.AsSpan().Clear();
            part.CopyTo(cluster);
            long place = await AllocateAsync(image, 1, cancellation).ConfigureAwait(false);
            await image.File.WriteAsync(place, cluster, WriteFlags.None, cancellation).ConfigureAwait(false);
            table[i] = (ulong)place;
        }
        long offset = await WriteTableAsync(image, table, cancellation).ConfigureAwait(false);
        int index = bitmaps.IndexOf(bitmap);
        bitmaps[index] = bitmap with { TableOffset = offset, TableEntries = table.Length };
        await StoreDirectoryAsync(image, bitmaps, cancellation).ConfigureAwait(false);
        await FreeAsync(image, bitmap, old, cancellation).ConfigureAwait(false);
    }

    private static async ValueTask<long> WriteTableAsync(Qcow2Image image, ulong[] table, CancellationToken cancellation)
    {
        if (table.Length == 0)
            return 0;
        byte[] bytes = new byte[table.Length * 8];
        BinaryPrimitives.ReverseEndianness(table, MemoryMarshal.Cast<byte, ulong>(bytes.AsSpan()));
        int clusters = (bytes.Length + image.ClusterSize - 1) / image.ClusterSize;
        Array.Resize(ref bytes, clusters * image.ClusterSize);
        long offset = await AllocateAsync(image, clusters, cancellation).ConfigureAwait(false);
        await image.File.WriteAsync(offset, bytes, WriteFlags.None, cancellation).ConfigureAwait(false);
        return offset;
    }

    private static async ValueTask StoreDirectoryAsync(Qcow2Image image, List<Qcow2BitmapInfo> bitmaps, CancellationToken cancellation)
    {
        Qcow2Header header = image.Header;
        long oldOffset = header.BitmapDirectoryOffset;
        long oldSize = header.BitmapCount > 0 ? header.BitmapDirectorySize : 0;
        byte[] directory = Serialize(bitmaps);
        long offset = 0;
        if (directory.Length > 0)
        {
            offset = await AllocateAsync(image, (directory.Length + image.ClusterSize - 1) / image.ClusterSize, cancellation).ConfigureAwait(false);
            byte[] padded = new byte[(directory.Length + image.ClusterSize - 1) / image.ClusterSize * image.ClusterSize];
            directory.CopyTo(padded, 0);
            await image.File.WriteAsync(offset, padded, WriteFlags.None, cancellation).ConfigureAwait(false);
        }
        await image.FlushAsync(cancellation).ConfigureAwait(false);
        header.BitmapCount = bitmaps.Count;
        header.BitmapDirectoryOffset = offset;
        header.BitmapDirectorySize = directory.Length;
        header.Autoclear = bitmaps.Count > 0 ? header.Autoclear | Qcow2Autoclear.Bitmaps : header.Autoclear & ~Qcow2Autoclear.Bitmaps;
        await image.WriteHeaderAsync(cancellation).ConfigureAwait(false);
        if (oldSize > 0)
            await FreeRangeAsync(image, oldOffset, oldSize).ConfigureAwait(false);
    }

    private static byte[] Serialize(List<Qcow2BitmapInfo> bitmaps)
    {
        using MemoryStream directory = new();
        byte[] head = new byte[24];
        foreach (Qcow2BitmapInfo bitmap in bitmaps)
        {
            byte[] name = Encoding.UTF8.GetBytes(bitmap.Name);
            BinaryPrimitives.WriteInt64BigEndian(head, bitmap.TableOffset);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(8), bitmap.TableEntries);
            BinaryPrimitives.WriteUInt32BigEndian(head.AsSpan(12), (bitmap.InUse ? FlagInUse : 0) | (bitmap.Auto ? FlagAuto : 0));
            head[16] = 1;
            head[17] = (byte)bitmap.GranularityBits;
            BinaryPrimitives.WriteUInt16BigEndian(head.AsSpan(18), (ushort)name.Length);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(20), bitmap.Extra.Length);
            directory.Write(head);
            directory.Write(bitmap.Extra);
            directory.Write(name);
            while ((directory.Length & 7) != 0)
                directory.WriteByte(0);
        }
        return directory.ToArray();
    }

    private static async ValueTask FreeAsync(Qcow2Image image, Qcow2BitmapInfo bitmap, ulong[] table, CancellationToken cancellation)
    {
        foreach (ulong entry in table)
        {
            if ((entry & OffsetMask) != 0)
                await FreeRangeAsync(image, (long)(entry & OffsetMask), image.ClusterSize).ConfigureAwait(false);
        }
        if (bitmap.TableEntries > 0)
            await FreeRangeAsync(image, bitmap.TableOffset, bitmap.TableEntries * 8L).ConfigureAwait(false);
        await image.FlushAsync(cancellation).ConfigureAwait(false);
    }

    private static async ValueTask<long> AllocateAsync(Qcow2Image image, long clusters, CancellationToken cancellation)
    {
        await image.MetadataLock.EnterAsync().ConfigureAwait(false);
        try
        {
            return await image.Refcounts.AllocateAsync(clusters, cancellation).ConfigureAwait(false);
        }
        finally
        {
            image.MetadataLock.Exit();
        }
    }

    private static async ValueTask FreeRangeAsync(Qcow2Image image, long offset, long length)
    {
        await image.MetadataLock.EnterAsync().ConfigureAwait(false);
        try
        {
            image.Refcounts.FreeLater(offset, length);
        }
        finally
        {
            image.MetadataLock.Exit();
        }
    }
}
