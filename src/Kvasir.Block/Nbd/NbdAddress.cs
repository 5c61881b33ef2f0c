using System;
using System.Globalization;
using System.Net.Sockets;

namespace Kvasir.Block.Nbd;

/// <summary>Where an NBD server listens and which export is meant.</summary>
/// <param name="Host">Host name; null for a socket.</param>
/// <param name="Port">TCP port.</param>
/// <param name="Socket">Path of a UNIX socket; null for TCP.</param>
/// <param name="Export">The export's name; empty: the default one.</param>
/// <param name="Tls">Start TLS.</param>
public sealed record NbdAddress(string? Host, int Port, string? Socket, string Export, bool Tls)
{
    public const int DefaultPort = 10809;

    /// <summary>Parses "nbd://host:port/export", "nbds://...", "nbd+unix:///export?socket=path", "nbd:host:port[:exportname=x]", "nbd:unix:path[:exportname=x]".</summary>
    /// <exception cref="BlockException">It is none of them.</exception>
    public static NbdAddress Parse(string text)
    {
        if (text.Contains("://", StringComparison.Ordinal))
            return ParseUri(text);
        if (!text.StartsWith("nbd:", StringComparison.Ordinal))
            throw new BlockException($"'{text}' is no NBD address");
        string rest = text[4..];
        string export = string.Empty;
        int mark = rest.IndexOf(":exportname=", StringComparison.Ordinal);
        if (mark >= 0)
        {
            export = rest[(mark + 12)..];
            rest = rest[..mark];
        }
        if (rest.StartsWith("unix:", StringComparison.Ordinal))
            return new NbdAddress(null, 0, rest[5..], export, false);
        int colon = rest.LastIndexOf(':');
        if (colon <= 0)
            throw new BlockException($"'{text}' is no NBD address: host and port are missing");
        int port = PortOf(rest[(colon + 1)..]);
        return new NbdAddress(rest[..colon].Trim('[', ']'), port, null, export, false);
    }

    internal static NbdAddress FromOptions(ImageOptions options)
    {
        string export = options["export"] ?? string.Empty;
        string? path = options["path"] ?? options["server.path"];
        if (path is not null)
            return new NbdAddress(null, 0, path, export, options["tls-creds"] is not null);
        string host = options["host"] ?? options["server.host"] ?? throw new BlockException("NBD server address missing");
        string port = options["port"] ?? options["server.port"] ?? "10809";
        return new NbdAddress(host, PortOf(port), null, export, options["tls-creds"] is not null);
    }

    /// <summary>A socket's place in the file system.</summary>
    /// <exception cref="BlockException">The path is empty, or longer than a socket's may be.</exception>
    public static UnixDomainSocketEndPoint SocketAt(string path)
    {
        try
        {
            return new UnixDomainSocketEndPoint(path);
        }
        catch (ArgumentException error)
        {
            throw new BlockException(path.Length == 0 ? "The path of a UNIX socket is empty" : $"UNIX socket path '{path}' is too long: paths of sockets have at most 107 bytes", error);
        }
    }

    private static int PortOf(string text) =>
        int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int port) && port is > 0 and < 65536 ? port : throw new BlockException($"'{text}' is no port");

    private static NbdAddress ParseUri(string text)
    {
        if (!Uri.TryCreate(text, UriKind.Absolute, out Uri? uri))
            throw new BlockException($"'{text}' is no NBD address");
        bool tls = uri.Scheme.StartsWith("nbds", StringComparison.Ordinal);
        string export = Uri.UnescapeDataString(uri.AbsolutePath.TrimStart('/'));
        if (uri.Scheme.EndsWith("+unix", StringComparison.Ordinal))
        {
            foreach (string item in uri.Query.TrimStart('?').Split('&'))
            {
                if (item.StartsWith("socket=", StringComparison.Ordinal))
                    return new NbdAddress(null, 0, Uri.UnescapeDataString(item[7..]), export, tls);
            }
            throw new BlockException($"'{text}' names no socket");
        }
        return new NbdAddress(uri.Host.Trim('[', ']'), uri.Port > 0 ? uri.Port : DefaultPort, null, export, tls);
    }

    public override string ToString() => Socket is not null ? $"nbd+unix:///{Export}?socket={Socket}" : $"nbd{(Tls ? "s" : string.Empty)}://{Host}:{Port}/{Export}";
}
