using System.Collections.Generic;
using System.Net;

namespace Kvasir.Network.User;

/// <summary>The network that a guest sees behind user-mode NAT. The defaults are those that QEMU's users know.</summary>
public sealed record UserNetworkSettings
{
    /// <summary>
    /// The largest packet between the guest and the NAT. Larger ones mean less work for each byte that the guest sends, but it sends segments of 64 KiB anyway; what it
    /// receives comes at a twentieth of the speed with 16,000 (docs/performance.md).
    /// </summary>
    public const int DefaultMtu = 1500;

    public const int SmallestMtu = 1280;
    public const int LargestMtu = 65520;

    public bool Ip4 { get; init; } = true;

    public IPAddress Network { get; init; } = IPAddress.Parse("10.0.2.0");

    public IPAddress Netmask { get; init; } = IPAddress.Parse("255.255.255.0");

    /// <summary>The gateway.</summary>
    public IPAddress Host { get; init; } = IPAddress.Parse("10.0.2.2");

    public IPAddress NameServer { get; init; } = IPAddress.Parse("10.0.2.3");

    /// <summary>The first address that DHCP gives.</summary>
    public IPAddress DhcpStart { get; init; } = IPAddress.Parse("10.0.2.15");

    public bool Ip6 { get; init; } = true;

    /// <summary>A /64.</summary>
    public IPAddress Prefix6 { get; init; } = IPAddress.Parse("fec0::");

    public IPAddress Host6 { get; init; } = IPAddress.Parse("fec0::2");

    public IPAddress NameServer6 { get; init; } = IPAddress.Parse("fec0::3");

    /// <summary>The name that DHCP gives the guest.</summary>
    public string? HostName { get; init; }

    /// <summary>The guest reaches nothing outside; only forwards reach it.</summary>
    public bool Restricted { get; init; }

    /// <summary>The guest reaches services of the host that listen on its loopback addresses, through the gateway's address.</summary>
    public bool HostLoopback { get; init; }

    public int Mtu { get; init; } = DefaultMtu;

    public IReadOnlyList<PortForward> Forwards { get; init; } = [];
}
