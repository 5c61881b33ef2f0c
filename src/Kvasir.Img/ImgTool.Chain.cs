using System;
using System.Diagnostics;
using System.Globalization;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Jobs;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>commit, rebase, bench.</summary>
public sealed partial class ImgTool
{
    private async Task<int> CommitAsync(string[] args)
    {
        CommandLine line = new(args, "f:ht:b:dpqr:", "help", "object=", "image-opts");
        AddObjects(line);
        string name = One(line);
        CacheMode cache = ParseCache(line.Value("t"), CacheMode.Writeback);
        string baseName;
        string? baseFormat;
        long length;
        await using (BlockNode look = await OpenAsync(name, line.Value("f"), line.Has("image-opts")).ConfigureAwait(false))
        {
            BlockNode? below = look.Backing;
            BlockNode above = look;
            if (line.Value("b") is string wanted)
            {
                while (below is not null && below.FileName != wanted && Image.ResolveBacking(look.FileName, wanted) != below.FileName)
                    (above, below) = (below, below.Backing);
                if (below is null)
                    throw new BlockException($"Did not find '{wanted}' in the backing chain of '{name}'");
            }
            if (below is null)
                throw new BlockException("Image does not have a backing file");
            baseName = below.FileName;
            baseFormat = (above as Qcow2Image)?.BackingFormat;
            length = look.Length;
        }
        long rate = line.Value("r") is string r ? ParseSize(r, "rate limit") : 0;
        ProgressLine progress = Progress(line.Has("p") && !line.Has("q"));
        // The base is opened for writing on its own; the chain above it is read without locks, as one of its members is that base.
        await using (BlockNode target = await OpenAsync(baseName, baseFormat, imageOptions: false, write: true, cache: cache).ConfigureAwait(false))
        await using (BlockNode top = await OpenAsync(name, line.Value("f"), line.Has("image-opts"), share: true).ConfigureAwait(false))
        {
            if (target.Length < length)
                await target.ResizeAsync(length).ConfigureAwait(false);
            BlockNode? stop = top.Backing;
            while (stop is not null && stop.FileName != baseName)
                stop = stop.Backing;
            await ImageCopy.RunAsync(top, target, new CopyOptions { SharedBacking = stop, BytesPerSecond = rate, Progress = line.Has("p") ? progress.Report : null }).ConfigureAwait(false);
            await target.FlushAsync().ConfigureAwait(false);
        }
        if (!line.Has("d") && line.Value("b") is null)
        {
            await using BlockNode emptied = await OpenAsync(name, line.Value("f"), line.Has("image-opts"), write: true, cache: cache).ConfigureAwait(false);
            if (emptied is Qcow2Image image)
                await image.MakeEmptyAsync().ConfigureAwait(false);
        }
        progress.End();
        if (!line.Has("q"))
            _out.WriteLine("Image committed.");
        return 0;
    }

    private async Task<int> RebaseAsync(string[] args)
    {
        CommandLine line = new(args, "hf:F:b:upt:T:qU", "help", "object=", "image-opts", "force-share");
        AddObjects(line);
        bool unsafely = line.Has("u");
        string name = One(line);
        if (line.Value("b") is not string wanted)
            throw new UsageException("Must specify backing file (-b) or use unsafe mode (-u)");
        string? backing = wanted.Length == 0 ? null : wanted;
        string? format = line.Value("F");
        if (format is not null && !Image.IsKnownDriver(format))
            throw new BlockException($"Invalid format name: '{format}'");
        CacheMode sourceCache = ParseSourceCache(line.Value("T"));
        await using BlockNode node = await OpenAsync(
            name, line.Value("f"), line.Has("image-opts"), write: true, cache: ParseCache(line.Value("t"), CacheMode.Writeback), noBacking: unsafely, noIo: unsafely).ConfigureAwait(false);
        if (node is not Qcow2Image image)
            throw new BlockException($"Could not change the backing file to '{wanted}': Operation not supported", BlockErrno.NotSupported);
        if (backing is not null && format is null)
            throw new BlockException($"Could not change the backing file to '{wanted}': backing format must be specified");
        if (!unsafely)
        {
            if (image.Backing is null && backing is null)
                return 0;
            BlockNode? fresh = backing is null
                ? null
                : await OpenNewBackingAsync(Image.ResolveBacking(image.FileName, backing), format, sourceCache).ConfigureAwait(false);
            try
            {
                ProgressLine progress = Progress(line.Has("p") && !line.Has("q"));
                await KeepContentAsync(image, fresh, progress).ConfigureAwait(false);
                await image.FlushAsync().ConfigureAwait(false);
                progress.End();
            }
            finally
            {
                if (fresh is not null)
                    await fresh.DisposeAsync().ConfigureAwait(false);
            }
        }
        await image.ChangeBackingNameAsync(backing, format).ConfigureAwait(false);
        return 0;
    }

    private async ValueTask<BlockNode> OpenNewBackingAsync(string name, string? format, CacheMode cache)
    {
        try
        {
            return await Image.OpenAsync(name, new OpenOptions { Format = format, Probe = true, Cache = cache, Secrets = Secrets, Credentials = _objects.Credentials, ThrottleGroups = _objects.ThrottleGroups }).ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            throw new BlockException($"Could not open new backing file '{name}': {error.Message}", error.Errno);
        }
    }

    /// <summary>Copies into an overlay what its new backing file would show differently.</summary>
    private static async ValueTask KeepContentAsync(Qcow2Image image, BlockNode? fresh, ProgressLine progress)
    {
        using AlignedBuffer oldData = AlignedBuffer.Rent(2 << 20);
        using AlignedBuffer newData = AlignedBuffer.Rent(2 << 20);
        for (long offset = 0; offset < image.Length;)
        {
            BlockStatus status = await image.StatusAsync(offset, image.Length - offset).ConfigureAwait(false);
            long run = status.Length;
            if (!status.IsAllocated)
            {
                run = Math.Min(run, 2 << 20);
                Memory<byte> x = oldData.Memory[..(int)run];
                Memory<byte> y = newData.Memory[..(int)run];
                await image.ReadAsync(offset, x).ConfigureAwait(false);
                y.Span.Clear();
                if (fresh is not null && offset < fresh.Length)
                    await fresh.ReadAsync(offset, y[..(int)Math.Min(run, fresh.Length - offset)]).ConfigureAwait(false);
                for (int at = 0; at < run;)
                {
                    int part = (int)Math.Min(image.SubclusterSize - ((offset + at) & (image.SubclusterSize - 1)), run - at);
                    if (!x.Span.Slice(at, part).SequenceEqual(y.Span.Slice(at, part)))
                    {
                        if (x.Span.Slice(at, part).ContainsAnyExcept((byte)0))
                            await image.WriteAsync(offset + at, x.Slice(at, part)).ConfigureAwait(false);
                        else
                            await ForceZeroAsync(image, offset + at, x.Slice(at, part)).ConfigureAwait(false);
                    }
                    at += part;
                }
            }
            offset += run;
            progress.Report(offset, image.Length);
        }
    }

    // Without an old backing file the range reads as zeros already, and a zero write would be skipped as needless.
    private static ValueTask ForceZeroAsync(Qcow2Image image, long offset, ReadOnlyMemory<byte> zeros) =>
        image.Backing is null ? image.WriteAsync(offset, zeros) : image.WriteZeroesAsync(offset, zeros.Length, ZeroFlags.MayUnmap);

    private async Task<int> BenchAsync(string[] args)
    {
        CommandLine line = new(args, "hc:d:f:ni:o:qs:S:t:wU", "help", "flush-interval=", "pattern=", "no-drain", "image-opts", "force-share", "object=");
        AddObjects(line);
        bool write = line.Has("w");
        if (line.Value("i") is not (null or "native" or "threads" or "io_uring"))
            throw new BlockException($"Invalid aio option: {line.Value("i")}");
        int count = Number(line, "c", 75000, "request count");
        int depth = Number(line, "d", 64, "queue depth");
        if (depth == 0)
            throw new BlockException("Invalid queue depth specified");
        long size = line.Value("s") is string s ? ParseSize(s, "buffer size") : 4096;
        long offset = line.Value("o") is string o ? ParseSize(o, "offset") : 0;
        long step = line.Value("S") is string st ? ParseSize(st, "step_size") : size;
        int flush = Number(line, "flush-interval", 0, "flush interval");
        int pattern = Number(line, "pattern", 0, "pattern byte");
        if (pattern > 255)
            throw new BlockException("Invalid pattern byte specified");
        if (flush > 0 && !write)
            throw new BlockException("--flush-interval is only available in write tests");
        if (flush > 0 && flush < depth)
            throw new BlockException("Flush interval can't be smaller than depth");
        if (size is <= 0 or > 1 << 30)
            throw new BlockException("Invalid buffer size specified");
        CacheMode cache = line.Has("n") ? CacheMode.None : ParseCache(line.Value("t"), CacheMode.Writeback);
        await using BlockNode node = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), write: write, cache: cache, share: line.Has("U") || line.Has("force-share"), threads: line.Value("i") == "threads").ConfigureAwait(false);
        // Quiet or not, as with qemu-img: what bench measures is what it is run for.
        _out.WriteLine($"Sending {count} {(write ? "write" : "read")} requests, {size} bytes each, {depth} in parallel (starting at offset {offset}, step size {step})");
        if (flush > 0)
            _out.WriteLine($"Sending flush every {flush} {(line.Has("no-drain") ? string.Empty : "drained ")}requests");
        long start = Stopwatch.GetTimestamp();
        await BenchRun.RunAsync(node, write, count, depth, offset, (int)size, step, flush, (byte)pattern).ConfigureAwait(false);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        _out.WriteLine(string.Create(CultureInfo.InvariantCulture, $"Run completed in {seconds:F3} seconds."));
        return 0;
    }

    private static int Number(CommandLine line, string option, int fallback, string what) => line.Value(option) is not string text
        ? fallback
        : int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int value) ? value : throw new BlockException($"Invalid {what} specified");
}

/// <summary>The requests of `bench`: so many lanes, each with one request at a time.</summary>
internal sealed class BenchRun
{
    private readonly BlockNode _node;
    private readonly bool _write;
    private readonly int _count;
    private readonly long _offset;
    private readonly long _step;
    private readonly int _flush;
    private int _next = -1;

    private BenchRun(BlockNode node, bool write, int count, long offset, long step, int flush)
    {
        _node = node;
        _write = write;
        _count = count;
        _offset = offset;
        _step = step;
        _flush = flush;
    }

    public static Task RunAsync(BlockNode node, bool write, int count, int depth, long offset, int size, long step, int flush, byte pattern)
    {
        BenchRun run = new(node, write, count, offset, step, flush);
        Task[] lanes = new Task[Math.Min(depth, count)];
        for (int i = 0; i < lanes.Length; i++)
            lanes[i] = run.LaneAsync(size, pattern);
        return Task.WhenAll(lanes);
    }

    private async Task LaneAsync(int size, byte pattern)
    {
        using AlignedBuffer buffer = AlignedBuffer.Rent(size);
        Memory<byte> data = buffer.Memory[..size];
        data.Span.Fill(pattern);
        while (true)
        {
            int index = Interlocked.Increment(ref _next);
            if (index >= _count)
                return;
            long room = Math.Max(1, _node.Length - size);
            // As qemu-img does it: the first request goes where it is told, those after it come round again.
            long at = index == 0 && _node.Length > size ? _offset : (_offset + (index * _step)) % room;
            if (_write)
                await _node.WriteAsync(at, data).ConfigureAwait(false);
            else
                await _node.ReadAsync(at, data).ConfigureAwait(false);
            if (_flush > 0 && (index + 1) % _flush == 0)
                await _node.FlushAsync().ConfigureAwait(false);
        }
    }
}
