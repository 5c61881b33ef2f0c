using System;
using System.Buffers.Binary;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Threading;
using Kvasir.Network.Frames;
using Xunit;

namespace Kvasir.Network.Tests;

/// <summary>A guest's network stack, small: it speaks ARP, IPv4, UDP, ICMP and enough TCP in frames on a back end.</summary>
internal sealed class FrameGuest : INetworkPeer
{
    public static readonly byte[] Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    private static readonly byte[] Everybody = [255, 255, 255, 255, 255, 255];
    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(120);

    private readonly INetworkBackend _backend;
    private readonly ConcurrentQueue<(VnetHeader Header, byte[] Frame)> _outgoing = new();
    private readonly object _lock = new();
    private readonly List<byte[]> _incoming = [];
    private byte[]? _gatewayMac;

    public FrameGuest(INetworkBackend backend)
    {
        _backend = backend;
        backend.Start(this);
    }

    public IPAddress Address { get; set; } = IPAddress.Parse("10.0.2.15");

    public IPAddress Gateway { get; set; } = IPAddress.Parse("10.0.2.2");

    /// <summary>False: the guest has no receive buffers.</summary>
    public bool HasRoom { get; private set; } = true;

    public bool? Link { get; private set; }

    /// <summary>Called for each frame on the back end's thread; true takes it away from the list of those that came.</summary>
    public Func<byte[], bool>? Handler { get; set; }

    public void Transmit(int queue)
    {
        while (_outgoing.TryPeek(out (VnetHeader Header, byte[] Frame) next))
        {
            if (!_backend.Send(queue, next.Header, next.Frame))
                return;
            _outgoing.TryDequeue(out _);
        }
    }

    public bool CanReceive(int queue) => HasRoom;

    public bool Receive(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (!HasRoom)
            return false;
        byte[] copy = frame.ToArray();
        AnswerArp(copy);
        if (Handler?.Invoke(copy) == true)
            return true;
        lock (_lock)
        {
            _incoming.Add(copy);
            Monitor.PulseAll(_lock);
        }
        return true;
    }

    public void LinkChanged(bool up)
    {
        lock (_lock)
        {
            Link = up;
            Monitor.PulseAll(_lock);
        }
    }

    public void SetRoom(bool room)
    {
        HasRoom = room;
        _backend.Kick(0);
    }

    public void SendFrame(byte[] frame, VnetHeader header = default)
    {
        _outgoing.Enqueue((header, frame));
        _backend.Kick(0);
    }

    /// <summary>As an accelerator tells of it that takes the guest's write for itself.</summary>
    public void SendFrameByBell(byte[] frame)
    {
        _outgoing.Enqueue((default, frame));
        _backend.Bell(0)!.Signal();
    }

    public void WaitForLink(bool up)
    {
        lock (_lock)
        {
            DateTime end = DateTime.UtcNow + Patience;
            while (Link != up)
                Assert.True(Monitor.Wait(_lock, Patience) && DateTime.UtcNow < end, $"the link did not go {(up ? "up" : "down")}");
        }
    }

    /// <summary>Takes the first frame that fits.</summary>
    public byte[] Expect(Predicate<byte[]> wanted, string what) => TryExpect(wanted, Patience) ?? throw new Xunit.Sdk.XunitException($"no {what} came");

    public byte[]? TryExpect(Predicate<byte[]> wanted, TimeSpan patience)
    {
        DateTime end = DateTime.UtcNow + patience;
        lock (_lock)
        {
            while (true)
            {
                int index = _incoming.FindIndex(wanted);
                if (index >= 0)
                {
                    byte[] found = _incoming[index];
                    _incoming.RemoveAt(index);
                    return found;
                }
                TimeSpan left = end - DateTime.UtcNow;
                if (left <= TimeSpan.Zero)
                    return null;
                Monitor.Wait(_lock, left);
            }
        }
    }

    /// <summary>Asks for the gateway's MAC address once.</summary>
    public byte[] ResolveGateway()
    {
        if (_gatewayMac is not null)
            return _gatewayMac;
        SendFrame(Arp(1, Everybody, Address, Gateway));
        byte[] reply = Expect(f => Type(f) == 0x0806 && f[21] == 2 && f.AsSpan(28, 4).SequenceEqual(Gateway.GetAddressBytes()), "ARP reply");
        return _gatewayMac = reply[22..28];
    }

    /// <summary>Discover, offer, request, acknowledgement (RFC 2131).</summary>
    /// <returns>The options of the acknowledgement, and the address in it.</returns>
    public (IPAddress Address, Dictionary<byte, byte[]> Options) Dhcp()
    {
        byte[] offer = DhcpExchange([53, 1, 1, 255]);
        IPAddress address = new(offer.AsSpan(42 + 16, 4));
        byte[] acknowledged = DhcpExchange([53, 1, 3, 50, 4, .. address.GetAddressBytes(), 54, 4, .. Gateway.GetAddressBytes(), 255]);
        Dictionary<byte, byte[]> options = [];
        for (int at = 42 + 240; at < acknowledged.Length && acknowledged[at] != 255; at += acknowledged[at] == 0 ? 1 : 2 + acknowledged[at + 1])
        {
            if (acknowledged[at] != 0)
                options[acknowledged[at]] = acknowledged.AsSpan(at + 2, acknowledged[at + 1]).ToArray();
        }
        Assert.Equal(5, options[53][0]);
        Address = new IPAddress(acknowledged.AsSpan(42 + 16, 4));
        return (Address, options);
    }

    public void SendUdp(IPAddress to, ushort from, ushort port, byte[] payload, bool leaveChecksum = false)
    {
        byte[] udp = new byte[8 + payload.Length];
        BinaryPrimitives.WriteUInt16BigEndian(udp, from);
        BinaryPrimitives.WriteUInt16BigEndian(udp.AsSpan(2), port);
        BinaryPrimitives.WriteUInt16BigEndian(udp.AsSpan(4), (ushort)udp.Length);
        payload.CopyTo(udp, 8);
        SendTransport(to, 17, udp, 6, leaveChecksum);
    }

    public void SendTransport(IPAddress to, byte protocol, byte[] segment, int checksumAt, bool leaveChecksum, ushort segmentSize = 0)
    {
        ushort pseudo = InternetChecksum.Sum([.. Address.GetAddressBytes(), .. to.GetAddressBytes(), 0, protocol, (byte)(segment.Length >> 8), (byte)segment.Length]);
        if (protocol == 1)
            pseudo = 0;
        VnetHeader header = default;
        if (leaveChecksum)
        {
            BinaryPrimitives.WriteUInt16BigEndian(segment.AsSpan(checksumAt), pseudo);
            header = new VnetHeader { Flags = VnetFlags.NeedsChecksum, ChecksumStart = 34, ChecksumOffset = (ushort)checksumAt };
        }
        else
        {
            BinaryPrimitives.WriteUInt16BigEndian(segment.AsSpan(checksumAt), InternetChecksum.Compute(segment, pseudo));
        }
        if (segmentSize > 0)
        {
            header.Segments = VnetSegments.Tcp4;
            header.SegmentSize = segmentSize;
        }
        SendFrame([.. Ethernet(ResolveGateway(), 0x0800), .. Ip4(Address, to, protocol, segment.Length), .. segment], header);
    }

    public byte[] ExpectUdp(ushort port, string what)
    {
        byte[] frame = Expect(f => Type(f) == 0x0800 && f[23] == 17 && BinaryPrimitives.ReadUInt16BigEndian(f.AsSpan(36)) == port, what);
        AssertChecksums(frame);
        return frame[42..(34 + BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(38)))];
    }

    /// <summary>A frame's IPv4, UDP and TCP checksums hold.</summary>
    public static void AssertChecksums(byte[] frame)
    {
        Assert.Equal(0x0800, Type(frame));
        int header = (frame[14] & 15) * 4;
        Assert.Equal(0, InternetChecksum.Compute(frame.AsSpan(14, header)));
        int total = BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(16));
        byte protocol = frame[23];
        byte[] segment = frame[(14 + header)..(14 + total)];
        if (protocol is not (6 or 17))
            return;
        uint pseudo = InternetChecksum.Sum([.. frame.AsSpan(26, 8), 0, protocol, (byte)(segment.Length >> 8), (byte)segment.Length]);
        if (protocol == 17 && segment[6] == 0 && segment[7] == 0)
            return;
        Assert.Equal(0, InternetChecksum.Compute(segment, pseudo));
    }

    public static ushort Type(byte[] frame) => frame.Length < 14 ? (ushort)0 : BinaryPrimitives.ReadUInt16BigEndian(frame.AsSpan(12));

    public static byte[] Ethernet(byte[] to, ushort type) => [.. to, .. Mac, (byte)(type >> 8), (byte)type];

    public static byte[] Ip4(IPAddress from, IPAddress to, byte protocol, int payload)
    {
        int total = 20 + payload;
        byte[] header = [0x45, 0, (byte)(total >> 8), (byte)total, 0, 1, 0x40, 0, 64, protocol, 0, 0, .. from.GetAddressBytes(), .. to.GetAddressBytes()];
        BinaryPrimitives.WriteUInt16BigEndian(header.AsSpan(10), InternetChecksum.Compute(header));
        return header;
    }

    private static byte[] Arp(byte operation, byte[] targetMac, IPAddress from, IPAddress to) =>
    [
        .. Ethernet(targetMac, 0x0806), 0, 1, 8, 0, 6, 4, 0, operation, .. Mac, .. from.GetAddressBytes(), .. targetMac, .. to.GetAddressBytes(),
    ];

    private void AnswerArp(byte[] frame)
    {
        if (Type(frame) == 0x0806 && frame.Length >= 42 && frame[21] == 1 && frame.AsSpan(38, 4).SequenceEqual(Address.GetAddressBytes()))
            SendFrame(Arp(2, frame[22..28], Address, new IPAddress(frame.AsSpan(28, 4))));
    }

    private byte[] DhcpExchange(byte[] options)
    {
        byte[] message = new byte[240 + options.Length];
        message[0] = 1;
        message[1] = 1;
        message[2] = 6;
        message[4] = 0x4b;
        Mac.CopyTo(message, 28);
        ((byte[])[0x63, 0x82, 0x53, 0x63]).CopyTo(message, 236);
        options.CopyTo(message, 240);
        byte[] udp = [0, 68, 0, 67, (byte)((message.Length + 8) >> 8), (byte)(message.Length + 8), 0, 0, .. message];
        SendFrame([.. Ethernet(Everybody, 0x0800), .. Ip4(IPAddress.Any, IPAddress.Broadcast, 17, udp.Length), .. udp]);
        return Expect(f => Type(f) == 0x0800 && f[23] == 17 && f[37] == 68 && f[42 + 4] == 0x4b, "DHCP answer");
    }
}
