using System;
using Kvasir.Linux;

namespace Kvasir.Network.Capture;

/// <summary>Any back end, with what goes through it written to a capture file. Large segments are written as the guest sees them.</summary>
public sealed class CapturedNetwork(INetworkBackend inner, PcapngWriter capture) : INetworkBackend, INetworkPeer
{
    /// <summary>Queues whose next frame was offered before and is written already.</summary>
    private readonly bool[] _offered = new bool[64];
    private INetworkPeer? _peer;

    /// <summary>What carries the frames.</summary>
    public INetworkBackend Inner => inner;

    public string Description => inner.Description;

    public NetworkOffloads SendOffloads => inner.SendOffloads;

    public NetworkOffloads ReceiveOffloads => inner.ReceiveOffloads;

    public int QueueCount => inner.QueueCount;

    public int Mtu => inner.Mtu;

    public bool LinkUp => inner.LinkUp;

    public NetworkCounters Counters => inner.Counters;

    public void Start(INetworkPeer peer)
    {
        _peer = peer;
        inner.Start(this);
    }

    public void Kick(int queue) => inner.Kick(queue);

    public EventFd? Bell(int queue) => inner.Bell(queue);

    public void SetReceiveOffloads(NetworkOffloads offloads) => inner.SetReceiveOffloads(offloads);

    public bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        // Before it goes: the answer may come back within the call.
        if (!_offered[queue])
            capture.Write(CaptureDirection.Outbound, frame);
        bool sent = inner.Send(queue, header, frame);
        _offered[queue] = !sent;
        return sent;
    }

    public void Transmit(int queue) => _peer!.Transmit(queue);

    public bool CanReceive(int queue) => _peer!.CanReceive(queue);

    public bool Receive(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (!_peer!.Receive(queue, header, frame))
            return false;
        capture.Write(CaptureDirection.Inbound, frame);
        return true;
    }

    public void LinkChanged(bool up) => _peer!.LinkChanged(up);

    public void Dispose()
    {
        inner.Dispose();
        capture.Dispose();
    }
}
