using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Growing disks of Bochs, written here after its documentation and read by QEMU's tool and ours.</summary>
public sealed class BochsTests
{
    [Theory]
    [InlineData(0x0001_0000, 512, 512)]
    [InlineData(0x0001_0000, 4096, 1)]
    [InlineData(0x0002_0000, 65536, 16)]
    [InlineData(0x0002_0000, 1 << 20, 512)]
    public async Task Disks_are_read_as_qemu_does_it(int version, int extent, int bitmap)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] content = new byte[(extent * 5) - (extent > 512 ? 512 : 0)];
        Random random = new(extent);
        for (int sector = 0; sector < content.Length / 512; sector++)
        {
            if (random.Next(3) == 0)
                random.NextBytes(content.AsSpan(sector * 512, 512));
        }
        await File.WriteAllBytesAsync(folder["raw"], content);
        await File.WriteAllBytesAsync(folder["a"], Make(content, version, extent, bitmap));
        foreach (string[] line in (string[][])[["info", folder["a"]], ["info", "--output=json", folder["a"]], ["check", folder["a"]], ["compare", "-f", "raw", "-F", "bochs", folder["raw"], folder["a"]]])
            Assert.Equal(await Peer.RunAsync("qemu-img", line), await Peer.ImgAsync(line));
        await Peer.ImgOkAsync("compare", "-f", "raw", folder["raw"], folder["a"]);
        await Peer.ImgOkAsync("convert", "-O", "qcow2", folder["a"], folder["b"]);
        await Peer.OkAsync("qemu-img", "compare", "-f", "bochs", "-F", "qcow2", folder["a"], folder["b"]);
        (int code, string text) = await Peer.IoAsync("-f", "bochs", "-c", "write 0 512", folder["a"]);
        Assert.True(code == 1 && text.Contains("can only be read", StringComparison.Ordinal), text);
    }

    [Theory]
    [InlineData(0, 0x78787878u)]
    [InlineData(32, 0x78787878u)]
    [InlineData(48, 0x78787878u)]
    [InlineData(64, 3u)]
    [InlineData(72, 0xffffffffu)]
    [InlineData(72, 3u)]
    [InlineData(80, 0u)]
    [InlineData(80, 513u)]
    [InlineData(80, 0x80000000u)]
    [InlineData(80, 0x1000000u)]
    [InlineData(92, 0x7fffffffu)]
    [InlineData(92, 0xffffffffu)]
    public async Task Headers_that_cannot_be_are_refused_in_qemus_words(int field, uint value)
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] bytes = Make(new byte[5 * 4096], 0x0002_0000, 4096, 512);
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(field), value);
        await File.WriteAllBytesAsync(folder["a"], bytes);
        (int Code, string Text) theirs = await Peer.RunAsync("qemu-img", "info", "-f", "bochs", folder["a"]);
        Assert.Equal(1, theirs.Code);
        Assert.Equal(theirs, await Peer.ImgAsync("info", "-f", "bochs", folder["a"]));
    }

    [Theory]
    [InlineData(88, 0xffff_ffff_ffff_ffff, "too small for this disk size")]
    [InlineData(76, 0x0000_1000_ffff_ffff, "Bitmap size")]
    public async Task Numbers_at_their_edge_do_not_wrap(int field, ulong value, string refused)
    {
        byte[] bytes = Make(new byte[5 * 4096], 0x0002_0000, 4096, 512);
        BinaryPrimitives.WriteUInt64LittleEndian(bytes.AsSpan(field), value);
        BlockException error = await Assert.ThrowsAsync<BlockException>(() => OpenAsync(bytes));
        Assert.Contains(refused, error.Message, StringComparison.Ordinal);

        static async Task OpenAsync(byte[] bytes)
        {
            await using BlockNode image = await Image.OpenFormatAsync(new RecordingFile(bytes), "bochs", new OpenOptions(), new ImageOptions());
        }
    }

    [Fact]
    public async Task Extents_outside_the_file_are_damage()
    {
        byte[] content = new byte[4 * 4096];
        content.AsSpan().Fill(7);
        byte[] bytes = Make(content, 0x0002_0000, 4096, 512);
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(512), 0xffff_fffe);
        await using BlockNode image = await Image.OpenFormatAsync(new RecordingFile(bytes), "bochs", new OpenOptions(), new ImageOptions());
        byte[] got = new byte[4096];
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await image.ReadAsync(0, got));
        Assert.Contains("outside the file", error.Message, StringComparison.Ordinal);
        await image.ReadAsync(4096, got);
        Assert.Equal(7, got[0]);
    }

    /// <summary>A disk whose extents lie in the file from the last to the first; sectors of zeros are left out.</summary>
    private static byte[] Make(byte[] content, int version, int extent, int bitmap)
    {
        int extents = (content.Length + extent - 1) / extent;
        byte[] header = new byte[512];
        "Bochs Virtual HD Image"u8.CopyTo(header);
        "Redolog"u8.CopyTo(header.AsSpan(32));
        "Growing"u8.CopyTo(header.AsSpan(48));
        int[] fields = [version, header.Length, extents, bitmap, extent];
        for (int i = 0; i < fields.Length; i++)
            BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(64 + (i * 4)), fields[i]);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(version == 0x0001_0000 ? 84 : 88), content.Length);
        byte[] catalog = new byte[extents * 4];
        List<byte> data = [];
        uint next = 0;
        for (int i = extents - 1; i >= 0; i--)
        {
            ReadOnlySpan<byte> part = content.AsSpan(i * extent, Math.Min(extent, content.Length - (i * extent)));
            bool any = part.ContainsAnyExcept((byte)0);
            BinaryPrimitives.WriteUInt32LittleEndian(catalog.AsSpan(i * 4), any ? next++ : 0xffff_ffff);
            if (!any)
                continue;
            byte[] bits = new byte[(bitmap + 511) / 512 * 512];
            byte[] sectors = new byte[extent];
            // What is not marked is not to be seen.
            sectors.AsSpan().Fill(0xee);
            for (int sector = 0; sector < part.Length / 512; sector++)
            {
                if (!part.Slice(sector * 512, 512).ContainsAnyExcept((byte)0))
                    continue;
                bits[sector / 8] |= (byte)(1 << (sector % 8));
                part.Slice(sector * 512, 512).CopyTo(sectors.AsSpan(sector * 512));
            }
            data.AddRange(bits);
            data.AddRange(sectors);
        }
        return [.. header, .. catalog, .. data];
    }
}
