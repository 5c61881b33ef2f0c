using System;
using System.Collections.Generic;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Jobs;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>
/// Jobs whose process ends at any of their writes, and what a restart makes of the files as they are then: tables that a target holds in memory are lost.
/// </summary>
public sealed class JobRestartTests
{
    private const int Size = 2 << 20;
    private const int MirrorSize = 6 << 20;

    [Fact]
    public async Task A_mirror_that_is_killed_at_any_write_goes_on_from_its_journal()
    {
        using TestFolder folder = new();
        byte[] disk = new byte[MirrorSize];
        new Random(3).NextBytes(disk.AsSpan(0, MirrorSize * 3 / 4));
        List<Moment> moments = [];
        {
            (DirtyMap map, _) = await DirtyMap.OpenJournalAsync(folder["job"], MirrorSize, 64 << 10, durable: false);
            await map.SetAllAsync();
            RecordingFile file = new();
            BlockNode target = await EmptyAsync(file, MirrorSize);
            file.BeforeWrite = () => moments.Add(new Moment(File.ReadAllBytes(folder["job"]), file.Content(), []));
            await using BlockBackend backend = BlockBackend.Over(new RawImage(new RecordingFile((byte[])disk.Clone())), new BackendOptions());
            MirrorJob job = await MirrorJob.StartAsync(backend, target, new MirrorOptions { Map = map, Workers = 1, Pivot = false, SettleBytes = 256 << 10 });
            await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
            await job.CancelAsync();
        }
        Assert.InRange(moments.Count, 10, 1000);
        int fewer = 0;
        for (int i = 0; i < moments.Count; i++)
        {
            string journal = folder[$"job{i}"];
            await File.WriteAllBytesAsync(journal, moments[i].Journal);
            (DirtyMap map, bool resumed) = await DirtyMap.OpenJournalAsync(journal, MirrorSize, 64 << 10, durable: false);
            Assert.True(resumed);
            fewer += map.DirtyBytes is > 0 and < MirrorSize ? 1 : 0;
            RecordingFile file = new(moments[i].Target);
            await using BlockBackend backend = BlockBackend.Over(new RawImage(new RecordingFile((byte[])disk.Clone())), new BackendOptions());
            MirrorJob job = await MirrorJob.StartAsync(backend, await Qcow2Image.OpenAsync(file, new Qcow2Options()), new MirrorOptions { Map = map, Pivot = false });
            job.Complete();
            await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
            await ExpectAsync(file.Content(), disk, i);
        }
        Assert.True(fewer > 3, "the journal never spared a restart anything");
    }

    [Fact]
    public async Task A_backup_that_is_killed_at_any_write_still_has_the_first_moment()
    {
        using TestFolder folder = new();
        byte[] then = new byte[Size];
        new Random(4).NextBytes(then);
        List<Moment> moments = [];
        {
            (DirtyMap map, _) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
            await map.SetAllAsync();
            RecordingFile file = new();
            RecordingFile source = new((byte[])then.Clone());
            BlockNode target = await EmptyAsync(file, Size);
            // The moments before a guest's write, too: what it takes away must be safe by then.
            Action look = () => moments.Add(new Moment(File.ReadAllBytes(folder["job"]), file.Content(), source.Content()));
            file.BeforeWrite = look;
            await using BlockBackend backend = BlockBackend.Over(new RawImage(source), new BackendOptions());
            // So slow that the guest is first everywhere.
            BackupJob job = await BackupJob.StartAsync(backend, target, new BackupOptions { Map = map, Speed = 1, SettleBytes = 256 << 10 });
            job.Pause();
            Random random = new(5);
            for (int i = 0; i < 12; i++)
            {
                byte[] data = new byte[random.Next(1, 60_000)];
                random.NextBytes(data);
                await backend.Node.WriteAsync(random.Next(Size - data.Length), data);
                look();
            }
            job.Resume();
            await job.CancelAsync();
        }
        Assert.InRange(moments.Count, 30, 1000);
        for (int i = 0; i < moments.Count; i++)
        {
            string journal = folder[$"job{i}"];
            await File.WriteAllBytesAsync(journal, moments[i].Journal);
            (DirtyMap map, _) = await DirtyMap.OpenJournalAsync(journal, Size, 64 << 10, durable: false);
            RecordingFile file = new(moments[i].Target);
            await using BlockBackend backend = BlockBackend.Over(new RawImage(new RecordingFile(moments[i].Source)), new BackendOptions());
            BackupJob job = await BackupJob.StartAsync(backend, await Qcow2Image.OpenAsync(file, new Qcow2Options()), new BackupOptions { Map = map });
            await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
            await ExpectAsync(file.Content(), then, i);
        }
    }

    /// <summary>A guest's write is in the journal before it is on the disk: a process that is killed in between copies it again.</summary>
    [Fact]
    public async Task A_mirrors_journal_knows_of_a_write_before_the_disk_does()
    {
        using TestFolder folder = new();
        (DirtyMap map, _) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
        await map.SetAllAsync();
        RecordingFile source = new(new byte[Size]);
        await using BlockBackend backend = BlockBackend.Over(new RawImage(source), new BackendOptions());
        MirrorJob job = await MirrorJob.StartAsync(backend, await EmptyAsync(new RecordingFile(), Size), new MirrorOptions { Map = map, Pivot = false });
        await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
        List<byte[]> seen = [];
        source.BeforeWrite = () => seen.Add(File.ReadAllBytes(folder["job"]));
        await backend.Node.WriteAsync(5 * 65536, new byte[] { 1 });
        source.BeforeWrite = null;
        job.Complete();
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        await File.WriteAllBytesAsync(folder["then"], Assert.Single(seen));
        (DirtyMap then, bool resumed) = await DirtyMap.OpenJournalAsync(folder["then"], Size, 64 << 10, durable: false);
        Assert.True(resumed && then.IsSet(5 * 65536) && then.DirtyBytes == 65536);
        await then.DisposeAsync();
    }

    /// <summary>The header gives up the backing file when all that came from there is in the file: a process that is killed just then loses nothing.</summary>
    [Fact]
    public async Task A_stream_gives_up_its_backing_file_last()
    {
        byte[] disk = new byte[Size];
        new Random(6).NextBytes(disk);
        RecordingFile file = new();
        Qcow2Image top = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = Size, BackingFile = "base", BackingFormat = "raw" });
        top.SetBacking(new RawImage(new RecordingFile((byte[])disk.Clone())));
        await top.FlushAsync();
        RecordingFile then = new(file.Content());
        file.Log.Clear();
        await using BlockBackend backend = BlockBackend.Over(top, new BackendOptions());
        StreamJob job = await StreamJob.StartAsync(backend, null, 0);
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        int header = file.Log.FindLastIndex(entry => entry.Offset == 0);
        Assert.True(header > 0);
        foreach ((long offset, byte[]? data, long length) in file.Log[..(header + 1)])
        {
            if (offset >= 0)
                await then.WriteAsync(offset, data);
            else if (offset == -2)
                await then.ResizeAsync(length);
        }
        await ExpectAsync(then.Content(), disk, header);
    }

    /// <summary>A unit that the guest wrote again is being copied again when its first copy is called done: the journal keeps it for the second.</summary>
    [Fact]
    public async Task A_unit_that_was_taken_twice_is_done_when_both_are()
    {
        using TestFolder folder = new();
        (DirtyMap map, _) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
        await map.SetAsync(0, 1);
        await map.BeginAsync();
        Assert.True(map.TryTake(1, out long offset, out long length));
        await map.SetAsync(0, 1);
        Assert.True(map.TryTake(1, out _, out _));
        await map.DoneAsync(offset, length);
        await map.DisposeAsync();
        (DirtyMap after, bool resumed) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
        Assert.True(resumed && after.IsSet(0));
        Assert.True(after.TryTake(1, out offset, out length));
        await after.DoneAsync(offset, length);
        await after.DisposeAsync();
        (DirtyMap end, _) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
        Assert.True(end.IsEmpty);
        await end.DisposeAsync();
    }

    /// <summary>A process that ended while it filled its journal: what is there by then is not all that is to be done.</summary>
    [Fact]
    public async Task A_journal_that_no_job_has_begun_on_is_begun_anew()
    {
        using TestFolder folder = new();
        foreach (long length in (long[])[-1, 0, 1, 4096 + 8])
        {
            if (length >= 0)
                await File.WriteAllBytesAsync(folder["job"], new byte[length]);
            (DirtyMap map, bool resumed) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
            Assert.False(resumed);
            await map.SetAsync(0, 1);
            await map.DisposeAsync();
            (DirtyMap again, resumed) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
            Assert.True(!resumed && again.IsEmpty);
            await again.SetAsync(0, 1);
            await again.BeginAsync();
            await again.DisposeAsync();
            (DirtyMap begun, resumed) = await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false);
            Assert.True(resumed && begun.IsSet(0));
            await begun.DisposeAsync();
        }
        await File.WriteAllBytesAsync(folder["disk"], new byte[1 << 20]);
        await Assert.ThrowsAsync<BlockException>(async () => await DirtyMap.OpenJournalAsync(folder["disk"], Size, 64 << 10, durable: false));
        Assert.Equal(1 << 20, new FileInfo(folder["disk"]).Length);
        await File.WriteAllTextAsync(folder["job"], "something else");
        await Assert.ThrowsAsync<BlockException>(async () => await DirtyMap.OpenJournalAsync(folder["job"], Size, 64 << 10, durable: false));
        Assert.Equal("something else", await File.ReadAllTextAsync(folder["job"]));
    }

    /// <summary>Nobody waits for ever for a job whose target cannot be closed, and it does not call itself done.</summary>
    [Fact]
    public async Task A_target_that_cannot_be_closed_fails_the_job()
    {
        FaultNode fault = new(new RecordingFile());
        BlockNode target = await Qcow2Creator.CreateAsync(fault, new Qcow2CreateOptions { Size = Size });
        await using BlockBackend backend = BlockBackend.Over(new RawImage(new RecordingFile(new byte[Size])), new BackendOptions());
        MirrorJob job = await MirrorJob.StartAsync(backend, target, new MirrorOptions { Pivot = false });
        await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
        await target.WriteAsync(0, new byte[] { 1 });
        fault.Add(new FaultRule(FaultKind.Flush));
        fault.Add(new FaultRule(FaultKind.Write));
        await job.CancelAsync();
        await Assert.ThrowsAsync<BlockException>(() => job.Completion);
        Assert.Equal(JobState.Failed, job.State);
    }

    private static async Task<BlockNode> EmptyAsync(RecordingFile file, int size)
    {
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = size });
        await image.FlushAsync();
        return image;
    }

    private static async Task ExpectAsync(byte[] file, byte[] disk, int moment)
    {
        await using Qcow2Image image = await Qcow2Image.OpenAsync(new RecordingFile(file), new Qcow2Options { ReadOnly = true });
        byte[] got = new byte[disk.Length];
        await image.ReadAsync(0, got);
        int same = got.AsSpan().CommonPrefixLength(disk);
        Assert.True(same == disk.Length, $"moment {moment}: byte {same} is {(same < disk.Length ? got[same] : 0)}");
    }

    private sealed record Moment(byte[] Journal, byte[] Target, byte[] Source);
}
