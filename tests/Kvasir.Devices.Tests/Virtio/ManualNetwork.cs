using System;
using System.Collections.Generic;
using Kvasir.Network;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>A back end without a thread: whoever uses it says when frames move.</summary>
public sealed class ManualNetwork(int queues = 1) : INetworkBackend
{
    public INetworkPeer? Peer { get; private set; }

    /// <summary>Frames that the guest sent, where they are kept.</summary>
    public List<(VnetHeader Header, byte[] Frame)>? Sent { get; set; } = [];

    /// <summary>Frames that still find room.</summary>
    public int Room { get; set; } = int.MaxValue;

    public HashSet<int> Kicked { get; } = [];

    public NetworkOffloads Asked { get; private set; }

    public long Bytes { get; private set; }

    public string Description => "manual";

    public NetworkOffloads SendOffloads { get; init; } = NetworkOffloads.All;

    public NetworkOffloads ReceiveOffloads { get; init; } = NetworkOffloads.All;

    public int QueueCount => queues;

    public int Mtu => 0;

    public bool LinkUp { get; set; } = true;

    public NetworkCounters Counters { get; } = new();

    public void Start(INetworkPeer peer) => Peer = peer;

    public void Kick(int queue)
    {
        lock (Kicked)
            Kicked.Add(queue);
    }

    public bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (Room == 0)
            return false;
        Room--;
        Bytes += frame.Length;
        Sent?.Add((header, frame.ToArray()));
        return true;
    }

    public void SetReceiveOffloads(NetworkOffloads offloads) => Asked = offloads;

    public void Dispose()
    {
    }
}
