using System;
using System.Collections.Generic;
using System.Linq;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Kvasir.Network;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

public sealed class VirtioNetTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Buffers = 0xa0_0000;
    private const ulong Receive = 0xc0_0000;
    private const ulong All = ulong.MaxValue & ~ModelDriver.RingPacked;
    private const ulong Merged = 1 << 15;
    private const ulong ControlVlan = 1 << 19;
    private const int HeaderSize = 12;
    private const ushort Size = 64;

    private static readonly byte[] Mac = [0x52, 0x54, 0, 1, 2, 3];

    private readonly GuestMemory _memory = new(64ul << 20);
    private readonly ManualNetwork _network = new();
    private readonly VirtioNet _device;
    private readonly ModelDriver _driver;
    private ModelQueue[] _queues = [];

    public VirtioNetTests()
    {
        _device = new VirtioNet("net", _memory, _network, new NicSettings(Mac, Pairs: 2, Mtu: 9000));
        _device.Connect();
        _driver = new ModelDriver(_device, _memory);
    }

    public void Dispose()
    {
        _device.Dispose();
        _memory.Dispose();
    }

    private void Start(ulong features = All) => _queues = _driver.Start(features, Size, Rings);

    private static byte[] Frame(int length, int seed = 1, byte[]? to = null)
    {
        byte[] frame = new byte[length];
        new Random(seed).NextBytes(frame);
        (to ?? Mac).CopyTo(frame, 0);
        (frame[12], frame[13]) = (0x88, 0xb5);
        return frame;
    }

    /// <summary>Makes a frame ready to be sent, in pieces.</summary>
    private int Offer(byte[] header, byte[] frame, int pieces = 1, int slot = 0, int queue = 1)
    {
        ulong at = Buffers + (ulong)slot * 0x1_2000;
        _memory.TryWrite(new Gpa(at), [.. header, .. frame]);
        List<Part> parts = [new Part(at, (uint)header.Length, false)];
        int piece = Math.Max(1, frame.Length / pieces);
        for (int done = 0; done < frame.Length; done += piece)
            parts.Add(new Part(at + (ulong)(header.Length + done), (uint)Math.Min(piece, frame.Length - done), false));
        return _queues[queue].TryAdd(parts.ToArray(), indirect: false);
    }

    private void Give(int count, uint length, int queue = 0)
    {
        for (int index = 0; index < count; index++)
            Assert.True(_queues[queue].TryAdd([new Part(Receive + (ulong)index * 0x1_2000, length, true)], indirect: false) >= 0);
    }

    private byte[] ReadBuffer(int index, uint length)
    {
        byte[] bytes = new byte[length];
        _memory.TryRead(new Gpa(Receive + (ulong)index * 0x1_2000), bytes);
        return bytes;
    }

    private byte Command(byte @class, byte command, params byte[] data)
    {
        ModelQueue control = _queues[4];
        _memory.TryWrite(new Gpa(Buffers), [@class, command, .. data, 0xff]);
        control.TryAdd([new Part(Buffers, 2, false), new Part(Buffers + 2, (uint)data.Length, false), new Part(Buffers + 2 + (ulong)data.Length, 1, true)], indirect: false);
        _driver.Kick(4);
        _driver.Wait(control);
        _memory.TryRead(new Gpa(Buffers + 2 + (ulong)data.Length), out byte answer);
        return answer;
    }

    [Fact]
    public void A_restored_device_takes_the_frames_that_the_saved_one_took()
    {
        Start();
        Assert.Equal(0, Command(0, 0, 0));
        Assert.Equal(0, Command(4, 0, 2, 0));
        Give(1, 2000);
        _device.Pause();
        VirtioDevice.State saved = _device.Save();
        VirtioNet.NetState net = _device.Net;
        ManualNetwork network = new();
        using VirtioNet second = new("second", _memory, network, new NicSettings(Mac, Pairs: 2, Mtu: 9000));
        second.Connect();
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        Assert.False(second.Receive(0, default, Frame(100)));
        second.Resume();
        Assert.Equal((2, network.Asked), (second.Net.ActivePairs, second.Net.Offloads));
        Assert.Equal(net, second.Net);
        Assert.True(second.Receive(0, default, Frame(100, to: [0x52, 0x54, 0, 9, 9, 9])));
        Assert.Equal(1, second.Filtered);
        Assert.False(_queues[0].TryTake(out _, out _));
        Assert.True(second.Receive(0, default, Frame(100)));
        other.Wait(_queues[0]);
        Assert.Equal(Frame(100), ReadBuffer(0, 112)[HeaderSize..]);
    }

    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Frames_go_out_as_they_are(bool packed)
    {
        Start(packed ? ulong.MaxValue : All);
        for (int round = 0; round < 200; round++)
        {
            byte[] frame = Frame(60 + round * 37 % 9000, round);
            int id = Offer(new byte[HeaderSize], frame, 1 + round % 5);
            _device.Transmit(0);
            Assert.Equal(id, _driver.Wait(_queues[1]).Id);
            Assert.Equal(frame, _network.Sent![round].Frame);
        }
    }

    [Fact]
    public void Work_left_undone_is_passed_on_only_where_it_was_agreed_on()
    {
        byte[] header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        Start();
        Offer(header, Frame(4000));
        _device.Transmit(0);
        (VnetHeader sent, _) = Assert.Single(_network.Sent!);
        Assert.Equal((VnetFlags.NeedsChecksum, VnetSegments.Tcp4, 1448, 34, 16), (sent.Flags, sent.Segments, sent.SegmentSize, sent.ChecksumStart, sent.ChecksumOffset));
        Start(All & ~0x1801ul);
        Offer(header, Frame(4000));
        Offer([1, .. new byte[11]], Frame(100), slot: 1);
        _device.Transmit(0);
        // The large segment is dropped; of the other frame the flag means nothing.
        Assert.Equal(2, _network.Sent!.Count);
        Assert.Equal(VnetFlags.None, _network.Sent[1].Header.Flags);
    }

    [Fact]
    public void What_is_no_frame_is_taken_back()
    {
        Start();
        foreach (int length in (int[])[0, 5, 13])
        {
            int id = Offer(new byte[HeaderSize], Frame(20)[..length]);
            _device.Transmit(0);
            Assert.Equal(id, _driver.Wait(_queues[1]).Id);
        }
        int shortHeader = _queues[1].TryAdd([new Part(Buffers, 7, false)], indirect: false);
        _device.Transmit(0);
        Assert.Equal(shortHeader, _driver.Wait(_queues[1]).Id);
        Assert.Empty(_network.Sent!);
        Assert.Equal(15u, _driver.Status);
    }

    [Fact]
    public void A_back_end_without_room_gets_each_frame_once()
    {
        Start();
        _network.Room = 3;
        for (int index = 0; index < 10; index++)
            Offer(new byte[HeaderSize], Frame(100, index), slot: index);
        _device.Transmit(0);
        Assert.Equal(3, _network.Sent!.Count);
        _device.Transmit(0);
        Assert.Equal(3, _network.Sent.Count);
        _network.Room = 100;
        _device.Transmit(0);
        Assert.Equal(Enumerable.Range(0, 10).Select(index => Frame(100, index)), _network.Sent.Select(sent => sent.Frame));
    }

    [Theory]
    [InlineData(60, 1526)]
    [InlineData(1514, 1526)]
    [InlineData(1515, 1526)]
    [InlineData(9014, 1526)]
    [InlineData(65000, 4096)]
    [InlineData(600, 100)]
    public void A_large_frame_is_spread_over_merged_buffers(int length, uint buffer)
    {
        Start();
        Give(50, buffer);
        byte[] frame = Frame(length);
        Assert.True(_device.Receive(0, default, frame));
        List<byte> got = [];
        int count = 0;
        while (_queues[0].TryTake(out int _, out uint written))
            got.AddRange(ReadBuffer(count++, written));
        Assert.Equal(frame, got[HeaderSize..]);
        Assert.Equal(count, got[10] | got[11] << 8);
        Assert.Equal((int)((length + HeaderSize + buffer - 1) / buffer), count);
    }

    [Fact]
    public void Without_merging_a_frame_that_does_not_fit_is_dropped()
    {
        Start(All & ~Merged);
        Give(3, 1526);
        Assert.True(_device.Receive(0, default, Frame(1600)));
        Assert.False(_queues[0].TryTake(out _, out _));
        Assert.True(_device.Receive(0, default, Frame(1514)));
        Assert.Equal(1526u, _driver.Wait(_queues[0]).Written);
        Assert.Equal(1, _device.Filtered);
        Assert.Equal(1, ReadBuffer(0, 12)[10]);
    }

    [Fact]
    public void A_first_buffer_without_room_for_the_header_gets_no_frame()
    {
        Start();
        byte[] before = ReadBuffer(9, 8);
        Assert.True(_queues[0].TryAdd([new Part(Receive + 9 * 0x1_2000, 8, true)], indirect: false) >= 0);
        Give(2, 2000);
        Assert.True(_device.Receive(0, default, Frame(100)));
        Assert.Equal(1, _device.Filtered);
        Assert.False(_queues[0].TryTake(out _, out _));
        Assert.Equal(before, ReadBuffer(9, 8));
        Assert.Equal(0u, _driver.Status & 64);
    }

    [Fact]
    public void A_guest_without_buffers_is_waited_for()
    {
        Start();
        Assert.False(_device.CanReceive(0));
        Assert.False(_device.Receive(0, default, Frame(100)));
        Give(1, 60);
        Assert.True(_queues[0].NeedsKick());
        _driver.Kick(0);
        Assert.Contains(0, _network.Kicked);
        // Too few for this frame: what was taken is given back, and all of it is there for the next attempt.
        Assert.False(_device.Receive(0, default, Frame(100)));
        Give(2, 60);
        Assert.True(_device.CanReceive(0));
        Assert.True(_device.Receive(0, default, Frame(100)));
        Assert.Equal(60u, _driver.Wait(_queues[0]).Written);
        Assert.Equal(52u, _driver.Wait(_queues[0]).Written);
    }

    [Fact]
    public void Addresses_and_vlans_are_filtered_as_the_driver_says()
    {
        byte[] other = [2, 0, 0, 0, 0, 9];
        byte[] group = [1, 0, 0x5e, 0, 0, 5];
        byte[] everybody = [255, 255, 255, 255, 255, 255];
        Start();
        Give(40, 2000);
        Assert.True(Passes(other));
        Assert.Equal(0, Command(0, 0, 0));
        Assert.False(Passes(other));
        Assert.True(Passes(Mac));
        Assert.True(Passes(everybody));
        Assert.False(Passes(group));
        Assert.Equal(0, Command(1, 0, [1, 0, 0, 0, .. other, 1, 0, 0, 0, .. group]));
        Assert.True(Passes(other));
        Assert.True(Passes(group));
        Assert.Equal(0, Command(1, 0, [0, 0, 0, 0, 0, 0, 0, 0]));
        Assert.Equal(0, Command(0, 1, 1));
        Assert.True(Passes(group));
        Assert.Equal(0, Command(0, 5, 1));
        Assert.False(Passes(everybody));
        Assert.Equal(0, Command(1, 1, other));
        Assert.True(Passes(other));
        Assert.False(Passes(Mac));
        byte[] tagged = Frame(100, 1, other);
        (tagged[12], tagged[13], tagged[14], tagged[15]) = (0x81, 0, 0, 7);
        Assert.False(Passes(other, tagged));
        Assert.Equal(0, Command(2, 0, 7, 0));
        Assert.True(Passes(other, tagged));
        Assert.Equal(0, Command(2, 1, 7, 0));
        Assert.False(Passes(other, tagged));
        _driver.Status = 0;
        Start(All & ~ControlVlan);
        Give(2, 2000);
        Assert.True(Passes(Mac));
        Assert.True(Passes(other, tagged));

        bool Passes(byte[] to, byte[]? frame = null)
        {
            Assert.True(_device.Receive(0, default, frame ?? Frame(100, 1, to)));
            return _queues[0].TryTake(out _, out _);
        }
    }

    [Fact]
    public void Commands_that_make_no_sense_are_refused()
    {
        Start();
        Assert.Equal(1, Command(9, 0, 0));
        Assert.Equal(1, Command(0, 9, 0));
        Assert.Equal(1, Command(1, 1, 1, 2, 3));
        Assert.Equal(1, Command(1, 0, 0xff, 0xff, 0xff, 0xff));
        Assert.Equal(1, Command(2, 0, 0xff, 0xff));
        Assert.Equal(1, Command(4, 0, 0, 0));
        Assert.Equal(1, Command(4, 0, 3, 0));
        Assert.Equal(0, Command(4, 0, 2, 0));
        Assert.Equal(2, _device.Net.ActivePairs);
        Assert.Equal(1, Command(5, 0, 0, 0, 0, 0, 0, 0, 0, 1));
        Assert.Equal(NetworkOffloads.All, _network.Asked);
        Assert.Equal(0, Command(5, 0, 2, 0, 0, 0, 0, 0, 0, 0));
        Assert.Equal(NetworkOffloads.Checksum, _network.Asked);
    }

    [Fact]
    public void Answers_come_in_on_the_queue_that_a_connection_goes_out_on()
    {
        Start();
        Command(4, 0, 2, 0);
        Give(4, 2000);
        Give(4, 2000, queue: 2);
        byte[] request = new byte[60];
        (request[12], request[13], request[14], request[23]) = (8, 0, 0x45, 6);
        (request[29], request[33], request[35], request[37]) = (1, 2, 80, 90);
        byte[] answer = (byte[])request.Clone();
        (answer[29], answer[33], answer[35], answer[37]) = (2, 1, 90, 80);
        Offer(new byte[HeaderSize], request, queue: 3);
        _device.Transmit(1);
        Assert.True(_device.Receive(0, default, answer));
        Assert.True(_queues[2].TryTake(out _, out _));
        Offer(new byte[HeaderSize], request, queue: 1);
        _device.Transmit(0);
        Assert.True(_device.Receive(0, default, answer));
        Assert.True(_queues[0].TryTake(out _, out _));
    }

    [Fact]
    public void The_cable_comes_and_goes()
    {
        Start();
        Assert.Equal(1u, _driver[0x104] >> 16);
        Assert.Equal(9000u, _driver[0x108] >> 16);
        _device.SetCable(false);
        Assert.Equal(0u, _driver[0x104] >> 16);
        Assert.Equal(2u, _driver[0x60] & 2);
        Offer(new byte[HeaderSize], Frame(100));
        _device.Transmit(0);
        Assert.Empty(_network.Sent!);
        _network.LinkUp = false;
        _device.SetCable(true);
        Assert.Equal(0u, _driver[0x104] >> 16);
        _network.LinkUp = true;
        _device.LinkChanged(true);
        Assert.Equal(1u, _driver[0x104] >> 16);
        _device.Announce();
        Assert.Equal(3u, _driver[0x104] >> 16);
        Assert.Equal(0, Command(3, 0));
        Assert.Equal(1u, _driver[0x104] >> 16);
    }

    [Fact]
    public void A_paused_guest_receives_nothing_and_loses_nothing()
    {
        Start();
        Give(2, 2000);
        _device.Pause();
        Assert.False(_device.CanReceive(0));
        Assert.False(_device.Receive(0, default, Frame(100)));
        _network.Kicked.Clear();
        _device.Resume();
        Assert.Contains(0, _network.Kicked);
        Assert.True(_device.Receive(0, default, Frame(100)));
    }

    [Fact]
    public void Frames_allocate_nothing()
    {
        Start();
        _network.Sent = null;
        byte[] frame = Frame(1514);
        Round(500);
        long before = GC.GetAllocatedBytesForCurrentThread();
        Round(5000);
        Assert.Equal(0, GC.GetAllocatedBytesForCurrentThread() - before);

        void Round(int count)
        {
            Span<Part> incoming = [new Part(Receive, 2000, true)];
            Span<Part> outgoing = [new Part(Buffers, HeaderSize, false), new Part(Buffers + HeaderSize, 1514, false)];
            for (int index = 0; index < count; index++)
            {
                _queues[0].TryAdd(incoming, indirect: false);
                _queues[1].TryAdd(outgoing, indirect: false);
                _device.Transmit(0);
                _device.Receive(0, default, frame);
                _queues[0].TryTake(out _, out _);
                _queues[1].TryTake(out _, out _);
            }
        }
    }

    [Fact]
    public void Headers_and_commands_of_any_content_are_survived()
    {
        Random random = new(3);
        Start();
        byte[] bytes = new byte[64];
        for (int round = 0; round < 3000; round++)
        {
            random.NextBytes(bytes);
            Offer(bytes[..HeaderSize], bytes[..random.Next(14, 64)]);
            _device.Transmit(0);
            _queues[1].TryTake(out _, out _);
            if (round % 3 == 0)
                Command((byte)random.Next(8), (byte)random.Next(8), bytes[..random.Next(20)]);
        }
        Assert.Equal(15u, _driver.Status);
    }
}
