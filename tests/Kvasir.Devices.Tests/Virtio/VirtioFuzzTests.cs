using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Kvasir.Network.Vsock;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>
/// Hostile drivers of every type of device: rings full of anything, and rings that are well formed around messages that are not. The device may ask for a reset, after
/// which it works; it touches no memory that it was not given, keeps no more than a bound, and ends what it began.
/// </summary>
[Collection("alone")]
public sealed class VirtioFuzzTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const int RingSize = 16;

    /// <summary>What messages lie in and answers go to.</summary>
    private const ulong Data = 0x180_0000;
    private const int DataSize = 0x1_0000;

    /// <summary>No driver's: it stays as it is. Before the messages, as a descriptor's length may have any size.</summary>
    private const ulong Guard = 0x170_0000;
    private const int GuardSize = 0x10_0000;

    private const ulong Rom = 0xf_0000;
    private const ulong Split = ulong.MaxValue & ~ModelDriver.RingPacked;

    /// <summary>Of a whole test's rounds: what is allocated once, and the reasons of some hundred resets.</summary>
    private const long AllocationBound = 48 << 20;

    private readonly GuestMemory _memory = new(32ul << 20);
    private readonly byte[] _guard = [.. Enumerable.Range(0, GuardSize).Select(i => (byte)(i * 31 + 7))];

    public VirtioFuzzTests() => _memory.TryWrite(new Gpa(Guard), _guard);

    public static TheoryData<string, bool> All => VirtioStateTests.All;

    public void Dispose() => _memory.Dispose();

    [Theory]
    [MemberData(nameof(All))]
    public async Task RingsOfAnythingHarmNothing(string type, bool packed)
    {
        await using AnyDevice any = await AnyDevice.OpenAsync(type, _memory);
        ModelDriver driver = new(any.Device, _memory);
        Random random = new(11);
        int broken = 0;
        long before = 0;
        for (int round = 0; round < 120; round++)
        {
            // What is made once is made by then.
            if (round == 20)
                before = GC.GetTotalAllocatedBytes(precise: true);
            ModelQueue[] queues = driver.Start(Features(packed, random), RingSize, Rings);
            foreach (ModelQueue queue in queues)
                _memory.TryWrite(new Gpa(queue.Descriptors), Garbage(queue, packed, plausible: random.Next(3) > 0, random));
            for (int kick = 0; kick < 3; kick++)
            {
                foreach (ModelQueue queue in queues)
                {
                    driver.Kick(queue.Index);
                    // While the device reads it; but no address, which could lead to the guarded part.
                    _memory.TryWrite(new Gpa(queue.Descriptors + (ulong)(random.Next(RingSize) * 16 + random.Next(8, 16))), (byte)random.Next(256));
                }
                any.Network.Peer?.Transmit(0);
                any.Network.Peer?.Receive(0, default, new byte[random.Next(14, 1500)]);
            }
            SpinWait.SpinUntil(() => !any.Device.Queues[any.RequestQueue].HasAvailable || (driver.Status & 64) != 0, 2_000);
            if ((driver.Status & 64) != 0)
                broken++;
        }
        CheckBound(before);
        Assert.NotEqual(0, broken);
        CheckWorks(any, driver, packed);
    }

    [Theory]
    [MemberData(nameof(All))]
    public async Task MessagesOfAnythingAreAnsweredOrRefused(string type, bool packed)
    {
        _memory.AddRom(new Gpa(Rom), new byte[0x1000]);
        await using AnyDevice any = await AnyDevice.OpenAsync(type, _memory);
        ModelDriver driver = new(any.Device, _memory);
        Random random = new(12);
        ModelQueue[] queues = driver.Start(packed ? ulong.MaxValue : Split, RingSize, Rings);
        byte[] message = new byte[DataSize];
        long before = 0;
        for (int round = 0; round < 1500; round++)
        {
            if (round == 200)
                before = GC.GetTotalAllocatedBytes(precise: true);
            if ((driver.Status & 64) != 0)
                queues = driver.Start(packed ? ulong.MaxValue : Split, RingSize, Rings);
            ModelQueue queue = queues[random.Next(4) == 0 ? random.Next(queues.Length) : any.RequestQueue];
            random.NextBytes(message.AsSpan(0, 512));
            int length = random.Next(3) == 0 ? random.Next(80) : random.Next(512);
            Shape(type, queue.Index, message, round, random);
            _memory.TryWrite(new Gpa(Data), message.AsSpan(0, 512));
            if (queue.TryAdd(Parts(length, random), indirect: random.Next(3) == 0) < 0)
            {
                // It keeps what it has nothing to write to; the driver begins anew.
                queues = driver.Start(packed ? ulong.MaxValue : Split, RingSize, Rings);
                continue;
            }
            driver.Kick(queue.Index);
            any.Network.Peer?.Transmit(0);
            any.Network.Peer?.Receive(0, default, message.AsSpan(0, random.Next(14, 512)));
            if (queue.Index == any.RequestQueue)
            {
                Assert.True(
                    SpinWait.SpinUntil(() => queue.TryTake(out _, out _) || (driver.Status & 64) != 0, 120_000), $"round {round}: no answer to {Convert.ToHexString(message.AsSpan(0, 64))}");
            }
            foreach (ModelQueue other in queues)
            {
                while (other.TryTake(out _, out _))
                {
                }
            }
        }
        CheckBound(before);
        CheckWorks(any, driver, packed);
    }

    /// <summary>The type's own bits as they come, and those of rings.</summary>
    private static ulong Features(bool packed, Random random)
    {
        ulong features = (packed ? ulong.MaxValue : Split) & ~(ulong)random.NextInt64(1 << 24);
        if (random.Next(2) == 0)
            features &= ~ModelDriver.RingEventIndex;
        return random.Next(4) == 0 ? features & ~ModelDriver.RingIndirect : features;
    }

    private static byte[] Garbage(ModelQueue queue, bool packed, bool plausible, Random random)
    {
        byte[] garbage = new byte[(int)(queue.Device + 256 - queue.Descriptors)];
        random.NextBytes(garbage);
        for (int i = 0; i < RingSize; i++)
        {
            // Anywhere but in the guarded part: a device may write wherever it is told to.
            Span<byte> descriptor = garbage.AsSpan(i * 16, 16);
            ulong address = plausible || random.Next(2) == 0 ? Data + (ulong)random.Next(DataSize / 2) : (ulong)random.NextInt64() | 1ul << 63;
            BinaryPrimitives.WriteUInt64LittleEndian(descriptor, address);
            if (!plausible)
                continue;
            BinaryPrimitives.WriteUInt32LittleEndian(descriptor[8..], (uint)random.Next(4) switch { 0 => (uint)random.Next(64), 1 => 0u, _ => (uint)random.Next(4096) });
            descriptor[12] &= packed ? (byte)0xff : (byte)7;
            descriptor[13] = 0;
            descriptor[14] &= packed ? (byte)0x83 : (byte)15;
            descriptor[15] = (byte)(packed ? random.Next(2) << 7 : 0);
        }
        if (plausible)
        {
            garbage[RingSize * 16 + 3] = 0;
            garbage[RingSize * 16 + 2] &= 15;
        }
        return garbage;
    }

    /// <summary>Cuts a message and room for its answer into parts, among them empty ones, and such that overlap.</summary>
    private static Part[] Parts(int length, Random random)
    {
        List<Part> parts = [];
        for (int at = 0; at < length || parts.Count == 0;)
        {
            int part = Math.Min(length - at, random.Next(4) switch { 0 => 0, 1 => random.Next(1, 17), _ => 512 });
            parts.Add(new Part(Data + (ulong)at, (uint)part, false));
            at += part;
            if (parts.Count == 6)
                break;
        }
        int answers = random.Next(4);
        for (int i = 0; i < answers; i++)
        {
            uint size = (uint)(random.Next(5) switch { 0 => 0, 1 => 1, 2 => random.Next(200), _ => random.Next(0x4000) });
            parts.Add(new Part(random.Next(6) == 0 ? Data + (ulong)random.Next(512) : Data + 0x1000 + (ulong)i * 0x4000, size, true));
        }
        return [.. parts];
    }

    /// <summary>Makes the start of random bytes look like what a type's driver sends.</summary>
    private static void Shape(string type, int queue, byte[] message, int round, Random random)
    {
        if (random.Next(8) == 0)
            return;
        switch (type)
        {
            case "blk":
                BinaryPrimitives.WriteUInt32LittleEndian(message, (uint)new[] { 0, 1, 4, 8, 11, 13, 2, 14, 255 }[random.Next(9)]);
                BinaryPrimitives.WriteUInt64LittleEndian(message.AsSpan(8), Number(random, 2048));
                BinaryPrimitives.WriteUInt64LittleEndian(message.AsSpan(16), Number(random, 2048));
                break;
            case "scsi" when queue == 0:
                BinaryPrimitives.WriteUInt32LittleEndian(message, (uint)random.Next(4));
                BinaryPrimitives.WriteUInt32LittleEndian(message.AsSpan(4), (uint)random.Next(9));
                ((byte[])[1, 0, 0x40, 0]).CopyTo(message, 8);
                break;
            case "scsi":
                ((byte[])[1, 0, 0x40, 0]).CopyTo(message, 0);
                // Every operation there can be.
                message[19] = (byte)round;
                if (random.Next(2) == 0)
                    Array.Clear(message, 20, 6);
                break;
            case "console" when queue == 3:
                BinaryPrimitives.WriteUInt32LittleEndian(message, (uint)random.Next(4));
                BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(4), (ushort)random.Next(9));
                BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(6), (ushort)random.Next(3));
                break;
            case "balloon":
                // Pages of a ROM, beyond all memory, and of buffers.
                for (int i = 0; i < 128; i++)
                {
                    uint page = random.Next(4) switch { 0 => (uint)(Rom >> 12), 1 => (uint)random.Next(), 2 => uint.MaxValue, _ => (uint)(Data >> 12) + (uint)random.Next(DataSize >> 12) };
                    BinaryPrimitives.WriteUInt32LittleEndian(message.AsSpan(i * 4), page);
                }
                break;
            case "fs":
                BinaryPrimitives.WriteUInt32LittleEndian(message.AsSpan(4), round % 40 == 0 ? 26 : (uint)random.Next(1, 52));
                BinaryPrimitives.WriteUInt64LittleEndian(message.AsSpan(16), (ulong)random.Next(4));
                if (round % 40 == 0)
                    ((byte[])[7, 0, 0, 0, 31, 0, 0, 0]).CopyTo(message, 40);
                break;
            case "vsock":
                VsockPacket packet = new()
                {
                    SourceCid = random.Next(6) == 0 ? (ulong)random.Next(9) : VirtioVsock.FirstCid,
                    DestinationCid = random.Next(6) == 0 ? ulong.MaxValue : VsockPacket.HostCid,
                    SourcePort = (uint)random.Next(3),
                    DestinationPort = (uint)random.Next(3),
                    Length = random.Next(3) == 0 ? uint.MaxValue : (uint)random.Next(400),
                    Type = (ushort)random.Next(4),
                    Operation = (VsockOperation)random.Next(9),
                    Flags = (uint)random.Next(5),
                    BufferSize = random.Next(2) == 0 ? uint.MaxValue : (uint)random.Next(1000),
                    Forwarded = random.Next(2) == 0 ? uint.MaxValue : 0,
                };
                MemoryMarshal.Write(message, packet);
                break;
            case "net":
                message[0] = (byte)random.Next(7);
                message[1] = (byte)random.Next(6);
                message[2] = (byte)random.Next(8);
                break;
            default:
                break;
        }
    }

    private static ulong Number(Random random, int most) => random.Next(4) switch { 0 => ulong.MaxValue - (ulong)random.Next(3), 1 => (ulong)random.NextInt64(), _ => (ulong)random.Next(most) };

    private static void CheckBound(long before)
    {
        long allocated = GC.GetTotalAllocatedBytes(precise: true) - before;
        Assert.True(allocated < AllocationBound, $"{allocated} bytes were allocated");
    }

    /// <summary>A driver that begins anew finds the device as it should be.</summary>
    private void CheckWorks(AnyDevice any, ModelDriver driver, bool packed)
    {
        byte[] guard = new byte[GuardSize];
        Assert.True(_memory.TryRead(new Gpa(Guard), guard));
        int same = guard.AsSpan().CommonPrefixLength(_guard);
        Assert.True(same == GuardSize, same == GuardSize ? "" : $"memory that the driver did not give was written, at {Guard + (ulong)same:x}: {Convert.ToHexString(guard.AsSpan(same, Math.Min(64, GuardSize - same)))}");
        ModelQueue queue = driver.Start(packed ? ulong.MaxValue : Split, RingSize, Rings)[any.RequestQueue];
        Assert.True(queue.TryAdd([new Part(Data, 100, false), new Part(Data + 0x1000, 200, true)], indirect: false) >= 0);
        driver.Kick(queue.Index);
        any.Network.Peer?.Transmit(0);
        driver.Wait(queue);
        Assert.Equal(15u, driver.Status);
    }
}
