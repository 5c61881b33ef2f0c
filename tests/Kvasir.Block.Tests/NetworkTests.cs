using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Security.Cryptography.X509Certificates;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block.Nbd;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>NBD against nbdkit, libnbd and qemu-nbd, with TLS and without; web servers with and without ranges.</summary>
public sealed class NetworkTests
{
    [Fact]
    public async Task Images_are_created_over_an_export_as_qemu_does_it()
    {
        Peer.Need("qemu-img");
        Peer.Need("qemu-nbd");
        using TestFolder folder = new();
        string raw = folder["disk.raw"];
        byte[] old = new byte[4 << 20];
        Array.Fill(old, (byte)0x55);
        await File.WriteAllBytesAsync(raw, old);
        await File.WriteAllBytesAsync(folder["source"], old[..(1 << 20)]);
        using Process server = Process.Start("qemu-nbd", ["-t", "-f", "raw", "-k", folder["s"], raw]);
        try
        {
            while (!File.Exists(folder["s"]) && !server.HasExited)
                await Task.Delay(20);
            string url = $"nbd+unix:///?socket={folder["s"]}";
            string[][] commands =
            [
                ["create", "-f", "raw", "https://127.0.0.1:9/a", "4M"], ["create", "-f", "raw", "none://a", "1M"], ["create", "-f", "raw", "null-co://", "1M"],
                ["create", "-f", "raw", url, "4M"], ["create", "-f", "raw", url, "8M"], ["create", "-f", "qcow2", url, "8M"],
                ["convert", "-f", "raw", "-O", "qcow2", folder["source"], url], ["compare", "-f", "raw", "-F", "qcow2", folder["source"], url],
            ];
            foreach (string[] command in commands)
            {
                // Each begins with the same content; only the comparison reads what the command before it left.
                if (command[0] != "compare")
                    await File.WriteAllBytesAsync(raw, old);
                (int Code, string Output) theirs = await Peer.RunAsync("qemu-img", command);
                byte[] left = await File.ReadAllBytesAsync(raw);
                if (command[0] != "compare")
                    await File.WriteAllBytesAsync(raw, old);
                Assert.Equal(theirs, await Peer.ImgAsync(command));
                // What is left of the old content at the start: the raw format has nothing of its own there.
                if (command[2] == "raw" && command[0] == "create")
                    Assert.Equal(left[..512], (await File.ReadAllBytesAsync(raw))[..512]);
            }
            await Peer.ImgOkAsync("check", "-f", "qcow2", url);
            (int code, string text) = await Peer.ImgAsync("create", "-f", "raw", "-o", "preallocation=full", url, "4M");
            Assert.True(code == 1 && text.Contains("cannot be preallocated", StringComparison.Ordinal), text);
            (code, text) = await Peer.ImgAsync("create", "-f", "vmdk", url, "1M");
            Assert.True(code == 1 && text.Contains("use raw or qcow2", StringComparison.Ordinal), text);
        }
        finally
        {
            server.Kill();
            await server.WaitForExitAsync();
        }
        (int failed, string reason) = await Peer.ImgAsync("create", "-f", "qcow2", $"nbd+unix:///?socket={folder["none"]}", "8M");
        Assert.True(failed == 1 && reason.Contains("Protocol driver 'nbd' does not support image creation, and opening the image failed: ", StringComparison.Ordinal), reason);
    }

    [Fact]
    public async Task Libnbd_reads_and_writes_our_exports()
    {
        Peer.Need("nbdcopy");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        byte[] content = new byte[3 << 20];
        new Random(2).NextBytes(content.AsSpan(1 << 20, 1 << 20));
        await File.WriteAllBytesAsync(raw, content);
        await Peer.ImgOkAsync("convert", "-O", "qcow2", raw, folder["a.qcow2"]);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", folder["b.qcow2"], "3M");
        await using BlockNode from = await Image.OpenAsync(folder["a.qcow2"], new OpenOptions { Format = "qcow2" });
        await using BlockNode to = await Image.OpenAsync(folder["b.qcow2"], new OpenOptions { Format = "qcow2", ReadOnly = false });
        await using NbdServer server = NbdServer.Start(new UnixDomainSocketEndPoint(folder["s"]), [new NbdExport("from", from, true) { Description = "a disk" }, new NbdExport("to", to, false)]);
        string uri(string export) => $"nbd+unix:///{export}?socket={folder["s"]}";
        await Peer.OkAsync("nbdcopy", uri("from"), uri("to"));
        byte[] got = new byte[content.Length];
        await to.ReadAsync(0, got);
        Assert.True(got.AsSpan().SequenceEqual(content));
        (int code, string text) = await Peer.RunAsync("nbdinfo", "--list", uri(string.Empty));
        Assert.True(code == 0 && text.Contains("\"from\"", StringComparison.Ordinal) && text.Contains("a disk", StringComparison.Ordinal), text);
        (code, string map) = await Peer.RunAsync("nbdinfo", "--map", uri("from"));
        Assert.True(code == 0 && map.Contains("hole,zero", StringComparison.Ordinal), map);
        (code, text) = await Peer.RunAsync("nbdinfo", uri("none"));
        Assert.NotEqual(0, code);
    }

    [Fact]
    public async Task Nbdkit_serves_us()
    {
        Peer.Need("nbdkit");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        byte[] content = new byte[2 << 20];
        new Random(2).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        using Process server = Process.Start("nbdkit", ["-f", "-U", folder["s"], "file", raw]);
        try
        {
            await WaitForAsync(folder["s"]);
            await using BlockNode node = await Image.OpenAsync($"nbd+unix:///?socket={folder["s"]}", new OpenOptions { Format = "raw", ReadOnly = false });
            byte[] got = new byte[content.Length];
            await node.ReadAsync(0, got);
            Assert.True(got.AsSpan().SequenceEqual(content));
            new Random(3).NextBytes(content.AsSpan(100_000, 300_000));
            await node.WriteAsync(100_000, content.AsMemory(100_000, 300_000));
            await node.WriteZeroesAsync(1 << 20, 64 << 10, ZeroFlags.MayUnmap);
            content.AsSpan(1 << 20, 64 << 10).Clear();
            await node.DiscardAsync(0, 4096);
            await node.FlushAsync();
            await node.ReadAsync(0, content.AsMemory(0, 4096));
        }
        finally
        {
            server.Kill();
            await server.WaitForExitAsync();
        }
        Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content));
    }

    [Fact]
    public async Task A_server_that_dies_fails_requests_and_no_more()
    {
        Peer.Need("nbdkit");
        using TestFolder folder = new();
        using Process server = Process.Start("nbdkit", ["-f", "-U", folder["s"], "--filter=delay", "memory", "1M", "rdelay=2"]);
        await WaitForAsync(folder["s"]);
        await using BlockNode node = await Image.OpenAsync($"nbd+unix:///?socket={folder["s"]}", new OpenOptions { Format = "raw" });
        Task read = node.ReadAsync(0, new byte[512]).AsTask();
        await Task.Delay(200);
        server.Kill();
        await Assert.ThrowsAsync<BlockException>(() => read.WaitAsync(TimeSpan.FromSeconds(10)));
        await Assert.ThrowsAsync<BlockException>(async () => await node.ReadAsync(0, new byte[512]));
    }

    [Fact]
    public async Task Tls_works_with_qemu_in_both_directions_and_refuses_strangers()
    {
        Peer.Need("qemu-nbd");
        using TestFolder folder = new();
        string pki = folder["pki"];
        string other = folder["other"];
        MakeCertificates(pki);
        MakeCertificates(other);
        string raw = folder["a.raw"];
        byte[] content = new byte[1 << 20];
        new Random(2).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        // Our server, QEMU's client.
        using (TlsCredentials credentials = TlsCredentials.Load(pki, isServer: true, verifyPeer: true))
        await using (BlockNode node = await Image.OpenAsync(raw, new OpenOptions { Format = "raw" }))
        await using (NbdServer server = NbdServer.Start(new IPEndPoint(IPAddress.Loopback, 0), [new NbdExport("e", node, true)], credentials))
        {
            string port = ((IPEndPoint)server.Address).Port.ToString(CultureInfo.InvariantCulture);
            string[] Compare(string folderOf) =>
                ["compare", "--object", $"tls-creds-x509,id=t,endpoint=client,dir={folderOf}", "--image-opts", $"driver=raw,file.filename={raw}", $"driver=nbd,host=localhost,port={port},export=e,tls-creds=t"];
            await Peer.OkAsync("qemu-img", Compare(pki));
            await Peer.ImgOkAsync(Compare(pki));
            Assert.NotEqual(0, (await Peer.RunAsync("qemu-img", Compare(other))).Code);
            Assert.NotEqual(0, (await Peer.ImgAsync(Compare(other))).Code);
            // Without TLS there is nothing to be had.
            Assert.NotEqual(0, (await Peer.RunAsync("qemu-img", "info", $"nbd://localhost:{port}/e")).Code);
        }
        // QEMU's server, our client.
        string socket = folder["s"];
        using Process theirs = Process.Start("qemu-nbd", ["-r", "-t", "-x", "e", "-k", socket, "-f", "raw", "--object", $"tls-creds-x509,id=t,endpoint=server,dir={pki}", "--tls-creds", "t", raw]);
        try
        {
            await WaitForAsync(socket);
            await Peer.ImgOkAsync("compare", "--object", $"tls-creds-x509,id=t,endpoint=client,dir={pki}", "--image-opts", $"driver=raw,file.filename={raw}", $"driver=nbd,path={socket},export=e,tls-creds=t");
            Assert.NotEqual(0, (await Peer.ImgAsync("info", "--image-opts", $"driver=nbd,path={socket},export=e")).Code);
        }
        finally
        {
            theirs.Kill();
            await theirs.WaitForExitAsync();
        }
    }

    /// <summary>Each end is held to the authority by itself: a client that trusts the server is not trusted for that.</summary>
    [Theory]
    [InlineData("own", true, true)]
    [InlineData("stranger's", true, false)]
    [InlineData("none", true, false)]
    [InlineData("stranger's", false, true)]
    [InlineData("none", false, true)]
    public async Task A_server_lets_in_whom_its_authority_knows(string certificate, bool verify, bool good)
    {
        using TestFolder folder = new();
        string pki = folder["pki"];
        MakeCertificates(pki);
        MakeCertificates(folder["other"]);
        if (certificate == "none")
        {
            File.Delete(Path.Combine(pki, "client-cert.pem"));
        }
        else if (certificate != "own")
        {
            foreach (string name in (string[])["client-cert.pem", "client-key.pem"])
                File.Copy(Path.Combine(folder["other"], name), Path.Combine(pki, name), overwrite: true);
        }
        using TlsCredentials server = TlsCredentials.Load(pki, isServer: true, verify);
        using TlsCredentials client = TlsCredentials.Load(pki, isServer: false, verifyPeer: true);
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        await using NbdServer serving = NbdServer.Start(new IPEndPoint(IPAddress.Loopback, 0), [new NbdExport(string.Empty, node, true)], server);
        NbdAddress address = new("localhost", ((IPEndPoint)serving.Address).Port, null, string.Empty, true);
        Exception? error = await Record.ExceptionAsync(async () =>
        {
            await using NbdClient connected = await NbdClient.ConnectAsync(address, readOnly: true, client);
            await connected.ReadAsync(0, new byte[512]);
        });
        if (good)
            Assert.Null(error);
        else
            Assert.IsType<BlockException>(error);
    }

    [Fact]
    public async Task A_client_trusts_its_authority_and_the_name_alone()
    {
        using TestFolder folder = new();
        MakeCertificates(folder["pki"]);
        MakeCertificates(folder["other"]);
        using TlsCredentials server = TlsCredentials.Load(folder["pki"], isServer: true, verifyPeer: false);
        using TlsCredentials friend = TlsCredentials.Load(folder["pki"], isServer: false, verifyPeer: true);
        using TlsCredentials stranger = TlsCredentials.Load(folder["other"], isServer: false, verifyPeer: true);
        using TlsCredentials trusting = TlsCredentials.Load(folder["other"], isServer: false, verifyPeer: false);
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        // The certificate is for localhost and 127.0.0.1.
        foreach (string host in (string[])["127.0.0.1", "127.0.0.2"])
        {
            await using NbdServer serving = NbdServer.Start(new IPEndPoint(IPAddress.Parse(host), 0), [new NbdExport(string.Empty, node, true)], server);
            NbdAddress address = new(host, ((IPEndPoint)serving.Address).Port, null, string.Empty, true);
            foreach ((TlsCredentials client, bool good) in ((TlsCredentials, bool)[])[(friend, host == "127.0.0.1"), (stranger, false), (trusting, true)])
            {
                Exception? error = await Record.ExceptionAsync(async () => await (await NbdClient.ConnectAsync(address, readOnly: true, client)).DisposeAsync());
                if (good)
                    Assert.Null(error);
                else
                    Assert.Contains("certificate", Assert.IsType<BlockException>(error).Message, StringComparison.Ordinal);
            }
        }
    }

    [Fact]
    public async Task Hostile_nbd_clients_end_their_own_connection_only()
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        await using NbdServer server = NbdServer.Start(new UnixDomainSocketEndPoint(folder["s"]), [new NbdExport("e", node, false)]);
        Random random = new(6);
        for (int round = 0; round < 60; round++)
        {
            using Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            await socket.ConnectAsync(new UnixDomainSocketEndPoint(folder["s"]));
            byte[] noise = new byte[random.Next(1, 3000)];
            random.NextBytes(noise);
            if (round % 2 == 0)
            {
                // A good start, then a hostile option or request.
                noise.AsSpan(0, Math.Min(4, noise.Length)).Clear();
                if (noise.Length > 24)
                {
                    Encoding.ASCII.GetBytes("IHAVEOPT", noise.AsSpan(4));
                    noise.AsSpan(12, 3).Clear();
                    noise[15] = (byte)random.Next(1, 12);
                }
            }
            try
            {
                await socket.SendAsync(noise);
                socket.Shutdown(SocketShutdown.Send);
                byte[] answer = new byte[65536];
                for (int i = 0; i < 200 && await socket.ReceiveAsync(answer).WaitAsync(TimeSpan.FromSeconds(10)) > 0; i++)
                {
                }
            }
            catch (SocketException)
            {
                // The server hung up, as it should.
            }
        }
        await using NbdClient client = await NbdClient.ConnectAsync(NbdAddress.Parse($"nbd+unix:///e?socket={folder["s"]}"), readOnly: true);
        Assert.Equal(1 << 20, client.Length);
    }

    [Fact]
    public async Task Web_files_are_read_by_ranges()
    {
        using TestFolder folder = new();
        byte[] raw = new byte[2 << 20];
        new Random(1).NextBytes(raw.AsSpan(0, 1 << 20));
        await File.WriteAllBytesAsync(folder["a.raw"], raw);
        await Peer.ImgOkAsync("convert", "-O", "qcow2", "-c", folder["a.raw"], folder["a.qcow2"]);
        byte[] image = await File.ReadAllBytesAsync(folder["a.qcow2"]);
        using WebServer server = new(image);
        (int code, string text) = await Peer.ImgAsync("compare", "-f", "raw", "-F", "qcow2", folder["a.raw"], server.Address + "image");
        Assert.True(code == 0, text);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", server.Address + "image", "-F", "qcow2", folder["top.qcow2"]);
        await Peer.ImgOkAsync("compare", "-f", "raw", folder["a.raw"], folder["top.qcow2"]);
        (code, text) = await Peer.ImgAsync("info", server.Address + "noranges");
        Assert.True(code == 1 && text.Contains("range", StringComparison.Ordinal), text);
        (code, text) = await Peer.ImgAsync("info", server.Address + "missing");
        Assert.True(code == 1 && text.Contains("404", StringComparison.Ordinal), text);
        (code, text) = await Peer.ImgAsync("convert", "-f", "raw", server.Address + "short", folder["x.raw"]);
        Assert.Equal(1, code);
    }

    private static async Task WaitForAsync(string socket)
    {
        for (int i = 0; i < 200 && !File.Exists(socket); i++)
            await Task.Delay(25);
        Assert.True(File.Exists(socket), "the server did not start");
    }

    private static void MakeCertificates(string folder)
    {
        Directory.CreateDirectory(folder);
        DateTimeOffset from = DateTimeOffset.UtcNow.AddDays(-1);
        using ECDsa authorityKey = ECDsa.Create(ECCurve.NamedCurves.nistP256);
        CertificateRequest authorityRequest = new("CN=test authority", authorityKey, HashAlgorithmName.SHA256);
        authorityRequest.CertificateExtensions.Add(new X509BasicConstraintsExtension(true, false, 0, true));
        authorityRequest.CertificateExtensions.Add(new X509KeyUsageExtension(X509KeyUsageFlags.KeyCertSign | X509KeyUsageFlags.CrlSign, true));
        using X509Certificate2 authority = authorityRequest.CreateSelfSigned(from, from.AddDays(10));
        File.WriteAllText(Path.Combine(folder, "ca-cert.pem"), authority.ExportCertificatePem());
        foreach (string end in new[] { "server", "client" })
        {
            using ECDsa key = ECDsa.Create(ECCurve.NamedCurves.nistP256);
            CertificateRequest request = new("CN=localhost", key, HashAlgorithmName.SHA256);
            SubjectAlternativeNameBuilder names = new();
            names.AddDnsName("localhost");
            names.AddIpAddress(IPAddress.Loopback);
            request.CertificateExtensions.Add(names.Build());
            request.CertificateExtensions.Add(new X509BasicConstraintsExtension(false, false, 0, true));
            request.CertificateExtensions.Add(new X509KeyUsageExtension(X509KeyUsageFlags.DigitalSignature | X509KeyUsageFlags.KeyAgreement, true));
            request.CertificateExtensions.Add(new X509EnhancedKeyUsageExtension([new Oid(end == "server" ? "1.3.6.1.5.5.7.3.1" : "1.3.6.1.5.5.7.3.2")], false));
            using X509Certificate2 certificate = request.Create(authority, from, from.AddDays(9), RandomNumberGenerator.GetBytes(8));
            File.WriteAllText(Path.Combine(folder, end + "-cert.pem"), certificate.ExportCertificatePem());
            File.WriteAllText(Path.Combine(folder, end + "-key.pem"), key.ExportPkcs8PrivateKeyPem());
        }
    }

    /// <summary>A small web server: /image with ranges, /noranges, /short (less than it says), anything else is missing.</summary>
    private sealed class WebServer : IDisposable
    {
        private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
        private readonly byte[] _content;

        public WebServer(byte[] content)
        {
            _content = content;
            _listener.Start();
            _ = Task.Run(AcceptAsync);
        }

        public string Address => $"http://127.0.0.1:{((IPEndPoint)_listener.LocalEndpoint).Port}/";

        public void Dispose() => _listener.Dispose();

        private async Task AcceptAsync()
        {
            try
            {
                while (true)
                {
                    TcpClient client = await _listener.AcceptTcpClientAsync();
                    _ = Task.Run(() => ServeAsync(client));
                }
            }
            catch (Exception error) when (error is SocketException or ObjectDisposedException)
            {
                // The test is over.
            }
        }

        private async Task ServeAsync(TcpClient client)
        {
            using TcpClient own = client;
            using StreamReader reader = new(own.GetStream(), Encoding.ASCII);
            while (await reader.ReadLineAsync() is string request)
            {
                long first = 0;
                long last = _content.Length - 1;
                while (await reader.ReadLineAsync() is { Length: > 0 } header)
                {
                    if (!header.StartsWith("Range: bytes=", StringComparison.OrdinalIgnoreCase))
                        continue;
                    string[] ends = header[13..].Split('-');
                    first = long.Parse(ends[0], CultureInfo.InvariantCulture);
                    last = Math.Min(last, long.Parse(ends[1], CultureInfo.InvariantCulture));
                }
                string path = request.Split(' ')[1];
                int length = (int)(last - first + 1);
                string head = path switch
                {
                    "/image" or "/short" => $"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/{_content.Length}\r\nContent-Length: {length}\r\n\r\n",
                    "/noranges" => $"HTTP/1.1 200 OK\r\nContent-Length: {_content.Length}\r\n\r\n",
                    _ => "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
                };
                await own.GetStream().WriteAsync(Encoding.ASCII.GetBytes(head));
                if (path == "/image" || (path == "/short" && length == 1))
                    await own.GetStream().WriteAsync(_content.AsMemory((int)first, length));
                else if (path == "/noranges")
                    await own.GetStream().WriteAsync(_content);
                else if (path == "/short")
                    return;
            }
        }
    }
}
