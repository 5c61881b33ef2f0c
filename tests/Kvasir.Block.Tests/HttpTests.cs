using System;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Images on a web server.</summary>
public sealed class HttpTests
{
    [Fact]
    public async Task An_image_is_read_by_ranges()
    {
        using TestFolder folder = new();
        byte[] disk = new byte[300_000 / 512 * 512];
        new Random(3).NextBytes(disk);
        await File.WriteAllBytesAsync(folder["a.raw"], disk);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", "qcow2", folder["a.raw"], folder["a.qcow2"]);
        using Server server = new(await File.ReadAllBytesAsync(folder["a.qcow2"]), null, ranges: true);
        string address = $"http://127.0.0.1:{server.Port}/a.qcow2";
        await Peer.ImgOkAsync("convert", "-O", "raw", address, folder["back.raw"]);
        Assert.Equal(disk, await File.ReadAllBytesAsync(folder["back.raw"]));
        (int code, string text) = await Peer.IoAsync("-r", "-c", "write 0 512", address);
        Assert.True(code == 1 && text.Contains("read-only", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_server_without_ranges_is_refused()
    {
        using Server server = new(new byte[1000], null, ranges: false);
        (int code, string text) = await Peer.ImgAsync("info", $"http://127.0.0.1:{server.Port}/a");
        Assert.True(code == 1 && text.Contains("range", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_certificate_that_nobody_vouches_for_is_refused()
    {
        using RSA key = RSA.Create(2048);
        CertificateRequest request = new("CN=127.0.0.1", key, HashAlgorithmName.SHA256, RSASignaturePadding.Pkcs1);
        DateTimeOffset now = TimeProvider.System.GetUtcNow();
        using X509Certificate2 made = request.CreateSelfSigned(now.AddDays(-1), now.AddDays(1));
        using X509Certificate2 certificate = X509CertificateLoader.LoadPkcs12(made.Export(X509ContentType.Pkcs12), null);
        using Server server = new(new byte[1000], certificate, ranges: true);
        (int code, string text) = await Peer.ImgAsync("info", $"https://127.0.0.1:{server.Port}/a");
        Assert.True(code == 1 && text.Contains("SSL", StringComparison.Ordinal), text);
    }

    /// <summary>Just enough of a web server: one file, one request a connection.</summary>
    private sealed class Server : IDisposable
    {
        private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
        private readonly byte[] _content;
        private readonly X509Certificate2? _certificate;
        private readonly bool _ranges;

        public Server(byte[] content, X509Certificate2? certificate, bool ranges)
        {
            _content = content;
            _certificate = certificate;
            _ranges = ranges;
            _listener.Start();
            _ = AcceptAsync();
        }

        public int Port => ((IPEndPoint)_listener.LocalEndpoint).Port;

        public void Dispose() => _listener.Dispose();

        private async Task AcceptAsync()
        {
            try
            {
                while (true)
                    _ = ServeAsync(await _listener.AcceptTcpClientAsync());
            }
            catch (Exception error) when (error is SocketException or ObjectDisposedException)
            {
                // The test is over.
            }
        }

        private async Task ServeAsync(TcpClient client)
        {
            using TcpClient own = client;
            Stream stream = client.GetStream();
            try
            {
                if (_certificate is not null)
                {
                    SslStream secure = new(stream);
                    await secure.AuthenticateAsServerAsync(_certificate);
                    stream = secure;
                }
                await AnswerAsync(stream);
            }
            catch (Exception error) when (error is IOException or System.Security.Authentication.AuthenticationException)
            {
                // The client hung up, which is what one of the tests is about.
            }
        }

        private async Task AnswerAsync(Stream stream)
        {
            using StreamReader reader = new(stream, Encoding.ASCII, false, 1024, leaveOpen: true);
            (long first, long last) = (0, _content.Length - 1);
            while (await reader.ReadLineAsync() is { Length: > 0 } line)
            {
                if (!line.StartsWith("Range: bytes=", StringComparison.OrdinalIgnoreCase))
                    continue;
                string[] range = line["Range: bytes=".Length..].Split('-');
                first = long.Parse(range[0], CultureInfo.InvariantCulture);
                last = Math.Min(last, long.Parse(range[1], CultureInfo.InvariantCulture));
            }
            int length = (int)(_ranges ? last - first + 1 : _content.Length);
            string head = _ranges
                ? $"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{_content.Length}\r\n"
                : "HTTP/1.1 200 OK\r\n";
            await stream.WriteAsync(Encoding.ASCII.GetBytes($"{head}Content-Length: {length}\r\nConnection: close\r\n\r\n"));
            await stream.WriteAsync(_content.AsMemory(_ranges ? (int)first : 0, length));
            await stream.FlushAsync();
        }
    }
}
