using System;
using System.Runtime.InteropServices;

namespace Kvasir.Network.Vsock;

/// <summary>What a packet asks for (virtio 1.2, 5.10.6).</summary>
public enum VsockOperation : ushort
{
    Invalid = 0,
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

/// <summary>The flags of <see cref="VsockOperation.Shutdown"/>: what its sender will do no more.</summary>
[Flags]
public enum VsockShutdown : uint
{
    None = 0,
    Receive = 1,
    Send = 2,
    Both = Receive | Send,
}

/// <summary>The header of a packet, as it stands in a buffer.</summary>
[StructLayout(LayoutKind.Sequential, Pack = 4, Size = HeaderSize)]
public record struct VsockPacket
{
    public const int HeaderSize = 44;

    /// <summary>Context identifiers: 2 is the host, what is below is nobody's.</summary>
    public const ulong HostCid = 2;

    /// <summary>Kinds of sockets (virtio 1.2, 5.10.6): bytes in a row, and messages that stay whole.</summary>
    public const ushort Stream = 1;
    public const ushort SequencedPackets = 2;

    /// <summary>In <see cref="Flags"/> of a message's last packet of data.</summary>
    public const uint EndOfMessage = 1;

    public ulong SourceCid;
    public ulong DestinationCid;
    public uint SourcePort;
    public uint DestinationPort;
    public uint Length;
    public ushort Type;
    public VsockOperation Operation;

    /// <summary><see cref="VsockShutdown"/>, or of data <see cref="EndOfMessage"/>.</summary>
    public uint Flags;

    /// <summary>Bytes that the sender has room for in all, and those that it has taken out of there so far.</summary>
    public uint BufferSize;
    public uint Forwarded;

    public readonly VsockShutdown Shutdown => (VsockShutdown)Flags & VsockShutdown.Both;
}

/// <summary>The guest's side of the bridge: a device. Its members are called on the bridge's thread alone.</summary>
public interface IVsockGuest
{
    ulong Cid { get; }

    /// <summary>The driver knows sockets whose messages stay whole.</summary>
    bool TakesMessages { get; }

    /// <summary>Counts the driver's resets: connections of before are gone.</summary>
    int Generation { get; }

    /// <summary>Keeps the device as it is until <see cref="Leave"/>.</summary>
    /// <returns>False where no driver runs, or the VM is paused.</returns>
    bool TryEnter();

    void Leave();

    /// <summary>Takes the guest's next packet.</summary>
    /// <param name="payload">Takes its data; <see cref="VsockPacket.Length"/> says how much came, or the packet is <see cref="VsockOperation.Invalid"/>.</param>
    /// <returns>False where there is none: the bridge is kicked when one comes.</returns>
    bool TryTake(out VsockPacket packet, Span<byte> payload);

    /// <summary>Bytes that the guest's next buffer holds, header and data; 0 where it has given none: the bridge is kicked when it does.</summary>
    int Room { get; }

    /// <summary>Gives the guest a packet, into the buffer that <see cref="Room"/> told of.</summary>
    void Give(in VsockPacket packet, ReadOnlySpan<byte> payload);

    /// <summary>Tells the driver of what was taken and given.</summary>
    void Notify();
}
