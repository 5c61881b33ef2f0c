using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block.Jobs;

/// <summary>
/// The node that a job puts above the disk that it works on: it sees each change before and after it happens, and can hold ranges against
/// guest writes. Does not own the node below.
/// </summary>
internal sealed class JobFilter(BlockNode below) : BlockNode
{
    private readonly RangeLock _ranges = new();

    public override string Driver => "job";

    public override BlockNode File => below;

    public override BlockNode? Backing => below.Backing;

    public override long Length => below.Length;

    public override bool IsReadOnly => below.IsReadOnly;

    public override int RequestAlignment => below.RequestAlignment;

    public override int ClusterSize => below.ClusterSize;

    public override bool HasFastZero => below.HasFastZero;

    /// <summary>Called with a range before guest bytes in it change; null: nothing.</summary>
    public Func<long, long, ValueTask>? Before { get; set; }

    /// <summary>Called with a range after guest bytes in it changed, also when the change failed; null: nothing.</summary>
    public Func<long, long, ValueTask>? After { get; set; }

    /// <summary>Keeps guest changes out of a range until <see cref="Release"/>.</summary>
    public ValueTask HoldAsync(long offset, long length) => _ranges.AcquireAsync(offset, offset + length);

    public void Release(long offset, long length) => _ranges.Release(offset, offset + length);

    public override ValueTask FlushAsync(CancellationToken cancellation = default) => below.FlushAsync(cancellation);

    public override async ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        _ = preallocation;
        await Task.CompletedTask.ConfigureAwait(false);
        throw new BlockException($"the disk cannot change its size to {length} while a job works on it", BlockErrno.Busy);
    }

#pragma warning disable CA2215 // The node below is the disk's: whoever closes the disk closes it.
    public override ValueTask DisposeAsync() => default;
#pragma warning restore CA2215

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) => below.ReadAsync(offset, buffer, cancellation);

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => below.StatusAsync(offset, length, cancellation);

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await EnterAsync(offset, buffer.Length).ConfigureAwait(false);
        try
        {
            await below.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
        }
        finally
        {
            await LeaveAsync(offset, buffer.Length).ConfigureAwait(false);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await EnterAsync(offset, length).ConfigureAwait(false);
        try
        {
            await below.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
        }
        finally
        {
            await LeaveAsync(offset, length).ConfigureAwait(false);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await EnterAsync(offset, length).ConfigureAwait(false);
        try
        {
            await below.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
        }
        finally
        {
            await LeaveAsync(offset, length).ConfigureAwait(false);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask EnterAsync(long offset, long length)
    {
        await _ranges.AcquireAsync(offset, offset + length).ConfigureAwait(false);
        try
        {
            if (Before is { } before)
                await before(offset, length).ConfigureAwait(false);
        }
        catch
        {
            _ranges.Release(offset, offset + length);
            throw;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask LeaveAsync(long offset, long length)
    {
        try
        {
            if (After is { } after)
                await after(offset, length).ConfigureAwait(false);
        }
        finally
        {
            _ranges.Release(offset, offset + length);
        }
    }
}
