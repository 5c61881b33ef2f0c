using System;
using System.Diagnostics;
using System.IO;
using System.Net.Sockets;
using System.Threading.Tasks;
using Kvasir.Block.Nbd;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The tool and the formats against QEMU's own programs.</summary>
public sealed class PeerTests
{
    [Theory]
    [InlineData("cluster_size=65536")]
    [InlineData("cluster_size=512")]
    [InlineData("cluster_size=2M")]
    [InlineData("compat=0.10")]
    [InlineData("extended_l2=on,cluster_size=128k")]
    [InlineData("refcount_bits=1")]
    [InlineData("refcount_bits=64")]
    [InlineData("preallocation=metadata")]
    [InlineData("preallocation=full")]
    [InlineData("lazy_refcounts=on")]
    [InlineData("compression_type=zstd")]
    [InlineData("data_file=ext.data")]
    public async Task Convert_agrees_in_both_directions(string options)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 3_000_320, 5);
        string own = folder["own.qcow2"];
        await Peer.ImgOkAsync("convert", "-O", "qcow2", "-o", options.Replace("ext.data", folder["ext1.data"], StringComparison.Ordinal), raw, own);
        await Peer.OkAsync("qemu-img", "check", own);
        await Peer.OkAsync("qemu-img", "compare", raw, own);
        string theirs = folder["theirs.qcow2"];
        await Peer.OkAsync("qemu-img", "convert", "-O", "qcow2", "-o", options.Replace("ext.data", folder["ext2.data"], StringComparison.Ordinal), raw, theirs);
        await Peer.ImgOkAsync("check", theirs);
        await Peer.ImgOkAsync("compare", raw, theirs);
        string back = folder["back.raw"];
        await Peer.ImgOkAsync("convert", "-O", "raw", theirs, back);
        await Peer.OkAsync("cmp", raw, back);
        if (!options.Contains("data_file", StringComparison.Ordinal))
        {
            string packed = folder["packed.qcow2"];
            await Peer.ImgOkAsync("convert", "-c", "-O", "qcow2", "-o", options.Contains("preallocation", StringComparison.Ordinal) ? "cluster_size=64k" : options, raw, packed);
            await Peer.OkAsync("qemu-img", "check", packed);
            await Peer.OkAsync("qemu-img", "compare", raw, packed);
        }
    }

    [Fact]
    public async Task Human_and_json_output_is_that_of_qemu()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string basis = folder["base.qcow2"];
        string top = folder["top.qcow2"];
        (int ownCode, string ownText) = await Peer.ImgAsync("create", "-f", "qcow2", basis, "10M");
        (_, string theirText) = await Peer.RunAsync("qemu-img", "create", "-f", "qcow2", basis, "10M");
        Assert.Equal((0, theirText), (ownCode, ownText));
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", "qcow2", "-b", basis, "-F", "qcow2", top);
        await Peer.OkAsync("qemu-io", "-c", "write -P 5 0 100k", "-c", "write -z 1M 64k", "-c", "write -c -P 3 4M 64k", "-c", "write -P 7 3M 1M", basis);
        await Peer.OkAsync("qemu-io", "-c", "write -P 5 0 100k", "-c", "write -z 3M 64k", "-c", "discard 0 64k", top);
        await Peer.OkAsync("qemu-img", "snapshot", "-c", "one", top);
        foreach (string[] args in new string[][]
        {
            ["info", top], ["info", "--backing-chain", top], ["info", "--output=json", top], ["info", "--backing-chain", "--output=json", top], ["map", "--output=json", top],
            ["check", top], ["check", "--output=json", top], ["check", basis], ["snapshot", "-l", top], ["compare", basis, top], ["compare", top, top],
            ["measure", "-O", "qcow2", "--size", "1G"], ["measure", "-O", "qcow2", "--output=json", top], ["measure", "-O", "qcow2", "--size", "3T", "-o", "cluster_size=4k,refcount_bits=64"],
            ["measure", "-O", "raw", top],
        })
        {
            (int code, string text) = await Peer.RunAsync("qemu-img", args);
            (int code2, string text2) = await Peer.ImgAsync(args);
            Assert.True(code == code2 && text == text2, $"{string.Join(' ', args)}: {code} and {code2}\n--- QEMU\n{text}\n--- own\n{text2}");
        }
    }

    [Fact]
    public async Task Commit_rebase_resize_snapshot_and_bitmap_leave_good_images()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string basis = folder["base.qcow2"];
        string other = folder["other.qcow2"];
        string top = folder["top.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", basis, "8M");
        Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 1 0 4M", basis)).Code);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", other, "8M");
        Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 2 2M 4M", other)).Code);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", basis, "-F", "qcow2", top);
        Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 3 1M 128k", top)).Code);
        string before = folder["before.raw"];
        await Peer.OkAsync("qemu-img", "convert", "-O", "raw", top, before);
        await Peer.ImgOkAsync("rebase", "-b", other, "-F", "qcow2", top);
        await Peer.OkAsync("qemu-img", "compare", before, top);
        await Peer.OkAsync("qemu-img", "check", top);
        await Peer.ImgOkAsync("commit", top);
        await Peer.OkAsync("qemu-img", "compare", before, other);
        await Peer.OkAsync("qemu-img", "check", other);
        await Peer.ImgOkAsync("snapshot", "-c", "s", other);
        await Peer.OkAsync("qemu-io", "-c", "write -P 9 0 1M", other);
        await Peer.ImgOkAsync("snapshot", "-a", "s", other);
        await Peer.OkAsync("qemu-img", "compare", before, other);
        await Peer.ImgOkAsync("snapshot", "-d", "s", other);
        await Peer.OkAsync("qemu-img", "check", other);
        await Peer.ImgOkAsync("resize", "-q", other, "+5M");
        Assert.Equal(1, (await Peer.ImgAsync("resize", "-q", other, "4M")).Code);
        await Peer.ImgOkAsync("resize", "-q", "--shrink", other, "4M");
        await Peer.OkAsync("qemu-img", "check", other);
        await Peer.ImgOkAsync("bitmap", "--add", "-g", "64k", other, "b0");
        await Peer.OkAsync("qemu-io", "-c", "write 1M 64k", other);
        await Peer.ImgOkAsync("bitmap", "--add", "--merge", "b0", other, "b1");
        await Peer.OkAsync("qemu-img", "check", other);
        (_, string info) = await Peer.RunAsync("qemu-img", "info", other);
        (_, string ownInfo) = await Peer.ImgAsync("info", other);
        Assert.Equal(info, ownInfo);
        await Peer.ImgOkAsync("bitmap", "--remove", other, "b0");
        await Peer.OkAsync("qemu-img", "check", other);
        await Peer.ImgOkAsync("amend", "-o", "compat=0.10", top);
        await Peer.OkAsync("qemu-img", "check", top);
    }

    [Fact]
    public async Task Encrypted_images_open_on_both_sides()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 1 << 20, 9);
        string[] secret = ["--object", "secret,id=s,data=mellon"];
        string own = folder["own.qcow2"];
        await Peer.ImgOkAsync(["convert", .. secret, "-O", "qcow2", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", raw, own]);
        await Peer.OkAsync("qemu-img", ["compare", .. secret, "--image-opts", $"driver=raw,file.filename={raw}", $"driver=qcow2,file.filename={own},encrypt.key-secret=s"]);
        foreach (string extra in new[] { string.Empty, ",cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256", ",cipher-alg=aes-128,hash-alg=sha512", ",cipher-alg=aes-192", ",cipher-alg=serpent-256", ",cipher-alg=twofish-128,cipher-mode=cbc,ivgen-alg=plain" })
        {
            string theirs = folder["theirs.luks"];
            // On a loaded machine QEMU sometimes fails to measure its own key derivation.
            for (int attempt = 0; attempt < 10; attempt++)
            {
                (int made, string why) = await Peer.RunAsync("qemu-img", ["convert", .. secret, "-O", "luks", "-o", "key-secret=s,iter-time=100" + extra, raw, theirs]);
                Assert.True(made == 0 || (attempt < 9 && why.Contains("CPU usage", StringComparison.Ordinal)), why);
                if (made == 0)
                    break;
            }
            (int code, string text) = await Peer.ImgAsync(["compare", .. secret, "--image-opts", $"driver=raw,file.filename={raw}", $"driver=luks,file.filename={theirs},key-secret=s"]);
            Assert.True(code == 0, text);
            Assert.Equal((await Peer.RunAsync("qemu-img", "info", theirs)).Output, (await Peer.ImgAsync("info", theirs)).Output);
            string mine = folder["mine.luks"];
            await Peer.ImgOkAsync(["convert", .. secret, "-O", "luks", "-o", "key-secret=s,iter-time=10" + extra, raw, mine]);
            await Peer.OkAsync("qemu-img", ["compare", .. secret, "--image-opts", $"driver=raw,file.filename={raw}", $"driver=luks,file.filename={mine},key-secret=s"]);
        }
        await Peer.ImgOkAsync("amend", "--object", "secret,id=s,data=mellon", "--object", "secret,id=n,data=friend", "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", "--image-opts", $"driver=qcow2,file.filename={own},encrypt.key-secret=s");
        await Peer.OkAsync("qemu-img", "compare", "--object", "secret,id=n,data=friend", "--image-opts", $"driver=raw,file.filename={raw}", $"driver=qcow2,file.filename={own},encrypt.key-secret=n");
        (int wrong, string message) = await Peer.ImgAsync("convert", "--object", "secret,id=s,data=wrong", "--image-opts", "-O", "raw", $"driver=qcow2,file.filename={own},encrypt.key-secret=s", folder["no.raw"]);
        Assert.Equal(1, wrong);
        Assert.Contains("Invalid password", message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("vdi", "")]
    [InlineData("vdi", "static=on")]
    [InlineData("vpc", "force_size=on")]
    [InlineData("vpc", "force_size=on,subformat=fixed")]
    public async Task Other_formats_agree_in_both_directions(string format, string options)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 5 << 20, 3);
        string[] with = options.Length == 0 ? [] : ["-o", options];
        await Peer.ImgOkAsync(["convert", "-O", format, .. with, raw, folder["own"]]);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", format, raw, folder["own"]);
        await Peer.OkAsync("qemu-img", ["convert", "-O", format, .. with, raw, folder["theirs"]]);
        (int code, string text) = await Peer.ImgAsync("compare", "-f", "raw", "-F", format, raw, folder["theirs"]);
        Assert.True(code == 0, text);
    }

    [Fact]
    public async Task Neither_program_opens_the_others_image_for_writing()
    {
        Peer.Need("qemu-io");
        using TestFolder folder = new();
        string name = folder["a.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", name, "1M");
        BlockNode open = await Image.OpenAsync(name, new OpenOptions { Format = "qcow2", ReadOnly = false });
        (int code, string text) = await Peer.RunAsync("qemu-io", "-c", "write 0 64k", name);
        Assert.True(code != 0 && text.Contains("lock", StringComparison.Ordinal), text);
        await open.DisposeAsync();
        ProcessStartInfo start = new("qemu-io", [name]) { RedirectStandardInput = true, RedirectStandardOutput = true };
        using Process holder = Process.Start(start)!;
        await holder.StandardInput.WriteLineAsync("write 0 64k");
        await holder.StandardInput.FlushAsync();
        while (await holder.StandardOutput.ReadLineAsync() is string line && !line.Contains("wrote", StringComparison.Ordinal))
            continue;
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await Image.OpenAsync(name, new OpenOptions { Format = "qcow2", ReadOnly = false }));
        Assert.Contains("lock", error.Message, StringComparison.Ordinal);
        await holder.StandardInput.WriteLineAsync("quit");
        await holder.WaitForExitAsync();
    }

    [Fact]
    public async Task Nbd_server_and_client_work_with_qemu()
    {
        Peer.Need("qemu-nbd");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 3 << 20, 11);
        string image = folder["a.qcow2"];
        await Peer.OkAsync("qemu-img", "convert", "-O", "qcow2", raw, image);
        string socket = folder["s"];
        await using (BlockNode node = await Image.OpenAsync(image, new OpenOptions { Format = "qcow2", ReadOnly = false }))
        await using (NbdServer server = NbdServer.Start(new UnixDomainSocketEndPoint(socket), [new NbdExport("disk", node, false)]))
        {
            await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "raw", raw, $"nbd+unix:///disk?socket={socket}");
            await Peer.OkAsync("qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", "-c", "write -z 1M 64k", "-c", "flush", "-c", "read -P 7 64k 128k", "-c", "read -P 0 1M 64k", $"nbd+unix:///disk?socket={socket}");
            byte[] got = new byte[128 << 10];
            await node.ReadAsync(64 << 10, got);
            Assert.False(got.AsSpan().ContainsAnyExcept((byte)7));
            await using NbdClient client = await NbdClient.ConnectAsync(NbdAddress.Parse($"nbd+unix:///disk?socket={socket}"), readOnly: false);
            byte[] data = new byte[100_000];
            new Random(4).NextBytes(data);
            await client.WriteAsync(12345, data);
            byte[] back = new byte[data.Length];
            await client.ReadAsync(12345, back);
            Assert.Equal(data, back);
            await Assert.ThrowsAsync<BlockException>(async () => await NbdClient.ConnectAsync(NbdAddress.Parse($"nbd+unix:///none?socket={socket}"), readOnly: false));
        }
        string socket2 = folder["t"];
        using Process theirs = Process.Start("qemu-nbd", ["-r", "-x", "e", "-k", socket2, "-f", "raw", raw]);
        for (int i = 0; i < 100 && !File.Exists(socket2); i++)
            await Task.Delay(50);
        (int code, string text) = await Peer.ImgAsync("compare", "-f", "raw", "-F", "raw", raw, $"nbd+unix:///e?socket={socket2}");
        Assert.True(code == 0, text);
        await theirs.WaitForExitAsync();
    }

    [Fact]
    public async Task The_legacy_encryption_is_read()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        string image = folder["a.qcow2"];
        await MakeRawAsync(raw, 3_000_320, 6);
        string[] secret = ["--object", "secret,id=s,data=mellon"];
        string options = $"driver=qcow2,file.filename={image},encrypt.key-secret=s";
        await Peer.OkAsync("qemu-img", ["convert", .. secret, "-f", "raw", "-O", "qcow2", "-o", "encrypt.format=aes,encrypt.key-secret=s", raw, image]);
        await Peer.OkAsync("qemu-io", [.. secret, "-c", "write -P 5 1000 100000", "-c", "write -z 1M 64k", "--image-opts", options]);
        await Peer.OkAsync("qemu-io", "-f", "raw", "-c", "write -P 5 1000 100000", "-c", "write -z 1M 64k", raw);
        await Peer.ImgOkAsync(["compare", .. secret, "--image-opts", options, $"driver=raw,file.filename={raw}"]);
        await Peer.ImgOkAsync(["convert", .. secret, "--image-opts", "-O", "raw", options, folder["back.raw"]]);
        await Peer.OkAsync("cmp", raw, folder["back.raw"]);
        foreach (string[] args in new string[][] { ["info", image], ["info", "--output=json", image], ["check", .. secret, "--image-opts", options], ["map", .. secret, "--output=json", "--image-opts", options] })
            await PeerAgreement.AgreeAsync(args);
        // A wrong passphrase cannot be told from the right one: the image has nothing to judge it by. Writing is refused.
        (int code, string text) = await Peer.IoAsync([.. secret, "-c", "write 0 512", "--image-opts", options]);
        Assert.True(code == 1 && text.Contains("legacy AES", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task Backing_loops_are_refused()
    {
        using TestFolder folder = new();
        string a = folder["a.qcow2"];
        string b = folder["b.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", a, "1M");
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", a, "-F", "qcow2", b);
        await Peer.ImgOkAsync("rebase", "-u", "-b", b, "-F", "qcow2", a);
        (int code, string text) = await Peer.ImgAsync("map", a);
        Assert.Equal(1, code);
        Assert.Contains("loop", text, StringComparison.Ordinal);
    }

    private static async Task MakeRawAsync(string path, int size, int seed)
    {
        byte[] data = new byte[(size + 511) & ~511];
        Random random = new(seed);
        for (int at = 0; at < data.Length;)
        {
            int run = Math.Min(data.Length - at, random.Next(1, 200_000));
            switch (random.Next(3))
            {
                case 0:
                    random.NextBytes(data.AsSpan(at, run));
                    break;
                case 1:
                    data.AsSpan(at, run).Fill((byte)random.Next(256));
                    break;
                default:
                    break;
            }
            at += run;
        }
        await File.WriteAllBytesAsync(path, data);
    }
}
