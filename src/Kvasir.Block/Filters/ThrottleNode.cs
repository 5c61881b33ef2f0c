using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Filters;

/// <summary>Slows requests down to given rates. Requests wait before they start, in the order in which they came; nodes of one group share the rates.</summary>
public sealed class ThrottleNode(BlockNode file, ThrottleGroup group) : BlockNode
{
    public ThrottleNode(BlockNode file, ThrottleLimits limits)
        : this(file, new ThrottleGroup(limits))
    {
    }

    public override string Driver => "throttle";

    public override long Length => file.Length;

    public override BlockNode File => file;

    public override bool IsGrowable => file.IsGrowable;

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        file.ResizeAsync(length, preallocation, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: false, buffer.Length, cancellation).ConfigureAwait(false);
        await file.ReadAsync(offset, buffer, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, buffer.Length, cancellation).ConfigureAwait(false);
        await file.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, length, cancellation).ConfigureAwait(false);
        await file.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await group.WaitAsync(isWrite: true, 0, cancellation).ConfigureAwait(false);
        await file.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        ChainStatus.BelowAsync(file, offset, length, cancellation);
}
