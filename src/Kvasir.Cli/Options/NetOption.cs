using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using Kvasir.Network.Sockets;
using Kvasir.Network.Tap;
using Kvasir.Network.User;

namespace Kvasir.Cli.Options;

/// <summary>One NIC as asked for. One of the three kinds of settings is set.</summary>
internal sealed record NetSetting
{
    public UserNetworkSettings? User { get; init; }

    public TapSettings? Tap { get; init; }

    public SocketSettings? Socket { get; init; }

    /// <summary>Null: made from the VM's name.</summary>
    public byte[]? Mac { get; init; }

    public int Queues { get; init; } = 1;

    /// <summary>0: the back end's own.</summary>
    public int Mtu { get; init; }

    /// <summary>A pcapng file; null: none.</summary>
    public string? Capture { get; init; }
}

/// <summary><c>--net user|tap|socket|none[,key=value...]</c>.</summary>
internal static class NetOption
{
    private const int LongestInterface = 15;
    private const int MostQueues = 32;

    private static readonly string[] CommonKeys = ["model", "mac", "queues", "mtu", "capture"];
    private static readonly string[] UserKeys = ["hostfwd", "net", "host", "dns", "dhcpstart", "ipv4", "ipv6", "restrict", "loopback", "hostname"];
    private static readonly string[] TapKeys = ["ifname", "bridge", "ip"];
    private static readonly string[] SocketKeys = ["listen", "connect", "local", "remote"];

    /// <summary>What there is when nothing was said.</summary>
    public static NetSetting Default => new() { User = new UserNetworkSettings() };

    /// <summary>Reads all that were given.</summary>
    /// <returns>Null where none was given.</returns>
    /// <exception cref="CommandException">A kind or key is not known, or a value is bad.</exception>
    public static IReadOnlyList<NetSetting>? Parse(IReadOnlyList<string> texts)
    {
        if (texts.Count == 0)
            return null;
        if (!texts.Contains("none"))
            return [.. texts.Select(Parse)];
        return texts.Count == 1 ? [] : throw Bad("none goes with no other");
    }

    private static NetSetting Parse(string text)
    {
        string[] parts = text.Split(',');
        string[] keys = parts[0] switch
        {
            "user" => UserKeys,
            "tap" => TapKeys,
            "socket" => SocketKeys,
            _ => throw Bad($"'{parts[0]}' is none of user, tap, socket, none"),
        };
        List<(string Key, string Value)> values = [];
        foreach (string part in parts.Skip(1))
        {
            int equals = part.IndexOf('=', StringComparison.Ordinal);
            string key = equals < 0 ? part : part[..equals];
            if (!keys.Contains(key) && !CommonKeys.Contains(key))
                throw Bad($"{parts[0]} has no '{key}'; it has {string.Join(", ", keys.Concat(CommonKeys))}");
            if (key != "hostfwd" && values.Any(value => value.Key == key))
                throw Bad($"{key} is given twice");
            values.Add((key, equals < 0 ? "" : part[(equals + 1)..]));
        }
        NetSetting setting = Common(values);
        return parts[0] switch
        {
            "user" => setting with { User = User(values, setting.Mtu) },
            "tap" => setting with { Tap = Tap(values, setting) },
            _ => setting with { Socket = Socket(values) },
        };
    }

    private static NetSetting Common(List<(string Key, string Value)> values)
    {
        NetSetting setting = new();
        foreach ((string key, string value) in values)
        {
            setting = key switch
            {
                "model" => value == "virtio" ? setting : throw Bad($"model: '{value}' is not supported yet; only virtio is"),
                "mac" => setting with { Mac = Mac(value) },
                "queues" => setting with { Queues = Number(key, value, 1, MostQueues) },
                "mtu" => setting with { Mtu = Number(key, value, 68, UserNetworkSettings.LargestMtu) },
                "capture" => setting with { Capture = value.Length > 0 ? value : throw Bad("capture: name a file") },
                _ => setting,
            };
        }
        return setting;
    }

    private static UserNetworkSettings User(List<(string Key, string Value)> values, int mtu)
    {
        UserNetworkSettings settings = new();
        List<PortForward> forwards = [];
        if (values.FirstOrDefault(value => value.Key == "net") is { Key: not null } net)
            settings = WithNetwork(settings, net.Value);
        foreach ((string key, string value) in values)
        {
            switch (key)
            {
                case "hostfwd":
                    forwards.Add(Forward(value));
                    break;
                case "host":
                    settings = settings with { Host = Inside(settings, key, value) };
                    break;
                case "dns":
                    settings = settings with { NameServer = Inside(settings, key, value) };
                    break;
                case "dhcpstart":
                    settings = settings with { DhcpStart = Inside(settings, key, value) };
                    break;
                case "ipv4":
                    settings = settings with { Ip4 = Flag(key, value) };
                    break;
                case "ipv6":
                    settings = settings with { Ip6 = Flag(key, value) };
                    break;
                case "restrict":
                    settings = settings with { Restricted = Flag(key, value) };
                    break;
                case "loopback":
                    settings = settings with { HostLoopback = Flag(key, value) };
                    break;
                case "hostname":
                    settings = settings with { HostName = Guests.SeedDisk.IsHostName(value) ? value : throw Bad($"hostname: '{value}' is no host name") };
                    break;
                default:
                    break;
            }
        }
        if (!settings.Ip4 && !settings.Ip6)
            throw Bad("ipv4 and ipv6 are both off");
        if (mtu is > 0 and < UserNetworkSettings.SmallestMtu)
            throw Bad($"mtu: {mtu} is less than {UserNetworkSettings.SmallestMtu}, which IPv6 needs");
        return settings with { Forwards = forwards, Mtu = mtu == 0 ? settings.Mtu : mtu };
    }

    private static UserNetworkSettings WithNetwork(UserNetworkSettings settings, string text)
    {
        if (!IPNetwork.TryParse(text, out IPNetwork network) || network.BaseAddress.AddressFamily != AddressFamily.InterNetwork || network.PrefixLength is < 8 or > 28)
            throw Bad($"net: '{text}' is no IPv4 network of /8 to /28, as 10.0.2.0/24");
        byte[] bytes = network.BaseAddress.GetAddressBytes();
        uint mask = uint.MaxValue << (32 - network.PrefixLength);
        return settings with
        {
            Network = network.BaseAddress,
            Netmask = new IPAddress([(byte)(mask >> 24), (byte)(mask >> 16), (byte)(mask >> 8), (byte)mask]),
            Host = Plus(bytes, 2),
            NameServer = Plus(bytes, 3),
            DhcpStart = Plus(bytes, network.PrefixLength > 27 ? 4 : 15),
        };
    }

    private static IPAddress Plus(byte[] network, int offset) => new([network[0], network[1], network[2], (byte)(network[3] + offset)]);

    private static IPAddress Inside(UserNetworkSettings settings, string key, string value)
    {
        if (!IPAddress.TryParse(value, out IPAddress? address) || address.AddressFamily != AddressFamily.InterNetwork)
            throw Bad($"{key}: '{value}' is no IPv4 address");
        byte[] bytes = address.GetAddressBytes();
        byte[] mask = settings.Netmask.GetAddressBytes();
        byte[] network = settings.Network.GetAddressBytes();
        for (int index = 0; index < bytes.Length; index++)
        {
            if ((bytes[index] & mask[index]) != network[index])
                throw Bad($"{key}: {value} is outside the guest's network {settings.Network}");
        }
        return address;
    }

    private static TapSettings Tap(List<(string Key, string Value)> values, NetSetting setting)
    {
        TapSettings settings = new() { Mtu = setting.Mtu, Queues = setting.Queues };
        foreach ((string key, string value) in values)
        {
            settings = key switch
            {
                "ifname" => settings with { InterfaceName = Interface(key, value) },
                "bridge" => settings with { Bridge = Interface(key, value) },
                "ip" => WithHostAddress(settings, value),
                _ => settings,
            };
        }
        return settings;
    }

    private static TapSettings WithHostAddress(TapSettings settings, string value)
    {
        string[] parts = value.Split('/');
        if (parts.Length != 2 || !IPAddress.TryParse(parts[0], out IPAddress? address) || address.AddressFamily != AddressFamily.InterNetwork)
            throw Bad($"ip: '{value}' is no IPv4 address with a prefix, as 192.168.77.1/24");
        return settings with { HostAddress = address, PrefixLength = Number("ip", parts[1], 1, 32) };
    }

    private static SocketSettings Socket(List<(string Key, string Value)> values)
    {
        Dictionary<string, string> paths = values.Where(value => SocketKeys.Contains(value.Key)).ToDictionary(value => value.Key, value => value.Value, StringComparer.Ordinal);
        foreach ((string key, string path) in paths)
        {
            if (path.Length == 0)
                throw Bad($"{key}: name a Unix socket's path");
        }
        return (paths.GetValueOrDefault("listen"), paths.GetValueOrDefault("connect"), paths.GetValueOrDefault("local"), paths.GetValueOrDefault("remote")) switch
        {
            ({ } listen, null, null, null) => new SocketSettings(SocketRole.Listen, listen),
            (null, { } connect, null, null) => new SocketSettings(SocketRole.Connect, connect),
            (null, null, { } local, { } remote) => new SocketSettings(SocketRole.Datagram, remote, local),
            _ => throw Bad("socket takes listen=PATH, or connect=PATH, or local=PATH with remote=PATH"),
        };
    }

    private static PortForward Forward(string value)
    {
        try
        {
            return PortForward.Parse(value);
        }
        catch (FormatException e)
        {
            throw Bad($"hostfwd: {e.Message}");
        }
    }

    private static string Interface(string key, string value) =>
        value.Length is > 0 and <= LongestInterface && value.All(c => c is > ' ' and < '\x7f' and not '/' and not ':')
            ? value
            : throw Bad($"{key}: '{value}' is no interface's name (1 to {LongestInterface} characters)");

    private static byte[] Mac(string value)
    {
        string[] parts = value.Split(':', '-');
        byte[] bytes = new byte[6];
        bool valid = parts.Length == 6;
        for (int index = 0; valid && index < 6; index++)
            valid = parts[index].Length is 1 or 2 && byte.TryParse(parts[index], NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out bytes[index]);
        if (!valid)
            throw Bad($"mac: '{value}' is no MAC address; write it as 52:54:00:12:34:56");
        return (bytes[0] & 1) == 0 && bytes.Any(b => b != 0) ? bytes : throw Bad($"mac: {value} is no address of a single machine");
    }

    private static int Number(string key, string value, int least, int most) =>
        int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number >= least && number <= most
            ? number
            : throw Bad($"{key}: '{value}' is no number from {least} to {most}");

    private static bool Flag(string key, string value) => value switch
    {
        "" or "on" => true,
        "off" => false,
        _ => throw Bad($"{key}: '{value}' is neither on nor off"),
    };

    private static CommandException Bad(string message) => new(ExitCode.Usage, $"--net: {message}");
}
