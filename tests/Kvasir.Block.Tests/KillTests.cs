using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The command is killed at random moments while it writes an image: what it had flushed stays, and the image checks clean.</summary>
public sealed class KillTests
{
    private const int Size = 4 << 20;

    /// <summary>KVASIR_KILL_RUNS asks for more.</summary>
    private static readonly int Runs = int.TryParse(Environment.GetEnvironmentVariable("KVASIR_KILL_RUNS"), out int runs) ? runs : 60;

    [Fact]
    public async Task A_killed_writer_loses_nothing_that_was_flushed()
    {
        string program = Environment.GetEnvironmentVariable("KVASIR") ?? Built();
        if (!File.Exists(program))
            Assert.Skip("the kvasir command is not built: run ./kvasir once");
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        for (int run = 0; run < Runs; run++)
            await KillAsync(program, folder[$"disk{run}.qcow2"], run).WaitAsync(TimeSpan.FromSeconds(60));
    }

    internal static string Built()
    {
        string folder = AppContext.BaseDirectory;
        while (folder.Length > 1 && !File.Exists(Path.Combine(folder, "Kvasir.slnx")))
            folder = Path.GetDirectoryName(folder.TrimEnd('/')) ?? "/";
        return Path.Combine(folder, "out", "current", "kvasir");
    }

    private static async Task KillAsync(string program, string path, int seed)
    {
        Random random = new(seed);
        string cluster = new[] { "512", "4k", "64k", "256k" }[random.Next(4)];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-o", $"cluster_size={cluster},lazy_refcounts={(random.Next(4) == 0 ? "on" : "off")}", path, "4M");
        ProcessStartInfo start = new(program, ["io", "-f", "qcow2", path]) { RedirectStandardInput = true, RedirectStandardOutput = true };
        using Process process = Process.Start(start)!;
        // The writes in order, and after how many of them each flush came; a "length" answers when the flush before it has ended.
        List<(int At, int Length, byte Value)> writes = [];
        List<int> flushes = [];
        for (int i = 0; i < 400; i++)
        {
            if (random.Next(6) == 0)
            {
                flushes.Add(writes.Count);
                process.StandardInput.Write("flush\nlength\n");
                continue;
            }
            (int at, int length, byte value) = (random.Next(Size / 512 - 200) * 512, random.Next(1, 200) * 512, (byte)random.Next(1, 256));
            string line = random.Next(8) == 0
                ? string.Create(CultureInfo.InvariantCulture, $"write -q -z -u {at} {length}\n")
                : string.Create(CultureInfo.InvariantCulture, $"write -q -P {value} {at} {length}\n");
            writes.Add((at, length, line.Contains("-z", StringComparison.Ordinal) ? (byte)0 : value));
            process.StandardInput.Write(line);
        }
        process.StandardInput.Flush();
        int stable = 0;
        int wanted = random.Next(0, flushes.Count);
        Task<int> reader = Task.Run(async () =>
        {
            int seen = 0;
            while (await process.StandardOutput.ReadLineAsync() is string line)
            {
                if (line.Contains("4 MiB", StringComparison.Ordinal) && ++seen == wanted + 1)
                    process.Kill();
            }
            return seen;
        });
        if (random.Next(2) == 0)
        {
            await Task.Delay(random.Next(1, 60));
            process.Kill();
        }
        await process.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(30));
        int answered = await reader;
        if (answered > 0)
            stable = flushes[answered - 1];
        byte[] flushed = new byte[Size];
        for (int i = 0; i < stable; i++)
            flushed.AsSpan(writes[i].At, writes[i].Length).Fill(writes[i].Value);
        bool[] open = new bool[Size];
        for (int i = stable; i < writes.Count; i++)
            open.AsSpan(writes[i].At, writes[i].Length).Fill(true);
        // The kernel takes a killed process's ring apart in its own time, and the image's locks go with the files that the ring holds.
        (int check, string text) = await Peer.RunAsync("qemu-img", "check", "-f", "qcow2", path);
        for (int i = 0; i < 200 && text.Contains(" lock", StringComparison.Ordinal); i++)
        {
            await Task.Delay(50);
            (check, text) = await Peer.RunAsync("qemu-img", "check", "-f", "qcow2", path);
        }
        // A lazy image is repaired at its next opening; else at most clusters leak.
        (_, string info) = await Peer.ImgAsync("info", path);
        if (info.Contains("cleanly shut down: no", StringComparison.Ordinal))
            await Peer.OkAsync("qemu-img", "check", "-q", "-r", "all", "-f", "qcow2", path);
        else
            Assert.True(check is 0 or 3, $"run {seed}: {text}");
        await using BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = "qcow2" });
        byte[] got = new byte[Size];
        await node.ReadAsync(0, got);
        for (int i = 0; i < Size; i++)
        {
            if (!open[i] && got[i] != flushed[i])
                Assert.Fail($"run {seed}: flushed byte {i} is {got[i]} and was {flushed[i]}");
        }
    }
}
