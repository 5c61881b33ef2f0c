using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>A loop through tgt and libiscsi on this host.</summary>
public sealed class IscsiTests
{
    private const string Target = "iqn.2026-01.test:disk";
    private static readonly TimeSpan Patience = TimeSpan.FromMinutes(2);

    [Fact]
    public async Task A_target_of_this_host_is_read_and_written()
    {
        using TestFolder folder = new();
        string raw = folder["disk.raw"];
        byte[] content = new byte[4 << 20];
        new Random(3).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        await ServeAsync(raw, async (_, port) =>
        {
            string url = $"iscsi://127.0.0.1:{port}/{Target}/1";
            await using (BlockNode node = await Image.OpenAsync(url, new OpenOptions { Format = "raw", ReadOnly = false }))
            {
                Assert.Equal(content.Length, node.Length);
                byte[] got = new byte[content.Length];
                await node.ReadAsync(0, got);
                Assert.True(got.AsSpan().SequenceEqual(content));
                new Random(4).NextBytes(content.AsSpan(123_456, 1_500_001));
                await node.WriteAsync(123_456, content.AsMemory(123_456, 1_500_001));
                await node.WriteZeroesAsync(3 << 20, 100_000);
                content.AsSpan(3 << 20, 100_000).Clear();
                await node.FlushAsync();
            }
            Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content));
            await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "raw", raw, url);
            (int code, string text) = await Peer.ImgAsync("info", $"iscsi://127.0.0.1:{port}/{Target}/7");
            Assert.True(code == 1 && text.Contains("Failed to log in", StringComparison.Ordinal), text);
            (code, text) = await Peer.ImgAsync("info", $"iscsi://127.0.0.1:{port}/iqn.2026-01.test:none/1");
            Assert.Equal(1, code);
        });
    }

    [Fact]
    public async Task A_target_that_goes_silent_fails_requests_and_lets_the_session_end()
    {
        using TestFolder folder = new();
        string raw = folder["disk.raw"];
        await File.WriteAllBytesAsync(raw, new byte[1 << 20]);
        await ServeAsync(raw, async (daemon, port) =>
        {
            string portal = string.Create(CultureInfo.InvariantCulture, $"driver=iscsi,transport=tcp,portal=127.0.0.1:{port},target={Target},lun=1");
            (int code, string text) = await Peer.ImgAsync("info", "--image-opts", portal + ",timeout=x");
            Assert.True(code == 1 && text.Contains("'x' is no number of seconds", StringComparison.Ordinal), text);
            BlockNode node = await Image.OpenAsync(ImageOptions.ParseList(portal + ",timeout=1"), new OpenOptions { ReadOnly = false });
            byte[] got = new byte[4096];
            await node.ReadAsync(0, got);
            await Signal(daemon, "STOP");
            try
            {
                BlockException failure = await Assert.ThrowsAsync<BlockException>(() => node.ReadAsync(8192, got).AsTask()).WaitAsync(Patience);
                Assert.Contains("Could not read", failure.Message, StringComparison.Ordinal);
                await node.DisposeAsync().AsTask().WaitAsync(Patience);
            }
            finally
            {
                await Signal(daemon, "CONT");
            }
        });
    }

    private static Task Signal(Process process, string name) => Peer.OkAsync("sh", "-c", string.Create(CultureInfo.InvariantCulture, $"kill -{name} {process.Id}"));

    /// <summary>Runs a test beside a target with one unit.</summary>
    private static async Task ServeAsync(string raw, Func<Process, int, Task> test)
    {
        Peer.Need("tgtd");
        Peer.Need("tgtadm");
        if (!Kvasir.Linux.Libiscsi.IsPresent)
            Assert.Skip("libiscsi is not installed");
        int port = FreePort();
        string control = (Environment.ProcessId % 30000 + 1000).ToString(CultureInfo.InvariantCulture);
        using Process daemon = Process.Start("tgtd", ["-f", "-C", control, "--iscsi", $"portal=127.0.0.1:{port}"]);
        try
        {
            string[] admin = ["-C", control, "--lld", "iscsi"];
            while (!daemon.HasExited && (await Peer.RunAsync("tgtadm", [.. admin, "--op", "show", "--mode", "system"])).Code != 0)
                await Task.Delay(50);
            if (daemon.HasExited)
                Assert.Skip("tgtd does not run here");
            await Peer.OkAsync("tgtadm", [.. admin, "--op", "new", "--mode", "target", "--tid", "1", "-T", Target]);
            await Peer.OkAsync("tgtadm", [.. admin, "--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "-b", raw]);
            await Peer.OkAsync("tgtadm", [.. admin, "--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL"]);
            await test(daemon, port);
        }
        finally
        {
            daemon.Kill();
            await daemon.WaitForExitAsync();
        }
    }

    private static int FreePort()
    {
        using TcpListener listener = new(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }
}
