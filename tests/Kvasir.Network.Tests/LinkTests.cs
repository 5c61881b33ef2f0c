using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.NetworkInformation;
using System.Net.Sockets;
using System.Threading;
using Kvasir.Linux;
using Kvasir.Network.Capture;
using Kvasir.Network.Frames;
using Kvasir.Network.Sockets;
using Kvasir.Network.Tap;
using Kvasir.Network.User;
using Xunit;

namespace Kvasir.Network.Tests;

/// <summary>Links over Unix sockets, taps, captures, and what frames have in common.</summary>
public sealed class LinkTests : IDisposable
{
    private static readonly TimeSpan Moment = TimeSpan.FromMilliseconds(300);

    private readonly string _folder = Directory.CreateTempSubdirectory("kvasir-net-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    private string At(string name) => Path.Combine(_folder, name);

    private static byte[] Frame(int number, int length)
    {
        byte[] frame = new byte[length];
        new Random(number).NextBytes(frame);
        BinaryPrimitives.WriteInt32LittleEndian(frame.AsSpan(14), number);
        return frame;
    }

    private static bool Is(byte[] frame, int number) => frame.Length >= 18 && BinaryPrimitives.ReadInt32LittleEndian(frame.AsSpan(14)) == number;

    [Fact]
    public void Two_ends_of_a_stream_exchange_frames_whoever_comes_first()
    {
        using StreamNetwork late = new(At("s"), listens: false);
        FrameGuest b = new(late);
        Thread.Sleep(50);
        using StreamNetwork first = new(At("s"), listens: true);
        FrameGuest a = new(first);
        a.WaitForLink(true);
        b.WaitForLink(true);
        for (int number = 0; number < 2000; number++)
        {
            a.SendFrame(Frame(number, 60 + number * 7 % 9000));
            b.SendFrame(Frame(-number - 1, 60 + number * 11 % 1500));
        }
        for (int number = 0; number < 2000; number++)
        {
            Assert.Equal(Frame(number, 60 + number * 7 % 9000), b.Expect(f => true, "frame"));
            Assert.Equal(Frame(-number - 1, 60 + number * 11 % 1500), a.Expect(f => true, "frame"));
        }
    }

    [Fact]
    public void A_bell_is_a_kick_whether_the_thread_sleeps_or_not()
    {
        using CapturedNetwork server = new(new StreamNetwork(At("s"), listens: true), PcapngWriter.Create(At("c"), "net0"));
        FrameGuest a = new(server);
        using StreamNetwork client = new(At("s"), listens: false);
        FrameGuest b = new(client);
        a.WaitForLink(true);
        b.WaitForLink(true);
        for (int number = 0; number < 500; number++)
        {
            a.SendFrameByBell(Frame(number, 100));
            b.SendFrameByBell(Frame(-number - 1, 100));
            Assert.Equal(Frame(number, 100), b.Expect(f => true, "frame"));
            Assert.Equal(Frame(-number - 1, 100), a.Expect(f => true, "frame"));
        }
        // One that stays set would have its thread turn without end.
        Assert.True(SpinWait.SpinUntil(() => !IsSet(server.Bell(0)!) && !IsSet(client.Bell(0)!), 120_000));
    }

    private static bool IsSet(EventFd bell)
    {
        using PollSet polls = new();
        int place = polls.Add(bell.Fd, PollEvents.Input);
        polls.Wait(0);
        return polls.Returned(place) != PollEvents.None;
    }

    [Fact]
    public void The_other_end_of_a_stream_may_leave_and_come_back()
    {
        using StreamNetwork server = new(At("s"), listens: true);
        FrameGuest a = new(server);
        for (int round = 0; round < 3; round++)
        {
            using StreamNetwork client = new(At("s"), listens: false);
            FrameGuest b = new(client);
            a.WaitForLink(true);
            b.WaitForLink(true);
            a.SendFrame(Frame(round, 100));
            b.Expect(f => Is(f, round), "frame");
            client.Dispose();
            a.WaitForLink(false);
            a.SendFrame(Frame(99, 100));
        }
    }

    [Fact]
    public void A_peer_of_qemus_format_is_understood_and_a_hostile_one_hung_up_on()
    {
        using StreamNetwork network = new(At("s"), listens: true);
        FrameGuest guest = new(network);
        using (Socket peer = Connect(At("s")))
        {
            guest.WaitForLink(true);
            // Cut in the middle of the length and of the frame.
            byte[] message = [0, 0, 0, 70, .. Frame(7, 70), 0, 0, 0, 60, .. Frame(8, 60)];
            foreach (byte[] piece in (byte[][])[message[..2], message[2..30], message[30..77], message[77..]])
            {
                peer.Send(piece);
                Thread.Sleep(20);
            }
            Assert.Equal(Frame(7, 70), guest.Expect(f => Is(f, 7), "frame"));
            guest.Expect(f => Is(f, 8), "frame");
            guest.SendFrame(Frame(9, 64));
            byte[] received = new byte[68];
            peer.ReceiveTimeout = 120_000;
            for (int at = 0; at < received.Length;)
                at += peer.Receive(received, at, received.Length - at, SocketFlags.None);
            Assert.Equal([0, 0, 0, 64, .. Frame(9, 64)], received);
        }
        guest.WaitForLink(false);
        using Socket hostile = Connect(At("s"));
        guest.WaitForLink(true);
        hostile.Send([0x7f, 0xff, 0xff, 0xff, 1, 2, 3]);
        guest.WaitForLink(false);
    }

    [Fact]
    public void A_reader_that_does_not_read_holds_the_sender_up_and_loses_nothing()
    {
        const int count = 3000;
        using StreamNetwork server = new(At("s"), listens: true);
        FrameGuest a = new(server);
        using StreamNetwork client = new(At("s"), listens: false);
        FrameGuest b = new(client);
        a.WaitForLink(true);
        b.WaitForLink(true);
        b.SetRoom(false);
        for (int number = 0; number < count; number++)
            a.SendFrame(Frame(number, 1500));
        Thread.Sleep(100);
        Assert.True(server.Counters.SentFrames < count, "everything went somewhere");
        b.SetRoom(true);
        for (int number = 0; number < count; number++)
            Assert.Equal(Frame(number, 1500), b.Expect(f => true, "frame"));
        Assert.Equal(0, server.Counters.Dropped + client.Counters.Dropped);
    }

    [Fact]
    public void Datagrams_find_an_end_that_comes_later_and_one_that_was_started_anew()
    {
        using DatagramNetwork one = new(At("one"), At("two"));
        FrameGuest a = new(one);
        for (int round = 0; round < 2; round++)
        {
            a.SendFrame(Frame(99, 60));
            using DatagramNetwork two = new(At("two"), At("one"));
            FrameGuest b = new(two);
            for (int attempt = 0; ; attempt++)
            {
                Assert.True(attempt < 50, "no frame came through");
                a.SendFrame(Frame(round, 1000));
                if (b.TryExpect(f => Is(f, round), Moment) is not null)
                    break;
            }
            b.SendFrame(Frame(round + 10, 9000));
            Assert.Equal(Frame(round + 10, 9000), a.Expect(f => Is(f, round + 10), "frame"));
        }
    }

    [Fact]
    public void A_socket_in_use_is_refused_and_one_left_behind_replaced()
    {
        using (new StreamNetwork(At("s"), listens: true))
        {
            Assert.Contains("another process", Assert.Throws<NetworkException>(() => new StreamNetwork(At("s"), listens: true)).Message, StringComparison.Ordinal);
        }
        using (Socket left = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
            left.Bind(new UnixDomainSocketEndPoint(At("t")));
        using StreamNetwork network = new(At("t"), listens: true);
        Assert.Throws<NetworkException>(() => new StreamNetwork(At("no/such/folder"), listens: true));
    }

    [Theory]
    [InlineData(4000, 1448)]
    [InlineData(64000, 1448)]
    [InlineData(100, 1448)]
    [InlineData(2896, 1448)]
    public void Large_segments_are_cut_as_a_nic_would(int payload, ushort segmentSize)
    {
        using DatagramNetwork one = new(At("one"), At("two"));
        using DatagramNetwork two = new(At("two"), At("one"));
        FrameGuest a = new(one);
        FrameGuest b = new(two);
        byte[] data = Frame(3, payload);
        byte[] tcp = new byte[32];
        BinaryPrimitives.WriteUInt32BigEndian(tcp.AsSpan(4), 0xffff_f000);
        tcp[12] = 8 << 4;
        tcp[13] = 0x80 | 0x10 | 0x08 | 0x01;
        byte[] frame =
        [
            .. FrameGuest.Ethernet([2, 2, 2, 2, 2, 2], 0x0800),
            .. FrameGuest.Ip4(IPAddress.Parse("10.0.0.1"), IPAddress.Parse("10.0.0.2"), 6, tcp.Length + payload), .. tcp, .. data,
        ];
        a.SendFrame(frame, new VnetHeader { Flags = VnetFlags.NeedsChecksum, ChecksumStart = 34, ChecksumOffset = 16, Segments = VnetSegments.Tcp4, SegmentSize = segmentSize });
        int at = 0;
        for (int index = 0; at < payload; index++)
        {
            byte[] segment = b.Expect(f => true, "segment");
            FrameGuest.AssertChecksums(segment);
            int length = segment.Length - 66;
            Assert.Equal(Math.Min(segmentSize, payload - at), length);
            Assert.Equal(0xffff_f000 + (uint)at, BinaryPrimitives.ReadUInt32BigEndian(segment.AsSpan(38)));
            Assert.Equal(data.AsSpan(at, length), segment.AsSpan(66));
            at += length;
            Assert.Equal((index == 0 ? 0x80 : 0) | (at == payload ? 0x09 : 0) | 0x10, segment[47]);
        }
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(47)]
    public void Segments_too_small_to_be_true_are_refused(ushort segmentSize)
    {
        using DatagramNetwork one = new(At("one"), At("two"));
        using DatagramNetwork two = new(At("two"), At("one"));
        FrameGuest a = new(one);
        FrameGuest b = new(two);
        byte[] frame = [.. FrameGuest.Ethernet([2, 2, 2, 2, 2, 2], 0x0800), .. FrameGuest.Ip4(IPAddress.Any, IPAddress.Any, 6, 4020), .. new byte[4020]];
        frame[46] = 5 << 4;
        a.SendFrame(frame, new VnetHeader { Flags = VnetFlags.NeedsChecksum, ChecksumStart = 34, ChecksumOffset = 16, Segments = VnetSegments.Tcp4, SegmentSize = segmentSize });
        Assert.Null(b.TryExpect(f => true, Moment));
        Assert.Equal(1, one.Counters.Refused);
    }

    [Fact]
    public void Headers_of_any_content_cut_nothing_wrong()
    {
        Random random = new(8);
        byte[] target = new byte[70_000];
        for (int round = 0; round < 100_000; round++)
        {
            byte[] frame = new byte[random.Next(300)];
            random.NextBytes(frame);
            if (frame.Length > 40 && random.Next(2) == 0)
            {
                (frame[12], frame[13], frame[14], frame[23]) = (8, 0, 0x45, 6);
                if (random.Next(2) == 0)
                    (frame[12], frame[13], frame[20]) = (0x86, 0xdd, 6);
            }
            VnetHeader header = new() { Segments = random.Next(2) == 0 ? VnetSegments.Tcp4 : VnetSegments.Tcp6, SegmentSize = (ushort)random.Next(1, 400) };
            Segmenter segmenter = new(header, frame);
            int total = 0;
            while (segmenter.Next(target) is > 0 and int length)
                total += length;
            Assert.True(total < 100_000);
            _ = InternetChecksum.TryComplete(new VnetHeader { ChecksumStart = (ushort)random.Next(400), ChecksumOffset = (ushort)random.Next(400) }, frame);
        }
    }

    [Fact]
    public void The_checksum_of_any_length_is_the_plain_sum()
    {
        Random random = new(1);
        for (int length = 0; length < 1500; length++)
        {
            byte[] bytes = new byte[length];
            random.NextBytes(bytes);
            uint sum = (uint)random.Next(0x10000);
            ulong plain = sum;
            for (int at = 0; at < length; at += 2)
                plain += (uint)(bytes[at] << 8) | (at + 1 < length ? bytes[at + 1] : 0u);
            while (plain >> 16 != 0)
                plain = (plain & 0xffff) + (plain >> 16);
            Assert.Equal((ushort)plain, InternetChecksum.Sum(bytes, sum));
        }
    }

    [Fact]
    public void Tshark_reads_a_capture()
    {
        string path = At("c.pcapng");
        if (UserNetwork.LibraryVersion is null)
            Assert.Skip("libslirp is not installed (package libslirp0)");
        using (CapturedNetwork network = new(new UserNetwork(new UserNetworkSettings { HostName = "walnut" }), PcapngWriter.Create(path, "net0")))
            new FrameGuest(network).Dhcp();
        string text = HostTool.Run("tshark", "tshark", "-n", "-r", path, "-T", "fields", "-e", "frame.interface_name", "-e", "frame.packet_flags_direction", "-e", "dhcp.option.dhcp", "-e", "frame.time_epoch");
        string[][] dhcp = [.. text.Split('\n').Select(line => line.Split('\t')).Where(fields => fields.Length > 3 && fields[2].Length > 0)];
        Assert.Equal(["1", "2", "3", "5"], dhcp.Select(fields => fields[2]));
        Assert.All(dhcp, fields => Assert.Equal("net0", fields[0]));
        // 1: inbound (to the guest), 2: outbound.
        Assert.Equal([2, 1, 2, 1], dhcp.Select(fields => Convert.ToInt32(fields[1], fields[1].StartsWith("0x", StringComparison.Ordinal) ? 16 : 10)));
        double age = DateTimeOffset.UtcNow.ToUnixTimeSeconds() - double.Parse(dhcp[0][3], System.Globalization.CultureInfo.InvariantCulture);
        Assert.InRange(age, -2, 120);
    }

    [Fact]
    public void A_tap_is_made_carries_frames_and_goes_away()
    {
        string name = $"kvt{Environment.ProcessId % 100000}";
        TapNetwork tap;
        try
        {
            tap = new TapNetwork(new TapSettings { InterfaceName = name, HostAddress = IPAddress.Parse("10.213.7.1"), PrefixLength = 24 });
        }
        catch (NetworkException e)
        {
            Assert.Skip($"no tap can be made here: {e.Message}");
            return;
        }
        using (tap)
        {
            FrameGuest guest = new(tap) { Address = IPAddress.Parse("10.213.7.2"), Gateway = IPAddress.Parse("10.213.7.1") };
            using UdpClient server = new(new IPEndPoint(IPAddress.Parse("10.213.7.1"), 0));
            server.Client.ReceiveTimeout = 120_000;
            guest.SendUdp(guest.Gateway, 777, (ushort)((IPEndPoint)server.Client.LocalEndPoint!).Port, "through the tap"u8.ToArray(), leaveChecksum: true);
            IPEndPoint? from = null;
            Assert.Equal("through the tap"u8, server.Receive(ref from));
            Assert.Equal(new IPEndPoint(guest.Address, 777), from);
            server.Send("back"u8, from);
            Assert.Equal("back"u8, guest.ExpectUdp(777, "datagram"));
            Assert.Contains(name, Interfaces());
        }
        Assert.DoesNotContain(name, Interfaces());

        static IEnumerable<string> Interfaces() => NetworkInterface.GetAllNetworkInterfaces().Select(one => one.Name);
    }

    [Fact]
    public void A_bridge_that_is_not_there_is_said_by_name()
    {
        if (!File.Exists("/dev/net/tun") || !Environment.IsPrivilegedProcess)
            Assert.Skip("making a tap needs root and /dev/net/tun");
        NetworkException refused = Assert.Throws<NetworkException>(() => new TapNetwork(new TapSettings { Bridge = "kvasir-no-br" }));
        Assert.Contains("kvasir-no-br", refused.Message, StringComparison.Ordinal);
    }

    private static Socket Connect(string path)
    {
        Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.Connect(new UnixDomainSocketEndPoint(path));
        return socket;
    }
}
