using System;
using Kvasir.Devices.Virtio;
using Kvasir.Network;

namespace Kvasir.Machine;

/// <summary>A NIC of the VM and what is behind it.</summary>
/// <param name="Name">What the monitor knows it by.</param>
/// <param name="Backend">Owned by the board from when it is built.</param>
/// <param name="Settings">The device's.</param>
public sealed record NicConnection(string Name, INetworkBackend Backend, NicSettings Settings)
{
    /// <summary>The device, from when the board is built.</summary>
    public VirtioNet? Device { get; internal set; }
}
