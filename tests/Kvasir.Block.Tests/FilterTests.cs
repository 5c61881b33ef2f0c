using System;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Filters and raw nodes over an image with a backing file: what shows through is part of what they show.</summary>
public sealed class FilterTests
{
    [Theory]
    [InlineData("driver=throttle,limits.iops-total=100000,file.driver=qcow2,file.file.filename=")]
    [InlineData("driver=blkdebug,image.driver=qcow2,image.file.filename=")]
    [InlineData("driver=raw,file.driver=qcow2,file.file.filename=")]
    [InlineData("driver=raw,offset=65536,size=458752,file.driver=qcow2,file.file.filename=")]
    public async Task An_overlay_under_a_filter_is_converted_whole(string graph)
    {
        using TestFolder folder = new();
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", folder["base"], "256k");
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 5 64k 64k", folder["base"])).Code);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", folder["top"], "512k");
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 6 192k 128k", folder["top"])).Code);
        await Peer.ImgOkAsync("convert", "-O", "raw", "--image-opts", graph + folder["top"], folder["out"]);
        byte[] expected = new byte[512 << 10];
        expected.AsSpan(64 << 10, 64 << 10).Fill(5);
        expected.AsSpan(192 << 10, 128 << 10).Fill(6);
        Assert.True((await File.ReadAllBytesAsync(folder["out"])).AsSpan().SequenceEqual(expected.AsSpan(graph.Contains("offset", StringComparison.Ordinal) ? 65536 : 0)));
    }

    [Fact]
    public async Task A_served_image_may_be_in_a_group()
    {
        using TestFolder folder = new();
        await Peer.ImgOkAsync("create", "-q", "-f", "raw", folder["raw"], "1M");
        string[] line = ["--object", "throttle-group,id=g,limits.iops-total=1000", "-k", folder["s"], "-t", "--image-opts", $"driver=throttle,throttle-group=g,file.filename={folder["raw"]}"];
        using CancellationTokenSource stop = new();
        using StringWriter output = new();
        Task<int> server = new Img.NbdTool("nbd", output, output).RunAsync(line, stop.Token);
        while (!File.Exists(folder["s"]))
        {
            Assert.False(server.IsCompleted, output.ToString());
            await Task.Delay(5);
        }
        await using (BlockNode client = await Image.OpenAsync($"nbd+unix:///?socket={folder["s"]}", new OpenOptions { Format = "raw" }))
            Assert.Equal(1 << 20, client.Length);
        await stop.CancelAsync();
        Assert.Equal(0, await server);
    }

    [Fact]
    public async Task What_a_filter_says_of_an_overlay_ends_where_the_overlay_does()
    {
        using TestFolder folder = new();
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", folder["base"], "64k");
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", folder["top"], "256k");
        await using BlockNode top = await Image.OpenAsync(folder["top"], new OpenOptions { Format = "qcow2" });
        await using RawImage window = new(top, 65536);
        BlockStatus status = await window.StatusAsync(0, long.MaxValue);
        Assert.Equal((192 << 10, true, true), (status.Length, status.IsZero, status.IsAllocated));
        Assert.Equal(0, (await ChainStatus.BelowAsync(top, 256 << 10, 1)).Length);
    }
}
