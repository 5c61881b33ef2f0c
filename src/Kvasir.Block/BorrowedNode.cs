using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block;

/// <summary>A read-only stand-in for a node that somebody else owns and closes.</summary>
internal sealed class BorrowedNode(BlockNode node) : BlockNode
{
    public override string Driver => node.Driver;

    public override long Length => node.Length;

    public override string FileName => node.FileName;

    public override bool IsReadOnly => true;

    public override bool IsGrowable => node.IsGrowable;

    public override int ClusterSize => node.ClusterSize;

    public override ValueTask FlushAsync(CancellationToken cancellation = default) => default;

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) =>
        node.ReadAsync(offset, buffer, cancellation);

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) =>
        throw ReadOnlyError();

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        node.StatusAsync(offset, length, cancellation);
}
