using System.Net;

namespace Kvasir.Network.Tap;

/// <summary>A tap device of the host.</summary>
public sealed record TapSettings
{
    /// <summary>The interface's name; "" lets the kernel choose one (tap0, tap1, ...).</summary>
    public string InterfaceName { get; init; } = "";

    /// <summary>The bridge that it joins; null: none.</summary>
    public string? Bridge { get; init; }

    /// <summary>The host's own address on it; null: none.</summary>
    public IPAddress? HostAddress { get; init; }

    public int PrefixLength { get; init; } = 24;

    /// <summary>Bytes; 0: the kernel's 1,500.</summary>
    public int Mtu { get; init; }

    public int Queues { get; init; } = 1;
}
