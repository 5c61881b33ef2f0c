using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block.Formats;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>
/// Damaged images of every format: a clear error, or what can still be read; no other exception, no hang, no memory beyond a bound.
/// KVASIR_FUZZ_ROUNDS asks for more rounds.
/// </summary>
public sealed class FormatFuzzTests
{
    private static readonly int Rounds = int.TryParse(Environment.GetEnvironmentVariable("KVASIR_FUZZ_ROUNDS"), out int rounds) ? rounds : 200;

    [Theory]
    [InlineData("vmdk", "")]
    [InlineData("vmdk", "subformat=streamOptimized")]
    [InlineData("vhdx", "block_size=1M")]
    [InlineData("vdi", "")]
    [InlineData("vpc", "force_size=on")]
    [InlineData("qcow2", "cluster_size=512,refcount_bits=1")]
    [InlineData("qcow2", "cluster_size=64k,extended_l2=on")]
    [InlineData("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=1")]
    [InlineData("luks", "key-secret=s,iter-time=1")]
    [InlineData("parallels", "")]
    [InlineData("qed", "")]
    [InlineData("qcow", "")]
    [InlineData("cloop", "")]
    [InlineData("dmg", "")]
    public async Task Damage_never_does_worse_than_an_error(string format, string options)
    {
        if (format is "parallels" or "qed" or "qcow")
            Peer.Need("qemu-img");
        using TestFolder folder = new();
        byte[] good = await MakeAsync(folder, format, options);
        Random random = new(options.Length + format.Length);
        Dictionary<string, ReadOnlyMemory<byte>> secrets = new() { ["s"] = "mellon"u8.ToArray() };
        // Headers and tables are where a change counts.
        List<int> places = [];
        for (int at = 0; at < good.Length; at += 8)
        {
            if (good.AsSpan(at, Math.Min(8, good.Length - at)).ContainsAnyExcept((byte)0) && places.Count < 4000)
                places.Add(at);
        }
        for (int round = 0; round < Rounds; round++)
        {
            byte[] bad = (byte[])good.Clone();
            for (int i = random.Next(1, 5); i > 0; i--)
            {
                int at = places[random.Next(Math.Min(places.Count, random.Next(2) == 0 ? 40 : places.Count))] + random.Next(8);
                Change(bad, Math.Min(at, bad.Length - 8), random);
            }
            if (format == "vhdx" && random.Next(2) == 0)
                MendVhdx(bad);
            if (format == "luks" || options.Contains("luks", StringComparison.Ordinal))
                KeepIterationsShort(bad);
            if (random.Next(12) == 0)
                Array.Resize(ref bad, random.Next(bad.Length));
            long before = GC.GetTotalAllocatedBytes();
            try
            {
                await ExerciseAsync(bad, format, secrets, random).WaitAsync(TimeSpan.FromSeconds(20));
            }
            catch (BlockException)
            {
                // Refused at the door.
            }
            catch (Exception error)
            {
                string kept = Path.Combine(Path.GetTempPath(), $"kvasir-fuzz-{format}-{round}");
                await File.WriteAllBytesAsync(kept, bad);
                throw new InvalidOperationException($"{format} round {round} (kept as {kept})", error);
            }
            Assert.True(GC.GetTotalAllocatedBytes() - before < 3L << 30, $"round {round} used too much memory");
        }
    }

    [Fact]
    public async Task Known_hostile_images_are_refused_with_a_clear_line()
    {
        byte[] header = new byte[512];
        BinaryPrimitives.WriteUInt32BigEndian(header, 0x5146_49fb);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(4), 3);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(20), 16);
        BinaryPrimitives.WriteUInt64BigEndian(header.AsSpan(24), 1ul << 60);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(36), 0x7fff_ffff);
        BinaryPrimitives.WriteUInt64BigEndian(header.AsSpan(40), 512);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(96), 4);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(100), 104);
        BlockException huge = await Assert.ThrowsAsync<BlockException>(async () => await Qcow2Image.OpenAsync(new RecordingFile(header), new Qcow2Options()));
        Assert.False(huge.Message.Contains('\n', StringComparison.Ordinal));

        // An L2 table that is its own data cluster: reading shows the table, writing is stopped.
        RecordingFile file = new();
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = 1 << 20 });
        await image.WriteAsync(0, new byte[] { 1 });
        await image.DisposeAsync();
        byte[] bytes = file.Content();
        long l1 = BinaryPrimitives.ReadInt64BigEndian(bytes.AsSpan(40));
        ulong l2 = BinaryPrimitives.ReadUInt64BigEndian(bytes.AsSpan((int)l1));
        BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan((int)(l2 & 0x00ff_ffff_ffff_fe00)), l2);
        await using (Qcow2Image self = await Qcow2Image.OpenAsync(new RecordingFile(bytes), new Qcow2Options { ReadOnly = true }))
        {
            CheckResult result = await self.CheckAsync(CheckRepair.None);
            Assert.True(result.Corruptions > 0);
        }
        Qcow2Image writable = await Qcow2Image.OpenAsync(new RecordingFile(bytes), new Qcow2Options());
        await Assert.ThrowsAsync<BlockException>(async () => await writable.WriteAsync(0, new byte[512]));

        // A compressed cluster that expands without end.
        using MemoryStream bomb = new();
        using (System.IO.Compression.ZLibStream stream = new(bomb, System.IO.Compression.CompressionLevel.SmallestSize, leaveOpen: true))
            stream.Write(new byte[64 << 20]);
        byte[] target = new byte[65536];
        Assert.True(ZlibBlock.Expand(bomb.ToArray(), target));
        Assert.Equal(65536, target.Length);
    }

    [Fact]
    public async Task A_raw_guest_disk_is_never_taken_for_something_else()
    {
        using TestFolder folder = new();
        string disk = folder["disk"];
        await Peer.ImgOkAsync("create", "-q", "-f", "raw", disk, "1M");
        // The guest writes the header of an image whose backing file is one of the host's secrets.
        await Peer.ImgOkAsync("create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", folder["evil"], "1M");
        byte[] header = (await File.ReadAllBytesAsync(folder["evil"])).AsSpan(0, 4096).ToArray();
        await using (BlockBackend backend = await BlockBackend.OpenAsync(disk, new BackendOptions()))
        {
            Assert.Equal("raw", backend.Node.Driver);
            await backend.Node.WriteAsync(0, header);
        }
        await using (BlockBackend again = await BlockBackend.OpenAsync(disk, new BackendOptions()))
        {
            Assert.Equal("raw", again.Node.Driver);
            byte[] got = new byte[4096];
            await again.Node.ReadAsync(0, got);
            Assert.Equal(header, got);
        }
        // Guessed formats: the same write is refused.
        await Peer.ImgOkAsync("create", "-q", "-f", "raw", folder["other"], "1M");
        await using BlockBackend guessed = await BlockBackend.OpenAsync(folder["other"], new BackendOptions { Probe = true });
        await Assert.ThrowsAsync<BlockException>(async () => await guessed.Node.WriteAsync(0, header));
    }

    private static void Change(byte[] bytes, int at, Random random)
    {
        switch (random.Next(5))
        {
            case 0:
                bytes[at] = (byte)random.Next(256);
                break;
            case 1:
                bytes[at] ^= (byte)(1 << random.Next(8));
                break;
            case 2:
                BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(at), random.Next(2) == 0 ? uint.MaxValue >> random.Next(32) : 1u << random.Next(32));
                break;
            case 3:
                BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(at), random.Next(2) == 0 ? uint.MaxValue >> random.Next(32) : 1u << random.Next(32));
                break;
            default:
                BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan(at), random.Next(2) == 0 ? ulong.MaxValue >> random.Next(64) : 1ul << random.Next(64));
                break;
        }
    }

    /// <summary>Key derivation takes as long as the header says, up to a bound that is a minute: here it is to take no time.</summary>
    private static void KeepIterationsShort(byte[] bytes)
    {
        byte[] magic = [0x4c, 0x55, 0x4b, 0x53, 0xba, 0xbe];
        int header = bytes.AsSpan().IndexOf(magic);
        if (header < 0 || header + 592 > bytes.Length)
            return;
        for (int slot = -1; slot < 8; slot++)
        {
            Span<byte> field = bytes.AsSpan(slot < 0 ? header + 164 : header + 212 + (slot * 48), 4);
            // What is out of range stays, to be refused.
            if (BinaryPrimitives.ReadUInt32BigEndian(field) is > 5000 and <= 1u << 27)
                BinaryPrimitives.WriteUInt32BigEndian(field, 1000);
        }
    }

    /// <summary>Makes the checksums right again, so that what lies behind them is reached.</summary>
    private static void MendVhdx(byte[] bytes)
    {
        foreach ((long at, int size) in new[] { (VhdxLayout.Header1, VhdxLayout.HeaderSize), (VhdxLayout.Header2, VhdxLayout.HeaderSize), (VhdxLayout.RegionTable1, VhdxLayout.RegionTableSize), (VhdxLayout.RegionTable2, VhdxLayout.RegionTableSize) })
        {
            Span<byte> part = bytes.AsSpan((int)at, size);
            BinaryPrimitives.WriteUInt32LittleEndian(part[4..], VhdxLayout.Checksum(part, 4));
        }
    }

    private static async Task<byte[]> MakeAsync(TestFolder folder, string format, string options)
    {
        if (format == "dmg")
        {
            // Small, as the tables come behind the data.
            byte[] content = new byte[1 << 18];
            new Random(5).NextBytes(content.AsSpan(100_000, 8000));
            return FormatTests.MakeDmg(content, 4096, 0x8000_0005);
        }
        if (format == "cloop")
        {
            byte[] content = new byte[1 << 18];
            new Random(5).NextBytes(content.AsSpan(100_000, 8000));
            return FormatTests.MakeCloop(content, 4096);
        }
        string path = folder["a." + format];
        string[] secret = ["--object", "secret,id=s,data=mellon"];
        string[] with = options.Length == 0 ? [] : ["-o", options];
        if (format is "parallels" or "qed" or "qcow")
        {
            await Peer.OkAsync("qemu-img", "create", "-q", "-f", format, path, "2M");
            await Peer.OkAsync("qemu-io", "-f", format, "-c", "write -P 5 0 200k", "-c", "write -P 6 1M 64k", path);
            return await File.ReadAllBytesAsync(path);
        }
        await Peer.ImgOkAsync(["create", .. secret, "-q", "-f", format, .. with, path, "2M"]);
        string open = options.Contains("encrypt", StringComparison.Ordinal) ? $"driver={format},file.filename={path},encrypt.key-secret=s" : format == "luks" ? $"driver=luks,file.filename={path},key-secret=s" : $"driver={format},file.filename={path}";
        Assert.Equal(0, (await Peer.IoAsync([.. secret, "--image-opts", "-c", "write -P 5 0 200k", "-c", "write -P 6 1M 64k", open])).Code);
        return await File.ReadAllBytesAsync(path);
    }

    private static async Task ExerciseAsync(byte[] bytes, string format, Dictionary<string, ReadOnlyMemory<byte>> secrets, Random random)
    {
        bool readOnly = format is "parallels" or "qed" or "qcow" or "cloop" or "dmg" || random.Next(2) == 0;
        OpenOptions options = new() { Format = format, ReadOnly = readOnly, Secrets = secrets, NoBacking = true };
        BlockNode node = await Image.OpenFormatAsync(new RecordingFile(bytes), format, options, new ImageOptions());
        byte[] buffer = new byte[100_000];
        for (int i = 0; i < 6; i++)
        {
            long at = i == 0 ? 0 : random.NextInt64(Math.Max(1, Math.Min(node.Length, 4 << 20)));
            int length = (int)Math.Min(buffer.Length, node.Length - at);
            await TryAsync(async () => await node.ReadAsync(at, buffer.AsMemory(0, length)));
            await TryAsync(async () => await node.StatusAsync(at, node.Length - at));
            if (readOnly)
                continue;
            await TryAsync(async () => await node.WriteAsync(at, buffer.AsMemory(0, Math.Min(length, 3000))));
            await TryAsync(async () => await node.WriteZeroesAsync(at, Math.Min(length, 70_000), ZeroFlags.MayUnmap));
            await TryAsync(async () => await node.DiscardAsync(at, length));
        }
        if (node is Qcow2Image image)
            await TryAsync(async () => await image.CheckAsync(readOnly ? CheckRepair.None : CheckRepair.All));
        await TryAsync(async () => await node.FlushAsync());
        await TryAsync(async () => await node.DisposeAsync());
    }

    private static async Task TryAsync(Func<Task> action)
    {
        try
        {
            await action();
        }
        catch (BlockException error)
        {
            Assert.False(string.IsNullOrEmpty(error.Message));
        }
    }
}
