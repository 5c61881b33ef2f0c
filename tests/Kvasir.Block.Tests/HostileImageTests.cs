using System;
using System.Buffers.Binary;
using System.Threading.Tasks;
using Kvasir.Block.Qcow2;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>Damaged and hostile images: a clear error, or what can still be read; never another exception, never a hang.</summary>
public sealed class HostileImageTests
{
    [Fact]
    public async Task Random_damage_never_does_worse_than_an_error()
    {
        byte[] good = await MakeAsync();
        Random random = new(7);
        for (int round = 0; round < 1000; round++)
        {
            byte[] bad = (byte[])good.Clone();
            int flips = random.Next(1, 6);
            for (int i = 0; i < flips; i++)
            {
                int at = random.Next(3) == 0 ? random.Next(256) : random.Next(bad.Length);
                if (random.Next(2) == 0)
                    bad[at] = (byte)random.Next(256);
                else
                    BinaryPrimitives.WriteUInt64BigEndian(bad.AsSpan(Math.Min(at & ~7, bad.Length - 8)), random.Next(2) == 0 ? ulong.MaxValue >> random.Next(64) : 1ul << random.Next(64));
            }
            if (random.Next(10) == 0)
                Array.Resize(ref bad, random.Next(bad.Length));
            await ExerciseAsync(bad, readOnly: random.Next(2) == 0, $"round {round}");
        }
    }

    [Fact]
    public async Task A_guest_cluster_on_the_header_is_not_written()
    {
        RecordingFile file = new();
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = 1 << 20 });
        await image.WriteAsync(0, new byte[] { 1, 2, 3 });
        await image.DisposeAsync();
        byte[] bytes = file.Content();
        long l1 = BinaryPrimitives.ReadInt64BigEndian(bytes.AsSpan(40));
        long l2 = BinaryPrimitives.ReadInt64BigEndian(bytes.AsSpan((int)l1)) & 0x00ff_ffff_ffff_fe00;
        BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan((int)l2), (1ul << 63) | (ulong)l1);
        RecordingFile hostile = new(bytes);
        Qcow2Image opened = await Qcow2Image.OpenAsync(hostile, new Qcow2Options());
        BlockException error = await Assert.ThrowsAsync<BlockException>(async () => await opened.WriteAsync(0, new byte[512]));
        Assert.Contains("metadata", error.Message, StringComparison.Ordinal);
        Assert.True(opened.IsCorrupt);
        Assert.Equal(l1, BinaryPrimitives.ReadInt64BigEndian(hostile.Content().AsSpan(40)));
    }

    [Fact]
    public async Task A_guessed_raw_disk_refuses_a_header_of_another_format()
    {
        RawImage guessed = new(new RecordingFile(new byte[1 << 20])) { Guarded = true };
        byte[] header = (await MakeAsync()).AsSpan(0, 4096).ToArray();
        await Assert.ThrowsAsync<BlockException>(async () => await guessed.WriteAsync(0, header));
        await guessed.WriteAsync(512, header);
    }

    [Theory]
    [InlineData(20, 0xffffffffu)]
    [InlineData(36, 0x7fffffffu)]
    [InlineData(56, 0xffffffffu)]
    [InlineData(60, 0xffffffffu)]
    [InlineData(16, 0xffffffffu)]
    [InlineData(96, 0xffffffffu)]
    [InlineData(100, 0xffffffffu)]
    public async Task Out_of_range_header_fields_are_refused(int field, uint value)
    {
        byte[] bytes = await MakeAsync();
        BinaryPrimitives.WriteUInt32BigEndian(bytes.AsSpan(field), value);
        if (field == 16)
            BinaryPrimitives.WriteUInt64BigEndian(bytes.AsSpan(8), 200);
        await Assert.ThrowsAsync<BlockException>(async () => await Qcow2Image.OpenAsync(new RecordingFile(bytes), new Qcow2Options()));
    }

    private static async Task<byte[]> MakeAsync()
    {
        RecordingFile file = new();
        Qcow2Image image = await Qcow2Creator.CreateAsync(file, new Qcow2CreateOptions { Size = 1 << 20, ClusterSize = 4096 });
        byte[] data = new byte[50000];
        new Random(1).NextBytes(data);
        await image.WriteAsync(1000, data);
        byte[] cluster = new byte[4096];
        cluster.AsSpan(0, 100).Fill(5);
        await image.WriteAsync(819200, cluster, WriteFlags.Compressed);
        await image.CreateSnapshotAsync("one", DateTimeOffset.UnixEpoch);
        await image.WriteAsync(20000, data.AsMemory(0, 9000));
        await image.WriteZeroesAsync(40960, 8192);
        await Qcow2Bitmaps.AddAsync(image, "b", 16, enabled: true);
        await image.DisposeAsync();
        return file.Content();
    }

    private static async Task ExerciseAsync(byte[] bytes, bool readOnly, string context)
    {
        try
        {
            Qcow2Image image = await Qcow2Image.OpenAsync(new RecordingFile(bytes), new Qcow2Options { ReadOnly = readOnly });
            byte[] buffer = new byte[(int)Math.Min(image.Length, 1 << 20)];
            await TryAsync(async () => await image.ReadAsync(0, buffer));
            await TryAsync(async () => await image.CheckAsync(readOnly ? CheckRepair.None : CheckRepair.All));
            await TryAsync(async () => await Qcow2Bitmaps.ListAsync(image));
            if (!readOnly)
            {
                await TryAsync(async () => await image.WriteAsync(0, buffer.AsMemory(0, Math.Min(buffer.Length, 30000))));
                await TryAsync(async () => await image.DiscardAsync(0, Math.Min(image.Length, 1 << 20)));
                if (image.Snapshots.Count > 0)
                    await TryAsync(async () => await image.DeleteSnapshotAsync(image.Snapshots[0]));
            }
            await TryAsync(async () => await image.DisposeAsync());
        }
        catch (BlockException)
        {
            // Refused at the door.
        }
        catch (Exception error)
        {
            throw new InvalidOperationException(context, error);
        }
    }

    private static async Task TryAsync(Func<Task> action)
    {
        try
        {
            await action();
        }
        catch (BlockException error)
        {
            Assert.False(string.IsNullOrEmpty(error.Message));
        }
    }
}
