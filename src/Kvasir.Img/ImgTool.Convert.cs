using System;
using System.Collections.Generic;
using System.Globalization;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Formats;
using Kvasir.Block.Crypto;
using Kvasir.Block.Jobs;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>convert, compare, dd.</summary>
public sealed partial class ImgTool
{
    private async Task<int> ConvertAsync(string[] args)
    {
        CommandLine line = new(
            args, "hf:O:B:Cco:l:S:pt:T:qnm:WUr:F:", "help", "object=", "source-image-opts", "image-opts", "target-image-opts", "force-share", "salvage", "target-is-zero", "bitmaps", "skip-broken-bitmaps");
        AddObjects(line);
        string format = line.Value("O") ?? "raw";
        if (AsksForHelp(line))
            return ListOptions(format, line.Operands.Count >= 2);
        if (line.Operands.Count < 2)
            throw new BlockException("Must specify image file name");
        bool compressed = line.Has("c");
        bool noCreate = line.Has("n");
        long sparse = line.Value("S") is string s ? ParseSize(s, "buffer size for sparse output") : 4096;
        if (sparse is < 0 or > 16 << 20 || sparse % 512 != 0)
            throw new BlockException("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. Select 0 to disable sparse detection (fully allocates output).");
        int workers = line.Value("m") is string m && int.TryParse(m, NumberStyles.None, CultureInfo.InvariantCulture, out int count) && count is >= 1 and <= 16
            ? count
            : line.Has("m") ? throw new BlockException("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16") : 8;
        if (line.Has("target-is-zero") && !noCreate)
            throw new BlockException("--target-is-zero requires use of -n flag");
        if (line.Has("target-image-opts") && !noCreate)
            throw new BlockException("--target-image-opts requires use of -n flag");
        CheckConvertOptions(line, noCreate, compressed);
        long rate = line.Value("r") is string r ? ParseSize(r, "rate limit") : 0;
        CacheMode cache = ParseCache(line.Value("t"), CacheMode.Unsafe);
        CacheMode sourceCache = ParseSourceCache(line.Value("T"));
        string targetName = line.Operands[^1];
        bool share = line.Has("U") || line.Has("force-share");
        List<BlockNode> sources = [];
        try
        {
            for (int i = 0; i < line.Operands.Count - 1; i++)
                sources.Add(await OpenAsync(line.Operands[i], line.Value("f"), line.Has("image-opts") || line.Has("source-image-opts"), cache: sourceCache, share: share).ConfigureAwait(false));
            BlockNode source = sources.Count == 1 ? sources[0] : new ConcatNode(sources);
            if (line.Value("l") is string snapshot)
                source = await SnapshotView.OpenAsync(source, snapshot).ConfigureAwait(false);
            ImageOptions options = CreationOptions(line);
            string? backing = line.Value("B") ?? options["backing_file"];
            if (backing is not null)
                options["backing_file"] = backing;
            if ((line.Value("F") ?? options["backing_fmt"]) is string backingFormat)
                options["backing_fmt"] = backingFormat;
            if (backing is not null && !ImageCreator.TakesBacking(format))
                throw new BlockException($"Backing file not supported for file format '{format}'");
            if (backing is not null && options["backing_fmt"] is null)
                throw new BlockException("Use of backing file requires explicit backing format");
            if (line.Has("bitmaps") && sources[0] is not Qcow2Image)
                throw new BlockException("Source lacks bitmap support");
            if (line.Has("bitmaps") && format != "qcow2" && !noCreate)
                throw new BlockException($"Format driver '{format}' does not support bitmaps");
            if (compressed && format is not ("qcow2" or "vmdk"))
                throw new BlockException("Compression not supported for this file format");
            if (!noCreate)
                ImageCreator.CheckOptions(format, options);
            // The disk is as large as what is copied, whatever -o says.
            options["size"] = null;
            BlockNode target = noCreate
                ? await OpenAsync(targetName, line.Has("O") && !line.Has("target-image-opts") ? format : line.Has("target-image-opts") ? null : format, line.Has("target-image-opts"), write: true, cache: cache).ConfigureAwait(false)
                : await CreateTargetAsync(format, targetName, source.Length, options, cache).ConfigureAwait(false);
            try
            {
                // A VMDK that does not hold compressed grains gets them as they are.
                if (compressed && target is not (Qcow2Image or VmdkImage))
                    throw new BlockException("Compression not supported for this file format");
                if (noCreate && target.Length < source.Length)
                    throw new BlockException("output file is smaller than input file");
                BlockNode? shared = null;
                if (backing is not null)
                {
                    await Image.AttachBackingAsync(target, backing, options["backing_fmt"], new OpenOptions { Secrets = Secrets }).ConfigureAwait(false);
                    shared = source.Backing;
                }
                ProgressLine progress = Progress(line.Has("p") && !line.Has("q"));
                await ImageCopy.RunAsync(source, target, new CopyOptions
                {
                    Workers = workers,
                    SparseBytes = (int)sparse,
                    Compressed = compressed && target is not VmdkImage { IsCompressed: false },
                    TargetIsZero = backing is null && (line.Has("target-is-zero") || (!noCreate && target is not LuksImage && target.IsZeroWhenCreated && options["preallocation"] is null or "off" or "metadata")),
                    SharedBacking = shared,
                    Salvage = line.Has("salvage"),
                    Offload = line.Has("C"),
                    BytesPerSecond = rate,
                    Progress = line.Has("p") ? progress.Report : null,
                    Unreadable = (at, error) => _error.WriteLine($"{_program}: warning: error while reading offset {at}: {error.Message}"),
                }).ConfigureAwait(false);
                if (line.Has("bitmaps"))
                    await CopyBitmapsAsync(sources[0], target, line.Has("skip-broken-bitmaps")).ConfigureAwait(false);
                if (cache != CacheMode.Unsafe)
                    await target.FlushAsync().ConfigureAwait(false);
                progress.End();
            }
            finally
            {
                await target.DisposeAsync().ConfigureAwait(false);
            }
            return 0;
        }
        finally
        {
            foreach (BlockNode node in sources)
                await node.DisposeAsync().ConfigureAwait(false);
        }
    }

    private static void CheckConvertOptions(CommandLine line, bool noCreate, bool compressed)
    {
        if (line.Has("skip-broken-bitmaps") && !line.Has("bitmaps"))
            throw new BlockException("Use of --skip-broken-bitmaps requires --bitmaps");
        if (noCreate && line.Has("o"))
            throw new BlockException("-o has no effect when skipping image creation");
        if (compressed && ImageCreator.ParsePreallocation(CreationOptions(line)["preallocation"]) != Preallocation.Off)
            throw new BlockException("Compression and preallocation not supported at the same time");
        if (!line.Has("C"))
            return;
        if (line.Has("S"))
            throw new BlockException("Cannot enable copy offloading when -S is used");
        if (compressed)
            throw new BlockException("Cannot enable copy offloading when -c is used");
        if (line.Has("salvage"))
            throw new BlockException("Cannot use copy offloading in salvaging mode");
    }

    private async ValueTask<BlockNode> CreateTargetAsync(string format, string name, long size, ImageOptions options, CacheMode cache)
    {
        try
        {
            if (options["backing_fmt"] is not null && options["backing_file"] is null)
                throw new BlockException("Backing format cannot be used without backing file");
            return await ImageCreator.CreateAsync(format, name, size, options, Secrets, cache).ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            throw new BlockException($"{name}: error while converting {format}: {error.Message}", error.Errno);
        }
    }

    private async ValueTask CopyBitmapsAsync(BlockNode source, BlockNode target, bool skipBroken)
    {
        if (source is not Qcow2Image from || target is not Qcow2Image to)
            throw new BlockException("Format driver does not support bitmaps: both images must be qcow2");
        foreach (Qcow2BitmapInfo bitmap in await Qcow2Bitmaps.ListAsync(from).ConfigureAwait(false))
        {
            if (bitmap.InUse && skipBroken)
            {
                _error.WriteLine($"{_program}: warning: Skipping inconsistent bitmap '{bitmap.Name}'");
                continue;
            }
            if (bitmap.InUse)
                throw new BlockException($"Cannot copy inconsistent bitmap '{bitmap.Name}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove'");
            byte[] bits = await Qcow2Bitmaps.ReadBitsAsync(from, bitmap).ConfigureAwait(false);
            await Qcow2Bitmaps.AddAsync(to, bitmap.Name, bitmap.GranularityBits, bitmap.Auto).ConfigureAwait(false);
            await Qcow2Bitmaps.WriteBitsAsync(to, bitmap.Name, bits).ConfigureAwait(false);
        }
    }

    private async Task<int> CompareAsync(string[] args)
    {
        const int Different = 1;
        const int Trouble = 2;
        const int OpenTrouble = 3;
        CommandLine line = new(args, "hf:F:T:pqsU", "help", "object=", "image-opts", "force-share");
        AddObjects(line);
        if (line.Operands.Count != 2)
            throw new UsageException("Expecting two image file names");
        bool quiet = line.Has("q");
        bool share = line.Has("U") || line.Has("force-share");
        CacheMode cache;
        try
        {
            cache = ParseSourceCache(line.Value("T"));
        }
        catch (BlockException error)
        {
            _ = Fail(error.Message);
            return Trouble;
        }
        List<BlockNode> images = [];
        try
        {
            try
            {
                images.Add(await OpenAsync(line.Operands[0], line.Value("f"), line.Has("image-opts"), cache: cache, share: share).ConfigureAwait(false));
                images.Add(await OpenAsync(line.Operands[1], line.Value("F"), line.Has("image-opts"), cache: cache, share: share).ConfigureAwait(false));
            }
            catch (BlockException error)
            {
                _ = Fail(error.Message);
                return Trouble;
            }
            BlockNode a = images[0];
            BlockNode b = images[1];
            if (line.Has("s") && a.Length != b.Length)
                return Say("Strict mode: Image size mismatch!", Different);
            try
            {
                long shorter = Math.Min(a.Length, b.Length);
                ProgressLine progress = Progress(line.Has("p") && !quiet);
                long? mismatch = await FindDifferenceAsync(a, b, shorter, line.Has("s"), progress).ConfigureAwait(false);
                if (mismatch is long at)
                    return Say(at < 0 ? $"Strict mode: Offset {-at - 1} block status mismatch!" : $"Content mismatch at offset {at}!", Different);
                if (a.Length != b.Length)
                {
                    if (!quiet)
                        _out.WriteLine("Warning: Image size mismatch!");
                    BlockNode longer = a.Length > b.Length ? a : b;
                    if (await FindDataAsync(longer, shorter).ConfigureAwait(false) is long data)
                        return Say($"Content mismatch at offset {data}!", Different);
                }
                return Say("Images are identical.", 0);
            }
            catch (BlockException error)
            {
                _ = Fail(error.Message);
                return OpenTrouble;
            }
        }
        finally
        {
            foreach (BlockNode image in images)
                await image.DisposeAsync().ConfigureAwait(false);
        }

        int Say(string text, int code)
        {
            if (!quiet)
                _out.WriteLine(text);
            return code;
        }
    }

    private static async ValueTask<long?> FindDifferenceAsync(BlockNode a, BlockNode b, long length, bool strict, ProgressLine progress)
    {
        using AlignedBuffer first = AlignedBuffer.Rent(2 << 20);
        using AlignedBuffer second = AlignedBuffer.Rent(2 << 20);
        for (long offset = 0; offset < length;)
        {
            ChainExtent left = await ChainStatus.AtAsync(a, offset, length - offset).ConfigureAwait(false);
            ChainExtent right = await ChainStatus.AtAsync(b, offset, length - offset).ConfigureAwait(false);
            long run = Math.Min(left.Length, right.Length);
            if (strict && (left.Flags & BlockFlags.Allocated) != (right.Flags & BlockFlags.Allocated))
                return -offset - 1;
            bool leftZero = (left.Flags & BlockFlags.Zero) != 0;
            bool rightZero = (right.Flags & BlockFlags.Zero) != 0;
            if (!(leftZero && rightZero))
            {
                run = Math.Min(run, 2 << 20);
                Memory<byte> x = first.Memory[..(int)run];
                Memory<byte> y = second.Memory[..(int)run];
                await a.ReadAsync(offset, x).ConfigureAwait(false);
                await b.ReadAsync(offset, y).ConfigureAwait(false);
                int same = x.Span.CommonPrefixLength(y.Span);
                if (same < run)
                    return (offset + same) / 512 * 512;
            }
            offset += run;
            progress.Report(offset, length);
        }
        progress.End();
        return null;
    }

    /// <summary>The first byte of data from an offset on; null: only zeros.</summary>
    private static async ValueTask<long?> FindDataAsync(BlockNode node, long offset)
    {
        using AlignedBuffer buffer = AlignedBuffer.Rent(2 << 20);
        while (offset < node.Length)
        {
            ChainExtent extent = await ChainStatus.AtAsync(node, offset, node.Length - offset).ConfigureAwait(false);
            long run = extent.Length;
            if ((extent.Flags & BlockFlags.Zero) == 0)
            {
                run = Math.Min(run, 2 << 20);
                await node.ReadAsync(offset, buffer.Memory[..(int)run]).ConfigureAwait(false);
                int data = buffer.Memory.Span[..(int)run].IndexOfAnyExcept((byte)0);
                if (data >= 0)
                    return (offset + data) / 512 * 512;
            }
            offset += run;
        }
        return null;
    }

    private async Task<int> DdAsync(string[] args)
    {
        CommandLine line = new(args, "hf:O:U", "help", "object=", "image-opts", "force-share");
        AddObjects(line);
        ImageOptions words = new();
        foreach (string word in line.Operands)
        {
            int equals = word.IndexOf('=', StringComparison.Ordinal);
            if (equals <= 0 || word[..equals] is not ("bs" or "count" or "if" or "of" or "skip"))
                throw new BlockException($"unrecognized operand {(equals > 0 ? word[..equals] : word)}");
            words[word[..equals]] = word[(equals + 1)..];
        }
        if (words["if"] is not string input || words["of"] is not string output)
            throw new BlockException("Must specify both input and output files");
        long block = words["bs"] is string bs ? ParseSize(bs, "bs") : 512;
        if (block is <= 0 or > int.MaxValue)
            throw new BlockException($"Invalid bs specified. Must be between 1 and {int.MaxValue}.");
        string format = line.Value("O") ?? "raw";
        await using BlockNode source = await OpenAsync(input, line.Value("f"), line.Has("image-opts"), share: line.Has("U") || line.Has("force-share")).ConfigureAwait(false);
        long skip = words["skip"] is string sk ? checked(ParseSize(sk, "skip") * block) : 0;
        long size = source.Length;
        // As in qemu-img 7.2, count says where to stop, blocks that are skipped included.
        if (words["count"] is string c && ParseSize(c, "count") is long blocks && blocks <= size / block)
            size = Math.Min(size, blocks * block);
        long copy = Math.Max(0, size - skip);
        if (skip > source.Length)
            _error.WriteLine($"{_program}: {input}: cannot skip to specified offset");
        BlockNode target = await ImageCreator.CreateAsync(format, output, copy, new ImageOptions(), Secrets).ConfigureAwait(false);
        await using (target.ConfigureAwait(false))
        {
            using AlignedBuffer buffer = AlignedBuffer.Rent((int)Math.Min(block, 2 << 20));
            int part = (int)Math.Min(Math.Max(block, 65536), Math.Min(buffer.Memory.Length, 2 << 20));
            for (long at = 0; at < copy;)
            {
                Memory<byte> data = buffer.Memory[..(int)Math.Min(part, copy - at)];
                await source.ReadAsync(skip + at, data).ConfigureAwait(false);
                await target.WriteAsync(at, data).ConfigureAwait(false);
                at += data.Length;
            }
            await target.FlushAsync().ConfigureAwait(false);
        }
        return 0;
    }
}
