using System;
using System.Globalization;
using System.Net;
using System.Net.Sockets;

namespace Kvasir.Network.User;

/// <summary>A port of the host whose connections go to the guest, as <c>tcp:127.0.0.1:2222-:22</c>.</summary>
/// <param name="GuestAddress">0.0.0.0: the address that DHCP gives first.</param>
public sealed record PortForward(bool Udp, IPAddress HostAddress, int HostPort, IPAddress GuestAddress, int GuestPort)
{
    /// <summary>
    /// Reads <c>[tcp|udp]:[HOST]:PORT-[GUEST]:PORT</c>. No host address means 127.0.0.1: who wants the port open to other machines says so with 0.0.0.0.
    /// IPv6 addresses stand in brackets.
    /// </summary>
    /// <exception cref="FormatException">It is not of that form; the message says what is wrong.</exception>
    public static PortForward Parse(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        (bool udp, IPAddress host, int hostPort, string rest) = ParseHost(text);
        if (rest.Length == 0 || rest[0] != '-')
            throw new FormatException($"'{text}' has no guest's side; write tcp:127.0.0.1:2222-:22");
        (IPAddress? guest, int guestPort, rest) = ParseEnd(text, rest[1..]);
        if (rest.Length != 0)
            throw new FormatException($"'{text}' has '{rest}' left over");
        bool wide = host.AddressFamily == AddressFamily.InterNetworkV6;
        if (guest is null && wide)
            throw new FormatException($"'{text}': an IPv6 forward names the guest's address, as [fec0::...]");
        guest ??= IPAddress.Any;
        return guest.AddressFamily != host.AddressFamily
            ? throw new FormatException($"'{text}' mixes IPv4 and IPv6")
            : new PortForward(udp, host, hostPort, guest, guestPort);
    }

    /// <summary>Reads the host's side alone, <c>[tcp|udp]:[HOST]:PORT</c>, as what removes a forward names it.</summary>
    /// <exception cref="FormatException">It is not of that form.</exception>
    public static PortForward ParseHostSide(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        (bool udp, IPAddress host, int port, string rest) = ParseHost(text);
        return rest.Length == 0 ? new PortForward(udp, host, port, IPAddress.Any, 0) : throw new FormatException($"'{text}' has '{rest}' left over");
    }

    /// <summary>Whether both open the same port of the host.</summary>
    public bool HasSameHostSide(PortForward other)
    {
        ArgumentNullException.ThrowIfNull(other);
        return Udp == other.Udp && HostPort == other.HostPort && HostAddress.Equals(other.HostAddress);
    }

    public override string ToString() => string.Create(CultureInfo.InvariantCulture, $"{HostSide}-{(GuestAddress.Equals(IPAddress.Any) ? "" : Show(GuestAddress))}:{GuestPort}");

    private string HostSide => string.Create(CultureInfo.InvariantCulture, $"{(Udp ? "udp" : "tcp")}:{Show(HostAddress)}:{HostPort}");

    private static string Show(IPAddress address) => address.AddressFamily == AddressFamily.InterNetworkV6 ? $"[{address}]" : address.ToString();

    private static (bool Udp, IPAddress Host, int Port, string Left) ParseHost(string text)
    {
        int colon = text.IndexOf(':', StringComparison.Ordinal);
        string protocol = colon < 0 ? text : text[..colon];
        bool? udp = protocol switch
        {
            "tcp" or "" => false,
            "udp" => true,
            _ => null,
        };
        if (colon < 0 || udp is null)
            throw new FormatException($"'{text}' is no forward; write tcp:127.0.0.1:2222-:22 or udp:127.0.0.1:5353-:53");
        (IPAddress? host, int port, string rest) = ParseEnd(text, text[(colon + 1)..]);
        return (udp.Value, host ?? IPAddress.Loopback, port, rest);
    }

    /// <summary>[ADDRESS]:PORT, up to a '-' or the end.</summary>
    private static (IPAddress? Address, int Port, string Left) ParseEnd(string whole, string text)
    {
        int colon;
        string written;
        if (text.StartsWith('['))
        {
            int close = text.IndexOf(']', StringComparison.Ordinal);
            colon = close + 1;
            if (close < 0 || colon >= text.Length || text[colon] != ':')
                throw new FormatException($"'{whole}' has an IPv6 address without ']:'");
            written = text[1..close];
        }
        else
        {
            colon = text.IndexOf(':', StringComparison.Ordinal);
            if (colon < 0)
                throw new FormatException($"'{whole}' has a side without a port");
            written = text[..colon];
        }
        IPAddress? address = null;
        if (written.Length > 0 && !IPAddress.TryParse(written, out address))
            throw new FormatException($"'{written}' in '{whole}' is no IP address");
        int end = colon + 1;
        while (end < text.Length && char.IsAsciiDigit(text[end]))
            end++;
        return int.TryParse(text.AsSpan((colon + 1)..end), NumberStyles.None, CultureInfo.InvariantCulture, out int port) && port is > 0 and <= ushort.MaxValue
            ? (address, port, text[end..])
            : throw new FormatException($"'{whole}' has a side without a port from 1 to 65535");
    }
}
