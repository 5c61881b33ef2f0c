using System;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>
/// One node of a block graph: a protocol (host file, NBD), a format (raw, qcow2) or a filter. Requests may come from any thread, many
/// at a time; overlapping ones have no order between them. A node owns the nodes below it. Requests are checked, and cut to the
/// node's <see cref="RequestAlignment"/>, here and nowhere else. Failures are <see cref="BlockException"/>.
/// </summary>
public abstract class BlockNode : IAsyncDisposable
{
    private readonly RangeLock _unaligned = new();

    /// <summary>The driver's name as tools write it: "qcow2", "raw", "file".</summary>
    public abstract string Driver { get; }

    /// <summary>Size in bytes.</summary>
    public abstract long Length { get; }

    /// <summary>What the node was opened from, as tools show it.</summary>
    public virtual string FileName => File?.FileName ?? string.Empty;

    public virtual bool IsReadOnly => File?.IsReadOnly ?? false;

    /// <summary>Offsets and lengths that reach the node's own code are multiples of this power of two.</summary>
    public virtual int RequestAlignment => 1;

    /// <summary>Size of the unit the format allocates by; 0: none.</summary>
    public virtual int ClusterSize => 0;

    /// <summary>The node that stores this one's bytes; null for protocols.</summary>
    public virtual BlockNode? File => null;

    /// <summary>The image that unallocated areas show; null: none.</summary>
    public virtual BlockNode? Backing => null;

    /// <summary>Whether a write may go past the end and grow the node, and a read there gives zeros (protocols below formats).</summary>
    public virtual bool IsGrowable => false;

    /// <summary>Whether zeroes can be written without storing them.</summary>
    public virtual bool HasFastZero => true;

    /// <summary>What becomes of writes of nothing but zeros. Set before the first request.</summary>
    public DetectZeroes DetectZeroes { get; set; }

    /// <summary>Whether much of what counts as data here may be holes of the file below (preallocated images).</summary>
    public virtual bool MayHoldHoles => false;

    /// <summary>The node that holds the data which <see cref="BlockStatus.HostOffset"/> gives the place of; formats may keep it beside their own file.</summary>
    public virtual BlockNode? DataFileAt(long offset) => File;

    /// <summary>Bytes it takes on its medium; -1 where unknown.</summary>
    public virtual long AllocatedBytes => File?.AllocatedBytes ?? -1;

    /// <summary>Whether a fresh image reads as zeros all over.</summary>
    public virtual bool IsZeroWhenCreated => false;

    public ValueTask ReadAsync(long offset, Memory<byte> buffer, CancellationToken cancellation = default)
    {
        cancellation.ThrowIfCancellationRequested();
        if (buffer.IsEmpty)
            return default;
        Check(offset, buffer.Length, IsGrowable);
        return ((offset | (long)buffer.Length) & (RequestAlignment - 1)) == 0
            ? ReadCoreAsync(offset, buffer, cancellation)
            : ReadUnalignedAsync(offset, buffer, cancellation);
    }

    public ValueTask WriteAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags = WriteFlags.None, CancellationToken cancellation = default)
    {
        cancellation.ThrowIfCancellationRequested();
        CheckWritable();
        if (buffer.IsEmpty)
            return default;
        Check(offset, buffer.Length, IsGrowable);
        if (DetectZeroes != DetectZeroes.Off && (flags & WriteFlags.Compressed) == 0 && !buffer.Span.ContainsAnyExcept((byte)0))
        {
            ZeroFlags zeroes = (DetectZeroes == DetectZeroes.Unmap ? ZeroFlags.MayUnmap : ZeroFlags.None) | ((flags & WriteFlags.ForceUnitAccess) != 0 ? ZeroFlags.ForceUnitAccess : ZeroFlags.None);
            return WriteZeroesAsync(offset, buffer.Length, zeroes, cancellation);
        }
        if (RequestAlignment == 1)
            return WriteCoreAsync(offset, buffer, flags, cancellation);
        return WriteAlignedAsync(offset, buffer, flags, cancellation);
    }

    /// <summary>Makes a range read as zeros.</summary>
    public ValueTask WriteZeroesAsync(long offset, long length, ZeroFlags flags = ZeroFlags.None, CancellationToken cancellation = default)
    {
        cancellation.ThrowIfCancellationRequested();
        CheckWritable();
        if (length == 0)
            return default;
        Check(offset, length, IsGrowable);
        return ((offset | length) & (RequestAlignment - 1)) == 0
            ? WriteZeroesCoreAsync(offset, length, flags, cancellation)
            : WriteZeroesUnalignedAsync(offset, length, flags, cancellation);
    }

    /// <summary>The range's content is no longer needed. A hint: units that are not wholly covered are left alone.</summary>
    public ValueTask DiscardAsync(long offset, long length, CancellationToken cancellation = default)
    {
        cancellation.ThrowIfCancellationRequested();
        CheckWritable();
        if (length == 0)
            return default;
        Check(offset, length, growable: false);
        long mask = RequestAlignment - 1;
        long start = (offset + mask) & ~mask;
        long end = (offset + length) & ~mask;
        return end <= start ? default : DiscardCoreAsync(start, end - start, cancellation);
    }

    /// <summary>Makes everything written so far stable.</summary>
    public virtual ValueTask FlushAsync(CancellationToken cancellation = default) => File?.FlushAsync(cancellation) ?? default;

    /// <summary>What the bytes from <paramref name="offset"/> on are made of, for at most <paramref name="length"/> bytes.</summary>
    public ValueTask<BlockStatus> StatusAsync(long offset, long length, CancellationToken cancellation = default)
    {
        cancellation.ThrowIfCancellationRequested();
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        if (offset >= Length || length <= 0)
            return new ValueTask<BlockStatus>(new BlockStatus(0, BlockFlags.None));
        return StatusCoreAsync(offset, Math.Min(length, Length - offset), cancellation);
    }

    /// <summary>Changes the size. Content past the new end is lost; new content reads as zeros.</summary>
    public virtual ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        throw new BlockException("Image format driver does not support resize", BlockErrno.NotSupported);

    /// <summary>Writes back what is buffered and closes this node and those it owns.</summary>
    public virtual async ValueTask DisposeAsync()
    {
        if (Backing is BlockNode backing)
            await backing.DisposeAsync().ConfigureAwait(false);
        if (File is BlockNode file)
            await file.DisposeAsync().ConfigureAwait(false);
        GC.SuppressFinalize(this);
    }

    /// <summary>
    /// Reads at once, where that takes no more than a copy of memory: the short way of a <see cref="BlockBackend"/>, which keeps the node open meanwhile.
    /// </summary>
    /// <param name="offset">Not negative.</param>
    /// <param name="buffer">Not empty; may have been written where the answer is false.</param>
    /// <returns>False: to be asked the long way, which also says what is wrong.</returns>
    protected internal virtual bool TryReadNow(long offset, Span<byte> buffer) => false;

    /// <summary>Writes at once, likewise.</summary>
    /// <returns>False: to be written the long way.</returns>
    protected internal virtual bool TryWriteNow(long offset, ReadOnlySpan<byte> buffer) => false;

    /// <summary>Reads what shows through from below: zeros behind its end, or where there is nothing below.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private protected static async ValueTask ReadBelowAsync(BlockNode? below, long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        int there = below is null ? 0 : (int)Math.Clamp(below.Length - offset, 0, buffer.Length);
        if (there > 0)
            await below!.ReadAsync(offset, buffer[..there], cancellation).ConfigureAwait(false);
        buffer.Span[there..].Clear();
    }

    protected abstract ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation);

    protected abstract ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation);

    protected virtual ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation) =>
        WriteZeroDataAsync(offset, length, flags, cancellation);

    protected virtual ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation) => default;

    protected virtual ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        new(new BlockStatus(length, BlockFlags.Data | BlockFlags.Allocated));

    /// <summary>The slow way to zeros: as data.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected async ValueTask WriteZeroDataAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        if ((flags & ZeroFlags.NoFallback) != 0)
            throw new BlockException("writing zeroes without a fallback is not supported here", BlockErrno.NotSupported);
        WriteFlags write = (flags & ZeroFlags.ForceUnitAccess) != 0 ? WriteFlags.ForceUnitAccess : WriteFlags.None;
        using AlignedBuffer buffer = AlignedBuffer.Rent((int)Math.Min(length, 1 << 20));
        Memory<byte> zeros = buffer.Memory[..(int)Math.Min(length, 1 << 20)];
        zeros.Span.Clear();
        while (length > 0)
        {
            int part = (int)Math.Min(length, zeros.Length);
            await WriteCoreAsync(offset, zeros[..part], write, cancellation).ConfigureAwait(false);
            offset += part;
            length -= part;
        }
    }

    protected BlockException ReadOnlyError() => new("Block node is read-only", BlockErrno.Perm);

    private void CheckWritable()
    {
        if (IsReadOnly)
            throw ReadOnlyError();
    }

    private void Check(long offset, long length, bool growable)
    {
        if (offset < 0 || length < 0 || offset > long.MaxValue - length || (!growable && offset + length > Length))
            throw new BlockException($"request of {length} bytes at {offset} is outside the {Length} bytes of {FileName}", BlockErrno.Io);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadUnalignedAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        long mask = RequestAlignment - 1;
        long start = offset & ~mask;
        int length = checked((int)(((offset + buffer.Length + mask) & ~mask) - start));
        using AlignedBuffer bounce = AlignedBuffer.Rent(length);
        await ReadCoreAsync(start, bounce.Memory[..length], cancellation).ConfigureAwait(false);
        bounce.Memory.Slice((int)(offset - start), buffer.Length).CopyTo(buffer);
    }

    /// <summary>Writes of a node with an alignment: partial units are read, changed and written with the range held.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteAlignedAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        long mask = RequestAlignment - 1;
        long start = offset & ~mask;
        long end = (offset + buffer.Length + mask) & ~mask;
        await _unaligned.AcquireAsync(start, end).ConfigureAwait(false);
        try
        {
            if (start == offset && end == offset + buffer.Length)
            {
                await WriteCoreAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
                return;
            }
            int length = checked((int)(end - start));
            using AlignedBuffer bounce = AlignedBuffer.Rent(length);
            Memory<byte> whole = bounce.Memory[..length];
            int unit = RequestAlignment;
            if (start != offset)
                await ReadCoreAsync(start, whole[..unit], cancellation).ConfigureAwait(false);
            if (end != offset + buffer.Length && (start == offset || length > unit))
                await ReadCoreAsync(end - unit, whole[^unit..], cancellation).ConfigureAwait(false);
            buffer.CopyTo(whole[(int)(offset - start)..]);
            await WriteCoreAsync(start, whole, flags, cancellation).ConfigureAwait(false);
        }
        finally
        {
            _unaligned.Release(start, end);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteZeroesUnalignedAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        long mask = RequestAlignment - 1;
        long end = offset + length;
        long start = (offset + mask) & ~mask;
        long stop = end & ~mask;
        byte[] zeros = new byte[RequestAlignment];
        if (stop <= start)
        {
            start = stop = Math.Min(end, start);
        }
        if (start > offset)
            await WriteAsync(offset, zeros.AsMemory(0, (int)(start - offset)), WriteFlags.None, cancellation).ConfigureAwait(false);
        if (stop > start)
            await WriteZeroesCoreAsync(start, stop - start, flags, cancellation).ConfigureAwait(false);
        if (end > stop)
            await WriteAsync(stop, zeros.AsMemory(0, (int)(end - stop)), WriteFlags.None, cancellation).ConfigureAwait(false);
    }
}
