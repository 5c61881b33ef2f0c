using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Block.Filters;
using Kvasir.Block.Formats;
using Kvasir.Block.Nbd;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>How a graph is opened.</summary>
public sealed record OpenOptions
{
    /// <summary>The format; null: probe it if <see cref="Probe"/>, else raw.</summary>
    public string? Format { get; init; }

    /// <summary>
    /// Whether the format may be guessed from the content. Never for a disk a guest writes: what it writes into a raw disk could make
    /// the next guess a different one.
    /// </summary>
    public bool Probe { get; init; }

    public bool ReadOnly { get; init; } = true;

    public CacheMode Cache { get; init; } = CacheMode.Writeback;

    public AsyncMode Async { get; init; } = AsyncMode.Auto;

    /// <summary>Open although another process writes to it; what is read may not fit together.</summary>
    public bool ForceShare { get; init; }

    /// <summary>Leave backing files alone.</summary>
    public bool NoBacking { get; init; }

    /// <summary>Open images that are marked dirty or corrupt, and leave the marks alone.</summary>
    public bool ForCheck { get; init; }

    /// <summary>Whether discards free space in the file.</summary>
    public bool Discard { get; init; } = true;

    /// <summary>Whether the header of an encrypted image may be opened without its key (info).</summary>
    public bool NoIo { get; init; }

    /// <summary>Passphrases by the id that options name them with.</summary>
    public IReadOnlyDictionary<string, ReadOnlyMemory<byte>> Secrets { get; init; } = new Dictionary<string, ReadOnlyMemory<byte>>();

    /// <summary>TLS certificates by the id that options name them with.</summary>
    public IReadOnlyDictionary<string, TlsCredentials> Credentials { get; init; } = new Dictionary<string, TlsCredentials>();

    /// <summary>Groups of rate limits by the id that options name them with.</summary>
    public IReadOnlyDictionary<string, ThrottleGroup> ThrottleGroups { get; init; } = new Dictionary<string, ThrottleGroup>();

    /// <summary>What others may do with the file meanwhile.</summary>
    public BlockPermission Shared { get; init; } = BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged;
}

/// <summary>Opens block graphs from names and options.</summary>
public static class Image
{
    private const int LongestChain = 200;
    private const int ProbeBytes = 2048;

    /// <summary>Opens an image by name: a path, "json:{...}", "nbd://host/export", "https://..."; formats stack on it.</summary>
    /// <exception cref="BlockException">It cannot be opened; the text says why.</exception>
    public static async ValueTask<BlockNode> OpenAsync(string name, OpenOptions options, CancellationToken cancellation = default)
    {
        try
        {
            if (name.StartsWith("json:", StringComparison.Ordinal))
                return await OpenOptionsAsync(ImageOptions.ParseJson(name[5..]), options, [], cancellation).ConfigureAwait(false);
            return await OpenNameAsync(name, options, new ImageOptions(), [], cancellation).ConfigureAwait(false);
        }
        catch (BlockException error) when (!error.Message.StartsWith("Could not open", StringComparison.Ordinal))
        {
            throw new BlockException($"Could not open '{name}': {error.Message}", error.Errno);
        }
    }

    /// <summary>Opens a graph from options (--image-opts, blockdev).</summary>
    public static ValueTask<BlockNode> OpenAsync(ImageOptions graph, OpenOptions options, CancellationToken cancellation = default) =>
        OpenOptionsAsync(graph, options, [], cancellation);

    /// <summary>The format that content looks like; "raw" when like none.</summary>
    public static async ValueTask<string> ProbeAsync(BlockNode file, CancellationToken cancellation = default)
    {
        byte[] start = new byte[(int)Math.Min(ProbeBytes, file.Length)];
        await file.ReadAsync(0, start, cancellation).ConfigureAwait(false);
        // A dmg has its mark at the end, and nothing at its start: the name must say it.
        return ProbeBytesOf(start) ?? (file.FileName.EndsWith(".dmg", StringComparison.OrdinalIgnoreCase) ? "dmg" : "raw");
    }

    /// <summary>The format that a disk's first bytes look like; null when like none.</summary>
    public static string? ProbeBytesOf(ReadOnlySpan<byte> start)
    {
        if (Qcow2Header.Probe(start))
            return "qcow2";
        if (LuksHeader.Probe(start))
            return "luks";
        return FormatTable.Probe(start);
    }

    /// <summary>Opens the protocol below a format.</summary>
    public static async ValueTask<BlockNode> OpenProtocolAsync(string name, OpenOptions options, ImageOptions extra, CancellationToken cancellation = default)
    {
        if (name.StartsWith("blkdebug:", StringComparison.Ordinal))
            return await OpenFaultNameAsync(name, options, cancellation).ConfigureAwait(false);
        return await Protocols.OpenNameAsync(name, options, extra, cancellation).ConfigureAwait(false);
    }

    /// <summary>Puts a format on top of an open file. On failure the file is closed.</summary>
    public static async ValueTask<BlockNode> OpenFormatAsync(
        BlockNode file, string? format, OpenOptions options, ImageOptions extra, CancellationToken cancellation = default) =>
        await OpenFormatAsync(file, format, options, extra, [], cancellation).ConfigureAwait(false);

    /// <summary>The name of a backing file as seen from its overlay: relative ones are next to the overlay.</summary>
    public static string ResolveBacking(string overlay, string backing)
    {
        if (backing.StartsWith("json:", StringComparison.Ordinal) || backing.StartsWith('/') || HasProtocol(backing))
            return backing;
        string path = StripProtocol(overlay);
        int slash = path.LastIndexOf('/');
        return slash < 0 ? backing : path[..(slash + 1)] + backing;
    }

    /// <summary>Whether a format or protocol of this name can be opened.</summary>
    public static bool IsKnownDriver(string name) =>
        name is "raw" or "qcow2" or "luks" or "throttle" or "blkdebug" || Protocols.Has(name) || FormatTable.Has(name);

    /// <summary>Opens an overlay's backing image and hangs it below.</summary>
    public static async ValueTask AttachBackingAsync(BlockNode overlay, string backing, string? format, OpenOptions options, CancellationToken cancellation = default) =>
        await AttachBackingAsync(overlay, backing, format, options, new ImageOptions(), [], cancellation).ConfigureAwait(false);

    internal static string StripProtocol(string name) => name.StartsWith("file:", StringComparison.Ordinal) ? name[5..]
        : name.StartsWith("host_device:", StringComparison.Ordinal) ? name[12..]
        : name;

    /// <summary>"blkdebug:CONFIG:IMAGE": a file of rules (or none) and the image that they are for.</summary>
    private static async ValueTask<BlockNode> OpenFaultNameAsync(string name, OpenOptions options, CancellationToken cancellation)
    {
        string rest = name["blkdebug:".Length..];
        int colon = rest.IndexOf(':', StringComparison.Ordinal);
        if (colon < 0)
            throw new BlockException("blkdebug requires both config file and image path");
        BlockNode file = await OpenProtocolAsync(rest[(colon + 1)..], options, new ImageOptions(), cancellation).ConfigureAwait(false);
        try
        {
            return FaultNode.FromOptions(file, colon == 0 ? new ImageOptions() : FaultNode.ParseRules(await System.IO.File.ReadAllTextAsync(rest[..colon], cancellation).ConfigureAwait(false)));
        }
        catch (Exception error) when (error is System.IO.IOException or UnauthorizedAccessException)
        {
            await file.DisposeAsync().ConfigureAwait(false);
            throw new BlockException($"Could not read blkdebug config file: {error.Message}", error);
        }
        catch (BlockException)
        {
            await file.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    internal static bool HasProtocol(string name)
    {
        int colon = name.IndexOf(':', StringComparison.Ordinal);
        return colon > 0 && name.IndexOf('/', StringComparison.Ordinal) is int slash && (slash < 0 || slash > colon);
    }

    private static async ValueTask<BlockNode> OpenNameAsync(
        string name, OpenOptions options, ImageOptions extra, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        BlockNode file = await OpenProtocolAsync(name, options, extra.Below("file"), cancellation).ConfigureAwait(false);
        return await OpenFormatAsync(file, options.Format, options, extra, chain, cancellation).ConfigureAwait(false);
    }

    private static async ValueTask<BlockNode> OpenOptionsAsync(ImageOptions graph, OpenOptions options, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        string? driver = graph["driver"];
        if (graph["read-only"] is string readOnly && ImageOptions.ParseFlag("read-only", readOnly))
            options = options with { ReadOnly = true };
        if (graph["force-share"] is string force && ImageOptions.ParseFlag("force-share", force))
            options = options with { ForceShare = true };
        if (await Protocols.OpenOptionsAsync(graph, options, cancellation).ConfigureAwait(false) is BlockNode bottom)
            return bottom;
        switch (driver)
        {
            case "throttle":
                ThrottleGroup group = graph["throttle-group"] is not string id ? new ThrottleGroup(ThrottleLimits.FromOptions(graph))
                    : options.ThrottleGroups.TryGetValue(id, out ThrottleGroup? known) ? known : throw new BlockException($"Throttle group '{id}' does not exist");
                return new ThrottleNode(await OpenFileOptionAsync(graph, options, chain, cancellation).ConfigureAwait(false), group);
            case "blkdebug":
                return FaultNode.FromOptions(await OpenFileOptionAsync(graph, options, chain, cancellation).ConfigureAwait(false), graph);
            default:
                break;
        }
        if (driver is not null && !IsKnownDriver(driver))
            throw new BlockException($"Unknown driver '{driver}'");
        GraphOptions.Check(driver ?? options.Format ?? "raw", graph, driver is null);
        if (graph["discard"] is string discard)
            options = options with { Discard = discard is "unmap" or "on" };
        DetectZeroes detect = BackendOptions.ParseDetectZeroes(graph["detect-zeroes"] ?? "off");
        if (detect == DetectZeroes.Unmap && graph["discard"] is "ignore" or "off")
            throw new BlockException("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap");
        BlockNode file = await OpenFileOptionAsync(graph, options, chain, cancellation).ConfigureAwait(false);
        BlockNode image = await OpenFormatAsync(file, driver ?? options.Format, options, graph, chain, cancellation).ConfigureAwait(false);
        image.DetectZeroes = detect;
        return image;
    }

    private static async ValueTask<BlockNode> OpenFileOptionAsync(ImageOptions graph, OpenOptions options, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        ImageOptions below = graph.Below("file");
        if (below.Values.Count == 0)
            below = graph.Below("image");
        if (below.Values.Count > 0)
        {
            if (below["driver"] is null)
                below["driver"] = below["filename"] is string name && HasProtocol(name) ? null : "file";
            if (below["driver"] is null)
                return await OpenProtocolAsync(below["filename"]!, options, below, cancellation).ConfigureAwait(false);
            return await OpenOptionsAsync(below, options with { Format = "raw" }, chain, cancellation).ConfigureAwait(false);
        }
        string file = graph["filename"] ?? graph["file"] ?? graph["image"] ?? throw Protocols.Missing("file");
        return await OpenProtocolAsync(file, options, graph, cancellation).ConfigureAwait(false);
    }

    private static async ValueTask<BlockNode> OpenFormatAsync(
        BlockNode file, string? format, OpenOptions options, ImageOptions extra, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        BlockNode? image = null;
        try
        {
            bool probed = format is null && options.Probe;
            format ??= probed ? await ProbeAsync(file, cancellation).ConfigureAwait(false) : "raw";
            switch (format)
            {
                case "raw":
                    image = new RawImage(file, extra.Size("offset") ?? 0, extra.Size("size") ?? -1) { Guarded = probed };
                    break;
                case "qcow2":
                    image = await OpenQcow2Async(file, options, extra, cancellation).ConfigureAwait(false);
                    break;
                case "luks":
                    ReadOnlyMemory<byte>? passphrase = Secret(options, extra["key-secret"]);
                    if (passphrase is null && !options.NoIo)
                        throw new BlockException("Parameter 'key-secret' is required for cipher");
                    image = await LuksImage.OpenAsync(file, passphrase, cancellation).ConfigureAwait(false);
                    break;
                case "qcow":
                    ReadOnlyMemory<byte>? word = Secret(options, extra["encrypt.key-secret"]);
                    image = FormatTable.CheckReadOnly(format, options, await QcowImage.OpenAsync(file, word, cancellation).ConfigureAwait(false));
                    if (image is QcowImage { IsEncrypted: true } && word is null && !options.NoIo)
                        throw new BlockException("Parameter 'encrypt.key-secret' is required for cipher");
                    break;
                case "file" or "host_device":
                    return file;
                default:
                    image = await FormatTable.OpenAsync(format, file, options, cancellation).ConfigureAwait(false);
                    break;
            }
            (file as FaultNode)?.Arm();
            if (!options.NoBacking)
                await OpenChainAsync(image, options, extra, chain, cancellation).ConfigureAwait(false);
            return image;
        }
        catch
        {
            await (image ?? file).DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    private static async ValueTask<BlockNode> OpenQcow2Async(BlockNode file, OpenOptions options, ImageOptions extra, CancellationToken cancellation)
    {
        Qcow2Header header = await Qcow2Header.ReadAsync(file, cancellation).ConfigureAwait(false);
        ReadOnlyMemory<byte>? passphrase = header.Encryption == Qcow2Encryption.None ? null : Secret(options, extra["encrypt.key-secret"]);
        if (header.Encryption != Qcow2Encryption.None && passphrase is null && !options.NoIo)
            throw new BlockException("Parameter 'encrypt.key-secret' is required for cipher");
        BlockNode? data = null;
        if (header.HasDataFile)
        {
            string name = extra["data-file.filename"] ?? extra["data-file"] ?? header.DataFile ?? throw new BlockException("'data-file' is required for this image");
            // As QEMU does, a relative name is taken from the working directory, unlike a backing file's.
            data = await OpenProtocolAsync(name, options, extra.Below("data-file"), cancellation).ConfigureAwait(false);
        }
        try
        {
            return await Qcow2Image.OpenAsync(file, new Qcow2Options
            {
                ReadOnly = options.ReadOnly,
                Passphrase = passphrase,
                DataFile = data,
                Discard = options.Discard,
                ForCheck = options.ForCheck,
                L2CacheBytes = extra.Size("l2-cache-size") ?? extra.Size("cache-size") ?? 32L << 20,
                RefcountCacheBytes = extra.Size("refcount-cache-size") ?? 1L << 20,
                Header = header,
                LazyRefcounts = extra["lazy-refcounts"] is string lazy ? ImageOptions.ParseFlag("lazy-refcounts", lazy) : null,
            }, cancellation).ConfigureAwait(false);
        }
        catch
        {
            if (data is not null)
                await data.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    private static ReadOnlyMemory<byte>? Secret(OpenOptions options, string? id)
    {
        if (id is null)
            return options.NoIo || options.Secrets.Count != 1 ? default(ReadOnlyMemory<byte>?) : System.Linq.Enumerable.First(options.Secrets.Values);
        return options.Secrets.TryGetValue(id, out ReadOnlyMemory<byte> secret) ? secret : throw new BlockException($"No secret with id '{id}'", BlockErrno.NoEntry);
    }

    private static async ValueTask OpenChainAsync(BlockNode image, OpenOptions options, ImageOptions extra, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        (string? backing, string? format) = BackingOf(image);
        if (extra["backing"] is { Length: 0 })
            return;
        if (extra.Below("backing") is { Values.Count: > 0 } graph)
        {
            OpenOptions below = options with { ReadOnly = true, Format = null, Probe = true };
            await HangAsync(image, await OpenOptionsAsync(graph, below, Grow(chain, image), cancellation).ConfigureAwait(false)).ConfigureAwait(false);
            return;
        }
        backing = extra["backing"] ?? backing;
        if (backing is not null)
            await AttachBackingAsync(image, backing, format, options, new ImageOptions(), chain, cancellation).ConfigureAwait(false);
    }

    private static async ValueTask AttachBackingAsync(
        BlockNode image, string backing, string? format, OpenOptions options, ImageOptions extra, List<(ulong, ulong)> chain, CancellationToken cancellation)
    {
        List<(ulong, ulong)> grown = Grow(chain, image);
        OpenOptions below = options with { ReadOnly = true, Format = format, Probe = true };
        string name = ResolveBacking(image.FileName, backing);
        try
        {
            BlockNode node = name.StartsWith("json:", StringComparison.Ordinal)
                ? await OpenOptionsAsync(ImageOptions.ParseJson(name[5..]), below, grown, cancellation).ConfigureAwait(false)
                : await OpenNameAsync(name, below, extra, grown, cancellation).ConfigureAwait(false);
            await HangAsync(image, node).ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            string reason = error.Message.StartsWith("Could not open", StringComparison.Ordinal) ? error.Message : $"Could not open '{name}': {error.Message}";
            throw new BlockException($"Could not open backing file: {reason}", error.Errno);
        }
    }

    /// <summary>Hangs a backing image below, or closes it where it is refused.</summary>
    private static async ValueTask HangAsync(BlockNode image, BlockNode backing)
    {
        try
        {
            SetBacking(image, backing);
        }
        catch
        {
            await backing.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>The chain with one more image. The same file twice is a loop, which would never end.</summary>
    private static List<(ulong, ulong)> Grow(List<(ulong, ulong)> chain, BlockNode image)
    {
        if (chain.Count >= LongestChain)
            throw new BlockException($"The backing chain is longer than {LongestChain} images");
        BlockNode bottom = image;
        while (bottom.File is BlockNode below)
            bottom = below;
        (ulong, ulong) identity = bottom is HostFile host ? NativeFile.Identity(host.Handle) : (0, (ulong)chain.Count);
        if (chain.Contains(identity))
            throw new BlockException($"Backing file '{image.FileName}' creates an infinite loop.");
        return [.. chain, identity];
    }

    internal static (string? Name, string? Format) BackingOf(BlockNode image) => image switch
    {
        Qcow2Image qcow2 => (qcow2.BackingFileName, qcow2.BackingFormat),
        IOverlayFormat overlay => (overlay.BackingFileName, overlay.BackingFormat),
        _ => (null, null),
    };

    internal static void SetBacking(BlockNode image, BlockNode? backing)
    {
        if (image is Qcow2Image qcow2)
            qcow2.SetBacking(backing);
        else if (image is IOverlayFormat overlay)
            overlay.SetBacking(backing);
        else
            throw new BlockException($"Driver '{image.Driver}' cannot have a backing file", BlockErrno.NotSupported);
    }
}

/// <summary>A format other than qcow2 whose images can lie on a backing file.</summary>
public interface IOverlayFormat
{
    string? BackingFileName { get; }

    string? BackingFormat { get; }

    void SetBacking(BlockNode? backing);
}
