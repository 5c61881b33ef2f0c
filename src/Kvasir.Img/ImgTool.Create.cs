using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Crypto;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>create, measure, amend, resize, bitmap.</summary>
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

    private int ListOptions(string format)
    {
        _out.WriteLine("Supported options:");
        foreach ((string name, string type, string meaning) in ImageCreator.OptionsOf(format))
            _out.WriteLine($"  {$"{name}=<{type}>",-22} - {meaning}");
        return 0;
    }

    private async Task<int> CreateAsync(string[] args)
    {
        CommandLine line = new(args, "F:b:f:ho:qu", "help", "object=");
        AddObjects(line);
        string format = line.Value("f") ?? "raw";
        if (AsksForHelp(line))
            return ListOptions(format);
        if (line.Operands.Count is 0 or > 2)
            throw new UsageException(line.Operands.Count == 0 ? "Expecting image file name" : $"Unexpected argument: {line.Operands[2]}");
        string name = line.Operands[0];
        try
        {
            ImageOptions options = CreationOptions(line);
            if (line.Value("b") is string backing)
                options["backing_file"] = backing;
            if (line.Value("F") is string backingFormat)
                options["backing_fmt"] = backingFormat;
            long? size = line.Operands.Count == 2 ? ParseSize(line.Operands[1], "image size") : options.Size("size");
            options["size"] = null;
            if (options["backing_file"] is string below)
            {
                if (options["backing_fmt"] is null && !line.Has("u"))
                    throw new BlockException("Backing file specified without backing format");
                if (!line.Has("u"))
                {
                    await using BlockNode image = await Image.OpenAsync(Image.ResolveBacking(name, below), new OpenOptions { Format = options["backing_fmt"], Probe = true, Secrets = Secrets, NoIo = true })
                        .ConfigureAwait(false);
                    size ??= image.Length;
                }
            }
            if (size is null)
                throw new BlockException("Image creation needs a size parameter");
            if (!line.Has("q"))
                _out.WriteLine(Describe(format, name, size.Value, options));
            BlockNode created = await ImageCreator.CreateAsync(format, name, size.Value, options, Secrets).ConfigureAwait(false);
            await created.DisposeAsync().ConfigureAwait(false);
            return 0;
        }
        catch (BlockException error)
        {
            return Fail($"{name}: {error.Message}");
        }
    }

    private static string Describe(string format, string name, long size, ImageOptions options)
    {
        StringBuilder text = new($"Formatting '{name}', fmt={format}");
        SortedDictionary<string, string> shown = new(StringComparer.Ordinal);
        foreach ((string key, string value) in options.Values)
            shown[key] = value;
        List<string> order = ["size"];
        if (format == "qcow2")
        {
            shown.TryAdd("cluster_size", "65536");
            shown["cluster_size"] = ImageOptions.ParseSize(shown["cluster_size"], "cluster_size").ToString(CultureInfo.InvariantCulture);
            shown.TryAdd("extended_l2", "off");
            shown.TryAdd("compression_type", "zlib");
            shown.TryAdd("lazy_refcounts", "off");
            shown.TryAdd("refcount_bits", "16");
            order = ["encrypt.format", "encrypt.key-secret", "encrypt.iter-time", "cluster_size", "extended_l2", "preallocation", "compression_type", "size", "compat", "data_file", "data_file_raw", "backing_file", "backing_fmt", "lazy_refcounts", "refcount_bits"];
        }
        shown["size"] = ((size + 511) & ~511L).ToString(CultureInfo.InvariantCulture);
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
            return ListOptions(format);
        ImageOptions options = CreationOptions(line);
        long size;
        long data;
        if (line.Value("size") is string text)
        {
            if (line.Operands.Count > 0)
                throw new UsageException("--size N cannot be used together with a filename");
            size = ParseSize(text, "image size");
            data = 0;
        }
        else
        {
            await using BlockNode source = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), share: line.Has("U") || line.Has("force-share")).ConfigureAwait(false);
            size = source.Length;
            int cluster = format == "qcow2" ? ImageCreator.Qcow2Options(size, options, Secrets).ClusterSize : 1;
            data = await DataBytesAsync(source, cluster, format == "qcow2" && options["backing_file"] is not null).ConfigureAwait(false);
        }
        (long required, long full) = format switch
        {
            "qcow2" => Qcow2Creator.Measure(ImageCreator.Qcow2Options((size + 511) & ~511L, options, Secrets), data),
            "raw" => ((size + 511) & ~511L, (size + 511) & ~511L),
            "luks" => (size + LuksHeader.HeaderBytes(new LuksCreateOptions()), size + LuksHeader.HeaderBytes(new LuksCreateOptions())),
            _ => throw new BlockException($"Format driver '{format}' does not support measurement"),
        };
        if (json)
        {
            _out.WriteLine("{");
            if (format == "qcow2" && line.Value("size") is null)
                _out.WriteLine("    \"bitmaps\": 0,");
            _out.WriteLine($"    \"required\": {required},");
            _out.WriteLine($"    \"fully-allocated\": {full}");
            _out.WriteLine("}");
            return 0;
        }
        _out.WriteLine($"required size: {required}");
        _out.WriteLine($"fully allocated size: {full}");
        return 0;
    }

    private static async ValueTask<long> DataBytesAsync(BlockNode source, int cluster, bool topOnly)
    {
        long data = 0;
        long counted = 0;
        for (long offset = 0; offset < source.Length;)
        {
            ChainExtent extent = await ChainStatus.AtAsync(source, offset, source.Length - offset, topOnly ? source.Backing : null).ConfigureAwait(false);
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
            throw new UsageException("Expecting image file name and size");
        string change = args[^1];
        CommandLine line = new(args.AsSpan(0, args.Length - 1), "f:hq", "help", "object=", "image-opts", "preallocation=", "shrink");
        AddObjects(line);
        if (line.Operands.Count != 1)
            throw new UsageException("Expecting image file name and size");
        int sign = change.StartsWith('+') ? 1 : change.StartsWith('-') ? -1 : 0;
        long amount = ParseSize(sign == 0 ? change : change[1..], "image size");
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

    private async Task<int> AmendAsync(string[] args)
    {
        CommandLine line = new(args, "ho:qpt:f:", "help", "object=", "image-opts", "force");
        AddObjects(line);
        if (!line.Has("o"))
            throw new UsageException("Must specify options (-o)");
        ImageOptions options = CreationOptions(line);
        await using BlockNode node = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), write: true, noIo: options.Below("encrypt").Values.Count == 0).ConfigureAwait(false);
        if (node is LuksImage luks)
        {
            await AmendSlotsAsync(luks.Header, luks.File, 0, options, string.Empty, line.Has("force")).ConfigureAwait(false);
            return 0;
        }
        if (node is not Qcow2Image image)
            throw new BlockException($"Format driver '{node.Driver}' does not support option amendment");
        foreach (string key in options.Values.Keys)
        {
            if (key is not ("compat" or "lazy_refcounts" or "backing_file" or "backing_fmt" or "size" or "data_file_raw") && !key.StartsWith("encrypt.", StringComparison.Ordinal))
                throw new BlockException($"Changing the '{key}' option is not supported");
        }
        if (options["compat"] is string compat)
            await image.SetVersionAsync(compat is "0.10" or "v2" ? 2 : 3).ConfigureAwait(false);
        if (options["lazy_refcounts"] is string lazy)
            await image.SetLazyRefcountsAsync(ImageOptions.ParseFlag("lazy_refcounts", lazy)).ConfigureAwait(false);
        if (options["data_file_raw"] is string raw)
            await image.SetDataFileRawAsync(ImageOptions.ParseFlag("data_file_raw", raw)).ConfigureAwait(false);
        if (options["backing_file"] is string || options["backing_fmt"] is string)
            await image.ChangeBackingNameAsync(options["backing_file"] is { Length: 0 } ? null : options["backing_file"] ?? image.BackingFileName, options["backing_fmt"] ?? image.BackingFormat).ConfigureAwait(false);
        if (options.Below("encrypt").Values.Count > 0)
            await AmendSlotsAsync(image.Luks ?? throw new BlockException("The image is not encrypted with LUKS"), image.File, image.CryptoHeader.Offset, options, "encrypt.", line.Has("force")).ConfigureAwait(false);
        if (options.Size("size") is long size)
            await image.ResizeAsync((size + 511) & ~511L).ConfigureAwait(false);
        return 0;
    }

    private async ValueTask AmendSlotsAsync(LuksHeader header, BlockNode file, long offset, ImageOptions options, string prefix, bool force)
    {
        ReadOnlyMemory<byte>? SecretOf(string key) => options[prefix + key] is string id
            ? Secrets.TryGetValue(id, out ReadOnlyMemory<byte> secret) ? secret : throw new BlockException($"No secret with id '{id}'")
            : null;
        int? slot = options.Size(prefix + "keyslot") is long index ? (int)Math.Min(index, 1000) : null;
        switch (options[prefix + "state"])
        {
            case "active":
                ReadOnlyMemory<byte> added = SecretOf("new-secret") ?? throw new BlockException($"Parameter '{prefix}new-secret' is missing");
                ReadOnlyMemory<byte> existing = SecretOf("old-secret") ?? SecretOf("secret") ?? (Secrets.Count > 0 ? System.Linq.Enumerable.First(Secrets.Values) : added);
                await header.AddSlotAsync(file, offset, existing, added, slot, (int)(options.Size(prefix + "iter-time") ?? 2000)).ConfigureAwait(false);
                break;
            case "inactive":
                if (slot is null && SecretOf("old-secret") is null)
                    throw new BlockException("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given");
                await header.EraseSlotsAsync(file, offset, SecretOf("old-secret"), slot, force).ConfigureAwait(false);
                break;
            default:
                throw new BlockException($"Parameter '{prefix}state' must be 'active' or 'inactive'");
        }
    }

    private async Task<int> BitmapAsync(string[] args)
    {
        CommandLine line = new(args, "b:f:F:g:h", "help", "object=", "image-opts", "add", "remove", "clear", "enable", "disable", "merge=");
        AddObjects(line);
        if (line.Operands.Count != 2)
            throw new UsageException("Expecting filename and bitmap name");
        string name = line.Operands[1];
        await using BlockNode node = await OpenAsync(line.Operands[0], line.Value("f"), line.Has("image-opts"), write: true, noBacking: true).ConfigureAwait(false);
        if (node is not Qcow2Image image)
            throw new BlockException($"Cannot store dirty bitmaps in file '{line.Operands[0]}': driver '{node.Driver}' has none");
        int granularity = 16;
        if (line.Value("g") is string text)
        {
            long bytes = ParseSize(text, "granularity");
            if (!long.IsPow2(bytes))
                throw new BlockException("Granularity must be power of 2");
            granularity = (int)long.Log2(bytes);
        }
        bool any = false;
        foreach ((string action, string? value) in line.Options)
        {
            Task? task = action switch
            {
                "add" => Qcow2Bitmaps.AddAsync(image, name, granularity, enabled: !line.Has("disable")).AsTask(),
                "remove" => Qcow2Bitmaps.RemoveAsync(image, name).AsTask(),
                "clear" => Qcow2Bitmaps.ClearAsync(image, name).AsTask(),
                "enable" => Qcow2Bitmaps.EnableAsync(image, name, enabled: true).AsTask(),
                "disable" => Qcow2Bitmaps.EnableAsync(image, name, enabled: false).AsTask(),
                "merge" => MergeAsync(image, name, value!, line.Value("b"), line.Value("F")).AsTask(),
                _ => null,
            };
            if (task is not Task run)
                continue;
            any = true;
            await run.ConfigureAwait(false);
        }
        return any ? 0 : throw new UsageException("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge");
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
