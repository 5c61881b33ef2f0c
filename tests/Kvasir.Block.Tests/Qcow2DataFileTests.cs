using System;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Images whose data lie in a file of their own, where a cluster always comes back to the same place.</summary>
public sealed class Qcow2DataFileTests
{
    [Fact]
    public async Task A_write_after_a_discard_is_not_dropped_with_it()
    {
        const int cluster = 65536;
        RecordingFile data = new();
        Qcow2Image image = await CreateAsync(new RecordingFile(), data, 4 * cluster, cluster, extended: false);
        byte[] old = new byte[4 * cluster];
        old.AsSpan().Fill(1);
        await image.WriteAsync(0, old);
        await image.FlushAsync();
        await image.WriteZeroesAsync(0, 4 * cluster, ZeroFlags.MayUnmap);
        byte[] fresh = new byte[5000];
        fresh.AsSpan().Fill(2);
        await image.WriteAsync(cluster + 100, fresh);
        await image.FlushAsync();
        byte[] got = new byte[4 * cluster];
        await image.ReadAsync(0, got);
        byte[] expected = new byte[4 * cluster];
        fresh.CopyTo(expected, cluster + 100);
        Assert.Equal(expected, got);
    }

    [Fact]
    public async Task Random_histories_read_back()
    {
        for (int seed = 1; seed <= 40; seed++)
        {
            Random random = new(seed);
            bool extended = random.Next(3) == 0;
            int cluster = 1 << (extended ? random.Next(14, 17) : random.Next(9, 17));
            int size = random.Next(64, 2048) * 512;
            RecordingFile file = new();
            RecordingFile data = new();
            Qcow2Image image = await CreateAsync(file, data, size, cluster, extended);
            byte[] expected = new byte[size];
            for (int step = 0; step < 80; step++)
            {
                int start = random.Next(size);
                int length = Math.Min(size - start, random.Next(1, random.Next(2) == 0 ? 5000 : 200_000));
                switch (random.Next(6))
                {
                    case 0:
                        await image.WriteZeroesAsync(start, length, random.Next(2) == 0 ? ZeroFlags.MayUnmap : ZeroFlags.None);
                        expected.AsSpan(start, length).Clear();
                        break;
                    case 1:
                        await image.DiscardAsync(start, length);
                        await image.ReadAsync(0, expected);
                        break;
                    case 2:
                        await image.FlushAsync();
                        break;
                    default:
                        byte[] bytes = new byte[length];
                        random.NextBytes(bytes);
                        await image.WriteAsync(start, bytes);
                        bytes.CopyTo(expected, start);
                        break;
                }
                byte[] got = new byte[size];
                await image.ReadAsync(0, got);
                int same = got.AsSpan().CommonPrefixLength(expected);
                Assert.True(same == size, $"seed {seed}, step {step}: content differs at {same}");
            }
            CheckResult result = await image.CheckAsync();
            Assert.True(result.Corruptions == 0 && result.Leaks == 0, $"seed {seed}: {result}");
            await image.DisposeAsync();
            Qcow2Image again = await Qcow2Image.OpenAsync(new RecordingFile(file.Content()), new Qcow2Options { DataFile = new RecordingFile(data.Content()) });
            byte[] all = new byte[size];
            await again.ReadAsync(0, all);
            Assert.True(all.AsSpan().SequenceEqual(expected), $"seed {seed}: content differs when opened again");
        }
    }

    private static async Task<Qcow2Image> CreateAsync(RecordingFile file, RecordingFile data, int size, int cluster, bool extended) =>
        await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = size, ClusterSize = cluster, ExtendedL2 = extended, DataFileName = "data", DataFile = data });
}
