using System;
using System.Collections.Generic;
using System.Globalization;
using System.Security.Cryptography;
using System.Text;
using Kvasir.Cli.Options;
using Kvasir.Devices.Virtio;
using Kvasir.Machine;
using Kvasir.Network;
using Kvasir.Network.Capture;
using Kvasir.Network.Sockets;
using Kvasir.Network.Tap;
using Kvasir.Network.User;

namespace Kvasir.Cli;

/// <summary>The back ends that <c>--net</c> asks for.</summary>
internal sealed class NetworkConnections : IDisposable
{
    private readonly List<NicConnection> _nics = [];

    private NetworkConnections()
    {
    }

    public IReadOnlyList<NicConnection> Nics => _nics;

    /// <param name="settings">What was asked for; null: nothing was, and a user network is there if this host has what it needs.</param>
    /// <param name="vmName">MAC addresses come from it, so that a VM keeps its own.</param>
    /// <param name="say">Told what the user should know.</param>
    /// <exception cref="CommandException">A back end cannot be had.</exception>
    public static NetworkConnections Open(IReadOnlyList<NetSetting>? settings, string vmName, Action<string> say)
    {
        NetworkConnections connections = new();
        try
        {
            if (settings is null && UserNetwork.LibraryVersion is null)
                say("this VM has no network: the user network needs libslirp (package libslirp0); --net none silences this line");
            else
                connections.OpenAll(settings ?? [NetOption.Default], vmName, say);
            return connections;
        }
        catch (NetworkException e)
        {
            connections.Dispose();
            throw new CommandException(ExitCode.HostTrouble, $"--net: {e.Message}", e);
        }
    }

    public void Dispose()
    {
        foreach (NicConnection nic in _nics)
            nic.Backend.Dispose();
    }

    private void OpenAll(IReadOnlyList<NetSetting> settings, string vmName, Action<string> say)
    {
        for (int index = 0; index < settings.Count; index++)
        {
            NetSetting setting = settings[index];
            string name = string.Create(CultureInfo.InvariantCulture, $"net{index}");
            INetworkBackend backend = Make(setting, line => say($"{name}: {line}"));
            if (setting.Capture is { } path)
            {
                try
                {
                    backend = new CapturedNetwork(backend, PcapngWriter.Create(path, name, line => say($"{name}: {line}")));
                }
                catch (NetworkException)
                {
                    backend.Dispose();
                    throw;
                }
            }
            _nics.Add(new NicConnection(name, backend, new NicSettings(setting.Mac ?? MacFor(vmName, index), setting.Queues, setting.Mtu != 0 ? setting.Mtu : backend.Mtu)));
        }
    }

    private static INetworkBackend Make(NetSetting setting, Action<string> log)
    {
        if (setting.User is { } user)
            return new UserNetwork(user, log);
        if (setting.Tap is { } tap)
            return new TapNetwork(tap, log);
        SocketSettings socket = setting.Socket!;
        return socket.Role == SocketRole.Datagram
            ? new DatagramNetwork(socket.LocalPath, socket.Path, log)
            : new StreamNetwork(socket.Path, socket.Role == SocketRole.Listen, log);
    }

    /// <summary>An address in the range that virtual machines use.</summary>
    private static byte[] MacFor(string vmName, int index)
    {
        byte[] hash = SHA256.HashData(Encoding.UTF8.GetBytes(string.Create(CultureInfo.InvariantCulture, $"{vmName}/{index}")));
        return [0x52, 0x54, 0x00, hash[0], hash[1], hash[2]];
    }
}
