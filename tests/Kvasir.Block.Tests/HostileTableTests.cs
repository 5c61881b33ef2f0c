using System;
using System.Buffers.Binary;
using System.IO;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block.Formats;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>VDI, VHD, QED, dmg and cloop images whose tables lie: nothing is written over, and no more memory or time taken than an image deserves.</summary>
public sealed class HostileTableTests
{
    private const int MiB = 1 << 20;

    [Fact]
    public async Task A_vdi_that_counts_too_few_blocks_keeps_them()
    {
        RecordingFile file = new();
        VdiImage image = await VdiImage.CreateAsync(file, 4 * MiB, isStatic: false);
        await image.WriteAsync(0, new byte[] { 1 });
        await image.WriteAsync(2 * MiB, new byte[] { 2 });
        byte[] bytes = file.Content();
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(0x184), 0);
        image = await VdiImage.OpenAsync(new RecordingFile(bytes));
        await image.WriteAsync(MiB, new byte[] { 3 });
        byte[] got = new byte[1];
        foreach ((long offset, byte value) in ((long, byte)[])[(0, 1), (MiB, 3), (2 * MiB, 2)])
        {
            await image.ReadAsync(offset, got);
            Assert.Equal(value, got[0]);
        }
        // One that counts more than can be has no place for another.
        bytes = file.Content();
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(0x184), 0xffff_ffff);
        RecordingFile full = new(bytes);
        image = await VdiImage.OpenAsync(full);
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await image.WriteAsync(MiB, new byte[] { 3 }));
        Assert.Contains("more than an image may have", error.Message, StringComparison.Ordinal);
        Assert.Empty(full.Log);
    }

    [Fact]
    public async Task A_vhd_has_a_footer_at_any_time_and_marks_what_is_written()
    {
        RecordingFile file = new();
        VpcImage image = await VpcImage.CreateAsync(file, 8 * MiB, isFixed: false, forceSize: true);
        long end = file.Length - 512;
        file.Log.Clear();
        await image.WriteAsync(5000, new byte[] { 1 });
        int first = file.Log.FindIndex(entry => entry.Offset < end + 512 && entry.Offset + entry.Length > end);
        int footer = file.Log.FindIndex(entry => entry.Length == 512 && entry.Data![0] == 'c');
        Assert.True(footer >= 0 && footer < first, $"{footer} {first}");
        // As other programs leave it: only the sectors that were written are marked.
        byte[] bytes = file.Content();
        bytes.AsSpan((int)end, 512).Clear();
        RecordingFile other = new(bytes);
        image = await VpcImage.OpenAsync(other);
        await image.WriteAsync(100_000, new byte[] { 2 });
        Assert.Equal(-1, other.Content().AsSpan((int)end, 512).IndexOfAnyExcept((byte)0xff));
        Assert.Equal(end, other.Log[0].Offset);
        int writes = other.Log.Count;
        await image.WriteAsync(200_000, new byte[] { 3 });
        Assert.Equal(writes + 1, other.Log.Count);
    }

    [Fact]
    public async Task A_vhd_whose_table_reaches_the_end_of_its_places_takes_no_more_blocks()
    {
        RecordingFile file = new();
        await VpcImage.CreateAsync(file, 8 * MiB, isFixed: false, forceSize: true);
        byte[] bytes = file.Content();
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(512 + 1024 + 4), 0xffff_fffd);
        RecordingFile full = new(bytes);
        VpcImage image = await VpcImage.OpenAsync(full);
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await image.WriteAsync(0, new byte[] { 1 }));
        Assert.Equal(BlockErrno.FileTooBig, error.Errno);
        Assert.Empty(full.Log);
    }

    [Fact]
    public async Task A_qed_of_large_tables_is_not_kept_in_memory()
    {
        const int table = 32 * MiB;
        const int tables = 6;
        using TestFolder folder = new();
        long span = table / 8 * (long)table;
        byte[] header = new byte[64];
        "QED\0"u8.CopyTo(header);
        BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(4), table);
        BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(8), 1);
        BinaryPrimitives.WriteInt32LittleEndian(header.AsSpan(12), 1);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(40), table);
        BinaryPrimitives.WriteInt64LittleEndian(header.AsSpan(48), tables * span);
        using (FileStream file = File.Create(folder["a"]))
        {
            file.Write(header);
            file.Position = table;
            byte[] entry = new byte[8];
            for (int i = 0; i < tables; i++)
            {
                BinaryPrimitives.WriteInt64LittleEndian(entry, (i + 2L) * table);
                file.Write(entry);
            }
            file.SetLength((tables + 2L) * table);
        }
        long before = GC.GetTotalMemory(forceFullCollection: true);
        await using BlockNode image = await Image.OpenAsync(folder["a"], new OpenOptions { Format = "qed" });
        byte[] got = new byte[512];
        for (int i = 0; i < tables; i++)
            await image.ReadAsync(i * span, got);
        long held = GC.GetTotalMemory(forceFullCollection: true) - before;
        Assert.InRange(held, 0, 4L * table);
        GC.KeepAlive(image);
    }

    [Fact]
    public async Task A_dmg_of_holes_is_known_to_be_zeros()
    {
        byte[] content = new byte[64 << 10];
        new Random(4).NextBytes(content.AsSpan(0, 8192));
        byte[] bytes = FormatTests.MakeDmg(content, 4096, 0x8000_0005);
        // The trailer says that the disk is larger than its chunks, by an exbibyte.
        BinaryPrimitives.WriteInt64BigEndian(bytes.AsSpan(bytes.Length - 512 + 0x1ec), 1L << 51);
        await using DmgImage image = await DmgImage.OpenAsync(new RecordingFile(bytes));
        Assert.Equal(1L << 60, image.Length);
        Assert.True((await image.StatusAsync(0, image.Length)).IsData);
        BlockStatus hole = await image.StatusAsync(64 << 10, image.Length);
        Assert.True(hole.IsZero);
        Assert.Equal((1L << 60) - (64 << 10), hole.Length);
    }

    [Theory]
    [InlineData(24, long.MaxValue)]
    [InlineData(204 + 24, (1L << 61) - 1)]
    [InlineData(204 + 32, long.MaxValue)]
    public async Task A_dmgs_chunks_lie_inside_the_file(int field, long value)
    {
        byte[] content = new byte[16 << 10];
        content.AsSpan().Fill(3);
        // Raw chunks first: the table's first entry is one.
        byte[] bytes = FormatTests.MakeDmg(content, 4096, 1);
        string list = Encoding.ASCII.GetString(bytes);
        int start = list.IndexOf("<data>", StringComparison.Ordinal) + 6;
        int end = list.IndexOf("</data>", StringComparison.Ordinal);
        byte[] table = Convert.FromBase64String(list[start..end]);
        BinaryPrimitives.WriteInt64BigEndian(table.AsSpan(field), value);
        if (value == (1L << 61) - 1)
            BinaryPrimitives.WriteInt64BigEndian(table.AsSpan(204 + 32), long.MaxValue);
        byte[] text = Encoding.ASCII.GetBytes("\n" + Convert.ToBase64String(table, Base64FormattingOptions.InsertLineBreaks) + "\n");
        Assert.Equal(end - start, text.Length);
        text.CopyTo(bytes.AsSpan(start));
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await DmgImage.OpenAsync(new RecordingFile(bytes)));
        Assert.Contains("outside the file", error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task A_cloop_of_too_many_blocks_is_refused_before_they_are_read()
    {
        using TestFolder folder = new();
        byte[] header = new byte[136];
        "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"u8.CopyTo(header);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(128), 512);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(132), 16 << 20);
        using (FileStream file = File.Create(folder["a"]))
        {
            file.Write(header);
            file.SetLength(256L * MiB);
        }
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await Image.OpenAsync(folder["a"], new OpenOptions { Format = "cloop" }));
        Assert.Contains("too many offsets", error.Message, StringComparison.Ordinal);
    }
}
