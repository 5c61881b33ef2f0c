using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Filters;

/// <summary>An image from an offset on. Owns the image.</summary>
public sealed class WindowNode : BlockNode
{
    private readonly long _offset;

    /// <exception cref="BlockException">The offset lies behind the image's end.</exception>
    public WindowNode(BlockNode image, long offset)
    {
        if (offset < 0 || offset > image.Length)
            throw new BlockException($"The offset ({offset}) has to be smaller or equal to the size of the image ({image.Length})", BlockErrno.Invalid);
        File = image;
        _offset = offset;
    }

    public override string Driver => "raw";

    public override BlockNode File { get; }

    public override long Length => Math.Max(0, File.Length - _offset);

    public override int ClusterSize => File.ClusterSize;

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) => File.ReadAsync(offset + _offset, buffer, cancellation);

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) =>
        File.WriteAsync(offset + _offset, buffer, flags, cancellation);

    protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation) =>
        File.WriteZeroesAsync(offset + _offset, length, flags, cancellation);

    protected override ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation) => File.DiscardAsync(offset + _offset, length, cancellation);

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        ChainStatus.BelowAsync(File, offset + _offset, length, cancellation);
}
