using System;
using System.Diagnostics;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Images on an NFS server of this host (nfs-ganesha), through libnfs.</summary>
public sealed class NfsTests
{
    [Fact]
    public async Task Images_on_a_server_of_this_host_are_read_and_written()
    {
        Peer.Need("ganesha.nfsd");
        if (!Kvasir.Linux.Libnfs.IsPresent)
            Assert.Skip("libnfs is not installed");
        using TestFolder folder = new();
        string export = Directory.CreateDirectory(folder["export"]).FullName;
        string raw = Path.Combine(export, "disk.raw");
        byte[] content = new byte[4 << 20];
        new Random(3).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", "qcow2", raw, Path.Combine(export, "disk.qcow2"));
        int port = FreePort();
        await File.WriteAllTextAsync(folder["conf"], $$"""
            NFS_CORE_PARAM { NFS_Port = {{port}}; Bind_addr = 127.0.0.1; NFS_Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }
            NFSV4 { Graceless = true; Minor_Versions = 0; RecoveryRoot = "{{folder["state"]}}"; }
            EXPORT { Export_Id = 1; Path = "{{export}}"; Pseudo = /share; Access_Type = RW; Squash = No_Root_Squash; Protocols = 4; Transports = TCP; SecType = sys, none; FSAL { Name = VFS; } }
            """);
        Directory.CreateDirectory(folder["state"]);
        using Process daemon = Process.Start("ganesha.nfsd", ["-F", "-L", folder["log"], "-f", folder["conf"], "-p", folder["pid"]]);
        try
        {
            string Url(string name) => $"nfs://127.0.0.1/share/{name}?version=4&nfsport={port}";
            (int code, string text) answer = (1, string.Empty);
            for (int i = 0; i < 300 && answer.code != 0 && !daemon.HasExited; i++)
            {
                await Task.Delay(100);
                answer = await Peer.ImgAsync("info", "-f", "raw", Url("disk.raw"));
            }
            if (daemon.HasExited || answer.code != 0)
                Assert.Skip($"nfs-ganesha does not serve files here: {answer.text.Trim()}");
            Assert.Contains("virtual size: 4 MiB", answer.text, StringComparison.Ordinal);
            Assert.DoesNotContain("disk size: unavailable", answer.text, StringComparison.Ordinal);
            await using (BlockNode node = await Image.OpenAsync(Url("disk.raw"), new OpenOptions { Format = "raw", ReadOnly = false }))
            {
                byte[] got = new byte[content.Length];
                await node.ReadAsync(0, got);
                Assert.True(got.AsSpan().SequenceEqual(content));
                new Random(4).NextBytes(content.AsSpan(123_457, 1_500_001));
                await node.WriteAsync(123_457, content.AsMemory(123_457, 1_500_001));
                await node.WriteZeroesAsync(3 << 20, 100_000);
                content.AsSpan(3 << 20, 100_000).Clear();
                await node.FlushAsync();
            }
            Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content));
            // A qcow2 image grows while it is written, which the file on the server must.
            await Peer.ImgOkAsync("resize", "-q", "-f", "qcow2", Url("disk.qcow2"), "8M");
            Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 7 6M 1M", "-c", "write -z 1M 200k", Url("disk.qcow2"))).Code);
            await Peer.ImgOkAsync("check", "-f", "qcow2", Path.Combine(export, "disk.qcow2"));
            await Peer.ImgOkAsync("compare", "-f", "qcow2", "-F", "qcow2", Path.Combine(export, "disk.qcow2"), Url("disk.qcow2"));
            Assert.Equal(0, (await Peer.IoAsync("-r", "-c", "read -P 7 6M 1M", "--image-opts", $"driver=qcow2,file.driver=nfs,file.filename={Url("disk.qcow2")}")).Code);
            (int code, string text) = await Peer.ImgAsync("info", Url("none.raw"));
            Assert.True(code == 1 && text.Contains("Failed to open", StringComparison.Ordinal) && text.Contains("NOENT", StringComparison.Ordinal), text);
        }
        finally
        {
            daemon.Kill();
            await daemon.WaitForExitAsync();
        }
    }

    [Fact]
    public async Task Without_a_server_the_reason_is_said()
    {
        if (!Kvasir.Linux.Libnfs.IsPresent)
            Assert.Skip("libnfs is not installed");
        (int code, string text) = await Peer.ImgAsync("info", $"nfs://127.0.0.1/share/disk.raw?version=4&nfsport={FreePort()}");
        Assert.True(code == 1 && text.Contains("Failed to open 'nfs://", StringComparison.Ordinal), text);
        (code, text) = await Peer.ImgAsync("info", "nfs://127.0.0.1");
        Assert.True(code == 1 && text.Contains("Failed to open", StringComparison.Ordinal), text);
    }

    private static int FreePort()
    {
        using TcpListener listener = new(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
