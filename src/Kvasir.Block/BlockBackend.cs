using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Block;

/// <summary>
/// The host side of a VM's disk: a block graph and what a device needs of it. Requests are submitted from any thread, run at the same
/// time and complete in any order, and a device that keeps its <see cref="BlockRequest"/>s allocates nothing per request. As on real
/// disks, requests that overlap have no order unless the first has completed before the second is submitted.
/// </summary>
public sealed class BlockBackend : IAsyncDisposable
{
    private const int LargestBounce = 1 << 20;

    private readonly BackendOptions _options;
    private readonly bool _writesNow;
    private readonly Lock _lock = new();
    private readonly AsyncMutex _swapping = new();
    private List<BlockRequest>? _held;
    private TaskCompletionSource? _drained;
    private int _running;
    private bool _closed;

    private BlockBackend(BlockNode node, BackendOptions options)
    {
        Node = node;
        _options = options;
        _writesNow = !options.ReadOnly && options.DetectZeroes == DetectZeroes.Off;
        WriteCache = options.Cache is not (CacheMode.Writethrough or CacheMode.DirectSync);
    }

    /// <summary>The graph's top node.</summary>
    public BlockNode Node { get; private set; }

    /// <summary>Size in bytes.</summary>
    public long Length => Node.Length;

    public bool IsReadOnly => Node.IsReadOnly || _options.ReadOnly;

    /// <summary>Whether writes may stay in a cache until a flush. Off: each one is stable when it completes. A guest may switch it.</summary>
    public bool WriteCache { get; set; }

    /// <summary>Whether discards give space back, which decides if a device offers them.</summary>
    public bool CanDiscard => _options.Discard && !IsReadOnly;

    /// <summary>Unit that discards and zeroes are cheap in: the format's cluster, or the file's block.</summary>
    public int PreferredUnit => Math.Max(Node.ClusterSize, 4096);

    /// <summary>The disk has another size; called after a resize, on its thread.</summary>
    public event Action? Resized;

    /// <summary>Opens a disk by path or address, or by "json:{...}".</summary>
    /// <exception cref="BlockException">It cannot be opened; the text says why.</exception>
    public static async ValueTask<BlockBackend> OpenAsync(string name, BackendOptions options, CancellationToken cancellation = default) =>
        await WrapAsync(await Image.OpenAsync(name, options.ToOpenOptions(), cancellation).ConfigureAwait(false), options, cancellation).ConfigureAwait(false);

    /// <summary>Opens a disk from the options of a graph (--image-opts, blockdev).</summary>
    /// <exception cref="BlockException">It cannot be opened; the text says why.</exception>
    public static async ValueTask<BlockBackend> OpenAsync(ImageOptions graph, BackendOptions options, CancellationToken cancellation = default) =>
        await WrapAsync(await Image.OpenAsync(graph, options.ToOpenOptions(), cancellation).ConfigureAwait(false), options, cancellation).ConfigureAwait(false);

    /// <summary>A back end on a graph that is open already; owned from now on.</summary>
    public static BlockBackend Over(BlockNode node, BackendOptions options) =>
        new(options.Throttle is { IsLimited: true } limits ? new ThrottleNode(node, limits) : node, options);

    /// <summary>
    /// Starts a request. It ends with <see cref="BlockRequest.OnCompleted"/>, possibly before this returns; never throws for what the guest asked. Once the
    /// back end is closed, requests end with <see cref="BlockErrno.NoDevice"/>.
    /// </summary>
    public void Submit(BlockRequest request)
    {
        if (Volatile.Read(ref _held) is not null && TryHold(request))
            return;
        Interlocked.Increment(ref _running);
        // Whoever begins to swap the graph sees this request running, or this thread sees the swap.
        if (Volatile.Read(ref _held) is not null && TryHold(request))
        {
            Ended();
            return;
        }
        request.Start(this);
    }

    /// <summary>
    /// Carries a read or a write of one piece of memory out within the call, where that takes no more than a copy: the short way of a device, to be tried before
    /// it submits a request. Writes may stay in the cache.
    /// </summary>
    /// <returns>False: to be submitted, which also says what is wrong. What was to be read into may have been written.</returns>
    public bool TryRunNow(BlockOperation operation, long offset, Span<byte> memory)
    {
        if (Volatile.Read(ref _held) is not null)
            return false;
        Interlocked.Increment(ref _running);
        // As in Submit.
        bool done = Volatile.Read(ref _held) is null && offset >= 0 && operation switch
        {
            BlockOperation.Read => Node.TryReadNow(offset, memory),
            BlockOperation.Write => _writesNow && WriteCache && Node.TryWriteNow(offset, memory),
            _ => false,
        };
        Ended();
        return done;
    }

    /// <summary>Changes the graph with no request under way; those submitted meanwhile start afterwards. A job's way in and out.</summary>
    /// <param name="change">Gets the top node and gives the new one.</param>
    public async ValueTask SwapAsync(Func<BlockNode, ValueTask<BlockNode>> change)
    {
        await _swapping.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_closed)
                throw Closed();
            lock (_lock)
                Volatile.Write(ref _held, []);
            Interlocked.MemoryBarrier();
            try
            {
                await DrainAsync().ConfigureAwait(false);
                Node = await change(Node).ConfigureAwait(false);
            }
            finally
            {
                List<BlockRequest> held;
                lock (_lock)
                {
                    held = _held!;
                    Volatile.Write(ref _held, null);
                }
                foreach (BlockRequest request in held)
                    Submit(request);
            }
        }
        finally
        {
            _swapping.Exit();
        }
    }

    /// <summary>Ends when no request runs. New ones may be submitted meanwhile; a device that is stopped submits none.</summary>
    public Task DrainAsync()
    {
        lock (_lock)
        {
            if (Volatile.Read(ref _running) == 0)
                return Task.CompletedTask;
            _drained ??= new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            TaskCompletionSource drained = _drained;
            // Whoever ends last sees that somebody waits, or this thread sees the end.
            Interlocked.MemoryBarrier();
            if (Volatile.Read(ref _running) == 0)
            {
                _drained = null;
                drained.SetResult();
            }
            return drained.Task;
        }
    }

    /// <summary>What the bytes from an offset on are made of, through the whole backing chain.</summary>
    public ValueTask<BlockStatus> StatusAsync(long offset, long length, CancellationToken cancellation = default) =>
        ChainStatus.MergedAsync(Node, offset, length, cancellation);

    /// <summary>Changes the size and tells the device.</summary>
    /// <exception cref="BlockException">The format or the host refuses.</exception>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public async ValueTask ResizeAsync(long length, CancellationToken cancellation = default)
    {
        if (IsReadOnly)
            throw new BlockException("Block node is read-only", BlockErrno.Perm);
        await Node.ResizeAsync(length, Preallocation.Off, cancellation).ConfigureAwait(false);
        Resized?.Invoke();
    }

    public ValueTask FlushAsync(CancellationToken cancellation = default) => Node.FlushAsync(cancellation);

    /// <summary>Waits for requests under way, writes back what is buffered and closes the graph.</summary>
    public async ValueTask DisposeAsync()
    {
        await _swapping.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_closed)
                return;
            lock (_lock)
            {
                _closed = true;
                // From here on no request passes: it is held, and those that would be are refused.
                Volatile.Write(ref _held, []);
            }
            Interlocked.MemoryBarrier();
            await DrainAsync().ConfigureAwait(false);
            try
            {
                if (!Node.IsReadOnly)
                    await Node.FlushAsync().ConfigureAwait(false);
            }
            finally
            {
                await Node.DisposeAsync().ConfigureAwait(false);
            }
        }
        finally
        {
            _swapping.Exit();
        }
    }

    private static BlockException Closed() => new("the disk is closed", BlockErrno.NoDevice);

    private bool TryHold(BlockRequest request)
    {
        lock (_lock)
        {
            if (_held is null)
                return false;
            if (!_closed)
            {
                _held.Add(request);
                return true;
            }
        }
        request.Refuse(Closed());
        return true;
    }

    internal void Ended()
    {
        if (Interlocked.Decrement(ref _running) != 0 || Volatile.Read(ref _drained) is null)
            return;
        lock (_lock)
        {
            if (Volatile.Read(ref _running) != 0)
                return;
            _drained?.SetResult();
            _drained = null;
        }
    }

    internal ValueTask RunAsync(BlockRequest request)
    {
        try
        {
            if (IsReadOnly && request.Operation is not (BlockOperation.Read or BlockOperation.Flush))
                throw new BlockException("the disk is read-only", BlockErrno.Perm);
            bool fua = request.ForceUnitAccess || !WriteCache;
            switch (request.Operation)
            {
                case BlockOperation.Read when request.Segments.Length == 1:
                    return Node.ReadAsync(request.Offset, request.Segments[0]);
                case BlockOperation.Read:
                    return ReadScatteredAsync(request);
                case BlockOperation.Write when request.Segments.Length == 1 && _options.DetectZeroes == DetectZeroes.Off:
                    return Node.WriteAsync(request.Offset, request.Segments[0], fua ? WriteFlags.ForceUnitAccess : WriteFlags.None);
                case BlockOperation.Write:
                    return WriteGatheredAsync(request, fua);
                case BlockOperation.Flush:
                    return Node.FlushAsync();
                case BlockOperation.Discard:
                    return _options.Discard ? Node.DiscardAsync(request.Offset, request.Length) : default;
                case BlockOperation.WriteZeroes:
                    ZeroFlags flags = (request.MayUnmap && _options.Discard ? ZeroFlags.MayUnmap : ZeroFlags.None) | (fua ? ZeroFlags.ForceUnitAccess : ZeroFlags.None);
                    return Node.WriteZeroesAsync(request.Offset, request.Length, flags);
                default:
                    throw new BlockException("unknown request", BlockErrno.NotSupported);
            }
        }
        catch (BlockException error)
        {
            return ValueTask.FromException(error);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private static async ValueTask<BlockBackend> WrapAsync(BlockNode node, BackendOptions options, CancellationToken cancellation)
    {
        try
        {
            if (options.Snapshot)
                node = await CoverAsync(node, options.Async, cancellation).ConfigureAwait(false);
            return Over(node, options);
        }
        catch
        {
            await node.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Puts a temporary overlay on an image. Its file has no name once this returns, so that it vanishes however the process ends.</summary>
    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    public static async ValueTask<BlockNode> CoverAsync(BlockNode below, AsyncMode mode = AsyncMode.Auto, CancellationToken cancellation = default)
    {
        string folder = Environment.GetEnvironmentVariable("TMPDIR") is { Length: > 0 } set ? set : "/var/tmp";
        string path = Path.Combine(folder, $"kvasir-overlay-{Guid.NewGuid():N}");
        HostFile file = await HostFile.CreateAsync(path, 0, Preallocation.Off, new HostFileOptions { Cache = CacheMode.Unsafe, Async = mode, Lock = false }).ConfigureAwait(false);
        try
        {
            File.Delete(path);
            Qcow2Image overlay = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = (below.Length + 511) & ~511L }, cancellation).ConfigureAwait(false);
            overlay.SetBacking(below);
            return overlay;
        }
        catch
        {
            await file.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask ReadScatteredAsync(BlockRequest request)
    {
        long offset = request.Offset;
        Place place = default;
        for (long left = request.Bytes; left > 0;)
        {
            int part = (int)Math.Min(left, LargestBounce);
            using AlignedBuffer bounce = AlignedBuffer.Rent(part);
            await Node.ReadAsync(offset, bounce.Memory[..part]).ConfigureAwait(false);
            Scatter(bounce.Memory.Span[..part], request.Segments, ref place);
            offset += part;
            left -= part;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask WriteGatheredAsync(BlockRequest request, bool fua)
    {
        long offset = request.Offset;
        Place place = default;
        for (long left = request.Bytes; left > 0;)
        {
            int part = (int)Math.Min(left, LargestBounce);
            using AlignedBuffer bounce = AlignedBuffer.Rent(part);
            Gather(request.Segments, bounce.Memory.Span[..part], ref place);
            if (_options.DetectZeroes != DetectZeroes.Off && !bounce.Memory.Span[..part].ContainsAnyExcept((byte)0))
            {
                ZeroFlags flags = (_options.DetectZeroes == DetectZeroes.Unmap && _options.Discard ? ZeroFlags.MayUnmap : ZeroFlags.None) | (fua ? ZeroFlags.ForceUnitAccess : ZeroFlags.None);
                await Node.WriteZeroesAsync(offset, part, flags).ConfigureAwait(false);
            }
            else
            {
                await Node.WriteAsync(offset, bounce.Memory[..part], fua ? WriteFlags.ForceUnitAccess : WriteFlags.None).ConfigureAwait(false);
            }
            offset += part;
            left -= part;
        }
    }

    private static void Scatter(ReadOnlySpan<byte> source, ReadOnlySpan<Memory<byte>> segments, ref Place place)
    {
        while (!source.IsEmpty)
        {
            Span<byte> target = segments[place.Segment].Span[place.Within..];
            int part = Math.Min(target.Length, source.Length);
            source[..part].CopyTo(target);
            source = source[part..];
            place = part == target.Length ? new Place(place.Segment + 1, 0) : new Place(place.Segment, place.Within + part);
        }
    }

    private static void Gather(ReadOnlySpan<Memory<byte>> segments, Span<byte> target, ref Place place)
    {
        while (!target.IsEmpty)
        {
            ReadOnlySpan<byte> source = segments[place.Segment].Span[place.Within..];
            int part = Math.Min(target.Length, source.Length);
            source[..part].CopyTo(target);
            target = target[part..];
            place = part == source.Length ? new Place(place.Segment + 1, 0) : new Place(place.Segment, place.Within + part);
        }
    }

    private readonly record struct Place(int Segment, int Within);
}
