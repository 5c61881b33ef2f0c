using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>The raw format: the file's bytes are the disk's, or a window of them.</summary>
public sealed class RawImage : BlockNode
{
    private readonly long _offset;
    private readonly long _size;

    /// <param name="file">What holds the bytes; owned.</param>
    /// <param name="offset">Where the disk starts in it.</param>
    /// <param name="size">The disk's size; -1: all that follows.</param>
    public RawImage(BlockNode file, long offset = 0, long size = -1)
    {
        if (offset < 0 || offset > file.Length)
            throw new BlockException($"Offset ({offset}) cannot be greater than size of the containing file ({file.Length})");
        if (size >= 0 && size > file.Length - offset)
            throw new BlockException($"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the actual size of the containing file ({file.Length})");
        File = file;
        _offset = offset;
        _size = size;
    }

    public override string Driver => "raw";

    public override BlockNode File { get; }

    /// <summary>Whole sectors: the last one of an odd-sized file is filled up with zeros.</summary>
    public override long Length => _size >= 0 ? _size : (Math.Max(0, File.Length - _offset) + 511) & ~511L;

    public override bool MayHoldHoles => true;

    public override bool IsZeroWhenCreated => File.IsZeroWhenCreated;

    /// <summary>
    /// The format was guessed: writes that would make the next guess a different one are refused, or a guest could choose which
    /// host files its disk shows.
    /// </summary>
    public bool Guarded { get; init; }

    /// <summary>Where the disk starts in its file.</summary>
    public long Offset => _offset;

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        if (_size >= 0)
            throw new BlockException("Cannot resize fixed-size raw disks", BlockErrno.NotSupported);
        return File.ResizeAsync(checked(length + _offset), preallocation, cancellation);
    }

    protected internal override bool TryReadNow(long offset, Span<byte> buffer) =>
        (_size < 0 || offset <= _size - buffer.Length) && File.TryReadNow(offset + _offset, buffer);

    protected internal override bool TryWriteNow(long offset, ReadOnlySpan<byte> buffer) =>
        DetectZeroes == DetectZeroes.Off && (_size < 0 || offset <= _size - buffer.Length) && !(Guarded && offset == 0) && File.TryWriteNow(offset + _offset, buffer);

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) =>
        File.ReadAsync(offset + _offset, buffer, cancellation);

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        if ((flags & WriteFlags.Compressed) != 0)
            throw new BlockException("Compression not supported for this file format", BlockErrno.NotSupported);
        if (Guarded && offset == 0 && Image.ProbeBytesOf(buffer.Span) is string format)
        {
            throw new BlockException(
                $"The image's format was not specified and probing guessed raw: a write that makes it look like {format} is refused. Specify the 'raw' format explicitly to remove the restriction",
                BlockErrno.Perm);
        }
        return File.WriteAsync(offset + _offset, buffer, flags, cancellation);
    }

    protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation) =>
        File.WriteZeroesAsync(offset + _offset, length, flags, cancellation);

    protected override ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation) =>
        File.DiscardAsync(offset + _offset, length, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    protected override async ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        BlockStatus status = await ChainStatus.BelowAsync(File, offset + _offset, length, cancellation).ConfigureAwait(false);
        // The last sector of a file whose size is no multiple of it reads as zeros past the end.
        if (status.Length == 0)
            return new BlockStatus(length, BlockFlags.Zero | BlockFlags.Allocated);
        return status with { Flags = status.Flags | BlockFlags.OffsetValid, HostOffset = offset + _offset };
    }
}
