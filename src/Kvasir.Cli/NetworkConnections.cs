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
    private readonly string _vmName;
    private readonly Action<string> _say;
    private readonly List<NicConnection> _nics = [];
    private int _opened;

    private NetworkConnections(string vmName, Action<string> say)
    {
        _vmName = vmName;
        _say = say;
    }

    public IReadOnlyList<NicConnection> Nics => _nics;

    /// <param name="settings">What was asked for; null: nothing was, and a user network is there if this host has what it needs.</param>
    /// <param name="vmName">MAC addresses come from it, so that a VM keeps its own.</param>
    /// <param name="say">Told what the user should know.</param>
    /// <param name="interactive">Somebody reads it also where nothing was asked for.</param>
    /// <exception cref="CommandException">A back end cannot be had.</exception>
    public static NetworkConnections Open(IReadOnlyList<NetSetting>? settings, string vmName, Action<string> say, bool interactive)
    {
        NetworkConnections connections = new(vmName, say);
        try
        {
            if (settings is not null || UserNetwork.LibraryVersion is not null)
                connections.OpenAll(settings ?? [NetOption.Default]);
            else if (interactive)
                say("this VM has no network: the user network needs libslirp (package libslirp0); --net none silences this line");
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

    /// <summary>Opens one more while the VM runs. Whoever asked for it owns its back end.</summary>
    /// <param name="text">As after <c>--net</c>.</param>
    /// <param name="name">What it is known by; null: the next number.</param>
    /// <exception cref="CommandException">The text is not understood.</exception>
    /// <exception cref="NetworkException">The back end cannot be had.</exception>
    public NicConnection OpenOne(string text, string? name)
    {
        IReadOnlyList<NetSetting> settings = NetOption.Parse([text])!;
        return settings.Count == 1 ? Open(settings[0], _opened++, name) : throw new NetworkException("'none' is no network to plug in");
    }

    private void OpenAll(IReadOnlyList<NetSetting> settings)
    {
        foreach (NetSetting setting in settings)
            _nics.Add(Open(setting, _opened++, null));
    }

    private NicConnection Open(NetSetting setting, int index, string? given)
    {
        string name = given ?? string.Create(CultureInfo.InvariantCulture, $"net{index}");
        INetworkBackend backend = Make(setting, line => _say($"{name}: {line}"));
        if (setting.Capture is { } path)
        {
            try
            {
                backend = new CapturedNetwork(backend, PcapngWriter.Create(path, name, line => _say($"{name}: {line}")));
            }
            catch (NetworkException)
            {
                backend.Dispose();
                throw;
            }
        }
        return new NicConnection(name, backend, new NicSettings(setting.Mac ?? MacFor(_vmName, index), setting.Queues, setting.Mtu != 0 ? setting.Mtu : backend.Mtu));
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
