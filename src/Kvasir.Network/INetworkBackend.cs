using System;
using Kvasir.Linux;

namespace Kvasir.Network;

/// <summary>
/// The host side of a NIC. It owns the thread on which a queue's frames move, in both directions: a kick wakes that thread, which asks the device for
/// what it has to send; frames from outside are handed to the device on the same thread. So a frame is copied once and crosses no lock.
/// </summary>
public interface INetworkBackend : IDisposable
{
    /// <summary>For a person: "user", "tap tap0", "socket /run/x".</summary>
    string Description { get; }

    /// <summary>What <see cref="Send"/> does on its own that a guest may leave undone.</summary>
    NetworkOffloads SendOffloads { get; }

    /// <summary>What frames from outside may leave undone where the guest takes it.</summary>
    NetworkOffloads ReceiveOffloads { get; }

    /// <summary>Queues of its own, each with a thread. A device may use more, up to 64: queue n goes with n modulo this number.</summary>
    int QueueCount { get; }

    /// <summary>The network's largest packet in bytes, without the Ethernet header; 0 where it has no opinion.</summary>
    int Mtu { get; }

    /// <summary>Whether the other end is there.</summary>
    bool LinkUp { get; }

    NetworkCounters Counters { get; }

    /// <summary>Connects the device, and begins to carry frames.</summary>
    void Start(INetworkPeer peer);

    /// <summary>The guest has frames to send, or room for more, in a queue. Any thread; never waits.</summary>
    void Kick(int queue);

    /// <summary>A descriptor whose signals are such kicks, for an accelerator that signals in place of the guest's write. Any thread.</summary>
    /// <returns>Null where the back end waits for none.</returns>
    EventFd? Bell(int queue) => null;

    /// <summary>Sends one frame. On the queue's thread only, from <see cref="INetworkPeer.Transmit"/>.</summary>
    /// <returns>False where there is no room now: the frame is to be offered again when <see cref="INetworkPeer.Transmit"/> is called next.</returns>
    bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame);

    /// <summary>What the guest takes undone from now on. Any thread.</summary>
    void SetReceiveOffloads(NetworkOffloads offloads);
}

/// <summary>The device's side of the seam.</summary>
public interface INetworkPeer
{
    /// <summary>Send what the guest has ready in a queue. On that queue's thread.</summary>
    void Transmit(int queue);

    /// <summary>Whether a frame from outside would find room. On the queue's thread.</summary>
    bool CanReceive(int queue);

    /// <summary>A frame from outside. On the queue's thread.</summary>
    /// <returns>False where there is no room; the back end is kicked when there is some.</returns>
    bool Receive(int queue, in VnetHeader header, ReadOnlySpan<byte> frame);

    /// <summary>The other end came or went. Any thread.</summary>
    void LinkChanged(bool up);
}

/// <summary>What went through a back end. Written by its threads, read by anyone.</summary>
public sealed class NetworkCounters
{
    internal long _sentFrames;
    internal long _sentBytes;
    internal long _receivedFrames;
    internal long _receivedBytes;
    internal long _refused;
    internal long _dropped;

    /// <summary>Frames that the guest sent.</summary>
    public long SentFrames => _sentFrames;

    public long SentBytes => _sentBytes;

    /// <summary>Frames that went to the guest.</summary>
    public long ReceivedFrames => _receivedFrames;

    public long ReceivedBytes => _receivedBytes;

    /// <summary>Frames of the guest that were malformed or that it may not send.</summary>
    public long Refused => _refused;

    /// <summary>Frames that found no room.</summary>
    public long Dropped => _dropped;

    internal void Sent(int length)
    {
        System.Threading.Interlocked.Increment(ref _sentFrames);
        System.Threading.Interlocked.Add(ref _sentBytes, length);
    }

    internal void Received(int length)
    {
        System.Threading.Interlocked.Increment(ref _receivedFrames);
        System.Threading.Interlocked.Add(ref _receivedBytes, length);
    }

    internal void Refuse() => System.Threading.Interlocked.Increment(ref _refused);

    internal void Drop() => System.Threading.Interlocked.Increment(ref _dropped);
}
