using System;
using System.Buffers.Binary;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using Kvasir.Network.Frames;

namespace Kvasir.Network.User;

/// <summary>
/// Keeps a guest off the host's loopback. The NAT opens a socket of the host for what the guest sends, and takes every address of the virtual network for the
/// host itself; a guest may also write 127.0.0.1 as a destination whatever its own routes say. The library's own switch for this is not used: it also stops
/// the answers to forwarded datagrams, and leaves the name server's other ports and literal loopback addresses open. One thread.
/// </summary>
internal sealed class GuestFilter
{
    private const byte Icmp = 1;
    private const byte Icmp6 = 58;
    private const byte Loopback = 127;
    private const ushort Dns = 53;
    private const ushort DhcpServer = 67;
    private const byte Syn = 0x02;
    private const byte Ack = 0x10;
    private const int KnownFlows = 1024;

    // Configuration
    private readonly bool _open;
    private readonly uint _network;
    private readonly uint _mask;
    private readonly uint _host;
    private readonly uint _nameServer;
    private readonly byte[] _prefix6;
    private readonly byte[] _nameServer6;

    // State: forwarded datagrams that came, as guest's port and host's port, for their answers.
    private readonly uint[] _flows = new uint[KnownFlows];

    public GuestFilter(UserNetworkSettings settings)
    {
        _open = settings.HostLoopback;
        _network = Number(settings.Network);
        _mask = Number(settings.Netmask);
        _host = Number(settings.Host);
        _nameServer = Number(settings.NameServer);
        _prefix6 = settings.Prefix6.GetAddressBytes()[..8];
        _nameServer6 = settings.NameServer6.GetAddressBytes();
    }

    private enum Place
    {
        /// <summary>Somewhere outside.</summary>
        Elsewhere,

        /// <summary>The host, or an address that the NAT takes for it.</summary>
        Host,
        NameServer,

        /// <summary>An address that means this very machine and is on no wire.</summary>
        Nowhere,
    }

    /// <summary>Whether a frame of the guest may reach the NAT.</summary>
    public bool IsAllowed(ReadOnlySpan<byte> frame)
    {
        if (frame.Length < FrameNumbers.EthernetHeader)
            return false;
        ReadOnlySpan<byte> packet = frame[FrameNumbers.EthernetHeader..];
        return BinaryPrimitives.ReadUInt16BigEndian(frame[12..]) switch
        {
            FrameNumbers.Ip4 => IsAllowed4(frame, packet),
            FrameNumbers.Ip6 => IsAllowed6(packet),
            _ => true,
        };
    }

    /// <summary>A frame goes to the guest: where it is a forwarded datagram, its answer may come back.</summary>
    public void Note(ReadOnlySpan<byte> frame)
    {
        if (_open || frame.Length < FrameNumbers.EthernetHeader)
            return;
        FrameLayout layout = FrameLayout.Parse(frame);
        if (layout.Protocol != FrameNumbers.Udp || frame.Length < layout.Transport + 4)
            return;
        bool fromHost = layout.Type == FrameNumbers.Ip4
            ? Locate4(BinaryPrimitives.ReadUInt32BigEndian(frame[(layout.Network + 12)..])) == Place.Host
            : Locate6(frame.Slice(layout.Network + 8, 16)) == Place.Host;
        if (!fromHost)
            return;
        ushort source = BinaryPrimitives.ReadUInt16BigEndian(frame[layout.Transport..]);
        ushort target = BinaryPrimitives.ReadUInt16BigEndian(frame[(layout.Transport + 2)..]);
        uint flow = Flow(target, source);
        _flows[Slot(flow)] = flow;
    }

    private bool IsAllowed4(ReadOnlySpan<byte> frame, ReadOnlySpan<byte> packet)
    {
        if (packet.Length < 20)
            return false;
        uint target = BinaryPrimitives.ReadUInt32BigEndian(packet[16..]);
        Place place = Locate4(target);
        if (place is Place.Elsewhere)
            return true;
        if (place is Place.Nowhere)
            return false;
        // Pieces would be put together behind this filter's back.
        if ((BinaryPrimitives.ReadUInt16BigEndian(packet[6..]) & 0x3fff) != 0)
            return _open;
        FrameLayout layout = FrameLayout.Parse(frame);
        ReadOnlySpan<byte> transport = layout.Protocol == 0 ? default : frame[layout.Transport..];
        if (layout.Protocol == Icmp)
            return _open || target == _host || place == Place.NameServer;
        bool dhcp = layout.Protocol == FrameNumbers.Udp && transport.Length >= 4
            && BinaryPrimitives.ReadUInt16BigEndian(transport[2..]) == DhcpServer && (target == _host || target == uint.MaxValue);
        return dhcp || IsAllowedTransport(place, layout.Protocol, transport);
    }

    private bool IsAllowed6(ReadOnlySpan<byte> packet)
    {
        if (packet.Length < 40)
            return false;
        Place place = Locate6(packet.Slice(24, 16));
        byte protocol = packet[6];
        return place switch
        {
            Place.Nowhere => false,
            Place.Elsewhere => true,
            // The NAT reads no extension headers, so neither does this.
            _ => protocol == Icmp6 || IsAllowedTransport(place, protocol, packet[40..]),
        };
    }

    private bool IsAllowedTransport(Place place, byte protocol, ReadOnlySpan<byte> transport)
    {
        if (protocol is not (FrameNumbers.Tcp or FrameNumbers.Udp) || transport.Length < (protocol == FrameNumbers.Tcp ? 20 : 8))
            return false;
        ushort source = BinaryPrimitives.ReadUInt16BigEndian(transport);
        ushort target = BinaryPrimitives.ReadUInt16BigEndian(transport[2..]);
        if (place == Place.NameServer)
            return target == Dns;
        if (_open)
            return true;
        // What belongs to a connection that came from outside passes; a new one does not.
        if (protocol == FrameNumbers.Tcp)
            return (transport[13] & (Syn | Ack)) != Syn;
        uint flow = Flow(source, target);
        return _flows[Slot(flow)] == flow;
    }

    private Place Locate4(uint address)
    {
        if (address == _nameServer)
            return Place.NameServer;
        if ((address & _mask) == _network || address == uint.MaxValue)
            return Place.Host;
        // 0.0.0.0/8 too: a socket takes it for the host itself.
        return address >> 24 is Loopback or 0 ? Place.Nowhere : Place.Elsewhere;
    }

    private Place Locate6(ReadOnlySpan<byte> address)
    {
        if (address.SequenceEqual(_nameServer6))
            return Place.NameServer;
        if (address.StartsWith(_prefix6) || (address[0] == 0xfe && (address[1] & 0xc0) == 0x80))
            return Place.Host;
        // ::/80 holds "any", loopback, and the IPv4-compatible and IPv4-mapped addresses.
        return address[..10].ContainsAnyExcept((byte)0) ? Place.Elsewhere : Place.Nowhere;
    }

    private static uint Flow(ushort guestPort, ushort hostPort) => (uint)guestPort << 16 | hostPort;

    private static int Slot(uint flow) => (int)(flow * 2654435761u >> 22);

    private static uint Number(IPAddress address) => BinaryPrimitives.ReverseEndianness(MemoryMarshal.Read<uint>(address.GetAddressBytes()));
}
