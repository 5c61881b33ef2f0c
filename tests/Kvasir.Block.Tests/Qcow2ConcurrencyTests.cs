using System;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Requests that are under way while others take away what they found.</summary>
public sealed class Qcow2ConcurrencyTests
{
    private const int Cluster = 64 << 10;

    /// <summary>A guest may discard what it is writing to. The cluster must not become another one's while the write is on its way.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_write_under_way_never_lands_in_another_cluster(bool steady)
    {
        RecordingFile file = new();
        FaultNode fault = new(file);
        await using Qcow2Image image = await Qcow2Creator.CreateAsync(fault, new Qcow2CreateOptions { Size = 16 * Cluster });
        await image.WriteAsync(0, Filled(1));
        await image.WriteAsync(8 * Cluster, Filled(8));
        await image.FlushAsync();
        fault.Break(FaultKind.Write, "slow");
        Task slow = image.WriteAsync(0, Filled(2).AsMemory(0, 4096)).AsTask();
        Assert.False(slow.IsCompleted);
        await image.DiscardAsync(0, Cluster);
        for (int i = 1; i < 6; i++)
        {
            await image.FlushAsync();
            if (steady)
            {
                // Others come and go meanwhile, so that there is never a moment without writes.
                fault.Break(FaultKind.Write, "other" + i);
                Task other = image.WriteAsync(8 * Cluster, Filled(9).AsMemory(0, 512)).AsTask();
                await image.FlushAsync();
                Assert.True(fault.Resume("other" + i));
                await other;
            }
            await image.WriteAsync(i * Cluster, Filled((byte)(2 + i)));
        }
        Assert.True(fault.Resume("slow"));
        await slow.WaitAsync(TimeSpan.FromSeconds(30));
        for (int i = 1; i < 6; i++)
        {
            byte[] got = new byte[Cluster];
            await image.ReadAsync(i * Cluster, got);
            Assert.True(got.AsSpan().SequenceEqual(Filled((byte)(2 + i))), $"cluster {i}");
        }
        // When it has ended, the dropped cluster is free again.
        await image.FlushAsync();
        await image.FlushAsync();
        long length = file.Length;
        await image.WriteAsync(7 * Cluster, Filled(7));
        await image.FlushAsync();
        Assert.Equal(length, file.Length);
        Assert.Equal(0, (await Qcow2Check.RunAsync(image, CheckRepair.None, null, default)).Leaks);
    }

    /// <summary>A snapshot waits for writes that have found their place, and those that come later for the snapshot.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task A_snapshot_does_not_change_after_it_was_made(bool allocated)
    {
        RecordingFile file = new();
        FaultNode fault = new(file);
        await using Qcow2Image image = await Qcow2Creator.CreateAsync(fault, new Qcow2CreateOptions { Size = 16 * Cluster });
        await image.WriteAsync(allocated ? 0 : Cluster, Filled(1));
        await image.FlushAsync();
        fault.Break(FaultKind.Write, "slow");
        Task slow = image.WriteAsync(0, Filled(2)).AsTask();
        Assert.False(slow.IsCompleted);
        Task<Qcow2Snapshot> making = image.CreateSnapshotAsync("s", DateTimeOffset.UnixEpoch).AsTask();
        Task late = image.WriteAsync(0, Filled(3)).AsTask();
        // It waits; what would not has had the time to end.
        await Task.WhenAny(making, Task.Delay(TimeSpan.FromMilliseconds(300)));
        Assert.False(making.IsCompleted);
        Assert.True(fault.Resume("slow"));
        Qcow2Snapshot snapshot = await making.WaitAsync(TimeSpan.FromSeconds(30));
        await slow.WaitAsync(TimeSpan.FromSeconds(30));
        await late.WaitAsync(TimeSpan.FromSeconds(30));
        byte[] got = new byte[Cluster];
        await image.ReadAsync(0, got);
        Assert.True(got.AsSpan().SequenceEqual(Filled(3)));
        CheckResult check = await Qcow2Check.RunAsync(image, CheckRepair.None, null, default);
        Assert.Equal((0L, 0L), (check.Corruptions, check.Leaks));
        await using Qcow2Image view = await image.OpenSnapshotAsync(snapshot);
        await view.ReadAsync(0, got);
        Assert.True(got.AsSpan().SequenceEqual(Filled(2)));
    }

    private static byte[] Filled(byte value)
    {
        byte[] data = new byte[Cluster];
        data.AsSpan().Fill(value);
        return data;
    }
}
