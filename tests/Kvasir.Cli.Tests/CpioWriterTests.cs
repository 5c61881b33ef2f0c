using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using Kvasir.Cli.Guests;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class CpioWriterTests
{
    private sealed record Entry(string Name, uint Mode, byte[] Content, uint Major, uint Minor, uint Inode, uint Links);

    [Fact]
    public void AnArchiveReadsBackAsWritten()
    {
        MemoryStream output = new();
        CpioWriter writer = new(output);
        writer.AddFolder("bin");
        writer.AddFile("bin/a", "odd"u8, 0x1ed);
        writer.AddFile("bin/empty", []);
        writer.AddLink("bin/sh", "a");
        writer.AddFolder("dev");
        writer.AddCharacterDevice("dev/console", 5, 1);
        writer.Finish();

        byte[] archive = output.ToArray();
        Assert.Equal(0, archive.Length % 512);
        List<Entry> entries = Read(archive);
        Assert.Equal(["bin", "bin/a", "bin/empty", "bin/sh", "dev", "dev/console", "TRAILER!!!"], entries.ConvertAll(e => e.Name));
        Assert.Equal(0x41edu, entries[0].Mode);
        Assert.Equal(2u, entries[0].Links);
        Assert.Equal(0x81edu, entries[1].Mode);
        Assert.Equal("odd"u8.ToArray(), entries[1].Content);
        Assert.Empty(entries[2].Content);
        Assert.Equal(0xa1ffu, entries[3].Mode);
        Assert.Equal("a"u8.ToArray(), entries[3].Content);
        Assert.Equal(0x2180u, entries[5].Mode);
        Assert.Equal((5u, 1u), (entries[5].Major, entries[5].Minor));
        HashSet<uint> inodes = [];
        foreach (Entry entry in entries[..^1])
            Assert.True(inodes.Add(entry.Inode), "equal inode numbers make hard links");
    }

    [Theory]
    [InlineData("/absolute")]
    [InlineData("")]
    [InlineData("missing/file")]
    [InlineData("bin")]
    public void APathThatTheKernelWouldNotUnpackIsRefused(string path)
    {
        CpioWriter writer = new(new MemoryStream());
        writer.AddFolder("bin");
        Assert.Throws<ArgumentException>(() => writer.AddFile(path, []));
    }

    private static List<Entry> Read(byte[] archive)
    {
        List<Entry> entries = [];
        int at = 0;
        while (true)
        {
            Assert.Equal("070701", Encoding.ASCII.GetString(archive, at, 6));
            uint[] fields = new uint[13];
            for (int i = 0; i < fields.Length; i++)
                fields[i] = uint.Parse(Encoding.ASCII.GetString(archive, at + 6 + i * 8, 8), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture);
            string name = Encoding.UTF8.GetString(archive, at + 110, (int)fields[11] - 1);
            int content = (at + 110 + (int)fields[11] + 3) & ~3;
            entries.Add(new Entry(name, fields[1], archive[content..(content + (int)fields[6])], fields[9], fields[10], fields[0], fields[4]));
            at = (content + (int)fields[6] + 3) & ~3;
            if (name == "TRAILER!!!")
                return entries;
        }
    }
}
