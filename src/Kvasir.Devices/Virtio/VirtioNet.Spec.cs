using System;
using System.Runtime.InteropServices;

namespace Kvasir.Devices.Virtio;

/// <content>Numbers of virtio 1.2, 5.1.</content>
public sealed partial class VirtioNet
{
    private const int LinkUp = 1;
    private const int AnnounceWanted = 2;
    private const int LegacyHeaderSize = 10;

    /// <summary>Feature bits (5.1.3).</summary>
    [Flags]
    private enum Feature : ulong
    {
        None = 0,
        Checksum = 1 << 0,
        GuestChecksum = 1 << 1,
        ControlGuestOffloads = 1 << 2,
        Mtu = 1 << 3,
        Mac = 1 << 5,
        GuestTso4 = 1 << 7,
        GuestTso6 = 1 << 8,
        GuestEcn = 1 << 9,
        HostTso4 = 1 << 11,
        HostTso6 = 1 << 12,
        HostEcn = 1 << 13,
        MergedBuffers = 1 << 15,
        Status = 1 << 16,
        ControlQueue = 1 << 17,
        ControlReceive = 1 << 18,
        ControlVlan = 1 << 19,
        ControlReceiveExtra = 1 << 20,
        GuestAnnounce = 1 << 21,
        MultiQueue = 1 << 22,
        ControlMacAddress = 1 << 23,
    }

    /// <summary>Device configuration (5.1.4).</summary>
    private enum Config
    {
        Mac = 0,
        Status = 6,
        MaximumPairs = 8,
        Mtu = 10,
        Size = 12,
    }

    /// <summary>Classes of control commands (5.1.6.5).</summary>
    private enum ControlClass : byte
    {
        Receive = 0,
        Mac = 1,
        Vlan = 2,
        Announce = 3,
        MultiQueue = 4,
        GuestOffloads = 5,
    }

    private enum ReceiveCommand : byte
    {
        Promiscuous = 0,
        AllMulticast = 1,
        AllUnicast = 2,
        NoMulticast = 3,
        NoUnicast = 4,
        NoBroadcast = 5,
    }

    private enum MacCommand : byte
    {
        SetTable = 0,
        SetAddress = 1,
    }

    private enum VlanCommand : byte
    {
        Add = 0,
        Delete = 1,
    }

    private enum ControlResult : byte
    {
        Ok = 0,
        Error = 1,
    }

    [StructLayout(LayoutKind.Sequential, Pack = 1)]
    private readonly record struct ControlHeader(ControlClass Class, byte Command);
}
