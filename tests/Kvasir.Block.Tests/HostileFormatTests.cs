using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Block.Filters;
using Kvasir.Block.Formats;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>VHDX, VMDK and LUKS images whose tables lie, and writes that fail or race under them.</summary>
public sealed class HostileFormatTests
{
    private const int MiB = 1 << 20;

    /// <summary>A write or zeros that must be stable are so when they end: a flush is the last thing that the file sees, after all writes.</summary>
    [Theory]
    [InlineData("vmdk")]
    [InlineData("vhdx")]
    [InlineData("qcow2")]
    [InlineData("vdi")]
    [InlineData("vpc")]
    public async Task A_write_that_must_be_stable_is_flushed(string format)
    {
        RecordingFile file = new();
        BlockNode image = format switch
        {
            "vmdk" => await VmdkImage.CreateAsync(file, 4 * MiB, VmdkLayout.MonolithicSparse, true, null),
            "vdi" => await VdiImage.CreateAsync(file, 4 * MiB, false),
            "vpc" => await VpcImage.CreateAsync(file, 4 * MiB, false, true),
            "vhdx" => await VhdxImage.CreateAsync(file, 4 * MiB, MiB, false, MiB),
            _ => await Qcow2.Qcow2Creator.CreateAsync(file, new Qcow2.Qcow2CreateOptions { Size = 4 * MiB }),
        };
        file.Log.Clear();
        for (int i = 0; i < 2; i++)
        {
            await image.WriteAsync(MiB, new byte[] { 1, 2, 3 }, WriteFlags.ForceUnitAccess);
            Assert.True(file.Log.Count > 1 && file.Log[^1].Offset == -1);
            file.Log.Clear();
        }
        await image.WriteZeroesAsync(MiB, MiB, ZeroFlags.ForceUnitAccess);
        Assert.True(file.Log.Count > 1 && file.Log[^1].Offset == -1);
    }

    [Theory]
    [InlineData(0, "metadata")]
    [InlineData(1, "metadata")]
    [InlineData(2, "metadata")]
    [InlineData(3, "metadata")]
    [InlineData(4, "")]
    [InlineData(5, "overlap")]
    [InlineData(60, "outside")]
    public async Task A_vhdx_block_has_a_place_of_its_own(int place, string complaint)
    {
        byte[] bytes = await VhdxAsync();
        // Block 0 is at 4 MiB and block 1 at 5 MiB; the table is at 3 MiB.
        BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(3 * MiB), ((long)place * MiB) | 6);
        Exception? error = await Record.ExceptionAsync(async () => await VhdxImage.OpenAsync(new RecordingFile(bytes)));
        if (complaint.Length == 0)
            Assert.Null(error);
        else
            Assert.Contains(complaint, Assert.IsType<BlockException>(error).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData(0u, 1L << 20)]
    [InlineData(1u << 30, 1L << 20)]
    [InlineData(5000u, 1L << 20)]
    [InlineData(1u << 20, 0L)]
    [InlineData(1u << 20, 4096L)]
    [InlineData(1u << 20, long.MaxValue & ~0xf_ffffL)]
    [InlineData(1u << 20, 2L << 20)]
    [InlineData(2u << 20, 2L << 20)]
    public async Task A_vhdx_log_has_a_place_of_its_own(uint length, long offset)
    {
        byte[] bytes = await VhdxAsync();
        foreach (int header in (int[])[0x1_0000, 0x2_0000])
        {
            BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(header + 68), length);
            BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(header + 72), offset);
            BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(header + 4), VhdxLayout.Checksum(bytes.AsSpan(header, 4096), 4));
        }
        await Assert.ThrowsAsync<BlockException>(async () => await VhdxImage.OpenAsync(new RecordingFile(bytes)));
    }

    [Theory]
    [InlineData(FaultKind.Write, 3 * MiB)]
    [InlineData(FaultKind.Write, MiB)]
    [InlineData(FaultKind.Flush, -1)]
    public async Task A_vhdx_flush_that_fails_is_made_up_for_by_the_next(FaultKind kind, long offset)
    {
        RecordingFile file = new();
        FaultNode fault = new(file);
        VhdxImage image = await VhdxImage.CreateAsync(fault, 4 * MiB, MiB, false, MiB);
        await image.WriteAsync(2 * MiB, new byte[] { 1, 2, 3 });
        fault.Add(new FaultRule(kind, BlockErrno.NoSpace, offset, Once: true));
        await Assert.ThrowsAsync<BlockException>(async () => await image.FlushAsync());
        await image.FlushAsync();
        byte[] got = new byte[3];
        await (await VhdxImage.OpenAsync(new RecordingFile(file.Content()))).ReadAsync(2 * MiB, got);
        Assert.Equal([1, 2, 3], got);
    }

    /// <summary>Data, then the log that is marked as in use, then the table: each stable before the next is written.</summary>
    [Fact]
    public async Task A_vhdx_flush_keeps_to_the_logs_order()
    {
        (RecordingFile file, VhdxImage image) = await NewVhdxAsync();
        await image.WriteAsync(0, new byte[] { 1 });
        file.Log.Clear();
        await image.FlushAsync();
        // The headers are at 64 and 128 KiB, the log at 1 MiB, the table at 3 MiB; -1 is a flush.
        Assert.Equal(["flush", "header", "flush", "log", "flush", "table", "flush"], file.Log.ConvertAll(entry => entry.Offset switch
        {
            -1 => "flush",
            0x1_0000 or 0x2_0000 => "header",
            >= MiB and < 2 * MiB => "log",
            >= 3 * MiB and < 4 * MiB => "table",
            _ => "other",
        }));
        file.Log.Clear();
        await image.DisposeAsync();
        Assert.Contains(file.Log, entry => entry.Offset is 0x1_0000 or 0x2_0000);
        Assert.Equal(Guid.Empty, new Guid(file.Content().AsSpan((int)file.Log.Find(entry => entry.Offset is 0x1_0000 or 0x2_0000).Offset + 48, 16)));
    }

    /// <summary>An overlay knows its parent by an id that changes with the first write, also with one to a block that has its place already.</summary>
    [Theory]
    [InlineData(0)]
    [InlineData(2)]
    public async Task The_first_write_to_a_vhdx_gives_it_a_new_id(int block)
    {
        byte[] bytes = await VhdxAsync();
        RecordingFile file = new(bytes);
        VhdxImage image = await VhdxImage.OpenAsync(file);
        Guid before = ((IIdentifiedImage)image).Id;
        await image.ReadAsync(0, new byte[512]);
        Assert.Equal(before, ((IIdentifiedImage)image).Id);
        await Task.WhenAll(image.WriteAsync((long)block * MiB, new byte[512]).AsTask(), image.FlushAsync().AsTask(), image.WriteAsync(3L * MiB, new byte[512]).AsTask());
        Guid after = ((IIdentifiedImage)image).Id;
        Assert.NotEqual(before, after);
        await image.WriteAsync((long)block * MiB, new byte[512]);
        Assert.Equal(after, ((IIdentifiedImage)image).Id);
        await image.DisposeAsync();
        Assert.Equal(after, ((IIdentifiedImage)await VhdxImage.OpenAsync(new RecordingFile(file.Content()))).Id);
    }

    /// <summary>A log of 1 MiB has room for 128 entries of two pages; behind the newest one lie old ones, which are good but not to be replayed.</summary>
    [Fact]
    public async Task A_vhdx_log_that_has_come_round_ends_with_its_newest_entry()
    {
        const int blocks = 131;
        using TestFolder folder = new(inMemory: true);
        VhdxImage image = await VhdxImage.CreateAsync(
            await HostFile.CreateAsync(folder["a"], 0, Preallocation.Off, new HostFileOptions { Cache = CacheMode.Unsafe }), blocks * MiB, MiB, false, MiB);
        for (int i = 0; i < blocks; i++)
        {
            await image.WriteAsync((long)i * MiB, new byte[] { (byte)(i + 1) });
            await image.FlushAsync();
        }
        // As after a kill: nothing is closed.
        await using (HostFile now = HostFile.Open(folder["a"], new HostFileOptions { ReadOnly = true, Lock = false }))
        await using (HostFile copy = await HostFile.CreateAsync(folder["b"], 0, Preallocation.Off, new HostFileOptions()))
        {
            byte[] piece = new byte[MiB];
            for (long at = 0; at < now.Length; at += MiB)
            {
                await now.ReadAsync(at, piece.AsMemory(0, (int)Math.Min(MiB, now.Length - at)));
                await copy.WriteAsync(at, piece);
            }
        }
        await image.DisposeAsync();
        await using VhdxImage after = await VhdxImage.OpenAsync(HostFile.Open(folder["b"], new HostFileOptions()));
        byte[] got = new byte[1];
        for (int i = 0; i < blocks; i++)
        {
            await after.ReadAsync((long)i * MiB, got);
            Assert.Equal((byte)(i + 1), got[0]);
        }
    }

    [Fact]
    public async Task A_vhdx_that_was_cut_off_behind_its_log_is_refused()
    {
        (RecordingFile file, VhdxImage image) = await NewVhdxAsync();
        await image.WriteAsync(0, new byte[] { 1 });
        await image.FlushAsync();
        // As after a kill: the log is not empty.
        byte[] bytes = file.Content();
        await VhdxImage.OpenAsync(new RecordingFile((byte[])bytes.Clone()));
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await VhdxImage.OpenAsync(new RecordingFile(bytes[..(4 * MiB)])));
        Assert.Contains("cut off", error.Message, StringComparison.Ordinal);
    }

    /// <summary>Sixteen thousand entries of one run: looked at once each they take a moment, from each of them on they would take an hour.</summary>
    [Fact]
    public async Task A_vhdx_log_of_the_largest_size_is_read_at_once()
    {
        const int logSize = 64 * MiB;
        using TestFolder folder = new(inMemory: true);
        HostFile made = await HostFile.CreateAsync(folder["a"], 0, Preallocation.Off, new HostFileOptions());
        await (await VhdxImage.CreateAsync(made, 4 * MiB, MiB, false, logSize)).DisposeAsync();
        byte[] bytes = await File.ReadAllBytesAsync(folder["a"]);
        Guid id = Guid.NewGuid();
        foreach (int header in (int[])[0x1_0000, 0x2_0000])
        {
            id.TryWriteBytes(bytes.AsSpan(header + 48, 16));
            BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(header + 4), VhdxLayout.Checksum(bytes.AsSpan(header, 4096), 4));
        }
        for (int i = 0; i < logSize / 4096; i++)
        {
            Span<byte> entry = bytes.AsSpan(MiB + (i * 4096), 4096);
            "loge"u8.CopyTo(entry);
            BinaryPrimitives.WriteInt32LittleEndian(entry[8..], 4096);
            BinaryPrimitives.WriteInt64LittleEndian(entry[16..], i + 1);
            id.TryWriteBytes(entry.Slice(32, 16));
            BinaryPrimitives.WriteUInt32LittleEndian(entry[4..], VhdxLayout.Checksum(entry, 4));
        }
        await File.WriteAllBytesAsync(folder["a"], bytes);
        await using HostFile file = HostFile.Open(folder["a"], new HostFileOptions());
        VhdxImage image = await Task.Run(() => VhdxImage.OpenAsync(file).AsTask()).WaitAsync(TimeSpan.FromSeconds(30));
        Assert.Equal(4 * MiB, image.Length);
    }

    [Fact]
    public async Task A_vmdk_table_that_is_read_while_it_changes_is_not_kept_as_it_was()
    {
        const int tables = 3000;
        const int firstTable = 32 * 512;
        byte[] bytes = new byte[firstTable + (tables * 512)];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, VmdkExtent.Magic);
        BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan(4), 1);
        BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan(8), 1);
        BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(12), tables * 8);
        BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(20), 8);
        BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan(44), 1);
        BinaryPrimitives.WriteInt64LittleEndian(bytes.AsSpan(56), 1);
        for (int i = 0; i < tables; i++)
            BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan(512 + (i * 4)), 32 + i);
        using GatedFile file = new(new RecordingFile(bytes), firstTable);
        VmdkImage image = await VmdkImage.OpenAsync(file, new OpenOptions { ReadOnly = false });
        file.Armed = true;
        Task reader = image.ReadAsync(0, new byte[512]).AsTask();
        Task others = Task.Run(async () =>
        {
            await image.WriteAsync(0, new byte[] { 7 });
            for (int i = 1; i < tables; i++)
                await image.ReadAsync(i * 4096L, new byte[512]);
        });
        // They wait for the reader, or pass it by: then its table is old when it comes.
        await Task.WhenAny(others, Task.Delay(1000));
        file.Open();
        await reader;
        await others;
        byte[] got = new byte[1];
        await image.ReadAsync(0, got);
        Assert.Equal(7, got[0]);
    }

    [Fact]
    public async Task A_vmdk_grain_that_a_crash_took_away_gets_no_neighbour_in_its_place()
    {
        (RecordingFile file, VmdkImage image) = await NewVmdkAsync(8 * MiB, VmdkLayout.MonolithicSparse, false);
        await image.WriteAsync(0, new byte[] { 1 });
        byte[] bytes = file.Content();
        // The table's entry is there, the file's new length is not.
        VmdkImage after = await VmdkImage.OpenAsync(new RecordingFile(bytes[..^65536]), new OpenOptions { ReadOnly = false });
        await after.WriteAsync(MiB, new byte[] { 2 });
        await after.WriteAsync(0, new byte[] { 3 });
        byte[] got = new byte[1];
        await after.ReadAsync(MiB, got);
        Assert.Equal(2, got[0]);
    }

    [Fact]
    public async Task A_vmdk_tables_own_place_is_not_given_to_a_grain()
    {
        (RecordingFile file, VmdkImage image) = await NewVmdkAsync(8 * MiB, VmdkLayout.MonolithicSparse, false);
        byte[] bytes = file.Content();
        long directory = BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(56)) * 512;
        BinaryPrimitives.WriteInt32LittleEndian(bytes.AsSpan((int)directory), bytes.Length / 512);
        VmdkImage hostile = await VmdkImage.OpenAsync(new RecordingFile(bytes), new OpenOptions { ReadOnly = false });
        byte[] grain = new byte[65536];
        Array.Fill(grain, (byte)9);
        await hostile.WriteAsync(0, grain);
        byte[] got = new byte[65536];
        await hostile.ReadAsync(0, got);
        Assert.Equal(grain, got);
    }

    [Theory]
    [InlineData("RW 18014398509481983 ZERO\nRW 18014398509481983 ZERO")]
    [InlineData("RW 99999999999999999999 ZERO")]
    [InlineData("RW -1 ZERO")]
    [InlineData("RW 0 ZERO")]
    [InlineData("RW 10 FLAT \"x")]
    [InlineData("RW 10 FLAT \"\" 0")]
    [InlineData("RW 10 FLAT \"..\" 0")]
    [InlineData("RW 10 FLAT \"x\" 9223372036854775807")]
    [InlineData("RW 10 VMFSRDM \"x\" 0")]
    [InlineData("")]
    public async Task A_vmdk_descriptor_that_cannot_be_is_refused(string extents)
    {
        byte[] text = Encoding.ASCII.GetBytes($"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"custom\"\n{extents}\n");
        await Assert.ThrowsAsync<BlockException>(async () => await VmdkImage.OpenAsync(new RecordingFile(text), new OpenOptions()));
    }

    [Theory]
    [InlineData(0u)]
    [InlineData(0x7fff_ffffu)]
    [InlineData(0xffff_ffffu)]
    [InlineData(3u << 16)]
    public async Task A_vmdk_grain_of_an_impossible_packed_size_is_damaged(uint size)
    {
        (RecordingFile file, VmdkImage image) = await NewVmdkAsync(MiB, VmdkLayout.StreamOptimized, false);
        await image.WriteAsync(0, new byte[] { 1 });
        byte[] bytes = file.Content();
        // The grain's record is the last thing in the file: number, size, data.
        int at = bytes.Length - 512;
        Assert.Equal(0, BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(at)));
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(at + 8), size);
        VmdkImage hostile = await VmdkImage.OpenAsync(new RecordingFile(bytes), new OpenOptions());
        await Assert.ThrowsAsync<BlockException>(async () => await hostile.ReadAsync(0, new byte[512]));
    }

    [Fact]
    public async Task A_vmdk_has_its_tables_twice_and_both_say_the_same()
    {
        (RecordingFile file, VmdkImage image) = await NewVmdkAsync(40 * MiB, VmdkLayout.MonolithicSparse, true);
        await image.WriteAsync(100_000, new byte[300_000].AsSpan().ToArray());
        await image.WriteAsync(35 * MiB, new byte[] { 1 });
        await image.WriteZeroesAsync(131072, 65536);
        byte[] bytes = file.Content();
        int used = 0;
        long redundant = BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(48)) * 512;
        long directory = BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan(56)) * 512;
        for (int table = 0; table < 2; table++)
        {
            ReadOnlySpan<byte> first = bytes.AsSpan(BinaryPrimitives.ReadInt32LittleEndian(bytes.AsSpan((int)redundant + (table * 4))) * 512, 2048);
            ReadOnlySpan<byte> second = bytes.AsSpan(BinaryPrimitives.ReadInt32LittleEndian(bytes.AsSpan((int)directory + (table * 4))) * 512, 2048);
            Assert.True(first.SequenceEqual(second));
            used += first.ContainsAnyExcept((byte)0) ? 1 : 0;
        }
        Assert.Equal(2, used);
    }

    [Fact]
    public async Task A_flat_vmdk_whose_file_is_too_short_is_refused()
    {
        using TestFolder folder = new();
        await File.WriteAllBytesAsync(folder["flat"], new byte[1024]);
        foreach ((string line, bool good) in ((string, bool)[])[("RW 2 FLAT \"flat\" 0", true), ("RW 1 FLAT \"flat\" 1", true), ("RW 3 FLAT \"flat\" 0", false), ("RW 2 FLAT \"flat\" 1", false)])
        {
            await File.WriteAllTextAsync(folder["a.vmdk"], $"# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n{line}\n");
            (int code, string text) = await Peer.ImgAsync("info", "-f", "vmdk", folder["a.vmdk"]);
            Assert.True(code == (good ? 0 : 1), text);
        }
    }

    [Fact]
    public async Task A_vmdk_parent_that_was_written_is_not_read_in_place_of_the_old_one()
    {
        (RecordingFile file, VmdkImage parent) = await NewVmdkAsync(MiB, VmdkLayout.MonolithicSparse, false);
        await parent.WriteAsync(0, new byte[] { 5 });
        uint cid = parent.Cid;
        await parent.WriteAsync(512, new byte[] { 6 });
        Assert.Equal(cid, parent.Cid);
        byte[] bytes = file.Content();
        byte[] overlay = new RecordingFile(bytes).Content();
        VmdkImage empty = await VmdkImage.CreateAsync(new RecordingFile(overlay), MiB, VmdkLayout.MonolithicSparse, false, null);
        overlay = ((RecordingFile)empty.File).Content();
        int at = overlay.AsSpan().IndexOf("parentCID=ffffffff"u8);
        Encoding.ASCII.GetBytes(cid.ToString("x8", CultureInfo.InvariantCulture), overlay.AsSpan(at + 10));
        byte[] got = new byte[1];
        VmdkImage top = await VmdkImage.OpenAsync(new RecordingFile(overlay), new OpenOptions());
        top.SetBacking(await VmdkImage.OpenAsync(new RecordingFile(bytes), new OpenOptions()));
        await top.ReadAsync(0, got);
        Assert.Equal(5, got[0]);
        RecordingFile changed = new(bytes);
        VmdkImage written = await VmdkImage.OpenAsync(changed, new OpenOptions { ReadOnly = false });
        await written.WriteZeroesAsync(4096, 512);
        VmdkImage again = await VmdkImage.OpenAsync(new RecordingFile(overlay), new OpenOptions());
        again.SetBacking(await VmdkImage.OpenAsync(new RecordingFile(changed.Content()), new OpenOptions()));
        await Assert.ThrowsAsync<BlockException>(async () => await again.ReadAsync(0, got));
    }

    [Fact]
    public async Task A_vmdk_is_not_made_under_a_name_that_its_descriptor_cannot_hold()
    {
        using TestFolder folder = new();
        foreach (string kind in (string[])["monolithicSparse", "streamOptimized", "monolithicFlat"])
        {
            (int code, string text) = await Peer.ImgAsync("create", "-f", "vmdk", "-o", $"subformat={kind}", folder["a\" 0\nRW 9 FLAT \"b.vmdk"], "1M");
            Assert.True(code == 1 && text.Contains("quotes", StringComparison.Ordinal), text);
        }
    }

    [Theory]
    [InlineData(0, 40, 0u)]
    [InlineData(3, 40, 0u)]
    [InlineData(3, 40, 1u)]
    [InlineData(3, 40, 8u)]
    [InlineData(3, 40, 9u)]
    [InlineData(7, 40, 0xffffffffu)]
    [InlineData(7, 40, 0x7fffffffu)]
    [InlineData(3, 44, 0u)]
    [InlineData(3, 44, 4001u)]
    [InlineData(3, 0, 0u)]
    [InlineData(0, 4, 0u)]
    [InlineData(0, 4, 0xffffffffu)]
    public async Task A_luks_slot_that_cannot_be_is_refused_in_use_or_not(int slot, int field, uint value)
    {
        byte[] bytes = Luks("secret");
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(208 + (slot * 48) + field), value);
        await Assert.ThrowsAsync<BlockException>(async () => await LuksImage.OpenAsync(new RecordingFile(bytes), null));
    }

    [Theory]
    [InlineData(104, 0u)]
    [InlineData(104, 100u)]
    [InlineData(108, 0u)]
    [InlineData(108, 0xffffffffu)]
    [InlineData(108, 17u)]
    [InlineData(164, 0xffffffffu)]
    [InlineData(8, 0x78787878u)]
    [InlineData(72, 0x78787878u)]
    [InlineData(4, 0xbabe0002u)]
    public async Task A_luks_header_that_cannot_be_is_refused(int field, uint value)
    {
        byte[] bytes = Luks("secret");
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(field), value);
        await Assert.ThrowsAsync<BlockException>(async () => await LuksImage.OpenAsync(new RecordingFile(bytes), null));
    }

    /// <summary>Each of three slots is what one may ask for at most; together they are minutes of work.</summary>
    [Fact]
    public async Task Luks_slots_that_ask_for_minutes_of_work_together_are_refused()
    {
        const uint most = 1 << 27;
        byte[] bytes = Luks("secret");
        for (int slot = 0; slot < 3; slot++)
        {
            if (slot == 1)
                await OpenAsync(bytes);
            BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(208 + (slot * 48)), 0x00ac_71f3);
            BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(208 + (slot * 48) + 4), most);
        }
        BlockException error = await Assert.ThrowsAsync<BlockException>(() => OpenAsync(bytes));
        Assert.Contains("minutes", error.Message, StringComparison.Ordinal);

        // Without a passphrase: the header is judged, and no slot tried.
        static async Task OpenAsync(byte[] bytes) => await (await LuksImage.OpenAsync(new RecordingFile(bytes), null)).DisposeAsync();
    }

    /// <summary>Sectors from 2 TiB on have the numbers of those from 0 on: "plain" has 32 bits for them.</summary>
    [Fact]
    public void Plain_vectors_have_32_bits_and_plain64_all()
    {
        byte[] key = new byte[64];
        new Random(9).NextBytes(key);
        foreach (SectorIv iv in (SectorIv[])[SectorIv.Plain, SectorIv.Plain64])
        {
            foreach (SectorCipher cipher in (SectorCipher[])[SectorCipher.Xts(key, iv), SectorCipher.Cbc(key.AsSpan(0, 32), iv, System.Security.Cryptography.HashAlgorithmName.SHA256)])
            {
                byte[] low = new byte[1024];
                byte[] high = new byte[1024];
                cipher.Encrypt(5, low);
                cipher.Encrypt((1ul << 32) + 5, high);
                Assert.Equal(iv == SectorIv.Plain, low.AsSpan().SequenceEqual(high));
                cipher.Decrypt((1ul << 32) + 5, high);
                Assert.Equal(-1, high.AsSpan().IndexOfAnyExcept((byte)0));
            }
        }
    }

    /// <summary>A volume of more than 2 TiB with "plain" vectors, written by QEMU at its end and read by us, and the other way round.</summary>
    [Fact]
    public async Task A_large_volume_with_plain_vectors_is_qemus_too()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        string[] secret = ["--object", "secret,id=s,data=x"];
        string options = $"driver=luks,key-secret=s,file.filename={folder["a"]}";
        await Peer.OkAsync("qemu-img", ["create", "-q", .. secret, "-f", "luks", "-o", "key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=plain", folder["a"], "2050G"]);
        (int code, string text) = await Peer.RunAsync("qemu-io", [.. secret, "-c", "write -P 5 2049G 64k", "--image-opts", options]);
        Assert.True(code == 0, text);
        (code, text) = await Peer.IoAsync([.. secret, "-c", "read -P 5 2049G 64k", "-c", "write -P 6 2048G 4k", "--image-opts", options]);
        Assert.True(code == 0, text);
        (code, text) = await Peer.RunAsync("qemu-io", [.. secret, "-r", "-c", "read -P 6 2048G 4k", "--image-opts", options]);
        Assert.True(code == 0 && !text.Contains("failed", StringComparison.Ordinal), text);
    }

    [Fact]
    public async Task Erasing_luks_slots_is_decided_before_it_is_begun()
    {
        RecordingFile file = new(Luks("one"));
        byte[] one = "one"u8.ToArray();
        byte[] two = "two"u8.ToArray();
        LuksImage image = await LuksImage.OpenAsync(file, one);
        await image.Header.AddSlotAsync(file, 0, one, one, 5, 1);
        byte[] before = file.Content();
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.EraseSlotsAsync(file, 0, one, null, force: false));
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.EraseSlotsAsync(file, 0, two, 5, force: false));
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.EraseSlotsAsync(file, 0, null, 8, force: false));
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.EraseSlotsAsync(file, 0, null, 3, force: false));
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.AddSlotAsync(file, 0, one, two, 5, 1));
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.AddSlotAsync(file, 0, two, two, null, 1));
        Assert.Equal(before, file.Content());
        await image.Header.AddSlotAsync(file, 0, one, two, 5, 1, force: true);
        await LuksImage.OpenAsync(new RecordingFile(file.Content()), two);
        await image.Header.EraseSlotsAsync(file, 0, one, null, force: false);
        await Assert.ThrowsAsync<BlockException>(async () => await LuksImage.OpenAsync(new RecordingFile(file.Content()), one));
        await LuksImage.OpenAsync(new RecordingFile(file.Content()), two);
        await Assert.ThrowsAsync<BlockException>(async () => await image.Header.EraseSlotsAsync(file, 0, null, 5, force: false));
    }

    /// <summary>An erased slot's key material is gone from the file, not only its mark; nothing else of the file changes.</summary>
    [Fact]
    public async Task An_erased_luks_slot_leaves_nothing_behind()
    {
        RecordingFile file = new(Luks("one"));
        LuksImage image = await LuksImage.OpenAsync(file, "one"u8.ToArray());
        await image.Header.AddSlotAsync(file, 0, "one"u8.ToArray(), "two"u8.ToArray(), 1, 1);
        byte[] before = file.Content();
        await image.Header.EraseSlotsAsync(file, 0, null, 1, force: false);
        byte[] after = file.Content();
        int at = (int)image.Header.Slot(1).KeyOffset;
        int length = 64 * 4000;
        int same = 0;
        for (int i = at; i < at + length; i++)
            same += before[i] == after[i] ? 1 : 0;
        Assert.InRange(same, 0, length / 100);
        before.AsSpan(at, (length + 511) & ~511).Clear();
        after.AsSpan(at, (length + 511) & ~511).Clear();
        before.AsSpan(208 + 48, 48).Clear();
        after.AsSpan(208 + 48, 48).Clear();
        Assert.Equal(before, after);
    }

    [Fact]
    public async Task A_luks_slot_is_marked_after_its_key_is_stable()
    {
        RecordingFile file = new(Luks("one"));
        LuksImage image = await LuksImage.OpenAsync(file, "one"u8.ToArray());
        file.Log.Clear();
        await image.Header.AddSlotAsync(file, 0, "one"u8.ToArray(), "two"u8.ToArray(), 1, 1);
        Assert.Equal([image.Header.Slot(1).KeyOffset, -1, 0, -1], file.Log.ConvertAll(entry => entry.Offset));
        file.Log.Clear();
        await image.Header.EraseSlotsAsync(file, 0, null, 1, force: false);
        // The mark goes first: a half erased key never looks like one.
        Assert.Equal([0, -1], file.Log.ConvertAll(entry => entry.Offset)[..2]);
    }

    private static async Task<(RecordingFile File, VhdxImage Image)> NewVhdxAsync()
    {
        RecordingFile file = new();
        return (file, await VhdxImage.CreateAsync(file, 4 * MiB, MiB, false, MiB));
    }

    private static async Task<(RecordingFile File, VmdkImage Image)> NewVmdkAsync(long size, VmdkLayout layout, bool zeroedGrains)
    {
        RecordingFile file = new();
        return (file, await VmdkImage.CreateAsync(file, size, layout, zeroedGrains, null));
    }

    private static byte[] Luks(string passphrase)
    {
        byte[] header = LuksHeader.Create(new LuksCreateOptions { Passphrase = Encoding.ASCII.GetBytes(passphrase), IterationMilliseconds = 1 });
        return [.. header, .. new byte[65536]];
    }

    /// <summary>A disk of 4 MiB with blocks 0 and 1 written.</summary>
    private static async Task<byte[]> VhdxAsync()
    {
        (RecordingFile file, VhdxImage image) = await NewVhdxAsync();
        await image.WriteAsync(0, new byte[] { 1 });
        await image.WriteAsync(MiB, new byte[] { 1 });
        await image.DisposeAsync();
        return file.Content();
    }

    /// <summary>Holds the first read of a place back after it was carried out.</summary>
    private sealed class GatedFile(BlockNode below, long place) : BlockNode, IDisposable
    {
        private readonly TaskCompletionSource _gate = new(TaskCreationOptions.RunContinuationsAsynchronously);

        public bool Armed { get; set; }

        public override string Driver => "test";

        public override BlockNode File => below;

        public override long Length => below.Length;

        public override bool IsGrowable => true;

        public void Open() => _gate.TrySetResult();

        public void Dispose() => Open();

        protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
        {
            await below.ReadAsync(offset, buffer, cancellation);
            if (Armed && offset == place)
            {
                Armed = false;
                await _gate.Task;
            }
        }

        protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => below.WriteAsync(offset, buffer, flags, cancellation);
    }
}
