using System;
using System.Collections.Generic;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Jobs;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Jobs on a disk that a guest writes to meanwhile.</summary>
public sealed class JobTests
{
    /// <summary>The job copies a unit while a guest's write to it is under way, and sees what was there before: the end of the write marks it again.</summary>
    [Fact]
    public async Task A_write_that_a_mirror_overtakes_is_copied_after_its_end()
    {
        const int size = 256 << 10;
        byte[] old = new byte[size];
        old.AsSpan().Fill(1);
        Filters.FaultNode source = new(new RecordingFile(old));
        TaskCompletionSource copied = new(TaskCreationOptions.RunContinuationsAsynchronously);
        RecordingFile disk = new(new byte[size]);
        Filters.FaultNode target = new(disk);
        int writes = 0;
        disk.BeforeWrite = () =>
        {
            if (++writes == 2)
                copied.TrySetResult();
        };
        target.Break(Filters.FaultKind.Write, "t");
        await using BlockBackend backend = BlockBackend.Over(source, new BackendOptions());
        await using MirrorJob job = await MirrorJob.StartAsync(backend, target, new MirrorOptions { Pivot = false });
        await target.WaitBreakAsync("t").WaitAsync(TimeSpan.FromSeconds(60));
        source.Break(Filters.FaultKind.Write, "w");
        Task write = backend.Node.WriteAsync(70_000, new byte[] { 2 }).AsTask();
        await source.WaitBreakAsync("w").WaitAsync(TimeSpan.FromSeconds(60));
        // The job goes on, with the unit that is about to change.
        Assert.True(target.Resume("t"));
        await copied.Task.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.True(source.Resume("w"));
        await write;
        job.Complete();
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(2, disk.Content()[70_000]);
        Assert.Equal(1, disk.Content()[69_999]);
    }

    private const int Size = 6 << 20;

    [Fact]
    public async Task A_mirror_ends_with_the_guest_on_the_target()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: true);
        BlockNode target = await ImageCreator.CreateAsync("qcow2", folder["target.qcow2"], Size, new ImageOptions(), Guest.NoSecrets);
        MirrorJob job = await MirrorJob.StartAsync(guest.Backend, target, new MirrorOptions());
        await guest.WriteAsync(300);
        await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(JobState.Ready, job.State);
        await guest.WriteAsync(50);
        job.Complete();
        await guest.WriteAsync(50);
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal((JobState.Done, folder["target.qcow2"]), (job.State, guest.Backend.Node.FileName));
        Assert.Equal(job.Total, job.Done);
        await guest.WriteAsync(20);
        await guest.VerifyAsync();
        await guest.Backend.DisposeAsync();
        await CheckAsync(folder["target.qcow2"], guest.Content);
    }

    [Fact]
    public async Task A_mirror_goes_on_where_a_killed_one_was()
    {
        using TestFolder folder = new();
        string journal = folder["job"];
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: false);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", folder["target.qcow2"], "6M");
        long left;
        {
            (DirtyMap map, bool resumed) = await DirtyMap.OpenJournalAsync(journal, Size, 64 << 10, durable: false);
            Assert.False(resumed);
            await map.SetAllAsync();
            BlockNode target = await Image.OpenAsync(folder["target.qcow2"], new OpenOptions { Format = "qcow2", ReadOnly = false });
            MirrorJob job = await MirrorJob.StartAsync(guest.Backend, target, new MirrorOptions { Map = map, Workers = 1, Speed = 4 << 20 });
            await guest.WriteAsync(20);
            for (int i = 0; i < 200 && job.Done < Size / 4; i++)
                await Task.Delay(20);
            // What a killed process leaves is what lies in the files at any time: this end is no kinder than that to the journal.
            await job.CancelAsync();
            Assert.Equal(JobState.Cancelled, job.State);
        }
        {
            (DirtyMap map, bool resumed) = await DirtyMap.OpenJournalAsync(journal, Size, 64 << 10, durable: false);
            Assert.True(resumed);
            left = map.DirtyBytes;
            Assert.InRange(left, 1, Size - 1);
            BlockNode target = await Image.OpenAsync(folder["target.qcow2"], new OpenOptions { Format = "qcow2", ReadOnly = false });
            MirrorJob job = await MirrorJob.StartAsync(guest.Backend, target, new MirrorOptions { Map = map });
            await guest.WriteAsync(20);
            await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
            job.Complete();
            await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        }
        await guest.VerifyAsync();
        await guest.Backend.DisposeAsync();
        await CheckAsync(folder["target.qcow2"], guest.Content);
    }

    [Fact]
    public async Task A_backup_is_the_disk_of_its_first_moment()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: true);
        byte[] then = (byte[])guest.Content.Clone();
        BlockNode target = await ImageCreator.CreateAsync("qcow2", folder["backup.qcow2"], Size, new ImageOptions(), Guest.NoSecrets);
        BackupJob job = await BackupJob.StartAsync(guest.Backend, target, new BackupOptions { Speed = 16 << 20 });
        await guest.WriteAsync(200);
        job.Speed = 0;
        await guest.WriteAsync(100);
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        await guest.VerifyAsync();
        await CheckAsync(folder["backup.qcow2"], then);
    }

    [Fact]
    public async Task An_incremental_backup_copies_what_its_bitmap_says()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: false);
        string full = folder["full.qcow2"];
        await Peer.ImgOkAsync("convert", "-U", "-f", "qcow2", "-O", "qcow2", folder["source.qcow2"], full);
        byte[] then = (byte[])guest.Content.Clone();
        DirtyMap map = new(Size, 64 << 10);
        new Random(5).NextBytes(then.AsSpan(1 << 20, 100_000));
        await guest.Backend.Node.WriteAsync(1 << 20, then.AsMemory(1 << 20, 100_000));
        then.AsSpan(1 << 20, 100_000).CopyTo(guest.Content.AsSpan(1 << 20));
        // Bits as a persistent bitmap of granularity 64 KiB has them: units 16 and 17.
        await map.SetBitsAsync(new byte[] { 0, 0, 3 }, 16);
        Assert.Equal(128 << 10, map.DirtyBytes);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", folder["inc.qcow2"]);
        BlockNode target = await Image.OpenAsync(folder["inc.qcow2"], new OpenOptions { Format = "qcow2", ReadOnly = false });
        BackupJob job = await BackupJob.StartAsync(guest.Backend, target, new BackupOptions { Map = map });
        await guest.WriteAsync(100);
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        await CheckAsync(folder["inc.qcow2"], then);
    }

    [Fact]
    public async Task A_persistent_bitmap_records_what_is_written_and_drives_a_backup()
    {
        Peer.Need("qemu-nbd");
        Peer.Need("nbdinfo");
        using TestFolder folder = new();
        string path = folder["disk.qcow2"];
        await Peer.OkAsync("qemu-img", "create", "-q", "-f", "qcow2", path, "6M");
        await Peer.OkAsync("qemu-io", "-c", "write -P 1 0 6M", path);
        string full = folder["full.qcow2"];
        await Peer.ImgOkAsync("convert", "-O", "qcow2", path, full);
        await Peer.OkAsync("qemu-img", "bitmap", "--add", "-g", "64k", path, "b");
        await Peer.OkAsync("qemu-io", "-c", "write -P 2 1M 10", path);
        Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 3 2M 100k", "-c", "write -z 4M 64k", path)).Code);
        (_, string info) = await Peer.RunAsync("qemu-img", "info", path);
        Assert.DoesNotContain("in-use", info, StringComparison.Ordinal);
        await Peer.OkAsync("qemu-img", "check", path);
        Assert.Equal("1048576 65536,2097152 131072,4194304 65536", await DirtyAsync(folder, path, "b"));
        BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "qcow2" });
        byte[] bits = await ((Qcow2Image)backend.Node).TakeBitmapAsync("b");
        DirtyMap map = new(backend.Length, 64 << 10);
        await map.SetBitsAsync(bits, 16);
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", full, "-F", "qcow2", folder["inc.qcow2"]);
        BlockNode target = await Image.OpenAsync(folder["inc.qcow2"], new OpenOptions { Format = "qcow2", ReadOnly = false });
        BackupJob job = await BackupJob.StartAsync(backend, target, new BackupOptions { Map = map });
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        await backend.Node.WriteAsync(5 << 20, new byte[] { 9 });
        await backend.DisposeAsync();
        Assert.Equal("5242880 65536", await DirtyAsync(folder, path, "b"));
        Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 1 5M 1", path)).Code);
        await Peer.OkAsync("qemu-img", "compare", path, folder["inc.qcow2"]);
        // Killed before it was closed, the image does not trust the bitmap any more.
        BlockNode killed = await Image.OpenAsync(path, new OpenOptions { Format = "qcow2", ReadOnly = false });
        await killed.WriteAsync(0, new byte[] { 1 });
        byte[] now = await File.ReadAllBytesAsync(path);
        await killed.DisposeAsync();
        await File.WriteAllBytesAsync(folder["killed.qcow2"], now);
        (_, info) = await Peer.RunAsync("qemu-img", "info", folder["killed.qcow2"]);
        Assert.Contains("in-use", info, StringComparison.Ordinal);
    }

    private static async Task<string> DirtyAsync(TestFolder folder, string path, string bitmap)
    {
        string socket = folder["nbd" + Guid.NewGuid().ToString("N")[..8]];
        using System.Diagnostics.Process server = System.Diagnostics.Process.Start("qemu-nbd", ["-r", "-k", socket, "-f", "qcow2", "-B", bitmap, path]);
        for (int i = 0; i < 200 && !File.Exists(socket); i++)
            await Task.Delay(25);
        (int code, string map) = await Peer.RunAsync("nbdinfo", $"--map=qemu:dirty-bitmap:{bitmap}", $"nbd+unix:///?socket={socket}");
        Assert.True(code == 0, map);
        await server.WaitForExitAsync().WaitAsync(TimeSpan.FromSeconds(20));
        List<string> dirty = [];
        foreach (string line in map.Split('\n', StringSplitOptions.RemoveEmptyEntries))
        {
            string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
            if (words[2] == "1")
                dirty.Add($"{words[0]} {words[1]}");
        }
        return string.Join(',', dirty);
    }

    [Fact]
    public async Task A_backup_whose_target_fails_leaves_the_guest_alone()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: false);
        FaultNode target = new(new NullNode(Size, true), new FaultRule(FaultKind.Write, BlockErrno.NoSpace, Skip: 1));
        BackupJob job = await BackupJob.StartAsync(guest.Backend, target, new BackupOptions { Speed = 1 << 20 });
        await guest.WriteAsync(100);
        await Assert.ThrowsAsync<BlockException>(() => job.Completion.WaitAsync(TimeSpan.FromSeconds(60)));
        Assert.Equal(JobState.Failed, job.State);
        await guest.WriteAsync(20);
        await guest.VerifyAsync();
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_stream_takes_in_the_chain(bool keepBase)
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "top.qcow2", chain: true);
        BlockNode? basis = keepBase ? guest.Backend.Node.Backing!.Backing : null;
        StreamJob job = await StreamJob.StartAsync(guest.Backend, basis, 0);
        await guest.WriteAsync(200);
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(basis?.FileName, guest.Backend.Node.Backing?.FileName);
        await guest.WriteAsync(20);
        await guest.VerifyAsync();
        await guest.Backend.DisposeAsync();
        await CheckAsync(folder["top.qcow2"], guest.Content);
        File.Delete(folder["top.qcow2-mid"]);
        await CheckAsync(folder["top.qcow2"], guest.Content);
    }

    [Fact]
    public async Task A_commit_of_the_disk_in_use_ends_on_its_base()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "top.qcow2", chain: true, share: true);
        BlockNode basis = guest.Backend.Node.Backing!;
        BlockNode target = await Image.OpenAsync(basis.FileName, new OpenOptions { Format = "qcow2", ReadOnly = false, ForceShare = true });
        MirrorJob job = await MirrorJob.StartAsync(guest.Backend, target, new MirrorOptions { Base = basis });
        Assert.Equal("commit", job.Kind);
        await guest.WriteAsync(200);
        await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
        job.Complete();
        await job.Completion.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.Equal(folder["top.qcow2-mid"], guest.Backend.Node.FileName);
        await guest.WriteAsync(20);
        await guest.VerifyAsync();
        await guest.Backend.DisposeAsync();
        await CheckAsync(folder["top.qcow2-mid"], guest.Content);
    }

    [Fact]
    public async Task Speed_pause_and_cancel_are_obeyed()
    {
        using TestFolder folder = new();
        await using Guest guest = await Guest.StartAsync(folder, "source.qcow2", chain: false);
        MirrorJob job = await MirrorJob.StartAsync(guest.Backend, new NullNode(Size, true), new MirrorOptions { Speed = 2 << 20 });
        long start = System.Diagnostics.Stopwatch.GetTimestamp();
        await job.Ready.WaitAsync(TimeSpan.FromSeconds(60));
        Assert.InRange(System.Diagnostics.Stopwatch.GetElapsedTime(start).TotalSeconds, 1.5, 20);
        job.Pause();
        await guest.WriteAsync(50);
        long done = job.Done;
        await Task.Delay(200);
        Assert.Equal(done, job.Done);
        job.Resume();
        await job.CancelAsync();
        Assert.Equal(JobState.Cancelled, job.State);
        await guest.VerifyAsync();
    }

    private static async Task CheckAsync(string path, byte[] expected)
    {
        Peer.Need("qemu-img");
        await Peer.OkAsync("qemu-img", "check", "-f", "qcow2", path);
        string raw = path + ".raw";
        await Peer.OkAsync("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw);
        Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(expected), path);
    }

    /// <summary>A disk with a model of what it holds, written through the back end's requests.</summary>
    private sealed class Guest : IAsyncDisposable
    {
        private readonly Random _random = new(11);

        private Guest(BlockBackend backend, byte[] content)
        {
            Backend = backend;
            Content = content;
        }

        public static IReadOnlyDictionary<string, ReadOnlyMemory<byte>> NoSecrets { get; } = new Dictionary<string, ReadOnlyMemory<byte>>();

        public BlockBackend Backend { get; }

        public byte[] Content { get; }

        public static async Task<Guest> StartAsync(TestFolder folder, string name, bool chain, bool share = false)
        {
            string path = folder[name];
            if (chain)
            {
                await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", path + "-base", "6M");
                Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 1 0 3M", path + "-base")).Code);
                await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", path + "-base", "-F", "qcow2", path + "-mid");
                Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 2 2M 2M", "-c", "write -z 1M 256k", path + "-mid")).Code);
                await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", "-b", path + "-mid", "-F", "qcow2", path);
            }
            else
            {
                await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", path, "6M");
                Assert.Equal(0, (await Peer.IoAsync("-c", "write -P 1 0 5M", path)).Code);
            }
            BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "qcow2", ForceShare = share });
            byte[] content = new byte[Size];
            await backend.Node.ReadAsync(0, content);
            return new Guest(backend, content);
        }

        public async Task WriteAsync(int count)
        {
            using SemaphoreSlim done = new(0);
            GuestRequest[] requests = [new(done), new(done), new(done), new(done)];
            for (int i = 0; i < count; i += requests.Length)
            {
                for (int k = 0; k < requests.Length; k++)
                {
                    // Requests under way together keep to a quarter of the disk each.
                    int at = (Size / 4 * k) + (_random.Next(Size / 4 / 512 - 40) * 512);
                    int length = _random.Next(1, 40) * 512;
                    requests[k].Clear();
                    requests[k].Offset = at;
                    if (_random.Next(5) == 0)
                    {
                        Content.AsSpan(at, length).Clear();
                        (requests[k].Operation, requests[k].Length, requests[k].MayUnmap) = (BlockOperation.WriteZeroes, length, true);
                    }
                    else
                    {
                        _random.NextBytes(Content.AsSpan(at, length));
                        requests[k].Operation = BlockOperation.Write;
                        requests[k].Add(Content.AsSpan(at, length).ToArray());
                    }
                    Backend.Submit(requests[k]);
                }
                for (int k = 0; k < requests.Length; k++)
                    await done.WaitAsync();
                foreach (GuestRequest request in requests)
                    Assert.True(request.Error == 0, request.ErrorText);
                await Task.Yield();
            }
        }

        public async Task VerifyAsync()
        {
            byte[] got = new byte[Size];
            await Backend.Node.ReadAsync(0, got);
            Assert.True(got.AsSpan().SequenceEqual(Content));
        }

        public async ValueTask DisposeAsync() => await Backend.DisposeAsync();
    }

    private sealed class GuestRequest(SemaphoreSlim done) : BlockRequest
    {
        protected override void OnCompleted() => done.Release();
    }
}
