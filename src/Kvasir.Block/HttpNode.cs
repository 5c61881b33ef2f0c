using System;
using System.IO;
using System.Net;
using System.Net.Http;
using System.Net.Http.Headers;
using System.Net.Security;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Nbd;

namespace Kvasir.Block;

/// <summary>How a web server is asked.</summary>
public sealed record HttpSettings
{
    /// <summary>The authorities to trust instead of the system's, and a certificate to show.</summary>
    public TlsCredentials? Credentials { get; init; }

    /// <summary>Whether the server must show a certificate of a known authority for its name.</summary>
    public bool Verify { get; init; } = true;

    public string? User { get; init; }

    public string? Password { get; init; }

    public string? Cookie { get; init; }

    public int TimeoutSeconds { get; init; } = 60;
}

/// <summary>A file on a web server that answers byte ranges (RFC 9110, 14); read-only.</summary>
public sealed class HttpNode : BlockNode
{
    private const int MostRedirects = 10;

    private readonly HttpClient _client;
    private readonly Uri _address;
    private readonly HttpSettings _settings;

    private HttpNode(HttpClient client, Uri address, HttpSettings settings, long length)
    {
        _client = client;
        _address = address;
        _settings = settings;
        Length = length;
    }

    public override string Driver => _address.Scheme;

    public override string FileName => _address.ToString();

    public override long Length { get; }

    public override bool IsReadOnly => true;

    /// <exception cref="BlockException">No such file, or a server without ranges.</exception>
    public static async ValueTask<HttpNode> OpenAsync(string address, HttpSettings settings, CancellationToken cancellation)
    {
        if (!Uri.TryCreate(address, UriKind.Absolute, out Uri? uri))
            throw new BlockException($"'{address}' is no web address");
        HttpClient client = Connect(uri, settings);
        try
        {
            using CancellationTokenSource limit = Limit(settings, cancellation);
            using HttpResponseMessage response = await AskAsync(client, uri, settings, new RangeHeaderValue(0, 0), limit.Token).ConfigureAwait(false);
            if (!response.IsSuccessStatusCode)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} for {address}", BlockErrno.Io);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange?.Length is not long length)
                throw new BlockException("Server does not support 'range' (byte ranges).", BlockErrno.NotSupported);
            return new HttpNode(client, uri, settings, length);
        }
        catch (Exception error)
        {
            client.Dispose();
            if (error is HttpRequestException || (error is OperationCanceledException && !cancellation.IsCancellationRequested))
                throw new BlockException($"Cannot reach {address}: {Reason(error)}", error);
            throw;
        }
    }

    public override async ValueTask DisposeAsync()
    {
        _client.Dispose();
        await base.DisposeAsync().ConfigureAwait(false);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        // For the whole answer: a server that stops in the middle of it must not hold the disk for ever.
        using CancellationTokenSource limit = Limit(_settings, cancellation);
        try
        {
            using HttpResponseMessage response = await AskAsync(_client, _address, _settings, new RangeHeaderValue(offset, offset + buffer.Length - 1), limit.Token).ConfigureAwait(false);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange is not { } range || range.From != offset)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} to a range of {_address}", BlockErrno.Io);
            if (range.Length is long length && length != Length)
                throw new BlockException($"{_address} has {length} bytes now, and had {Length} when it was opened", BlockErrno.Io);
            using Stream body = await response.Content.ReadAsStreamAsync(limit.Token).ConfigureAwait(false);
            await body.ReadExactlyAsync(buffer, limit.Token).ConfigureAwait(false);
        }
        catch (Exception error) when (error is HttpRequestException or IOException || (error is OperationCanceledException && !cancellation.IsCancellationRequested))
        {
            throw new BlockException($"Cannot read {_address}: {Reason(error)}", error);
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    private static CancellationTokenSource Limit(HttpSettings settings, CancellationToken cancellation)
    {
        CancellationTokenSource limit = CancellationTokenSource.CreateLinkedTokenSource(cancellation);
        limit.CancelAfter(TimeSpan.FromSeconds(settings.TimeoutSeconds));
        return limit;
    }

    /// <summary>Asks for a range, where the server sends one on as well. Another place is told neither the cookie nor the password, and TLS is not left.</summary>
    private static async ValueTask<HttpResponseMessage> AskAsync(HttpClient client, Uri address, HttpSettings settings, RangeHeaderValue range, CancellationToken cancellation)
    {
        Uri at = address;
        for (int i = 0; ; i++)
        {
            using HttpRequestMessage request = new(HttpMethod.Get, at);
            request.Headers.Range = range;
            if ((at.Scheme, at.IdnHost, at.Port) == (address.Scheme, address.IdnHost, address.Port))
                Introduce(request, address, settings);
            HttpResponseMessage response = await client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            if ((int)response.StatusCode is not (301 or 302 or 303 or 307 or 308) || response.Headers.Location is not Uri next)
                return response;
            response.Dispose();
            next = new Uri(at, next);
            if (i == MostRedirects || next.Scheme is not ("http" or "https") || (at.Scheme == "https" && next.Scheme != "https"))
                throw new BlockException($"{address} leads {(i == MostRedirects ? "on and on" : $"to {next}, which is not followed")}", BlockErrno.Io);
            at = next;
        }
    }

    private static void Introduce(HttpRequestMessage request, Uri address, HttpSettings settings)
    {
        string? login = settings.User is string user ? $"{user}:{settings.Password}" : address.UserInfo.Length > 0 ? Uri.UnescapeDataString(address.UserInfo) : null;
        if (login is not null)
            request.Headers.Authorization = new AuthenticationHeaderValue("Basic", Convert.ToBase64String(Encoding.UTF8.GetBytes(login)));
        if (settings.Cookie is string cookie)
            request.Headers.TryAddWithoutValidation("Cookie", cookie);
    }

    private static HttpClient Connect(Uri address, HttpSettings settings)
    {
        SocketsHttpHandler handler = new() { PooledConnectionLifetime = TimeSpan.FromMinutes(5), AutomaticDecompression = DecompressionMethods.None, UseCookies = false, AllowAutoRedirect = false };
        if (settings.Credentials is TlsCredentials credentials)
            handler.SslOptions = credentials.ClientOptions(address.IdnHost);
        if (!settings.Verify)
            handler.SslOptions.RemoteCertificateValidationCallback = (_, _, _, errors) => !settings.Verify || errors == SslPolicyErrors.None;
        return new HttpClient(handler) { Timeout = Timeout.InfiniteTimeSpan };
    }

    // That the handshake failed is said outside, why only within.
    private static string Reason(Exception error) => error is OperationCanceledException ? "the server did not answer in time" : error.InnerException is System.Security.Authentication.AuthenticationException inner ? $"{error.Message.TrimEnd('.').Replace(", see inner exception", string.Empty, StringComparison.Ordinal)}: {inner.Message}" : error.Message;
}
