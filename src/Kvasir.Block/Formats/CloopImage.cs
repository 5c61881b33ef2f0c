using System;
using System.Buffers.Binary;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>A compressed loop image (cloop, version 2): equal blocks, each a zlib stream; read-only. Integers are big-endian.</summary>
public sealed class CloopImage : BlockNode
{
    private const int HeaderSize = 136;
    private const int LargestBlock = 64 << 20;
    private const long LargestIndex = 64 << 20;

    private readonly long[] _offsets;
    private readonly int _blockSize;
    private readonly AsyncMutex _lock = new();
    private readonly byte[] _block;
    private long _held = -1;

    private CloopImage(BlockNode file, int blockSize, long[] offsets)
    {
        File = file;
        _blockSize = blockSize;
        _offsets = offsets;
        _block = new byte[blockSize];
    }

    public override string Driver => "cloop";

    public override BlockNode File { get; }

    public override long Length => (long)(_offsets.Length - 1) * _blockSize;

    public override bool IsReadOnly => true;

    public static bool Probe(ReadOnlySpan<byte> start) => start.StartsWith("#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"u8);

    /// <exception cref="BlockException">The image is damaged.</exception>
    public static async ValueTask<CloopImage> OpenAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] header = new byte[HeaderSize];
        await file.ReadAsync(0, header.AsMemory(0, (int)Math.Min(HeaderSize, file.Length)), cancellation).ConfigureAwait(false);
        uint blockSize = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(128));
        uint blocks = BinaryPrimitives.ReadUInt32BigEndian(header.AsSpan(132));
        if (blockSize == 0 || blockSize % 512 != 0 || blockSize > LargestBlock)
            throw new BlockException($"block size {blockSize} must be a multiple of 512, at most 64 MiB");
        long bytes = (blocks + 1L) * 8;
        if (bytes > LargestIndex || HeaderSize + bytes > file.Length)
            throw new BlockException("image requires too many offsets, or they are outside the file", BlockErrno.FileTooBig);
        byte[] index = new byte[bytes];
        await file.ReadAsync(HeaderSize, index, cancellation).ConfigureAwait(false);
        long[] offsets = new long[blocks + 1];
        for (int i = 0; i < offsets.Length; i++)
        {
            offsets[i] = BinaryPrimitives.ReadInt64BigEndian(index.AsSpan(i * 8));
            if (offsets[i] < 0 || offsets[i] > file.Length || (i > 0 && (offsets[i] < offsets[i - 1] || offsets[i] - offsets[i - 1] > 2L * LargestBlock)))
                throw new BlockException("offsets are not monotonically increasing, or outside the file; image may be corrupt");
        }
        return new CloopImage(file, (int)blockSize, offsets);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            while (!buffer.IsEmpty)
            {
                long block = offset / _blockSize;
                int within = (int)(offset % _blockSize);
                int part = Math.Min(buffer.Length, _blockSize - within);
                if (block != _held)
                {
                    _held = -1;
                    byte[] packed = new byte[_offsets[block + 1] - _offsets[block]];
                    await File.ReadAsync(_offsets[block], packed, cancellation).ConfigureAwait(false);
                    if (!ZlibBlock.Expand(packed, _block))
                        throw BlockException.Corrupt($"Block {block} of {FileName} is damaged");
                    _held = block;
                }
                _block.AsSpan(within, part).CopyTo(buffer.Span);
                buffer = buffer[part..];
                offset += part;
            }
        }
        finally
        {
            _lock.Exit();
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();
}
