using System;
using System.Collections.Generic;
using System.IO;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Differencing VHDs and VHDXs, made by <see cref="DifferencingWriter"/>.</summary>
public sealed class DifferencingTests
{
    private const int Size = 3 << 20;

    [Theory]
    [InlineData("vpc")]
    [InlineData("vhdx")]
    public async Task Chains_are_read_sector_by_sector(string format)
    {
        using TestFolder folder = new();
        Random random = new(11);
        byte[] disk = await ParentAsync(folder, format, random);
        for (int level = 1; level <= 3; level++)
        {
            HashSet<int> own = Change(disk, random);
            await OverlayAsync(folder, format, $"child{level}", level == 1 ? "parent" : $"child{level - 1}", disk, own.Contains, level == 2 ? $"C:\\disks\\child1.{format}" : $".\\{(level == 1 ? "parent" : $"child{level - 1}")}.{format}");
        }
        await File.WriteAllBytesAsync(folder["disk.raw"], disk);
        string top = folder[$"child3.{format}"];
        await Peer.ImgOkAsync("compare", "-s", "-f", "raw", "-F", format, folder["disk.raw"], top);
        await Peer.ImgOkAsync("compare", "-f", "raw", folder["disk.raw"], top);
        await Peer.ImgOkAsync("convert", "-f", format, "-O", "qcow2", top, folder["copy.qcow2"]);
        await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "qcow2", folder["disk.raw"], folder["copy.qcow2"]);
        (_, string text) = await Peer.ImgAsync("info", "--backing-chain", top);
        Assert.Contains($"backing file: child2.{format}", text, StringComparison.Ordinal);
        Assert.Contains($"backing file: child1.{format}", text, StringComparison.Ordinal);
        Assert.Contains($"backing file: parent.{format}", text, StringComparison.Ordinal);
        Assert.Contains($"backing file format: {format}", text, StringComparison.Ordinal);
        // The map names each level that holds something.
        (int code, string map) = await Peer.ImgAsync("map", "--output=json", top);
        Assert.Equal(0, code);
        for (int depth = 0; depth <= 3; depth++)
            Assert.Contains($"\"depth\": {depth}", map, StringComparison.Ordinal);
        (code, text) = await Peer.IoAsync("-f", format, "-c", "write 0 512", top);
        Assert.True(code == 1 && text.Contains("can only be read", StringComparison.Ordinal), text);
        await using BlockNode node = await Image.OpenAsync(top, new OpenOptions { Format = format });
        for (int i = 0; i < 300; i++)
        {
            int at = random.Next(Size);
            byte[] got = new byte[random.Next(1, Math.Min(200_000, Size - at + 1))];
            await node.ReadAsync(at, got);
            Assert.True(got.AsSpan().SequenceEqual(disk.AsSpan(at, got.Length)), $"{got.Length} bytes at {at}");
        }
    }

    [Theory]
    [InlineData("vpc")]
    [InlineData("vhdx")]
    public async Task The_parent_is_found_by_its_id_under_any_of_its_names(string format)
    {
        using TestFolder folder = new();
        byte[] disk = await ParentAsync(folder, format, new Random(5));
        byte[] other = await ParentAsync(folder, format, new Random(6), "other");
        Assert.False(disk.AsSpan().SequenceEqual(other));
        Directory.CreateDirectory(folder["far"]);
        await File.WriteAllBytesAsync(folder["disk.raw"], disk);
        string name = $"parent.{format}";
        (string Where, string[] Names)[] good =
        [
            ("near", [$".\\{name}"]),
            ("far/child", [$"..\\{name}"]),
            ("near", [$".\\other.{format}", folder[name]]),
            ("near", [$".\\none\\{name}", $"\\\\?\\C:\\a b\\{name}"]),
            ("near", [$"\\\\?\\Volume{{26A21BDA-A627-11D7-9931-806E6F6E6963}}\\x\\{name}"]),
            ("far/child", [$"D:\\gone\\{name}", folder[name]]),
        ];
        foreach ((string where, string[] names) in good)
        {
            await OverlayAsync(folder, format, where, "parent", disk, sector => sector % 7 == 0, names);
            await Peer.ImgOkAsync("compare", "-f", "raw", "-F", format, folder["disk.raw"], folder[$"{where}.{format}"]);
        }
        // Another disk, another file, none at all: nothing is read in its place.
        await File.WriteAllTextAsync(folder["passwords"], new string('x', 4096));
        await Peer.OkAsync("mkfifo", folder["pipe"]);
        (string Name, string Reason)[] bad = [($".\\other.{format}", "is not the parent of"), (".\\passwords", "passwords"), (".\\pipe", "regular file"), (".\\none", "none"), ("nbd://127.0.0.1:1/x", "nbd:"), ("json:{\"driver\":\"null-co\"}", "json:")];
        foreach ((string wrong, string reason) in bad)
        {
            await OverlayAsync(folder, format, "near", "parent", disk, sector => sector % 7 == 0, wrong);
            (int code, string text) = await Peer.ImgAsync("compare", "-f", "raw", "-F", format, folder["disk.raw"], folder[$"near.{format}"]);
            Assert.True(code > 1 && text.Contains("Could not open backing file", StringComparison.Ordinal) && text.Contains(reason, StringComparison.Ordinal), text);
        }
        // A parent that was written since is another disk: a VHDX says so, a VHD keeps its id.
        await OverlayAsync(folder, format, "near", "parent", disk, sector => sector % 7 == 0, $".\\{name}");
        Assert.Equal(0, (await Peer.IoAsync("-f", format, "-c", "write -P 9 2M 512", folder[name])).Code);
        (int after, string told) = await Peer.ImgAsync("compare", "-f", "raw", "-F", format, folder["disk.raw"], folder[$"near.{format}"]);
        Assert.True(format == "vhdx" ? after > 1 && told.Contains("has been written since", StringComparison.Ordinal) : after == 1, told);
    }

    [Fact]
    public async Task Names_of_a_vhd_are_taken_from_every_place_that_has_them()
    {
        using TestFolder folder = new();
        byte[] disk = await ParentAsync(folder, "vpc", new Random(5));
        await File.WriteAllBytesAsync(folder["disk.raw"], disk);
        string child = folder["child.vpc"];
        (string, string)[] places = [("", "parent.vpc"), ("MacX", "file://localhost" + folder["parent.vpc"]), ("MacX", "file://" + folder["none/parent.vpc"]), ("W2ku", folder["parent.vpc"]), ("W2ru", "parent.vpc\0\0")];
        foreach ((string, string) place in places)
        {
            DifferencingWriter.Vhd(child, folder["parent.vpc"], disk, sector => sector % 5 == 1, place);
            await Peer.ImgOkAsync("compare", "-f", "raw", "-F", "vpc", folder["disk.raw"], child);
        }
        DifferencingWriter.Vhd(child, folder["parent.vpc"], disk, sector => sector % 5 == 1);
        (int code, string text) = await Peer.ImgAsync("info", child);
        Assert.True(code == 1 && text.Contains("does not name its parent", StringComparison.Ordinal), text);
    }

    [Theory]
    [InlineData("vpc")]
    [InlineData("vhdx")]
    public async Task Loops_and_damage_are_refused(string format)
    {
        using TestFolder folder = new();
        byte[] disk = await ParentAsync(folder, format, new Random(5));
        string child = folder[$"child.{format}"];
        await OverlayAsync(folder, format, "child", "parent", disk, sector => sector % 3 != 0, $".\\child.{format}");
        byte[] good = await File.ReadAllBytesAsync(child);
        byte[] loop = (byte[])good.Clone();
        // It names itself, by its own id.
        if (format == "vpc")
            loop.AsSpan(68, 16).CopyTo(loop.AsSpan(512 + 40));
        else
            await OverlayAsync(folder, format, "child", "child", disk, sector => sector % 3 != 0, $".\\child.{format}");
        if (format == "vpc")
            await File.WriteAllBytesAsync(child, loop);
        (int code, string text) = await Peer.ImgAsync("convert", "-f", format, "-O", "raw", child, folder["x.raw"]);
        Assert.True(code == 1 && text.Contains("infinite loop", StringComparison.Ordinal), text);
        await OverlayAsync(folder, format, "child", "parent", disk, sector => sector % 3 != 0, $".\\parent.{format}");
        good = await File.ReadAllBytesAsync(child);
        List<int> places = [];
        for (int at = 0; at < good.Length && places.Count < 600; at += 4)
        {
            if (good.AsSpan(at, 4).ContainsAnyExcept((byte)0, (byte)0xff, (byte)0xdd))
                places.Add(at);
        }
        Random random = new(8);
        int read = 0;
        for (int round = 0; round < 250; round++)
        {
            byte[] bad = (byte[])good.Clone();
            for (int i = random.Next(1, 4); i > 0; i--)
                random.NextBytes(bad.AsSpan(places[random.Next(places.Count)] + random.Next(3), random.Next(1, 3)));
            await File.WriteAllBytesAsync(child, random.Next(20) == 0 ? bad[..random.Next(bad.Length)] : bad);
            try
            {
                await using BlockNode node = await Image.OpenAsync(child, new OpenOptions { Format = format });
                await node.ReadAsync(0, new byte[(int)Math.Min(node.Length, Size)]);
                for (long at = 0, steps = 0; at < node.Length && steps < 5000; steps++)
                    at += Math.Max(1, (await node.StatusAsync(at, node.Length - at)).Length);
                read++;
            }
            catch (BlockException)
            {
            }
        }
        Assert.InRange(read, 1, 249);
    }

    private static async Task<byte[]> ParentAsync(TestFolder folder, string format, Random random, string name = "parent")
    {
        byte[] disk = new byte[Size];
        random.NextBytes(disk.AsSpan(0, 2 << 20));
        await File.WriteAllBytesAsync(folder["source"], disk);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", format, "-o", format == "vpc" ? "force_size=on" : "block_size=1M", folder["source"], folder[$"{name}.{format}"]);
        return disk;
    }

    private static async Task OverlayAsync(TestFolder folder, string format, string name, string parent, byte[] disk, Func<int, bool> own, params string[] names)
    {
        string path = folder[$"{name}.{format}"];
        string below = folder[$"{parent}.{format}"];
        if (format == "vpc")
        {
            DifferencingWriter.Vhd(path, below, disk, own, Array.ConvertAll(names, one => (one.StartsWith('.') ? "W2ru" : "W2ku", one)));
            return;
        }
        Guid id = File.Exists(below) ? DifferencingWriter.VhdxId(below) : Guid.Empty;
        await Peer.ImgOkAsync("create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "3M");
        if (path == below)
            id = DifferencingWriter.VhdxId(path);
        DifferencingWriter.Vhdx(path, id, disk, own, Array.ConvertAll(names, one => (one.StartsWith('.') ? "relative_path" : one.Contains("Volume", StringComparison.Ordinal) ? "volume_path" : "absolute_win32_path", one)));
    }

    /// <summary>Changes a third of the disk in runs, one whole megabyte to zeros, and tells which sectors.</summary>
    private static HashSet<int> Change(byte[] disk, Random random)
    {
        HashSet<int> own = [];
        for (int run = 0; run < 40; run++)
        {
            int first = random.Next(Size / 512);
            int count = Math.Min(random.Next(1, 60), (Size / 512) - first);
            random.NextBytes(disk.AsSpan(first * 512, count * 512));
            for (int sector = first; sector < first + count; sector++)
                own.Add(sector);
        }
        int mega = random.Next(3);
        bool zero = random.Next(2) == 0;
        if (zero)
            disk.AsSpan(mega << 20, 1 << 20).Clear();
        else
            random.NextBytes(disk.AsSpan(mega << 20, 1 << 20));
        for (int sector = mega * 2048; sector < (mega + 1) * 2048; sector++)
            own.Add(sector);
        return own;
    }
}
