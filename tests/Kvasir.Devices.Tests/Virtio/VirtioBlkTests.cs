using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

public sealed class VirtioBlkTests : IAsyncDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Headers = 0x90_0000;
    private const ulong Data = 0xa0_0000;
    private const int Sectors = 4096;
    private const ulong All = ulong.MaxValue & ~ModelDriver.RingPacked;

    private readonly GuestMemory _memory = new(32ul << 20);
    private readonly ModelDisk _disk = new(new byte[Sectors * 512]);
    private readonly List<string> _pauses = [];
    private VirtioBlk? _device;

    private string[] Pauses
    {
        get
        {
            lock (_pauses)
                return [.. _pauses];
        }
    }

    public async ValueTask DisposeAsync()
    {
        _device?.Dispose();
        await _disk.DisposeAsync();
        _memory.Dispose();
    }

    private async Task<ModelDriver> MakeAsync(DiskSettings? settings = null, BackendOptions? options = null, int queues = 1)
    {
        Disk disk = new(await _disk.OpenAsync(options), settings ?? new DiskSettings { Name = "d" }, reason =>
        {
            lock (_pauses)
                _pauses.Add(reason);
        });
        _device = new VirtioBlk("blk", _memory, disk, queues, queues);
        return new ModelDriver(_device, _memory);
    }

    /// <summary>Sends one request and waits for its status.</summary>
    private byte Request(ModelDriver driver, ModelQueue queue, uint type, ulong sector, ReadOnlySpan<Part> data, bool indirect = false)
    {
        Post(queue, 0, type, sector, data, indirect);
        driver.Kick(queue.Index);
        driver.Wait(queue);
        return Status(0);
    }

    private void Post(ModelQueue queue, int slot, uint type, ulong sector, ReadOnlySpan<Part> data, bool indirect = false)
    {
        ulong header = Headers + (ulong)slot * 32;
        _memory.TryWrite(new Gpa(header), type);
        _memory.TryWrite(new Gpa(header + 8), sector);
        _memory.TryWrite(new Gpa(header + 16), (byte)0xff);
        Part[] parts = [new Part(header, 16, false), .. data, new Part(header + 16, 1, true)];
        Assert.True(queue.TryAdd(parts, indirect) >= 0);
    }

    private byte Status(int slot)
    {
        _memory.TryRead(new Gpa(Headers + (ulong)slot * 32 + 16), out byte status);
        return status;
    }

    [Fact]
    public async Task EachQueueHasADoorbellWhereItsKicksAreWritten()
    {
        await MakeAsync(queues: 3);
        VirtioMmio registers = new(_device!, new ProbeLine());
        Assert.Equal([(0x50, 4, 0), (0x50, 4, 1), (0x50, 4, 2)], registers.Doorbells.Select(bell => ((int)bell.Offset, (int)bell.Size, (int)bell.Match!.Value)));
        // Each queue has a thread of its own here.
        Assert.Equal(3, registers.Doorbells.Select(bell => bell.Bell).Distinct().Count());
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task RandomRequestsMatchAModelOfTheDisk(bool packed)
    {
        ModelDriver driver = await MakeAsync();
        ModelQueue queue = driver.Start(packed ? ulong.MaxValue : All, 128, Rings)[0];
        byte[] model = new byte[Sectors * 512];
        Random random = new(5);
        for (int round = 0; round < 1500; round++)
        {
            int count = random.Next(1, 64);
            int sector = random.Next(Sectors - count);
            int bytes = count * 512;
            uint type = random.Next(8) switch { < 4 => 0u, < 7 => 1u, _ => 13u };
            if (type == 13)
            {
                _memory.TryWrite(new Gpa(Data), (ulong)sector);
                _memory.TryWrite(new Gpa(Data + 8), (uint)count);
                _memory.TryWrite(new Gpa(Data + 12), (uint)random.Next(2));
                Assert.Equal(0, Request(driver, queue, type, 0, [new Part(Data, 16, false)]));
                model.AsSpan(sector * 512, bytes).Clear();
                continue;
            }
            // Scattered: pieces with gaps between, of odd sizes too.
            List<Part> parts = [];
            int left = bytes;
            ulong at = Data;
            while (left > 0)
            {
                int length = random.Next(4) == 0 ? left : Math.Min(left, random.Next(1, 9000));
                parts.Add(new Part(at, (uint)length, type == 0));
                at += (ulong)length + (ulong)random.Next(2) * 100;
                left -= length;
                if (parts.Count == 30)
                {
                    parts.Add(new Part(at, (uint)left, type == 0));
                    left = 0;
                }
            }
            if (type == 1)
            {
                byte[] content = new byte[bytes];
                random.NextBytes(content);
                int done = 0;
                foreach (Part part in parts)
                {
                    _memory.TryWrite(new Gpa(part.Address), content.AsSpan(done, (int)part.Length));
                    done += (int)part.Length;
                }
                content.CopyTo(model, sector * 512);
            }
            Assert.Equal(0, Request(driver, queue, type, (ulong)sector, CollectionsMarshal.AsSpan(parts), indirect: random.Next(2) == 0));
            if (type == 0)
            {
                int done = 0;
                foreach (Part part in parts)
                {
                    byte[] piece = new byte[part.Length];
                    _memory.TryRead(new Gpa(part.Address), piece);
                    Assert.True(piece.AsSpan().SequenceEqual(model.AsSpan(sector * 512 + done, piece.Length)), $"round {round}");
                    done += piece.Length;
                }
            }
        }
        Assert.Equal(0, Request(driver, queue, 4, 0, []));
        Assert.True(File.ReadAllBytes(_disk.Path).AsSpan().SequenceEqual(model));
    }

    [Fact]
    public async Task WhatADriverAsksWronglyIsAnErrorOfItsRequest()
    {
        ModelDriver driver = await MakeAsync(new DiskSettings { Name = "d", Serial = "serial-number-of-20-c" });
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        Assert.Equal(1, Request(driver, queue, 0, Sectors, [new Part(Data, 512, true)]));
        Assert.Equal(1, Request(driver, queue, 0, ulong.MaxValue, [new Part(Data, 512, true)]));
        Assert.Equal(1, Request(driver, queue, 0, Sectors - 1, [new Part(Data, 1024, true)]));
        Assert.Equal(1, Request(driver, queue, 1, 0, [new Part(Data, 511, false)]));
        Assert.Equal(2, Request(driver, queue, 77, 0, []));
        Assert.Equal(0, Request(driver, queue, 8, 0, [new Part(Data, 20, true)]));
        byte[] serial = new byte[20];
        _memory.TryRead(new Gpa(Data), serial);
        Assert.Equal("serial-number-of-20-", Encoding.ASCII.GetString(serial));
        // A discard with flags, and one beyond the end.
        _memory.TryWrite(new Gpa(Data), 0ul);
        _memory.TryWrite(new Gpa(Data + 8), 1ul << 32 | 8);
        Assert.Equal(2, Request(driver, queue, 11, 0, [new Part(Data, 16, false)]));
        _memory.TryWrite(new Gpa(Data + 8), (ulong)Sectors + 1);
        Assert.Equal(1, Request(driver, queue, 11, 0, [new Part(Data, 16, false)]));
        Assert.Equal(15u, driver.Status);

        // A buffer that has no place for the status cannot be answered.
        Assert.True(queue.TryAdd([new Part(Headers, 16, false)], indirect: false) >= 0);
        driver.Kick(0);
        Assert.True(SpinWait.SpinUntil(() => (driver.Status & 64) != 0, 120_000));
    }

    [Fact]
    public async Task AReadOnlyDiskSaysSoAndRefusesWrites()
    {
        ModelDriver driver = await MakeAsync(options: new BackendOptions { Format = "raw", ReadOnly = true });
        Assert.NotEqual(0ul, driver.Offered & 1 << 5);
        Assert.Equal(0ul, driver.Offered & 1 << 13);
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        Assert.Equal(1, Request(driver, queue, 1, 0, [new Part(Data, 512, false)]));
        Assert.Equal(0, Request(driver, queue, 0, 0, [new Part(Data, 512, true)]));
    }

    [Theory]
    [InlineData(ErrorPolicy.Report, 5, 1)]
    [InlineData(ErrorPolicy.Ignore, 5, 0)]
    [InlineData(ErrorPolicy.StopOnNoSpace, 5, 1)]
    public async Task AFailureOfTheHostIsAnsweredAsThePolicySays(ErrorPolicy policy, int errno, byte status)
    {
        ModelDriver driver = await MakeAsync(new DiskSettings { Name = "d", WriteError = policy });
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        _disk.Faults.Add(new FaultRule(FaultKind.Write, errno));
        Assert.Equal(status, Request(driver, queue, 1, 0, [new Part(Data, 512, false)]));
        Assert.Empty(Pauses);
    }

    [Fact]
    public async Task AFullHostDiskPausesTheVmAndNothingIsLost()
    {
        ModelDriver driver = await MakeAsync();
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        _disk.Faults.Add(new FaultRule(FaultKind.Write, BlockErrno.NoSpace));
        const int count = 8;
        for (int i = 0; i < count; i++)
        {
            _memory.TryWrite(new Gpa(Data + (ulong)i * 512), Enumerable.Repeat((byte)(i + 1), 512).ToArray());
            Post(queue, i, 1, (ulong)i, [new Part(Data + (ulong)i * 512, 512, false)]);
        }
        driver.Kick(0);
        // A request is kept before the VM is paused for it.
        Assert.True(SpinWait.SpinUntil(() => Pauses.Length == count, 120_000));
        Assert.All(Pauses, reason => Assert.Contains("No space left", reason, StringComparison.Ordinal));
        Assert.Equal(count, _device!.Disk.Kept);
        // What the machine does then; it goes on too early once, and fails again.
        _device.Pause();
        Assert.False(queue.TryTake(out _, out _));
        _device.Resume();
        Assert.True(SpinWait.SpinUntil(() => _device.Disk.Kept == count, 120_000));
        _device.Pause();
        _disk.Faults.Clear();
        _device.Resume();
        for (int i = 0; i < count; i++)
            driver.Wait(queue);
        for (int i = 0; i < count; i++)
        {
            Assert.Equal(0, Status(i));
            Assert.Equal((byte)(i + 1), File.ReadAllBytes(_disk.Path)[i * 512]);
        }
    }

    /// <summary>Two writes wait for the VM when it is saved; what was answered between them has taken their entries in a packed ring.</summary>
    [Theory]
    [InlineData(All)]
    [InlineData(ulong.MaxValue)]
    public async Task ARestoredDeviceServesWhatTheSavedOneHeld(ulong features)
    {
        ModelDriver driver = await MakeAsync();
        ModelQueue queue = driver.Start(features, 16, Rings)[0];
        _disk.Faults.Add(new FaultRule(FaultKind.Write, BlockErrno.NoSpace));
        for (int i = 0; i < 4; i++)
        {
            _memory.TryWrite(new Gpa(Data + (ulong)i * 512), Enumerable.Repeat((byte)(i + 1), 512).ToArray());
            Post(queue, i, i % 2 == 0 ? 1u : 0, (ulong)i, [new Part(Data + (ulong)i * 512, 512, i % 2 != 0)]);
        }
        driver.Kick(0);
        driver.Wait(queue);
        driver.Wait(queue);
        Assert.True(SpinWait.SpinUntil(() => _device!.Disk.Kept == 2, 120_000));
        _device!.Pause();
        // One more that nobody has looked at.
        Post(queue, 5, 1, 5, [new Part(Data, 512, false)]);
        VirtioDevice.State saved = _device.Save();
        Assert.Equal(2, saved.Held.Length);
        _disk.Faults.Clear();
        using VirtioBlk second = new("second", _memory, new Disk(_disk.Backend, new DiskSettings { Name = "d" }));
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        // It can be saved again before it has done anything.
        Assert.Equal(saved.Held.Select(held => held.Id), second.Save().Held.Select(held => held.Id));
        Assert.False(queue.TryTake(out _, out _));
        second.Resume();
        for (int i = 0; i < 3; i++)
            other.Wait(queue);
        foreach (int i in (int[])[0, 2, 5])
            Assert.Equal(0, Status(i));
        byte[] image = File.ReadAllBytes(_disk.Path);
        Assert.Equal((1, 3, 1), (image[0], image[2 * 512], image[5 * 512]));
        Assert.Empty(second.Save().Held);
        Assert.Equal(0, Request(other, queue, 1, 7, [new Part(Data, 512, false)]));
    }

    [Fact]
    public async Task AResetForgetsWhatWaits()
    {
        ModelDriver driver = await MakeAsync();
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        _disk.Faults.Add(new FaultRule(FaultKind.Write, BlockErrno.NoSpace));
        Post(queue, 0, 1, 0, [new Part(Data, 512, false)]);
        driver.Kick(0);
        Assert.True(SpinWait.SpinUntil(() => _device!.Disk.Kept == 1, 120_000));
        driver.Status = 0;
        Assert.Equal(0u, driver.Status);
        Assert.Equal(0, _device!.Disk.Kept);
        _disk.Faults.Clear();
        queue = driver.Start(All, 64, Rings)[0];
        Assert.Equal(0, Request(driver, queue, 1, 0, [new Part(Data, 512, false)]));
    }

    [Fact]
    public async Task ANewSizeIsToldToTheDriver()
    {
        ModelDriver driver = await MakeAsync();
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        Assert.Equal((uint)Sectors, driver[0x100]);
        uint generation = driver[0xfc];
        await _disk.Backend.ResizeAsync(2 * Sectors * 512, TestContext.Current.CancellationToken);
        Assert.True(driver.Irq.Level);
        Assert.Equal(2u, driver[0x60]);
        Assert.NotEqual(generation, driver[0xfc]);
        Assert.Equal(2u * Sectors, driver[0x100]);
        Assert.Equal(0, Request(driver, queue, 0, 2 * Sectors - 1, [new Part(Data, 512, true)]));
    }

    [Fact]
    public async Task SeveralQueuesWorkAtOnce()
    {
        ModelDriver driver = await MakeAsync(queues: 4);
        ModelQueue[] queues = driver.Start(All, 64, Rings);
        for (int round = 0; round < 200; round++)
        {
            for (int q = 0; q < 4; q++)
            {
                for (int i = 0; i < 8; i++)
                    Post(queues[q], q * 8 + i, 1, (ulong)(q * 8 + i), [new Part(Data + (ulong)(q * 8 + i) * 512, 512, false)]);
                driver.Kick(q);
            }
            for (int q = 0; q < 4; q++)
            {
                for (int i = 0; i < 8; i++)
                    driver.Wait(queues[q]);
            }
        }
        for (int slot = 0; slot < 32; slot++)
            Assert.Equal(0, Status(slot));
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public async Task ResetsUnderLoadLeaveNothingBehind(bool packed)
    {
        ModelDriver driver = await MakeAsync();
        Random random = new(3);
        for (int round = 0; round < 100; round++)
        {
            ModelQueue queue = driver.Start(packed ? ulong.MaxValue : All, 64, Rings)[0];
            for (int i = 0; i < 20; i++)
                Post(queue, i, (uint)random.Next(2) * 4, 0, []);
            driver.Kick(0);
            if (random.Next(2) == 0)
                driver.Wait(queue);
            driver.Status = 0;
            Assert.Equal(0u, driver.Status);
        }
    }
}
