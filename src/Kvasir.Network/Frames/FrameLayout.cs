using System;
using System.Buffers.Binary;

namespace Kvasir.Network.Frames;

/// <summary>Numbers of Ethernet and IP that frames carry (IEEE 802, IANA).</summary>
internal static class FrameNumbers
{
    public const int EthernetHeader = 14;
    public const int VlanTag = 4;
    public const ushort Ip4 = 0x0800;
    public const ushort Ip6 = 0x86dd;
    public const ushort Vlan = 0x8100;
    public const ushort ProviderVlan = 0x88a8;
    public const byte Tcp = 6;
    public const byte Udp = 17;
}

/// <summary>Where the headers of a frame lie, as far as they could be followed; any bytes at all may come in.</summary>
/// <param name="Type">What follows the Ethernet header and its tags; 0 where the frame is too short.</param>
/// <param name="Network">Where that begins.</param>
/// <param name="Protocol">The transport protocol; 0 where there is none or it is a later fragment.</param>
/// <param name="Transport">Where its header begins.</param>
internal readonly record struct FrameLayout(ushort Type, int Network, byte Protocol, int Transport)
{
    private const byte HopByHop = 0;
    private const byte Routing = 43;
    private const byte DestinationOptions = 60;

    public static FrameLayout Parse(ReadOnlySpan<byte> frame)
    {
        if (frame.Length < FrameNumbers.EthernetHeader)
            return default;
        int network = FrameNumbers.EthernetHeader;
        ushort type = BinaryPrimitives.ReadUInt16BigEndian(frame[12..]);
        for (int tags = 0; tags < 2 && type is FrameNumbers.Vlan or FrameNumbers.ProviderVlan; tags++)
        {
            if (frame.Length < network + FrameNumbers.VlanTag)
                return default;
            type = BinaryPrimitives.ReadUInt16BigEndian(frame[(network + 2)..]);
            network += FrameNumbers.VlanTag;
        }
        return type switch
        {
            FrameNumbers.Ip4 => Parse4(frame, network),
            FrameNumbers.Ip6 => Parse6(frame, network),
            _ => new FrameLayout(type, network, 0, 0),
        };
    }

    private static FrameLayout Parse4(ReadOnlySpan<byte> frame, int network)
    {
        FrameLayout none = new(FrameNumbers.Ip4, network, 0, 0);
        if (frame.Length < network + 20)
            return none;
        int length = (frame[network] & 0xf) * 4;
        if (length < 20 || frame.Length < network + length)
            return none;
        bool laterFragment = (BinaryPrimitives.ReadUInt16BigEndian(frame[(network + 6)..]) & 0x1fff) != 0;
        return laterFragment ? none : new FrameLayout(FrameNumbers.Ip4, network, frame[network + 9], network + length);
    }

    private static FrameLayout Parse6(ReadOnlySpan<byte> frame, int network)
    {
        FrameLayout none = new(FrameNumbers.Ip6, network, 0, 0);
        if (frame.Length < network + 40)
            return none;
        byte next = frame[network + 6];
        int at = network + 40;
        for (int headers = 0; headers < 8 && next is HopByHop or Routing or DestinationOptions; headers++)
        {
            if (frame.Length < at + 8)
                return none;
            next = frame[at];
            at += (frame[at + 1] + 1) * 8;
        }
        return new FrameLayout(FrameNumbers.Ip6, network, next, at);
    }
}
