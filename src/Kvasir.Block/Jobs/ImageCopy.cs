using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Block.Jobs;

/// <summary>How <see cref="ImageCopy"/> copies.</summary>
public sealed record CopyOptions
{
    /// <summary>Copies under way at once.</summary>
    public int Workers { get; init; } = 8;

    /// <summary>Shortest run of zeros that is not written as data; 0: everything is written, holes too.</summary>
    public int SparseBytes { get; init; } = 4096;

    /// <summary>Write compressed clusters.</summary>
    public bool Compressed { get; init; }

    /// <summary>The target reads as zeros already.</summary>
    public bool TargetIsZero { get; init; }

    /// <summary>The target has a backing file that shows the same as the source where the source has nothing of its own.</summary>
    public BlockNode? SharedBacking { get; init; }

    /// <summary>Let the kernel copy between two plain files, where it can (copy_file_range(2)).</summary>
    public bool Offload { get; init; }

    /// <summary>Go on over unreadable areas, which become zeros.</summary>
    public bool Salvage { get; init; }

    /// <summary>Bytes per second; 0: no limit.</summary>
    public long BytesPerSecond { get; init; }

    /// <summary>Gets the bytes done and the bytes in all.</summary>
    public Action<long, long>? Progress { get; init; }

    /// <summary>Gets the place of each unreadable area (salvage).</summary>
    public Action<long, BlockException>? Unreadable { get; init; }
}

/// <summary>
/// Copies one disk to another, several pieces at a time, leaving out what need not be stored: the engine of convert, and of the mirror
/// and backup jobs' bulk phases.
/// </summary>
public sealed class ImageCopy
{
    private const int PieceBytes = 1 << 20;
    private const int CompressedPieceBytes = 1 << 20;

    private readonly BlockNode _source;
    private readonly BlockNode _target;
    private readonly CopyOptions _options;
    private readonly long _length;
    private readonly int _plainDepth;
    private readonly AsyncMutex _next = new();
    private readonly RateLimit _rate;
    private long _position;
    private long _done;
    private ChainExtent _extent;
    private long _extentEnd;

    private ImageCopy(BlockNode source, BlockNode target, CopyOptions options)
    {
        _source = source;
        _target = target;
        _options = options;
        _length = Math.Min(source.Length, target.Length);
        // Overlays that add nothing to a read but the way down.
        for (BlockNode? node = source; node is Qcow2Image; node = node.Backing)
            _plainDepth++;
        _rate = new RateLimit(options.BytesPerSecond);
    }

    /// <summary>Copies everything. The target is not flushed.</summary>
    /// <exception cref="BlockException">A read or a write failed.</exception>
    public static async ValueTask RunAsync(BlockNode source, BlockNode target, CopyOptions options, CancellationToken cancellation = default)
    {
        ImageCopy copy = new(source, target, options);
        using CancellationTokenSource stop = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        Task[] workers = new Task[Math.Max(1, options.Workers)];
        for (int i = 0; i < workers.Length; i++)
            workers[i] = Task.Run(() => copy.WorkAsync(stop), CancellationToken.None);
        try
        {
            await Task.WhenAll(workers).ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            // One worker's failure stops the others: the failure is what counts.
            foreach (Task worker in workers)
            {
                if (worker.Exception?.InnerException is BlockException failure)
                    throw failure;
            }
            throw;
        }
    }

    private async Task WorkAsync(CancellationTokenSource stop)
    {
        int pieceBytes = _options.Compressed ? Math.Max(CompressedPieceBytes, _target.ClusterSize) : PieceBytes;
        try
        {
            while (true)
            {
                Piece piece = await NextAsync(pieceBytes, stop.Token).ConfigureAwait(false);
                if (piece.Length == 0)
                    return;
                if (piece.Zero && !piece.Skip)
                {
                    await ZeroAsync(piece.Offset, piece.Length, stop.Token).ConfigureAwait(false);
                }
                else if (!piece.Skip && !Offloaded(piece))
                {
                    // From the pool for each piece: where requests do not wait, few buffers are in use, and those are warm.
                    using AlignedBuffer buffer = AlignedBuffer.Rent(pieceBytes);
                    await CopyPieceAsync(piece, buffer.Memory, stop.Token).ConfigureAwait(false);
                }
                long done = Interlocked.Add(ref _done, piece.Length);
                _options.Progress?.Invoke(done, _length);
            }
        }
        catch (Exception error) when (error is BlockException or LinuxException)
        {
            await stop.CancelAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Copies a piece inside the kernel; false: it has to be read and written.</summary>
    private bool Offloaded(Piece piece)
    {
        if (!_options.Offload || _source is not RawImage { File: HostFile from } source || _target is not RawImage { File: HostFile to } target)
            return false;
        for (long done = 0; done < piece.Length;)
        {
            long part = from.CopyTo(to, source.Offset + piece.Offset + done, target.Offset + piece.Offset + done, piece.Length - done);
            // Whatever the reason, reading and writing either works or says what is wrong.
            if (part <= 0)
                return false;
            done += part;
        }
        return true;
    }

    /// <summary>Hands out the next piece, in order.</summary>
    private async ValueTask<Piece> NextAsync(int pieceBytes, CancellationToken cancellation)
    {
        await _next.EnterAsync().ConfigureAwait(false);
        try
        {
            if (_position >= _length)
                return default;
            if (_position >= _extentEnd)
            {
                _extent = await ChainStatus.AtAsync(_source, _position, _length - _position, _options.SharedBacking, cancellation).ConfigureAwait(false);
                _extentEnd = _position + Math.Max(_extent.Length, 1);
            }
            long offset = _position;
            // With no sparse areas asked for (-S 0) zeros are data like any other.
            bool zero = _options.SparseBytes > 0 && (_extent.Flags & BlockFlags.Zero) != 0;
            bool skip = _extent.Node is null;
            long length = _extentEnd - offset;
            if (_options.Compressed && !skip)
            {
                // Compressed writes take whole clusters, whatever the extents below look like.
                int cluster = Math.Max(_target.ClusterSize, 512);
                if (!zero || length < cluster)
                {
                    length = Math.Min(Math.Max(Math.Min(length, pieceBytes) / cluster * cluster, cluster), _length - offset);
                    zero = false;
                }
                else
                {
                    length = offset + length >= _length ? length : length / cluster * cluster;
                }
            }
            else if (!zero && !skip)
            {
                // Pieces end at multiples of their size, so that clusters are seldom written in two parts.
                length = Math.Min(length, pieceBytes - (offset & (pieceBytes - 1)));
            }
            _position = offset + length;
            // Nothing writes to the source meanwhile: what the status says holds for the read, which need not look through the chain again.
            BlockNode from = _extent.Node is BlockNode node && _extent.Depth <= _plainDepth && _position <= Math.Min(_extentEnd, node.Length) ? node : _source;
            return new Piece(offset, length, skip, zero, from);
        }
        finally
        {
            _next.Exit();
        }
    }

    private async ValueTask CopyPieceAsync(Piece piece, Memory<byte> buffer, CancellationToken cancellation)
    {
        await _rate.WaitAsync(piece.Length, cancellation).ConfigureAwait(false);
        Memory<byte> data = buffer[..(int)piece.Length];
        await ReadAsync(piece.From, piece.Offset, data, cancellation).ConfigureAwait(false);
        if (_options.Compressed)
        {
            await WriteCompressedAsync(piece.Offset, data, cancellation).ConfigureAwait(false);
            return;
        }
        int at = 0;
        while (at < data.Length)
        {
            int run = ZeroScan.Run(data.Span[at..], _options.SparseBytes, out bool zero);
            if (zero)
                await ZeroAsync(piece.Offset + at, run, cancellation).ConfigureAwait(false);
            else
                await _target.WriteAsync(piece.Offset + at, data.Slice(at, run), WriteFlags.None, cancellation).ConfigureAwait(false);
            at += run;
        }
    }

    private async ValueTask ReadAsync(BlockNode source, long offset, Memory<byte> data, CancellationToken cancellation)
    {
        try
        {
            await source.ReadAsync(offset, data, cancellation).ConfigureAwait(false);
        }
        catch (BlockException) when (_options.Salvage)
        {
            for (int at = 0; at < data.Length; at += 512)
            {
                Memory<byte> sector = data.Slice(at, Math.Min(512, data.Length - at));
                try
                {
                    await source.ReadAsync(offset + at, sector, cancellation).ConfigureAwait(false);
                }
                catch (BlockException error)
                {
                    _options.Unreadable?.Invoke(offset + at, error);
                    sector.Span.Clear();
                }
            }
        }
    }

    private async ValueTask WriteCompressedAsync(long offset, Memory<byte> data, CancellationToken cancellation)
    {
        int cluster = Math.Max(_target.ClusterSize, 512);
        for (int at = 0; at < data.Length; at += cluster)
        {
            Memory<byte> part = data.Slice(at, Math.Min(cluster, data.Length - at));
            if (!part.Span.ContainsAnyExcept((byte)0) && _options.SparseBytes > 0)
                await ZeroAsync(offset + at, part.Length, cancellation).ConfigureAwait(false);
            else
                await _target.WriteAsync(offset + at, part, WriteFlags.Compressed, cancellation).ConfigureAwait(false);
        }
    }

    private ValueTask ZeroAsync(long offset, long length, CancellationToken cancellation)
    {
        return _options.TargetIsZero && _options.SharedBacking is null ? default : _target.WriteZeroesAsync(offset, length, ZeroFlags.MayUnmap, cancellation);
    }

    private readonly record struct Piece(long Offset, long Length, bool Skip, bool Zero, BlockNode From);
}

/// <summary>Splits a buffer into runs of zeros and of data.</summary>
internal static class ZeroScan
{
    /// <summary>Length of the first run, in units of <paramref name="unit"/> bytes but for the end; units count as zero when all of their bytes are.</summary>
    public static int Run(ReadOnlySpan<byte> data, int unit, out bool zero)
    {
        if (unit <= 0)
        {
            zero = false;
            return data.Length;
        }
        int first = data.IndexOfAnyExcept((byte)0);
        if (first < 0)
        {
            zero = true;
            return data.Length;
        }
        int zeros = first / unit * unit;
        if (zeros > 0)
        {
            zero = true;
            return zeros;
        }
        zero = false;
        int at = unit;
        while (at < data.Length)
        {
            int length = Math.Min(unit, data.Length - at);
            if (!data.Slice(at, length).ContainsAnyExcept((byte)0))
                return at;
            at += length;
        }
        return data.Length;
    }
}

/// <summary>Holds a stream of bytes down to a rate.</summary>
internal sealed class RateLimit(long bytesPerSecond)
{
    private readonly Lock _lock = new();
    private readonly long _start = System.Diagnostics.Stopwatch.GetTimestamp();
    private double _promised;

    public async ValueTask WaitAsync(long bytes, CancellationToken cancellation)
    {
        if (bytesPerSecond <= 0)
            return;
        TimeSpan wait;
        lock (_lock)
        {
            double now = System.Diagnostics.Stopwatch.GetElapsedTime(_start).TotalSeconds;
            _promised = Math.Max(_promised, now) + ((double)bytes / bytesPerSecond);
            wait = TimeSpan.FromSeconds(_promised - now - ((double)bytes / bytesPerSecond));
        }
        if (wait > TimeSpan.Zero)
            await Task.Delay(wait, cancellation).ConfigureAwait(false);
    }
}
