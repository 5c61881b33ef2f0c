using System;
using System.Collections.Generic;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>The write log is cut anywhere and reordered between flushes: flushed data stays, and at most clusters leak.</summary>
public sealed class Qcow2CrashTests
{
    [Fact]
    public async Task No_crash_point_corrupts_or_loses_flushed_data()
    {
        for (int seed = 1; seed <= 25; seed++)
            await RunAsync(seed).WaitAsync(TimeSpan.FromSeconds(60));
    }

    private static async Task RunAsync(int seed)
    {
        Random random = new(seed);
        int clusterBits = random.Next(9, 17);
        int size = random.Next(64, 512) * 512;
        RecordingFile file = new();
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions
        {
            Size = size,
            ClusterSize = 1 << clusterBits,
            RefcountBits = 1 << random.Next(0, 7),
            ExtendedL2 = clusterBits >= 14 && random.Next(2) == 0,
        });
        await image.FlushAsync();
        byte[] start = file.Content();
        file.Log.Clear();
        byte[] content = new byte[size];
        // What may be read back: for each byte the values since the last flush, kept as whole disk states per flush.
        List<(int LogPosition, byte[] Content)> stable = [(0, (byte[])content.Clone())];
        List<(int Start, int Length, int LogPosition)> writes = [];
        for (int step = 0; step < 40; step++)
        {
            int at = random.Next(size);
            int length = Math.Min(size - at, random.Next(1, 20000));
            int what = random.Next(10);
            if (what < 6)
            {
                byte[] data = new byte[length];
                random.NextBytes(data);
                writes.Add((at, length, file.Log.Count));
                await image.WriteAsync(at, data);
                data.CopyTo(content, at);
            }
            else if (what < 8)
            {
                writes.Add((at, length, file.Log.Count));
                await image.WriteZeroesAsync(at, length, ZeroFlags.MayUnmap);
                content.AsSpan(at, length).Clear();
            }
            else
            {
                await image.FlushAsync();
                stable.Add((file.Log.Count, (byte[])content.Clone()));
            }
        }
        for (int trial = 0; trial < 25; trial++)
        {
            int cut = random.Next(file.Log.Count + 1);
            byte[] disk = WriteLog.Replay(start, file.Log, cut, random);
            (int position, byte[] flushed) = stable.FindLast(s => s.LogPosition <= cut);
            await VerifyAsync(disk, flushed, writes.FindAll(w => w.LogPosition >= position || w.LogPosition >= cut), $"seed {seed}, cut {cut} of {file.Log.Count}");
        }
    }

    private static async Task VerifyAsync(byte[] disk, byte[] flushed, List<(int Start, int Length, int LogPosition)> unstable, string context)
    {
        Qcow2Image image = await Qcow2Image.OpenAsync(new RecordingFile(disk), new Qcow2Options { ReadOnly = true, ForCheck = true });
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
