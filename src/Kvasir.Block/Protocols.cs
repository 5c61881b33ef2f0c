using System;
using System.Globalization;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Nbd;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>The nodes at the bottom of a graph, that reach storage: by name ("nbd://...", a path) or by options (driver=...).</summary>
internal static class Protocols
{
    /// <summary>Whether there is a protocol of this name.</summary>
    public static bool Has(string driver) =>
        driver is "file" or "host_device" or "nbd" or "https" or "http" or "iscsi" or "nfs" or "rbd" or "null-co" or "null-aio";

    /// <summary>Opens what a name says, but for blkdebug.</summary>
    public static async ValueTask<BlockNode> OpenNameAsync(string name, OpenOptions options, ImageOptions extra, CancellationToken cancellation)
    {
        string protocol = ProtocolOf(name);
        switch (protocol)
        {
            case "nbd" or "nbds" or "nbd+unix" or "nbd+tcp" or "nbds+unix":
                return await NbdClient.ConnectAsync(NbdAddress.Parse(name), options.ReadOnly, null, cancellation).ConfigureAwait(false);
            case "https" or "http":
                return await HttpNode.OpenAsync(name, HttpSettings(options, extra), cancellation).ConfigureAwait(false);
            case "iscsi":
                return await IscsiNode.OpenAsync(name, extra["initiator-name"], IscsiTimeout(extra), options.ReadOnly).ConfigureAwait(false);
            case "nfs":
                return await NfsNode.OpenAsync(name, options.ReadOnly).ConfigureAwait(false);
            case "rbd":
                return await RbdNode.OpenAsync(name, options.ReadOnly).ConfigureAwait(false);
            case "null-co" or "null-aio":
                return new NullNode(extra.Size("size") ?? 1L << 30, extra.Flag("read-zeroes", false));
            case "" or "file" or "host_device":
                return OpenFile(Image.StripProtocol(name), options, extra);
            default:
                throw new BlockException($"Unknown protocol '{protocol}'", BlockErrno.NoEntry);
        }
    }

    /// <summary>Opens what options say; null: the driver is no protocol.</summary>
    public static async ValueTask<BlockNode?> OpenOptionsAsync(ImageOptions graph, OpenOptions options, CancellationToken cancellation)
    {
        switch (graph["driver"])
        {
            case "file" or "host_device":
                return await Image.OpenProtocolAsync(graph["filename"] ?? throw Missing("filename"), options, graph, cancellation).ConfigureAwait(false);
            case "nbd":
                return await NbdClient.ConnectAsync(NbdAddress.FromOptions(graph), options.ReadOnly, FindCredentials(options, graph["tls-creds"]), cancellation).ConfigureAwait(false);
            case "https" or "http":
                return await HttpNode.OpenAsync(graph["url"] ?? graph["filename"] ?? throw Missing("url"), HttpSettings(options, graph), cancellation).ConfigureAwait(false);
            case "iscsi":
                string portal = graph["portal"] ?? throw Missing("portal");
                string login = graph["user"] is string user ? $"{user}%{graph["password"]}@" : string.Empty;
                return await IscsiNode.OpenAsync($"iscsi://{login}{portal}/{graph["target"] ?? throw Missing("target")}/{graph["lun"] ?? "0"}", graph["initiator-name"], IscsiTimeout(graph), options.ReadOnly).ConfigureAwait(false);
            case "nfs":
                return await NfsNode.OpenAsync(graph["filename"] ?? NfsName(graph), options.ReadOnly).ConfigureAwait(false);
            case "rbd":
                return await RbdNode.OpenAsync(graph["filename"] ?? RbdNode.Address.Name(graph), options.ReadOnly).ConfigureAwait(false);
            case "null-co" or "null-aio":
                return new NullNode(graph.Size("size") ?? 1L << 30, graph.Flag("read-zeroes", false));
            default:
                return null;
        }
    }

    /// <summary>Refuses names in places where no image can be made.</summary>
    public static void CheckCreatable(string name)
    {
        string protocol = ProtocolOf(name);
        switch (protocol)
        {
            case "" or "file" or "host_device" or "nfs" or "iscsi" or "rbd" or "nbd" or "nbds" or "nbd+unix" or "nbd+tcp" or "nbds+unix":
                return;
            case "https" or "http" or "null-co" or "null-aio" or "blkdebug":
                throw new BlockException($"Protocol driver '{protocol}' does not support image creation", BlockErrno.NotSupported);
            default:
                throw new BlockException($"Unknown protocol '{protocol}'", BlockErrno.NoEntry);
        }
    }

    /// <summary>Makes what a name says, of <paramref name="length"/> zero bytes; where nothing can be made it must be there, and is written over.</summary>
    public static async ValueTask<BlockNode> CreateAsync(string name, long length, Preallocation preallocation, HostFileOptions options, CancellationToken cancellation)
    {
        CheckCreatable(name);
        string protocol = ProtocolOf(name);
        if (protocol is "" or "file" or "host_device")
            return await HostFile.CreateAsync(Image.StripProtocol(name), length, preallocation, options).ConfigureAwait(false);
        BlockNode? node = null;
        try
        {
            node = protocol == "nfs"
                ? await NfsNode.CreateAsync(name).ConfigureAwait(false)
                : await OpenNameAsync(name, new OpenOptions { ReadOnly = false, Cache = options.Cache }, new ImageOptions(), cancellation).ConfigureAwait(false);
            if (node.IsGrowable)
                await node.ResizeAsync(length, preallocation, cancellation).ConfigureAwait(false);
            else
                await TakeOverAsync(node, protocol, length, preallocation, cancellation).ConfigureAwait(false);
            return node;
        }
        catch (BlockException error) when (node is null && protocol != "nfs")
        {
            throw new BlockException($"Protocol driver '{DriverOf(protocol)}' does not support image creation, and opening the image failed: {error.Message}", error.Errno);
        }
        catch when (node is not null)
        {
            await node.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    public static BlockException Missing(string option) => new($"A block device must be specified for \"{option}\"");

    private static string ProtocolOf(string name)
    {
        int colon = name.IndexOf(':', StringComparison.Ordinal);
        return Image.HasProtocol(name) ? name[..colon] : string.Empty;
    }

    /// <summary>Storage of a size of its own becomes the place of a new image: an old image's header goes.</summary>
    private static async ValueTask TakeOverAsync(BlockNode node, string protocol, long length, Preallocation preallocation, CancellationToken cancellation)
    {
        if (preallocation != Preallocation.Off)
            throw new BlockException($"Storage reached by '{DriverOf(protocol)}' cannot be preallocated", BlockErrno.NotSupported);
        if (length > node.Length)
            throw new BlockException(DriverOf(protocol) == "nbd" ? "Cannot grow NBD nodes" : $"The storage there has {node.Length} bytes, and the image needs {length}", BlockErrno.NoSpace);
        await node.WriteZeroesAsync(0, Math.Min(512, node.Length), ZeroFlags.None, cancellation).ConfigureAwait(false);
    }

    private static string DriverOf(string protocol) => protocol.StartsWith("nbd", StringComparison.Ordinal) ? "nbd" : protocol;

    private static HostFile OpenFile(string path, OpenOptions options, ImageOptions extra)
    {
        CacheMode cache = options.Cache;
        if (extra["cache.direct"] is string direct && ImageOptions.ParseFlag("cache.direct", direct))
            cache = CacheMode.None;
        if (extra["cache.no-flush"] is string noFlush && ImageOptions.ParseFlag("cache.no-flush", noFlush))
            cache = CacheMode.Unsafe;
        bool locking = !options.ForceShare && extra["locking"] != "off";
        return HostFile.Open(path, new HostFileOptions
        {
            ReadOnly = options.ReadOnly,
            Cache = cache,
            Async = extra["aio"] == "threads" ? AsyncMode.Threads : options.Async,
            Discard = options.Discard,
            Lock = locking,
            Shared = options.ForceShare ? BlockPermission.All : options.Shared,
        });
    }

    private static HttpSettings HttpSettings(OpenOptions options, ImageOptions graph)
    {
        string? Hidden(string id) => graph[id] is string name
            ? Encoding.UTF8.GetString((options.Secrets.TryGetValue(name, out ReadOnlyMemory<byte> secret) ? secret : throw new BlockException($"No secret with id '{name}'", BlockErrno.NoEntry)).Span)
            : null;
        string? cookie = Hidden("cookie-secret") ?? graph["cookie"];
        if (graph["timeout"] is string text && (!int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int given) || given is 0 or > 10000))
            throw new BlockException("timeout parameter is too large or negative");
        return new HttpSettings
        {
            Credentials = FindCredentials(options, graph["tls-creds"]),
            Verify = graph.Flag("sslverify", true),
            User = graph["username"],
            Password = Hidden("password-secret"),
            Cookie = cookie,
            TimeoutSeconds = graph["timeout"] is string seconds ? int.Parse(seconds, CultureInfo.InvariantCulture) : 60,
        };
    }

    /// <summary>Without one requests wait, as QEMU's do.</summary>
    private static int IscsiTimeout(ImageOptions graph)
    {
        if (graph["timeout"] is not string text)
            return 0;
        return int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int seconds) && seconds <= 10000
            ? seconds
            : throw new BlockException($"Invalid parameter 'timeout': '{text}' is no number of seconds up to 10000");
    }

    private static string NfsName(ImageOptions graph)
    {
        string host = graph["server.host"] ?? throw Missing("server.host");
        string path = graph["path"] ?? throw Missing("path");
        StringBuilder name = new($"nfs://{host}/{path.TrimStart('/')}");
        char separator = '?';
        foreach ((string option, string parameter) in new[] { ("user", "uid"), ("group", "gid"), ("tcp-syn-count", "tcp-syncnt"), ("readahead-size", "readahead"), ("page-cache-size", "pagecache"), ("debug", "debug") })
        {
            if (graph[option] is not string value)
                continue;
            name.Append(separator).Append(parameter).Append('=').Append(value);
            separator = '&';
        }
        return name.ToString();
    }

    private static TlsCredentials? FindCredentials(OpenOptions options, string? id)
    {
        if (id is null)
            return null;
        return options.Credentials.TryGetValue(id, out TlsCredentials? credentials) ? credentials : throw new BlockException($"No TLS credentials with id '{id}'", BlockErrno.NoEntry);
    }
}
