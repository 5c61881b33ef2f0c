using System;
using System.Buffers.Binary;
using System.Linq;
using System.Text;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Serial;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>The balloon, the console and the entropy device at their registers.</summary>
public sealed class VirtioBalloonTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Buffers = 0x90_0000;
    private const ulong Victim = 0x100_0000;
    private const ulong All = ulong.MaxValue & ~ModelDriver.RingPacked;

    private readonly GuestMemory _memory = new(64ul << 20);

    public void Dispose() => _memory.Dispose();

    private void Send(ModelDriver driver, ModelQueue queue, ReadOnlySpan<byte> bytes)
    {
        _memory.TryWrite(new Gpa(Buffers), bytes);
        Assert.True(queue.TryAdd([new Part(Buffers, (uint)bytes.Length, false)], indirect: false) >= 0);
        driver.Kick(queue.Index);
        driver.Wait(queue);
    }

    [Fact]
    public void PagesInTheBalloonReadAsZerosAndOthersStay()
    {
        using VirtioBalloon device = new("balloon", _memory);
        ModelDriver driver = new(device, _memory);
        // Without poisoning, or the pages that are reported free would have to keep it.
        ModelQueue[] queues = driver.Start(All & ~(1ul << 4), 64, Rings);
        _memory.TryWrite(new Gpa(Victim), Enumerable.Repeat((byte)7, 8 * 4096).ToArray());
        // Upwards, downwards, alone, and what is no RAM.
        uint page = (uint)(Victim / 4096);
        byte[] numbers = new byte[6 * 4];
        foreach ((int at, uint number) in new[] { (0, page + 1), (4, page + 2), (8, page + 6), (12, page + 5), (16, 0xffff_ffffu), (20, 0xf0_0000u) })
            BinaryPrimitives.WriteUInt32LittleEndian(numbers.AsSpan(at), number);
        Send(driver, queues[0], numbers);
        for (int i = 0; i < 8; i++)
        {
            _memory.TryRead(new Gpa(Victim + (ulong)i * 4096 + 100), out byte value);
            Assert.Equal(i is 1 or 2 or 5 or 6 ? 0 : 7, value);
        }
        Assert.Equal(4 * 4096, device.GivenBack);
        Send(driver, queues[1], numbers);

        // Free page reporting: whole runs, and only whole pages of them.
        Assert.True(queues[4].TryAdd([new Part(Victim + 3 * 4096, 4096, true), new Part(Victim + 7 * 4096 + 1, 100, true)], indirect: true) >= 0);
        driver.Kick(4);
        driver.Wait(queues[4]);
        _memory.TryRead(new Gpa(Victim + 3 * 4096), out byte reported);
        _memory.TryRead(new Gpa(Victim + 7 * 4096 + 5), out byte kept);
        Assert.Equal((0, 7), (reported, kept));
        Assert.Equal(15u, driver.Status);
    }

    [Fact]
    public void ATargetAndStatisticsAreAskedFor()
    {
        using VirtioBalloon device = new("balloon", _memory);
        ModelDriver driver = new(device, _memory);
        ModelQueue[] queues = driver.Start(All, 64, Rings);
        device.SetTarget(32ul << 20);
        Assert.True(driver.Irq.Level);
        Assert.Equal(8192u, driver[0x100]);
        driver[0x104] = 4096;
        Assert.Equal(16ul << 20, device.Actual);
        driver[0x100] = 1;
        Assert.Equal(8192u, driver[0x100]);

        byte[] entries = new byte[20];
        BinaryPrimitives.WriteUInt16LittleEndian(entries, 4);
        BinaryPrimitives.WriteUInt64LittleEndian(entries.AsSpan(2), 1234);
        BinaryPrimitives.WriteUInt16LittleEndian(entries.AsSpan(10), 5);
        BinaryPrimitives.WriteUInt64LittleEndian(entries.AsSpan(12), ulong.MaxValue);
        _memory.TryWrite(new Gpa(Buffers), entries);
        queues[2].TryAdd([new Part(Buffers, 20, false)], indirect: false);
        driver.Kick(2);
        Assert.True(SpinWait.SpinUntil(() => device.Statistics.Free == 1234, 120_000));
        Assert.Equal(long.MaxValue, device.Statistics.Total);
        Assert.Equal(-1, device.Statistics.SwapIn);
        Assert.False(queues[2].TryTake(out _, out _));
        device.AskStatistics();
        driver.Wait(queues[2]);
        driver.Status = 0;
        Assert.Equal(-1, device.Statistics.Free);
    }

    [Fact]
    public void ARestoredDeviceHasTheBufferForStatistics()
    {
        using VirtioBalloon device = new("balloon", _memory);
        ModelDriver driver = new(device, _memory);
        ModelQueue[] queues = driver.Start(All, 64, Rings);
        byte[] entry = new byte[10];
        entry[0] = 4;
        entry[2] = 99;
        _memory.TryWrite(new Gpa(Buffers), entry);
        queues[2].TryAdd([new Part(Buffers, 10, false)], indirect: false);
        driver.Kick(2);
        Assert.True(SpinWait.SpinUntil(() => device.Statistics.Free == 99, 120_000));
        device.Pause();
        VirtioDevice.State saved = device.Save();
        using VirtioBalloon second = new("second", _memory);
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        second.Resume();
        Assert.True(SpinWait.SpinUntil(() => second.Statistics.Free == 99, 120_000));
        Assert.False(queues[2].TryTake(out _, out _));
        second.AskStatistics();
        other.Wait(queues[2]);
    }

    [Fact]
    public void HintedPagesGoBackBetweenStartAndStop()
    {
        using VirtioBalloon device = new("balloon", _memory);
        ModelDriver driver = new(device, _memory);
        Assert.False(device.AskFreePages());
        ModelQueue[] queues = driver.Start(All & ~(1ul << 4), 64, Rings);
        Assert.True(device.AskFreePages());
        uint command = driver[0x108];
        Assert.True(command >= 2);
        _memory.TryWrite(new Gpa(Victim), (byte)7);
        byte[] word = new byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(word, command);
        Send(driver, queues[3], word);
        queues[3].TryAdd([new Part(Victim, 4 << 20, true)], indirect: false);
        driver.Kick(3);
        driver.Wait(queues[3]);
        _memory.TryRead(new Gpa(Victim), out byte value);
        Assert.Equal(0, value);
        Send(driver, queues[3], new byte[4]);
        Assert.True(SpinWait.SpinUntil(() => driver[0x108] == 1, 120_000));
        _memory.TryWrite(new Gpa(Victim), (byte)7);
        queues[3].TryAdd([new Part(Victim, 4096, true)], indirect: false);
        driver.Kick(3);
        driver.Wait(queues[3]);
        _memory.TryRead(new Gpa(Victim), out value);
        Assert.Equal(7, value);
    }

    [Fact]
    public void AConsoleTellsOfItsPortsAndMovesBytes()
    {
        MemoryBackend first = new();
        MemoryBackend second = new();
        using VirtioConsole device = new("console", _memory, [new ConsolePort(first), new ConsolePort(second, "org.test")]);
        ModelDriver driver = new(device, _memory);
        Assert.Equal(2u, driver[0x104]);
        ModelQueue[] queues = driver.Start(All, 64, Rings);
        Assert.Equal(6, queues.Length);
        ulong messages = Buffers + 0x1_0000;
        for (int i = 0; i < 16; i++)
            queues[2].TryAdd([new Part(messages + (ulong)i * 64, 64, true)], indirect: false);
        byte[] Message(uint id, ushort kind, ushort value)
        {
            byte[] bytes = new byte[8];
            BinaryPrimitives.WriteUInt32LittleEndian(bytes, id);
            BinaryPrimitives.WriteUInt16LittleEndian(bytes.AsSpan(4), kind);
            BinaryPrimitives.WriteUInt16LittleEndian(bytes.AsSpan(6), value);
            return bytes;
        }

        string Next()
        {
            (int id, uint length) = driver.Wait(queues[2]);
            byte[] bytes = new byte[length];
            _memory.TryRead(new Gpa(messages + (ulong)id * 64), bytes);
            return $"{BinaryPrimitives.ReadUInt32LittleEndian(bytes)}:{BinaryPrimitives.ReadUInt16LittleEndian(bytes.AsSpan(4))}:{Encoding.Latin1.GetString(bytes, 8, bytes.Length - 8)}";
        }

        driver.Kick(2);
        Send(driver, queues[3], Message(0, 0, 1));
        Assert.Equal(["0:1:", "1:1:"], new[] { Next(), Next() });
        Send(driver, queues[3], Message(0, 3, 1));
        Assert.Equal(["0:4:", "0:5:P\0\u0019\0", "0:6:"], new[] { Next(), Next(), Next() });
        Send(driver, queues[3], Message(1, 3, 1));
        Assert.Equal(["1:7:org.test", "1:6:"], new[] { Next(), Next() });
        Send(driver, queues[3], Message(99, 3, 1));
        device.Resize(100, 30);
        Assert.Equal("0:5:d\0\u001e\0", Next());

        Send(driver, queues[1], "to the host"u8);
        Assert.True(SpinWait.SpinUntil(() => first.Text == "to the host", 120_000));
        // A channel keeps what comes until a program has opened it.
        queues[4].TryAdd([new Part(Buffers + 0x2000, 16, true)], indirect: false);
        driver.Kick(4);
        second.Send("abc");
        Assert.False(SpinWait.SpinUntil(() => queues[4].TryTake(out _, out _), 50));
        Send(driver, queues[3], Message(1, 6, 1));
        Assert.Equal(3u, driver.Wait(queues[4]).Written);
        byte[] got = new byte[3];
        _memory.TryRead(new Gpa(Buffers + 0x2000), got);
        Assert.Equal("abc"u8.ToArray(), got);
        Assert.Equal(15u, driver.Status);
    }

    [Fact]
    public void EntropyFillsWhatItIsGiven()
    {
        using VirtioRng device = new("rng", _memory);
        ModelDriver driver = new(device, _memory);
        ModelQueue queue = driver.Start(All, 64, Rings)[0];
        queue.TryAdd([new Part(Victim, 100_000, true)], indirect: false);
        driver.Kick(0);
        uint written = driver.Wait(queue).Written;
        Assert.InRange(written, 64u, 100_000u);
        byte[] bytes = new byte[written];
        _memory.TryRead(new Gpa(Victim), bytes);
        Assert.InRange(bytes.Distinct().Count(), 30, 256);
    }
}
