using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Filters;

/// <summary>A disk that takes everything and keeps nothing, for measuring what lies above it.</summary>
public sealed class NullNode(long length, bool readZeroes) : BlockNode
{
    public override string Driver => "null-co";

    public override long Length => length;

    public override string FileName => "null-co://";

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        if (readZeroes)
            buffer.Span.Clear();
        return default;
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => default;

    protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation) => default;

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        new(new BlockStatus(length, (readZeroes ? BlockFlags.Zero : BlockFlags.Data) | BlockFlags.Allocated | BlockFlags.OffsetValid, offset));
}
