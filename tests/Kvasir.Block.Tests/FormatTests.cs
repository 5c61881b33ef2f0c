using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.IO.Compression;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block.Formats;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The formats beside qcow2, against QEMU's programs in both directions.</summary>
public sealed class FormatTests
{
    [Theory]
    [InlineData("vmdk", "")]
    [InlineData("vmdk", "subformat=monolithicFlat")]
    [InlineData("vmdk", "subformat=streamOptimized")]
    [InlineData("vmdk", "zeroed_grain=on")]
    [InlineData("vhdx", "")]
    [InlineData("vhdx", "subformat=fixed")]
    [InlineData("vhdx", "block_size=1M,log_size=2M")]
    [InlineData("vdi", "")]
    [InlineData("vdi", "static=on")]
    [InlineData("vpc", "force_size=on")]
    [InlineData("vpc", "subformat=fixed,force_size=on")]
    public async Task Convert_agrees_in_both_directions(string format, string options)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 9_000_448, 5);
        string[] with = options.Length == 0 ? [] : ["-o", options];
        string own = folder["own." + format];
        await Peer.ImgOkAsync(["convert", "-f", "raw", "-O", format, .. with, raw, own]);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", format, raw, own);
        if (format is "vmdk" or "vhdx" or "vdi")
        {
            await Peer.OkAsync("qemu-img", "check", "-f", format, own);
            foreach (string output in new[] { "--output=human", "--output=json" })
            {
                (_, string check) = await Peer.RunAsync("qemu-img", "check", "-f", format, output, own);
                Assert.Equal((0, check), await Peer.ImgAsync("check", "-f", format, output, own));
            }
        }
        string theirs = folder["theirs." + format];
        await Peer.OkAsync("qemu-img", ["convert", "-f", "raw", "-O", format, .. with, raw, theirs]);
        // A fixed VHD has its only mark at the end, where no probe looks.
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", format, raw, theirs);
        string back = folder["back.raw"];
        await Peer.ImgOkAsync("convert", "-f", format, "-O", "raw", theirs, back);
        await Peer.OkAsync("cmp", raw, back);
        foreach (string image in new[] { own, theirs })
        {
            // QEMU knows neither where a block of a VHDX lies nor which ones are absent.
            if (format != "vhdx")
                await PeerAgreement.AgreeAsync("map", "-f", format, "--output=json", image);
            foreach (string output in new[] { "--output=human", "--output=json" })
            {
                (_, string info) = await Peer.RunAsync("qemu-img", "info", "-f", format, output, image);
                (_, string ownInfo) = await Peer.ImgAsync("info", "-f", format, output, image);
                Assert.Equal(info, ownInfo);
            }
        }
    }

    [Theory]
    [InlineData("vmdk", "")]
    [InlineData("vmdk", "zeroed_grain=on")]
    [InlineData("vmdk", "subformat=monolithicFlat")]
    [InlineData("vmdk", "subformat=streamOptimized")]
    [InlineData("vhdx", "block_size=1M")]
    [InlineData("vdi", "")]
    [InlineData("vpc", "force_size=on")]
    public async Task Random_histories_read_back_on_both_sides(string format, string options)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string path = folder["d." + format];
        const int size = 5 << 20;
        await Peer.ImgOkAsync(["create", "-q", "-f", format, .. options.Length == 0 ? Array.Empty<string>() : ["-o", options], path, "5M"]);
        byte[] content = new byte[size];
        Random random = new(format.Length + options.Length);
        for (int round = 0; round < 4; round++)
        {
            await using (BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = format, ReadOnly = false }))
            {
                Assert.Equal(size, node.Length);
                List<Task> running = [];
                for (int i = 0; i < 30; i++)
                {
                    // Requests that run together do not overlap.
                    int at = (size / 30 * i) + random.Next(1000);
                    int length = random.Next(1, (size / 30) - 1000);
                    if (random.Next(4) == 0)
                    {
                        content.AsSpan(at, length).Clear();
                        running.Add(node.WriteZeroesAsync(at, length, random.Next(2) == 0 ? ZeroFlags.MayUnmap : ZeroFlags.None).AsTask());
                    }
                    else
                    {
                        random.NextBytes(content.AsSpan(at, length));
                        running.Add(node.WriteAsync(at, content.AsMemory(at, length)).AsTask());
                    }
                }
                await Task.WhenAll(running);
                if (round % 2 == 0)
                    await node.FlushAsync();
                byte[] got = new byte[size];
                await node.ReadAsync(0, got);
                Assert.True(got.AsSpan().SequenceEqual(content));
            }
            string raw = folder["x.raw"];
            await Peer.OkAsync("qemu-img", "convert", "-f", format, "-O", "raw", path, raw);
            Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content), $"round {round}");
            if (options != "subformat=streamOptimized")
            {
                // And QEMU's writes are seen here.
                await Peer.OkAsync("qemu-io", "-f", format, "-c", $"write -P {round + 1} {round * 700_000 / 512 * 512} 300k", path);
                content.AsSpan(round * 700_000 / 512 * 512, 300 << 10).Fill((byte)(round + 1));
            }
        }
    }

    [Theory]
    [InlineData("parallels")]
    [InlineData("qed")]
    [InlineData("qcow")]
    public async Task Formats_that_are_only_read_agree(string format)
    {
        Peer.Need("qemu-io");
        using TestFolder folder = new();
        string path = folder["a." + format];
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", format, path, "40M");
        await Peer.OkAsync("qemu-io", "-f", format, "-c", "write -P 7 0 100k", "-c", "write -P 8 5M 3M", "-c", "write -P 9 39M 1M", path);
        if (format == "qed")
            await Peer.OkAsync("qemu-io", "-f", format, "-c", "write -z 6M 1M", path);
        await Peer.ImgOkAsync("compare", path, path);
        string raw = folder["a.raw"];
        await Peer.OkAsync("qemu-img", "convert", "-f", format, "-O", "raw", path, raw);
        await Peer.ImgOkAsync("compare", path, raw);
        (_, string info) = await Peer.RunAsync("qemu-img", "info", path);
        (_, string ownInfo) = await Peer.ImgAsync("info", path);
        Assert.Equal(info, ownInfo);
        (_, string map) = await Peer.RunAsync("qemu-img", "map", "--output=json", path);
        (_, string ownMap) = await Peer.ImgAsync("map", "--output=json", path);
        Assert.Equal(map, ownMap);
        BlockException refused = await Assert.ThrowsAsync<BlockException>(async () => await Image.OpenAsync(path, new OpenOptions { Format = format, ReadOnly = false }));
        Assert.Contains("only be read", refused.Message, StringComparison.Ordinal);
    }

    /// <summary>Compressed, encrypted and overlaid images of the first qcow.</summary>
    [Fact]
    public async Task Every_kind_of_qcow_image_is_read()
    {
        Peer.Need("qemu-io");
        using TestFolder folder = new();
        string basis = folder["base.raw"];
        await MakeRawAsync(basis, 3 << 20, 8);
        string packed = folder["packed.qcow"];
        // (qemu-img's own conversion to compressed qcow fails.)
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", "qcow", packed, "3M");
        await Peer.OkAsync("qemu-io", "-f", "qcow", "-c", "write -c -P 7 0 4096", "-c", "write -c -P 8 64k 4096", "-c", "write -P 9 1M 64k", packed);
        string plain = folder["plain.raw"];
        await Peer.OkAsync("qemu-img", "convert", "-f", "qcow", "-O", "raw", packed, plain);
        await Peer.ImgOkAsync("compare", "-f", "qcow", "-F", "raw", packed, plain);
        Assert.Equal((await Peer.RunAsync("qemu-img", "map", "--output=json", packed)).Output, (await Peer.ImgAsync("map", "--output=json", packed)).Output);
        string top = folder["top.qcow"];
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", "qcow", "-b", basis, "-F", "raw", top);
        await Peer.OkAsync("qemu-io", "-f", "qcow", "-c", "write -P 7 1M 100k", top);
        string raw = folder["a.raw"];
        await Peer.OkAsync("qemu-img", "convert", "-f", "qcow", "-O", "raw", top, raw);
        await Peer.ImgOkAsync("compare", "-f", "qcow", "-F", "raw", top, raw);
        string[] secret = ["--object", "secret,id=s,data=mellon"];
        string hidden = folder["hidden.qcow"];
        await Peer.OkAsync("qemu-img", ["convert", .. secret, "-O", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=s", basis, hidden]);
        await Peer.ImgOkAsync(["convert", .. secret, "--image-opts", "-O", "raw", $"driver=qcow,file.filename={hidden},encrypt.key-secret=s", raw]);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "raw", raw, basis);
        (int code, string text) = await Peer.ImgAsync("convert", "-f", "qcow", "-O", "raw", hidden, raw);
        Assert.True(code == 1 && text.Contains("encrypt.key-secret", StringComparison.Ordinal), text);
        Assert.Equal((await Peer.RunAsync("qemu-img", "info", hidden)).Output, (await Peer.ImgAsync("info", hidden)).Output);
    }

    [Fact]
    public async Task A_qed_overlay_shows_its_backing_file()
    {
        Peer.Need("qemu-io");
        using TestFolder folder = new();
        string basis = folder["base.raw"];
        await MakeRawAsync(basis, 3 << 20, 8);
        string top = folder["top.qed"];
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", "qed", "-b", basis, "-F", "raw", top);
        await Peer.OkAsync("qemu-io", "-f", "qed", "-c", "write -P 7 1M 100k", "-c", "write -z 2M 128k", top);
        string raw = folder["a.raw"];
        await Peer.OkAsync("qemu-img", "convert", "-O", "raw", top, raw);
        await Peer.ImgOkAsync("compare", top, raw);
    }

    [Fact]
    public async Task The_last_grain_of_a_stream_optimised_vmdk_may_be_short()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] content = new byte[196 * 512];
        new Random(6).NextBytes(content);
        await File.WriteAllBytesAsync(folder["a.raw"], content);
        await Peer.OkAsync("qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", folder["a.raw"], folder["a.vmdk"]);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "vmdk", folder["a.raw"], folder["a.vmdk"]);
    }

    /// <summary>Programs that write a stream know where the grain directory is only at its end: the header that counts is there.</summary>
    [Fact]
    public async Task A_stream_optimised_vmdk_with_a_footer_is_read_as_qemu_reads_it()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        await MakeRawAsync(folder["a.raw"], 3 << 20, 8);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", folder["a.raw"], folder["a.vmdk"]);
        byte[] image = await File.ReadAllBytesAsync(folder["a.vmdk"]);
        byte[] footer = image[..512];
        byte[] marker = new byte[512];
        // Marker of a footer: one sector, no data of its own, type 3.
        BinaryPrimitives.WriteInt64LittleEndian(marker, 1);
        BinaryPrimitives.WriteInt32LittleEndian(marker.AsSpan(12), 3);
        BinaryPrimitives.WriteInt64LittleEndian(image.AsSpan(56), -1);
        await File.WriteAllBytesAsync(folder["a.vmdk"], [.. image, .. new byte[(512 - (image.Length % 512)) % 512], .. marker, .. footer, .. new byte[512]]);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "vmdk", folder["a.raw"], folder["a.vmdk"]);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "vmdk", folder["a.raw"], folder["a.vmdk"]);
        // Without it there is nothing to find the grains by.
        await File.WriteAllBytesAsync(folder["a.vmdk"], image);
        Assert.Equal(1, (await Peer.ImgAsync("info", "-f", "vmdk", folder["a.vmdk"])).Code);
    }

    [Fact]
    public async Task A_cloop_image_is_read_as_qemu_reads_it()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] content = new byte[10 * 65536];
        new Random(4).NextBytes(content.AsSpan(100_000, 200_000));
        string path = folder["a.cloop"];
        await File.WriteAllBytesAsync(path, MakeCloop(content, 65536));
        string raw = folder["a.raw"];
        await File.WriteAllBytesAsync(raw, content);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "cloop", raw, path);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "cloop", raw, path);
        await Peer.ImgOkAsync("compare", raw, path);
    }

    [Fact]
    public async Task A_dmg_image_is_read_as_qemu_reads_it()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] content = new byte[40 * 16384];
        new Random(4).NextBytes(content.AsSpan(100_000, 200_000));
        string path = folder["a.dmg"];
        await File.WriteAllBytesAsync(path, MakeDmg(content, 16384, 0x8000_0005));
        string raw = folder["a.raw"];
        await File.WriteAllBytesAsync(raw, content);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "dmg", raw, path);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "dmg", raw, path);
        await Peer.ImgOkAsync("compare", raw, path);
        await File.WriteAllBytesAsync(path, MakeDmg(content, 16384, 0x8000_0006));
        (int code, string text) = await Peer.ImgAsync("info", path);
        Assert.True(code == 1 && text.Contains("bzip2, which is not read here", StringComparison.Ordinal), text);
    }

    [Theory]
    [InlineData("/etc/shadow")]
    [InlineData("../secret")]
    [InlineData("..")]
    public async Task A_vmdk_descriptor_does_not_choose_files_elsewhere(string name)
    {
        using TestFolder folder = new();
        string path = folder["a.vmdk"];
        await File.WriteAllTextAsync(path, $"# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"{name}\" 0\n");
        (int code, string text) = await Peer.ImgAsync("info", path);
        Assert.Equal(1, code);
        Assert.Contains("not a file beside it", text, StringComparison.Ordinal);
    }

    [Fact]
    public async Task Split_vmdks_are_read()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string raw = folder["a.raw"];
        await MakeRawAsync(raw, 4 << 20, 3);
        foreach (string subformat in new[] { "twoGbMaxExtentSparse", "twoGbMaxExtentFlat" })
        {
            string path = folder[subformat + ".vmdk"];
            await Peer.OkAsync("qemu-img", "convert", "-O", "vmdk", "-o", "subformat=" + subformat, raw, path);
            await Peer.ImgOkAsync("compare", raw, path);
        }
    }

    [Fact]
    public async Task A_vhdx_crash_loses_nothing_that_was_flushed()
    {
        for (int seed = 1; seed <= 20; seed++)
            await CrashVhdxAsync(seed);
    }

    private static async Task CrashVhdxAsync(int seed)
    {
        Random random = new(seed);
        const int size = 8 << 20;
        RecordingFile file = new();
        VhdxImage image = await VhdxImage.CreateAsync(file, size, 1 << 20, isFixed: false, 1 << 20);
        byte[] start = file.Content();
        file.Log.Clear();
        byte[] content = new byte[size];
        List<(int Position, byte[] Content)> stable = [(0, (byte[])content.Clone())];
        List<(int Start, int Length, int Position)> writes = [];
        for (int step = 0; step < 25; step++)
        {
            if (random.Next(4) == 0)
            {
                await image.FlushAsync();
                stable.Add((file.Log.Count, (byte[])content.Clone()));
                continue;
            }
            int at = random.Next(size);
            int length = Math.Min(size - at, random.Next(1, 3000));
            writes.Add((at, length, file.Log.Count));
            random.NextBytes(content.AsSpan(at, length));
            await image.WriteAsync(at, content.AsMemory(at, length));
        }
        for (int trial = 0; trial < 6; trial++)
        {
            int cut = random.Next(file.Log.Count + 1);
            byte[] disk = WriteLog.Replay(start, file.Log, cut, random);
            VhdxImage after = await VhdxImage.OpenAsync(new RecordingFile(disk));
            (int position, byte[] flushed) = stable.FindLast(s => s.Position <= cut);
            byte[] got = new byte[size];
            await after.ReadAsync(0, got);
            bool[] open = new bool[size];
            foreach ((int from, int length, int when) in writes)
            {
                if (when >= position)
                    open.AsSpan(from, length).Fill(true);
            }
            for (int i = 0; i < size; i++)
            {
                if (!open[i] && got[i] != flushed[i])
                    Assert.Fail($"seed {seed}, cut {cut} of {file.Log.Count}: flushed byte {i} is lost");
            }
            if (trial == 0)
                await AskQemuAsync(disk, got);
        }
    }

    /// <summary>QEMU replays the same log to the same disk.</summary>
    private static async Task AskQemuAsync(byte[] disk, byte[] expected)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string path = folder["a.vhdx"];
        await File.WriteAllBytesAsync(path, disk);
        await Peer.OkAsync("qemu-img", "check", "-r", "all", "-f", "vhdx", path);
        string raw = folder["a.raw"];
        await File.WriteAllBytesAsync(raw, expected);
        await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "vhdx", raw, path);
    }

    internal static byte[] MakeCloop(byte[] content, int blockSize)
    {
        List<byte[]> blocks = [];
        for (int at = 0; at < content.Length; at += blockSize)
        {
            using MemoryStream packed = new();
            using (ZLibStream stream = new(packed, CompressionLevel.Fastest, leaveOpen: true))
                stream.Write(content.AsSpan(at, blockSize));
            blocks.Add(packed.ToArray());
        }
        using MemoryStream image = new();
        byte[] head = new byte[136];
        "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"u8.CopyTo(head);
        BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(128), blockSize);
        BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(132), blocks.Count);
        image.Write(head);
        long offset = 136 + ((blocks.Count + 1) * 8);
        byte[] place = new byte[8];
        for (int i = 0; i <= blocks.Count; i++)
        {
            BinaryPrimitives.WriteInt64BigEndian(place, offset);
            image.Write(place);
            offset += i < blocks.Count ? blocks[i].Length : 0;
        }
        foreach (byte[] block in blocks)
            image.Write(block);
        return image.ToArray();
    }

    /// <summary>A disk in two partitions' tables, its chunks in turn packed, raw and, where they are zeros, absent.</summary>
    internal static byte[] MakeDmg(byte[] content, int chunkSize, uint packedType)
    {
        using MemoryStream image = new();
        StringBuilder list = new("<?xml version=\"1.0\"?>\n<plist><dict><key>resource-fork</key><dict><key>blkx</key><array>\n");
        int chunks = content.Length / chunkSize;
        foreach ((int first, int count) in new[] { (0, chunks / 3), (chunks / 3, chunks - (chunks / 3)) })
        {
            using MemoryStream table = new();
            byte[] head = new byte[204];
            "mish"u8.CopyTo(head);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(4), 1);
            BinaryPrimitives.WriteInt64BigEndian(head.AsSpan(8), (long)first * chunkSize / 512);
            BinaryPrimitives.WriteInt64BigEndian(head.AsSpan(16), (long)count * chunkSize / 512);
            BinaryPrimitives.WriteInt32BigEndian(head.AsSpan(200), count + 1);
            table.Write(head);
            for (int i = 0; i <= count; i++)
            {
                byte[] entry = new byte[40];
                ReadOnlySpan<byte> data = i < count ? content.AsSpan((first + i) * chunkSize, chunkSize) : [];
                bool zero = !data.ContainsAnyExcept((byte)0);
                bool packed = !zero && i % 2 == 0;
                BinaryPrimitives.WriteUInt32BigEndian(entry, i == count ? 0xffff_ffff : zero ? 0 : packed ? packedType : 1);
                BinaryPrimitives.WriteInt64BigEndian(entry.AsSpan(8), (long)i * chunkSize / 512);
                BinaryPrimitives.WriteInt64BigEndian(entry.AsSpan(16), data.Length / 512);
                BinaryPrimitives.WriteInt64BigEndian(entry.AsSpan(24), image.Length);
                long start = image.Length;
                if (packed)
                {
                    using ZLibStream stream = new(image, CompressionLevel.Fastest, leaveOpen: true);
                    stream.Write(data);
                }
                else if (!zero)
                {
                    image.Write(data);
                }
                BinaryPrimitives.WriteInt64BigEndian(entry.AsSpan(32), image.Length - start);
                table.Write(entry);
            }
            list.Append("<dict><key>Attributes</key><string>0x0050</string><key>Data</key><data>\n").Append(Convert.ToBase64String(table.ToArray(), Base64FormattingOptions.InsertLineBreaks)).Append("\n</data></dict>\n");
        }
        list.Append("</array></dict></dict></plist>\n");
        byte[] text = Encoding.ASCII.GetBytes(list.ToString());
        byte[] trailer = new byte[512];
        "koly"u8.CopyTo(trailer);
        BinaryPrimitives.WriteInt32BigEndian(trailer.AsSpan(4), 4);
        BinaryPrimitives.WriteInt32BigEndian(trailer.AsSpan(8), 512);
        BinaryPrimitives.WriteInt64BigEndian(trailer.AsSpan(0x20), image.Length);
        BinaryPrimitives.WriteInt64BigEndian(trailer.AsSpan(0xd8), image.Length);
        BinaryPrimitives.WriteInt64BigEndian(trailer.AsSpan(0xe0), text.Length);
        BinaryPrimitives.WriteInt64BigEndian(trailer.AsSpan(0x1ec), content.Length / 512);
        image.Write(text);
        image.Write(trailer);
        return image.ToArray();
    }

    private static async Task MakeRawAsync(string path, int size, int seed)
    {
        byte[] data = new byte[(size + 511) & ~511];
        Random random = new(seed);
        for (int at = 0; at < data.Length;)
        {
            int run = Math.Min(data.Length - at, random.Next(1, 300_000));
            if (random.Next(3) == 0)
                random.NextBytes(data.AsSpan(at, run));
            else if (random.Next(2) == 0)
                data.AsSpan(at, run).Fill((byte)random.Next(256));
            at += run;
        }
        await File.WriteAllBytesAsync(path, data);
    }
}
