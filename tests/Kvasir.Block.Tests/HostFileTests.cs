using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Host files: locks against QEMU's programs, cache modes, direct I/O of any alignment, rings and threads.</summary>
public sealed class HostFileTests
{
    /// <summary>Whoever holds an image, both programs let the same others in.</summary>
    [Theory]
    [InlineData("qcow2", false)]
    [InlineData("qcow2", true)]
    [InlineData("raw", false)]
    [InlineData("raw", true)]
    public async Task Locks_mean_the_same_to_both_programs(string format, bool readOnly)
    {
        Peer.Need("qemu-io");
        using TestFolder folder = new();
        string path = folder["disk"];
        await Peer.ImgOkAsync("create", "-q", "-f", format, path, "1M");
        (string Name, string[] Args, bool Io)[] openers =
        [
            ("info", ["info", "-f", format, path], false), ("info -U", ["info", "-U", "-f", format, path], false),
            ("read", ["-r", "-f", format, "-c", "read 0 512", path], true), ("write", ["-f", format, "-c", "write 0 512", path], true),
        ];
        // Held by QEMU, opened by either program.
        List<int> theirs = [];
        List<int> own = [];
        using (Process holder = await HoldAsync(format, readOnly, path))
        {
            foreach ((_, string[] args, bool io) in openers)
            {
                theirs.Add((await Peer.RunAsync(io ? "qemu-io" : "qemu-img", args)).Code);
                own.Add((io ? await Peer.IoAsync(args) : await Peer.ImgAsync(args)).Code);
            }
            holder.StandardInput.Close();
            await holder.WaitForExitAsync();
        }
        // A raw file that QEMU's tools share is shared with ours but for a second writer, which is refused here.
        if (format == "qcow2")
            Assert.Equal(theirs, own);
        else
            Assert.Equal([0, 0, 0], own[..3]);
        // Held here, opened by QEMU.
        List<int> guarded = [];
        await using (BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = format, ReadOnly = readOnly }))
        {
            foreach ((_, string[] args, bool io) in openers)
                guarded.Add((await Peer.RunAsync(io ? "qemu-io" : "qemu-img", args)).Code);
        }
        Assert.Equal(1, guarded[3]);
        Assert.Equal(0, guarded[1]);
        if (format == "qcow2")
            Assert.Equal(theirs, guarded);
        Assert.Equal(0, (await Peer.RunAsync("qemu-io", "-f", format, "-c", "write 0 512", path)).Code);
    }

    [Theory]
    [InlineData(CacheMode.None, AsyncMode.Auto)]
    [InlineData(CacheMode.None, AsyncMode.Threads)]
    [InlineData(CacheMode.DirectSync, AsyncMode.Auto)]
    [InlineData(CacheMode.Writeback, AsyncMode.Threads)]
    [InlineData(CacheMode.Writethrough, AsyncMode.Auto)]
    [InlineData(CacheMode.Unsafe, AsyncMode.Auto)]
    public async Task Any_offset_length_and_memory_will_do(CacheMode cache, AsyncMode mode)
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        const int size = 1 << 20;
        byte[] content = new byte[size];
        new Random(2).NextBytes(content);
        await File.WriteAllBytesAsync(path, content);
        Random random = new(3);
        await using (BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = "raw", ReadOnly = false, Cache = cache, Async = mode }))
        {
            for (int round = 0; round < 150; round++)
            {
                int at = random.Next(size);
                int length = Math.Min(size - at, random.Next(1, 30_000));
                byte[] shifted = new byte[length + 7];
                Memory<byte> buffer = shifted.AsMemory(random.Next(7), length);
                switch (random.Next(4))
                {
                    case 0:
                        random.NextBytes(content.AsSpan(at, length));
                        content.AsSpan(at, length).CopyTo(buffer.Span);
                        await node.WriteAsync(at, buffer, random.Next(3) == 0 ? WriteFlags.ForceUnitAccess : WriteFlags.None);
                        break;
                    case 1:
                        content.AsSpan(at, length).Clear();
                        await node.WriteZeroesAsync(at, length, random.Next(2) == 0 ? ZeroFlags.MayUnmap : ZeroFlags.None);
                        break;
                    default:
                        await node.ReadAsync(at, buffer);
                        Assert.True(buffer.Span.SequenceEqual(content.AsSpan(at, length)), $"round {round}: {length} at {at}");
                        break;
                }
            }
            await node.FlushAsync();
        }
        Assert.True((await File.ReadAllBytesAsync(path)).AsSpan().SequenceEqual(content));
    }

    /// <summary>An image may name anything as what it lies on: a FIFO or a device is refused, and nobody waits for its other end.</summary>
    [Theory]
    [InlineData("fifo")]
    [InlineData("/dev/tty")]
    [InlineData("/dev/zero")]
    [InlineData("/dev/null")]
    public async Task Fifos_and_devices_are_no_images(string kind)
    {
        using TestFolder folder = new();
        string named = kind;
        if (kind == "fifo")
        {
            named = folder["fifo"];
            await Peer.OkAsync("mkfifo", named);
        }
        List<(string What, Func<Task<(int Code, string Output)>> Run)> uses = [("info", () => Peer.ImgAsync("info", named)), ("as raw", () => Peer.ImgAsync("info", "-f", "raw", named))];
        await Peer.ImgOkAsync("create", "-q", "-u", "-f", "qcow2", "-b", named, "-F", "raw", folder["backed"], "1M");
        uses.Add(("backing file", () => Peer.ImgAsync("convert", "-O", "raw", folder["backed"], folder["out"])));
        uses.Add(("chain", () => Peer.ImgAsync("info", "--backing-chain", folder["backed"])));
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-o", $"data_file={folder["data"]}", folder["split"], "1M");
        File.Delete(folder["data"]);
        File.CreateSymbolicLink(folder["data"], named);
        uses.Add(("data file", () => Peer.ImgAsync("convert", "-O", "raw", folder["split"], folder["out"])));
        await Peer.ImgOkAsync("create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", folder["disk.vmdk"], "1M");
        File.Delete(folder["disk-flat.vmdk"]);
        File.CreateSymbolicLink(folder["disk-flat.vmdk"], named);
        uses.Add(("extent", () => Peer.ImgAsync("convert", "-O", "raw", folder["disk.vmdk"], folder["out"])));
        foreach ((string what, Func<Task<(int Code, string Output)>> run) in uses)
        {
            (int code, string output) = await Task.Run(run).WaitAsync(TimeSpan.FromSeconds(60));
            Assert.True(code == 1 && output.Contains("to be a regular file", StringComparison.Ordinal), $"{what}: {code} {output}");
        }
    }

    [Fact]
    public async Task Neighbouring_writes_within_a_direct_unit_keep_each_other()
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        await File.WriteAllBytesAsync(path, new byte[64 << 10]);
        await using BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = "raw", ReadOnly = false, Cache = CacheMode.None });
        List<Task> writes = [];
        for (int i = 0; i < 4096; i++)
        {
            byte[] one = [(byte)((i % 255) + 1)];
            writes.Add(node.WriteAsync(i, one).AsTask());
        }
        await Task.WhenAll(writes);
        byte[] got = new byte[4096];
        await node.ReadAsync(0, got);
        for (int i = 0; i < got.Length; i++)
            Assert.Equal((byte)((i % 255) + 1), got[i]);
    }

    [Theory]
    [InlineData(CacheMode.Writeback)]
    [InlineData(CacheMode.None)]
    public async Task A_block_device_of_the_host_is_a_disk(CacheMode cache)
    {
        Peer.Need("losetup");
        using TestFolder folder = new();
        string raw = folder["disk.raw"];
        byte[] content = new byte[4 << 20];
        new Random(1).NextBytes(content);
        await File.WriteAllBytesAsync(raw, content);
        (int code, string device) = await Peer.RunAsync("losetup", "-f", "--show", raw);
        if (code != 0)
            Assert.Skip("no loop device can be had here: " + device.Trim());
        device = device.Trim();
        try
        {
            await using (BlockNode node = await Image.OpenAsync(device, new OpenOptions { Format = "raw", ReadOnly = false, Cache = cache }))
            {
                Assert.Equal((content.Length, "host_device"), ((int)node.Length, node.File!.Driver));
                byte[] got = new byte[content.Length];
                await node.ReadAsync(0, got);
                Assert.True(got.AsSpan().SequenceEqual(content));
                new Random(2).NextBytes(content.AsSpan(12345, 700_000));
                await node.WriteAsync(12345, content.AsMemory(12345, 700_000));
                await node.WriteZeroesAsync(2 << 20, 1 << 20, ZeroFlags.MayUnmap);
                content.AsSpan(2 << 20, 1 << 20).Clear();
                await node.FlushAsync();
                await node.ReadAsync(0, got);
                Assert.True(got.AsSpan().SequenceEqual(content));
                await node.DiscardAsync(3 << 20, 1 << 20);
                await Assert.ThrowsAsync<BlockException>(async () => await node.WriteAsync(content.Length, new byte[512]));
            }
            // A qcow2 image can lie on a device as well.
            await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", device, "8M");
            Assert.Equal(0, (await Peer.IoAsync("-f", "qcow2", "-c", "write -P 5 1M 1M", "-c", "read -P 5 1M 1M", device)).Code);
            await Peer.ImgOkAsync("check", "-f", "qcow2", device);
        }
        finally
        {
            await Peer.OkAsync("losetup", "-d", device);
        }
    }

    /// <summary>Zeros behind the end make the file longer, and so does a write further on: neither takes from the other.</summary>
    [Theory]
    [InlineData(AsyncMode.Threads, ZeroFlags.MayUnmap)]
    [InlineData(AsyncMode.Threads, ZeroFlags.None)]
    [InlineData(AsyncMode.Auto, ZeroFlags.MayUnmap)]
    public async Task Zeros_behind_the_end_do_not_cut_off_a_write_further_on(AsyncMode mode, ZeroFlags flags)
    {
        using TestFolder folder = new(inMemory: true);
        await using HostFile file = await HostFile.CreateAsync(folder["a"], 0, Preallocation.Off, new HostFileOptions { Async = mode });
        using Barrier start = new(2);
        // A long write makes the file longer bit by bit.
        byte[] data = new byte[400_000];
        byte[] got = new byte[400_000];
        for (int round = 0; round < 400; round++)
        {
            long end = file.Length;
            Array.Fill(data, (byte)(round | 1));
            Task zeros = Task.Run(async () =>
            {
                start.SignalAndWait();
                // At any moment of the write.
                Thread.SpinWait(round % 40 * 100);
                await file.WriteZeroesAsync(end, 4096, flags);
            });
            start.SignalAndWait();
            await file.WriteAsync(end + 8192, data);
            await zeros;
            await file.ReadAsync(end + 8192, got);
            Assert.True(got.AsSpan().SequenceEqual(data), $"round {round}");
            Assert.Equal(end + 8192 + data.Length, file.Length);
            Assert.Equal(file.Length, new FileInfo(folder["a"]).Length);
        }
    }

    [Fact]
    public async Task A_full_medium_is_an_error_and_not_a_loss()
    {
        string mount = Directory.CreateTempSubdirectory("kvasir-full-").FullName;
        (int code, _) = await Peer.RunAsync("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount);
        if (code != 0)
        {
            Directory.Delete(mount);
            Assert.Skip("no tmpfs can be mounted here");
        }
        try
        {
            string path = Path.Combine(mount, "disk.qcow2");
            await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", path, "16M");
            byte[] data = new byte[64 << 10];
            data.AsSpan().Fill(7);
            long stored = 0;
            BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = "qcow2", ReadOnly = false });
            try
            {
                BlockException full = await Assert.ThrowsAsync<BlockException>(async () =>
                {
                    for (; stored < 16 << 20; stored += data.Length)
                        await node.WriteAsync(stored, data);
                });
                Assert.Equal(BlockErrno.NoSpace, full.Errno);
                byte[] back = new byte[stored];
                await node.ReadAsync(0, back);
                Assert.False(back.AsSpan().ContainsAnyExcept((byte)7));
            }
            finally
            {
                // Tables that find no room are told of, too.
                BlockException? late = (BlockException?)await Record.ExceptionAsync(async () => await node.DisposeAsync());
                Assert.True(late is null || late.Errno == BlockErrno.NoSpace, late?.Message);
            }
            (int check, string text) = await Peer.ImgAsync("check", path);
            Assert.True(check is 0 or 3, text);
        }
        finally
        {
            await Peer.OkAsync("umount", mount);
            Directory.Delete(mount);
        }
    }

    private static async Task<Process> HoldAsync(string format, bool readOnly, string path)
    {
        ProcessStartInfo start = new("qemu-io", readOnly ? ["-r", "-f", format, path] : ["-f", format, path]) { RedirectStandardInput = true, RedirectStandardOutput = true };
        Process process = Process.Start(start)!;
        await process.StandardInput.WriteLineAsync("length");
        await process.StandardInput.FlushAsync();
        // Its answer says that the image is open.
        for (string? line = await process.StandardOutput.ReadLineAsync(); line?.Contains("MiB", StringComparison.Ordinal) == false;)
            line = await process.StandardOutput.ReadLineAsync();
        return process;
    }
}
