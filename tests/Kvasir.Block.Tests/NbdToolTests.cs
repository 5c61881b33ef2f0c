using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Nbd;
using Kvasir.Block.Qcow2;
using Kvasir.Img;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>`kvasir nbd` beside qemu-nbd: the same options give the same exports, lists, maps and complaints.</summary>
public sealed class NbdToolTests
{
    [Fact]
    public async Task Lists_are_those_of_qemu_nbd_whoever_serves_and_whoever_asks()
    {
        Peer.Need("qemu-nbd");
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        string[] options = ["-t", "-r", "-x", "exp", "-D", "a text", "-A", "-B", "b0", "-B", "b1", image];
        await using (Ours ours = await Ours.StartAsync(folder["ours"], options))
        {
            (int Code, string Text) asked = await Peer.RunAsync("qemu-nbd", "-L", "-k", folder["ours"]);
            Assert.Equal(asked, await NbdAsync("-L", "-k", folder["ours"]));
            Assert.Contains("qemu:dirty-bitmap:b1", asked.Text, StringComparison.Ordinal);
            using Process theirs = Process.Start("qemu-nbd", ["-k", folder["theirs"], .. options]);
            try
            {
                await WaitForAsync(folder["theirs"], theirs);
                (int Code, string Text) said = await Peer.RunAsync("qemu-nbd", "-L", "-k", folder["theirs"]);
                Assert.Equal(said, await NbdAsync("--list", $"--socket={folder["theirs"]}"));
                // Ours promises that several connections agree, and flushes nothing that cannot be written; the order of bitmaps is anybody's.
                Assert.Equal(Sorted(said.Text), Sorted(asked.Text.Replace("0x583 ( readonly df multi cache )", "0x48f ( readonly flush fua df cache )", StringComparison.Ordinal)));
            }
            finally
            {
                theirs.Kill();
                await theirs.WaitForExitAsync();
            }
        }
        // Over TCP, an export without a name.
        await using BlockNode disk = await Image.OpenAsync(image, new OpenOptions { Format = "qcow2" });
        await using NbdServer server = NbdServer.Start(new System.Net.IPEndPoint(System.Net.IPAddress.Loopback, 0), [new NbdExport(string.Empty, disk, false), new NbdExport("ü 2", disk, true)]);
        string port = ((System.Net.IPEndPoint)server.Address).Port.ToString(CultureInfo.InvariantCulture);
        (int Code, string Text) tcp = await Peer.RunAsync("qemu-nbd", "-L", "-b", "127.0.0.1", "-p", port);
        Assert.Equal(tcp, await NbdAsync("-L", "-b", "127.0.0.1", "-p", port));
        Assert.StartsWith("exports available: 2\n export: ''\n", tcp.Text, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Maps_of_bitmaps_and_depth_are_those_of_qemu_nbd()
    {
        Peer.Need("qemu-nbd");
        Peer.Need("nbdinfo");
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        string[] options = ["-t", "-r", "-A", "-B", "b0", "-B", "below", image];
        await using Ours ours = await Ours.StartAsync(folder["ours"], options);
        using Process theirs = Process.Start("qemu-nbd", ["-k", folder["theirs"], .. options]);
        try
        {
            await WaitForAsync(folder["theirs"], theirs);
            foreach (string context in (string[])["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:below"])
            {
                (int Code, string Text) expected = await Peer.RunAsync("nbdinfo", $"--map={context}", Uri(folder["theirs"]));
                Assert.Equal(0, expected.Code);
                Assert.True(expected.Text.Split('\n').Length > 3, expected.Text);
                Assert.Equal(expected, await Peer.RunAsync("nbdinfo", $"--map={context}", Uri(folder["ours"])));
            }
        }
        finally
        {
            theirs.Kill();
            await theirs.WaitForExitAsync();
        }
    }

    [Fact]
    public async Task A_recording_bitmap_is_shown_as_it_grows_and_kept()
    {
        Peer.Need("nbdinfo");
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string image = folder["a.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", image, "1M");
        await Peer.ImgOkAsync("bitmap", "--add", image, "b");
        await using (Ours ours = await Ours.StartAsync(folder["s"], ["-t", "-B", "b", image]))
        {
            Assert.Equal(Map((1 << 20, "0  clean")), await MapAsync(folder["s"]));
            await using (BlockNode client = await Image.OpenAsync(Uri(folder["s"]), new OpenOptions { Format = "raw", ReadOnly = false }))
                await client.WriteAsync(200_000, new byte[] { 1 });
            Assert.Equal(Map((196608, "0  clean"), (65536, "1  dirty"), (786432, "0  clean")), await MapAsync(folder["s"]));
        }
        await using BlockNode node = await Image.OpenAsync(image, new OpenOptions { Format = "qcow2" });
        Qcow2BitmapInfo bitmap = Assert.Single(await Qcow2Bitmaps.ListAsync((Qcow2Image)node));
        Assert.False(bitmap.InUse);
        Assert.Equal([8, 0], await Qcow2Bitmaps.ReadBitsAsync((Qcow2Image)node, bitmap));

        async Task<string> MapAsync(string socket) => (await Peer.RunAsync("nbdinfo", "--map=qemu:dirty-bitmap:b", Uri(socket))).Output;
    }

    [Fact]
    public async Task A_window_shows_the_image_and_its_contexts_from_its_offset()
    {
        Peer.Need("nbdinfo");
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        await using Ours ours = await Ours.StartAsync(folder["s"], ["-t", "-o", "0x110000", "-A", "-B", "b0", image]);
        await using (BlockNode whole = await Image.OpenAsync(image, new OpenOptions { Format = "qcow2", ForceShare = true }))
        await using (BlockNode window = await Image.OpenAsync(Uri(folder["s"]), new OpenOptions { Format = "raw", ReadOnly = false }))
        {
            Assert.Equal(whole.Length - 0x110000, window.Length);
            byte[] expected = new byte[window.Length];
            byte[] got = new byte[window.Length];
            await whole.ReadAsync(0x110000, expected);
            await window.ReadAsync(0, got);
            Assert.True(got.AsSpan().SequenceEqual(expected));
            await window.WriteAsync(window.Length - 4, "last"u8.ToArray());
            await Assert.ThrowsAsync<BlockException>(async () => await window.WriteAsync(window.Length - 3, "last"u8.ToArray()));
        }
        Assert.Equal(Map((983040, "0  absent"), (1048576, "2  backing depth 2"), (983040, "0  absent"), (65536, "1  local")), (await Peer.RunAsync("nbdinfo", "--map=qemu:allocation-depth", Uri(folder["s"]))).Output);
        string bits = (await Peer.RunAsync("nbdinfo", "--map=qemu:dirty-bitmap:b0", Uri(folder["s"]))).Output;
        Assert.StartsWith(Map((3014656, "0  clean"))[..^1], bits, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_window_ends_where_its_image_does()
    {
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        await using Ours ours = await Ours.StartAsync(folder["s"], ["-t", "-o", "1", image]);
        await using NbdClient window = await NbdClient.ConnectAsync(NbdAddress.Parse(Uri(folder["s"])), readOnly: true, null);
        Assert.Equal((4 << 20) - 1, window.Length);
        byte[] got = new byte[512];
        await window.ReadAsync(window.Length - got.Length, got);
        Assert.Equal(3, got[^1]);
    }

    [Fact]
    public async Task Snapshots_are_served_read_only()
    {
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        foreach (string parameter in (string[])["1", "first", "snapshot.id=1", "snapshot.name=first", "snapshot.id=1,snapshot.name=first"])
        {
            await using Ours ours = await Ours.StartAsync(folder["s"], ["-t", "-l", parameter, image]);
            await using BlockNode client = await Image.OpenAsync(Uri(folder["s"]), new OpenOptions { Format = "raw", ReadOnly = false });
            Assert.True(client.IsReadOnly);
            byte[] got = new byte[2];
            await client.ReadAsync((1 << 20) - 1, got);
            Assert.Equal([1, 0], got);
        }
        foreach (string parameter in (string[])["none", "snapshot.id=first", "snapshot.id=1,snapshot.name=second", "snapshot.id=1,foo=2"])
            await SameFailureAsync(folder, "-l", parameter, image);
    }

    [Fact]
    public async Task Complaints_are_those_of_qemu_nbd()
    {
        Peer.Need("qemu-nbd");
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        foreach (string[] line in (string[][])
            [
                ["-B", "none", image], ["-o", "5M", image], ["-o", "x", image], ["--tls-authz=x", image], ["--tls-creds=x", image], ["-L", image], ["-L", "-A"], ["-L", "-x", "e"], ["-L", "-o", "1"], ["-L", "--fork"],
                ["-L", "--tls-creds=x"],
            ])
            await SameFailureAsync(folder, line);
        // What differs in words says what to do.
        foreach ((string[] line, string part) in ((string[], string)[])
            [
                (["-c", "/dev/nbd0", image], "nbd-client"), (["-d", "/dev/nbd0"], "nbd-client"), (["-o", "99999999999", image], "offset"), (["-L", "-k", folder["none"]], "Failed to connect"),
                (["-x", new string('x', 4097), image], "too long"), (["--pid-file", folder["none/pid"], image], "Could not create"), (["--selinux-label", "no label", image], "SELinux"),
            ])
        {
            (int code, string text) = await NbdAsync(["-k", folder["o"], .. line]);
            Assert.True(code == 1 && text.Contains(part, StringComparison.Ordinal), text);
            Assert.False(File.Exists(folder["o"]));
        }
        await SameFailureAsync(folder, "-T", "foo", "--trace=bar", "-B", "none", image);
    }

    [Fact]
    public async Task Bitmaps_that_a_crash_left_open_are_refused()
    {
        using TestFolder folder = new();
        string image = folder["a.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", image, "1M");
        await Peer.ImgOkAsync("bitmap", "--add", image, "b");
        await using BlockNode writer = await Image.OpenAsync(image, new OpenOptions { Format = "qcow2", ReadOnly = false });
        await writer.WriteAsync(0, new byte[512]);
        await writer.FlushAsync();
        File.Copy(image, folder["copy"]);
        (int code, string text) = await NbdAsync("-k", folder["s"], "-f", "qcow2", "-r", "-B", "b", folder["copy"]);
        Assert.Equal((1, "qemu-nbd: Bitmap 'b' is inconsistent and cannot be used\n"), (code, text));
    }

    [Fact]
    public async Task A_server_that_never_ends_its_list_is_left()
    {
        using TestFolder folder = new();
        foreach (uint endless in (uint[])[3, 6, 10])
        {
            using Socket listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            listener.Bind(new UnixDomainSocketEndPoint(folder[$"s{endless}"]));
            listener.Listen();
            using CancellationTokenSource stop = new();
            Task server = Task.Run(async () =>
            {
                using NetworkStream stream = new(await listener.AcceptAsync(stop.Token), ownsSocket: true);
                await HostileServer.ListAsync(stream, endless, stop.Token);
            });
            (int code, string text) = await NbdAsync("-L", "-k", folder[$"s{endless}"]).WaitAsync(TimeSpan.FromSeconds(60));
            Assert.True(code == 1 && text.StartsWith("qemu-nbd: The NBD server ", StringComparison.Ordinal), text);
            await stop.CancelAsync();
            await server.ContinueWith(_ => { }, TaskScheduler.Default);
        }
    }

    [Fact]
    public void A_bitmaps_runs_are_found_bit_by_bit()
    {
        Random random = new(4);
        for (int round = 0; round < 300; round++)
        {
            int granularity = random.Next(9, 12);
            byte[] bits = new byte[random.Next(1, 12)];
            for (int i = 0; i < bits.Length; i++)
                bits[i] = random.Next(3) switch { 0 => 0, 1 => 0xff, _ => (byte)random.Next(256) };
            long whole = (bits.Length + random.Next(3)) * 8L << granularity;
            long offset = random.NextInt64(whole);
            long length = random.NextInt64(1, whole - offset + 1);
            bool At(long place) => place >> granularity >> 3 is long at && at < bits.Length && (bits[at] & (1 << (int)((place >> granularity) & 7))) != 0;
            (long run, bool dirty) = Qcow2BitmapTracker.RunAt(bits, granularity, offset, length);
            Assert.Equal(At(offset), dirty);
            Assert.InRange(run, 1, length);
            for (long place = offset; place < offset + run; place += 1 << 9)
                Assert.Equal(dirty, At(place));
            Assert.True(run == length || At(offset + run) != dirty, $"round {round}");
        }
    }

    [Fact]
    public async Task A_background_server_listens_before_its_starter_ends()
    {
        string program = Environment.GetEnvironmentVariable("KVASIR") ?? KillTests.Built();
        if (!File.Exists(program))
            Assert.Skip("the kvasir command is not built: run ./kvasir once");
        using TestFolder folder = new();
        string image = await ImageAsync(folder);
        (int code, string text) = await Peer.RunAsync(program, "nbd", "--fork", "-t", "-v", "-k", folder["s"], "--pid-file", folder["pid"], image);
        Assert.Equal((0, $"listening on {folder["s"]}\n"), (code, text));
        using Process server = Process.GetProcessById(int.Parse(await File.ReadAllTextAsync(folder["pid"]), CultureInfo.InvariantCulture));
        try
        {
            string id = server.Id.ToString(CultureInfo.InvariantCulture);
            Assert.Equal(id, (await File.ReadAllTextAsync($"/proc/{id}/stat")).Split(") ")[1].Split(' ')[3]);
            foreach (int stream in (int[])[0, 1, 2])
                Assert.Equal("/dev/null", File.ResolveLinkTarget($"/proc/{id}/fd/{stream}", false)!.FullName);
            Assert.Equal("/", Directory.ResolveLinkTarget($"/proc/{id}/cwd", false)!.FullName);
            (code, text) = await NbdAsync("-L", "-k", folder["s"]);
            Assert.Equal(0, code);
        }
        finally
        {
            await Peer.OkAsync("sh", "-c", string.Create(CultureInfo.InvariantCulture, $"kill {server.Id}"));
            await server.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(60));
        }
        Assert.False(File.Exists(folder["s"]));
        (code, text) = await Peer.RunAsync(program, "nbd", "--fork", "-k", folder["s"], folder["none"]);
        Assert.True(code == 1 && text.Contains("No such file or directory", StringComparison.Ordinal), text);
    }

    private static string Uri(string socket) => $"nbd+unix:///?socket={socket}";

    private static string Sorted(string text)
    {
        string[] lines = text.Split('\n');
        Array.Sort(lines, StringComparer.Ordinal);
        return string.Join('\n', lines);
    }

    /// <summary>What nbdinfo --map prints.</summary>
    private static string Map(params (long Length, string State)[] extents)
    {
        long at = 0;
        string text = string.Empty;
        foreach ((long length, string state) in extents)
        {
            text += string.Create(CultureInfo.InvariantCulture, $"{at,10}  {length,10}    {state}\n");
            at += length;
        }
        return text;
    }

    /// <summary>An overlay of 4 MiB with a snapshot, a hole to its backing image, and bitmaps of its own and below.</summary>
    private static async Task<string> ImageAsync(TestFolder folder)
    {
        (string below, string image) = (folder["base.qcow2"], folder["a.qcow2"]);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", below, "4M");
        await Peer.ImgOkAsync("bitmap", "--add", below, "below");
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 5 2M 1M", below)).Code);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", image);
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 1 0 1M", image)).Code);
        await Peer.ImgOkAsync("snapshot", "-c", "first", image);
        await Peer.ImgOkAsync("bitmap", "--add", image, "b0");
        await Peer.ImgOkAsync("bitmap", "--add", "--disable", image, "b1");
        Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 2 1M 64k", "-c", "write -P 3 4032k 64k", image)).Code);
        return image;
    }

    private static async Task<(int Code, string Text)> NbdAsync(params string[] args)
    {
        using StringWriter output = new();
        int code = await new NbdTool("qemu-nbd", output, output).RunAsync(args);
        return (code, output.ToString());
    }

    private static async Task SameFailureAsync(TestFolder folder, params string[] args)
    {
        Peer.Need("qemu-nbd");
        string[] line = Array.IndexOf(args, "-L") >= 0 ? args : ["-k", folder["s"], .. args];
        (int Code, string Text) theirs = await Peer.RunAsync("qemu-nbd", line);
        (int Code, string Text) ours = await NbdAsync(line);
        Assert.Equal(1, ours.Code);
        // A wrong -l takes two lines there.
        Assert.Equal((theirs.Code, theirs.Text.Split('\n')[0]), (ours.Code, ours.Text.Split('\n')[0]));
    }

    private static async Task WaitForAsync(string socket, Process server)
    {
        while (!File.Exists(socket))
        {
            Assert.False(server.HasExited, "qemu-nbd ended");
            await Task.Delay(20);
        }
    }

    /// <summary>Our server in this process.</summary>
    private sealed class Ours : IAsyncDisposable
    {
        private readonly CancellationTokenSource _stop = new();
        private readonly StringWriter _output = new();
        private readonly Task<int> _server;

        private Ours(string[] args) => _server = new NbdTool("qemu-nbd", _output, _output).RunAsync(args, _stop.Token);

        public static async Task<Ours> StartAsync(string socket, string[] options)
        {
            Ours ours = new(["-k", socket, .. options]);
            while (!File.Exists(socket))
            {
                Assert.False(ours._server.IsCompleted, ours._output.ToString());
                await Task.Delay(5);
            }
            return ours;
        }

        public async ValueTask DisposeAsync()
        {
            await _stop.CancelAsync();
            Assert.Equal(0, await _server.WaitAsync(TimeSpan.FromSeconds(60)));
            _stop.Dispose();
            await _output.DisposeAsync();
        }
    }

    /// <summary>A server that repeats a reply for ever: to the option 3 (list), 6 (info) or 10 (here: 9, the contexts).</summary>
    private static class HostileServer
    {
        public static async Task ListAsync(NetworkStream stream, uint endless, CancellationToken stop)
        {
            await stream.WriteAsync(Convert.FromHexString("4e42444d41474943" + "49484156454f5054" + "0003"), stop);
            await stream.ReadExactlyAsync(new byte[4], stop);
            byte[] head = new byte[16];
            while (true)
            {
                await stream.ReadExactlyAsync(head, stop);
                uint option = System.Buffers.Binary.BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(8));
                await stream.ReadExactlyAsync(new byte[System.Buffers.Binary.BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(12))], stop);
                (byte kind, byte[] data) = option switch
                {
                    3 => ((byte)2, new byte[] { 0, 0, 0, 1, (byte)'e' }),
                    6 => ((byte)3, new byte[] { 0, 1 }),
                    9 => ((byte)4, new byte[] { 0, 0, 0, 1, (byte)'c' }),
                    _ => ((byte)1, []),
                };
                bool forever = option == (endless == 10 ? 9 : endless);
                do
                {
                    if (kind != 1)
                        await ReplyAsync(stream, option, kind, data, stop);
                }
                while (forever);
                await ReplyAsync(stream, option, 1, [], stop);
            }
        }

        private static async Task ReplyAsync(NetworkStream stream, uint option, byte kind, byte[] data, CancellationToken stop)
        {
            List<byte> reply = [.. Convert.FromHexString("0003e889045565a9"), 0, 0, 0, (byte)option, 0, 0, 0, kind, 0, 0, 0, (byte)data.Length, .. data];
            await stream.WriteAsync(reply.ToArray(), stop);
        }
    }
}
