using System;
using System.IO;
using System.Net;
using System.Net.Http;
using System.Net.Http.Headers;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block;

/// <summary>A file on a web server that answers byte ranges (RFC 9110, 14); read-only.</summary>
public sealed class HttpNode : BlockNode
{
    private static readonly HttpClient Client = new(new SocketsHttpHandler { PooledConnectionLifetime = TimeSpan.FromMinutes(5), AutomaticDecompression = DecompressionMethods.None })
    {
        Timeout = TimeSpan.FromSeconds(60),
    };

    private readonly Uri _address;

    private HttpNode(Uri address, long length)
    {
        _address = address;
        Length = length;
    }

    public override string Driver => _address.Scheme;

    public override string FileName => _address.ToString();

    public override long Length { get; }

    public override bool IsReadOnly => true;

    /// <exception cref="BlockException">No such file, or a server without ranges.</exception>
    public static async ValueTask<HttpNode> OpenAsync(string address, CancellationToken cancellation)
    {
        if (!Uri.TryCreate(address, UriKind.Absolute, out Uri? uri))
            throw new BlockException($"'{address}' is no web address");
        try
        {
            using HttpRequestMessage request = new(HttpMethod.Get, uri);
            request.Headers.Range = new RangeHeaderValue(0, 0);
            using HttpResponseMessage response = await Client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            if (!response.IsSuccessStatusCode)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} for {address}", BlockErrno.Io);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange?.Length is not long length)
                throw new BlockException("Server does not support 'range' (byte ranges).", BlockErrno.NotSupported);
            return new HttpNode(uri, length);
        }
        catch (HttpRequestException error)
        {
            throw new BlockException($"Cannot reach {address}: {error.Message}", error);
        }
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        try
        {
            using HttpRequestMessage request = new(HttpMethod.Get, _address);
            request.Headers.Range = new RangeHeaderValue(offset, offset + buffer.Length - 1);
            using HttpResponseMessage response = await Client.SendAsync(request, HttpCompletionOption.ResponseHeadersRead, cancellation).ConfigureAwait(false);
            if (response.StatusCode != HttpStatusCode.PartialContent || response.Content.Headers.ContentRange?.From != offset)
                throw new BlockException($"The server answered {(int)response.StatusCode} {response.ReasonPhrase} to a range of {_address}", BlockErrno.Io);
            using Stream body = await response.Content.ReadAsStreamAsync(cancellation).ConfigureAwait(false);
            await body.ReadExactlyAsync(buffer, cancellation).ConfigureAwait(false);
        }
        catch (Exception error) when (error is HttpRequestException or IOException)
        {
            throw new BlockException($"Cannot read {_address}: {error.Message}", error);
        }
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => throw ReadOnlyError();
}
