using System;
using System.Collections.Concurrent;
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

    [Fact]
    public async Task An_image_is_read_over_tls()
    {
        using TestFolder folder = new();
        byte[] disk = new byte[300_000 / 512 * 512];
        new Random(5).NextBytes(disk);
        await File.WriteAllBytesAsync(folder["a.raw"], disk);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", "qcow2", folder["a.raw"], folder["a.qcow2"]);
        using RSA authorityKey = RSA.Create(2048);
        using X509Certificate2 authority = Authority(authorityKey);
        using X509Certificate2 certificate = Issue(authority, "127.0.0.1");
        using Server server = new(await File.ReadAllBytesAsync(folder["a.qcow2"]), certificate, ranges: true);
        await File.WriteAllTextAsync(folder["ca-cert.pem"], authority.ExportCertificatePem());
        string[] trust = ["--object", $"tls-creds-x509,id=tls0,endpoint=client,dir={Path.GetDirectoryName(folder["x"])}"];
        string address = $"https://127.0.0.1:{server.Port}/a.qcow2";
        string options = $"driver=qcow2,file.driver=https,file.url={address},file.tls-creds=tls0";
        (int code, string text) = await Peer.ImgAsync(["info", .. trust, "--image-opts", options]);
        Assert.True(code == 0 && text.Contains("file format: qcow2", StringComparison.Ordinal) && text.Contains("(299520 bytes)", StringComparison.Ordinal), text);
        await Peer.ImgOkAsync(["convert", .. trust, "--image-opts", "-O", "raw", options, folder["back.raw"]]);
        Assert.Equal(disk, await File.ReadAllBytesAsync(folder["back.raw"]));
        await Peer.ImgOkAsync(["check", .. trust, "--image-opts", options]);
        (code, text) = await Peer.IoAsync([.. trust, "-r", "--image-opts", "-c", "read -v 1000 8", options]);
        Assert.True(code == 0 && text.Contains(Convert.ToHexString(disk, 1000, 1).ToLowerInvariant() + " " + Convert.ToHexString(disk, 1001, 1).ToLowerInvariant(), StringComparison.Ordinal), text);
        // An overlay's backing file may lie there too; sslverify is QEMU's word for trusting anyone.
        (code, text) = await Peer.ImgAsync("info", "--image-opts", $"driver=qcow2,file.driver=https,file.url={address},file.sslverify=off");
        Assert.True(code == 0, text);
        (code, text) = await Peer.ImgAsync("info", address);
        Assert.True(code == 1 && text.Contains("SSL", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_certificate_for_another_name_is_refused()
    {
        using TestFolder folder = new();
        using RSA authorityKey = RSA.Create(2048);
        using X509Certificate2 authority = Authority(authorityKey);
        using X509Certificate2 certificate = Issue(authority, "127.0.0.9");
        using Server server = new(new byte[4096], certificate, ranges: true);
        await File.WriteAllTextAsync(folder["ca-cert.pem"], authority.ExportCertificatePem());
        (int code, string text) = await Peer.ImgAsync(
            "info", "--object", $"tls-creds-x509,id=tls0,endpoint=client,dir={Path.GetDirectoryName(folder["x"])}", "--image-opts", $"driver=raw,file.driver=https,file.url=https://127.0.0.1:{server.Port}/a,file.tls-creds=tls0");
        Assert.True(code == 1 && text.Contains("SSL", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_name_and_its_password_are_sent()
    {
        using Server server = new(new byte[4096], null, ranges: true);
        (int code, string text) = await Peer.ImgAsync(
            "info", "--object", "secret,id=p,data=mellon", "--image-opts", $"driver=raw,file.driver=http,file.url=http://127.0.0.1:{server.Port}/a,file.username=gandalf,file.password-secret=p,file.cookie=a=b");
        Assert.True(code == 0, text);
        Assert.Contains("Authorization: Basic " + Convert.ToBase64String("gandalf:mellon"u8), server.Asked);
        Assert.Contains("Cookie: a=b", server.Asked);
    }

    [Fact]
    public async Task Another_place_is_told_no_password_and_no_cookie()
    {
        byte[] disk = new byte[4096];
        disk[1000] = 0xab;
        using Server far = new(disk, null, ranges: true);
        using Server near = new(new byte[1], null, ranges: true) { Location = $"http://127.0.0.1:{far.Port}/b" };
        string options = $"driver=raw,file.driver=http,file.url=http://127.0.0.1:{near.Port}/a,file.username=gandalf,file.password-secret=p,file.cookie=a=b";
        (int code, string text) = await Peer.IoAsync("-r", "--object", "secret,id=p,data=mellon", "-c", "read -P 0xab 1000 1", "-c", "length", "--image-opts", options);
        Assert.True(code == 0 && text.Contains("4 KiB", StringComparison.Ordinal), text);
        Assert.Contains("Cookie: a=b", near.Asked);
        Assert.DoesNotContain(far.Asked, line => line.StartsWith("Cookie", StringComparison.OrdinalIgnoreCase) || line.StartsWith("Authorization", StringComparison.OrdinalIgnoreCase));
    }

    [Fact]
    public async Task A_server_that_sends_on_for_ever_or_elsewhere_is_left()
    {
        using Server server = new(new byte[1], null, ranges: true);
        server.Location = $"http://127.0.0.1:{server.Port}/again";
        (int code, string text) = await Peer.ImgAsync("info", $"http://127.0.0.1:{server.Port}/a");
        Assert.True(code == 1 && text.Contains("on and on", StringComparison.Ordinal), text);
        server.Location = "file:///etc/passwd";
        (code, text) = await Peer.ImgAsync("info", $"http://127.0.0.1:{server.Port}/a");
        Assert.True(code == 1 && text.Contains("not followed", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_server_that_stops_in_the_middle_of_an_answer_fails_the_read()
    {
        using Server server = new(new byte[65536], null, ranges: true) { Stalls = true };
        Task<(int Code, string Text)> read = Peer.IoAsync("-r", "-c", "read 0 4096", "--image-opts", $"driver=raw,file.driver=http,file.url=http://127.0.0.1:{server.Port}/a,file.timeout=3");
        (int code, string text) = await read.WaitAsync(TimeSpan.FromSeconds(120));
        Assert.True(code == 1 && text.Contains("read failed", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task A_file_that_has_another_length_by_now_is_not_read()
    {
        using Server server = new(new byte[65536], null, ranges: true);
        await using BlockNode node = await Image.OpenAsync($"http://127.0.0.1:{server.Port}/a", new OpenOptions { Format = "raw" });
        await node.ReadAsync(0, new byte[512]);
        server.Content = new byte[32768];
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await node.ReadAsync(0, new byte[512]));
        Assert.Contains("32768 bytes now", error.Message, StringComparison.Ordinal);
    }

    private static X509Certificate2 Authority(RSA key)
    {
        CertificateRequest request = new("CN=authority", key, HashAlgorithmName.SHA256, RSASignaturePadding.Pkcs1);
        request.CertificateExtensions.Add(new X509BasicConstraintsExtension(true, false, 0, true));
        request.CertificateExtensions.Add(new X509SubjectKeyIdentifierExtension(request.PublicKey, false));
        DateTimeOffset now = TimeProvider.System.GetUtcNow();
        return request.CreateSelfSigned(now.AddDays(-2), now.AddDays(2));
    }

    private static X509Certificate2 Issue(X509Certificate2 authority, string address)
    {
        using RSA key = RSA.Create(2048);
        CertificateRequest request = new("CN=server", key, HashAlgorithmName.SHA256, RSASignaturePadding.Pkcs1);
        SubjectAlternativeNameBuilder names = new();
        names.AddIpAddress(IPAddress.Parse(address));
        request.CertificateExtensions.Add(names.Build());
        DateTimeOffset now = TimeProvider.System.GetUtcNow();
        using X509Certificate2 signed = request.Create(authority, now.AddDays(-1), now.AddDays(1), [1, 2, 3, 4]);
        using X509Certificate2 whole = signed.CopyWithPrivateKey(key);
        return X509CertificateLoader.LoadPkcs12(whole.Export(X509ContentType.Pkcs12), null);
    }

    /// <summary>Just enough of a web server: one file, one request a connection.</summary>
    private sealed class Server : IDisposable
    {
        private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
        private readonly X509Certificate2? _certificate;
        private readonly bool _ranges;

        public Server(byte[] content, X509Certificate2? certificate, bool ranges)
        {
            Content = content;
            _certificate = certificate;
            _ranges = ranges;
            _listener.Start();
            _ = AcceptAsync();
        }

        public byte[] Content { get; set; }

        /// <summary>Where requests are sent on to; null: they are answered.</summary>
        public string? Location { get; set; }

        /// <summary>Half of an answer is all that comes, but for answers of a byte.</summary>
        public bool Stalls { get; set; }

        /// <summary>Every line of the requests' heads.</summary>
        public ConcurrentBag<string> Asked { get; } = [];

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
            (long first, long last) = (0, Content.Length - 1);
            while (await reader.ReadLineAsync() is { Length: > 0 } line)
            {
                Asked.Add(line);
                if (!line.StartsWith("Range: bytes=", StringComparison.OrdinalIgnoreCase))
                    continue;
                string[] range = line["Range: bytes=".Length..].Split('-');
                first = long.Parse(range[0], CultureInfo.InvariantCulture);
                last = Math.Min(last, long.Parse(range[1], CultureInfo.InvariantCulture));
            }
            if (Location is not null)
            {
                await stream.WriteAsync(Encoding.ASCII.GetBytes($"HTTP/1.1 302 Found\r\nLocation: {Location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
                return;
            }
            int length = (int)(_ranges ? last - first + 1 : Content.Length);
            string head = _ranges
                ? $"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{Content.Length}\r\n"
                : "HTTP/1.1 200 OK\r\n";
            await stream.WriteAsync(Encoding.ASCII.GetBytes($"{head}Content-Length: {length}\r\nConnection: close\r\n\r\n"));
            await stream.WriteAsync(Content.AsMemory(_ranges ? (int)first : 0, Stalls && length > 1 ? length / 2 : length));
            await stream.FlushAsync();
            // Until the client has had enough.
            if (Stalls && length > 1)
                _ = await stream.ReadAsync(new byte[1]);
        }
    }
}
