using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block.Jobs;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>
/// Processes that are killed in the middle of a job, with a guest that writes meanwhile, and started again until the job has ended. The process is this
/// program, with one test that is never run otherwise.
/// </summary>
public sealed class JobKillTests
{
    private const int Size = 24 << 20;
    private const int Unit = 64 << 10;
    private const int Most = 8;

    /// <summary>KVASIR_KILL_RUNS asks for more.</summary>
    private static readonly int Runs = int.TryParse(Environment.GetEnvironmentVariable("KVASIR_KILL_RUNS"), out int runs) ? Math.Max(1, runs / 20) : 1;

    [Theory]
    [InlineData("mirror", "raw")]
    [InlineData("mirror", "qcow2")]
    [InlineData("backup", "raw")]
    [InlineData("backup", "qcow2")]
    [InlineData("stream", "qcow2")]
    [InlineData("commit", "qcow2")]
    public async Task A_job_goes_on_after_its_process_was_killed(string kind, string format)
    {
        Peer.Need("qemu-img");
        for (int run = 0; run < Runs; run++)
            await RunAsync(kind, format, run);
    }

    /// <summary>The process that is killed: does its job on the folder of KVASIR_JOB, and leaves "done" there when it has ended.</summary>
    [Fact(Explicit = true)]
    public async Task Work()
    {
        string folder = Environment.GetEnvironmentVariable("KVASIR_JOB") ?? throw new InvalidOperationException("for a test's own process");
        string kind = Environment.GetEnvironmentVariable("KVASIR_JOB_KIND")!;
        string format = Environment.GetEnvironmentVariable("KVASIR_JOB_FORMAT")!;
        int seed = int.Parse(Environment.GetEnvironmentVariable("KVASIR_JOB_SEED")!, CultureInfo.InvariantCulture);
        long speed = long.Parse(Environment.GetEnvironmentVariable("KVASIR_JOB_SPEED")!, CultureInfo.InvariantCulture);
        string At(string name) => Path.Combine(folder, name);
        await using BlockBackend backend = await BlockBackend.OpenAsync(At("disk"), new BackendOptions { Format = format, ForceShare = false });
        await using BlockJob job = await StartAsync(backend, kind, At, speed);
        await File.WriteAllTextAsync(At("started"), "1");
        // The guest writes one unit after the other; what it has flushed is in the log.
        Random random = new(seed);
        byte[] data = new byte[Unit];
        while (!job.Completion.IsCompleted && !(job.State == JobState.Ready && speed == 0))
        {
            int unit = random.Next(Size / Unit);
            Fill(data, unit, fresh: true);
            int from = random.Next(2) == 0 ? 0 : random.Next(Unit / 512) * 512;
            await backend.Node.WriteAsync(((long)unit * Unit) + from, data.AsMemory(from));
            if (random.Next(3) == 0 && from == 0)
            {
                await backend.Node.FlushAsync();
                await File.AppendAllTextAsync(At("flushed"), unit.ToString(CultureInfo.InvariantCulture) + "\n");
            }
            await Task.Delay(1);
        }
        job.Complete();
        await job.Completion;
        await backend.FlushAsync();
        await File.WriteAllTextAsync(At("done"), "1");
    }

    private static async Task<BlockJob> StartAsync(BlockBackend backend, string kind, Func<string, string> at, long speed)
    {
        if (kind == "stream")
            return await StreamJob.StartAsync(backend, null, speed);
        if (kind == "commit")
        {
            BlockNode basis = backend.Node.Backing!;
            BlockNode below = await Image.OpenAsync(basis.FileName, new OpenOptions { Format = "qcow2", ReadOnly = false, ForceShare = true });
            // Without a journal: what an overlay holds is to be done, and stays in it until the end.
            return await MirrorJob.StartAsync(backend, below, new MirrorOptions { Base = basis, Speed = speed, Pivot = false });
        }
        (DirtyMap map, bool resumed) = await DirtyMap.OpenJournalAsync(at("job"), Size, Unit, durable: false);
        if (!resumed)
            await map.SetAllAsync();
        await File.AppendAllTextAsync(at("left"), map.DirtyBytes.ToString(CultureInfo.InvariantCulture) + "\n");
        BlockNode target = await Image.OpenAsync(at("target"), new OpenOptions { Format = "qcow2", ReadOnly = false });
        return kind == "mirror"
            ? await MirrorJob.StartAsync(backend, target, new MirrorOptions { Map = map, Speed = speed, Pivot = false, SettleBytes = 1 << 20 })
            : await BackupJob.StartAsync(backend, target, new BackupOptions { Map = map, Speed = speed, SettleBytes = 1 << 20 });
    }

    private static async Task RunAsync(string kind, string format, int seed)
    {
        using TestFolder folder = new(inMemory: true);
        Random random = new(seed + (kind.Length * 1000) + format.Length);
        byte[] before = new byte[Size];
        for (int unit = 0; unit < Size / Unit; unit++)
            Fill(before.AsSpan(unit * Unit, Unit), unit, fresh: false);
        await File.WriteAllBytesAsync(folder["raw"], before);
        await Peer.ImgOkAsync("convert", "-f", "raw", "-O", format, folder["raw"], folder[kind is "stream" or "commit" ? "base" : "disk"]);
        if (kind is "stream" or "commit")
            await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", folder["base"], "-F", "qcow2", folder["disk"]);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", folder["target"], Size.ToString(CultureInfo.InvariantCulture));
        int kills = 0;
        for (int round = 0; !File.Exists(folder["done"]); round++)
        {
            Assert.True(round <= Most, "the job never ended");
            // Slowly for as long as it is to be killed, so that it is in the middle; then at full speed, to the end.
            bool kill = round < 2;
            using Process process = Start(folder, kind, format, seed + round, kill ? 16 << 20 : 0);
            if (kill)
            {
                await StartedAsync(process, folder["started"]);
                await Task.Delay(random.Next(1, 700));
                process.Kill();
                kills++;
            }
            await process.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(120));
            if (!kill)
                Assert.True(process.ExitCode == 0 && File.Exists(folder["done"]), $"{kind} of {format}, seed {seed}: the last run gave {process.ExitCode}");
            File.Delete(folder["started"]);
            await UnlockedAsync(folder[kind == "stream" ? "disk" : kind == "commit" ? "base" : "target"], kind == "backup" && format == "raw" ? folder["disk"] : folder["disk"], format);
        }
        Assert.True(kills > 0);
        string what = $"{kind} of {format}, seed {seed}";
        await CheckAsync(folder, kind, format, before, what);
    }

    private static async Task CheckAsync(TestFolder folder, string kind, string format, byte[] before, string what)
    {
        bool copies = kind is "mirror" or "backup";
        foreach (string name in (string[])[copies ? "target" : "base", "disk"])
        {
            if (name == "disk" && format == "raw")
                continue;
            (int code, string text) = await Peer.RunAsync("qemu-img", "check", "-f", "qcow2", folder[name]);
            Assert.True(code is 0 or 3, $"{what}: {name}: {text}");
        }
        if (kind == "mirror")
            await Peer.OkAsync("qemu-img", "compare", "-f", format, "-F", "qcow2", folder["disk"], folder["target"]);
        if (kind == "backup")
            await Peer.OkAsync("qemu-img", "compare", "-f", "raw", "-F", "qcow2", folder["raw"], folder["target"]);
        if (kind == "stream")
        {
            (_, string info) = await Peer.RunAsync("qemu-img", "info", folder["disk"]);
            Assert.DoesNotContain("backing file", info, StringComparison.Ordinal);
        }
        // What the guest flushed is there; the rest is as before or as it was written.
        string holder = kind == "commit" ? "base" : "disk";
        await using BlockNode node = await Image.OpenAsync(folder[holder], new OpenOptions { Format = format });
        byte[] got = new byte[Size];
        await node.ReadAsync(0, got);
        byte[] written = new byte[Unit];
        HashSet<int> flushed = [];
        if (File.Exists(folder["flushed"]))
        {
            string log = await File.ReadAllTextAsync(folder["flushed"]);
            // A line that the kill cut short says nothing.
            foreach (string line in log[..(log.LastIndexOf('\n') + 1)].Split('\n', StringSplitOptions.RemoveEmptyEntries))
                flushed.Add(int.Parse(line, CultureInfo.InvariantCulture));
        }
        for (int unit = 0; unit < Size / Unit; unit++)
        {
            Fill(written, unit, fresh: true);
            for (int at = 0; at < Unit; at += 512)
            {
                ReadOnlySpan<byte> sector = got.AsSpan((unit * Unit) + at, 512);
                bool isNew = sector.SequenceEqual(written.AsSpan(at, 512));
                if (!isNew && (flushed.Contains(unit) || !sector.SequenceEqual(before.AsSpan((unit * Unit) + at, 512))))
                    Assert.Fail($"{what}: the disk has lost what was written at {(unit * Unit) + at}");
            }
        }
    }

    private static Process Start(TestFolder folder, string kind, string format, int seed, long speed)
    {
        string host = Environment.ProcessPath!;
        ProcessStartInfo start = new(host) { RedirectStandardOutput = true };
        if (Path.GetFileNameWithoutExtension(host) == "dotnet")
            start.ArgumentList.Add(typeof(JobKillTests).Assembly.Location);
        foreach (string word in (string[])["-explicit", "only", "-method", "Kvasir.Block.Tests.JobKillTests.Work", "-noLogo", "-noColor"])
            start.ArgumentList.Add(word);
        start.Environment["KVASIR_JOB"] = Path.GetDirectoryName(folder["x"])!;
        start.Environment["KVASIR_JOB_KIND"] = kind;
        start.Environment["KVASIR_JOB_FORMAT"] = format;
        start.Environment["KVASIR_JOB_SEED"] = seed.ToString(CultureInfo.InvariantCulture);
        start.Environment["KVASIR_JOB_SPEED"] = speed.ToString(CultureInfo.InvariantCulture);
        return Process.Start(start)!;
    }

    private static async Task StartedAsync(Process process, string mark)
    {
        for (int i = 0; i < 6000 && !File.Exists(mark) && !process.HasExited; i++)
            await Task.Delay(10);
        if (!File.Exists(mark) && process.HasExited)
            Assert.Fail("the job did not start: " + await process.StandardOutput.ReadToEndAsync());
    }

    /// <summary>The kernel takes a killed process's ring apart in its own time, and the locks go with the files that the ring holds.</summary>
    private static async Task UnlockedAsync(string target, string disk, string format)
    {
        foreach ((string path, string kind) in ((string, string)[])[(target, "qcow2"), (disk, format)])
        {
            for (int i = 0; ; i++)
            {
                try
                {
                    await using BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = kind, ReadOnly = false, NoBacking = true, ForCheck = true });
                    break;
                }
                catch (BlockException error) when (i < 200 && error.Message.Contains("lock", StringComparison.Ordinal))
                {
                    await Task.Delay(50);
                }
            }
        }
    }

    private static void Fill(Span<byte> data, int unit, bool fresh)
    {
        for (int at = 0; at < data.Length; at += 8)
            BinaryPrimitives.WriteInt64LittleEndian(data[at..], ((long)unit << 32) + (at / 512) + (fresh ? 1L << 62 : 1L << 60));
    }
}
