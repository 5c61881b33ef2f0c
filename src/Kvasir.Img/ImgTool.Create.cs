using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Crypto;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>create, measure, resize, bitmap.</summary>
public sealed partial class ImgTool
{
    private static ImageOptions CreationOptions(CommandLine line, string option = "o")
    {
        ImageOptions options = new();
        foreach (string list in line.Values(option))
        {
            foreach ((string key, string value) in ImageOptions.ParseList(list).Values)
                options[key] = value;
        }
        return options;
    }

    private static bool AsksForHelp(CommandLine line)
    {
        foreach (string list in line.Values("o"))
        {
            if (list is "help" or "?")
                return true;
        }
        return false;
    }

    private int ListOptions(string format, bool named)
    {
        _out.WriteLine(named ? "Supported options:" : $"Supported {format} options:");
        WriteOptions(ImageCreator.OptionsOf(format), named);
        if (!named && format != "raw")
            _out.WriteLine("\nThe protocol level may support further options.\nSpecify the target filename to include those options.");
        return 0;
    }

    private void WriteOptions(IEnumerable<(string Name, string Type, string Meaning)> options, bool named)
    {
        foreach ((string name, string type, string meaning) in options)
        {
            // Options of the file below, which only a file name calls for.
            if (named || name is not ("extent_size_hint" or "nocow"))
                _out.WriteLine($"  {$"{name}=<{type}>",-22} - {meaning}");
        }
    }

    private async Task<int> CreateAsync(string[] args)
    {
        CommandLine line = new(args, "F:b:f:ho:qu", "help", "object=");
        AddObjects(line);
        string format = line.Value("f") ?? "raw";
        if (AsksForHelp(line))
            return ListOptions(format, line.Operands.Count > 0);
        if (line.Operands.Count is 0 or > 2)
            throw new UsageException(line.Operands.Count == 0 ? "Expecting image file name" : $"Unexpected argument: {line.Operands[2]}");
        string name = line.Operands[0];
        long? size = line.Operands.Count == 2 ? ParseSize(line.Operands[1], "image size") : null;
        try
        {
            ImageOptions options = CreationOptions(line);
            _ = ImageCreator.OptionsOf(format);
            ImageCreator.CheckPlace(name);
            if (size is not null && options["size"] is not null)
                throw new BlockException("The image size must be specified only once");
            size ??= options.Size("size");
            options["size"] = null;
            if (line.Value("b") is string backing)
                options["backing_file"] = backing;
            if (line.Value("F") is string backingFormat)
                options["backing_fmt"] = backingFormat;
            if (options["backing_file"] is not null && !ImageCreator.TakesBacking(format))
                throw new BlockException($"Backing file not supported for file format '{format}'");
            ImageCreator.CheckOptions(format, options);
            if (options["backing_file"] is string below)
                size = await CheckBackingAsync(name, below, options["backing_fmt"], line.Has("u"), size).ConfigureAwait(false);
            if (size is null)
                throw new BlockException("Image creation needs a size parameter");
            if (!line.Has("q"))
                _out.WriteLine(Describe(format, name, size.Value, options));
            if (options["backing_fmt"] is not null && options["backing_file"] is null)
                throw new BlockException("Backing format cannot be used without backing file");
            BlockNode created = await ImageCreator.CreateAsync(format, name, size.Value, options, Secrets).ConfigureAwait(false);
            await created.DisposeAsync().ConfigureAwait(false);
            return 0;
        }
        catch (BlockException error)
        {
            return Fail($"{name}: {error.Message}");
        }
    }

    /// <summary>Looks at the backing file of an image to be made; the result is the image's size.</summary>
    private async ValueTask<long?> CheckBackingAsync(string name, string backing, string? format, bool unseen, long? size)
    {
        if (backing == name)
            throw new BlockException("Error: Trying to create an image with the same filename as the backing file");
        if (unseen)
            return format is not null ? size : throw new BlockException("Backing file specified without backing format");
        if (format is not null && !Image.IsKnownDriver(format))
            throw new BlockException($"Unknown driver '{format}'\nCould not open backing image.");
        BlockNode image;
        try
        {
            image = await Image.OpenAsync(Image.ResolveBacking(name, backing), new OpenOptions { Format = format, Probe = true, Secrets = Secrets, NoIo = true }).ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            throw new BlockException($"{error.Message}\nCould not open backing image.", error.Errno);
        }
        await using (image.ConfigureAwait(false))
        {
            if (format is null)
                throw new BlockException($"Backing file specified without backing format\nDetected format of {image.Driver}.");
            return size ?? image.Length;
        }
    }

    private static string Describe(string format, string name, long size, ImageOptions options)
    {
        StringBuilder text = new($"Formatting '{name}', fmt={format}");
        SortedDictionary<string, string> shown = new(StringComparer.Ordinal);
        foreach ((string key, string value) in options.Values)
            shown[key] = value;
        List<string> order = ["size"];
        switch (format)
        {
            case "qcow2":
                shown.TryAdd("cluster_size", "65536");
                shown.TryAdd("extended_l2", "off");
                shown.TryAdd("compression_type", "zlib");
                shown.TryAdd("lazy_refcounts", "off");
                shown.TryAdd("refcount_bits", "16");
                order = ["encryption", "encrypt.format", "encrypt.key-secret", "encrypt.iter-time", "cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat", "backing_file", "backing_fmt", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits"];
                break;
            case "vmdk":
                shown.TryAdd("compat6", "off");
                shown.TryAdd("hwversion", "undefined");
                order = ["size", "adapter_type", "backing_file", "backing_fmt", "compat6", "hwversion"];
                break;
            case "vdi":
                shown.TryAdd("static", "off");
                break;
            case "vhdx":
                shown.TryAdd("log_size", "1048576");
                shown.TryAdd("block_size", "0");
                order = ["size", "log_size", "block_size"];
                break;
            case "luks":
                order = ["size", "key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"];
                break;
            default:
                break;
        }
        foreach (string key in new[] { "cluster_size", "log_size", "block_size" })
        {
            if (shown.TryGetValue(key, out string? written))
                shown[key] = ImageOptions.ParseSize(written, key).ToString(CultureInfo.InvariantCulture);
        }
        shown["size"] = size.ToString(CultureInfo.InvariantCulture);
        foreach (string key in order)
        {
            if (shown.Remove(key, out string? value))
                text.Append(CultureInfo.InvariantCulture, $" {key}={value}");
        }
        foreach ((string key, string value) in shown)
            text.Append(CultureInfo.InvariantCulture, $" {key}={value}");
        return text.ToString();
    }

    private async Task<int> MeasureAsync(string[] args)
    {
        CommandLine line = new(args, "hf:l:o:O:U", "help", "image-opts", "object=", "output=", "size=", "force-share");
        AddObjects(line);
        bool json = Json(line);
        string format = line.Value("O") ?? "raw";
        if (AsksForHelp(line))
            return ListOptions(format, line.Operands.Count > 0);
        if (line.Value("size") is null && line.Operands.Count != 1)
            throw new BlockException("Either --size N or one filename must be specified.");
        ImageCreator.CheckOptions(format, CreationOptions(line));
        if (format is not ("raw" or "qcow2" or "luks"))
            throw new BlockException($"Block driver '{format}' does not support size measurement");
        ImageOptions options = CreationOptions(line);
        long size;
        long data;
        long? bitmaps = null;
        if (line.Value("size") is string text)
        {
            if (line.Operands.Count > 0)
                throw new BlockException("--size N cannot be used together with a filename.");
            size = ParseSize(text, "image size");
            if (size > long.MaxValue - (1 << 30))
                throw new BlockException("The image size is too large");
            data = 0;
        }
        else
        {
            await using BlockNode source = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), share: line.Has("U") || line.Has("force-share")).ConfigureAwait(false);
            BlockNode seen = line.Value("l") is string snapshot ? await SnapshotView.OpenAsync(source, snapshot).ConfigureAwait(false) : source;
            size = seen.Length;
            int cluster = format == "qcow2" ? ImageCreator.Qcow2Options(size, options, Secrets).ClusterSize : 1;
            data = await DataBytesAsync(seen, cluster).ConfigureAwait(false);
            // How much a backing file would share is not known: nothing, at worst.
            if (options["backing_file"] is not null)
                data = (size + cluster - 1) / cluster * cluster;
            if (format == "qcow2" && source is Qcow2Image { Version: >= 3 } image && options["compat"] is not ("0.10" or "v2"))
                bitmaps = await Qcow2Bitmaps.MeasureAsync(image, cluster).ConfigureAwait(false);
        }
        (long required, long full) = format switch
        {
            "qcow2" => Qcow2Creator.Measure(ImageCreator.Qcow2Options((size + 511) & ~511L, options, Secrets), data),
            "luks" => (size + LuksHeader.HeaderBytes(ImageCreator.LuksOptions(options, string.Empty, Secrets)), size + LuksHeader.HeaderBytes(ImageCreator.LuksOptions(options, string.Empty, Secrets))),
            _ => ((size + 511) & ~511L, (size + 511) & ~511L),
        };
        if (json)
        {
            _out.WriteLine("{");
            if (bitmaps is long own)
                _out.WriteLine($"    \"bitmaps\": {own},");
            _out.WriteLine($"    \"required\": {required},");
            _out.WriteLine($"    \"fully-allocated\": {full}");
            _out.WriteLine("}");
            return 0;
        }
        _out.WriteLine($"required size: {required}");
        _out.WriteLine($"fully allocated size: {full}");
        if (bitmaps is long bytes)
            _out.WriteLine($"bitmaps size: {bytes}");
        return 0;
    }

    private static async ValueTask<long> DataBytesAsync(BlockNode source, int cluster)
    {
        long data = 0;
        long counted = 0;
        for (long offset = 0; offset < source.Length;)
        {
            ChainExtent extent = await ChainStatus.AtAsync(source, offset, source.Length - offset).ConfigureAwait(false);
            if ((extent.Flags & BlockFlags.Data) != 0 && (extent.Flags & BlockFlags.Zero) == 0)
            {
                long start = Math.Max(counted, offset / cluster * cluster);
                long end = (offset + extent.Length + cluster - 1) / cluster * cluster;
                data += Math.Max(0, end - start);
                counted = Math.Max(counted, end);
            }
            offset += extent.Length;
        }
        return data;
    }

    private async Task<int> ResizeAsync(string[] args)
    {
        // "-5M" is a size here, not an option: the last word is taken off first.
        if (args.Length == 0)
            throw new UsageException("Not enough arguments");
        string change = args[^1];
        if (args.Length < 2)
            throw new UsageException("Not enough arguments");
        CommandLine line = new(args.AsSpan(0, args.Length - 1), "f:hq", "help", "object=", "image-opts", "preallocation=", "shrink");
        AddObjects(line);
        if (line.Operands.Count != 1)
            throw new UsageException("Expecting image file name and size");
        int sign = change.StartsWith('+') ? 1 : change.StartsWith('-') ? -1 : 0;
        long amount;
        try
        {
            amount = ImageOptions.ParseSize(sign == 0 ? change : change[1..], "size");
        }
        catch (BlockException error)
        {
            throw new BlockException("Parameter 'size' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.", error);
        }
        Preallocation preallocation = ImageCreator.ParsePreallocation(line.Value("preallocation"));
        await using BlockNode image = await OpenAsync(line.Operands[0], line.Value("f"), line.Has("image-opts"), write: true).ConfigureAwait(false);
        long old = image.Length;
        long size = sign switch { 1 => checked(old + amount), -1 => old - amount, _ => amount };
        if (size <= 0)
            throw new BlockException("New image size must be positive");
        size = (size + 511) & ~511L;
        if (size <= old && preallocation != Preallocation.Off)
            throw new BlockException("Preallocation can only be used for growing images");
        if (size < old && !line.Has("shrink"))
        {
            _error.WriteLine($"{_program}: Use the --shrink option to perform a shrink operation.");
            _error.WriteLine($"{_program}: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an operation, make sure there is no important data there.");
            return Failure;
        }
        await image.ResizeAsync(size, preallocation).ConfigureAwait(false);
        await image.FlushAsync().ConfigureAwait(false);
        if (!line.Has("q"))
            _out.WriteLine("Image resized.");
        return 0;
    }

    private async Task<int> BitmapAsync(string[] args)
    {
        CommandLine line = new(args, "b:f:F:g:h", "help", "object=", "image-opts", "add", "remove", "clear", "enable", "disable", "merge=");
        AddObjects(line);
        bool acts = false;
        foreach ((string action, _) in line.Options)
            acts |= action is "add" or "remove" or "clear" or "enable" or "disable" or "merge";
        if (!acts)
            throw new BlockException("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
        if (line.Has("g") && !line.Has("add"))
            throw new BlockException("granularity only supported with --add");
        if (line.Has("b") && !line.Has("merge"))
            throw new BlockException("Merge bitmap source file only supported with --merge");
        if (line.Has("F") && !line.Has("b"))
            throw new BlockException("-F only supported with -b");
        if (line.Operands.Count != 2)
            throw new BlockException("Expecting filename and bitmap name");
        string name = line.Operands[1];
        await using BlockNode node = await OpenAsync(line.Operands[0], line.Value("f"), line.Has("image-opts"), write: true, noBacking: true).ConfigureAwait(false);
        if (node is not Qcow2Image image)
            throw new BlockException($"Cannot store dirty bitmaps in file '{line.Operands[0]}': driver '{node.Driver}' has none");
        foreach ((string action, string? value) in line.Options)
        {
            try
            {
                await ActOnBitmapAsync(image, name, action, value, line).ConfigureAwait(false);
            }
            catch (BlockException error)
            {
                throw new BlockException($"Operation {action} on bitmap {name} failed: {error.Message}", error.Errno);
            }
        }
        return 0;
    }

    private ValueTask ActOnBitmapAsync(Qcow2Image image, string name, string action, string? value, CommandLine line)
    {
        switch (action)
        {
            case "add":
                long bytes = line.Value("g") is string text ? ParseSize(text, "granularity") : 65536;
                if (!long.IsPow2(bytes) || bytes is < 512 or > 1L << 31)
                    throw new BlockException("Granularity must be power of 2 and at least 512");
                return Qcow2Bitmaps.AddAsync(image, name, (int)long.Log2(bytes), enabled: !line.Has("disable"));
            case "remove":
                return Qcow2Bitmaps.RemoveAsync(image, name);
            case "clear":
                return Qcow2Bitmaps.ClearAsync(image, name);
            case "enable" or "disable":
                return Qcow2Bitmaps.EnableAsync(image, name, action == "enable");
            case "merge":
                return MergeAsync(image, name, value!, line.Value("b"), line.Value("F"));
            default:
                return default;
        }
    }

    private async ValueTask MergeAsync(Qcow2Image image, string name, string source, string? file, string? format)
    {
        if (file is null)
        {
            await Qcow2Bitmaps.MergeAsync(image, name, image, source).ConfigureAwait(false);
            return;
        }
        await using BlockNode other = await OpenAsync(file, format, imageOptions: false, noBacking: true).ConfigureAwait(false);
        await Qcow2Bitmaps.MergeAsync(image, name, other as Qcow2Image ?? throw new BlockException($"'{file}' has no bitmaps"), source).ConfigureAwait(false);
    }
}
