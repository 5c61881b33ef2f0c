using System;
using System.Collections.Generic;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Random histories on qcow2 images of random layouts, against a plain byte array and against QEMU.</summary>
public sealed class Qcow2HistoryTests
{
    private static readonly byte[] Passphrase = "mellon"u8.ToArray();

    [Fact]
    public async Task Random_histories_read_back_and_check_clean()
    {
        for (int seed = 1; seed <= 60; seed++)
            await RunHistoryAsync(seed, null).WaitAsync(TimeSpan.FromSeconds(60));
    }

    [Fact]
    public async Task Qemu_agrees_with_random_images()
    {
        Peer.Need("qemu-img");
        using TestFolder folder = new();
        for (int seed = 1000; seed < 1012; seed++)
            await RunHistoryAsync(seed, folder).WaitAsync(TimeSpan.FromSeconds(60));
    }

    [Fact]
    public async Task Parallel_writers_do_not_disturb_each_other()
    {
        for (int seed = 1; seed <= 10; seed++)
        {
            RecordingFile file = new();
            const int size = 4 << 20;
            byte[] backing = new byte[size];
            new Random(seed).NextBytes(backing);
            Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = size, ClusterSize = 65536, ExtendedL2 = seed % 2 == 0 });
            image.SetBacking(new RawImage(new RecordingFile((byte[])backing.Clone())));
            byte[] expected = (byte[])backing.Clone();
            Task[] lanes = new Task[16];
            for (int lane = 0; lane < lanes.Length; lane++)
            {
                int own = lane;
                lanes[lane] = Task.Run(async () =>
                {
                    // Lanes own interleaved 4 KiB pieces, so that every cluster is fought over.
                    Random random = new((seed * 100) + own);
                    for (int i = 0; i < 60; i++)
                    {
                        int piece = (random.Next(size / 4096 / 16) * 16) + own;
                        byte[] data = new byte[4096];
                        random.NextBytes(data);
                        await image.WriteAsync(piece * 4096L, data);
                        data.CopyTo(expected, piece * 4096);
                        if (i % 20 == 19)
                            await image.FlushAsync();
                    }
                });
            }
            await Task.WhenAll(lanes);
            byte[] got = new byte[size];
            await image.ReadAsync(0, got);
            Assert.True(got.AsSpan().SequenceEqual(expected), $"seed {seed}");
            CheckResult result = await image.CheckAsync();
            Assert.True(result.Corruptions == 0 && result.Leaks == 0, $"seed {seed}: {result}");
            await image.DisposeAsync();
        }
    }

    private static async Task RunHistoryAsync(int seed, TestFolder? folder)
    {
        Random random = new(seed);
        bool extended = random.Next(4) == 0;
        int clusterBits = extended ? random.Next(14, 18) : random.Next(9, 18);
        int version = !extended && random.Next(5) == 0 ? 2 : 3;
        int size = random.Next(1, 4096) * 512;
        bool luks = random.Next(8) == 0;
        Qcow2CreateOptions options = new()
        {
            Size = size,
            Version = version,
            ClusterSize = 1 << clusterBits,
            ExtendedL2 = extended,
            RefcountBits = version == 3 ? 1 << random.Next(0, 7) : 16,
            LazyRefcounts = version == 3 && random.Next(4) == 0,
            Compression = version == 3 && random.Next(3) == 0 ? Qcow2Compression.Zstd : Qcow2Compression.Zlib,
            Luks = luks ? new LuksCreateOptions { Passphrase = Passphrase, IterationMilliseconds = 1, CipherKeyBytes = random.Next(2) == 0 ? 16 : 32 } : null,
        };
        byte[]? backing = random.Next(2) == 0 && (!luks || folder is null) ? new byte[random.Next(1, 4096) * 512] : null;
        if (backing is not null)
            random.NextBytes(backing);
        string name = folder?[$"image{seed}.qcow2"] ?? string.Empty;
        BlockNode file;
        if (folder is null)
        {
            file = new RecordingFile();
        }
        else
        {
            file = await HostFile.CreateAsync(name, 0, Preallocation.Off, new HostFileOptions());
            if (backing is not null)
            {
                await File.WriteAllBytesAsync(folder["backing.raw"], backing);
                options = options with { BackingFile = "backing.raw", BackingFormat = "raw" };
            }
        }
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, options);
        if (backing is not null)
            image.SetBacking(new RawImage(new RecordingFile((byte[])backing.Clone())));
        byte[] expected = new byte[size];
        backing?.AsSpan(0, Math.Min(size, backing.Length)).CopyTo(expected);
        List<(Qcow2Snapshot Snapshot, byte[] Content)> snapshots = [];
        string context = $"seed {seed}, {options with { Luks = null }}, backing {backing?.Length}";
        for (int step = 0; step < 60; step++)
        {
            int what = random.Next(100);
            int start = random.Next(size);
            int length = Math.Min(size - start, random.Next(1, random.Next(2) == 0 ? 5000 : 300000));
            if (what < 45)
            {
                byte[] data = new byte[length];
                random.NextBytes(data);
                await image.WriteAsync(start, data);
                data.CopyTo(expected, start);
            }
            else if (what < 58)
            {
                await image.WriteZeroesAsync(start, length, random.Next(2) == 0 ? ZeroFlags.MayUnmap : ZeroFlags.None);
                expected.AsSpan(start, length).Clear();
            }
            else if (what < 64 && backing is null)
            {
                // A discard keeps or clears content; without a backing file only zeros may come of it.
                start &= ~511;
                length &= ~511;
                await image.DiscardAsync(start, Math.Min(length, size - start));
                await image.ReadAsync(0, expected);
            }
            else if (what < 72 && !luks)
            {
                int cluster = 1 << clusterBits;
                long at = random.Next((size + cluster - 1) / cluster) * (long)cluster;
                byte[] data = new byte[Math.Min(cluster, size - at)];
                data.AsSpan().Fill((byte)random.Next(256));
                random.NextBytes(data.AsSpan(0, data.Length / 5));
                await image.WriteAsync(at, data, WriteFlags.Compressed);
                data.CopyTo(expected, at);
            }
            else if (what < 78)
            {
                await image.FlushAsync();
            }
            else if (what < 83 && options.RefcountBits >= 8 && snapshots.Count < 4)
            {
                snapshots.Add((await image.CreateSnapshotAsync($"s{step}", DateTimeOffset.UnixEpoch), (byte[])expected.Clone()));
            }
            else if (what < 86 && snapshots.Count > 0)
            {
                (Qcow2Snapshot snapshot, byte[] content) = snapshots[random.Next(snapshots.Count)];
                await image.ApplySnapshotAsync(snapshot);
                content.CopyTo(expected, 0);
            }
            else if (what < 88 && snapshots.Count > 0)
            {
                int index = random.Next(snapshots.Count);
                await image.DeleteSnapshotAsync(snapshots[index].Snapshot);
                snapshots.RemoveAt(index);
            }
            else
            {
                byte[] got = new byte[length];
                await image.ReadAsync(start, got);
                Assert.True(got.AsSpan().SequenceEqual(expected.AsSpan(start, length)), $"{context}, step {step}");
            }
        }
        await VerifyAsync(image, expected, snapshots, context);
        await image.DisposeAsync();
        if (folder is null)
            await ReopenAsync((RecordingFile)file, backing, expected, snapshots, context);
        else
            await AskQemuAsync(folder, name, luks, expected, snapshots, context);
    }

    private static async Task VerifyAsync(Qcow2Image image, byte[] expected, List<(Qcow2Snapshot Snapshot, byte[] Content)> snapshots, string context)
    {
        byte[] all = new byte[expected.Length];
        await image.ReadAsync(0, all);
        int same = all.AsSpan().CommonPrefixLength(expected);
        Assert.True(same == expected.Length, $"{context}: content differs at {same}");
        foreach ((Qcow2Snapshot snapshot, byte[] content) in snapshots)
        {
            Qcow2Image view = await image.OpenSnapshotAsync(snapshot);
            await view.ReadAsync(0, all);
            Assert.True(all.AsSpan().SequenceEqual(content), $"{context}: snapshot {snapshot.Name} differs");
        }
        List<string> findings = [];
        CheckResult result = await image.CheckAsync(CheckRepair.None, findings.Add);
        Assert.True(result.Corruptions == 0 && result.Leaks == 0, $"{context}: {result}\n{string.Join('\n', findings)}");
    }

    private static async Task ReopenAsync(RecordingFile file, byte[]? backing, byte[] expected, List<(Qcow2Snapshot Snapshot, byte[] Content)> snapshots, string context)
    {
        Qcow2Image image = await Qcow2Image.OpenAsync(new RecordingFile(file.Content()), new Qcow2Options { Passphrase = Passphrase });
        if (backing is not null)
            image.SetBacking(new RawImage(new RecordingFile((byte[])backing.Clone())));
        List<(Qcow2Snapshot, byte[])> again = [];
        foreach ((Qcow2Snapshot snapshot, byte[] content) in snapshots)
            again.Add((image.FindSnapshot(snapshot.Name) ?? throw new InvalidOperationException(context), content));
        Assert.False(image.IsDirty, context);
        await VerifyAsync(image, expected, again, context + " (reopened)");
    }

    private static async Task AskQemuAsync(TestFolder folder, string name, bool luks, byte[] expected, List<(Qcow2Snapshot Snapshot, byte[] Content)> snapshots, string context)
    {
        (int code, string output) = luks
            ? await Peer.RunAsync("qemu-img", "check", "--object", "secret,id=s,data=mellon", "--image-opts", $"driver=qcow2,file.filename={name},encrypt.key-secret=s")
            : await Peer.RunAsync("qemu-img", "check", name);
        Assert.True(code == 0, $"{context}: qemu-img check gave {code}\n{output}");
        string raw = folder["content.raw"];
        string options = luks ? $"driver=qcow2,file.filename={name},encrypt.key-secret=s" : $"driver=qcow2,file.filename={name}";
        await Peer.OkAsync("qemu-img", "convert", "--object", "secret,id=s,data=mellon", "--image-opts", options, "-O", "raw", raw);
        Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(expected), $"{context}: QEMU reads something else");
        foreach ((Qcow2Snapshot snapshot, byte[] content) in snapshots)
        {
            await Peer.OkAsync("qemu-img", "convert", "--object", "secret,id=s,data=mellon", "--image-opts", "-l", snapshot.Name, options, "-O", "raw", raw);
            Assert.True((await File.ReadAllBytesAsync(raw)).AsSpan().SequenceEqual(content), $"{context}: QEMU reads something else in snapshot {snapshot.Name}");
        }
    }
}
