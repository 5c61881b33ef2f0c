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
    private readonly HttpClient _client;
    private readonly Uri _address;

    private HttpNode(HttpClient client, Uri address, long length)
    {
        _client = client;
        _address = address;
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
            using HttpRequestMessage request = new(HttpMethod.Get, uri);
            request.Headers.Range = new RangeHeaderValue(0, 0);
            using HttpResponseMessage response = await client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            if (!response.IsSuccessStatusCode)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} for {address}", BlockErrno.Io);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange?.Length is not long length)
                throw new BlockException("Server does not support 'range' (byte ranges).", BlockErrno.NotSupported);
            return new HttpNode(client, uri, length);
        }
        catch (Exception error) when (error is HttpRequestException or (TaskCanceledException { InnerException: TimeoutException }))
        {
            client.Dispose();
            throw new BlockException($"Cannot reach {address}: {Reason(error)}", error);
        }
        catch (BlockException)
        {
            client.Dispose();
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
        try
        {
            using HttpRequestMessage request = new(HttpMethod.Get, _address);
            request.Headers.Range = new RangeHeaderValue(offset, offset + buffer.Length - 1);
            using HttpResponseMessage response = await _client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange?.From != offset)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} to a range of {_address}", BlockErrno.Io);
            using Stream body = await response.Content.ReadAsStreamAsync(cancellation).ConfigureAwait(false);
            await body.ReadExactlyAsync(buffer, cancellation).ConfigureAwait(false);
        }
        catch (Exception error) when (error is HttpRequestException or IOException or (TaskCanceledException { InnerException: TimeoutException }))
        {
            throw new BlockException($"Cannot read {_address}: {Reason(error)}", error);
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();

    private static HttpClient Connect(Uri address, HttpSettings settings)
    {
        SocketsHttpHandler handler = new() { PooledConnectionLifetime = TimeSpan.FromMinutes(5), AutomaticDecompression = DecompressionMethods.None, UseCookies = false };
        if (settings.Credentials is TlsCredentials credentials)
            handler.SslOptions = credentials.ClientOptions(address.IdnHost);
        if (!settings.Verify)
            handler.SslOptions.RemoteCertificateValidationCallback = (_, _, _, errors) => !settings.Verify || errors == SslPolicyErrors.None;
        HttpClient client = new(handler) { Timeout = TimeSpan.FromSeconds(settings.TimeoutSeconds) };
        string? login = settings.User is string user ? $"{user}:{settings.Password}" : address.UserInfo.Length > 0 ? Uri.UnescapeDataString(address.UserInfo) : null;
        if (login is not null)
            client.DefaultRequestHeaders.Authorization = new AuthenticationHeaderValue("Basic", Convert.ToBase64String(Encoding.UTF8.GetBytes(login)));
        if (settings.Cookie is string cookie)
            client.DefaultRequestHeaders.TryAddWithoutValidation("Cookie", cookie);
        return client;
    }

    // That the handshake failed is said outside, why only within.
    private static string Reason(Exception error) => error.InnerException is System.Security.Authentication.AuthenticationException inner ? $"{error.Message.TrimEnd('.').Replace(", see inner exception", string.Empty, StringComparison.Ordinal)}: {inner.Message}" : error.Message;
}
