using System;
using System.Collections.Generic;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The write log is cut anywhere and reordered between flushes: flushed data stays, and at most clusters leak.</summary>
public sealed class Qcow2CrashTests
{
    /// <summary>Workloads; each is cut at every point of its log. KVASIR_CRASH_SEEDS asks for more of them.</summary>
    private static readonly int Seeds = int.TryParse(Environment.GetEnvironmentVariable("KVASIR_CRASH_SEEDS"), out int seeds) ? seeds : 40;

    [Fact]
    public async Task No_crash_point_corrupts_or_loses_flushed_data()
    {
        int runs = 0;
        for (int seed = 1; seed <= Seeds; seed++)
            runs += await RunAsync(seed).WaitAsync(TimeSpan.FromSeconds(120));
        Assert.True(runs > Seeds * 40, $"only {runs} crash points");
        TestContext.Current.SendDiagnosticMessage($"{runs} crash points");
    }

    private static async Task<int> RunAsync(int seed)
    {
        Random random = new(seed);
        int clusterBits = random.Next(9, 17);
        int clusterSize = 1 << clusterBits;
        int size = random.Next(64, 512) * 512;
        RecordingFile file = new();
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions
        {
            Size = size,
            ClusterSize = clusterSize,
            RefcountBits = 1 << random.Next(0, 7),
            ExtendedL2 = clusterBits >= 14 && random.Next(2) == 0,
        });
        bool snapshots = image.RefcountBits >= 8;
        await image.FlushAsync();
        byte[] start = file.Content();
        file.Log.Clear();
        byte[] content = new byte[size];
        // What may be read back: for each byte the values since the last flush, kept as whole disk states per flush.
        List<(int LogPosition, byte[] Content)> stable = [(0, (byte[])content.Clone())];
        List<(int Start, int Length, int LogPosition)> writes = [];
        for (int step = 0; step < 30; step++)
        {
            int at = random.Next(size);
            int length = Math.Min(size - at, random.Next(1, 20000));
            switch (random.Next(12))
            {
                case < 5:
                    byte[] data = new byte[length];
                    random.NextBytes(data);
                    writes.Add((at, length, file.Log.Count));
                    await image.WriteAsync(at, data);
                    data.CopyTo(content, at);
                    break;
                case 5:
                    writes.Add((at, length, file.Log.Count));
                    await image.WriteZeroesAsync(at, length, ZeroFlags.MayUnmap);
                    content.AsSpan(at, length).Clear();
                    break;
                case 6:
                    writes.Add((at, length, file.Log.Count));
                    await image.DiscardAsync(at, length);
                    // Only whole units are dropped: what is left is what the image says.
                    await image.ReadAsync(0, content);
                    break;
                case 7:
                    int cluster = at / clusterSize * clusterSize;
                    byte[] packed = new byte[Math.Min(clusterSize, size - cluster)];
                    packed.AsSpan().Fill((byte)random.Next(256));
                    writes.Add((cluster, packed.Length, file.Log.Count));
                    await image.WriteAsync(cluster, packed, WriteFlags.Compressed);
                    packed.CopyTo(content, cluster);
                    break;
                case 8 when snapshots && image.Snapshots.Count < 3:
                    await image.CreateSnapshotAsync("s" + step, DateTimeOffset.UnixEpoch);
                    break;
                case 9 when image.Snapshots.Count > 0:
                    await image.DeleteSnapshotAsync(image.Snapshots[0]);
                    break;
                default:
                    await image.FlushAsync();
                    stable.Add((file.Log.Count, (byte[])content.Clone()));
                    break;
            }
        }
        for (int cut = 0; cut <= file.Log.Count; cut++)
        {
            byte[] disk = WriteLog.Replay(start, file.Log, cut, random);
            (int position, byte[] flushed) = stable.FindLast(s => s.LogPosition <= cut);
            await VerifyAsync(disk, flushed, writes.FindAll(w => w.LogPosition >= position || w.LogPosition >= cut), $"seed {seed}, cut {cut} of {file.Log.Count}");
        }
        return file.Log.Count + 1;
    }

    private static async Task VerifyAsync(byte[] disk, byte[] flushed, List<(int Start, int Length, int LogPosition)> unstable, string context)
    {
        Qcow2Image image = await Qcow2Image.OpenAsync(new RecordingFile(disk), new Qcow2Options { ReadOnly = true, ForCheck = true });
        if (image.IsDirty)
        {
            // Counts were about to change with a snapshot: the next opening for writing puts them right.
            RecordingFile repaired = new(disk);
            await (await Qcow2Image.OpenAsync(repaired, new Qcow2Options())).DisposeAsync();
            image = await Qcow2Image.OpenAsync(new RecordingFile(repaired.Content()), new Qcow2Options { ReadOnly = true, ForCheck = true });
            Assert.False(image.IsDirty, context);
        }
        List<string> findings = [];
        CheckResult result = await image.CheckAsync(CheckRepair.None, findings.Add);
        Assert.True(result.Corruptions == 0, $"{context}: {string.Join('\n', findings)}");
        byte[] got = new byte[flushed.Length];
        await image.ReadAsync(0, got);
        bool[] open = new bool[flushed.Length];
        foreach ((int start, int length, _) in unstable)
            open.AsSpan(start, length).Fill(true);
        for (int i = 0; i < got.Length; i++)
        {
            if (!open[i] && got[i] != flushed[i])
                Assert.Fail($"{context}: flushed byte {i} is lost");
        }
    }
}
