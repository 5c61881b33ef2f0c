using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>
/// An Apple disk image (UDIF): the last 512 bytes ("koly") lead to a property list with a table of chunks ("mish") for each partition; chunks
/// are raw, zeros or zlib streams. Read-only. The format has no official description; the field names are those of the public ones. Integers
/// are big-endian.
/// </summary>
public sealed class DmgImage : BlockNode
{
    private const int TrailerSize = 512;
    private const int TableHeaderSize = 204;
    private const int EntrySize = 40;
    private const int Sector = 512;
    private const long LargestList = 64 << 20;
    private const long LargestChunk = 64 << 20;
    private const int MostChunks = 8 << 20;

    private enum ChunkType : uint
    {
        Zero = 0,
        Raw = 1,
        Ignore = 2,
        Adc = 0x8000_0004,
        Zlib = 0x8000_0005,
        Bzip2 = 0x8000_0006,
        Lzfse = 0x8000_0007,
        Lzma = 0x8000_0008,
        Comment = 0x7fff_fffe,
        Terminator = 0xffff_ffff,
    }

    private readonly Chunk[] _chunks;
    private readonly AsyncMutex _lock = new();
    private byte[] _held = [];
    private int _heldChunk = -1;

    private DmgImage(BlockNode file, Chunk[] chunks, long length)
    {
        File = file;
        _chunks = chunks;
        Length = length;
    }

    public override string Driver => "dmg";

    public override BlockNode File { get; }

    public override long Length { get; }

    public override bool IsReadOnly => true;

    /// <exception cref="BlockException">The image is damaged, or packed in a way that is not read here.</exception>
    public static async ValueTask<DmgImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] trailer = new byte[TrailerSize];
        if (file.Length < TrailerSize)
            throw new BlockException("dmg file must be at least 512 bytes long");
        await file.ReadAsync(file.Length - TrailerSize, trailer, cancellation).ConfigureAwait(false);
        if (!trailer.AsSpan().StartsWith("koly"u8))
            throw new BlockException("Could not locate UDIF trailer in dmg file");
        long dataOffset = BinaryPrimitives.ReadInt64BigEndian(trailer.AsSpan(0x18));
        long listOffset = BinaryPrimitives.ReadInt64BigEndian(trailer.AsSpan(0xd8));
        long listLength = BinaryPrimitives.ReadInt64BigEndian(trailer.AsSpan(0xe0));
        long sectors = BinaryPrimitives.ReadInt64BigEndian(trailer.AsSpan(0x1ec));
        if (listLength == 0)
            throw new BlockException("The dmg keeps its tables in a resource fork, which is not read here: convert it on a Mac (hdiutil convert -format UDZO)", BlockErrno.NotSupported);
        if (listLength is < 0 or > LargestList || listOffset < 0 || listOffset > file.Length - listLength || dataOffset < 0 || dataOffset > file.Length)
            throw new BlockException("The dmg's property list is too large or outside the file");
        byte[] list = new byte[listLength];
        await file.ReadAsync(listOffset, list, cancellation).ConfigureAwait(false);
        List<Chunk> chunks = [];
        foreach (byte[] table in Tables(list))
            Parse(table, dataOffset, file.Length, chunks);
        chunks.Sort((a, b) => a.Start.CompareTo(b.Start));
        long end = 0;
        foreach (Chunk chunk in chunks)
        {
            if (chunk.Start < end)
                throw new BlockException("Chunks of the dmg overlap");
            end = chunk.Start + chunk.Length;
        }
        return new DmgImage(file, [.. chunks], sectors is > 0 and <= long.MaxValue / Sector ? Math.Max(end, sectors * Sector) : end);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            int index = Find(offset);
            Chunk chunk = index >= 0 ? _chunks[index] : default;
            long end = index >= 0 ? chunk.Start + chunk.Length : NextStart(offset);
            int length = (int)Math.Min(buffer.Length, end - offset);
            Memory<byte> part = buffer[..length];
            switch (chunk.Type)
            {
                case ChunkType.Raw when index >= 0:
                    await File.ReadAsync(chunk.Host + (offset - chunk.Start), part, cancellation).ConfigureAwait(false);
                    break;
                case ChunkType.Zlib:
                    await ReadPackedAsync(index, (int)(offset - chunk.Start), part, cancellation).ConfigureAwait(false);
                    break;
                default:
                    part.Span.Clear();
                    break;
            }
            buffer = buffer[length..];
            offset += length;
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        int index = Find(offset);
        Chunk chunk = index >= 0 ? _chunks[index] : default;
        bool stored = index >= 0 && chunk.Type is ChunkType.Raw or ChunkType.Zlib;
        long end = index >= 0 ? chunk.Start + chunk.Length : NextStart(offset);
        return new ValueTask<BlockStatus>(new BlockStatus(Math.Min(length, end - offset), (stored ? BlockFlags.Data : BlockFlags.Zero) | BlockFlags.Allocated));
    }

    private async ValueTask ReadPackedAsync(int index, int within, Memory<byte> part, CancellationToken cancellation)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_heldChunk != index)
            {
                Chunk chunk = _chunks[index];
                byte[] packed = new byte[chunk.HostLength];
                await File.ReadAsync(chunk.Host, packed, cancellation).ConfigureAwait(false);
                byte[] block = _held.Length == chunk.Length ? _held : new byte[chunk.Length];
                _heldChunk = -1;
                if (!ZlibBlock.Expand(packed, block))
                    throw BlockException.Corrupt($"The compressed chunk at 0x{chunk.Host:x} of {FileName} is damaged");
                (_held, _heldChunk) = (block, index);
            }
            _held.AsSpan(within, part.Length).CopyTo(part.Span);
        }
        finally
        {
            _lock.Exit();
        }
    }

    /// <summary>The chunk that an offset is in; -1: none.</summary>
    private int Find(long offset)
    {
        int low = 0;
        int high = _chunks.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) / 2;
            if (_chunks[middle].Start > offset)
                high = middle - 1;
            else if (_chunks[middle].Start + _chunks[middle].Length <= offset)
                low = middle + 1;
            else
                return middle;
        }
        return -1;
    }

    /// <summary>Where the next chunk begins behind an offset that none holds.</summary>
    private long NextStart(long offset)
    {
        int low = 0;
        int high = _chunks.Length;
        while (low < high)
        {
            int middle = (low + high) / 2;
            if (_chunks[middle].Start > offset)
                high = middle;
            else
                low = middle + 1;
        }
        return low < _chunks.Length ? _chunks[low].Start : Length;
    }

    /// <summary>The data of the list's "blkx" entries. Of the list's XML only the tags that lead there are looked for.</summary>
    private static List<byte[]> Tables(ReadOnlySpan<byte> list)
    {
        List<byte[]> tables = [];
        int start = list.IndexOf("<key>blkx</key>"u8);
        if (start >= 0)
            list = list[start..];
        int end = list.IndexOf("</array>"u8);
        list = start >= 0 && end >= 0 ? list[..end] : [];
        while (list.IndexOf("<data>"u8) is int open and >= 0)
        {
            list = list[(open + 6)..];
            int close = list.IndexOf("</data>"u8);
            if (close < 0)
                throw new BlockException("The dmg's property list is damaged");
            try
            {
                tables.Add(Convert.FromBase64String(Encoding.ASCII.GetString(list[..close])));
            }
            catch (FormatException error)
            {
                throw new BlockException("The dmg's property list is damaged: " + error.Message, error);
            }
            list = list[close..];
        }
        return tables.Count > 0 ? tables : throw new BlockException("The dmg's property list has no tables of chunks");
    }

    private static void Parse(byte[] table, long dataOffset, long fileLength, List<Chunk> chunks)
    {
        if (table.Length < TableHeaderSize || !table.AsSpan().StartsWith("mish"u8))
            throw new BlockException("A table of chunks in the dmg has no signature");
        long first = BinaryPrimitives.ReadInt64BigEndian(table.AsSpan(8));
        // Places are relative to the table's own offset in the data.
        long within = BinaryPrimitives.ReadInt64BigEndian(table.AsSpan(24));
        uint count = BinaryPrimitives.ReadUInt32BigEndian(table.AsSpan(200));
        if (count > (uint)(table.Length - TableHeaderSize) / EntrySize || chunks.Count + (long)count > MostChunks || first < 0 || within < 0)
            throw new BlockException("A table of chunks in the dmg is damaged");
        for (int i = 0; i < count; i++)
        {
            ReadOnlySpan<byte> entry = table.AsSpan(TableHeaderSize + (i * EntrySize), EntrySize);
            ChunkType type = (ChunkType)BinaryPrimitives.ReadUInt32BigEndian(entry);
            long start = BinaryPrimitives.ReadInt64BigEndian(entry[8..]);
            long length = BinaryPrimitives.ReadInt64BigEndian(entry[16..]);
            long host = BinaryPrimitives.ReadInt64BigEndian(entry[24..]);
            long hostLength = BinaryPrimitives.ReadInt64BigEndian(entry[32..]);
            if (type is ChunkType.Comment or ChunkType.Terminator)
                continue;
            if (type is ChunkType.Bzip2 or ChunkType.Lzfse or ChunkType.Lzma or ChunkType.Adc)
                throw new BlockException($"The dmg is compressed with {type.ToString().ToLowerInvariant()}, which is not read here: convert it on a Mac (hdiutil convert -format UDZO)", BlockErrno.NotSupported);
            if (type is not (ChunkType.Zero or ChunkType.Raw or ChunkType.Ignore or ChunkType.Zlib))
                throw new BlockException($"The dmg has chunks of an unknown type {(uint)type:x8}", BlockErrno.NotSupported);
            if (length == 0)
                continue;
            const long most = long.MaxValue / Sector / 4;
            if (start is < 0 or > most || length is < 0 or > most || first > most)
                throw new BlockException("A chunk of the dmg is out of range");
            bool stored = type is ChunkType.Raw or ChunkType.Zlib;
            if (stored && (host < 0 || hostLength < 0 || host > long.MaxValue / 4 || within > fileLength || hostLength > fileLength || dataOffset + within + host > fileLength - hostLength))
                throw new BlockException("A chunk of the dmg is outside the file");
            if (type == ChunkType.Zlib && (length * Sector > LargestChunk || hostLength > LargestChunk))
                throw new BlockException("A compressed chunk of the dmg is larger than 64 MiB", BlockErrno.FileTooBig);
            if (type == ChunkType.Raw && hostLength < length * Sector)
                throw new BlockException("A chunk of the dmg is shorter than its sectors");
            chunks.Add(new Chunk(type, (first + start) * Sector, length * Sector, dataOffset + within + host, hostLength));
        }
    }

    private readonly record struct Chunk(ChunkType Type, long Start, long Length, long Host, long HostLength);
}
