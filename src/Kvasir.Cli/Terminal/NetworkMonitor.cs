using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text;
using Kvasir.Machine;
using Kvasir.Network;
using Kvasir.Network.Capture;
using Kvasir.Network.User;

namespace Kvasir.Cli.Terminal;

/// <summary>The monitor's commands for networks.</summary>
internal sealed class NetworkMonitor(IMachineControl machine, NetworkConnections connections)
{
    private IReadOnlyList<NicConnection> Nics => machine.Devices?.Nics ?? [];

    /// <summary><c>device_add virtio-net,KIND[,id=NAME,KEY=VALUE...]</c>, with the kinds and keys of <c>--net</c>.</summary>
    public string Plug(string text)
    {
        string[] parts = text.Split(',');
        string? name = Array.Find(parts, part => part.StartsWith("id=", StringComparison.Ordinal))?[3..];
        string setting = string.Join(',', parts.Skip(1).Where(part => !part.StartsWith("id=", StringComparison.Ordinal)));
        if (machine.Devices is not { } devices)
            return "this VM has no devices to ask for\n";
        try
        {
            NicConnection nic = connections.OpenOne(setting.Length == 0 ? "user" : setting, name);
            try
            {
                devices.AddNic(nic);
            }
            catch (MachineException)
            {
                nic.Backend.Dispose();
                throw;
            }
            return $"{nic.Name} is plugged in\n";
        }
        catch (Exception e) when (e is MachineException or NetworkException or CommandException)
        {
            return $"{e.Message}\n";
        }
    }

    /// <returns>The answer with its line ends; null where the command is none of these.</returns>
    public string? Execute(string[] words)
    {
        try
        {
            return words switch
            {
                ["info", "network"] => Describe(),
                ["info", "usernet"] => DescribeUserNetworks(),
                ["hostfwd_add", string forward] => Add(FirstUser(), forward),
                ["hostfwd_add", string name, string forward] => Add(User(name), forward),
                ["hostfwd_remove", string forward] => Remove(FirstUser(), forward),
                ["hostfwd_remove", string name, string forward] => Remove(User(name), forward),
                ["set_link", string name, "on" or "off"] => SetLink(name, words[2] == "on"),
                ["hostfwd_add" or "hostfwd_remove" or "set_link", ..] => $"{words[0]}: see 'help' for what it takes\n",
                _ => null,
            };
        }
        catch (Exception e) when (e is NetworkException or FormatException)
        {
            return $"{e.Message}\n";
        }
    }

    /// <summary>The back end itself, under whatever looks at its frames.</summary>
    private static INetworkBackend Inner(NicConnection nic) => nic.Backend is CapturedNetwork captured ? captured.Inner : nic.Backend;

    private static string Add(UserNetwork network, string forward)
    {
        network.AddForward(PortForward.Parse(forward));
        return "";
    }

    private static string Remove(UserNetwork network, string forward) =>
        network.RemoveForward(PortForward.ParseHostSide(forward)) ? "" : $"no forward has {forward}\n";

    private NicConnection Find(string name) => Nics.FirstOrDefault(nic => nic.Name == name)
        ?? throw new NetworkException(Nics.Count == 0 ? "this VM has no NIC" : $"there is no NIC '{name}'; there are {string.Join(", ", Nics.Select(nic => nic.Name))}");

    private UserNetwork User(string name) => Inner(Find(name)) as UserNetwork ?? throw new NetworkException($"{name} is no user network");

    private UserNetwork FirstUser() => Nics.Select(Inner).OfType<UserNetwork>().FirstOrDefault() ?? throw new NetworkException("this VM has no user network");

    private string SetLink(string name, bool on)
    {
        Find(name).Device?.SetCable(on);
        return "";
    }

    private string Describe()
    {
        StringBuilder text = new();
        foreach (NicConnection nic in Nics)
        {
            NetworkCounters counters = nic.Backend.Counters;
            string mac = string.Join(':', nic.Settings.Mac.ToArray().Select(b => b.ToString("x2", CultureInfo.InvariantCulture)));
            text.Append(CultureInfo.InvariantCulture, $"{nic.Name}: {nic.Backend.Description}, virtio, mac {mac}, link {(nic.Device?.HasLink == true ? "up" : "down")}\n");
            text.Append(CultureInfo.InvariantCulture, $"  sent {counters.SentFrames} frames ({counters.SentBytes} bytes), received {counters.ReceivedFrames} ({counters.ReceivedBytes} bytes)");
            text.Append(CultureInfo.InvariantCulture, $", refused {counters.Refused}, dropped {counters.Dropped}, filtered {nic.Device?.Filtered ?? 0}\n");
        }
        return text.Length > 0 ? text.ToString() : "this VM has no NIC\n";
    }

    private string DescribeUserNetworks()
    {
        StringBuilder text = new();
        foreach (NicConnection nic in Nics)
        {
            if (Inner(nic) is UserNetwork network)
                text.Append(nic.Name).Append(":\n").Append(network.DescribeConnections().Replace("\r\n", "\n", StringComparison.Ordinal));
        }
        return text.Length > 0 ? text.ToString() : "this VM has no user network\n";
    }
}
