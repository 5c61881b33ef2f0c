using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>Both kinds of rings against a driver model, and against drivers that break the rules.</summary>
public sealed class VirtqueueTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Data = 0x40_0000;

    /// <summary>Writes what it reads, each byte plus one. Buffers may be answered in any order.</summary>
    private sealed class Echo(GuestMemory memory, int reorder = 0) : VirtioDevice(VirtioType.Input, "echo", memory, [256], configSize: 8)
    {
        private readonly List<VirtqueueElement> _waiting = [];
        private readonly Random _random = new(1);

        public int Served;

        protected override ulong DeviceFeatures => 1;

        protected override void Process(Virtqueue queue)
        {
            while (queue.Pop() is { } element)
            {
                _waiting.Add(element);
                if (_waiting.Count > reorder)
                    Answer(queue, _random.Next(_waiting.Count));
            }
            while (_waiting.Count > 0)
                Answer(queue, _random.Next(_waiting.Count));
            queue.Notify();
        }

        protected override void Stopped() => _waiting.Clear();

        private void Answer(Virtqueue queue, int index)
        {
            VirtqueueElement element = _waiting[index];
            _waiting.RemoveAt(index);
            byte[] bytes = new byte[Math.Min(element.ReadableLength, 1 << 20)];
            element.Read(0, bytes);
            for (int i = 0; i < bytes.Length; i++)
                bytes[i]++;
            Interlocked.Increment(ref Served);
            queue.Push(element, (uint)element.Write(0, bytes));
        }
    }

    /// <summary>Answers nothing.</summary>
    private sealed class Holder(GuestMemory memory) : VirtioDevice(VirtioType.Input, "holder", memory, [256], configSize: 8)
    {
        public int Held;

        protected override ulong DeviceFeatures => 1;

        protected override void Process(Virtqueue queue)
        {
            while (queue.Pop() is not null)
                Interlocked.Increment(ref Held);
        }
    }

    private readonly GuestMemory _memory = new(16ul << 20);

    public void Dispose() => _memory.Dispose();

    public static TheoryData<bool, bool, int> Kinds()
    {
        TheoryData<bool, bool, int> kinds = [];
        foreach (bool packed in new[] { false, true })
        {
            foreach (bool events in new[] { false, true })
            {
                kinds.Add(packed, events, 0);
                kinds.Add(packed, events, 7);
            }
        }
        return kinds;
    }

    private static ulong Features(bool packed, bool events) =>
        ModelDriver.Version1 | ModelDriver.RingIndirect | (packed ? ModelDriver.RingPacked : 0) | (events ? ModelDriver.RingEventIndex : 0) | 1;

    [Theory]
    [MemberData(nameof(Kinds))]
    public void RandomChainsComeBackWithTheirBytes(bool packed, bool events, int reorder)
    {
        using Echo device = new(_memory, reorder);
        ModelDriver driver = new(device, _memory);
        ushort size = packed ? (ushort)13 : (ushort)16;
        ModelQueue queue = driver.Start(Features(packed, events), size, Rings)[0];
        Random random = new(packed ? 11 : 12);
        Dictionary<int, (byte[] Sent, ulong At)> under = [];
        Stack<ulong> places = new(Enumerable.Range(0, 64).Select(i => Data + (ulong)i * 0x1_0000));
        int done = 0;
        const int total = 4000;
        int sent = 0;
        while (done < total)
        {
            while (sent < total && under.Count < 40 && random.Next(4) != 0)
            {
                int reads = random.Next(1, 5);
                int writes = random.Next(1, 4);
                ulong place = places.Pop();
                List<Part> parts = [];
                byte[] bytes = new byte[random.Next(1, 3000)];
                random.NextBytes(bytes);
                int offset = 0;
                for (int i = 0; i < reads; i++)
                {
                    int length = i == reads - 1 ? bytes.Length - offset : random.Next(0, bytes.Length - offset + 1);
                    _memory.TryWrite(new Gpa(place + (ulong)offset), bytes.AsSpan(offset, length));
                    // A part of no bytes is no mistake.
                    parts.Add(new Part(place + (ulong)offset, (uint)length, false));
                    offset += length;
                }
                int given = 0;
                for (int i = 0; i < writes; i++)
                {
                    int length = i == writes - 1 ? bytes.Length - given : random.Next(0, bytes.Length - given + 1);
                    parts.Add(new Part(place + 0x8000 + (ulong)given, (uint)length, true));
                    given += length;
                }
                int id = queue.TryAdd(CollectionsMarshal.AsSpan(parts), indirect: random.Next(3) == 0);
                if (id < 0)
                {
                    places.Push(place);
                    break;
                }
                under.Add(id, (bytes, place));
                sent++;
            }
            if (queue.NeedsKick())
                driver.Kick(0);
            while (under.Count > 0 && (under.Count > 20 || sent == total || random.Next(3) == 0))
            {
                (int id, uint written) = driver.Wait(queue);
                (byte[] bytes, ulong place) = under[id];
                under.Remove(id);
                Assert.Equal((uint)bytes.Length, written);
                byte[] back = new byte[bytes.Length];
                Assert.True(_memory.TryRead(new Gpa(place + 0x8000), back));
                for (int i = 0; i < bytes.Length; i++)
                    Assert.Equal((byte)(bytes[i] + 1), back[i]);
                places.Push(place);
                done++;
            }
        }
        Assert.Equal(15u, driver.Status);
        Assert.Equal(total, device.Served);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void ADriverThatDoesNotWantInterruptsGetsNone(bool packed)
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        ModelQueue queue = driver.Start(Features(packed, events: false), 16, Rings)[0];
        queue.WantInterrupts(false);
        Send(driver, queue);
        driver.Wait(queue);
        device.Pause();
        device.Resume();
        Assert.Equal(0, driver.Irq.TakeRises());
        queue.WantInterrupts(true);
        Send(driver, queue);
        driver.Wait(queue);
        Assert.True(SpinWait.SpinUntil(() => driver.Irq.Level, 120_000));
        Assert.Equal(1u, driver[0x60]);
        driver[0x64] = 1;
        Assert.False(driver.Irq.Level);
    }

    public static TheoryData<string> Faults() => new("address", "wrap", "huge", "loop", "next", "head", "ahead", "order", "indirect-size", "indirect-next", "indirect-loop", "indirect-nested", "indirect-address", "indirect-huge");

    [Theory]
    [MemberData(nameof(Faults))]
    public void ASplitRingThatBreaksTheRulesAsksForAReset(string fault)
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        List<string> log = [];
        device.Log = log.Add;
        ModelQueue queue = driver.Start(Features(false, false), 16, Rings)[0];
        ulong table = Data + 0x1000;
        void Descriptor(ulong at, ulong address, uint length, ushort flags, ushort next)
        {
            _memory.TryWrite(new Gpa(at), address);
            _memory.TryWrite(new Gpa(at + 8), length);
            _memory.TryWrite(new Gpa(at + 12), flags);
            _memory.TryWrite(new Gpa(at + 14), next);
        }
        ulong first = queue.Descriptors;
        Descriptor(first, Data, 16, 0, 0);
        ushort head = 0;
        ushort index = 1;
        switch (fault)
        {
            case "address":
                Descriptor(first, 0xf000_0000, 16, 0, 0);
                break;
            case "wrap":
                Descriptor(first, ulong.MaxValue - 4, 16, 0, 0);
                break;
            case "huge":
                Descriptor(first, Data, uint.MaxValue, 2, 0);
                break;
            case "loop":
                Descriptor(first, Data, 16, 1, 1);
                Descriptor(first + 16, Data, 16, 1, 0);
                break;
            case "next":
                Descriptor(first, Data, 16, 1, 99);
                break;
            case "head":
                head = 16;
                break;
            case "ahead":
                index = 17;
                break;
            case "order":
                Descriptor(first, Data, 16, 3, 1);
                Descriptor(first + 16, Data, 16, 0, 0);
                break;
            case "indirect-size":
                Descriptor(first, table, 24, 4, 0);
                break;
            case "indirect-next":
                Descriptor(first, table, 16, 5, 1);
                break;
            case "indirect-loop":
                Descriptor(first, table, 32, 4, 0);
                Descriptor(table, Data, 16, 1, 1);
                Descriptor(table + 16, Data, 16, 1, 0);
                break;
            case "indirect-nested":
                Descriptor(first, table, 16, 4, 0);
                Descriptor(table, table, 16, 4, 0);
                break;
            case "indirect-address":
                Descriptor(first, 0xf000_0000, 16, 4, 0);
                break;
            case "indirect-huge":
                // The same 8 MiB, 600 times.
                Descriptor(first, table, 600 * 16, 4, 0);
                for (ushort i = 0; i < 600; i++)
                    Descriptor(table + i * 16ul, 0x10_0000, 8 << 20, (ushort)(i < 599 ? 1 : 0), (ushort)(i + 1));
                break;
        }
        _memory.TryWrite(new Gpa(queue.Driver + 4), head);
        _memory.TryWrite(new Gpa(queue.Driver + 2), index);
        driver.Kick(0);
        Assert.True(SpinWait.SpinUntil(() => (driver.Status & 64) != 0, 120_000), fault);
        Assert.True(SpinWait.SpinUntil(() => log.Count == 1 && driver.Irq.Level, 120_000));
        Assert.Equal(2u, driver[0x60]);
        Assert.Equal(0, device.Served);

        // A reset makes it whole again.
        queue = driver.Start(Features(false, false), 16, Rings)[0];
        Send(driver, queue);
        driver.Wait(queue);
        Assert.Equal(15u, driver.Status);
    }

    [Fact]
    public void EntriesThatAreUsedAgainTooSoonDoNotMakeADeviceHoldMore()
    {
        const int size = 16;
        using Holder device = new(_memory);
        ModelDriver driver = new(device, _memory);
        List<string> log = [];
        device.Log = log.Add;
        ModelQueue queue = driver.Start(Features(false, false), size, Rings)[0];
        _memory.TryWrite(new Gpa(queue.Descriptors), Data);
        _memory.TryWrite(new Gpa(queue.Descriptors + 8), 16u);
        // All entries of the ring are zero: the one buffer, time and again.
        _memory.TryWrite(new Gpa(queue.Driver + 2), (ushort)size);
        driver.Kick(0);
        Assert.True(SpinWait.SpinUntil(() => Volatile.Read(ref device.Held) == size, 120_000));
        Assert.Equal(0u, driver.Status & 64);
        _memory.TryWrite(new Gpa(queue.Driver + 2), (ushort)(size + 1));
        driver.Kick(0);
        Assert.True(SpinWait.SpinUntil(() => (driver.Status & 64) != 0, 120_000));
        Assert.Equal(size, device.Held);
        Assert.True(SpinWait.SpinUntil(() => log.Count == 1, 120_000));
        Assert.Contains("more buffers than entries", log[0]);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void GarbageInARingHarmsNothing(bool packed)
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        Random random = new(42);
        int broken = 0;
        for (int round = 0; round < 300; round++)
        {
            ModelQueue queue = driver.Start(Features(packed, random.Next(2) == 0), 16, Rings)[0];
            byte[] garbage = new byte[(int)(queue.Device + 256 - queue.Descriptors)];
            random.NextBytes(garbage);
            if (random.Next(2) == 0)
            {
                // Half of them plausible: small addresses and lengths, few flags.
                for (int i = 0; i < 16; i++)
                {
                    MemoryMarshal.Write(garbage.AsSpan(i * 16), Data + (ulong)random.Next(0x1000));
                    MemoryMarshal.Write(garbage.AsSpan(i * 16 + 8), (uint)random.Next(64));
                    garbage[i * 16 + 12] &= packed ? (byte)0xff : (byte)7;
                    garbage[i * 16 + 13] = 0;
                    garbage[i * 16 + 14] &= packed ? (byte)0x83 : (byte)15;
                    garbage[i * 16 + 15] = (byte)(packed ? random.Next(2) << 7 : 0);
                }
                garbage[256 + 3] = 0;
                garbage[256 + 2] &= 15;
            }
            _memory.TryWrite(new Gpa(queue.Descriptors), garbage);
            for (int kick = 0; kick < 3; kick++)
            {
                driver.Kick(0);
                _memory.TryWrite(new Gpa(queue.Descriptors + (ulong)random.Next(garbage.Length)), (byte)random.Next(256));
            }
            SpinWait.SpinUntil(() => !device.Queues[0].HasAvailable, 10_000);
            // A queue that broke is empty before the status tells.
            if (!device.Queues[0].IsLive || (driver.Status & 64) != 0)
                broken++;
        }
        Assert.InRange(broken, 50, 300);
        ModelQueue last = driver.Start(Features(packed, false), 16, Rings)[0];
        Send(driver, last);
        driver.Wait(last);
    }

    [Fact]
    public void FeaturesAreNegotiatedAsTheSpecificationSays()
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        Assert.Equal(0x7472_6976u, driver[0]);
        Assert.Equal(2u, driver[4]);
        Assert.Equal((uint)VirtioType.Input, driver[8]);
        Assert.NotEqual(0ul, driver.Offered & ModelDriver.Version1);
        Assert.Equal(0ul, driver.Offered & 1ul << 27);

        // Without VERSION_1, and with bits that were not offered, FEATURES_OK does not stay.
        foreach (ulong features in new[] { 1ul, ModelDriver.Version1 | 1 << 5 })
        {
            driver.Status = 0;
            driver.Status = 3;
            driver[0x24] = 0;
            driver[0x20] = (uint)features;
            driver[0x24] = 1;
            driver[0x20] = (uint)(features >> 32);
            driver.Status = 11;
            Assert.Equal(3u, driver.Status);
        }
        driver.Start(ModelDriver.Version1 | 1, 16, Rings);
        Assert.Equal(15u, driver.Status);
        driver[0x20] = 0;
        Assert.True(device.Has(1));
        driver.Status = 0;
        Assert.Equal(0u, driver.Status);
        Assert.False(device.Has(1));
    }

    [Theory]
    [InlineData(0xffff_f000u, 16)]
    [InlineData(0x10_0008u, 16)]
    [InlineData(0x10_0000u, 15)]
    [InlineData(0x10_0000u, 0)]
    [InlineData(0x10_0000u, 512)]
    public void RingsThatCannotBeAskForAReset(uint descriptors, ushort size)
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        driver.Start(Features(false, false), 16, Rings);
        driver.Status = 0;
        driver.Status = 3;
        driver[0x24] = 1;
        driver[0x20] = 1;
        driver.Status = 11;
        driver[0x30] = 0;
        driver[0x38] = size;
        driver.SetAddress(0x80, descriptors);
        driver.SetAddress(0x90, 0x11_0000);
        driver.SetAddress(0xa0, 0x12_0000);
        driver[0x44] = 1;
        driver.Status = 15;
        Assert.NotEqual(0u, driver.Status & 64);
    }

    [Fact]
    public void APausedDeviceDoesNothingUntilItGoesOn()
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        ModelQueue queue = driver.Start(Features(false, true), 16, Rings)[0];
        device.Pause();
        VirtioDevice.State saved = device.Save();
        Send(driver, queue);
        Assert.False(SpinWait.SpinUntil(() => queue.TryTake(out _, out _), 50));
        device.Resume();
        driver.Wait(queue);

        // What was saved starts a second device where the first one was.
        driver.Status = 0;
        device.Pause();
        device.Restore(saved);
        Assert.Equal(15u, driver.Status);
        Assert.Equal(saved.Queues[0], device.Save().Queues[0]);
    }

    [Fact]
    public void AResetWhileTheVmIsBeingPausedWaitsForWhatIsUnderWay()
    {
        using Echo device = new(_memory);
        ModelDriver driver = new(device, _memory);
        driver.Start(Features(false, true), 16, Rings);
        Assert.True(device.TryHold());
        Thread pause = new(device.Pause) { IsBackground = true };
        pause.Start();
        Assert.True(SpinWait.SpinUntil(
            () =>
            {
                if (!device.TryHold())
                    return true;
                device.Release();
                return false;
            },
            120_000));
        device.WriteStatus(0, wait: false);
        Assert.NotEqual(VirtioStatus.None, device.Status);
        device.Release();
        Assert.True(pause.Join(120_000));
        Assert.Equal(VirtioStatus.None, device.Status);
        device.Resume();
        ModelQueue queue = driver.Start(Features(false, true), 16, Rings)[0];
        Send(driver, queue);
        driver.Wait(queue);
    }

    /// <summary>What waited in the rings when the first device was saved is served by the second, and what comes after, too.</summary>
    [Theory]
    [InlineData(false, false)]
    [InlineData(false, true)]
    [InlineData(true, false)]
    [InlineData(true, true)]
    public void AnotherDeviceGoesOnWhereASavedOneStood(bool packed, bool eventIndex)
    {
        using Echo first = new(_memory);
        ModelDriver driver = new(first, _memory);
        ModelQueue queue = driver.Start(Features(packed, eventIndex), 16, Rings)[0];
        // Past the rings' ends, so that positions and wrap counters are not those of the start.
        for (int i = 0; i < 21; i++)
        {
            Send(driver, queue);
            driver.Wait(queue);
        }
        first.Pause();
        Send(driver, queue);
        VirtioDevice.State saved = first.Save();
        using Echo second = new(_memory);
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        Assert.False(queue.TryTake(out _, out _));
        second.Resume();
        other.Wait(queue);
        for (int i = 0; i < 21; i++)
        {
            Send(other, queue);
            other.Wait(queue);
        }
        Assert.Equal(15u, other.Status);
        Assert.Equal((saved.Accepted, saved.Generation), (second.Save().Accepted, second.Save().Generation));
    }

    private static void Send(ModelDriver driver, ModelQueue queue)
    {
        Assert.True(queue.TryAdd([new Part(Data, 64, false), new Part(Data + 0x100, 64, true)], indirect: false) >= 0);
        driver.Kick(queue.Index);
    }
}
