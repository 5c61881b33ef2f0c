using System;
using System.Globalization;
using System.IO;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Images on an NFS server of this host (nfs-ganesha), through libnfs.</summary>
public sealed class NfsTests
{
    [Theory]
    [InlineData(3)]
    [InlineData(4)]
    public async Task Images_on_a_server_of_this_host_are_read_and_written(int version)
    {
        await using NfsServer server = await NfsServer.StartAsync(version);
        string raw = Path.Combine(server.Export, "disk.raw");
        string qcow2 = Path.Combine(server.Export, "disk.qcow2");
        byte[] content = new byte[4 << 20];
        new Random(3).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", "qcow2", raw, qcow2);
        (int code, string text) = await Peer.ImgAsync("info", "-f", "raw", server.Url("disk.raw"));
        Assert.Equal(0, code);
        Assert.Contains("virtual size: 4 MiB", text, StringComparison.Ordinal);
        Assert.DoesNotContain("disk size: unavailable", text, StringComparison.Ordinal);
        await using (BlockNode node = await Image.OpenAsync(server.Url("disk.raw"), new OpenOptions { Format = "raw", ReadOnly = false }))
        {
            byte[] got = new byte[content.Length];
            await node.ReadAsync(0, got);
            Assert.True(got.AsSpan().SequenceEqual(content));
            new Random(4).NextBytes(content.AsSpan(123_457, 1_500_001));
            await node.WriteAsync(123_457, content.AsMemory(123_457, 1_500_001));
            await node.WriteZeroesAsync(3 << 20, 100_000);
            content.AsSpan(3 << 20, 100_000).Clear();
            await node.FlushAsync();
            // What lies past the end reads as zeros, through the node below the format.
            byte[] end = new byte[10_000];
            Array.Fill(end, (byte)1);
            await node.File!.ReadAsync(content.Length - 4_000, end);
            Assert.True(end.AsSpan(0, 4_000).SequenceEqual(content.AsSpan(content.Length - 4_000)));
            Assert.Equal(-1, end.AsSpan(4_000).IndexOfAnyExcept((byte)0));
        }
        Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content));
        // A qcow2 image grows while it is written, which the file on the server must.
        await Peer.ImgOkAsync("resize", "-q", "-f", "qcow2", server.Url("disk.qcow2"), "8M");
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 7 6M 1M", "-c", "write -z 1M 200k", server.Url("disk.qcow2"))).Code);
        await Peer.ImgOkAsync("check", "-f", "qcow2", qcow2);
        await Peer.ImgOkAsync("compare", "-f", "qcow2", "-F", "qcow2", qcow2, server.Url("disk.qcow2"));
        Assert.Equal(0, (await Peer.IoAsync("-r", "-c", "read -P 7 6M 1M", "--image-opts", $"driver=qcow2,file.driver=nfs,file.filename={server.Url("disk.qcow2")}")).Code);
        (code, text) = await Peer.ImgAsync("info", server.Url("none.raw"));
        Assert.True(code == 1 && text.Contains("Failed to open", StringComparison.Ordinal) && text.Contains("NOENT", StringComparison.Ordinal), text);
    }

    [Theory]
    [InlineData(3)]
    [InlineData(4)]
    public async Task Images_are_created_on_a_server(int version)
    {
        await using NfsServer server = await NfsServer.StartAsync(version);
        string disk = Path.Combine(server.Export, "source");
        byte[] content = new byte[3 << 20];
        new Random(5).NextBytes(content.AsSpan(1 << 20));
        await File.WriteAllBytesAsync(disk, content);
        foreach (string format in (string[])["raw", "qcow2", "vdi", "vpc", "vhdx", "vmdk"])
        {
            string name = "new." + format;
            (int code, string text) = await Peer.ImgAsync("create", "-f", format, server.Url(name), "3M");
            Assert.True(code == 0 && text.StartsWith($"Formatting '{server.Url(name)}', fmt={format}", StringComparison.Ordinal), text);
            await Peer.ImgOkAsync("info", "-f", format, Path.Combine(server.Export, name));
            // Over the image there: it is emptied first.
            await Peer.ImgOkAsync("convert", "-f", "raw", "-O", format, disk, server.Url(name));
            await Peer.ImgOkAsync("compare", "-f", "raw", "-F", format, disk, Path.Combine(server.Export, name));
            await Peer.ImgOkAsync("compare", "-f", "raw", "-F", format, disk, server.Url(name));
        }
        Assert.Equal(content.Length, new FileInfo(Path.Combine(server.Export, "new.raw")).Length);
        Assert.Equal("600", (await Peer.RunAsync("stat", "-c", "%a", Path.Combine(server.Export, "new.raw"))).Output.Trim());
        (int failed, string reason) = await Peer.ImgAsync("create", "-f", "raw", server.Url("none/new.raw"), "3M");
        Assert.True(failed == 1 && reason.Contains("Failed to create", StringComparison.Ordinal), reason);
        (failed, reason) = await Peer.ImgAsync("create", "-f", "raw", "-o", "preallocation=full", server.Url("full.raw"), "3M");
        Assert.True(failed == 1 && reason.Contains("cannot be preallocated", StringComparison.Ordinal), reason);
    }

    [Fact]
    public async Task A_server_that_goes_away_is_an_error()
    {
        NfsServer server = await NfsServer.StartAsync(4);
        await using BlockNode node = await Image.OpenAsync(server.Url("there"), new OpenOptions { Format = "raw" });
        await server.DisposeAsync();
        await Assert.ThrowsAsync<BlockException>(async () => await node.ReadAsync(0, new byte[512]));
    }

    [Fact]
    public async Task Without_a_server_the_reason_is_said()
    {
        if (!Kvasir.Linux.Libnfs.IsPresent)
            Assert.Skip("libnfs is not installed");
        string port = NfsServer.FreePort().ToString(CultureInfo.InvariantCulture);
        foreach (string command in (string[])["info", "create"])
        {
            string[] size = command == "create" ? ["1M"] : [];
            (int code, string text) = await Peer.ImgAsync([command, $"nfs://127.0.0.1/share/disk.raw?version=4&nfsport={port}", .. size]);
            Assert.True(code == 1 && text.Contains($"Failed to {(command == "info" ? "open" : "create")} 'nfs://", StringComparison.Ordinal), text);
        }
        (int other, string reason) = await Peer.ImgAsync("info", "nfs://127.0.0.1");
        Assert.True(other == 1 && reason.Contains("Failed to open", StringComparison.Ordinal), reason);
    }
}
