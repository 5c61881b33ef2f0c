using System;
using System.Net.Sockets;

namespace Kvasir.Network.Vsock;

/// <summary>Where a connection stands.</summary>
internal enum VsockPhase
{
    /// <summary>A client of the host's has connected and not yet said to which port.</summary>
    Greeting,

    /// <summary>The guest was asked, or is to be.</summary>
    Requested,
    Open,

    /// <summary>Nothing more is to come, but for the reset that ends it.</summary>
    Ended,
}

/// <summary>One connection between a port of the guest and a Unix socket of the host. Of the bridge's thread.</summary>
internal sealed class VsockConnection(Socket socket) : IDisposable
{
    /// <summary>Bytes kept for a host program that does not read: what the guest is told of as the buffer's size.</summary>
    public const int BufferSize = 64 * 1024;

    private byte[]? _kept;
    private int _first;
    private uint _announced;

    public Socket Socket { get; } = socket;

    public VsockPhase Phase { get; set; }

    /// <summary>What its client said so far, before it is open.</summary>
    public string Greeting { get; set; } = "";

    public uint HostPort { get; set; }

    public uint GuestPort { get; set; }

    /// <summary>Bytes of the guest's that the host has not taken yet.</summary>
    public int Kept { get; private set; }

    /// <summary>Bytes that the host has taken in all, as the guest counts them.</summary>
    public uint Forwarded { get; private set; }

    /// <summary>Bytes sent to the guest in all.</summary>
    public uint Sent { get; set; }

    /// <summary>What the guest said of its room last.</summary>
    public uint PeerSize { get; set; }

    public uint PeerForwarded { get; set; }

    /// <summary>What the guest will do no more.</summary>
    public VsockShutdown Guest { get; set; }

    /// <summary>What the host will do no more, and what of it the guest was told.</summary>
    public VsockShutdown Host { get; set; }

    public VsockShutdown HostTold { get; set; }

    /// <summary>What was passed on to the host of <see cref="Guest"/>.</summary>
    public VsockShutdown GuestPassedOn { get; set; }

    /// <summary>Packets that the guest is to get.</summary>
    public bool OwesRequest { get; set; }

    public bool OwesResponse { get; set; }

    public bool OwesCredit { get; set; }

    /// <summary>Its place among the descriptors waited for, or -1.</summary>
    public int Polled { get; set; } = -1;

    /// <summary>Bytes that the guest has room for. What it claims beyond what it can have is no room.</summary>
    public uint Credit
    {
        get
        {
            uint flying = Sent - PeerForwarded;
            return flying >= PeerSize ? 0 : PeerSize - flying;
        }
    }

    public bool TakesInput => Phase == VsockPhase.Open && (Host & VsockShutdown.Send) == 0 && (Guest & VsockShutdown.Receive) == 0 && Credit > 0;

    /// <summary>Keeps what the guest sent.</summary>
    /// <returns>False where it sent more than it was told there is room for.</returns>
    public bool TryKeep(ReadOnlySpan<byte> bytes)
    {
        if (bytes.Length > BufferSize - Kept)
            return false;
        _kept ??= new byte[BufferSize];
        int at = (_first + Kept) % BufferSize;
        int run = Math.Min(bytes.Length, BufferSize - at);
        bytes[..run].CopyTo(_kept.AsSpan(at));
        bytes[run..].CopyTo(_kept);
        Kept += bytes.Length;
        return true;
    }

    /// <summary>Writes to the host what was kept, as far as it takes it.</summary>
    /// <returns>False where the host's side is gone.</returns>
    public bool TryWrite()
    {
        while (Kept > 0)
        {
            int run = Math.Min(Kept, BufferSize - _first);
            int done = Socket.Send(_kept.AsSpan(_first, run), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
                break;
            if (error != SocketError.Success)
                return false;
            _first = (_first + done) % BufferSize;
            Kept -= done;
            Forwarded += (uint)done;
        }
        // The guest need not ask: it hears before its room is used up.
        OwesCredit |= Forwarded - _announced >= BufferSize / 4;
        return true;
    }

    /// <summary>A packet to the guest says how much was taken.</summary>
    public void Announce()
    {
        _announced = Forwarded;
        OwesCredit = false;
    }

    public void Dispose() => Socket.Dispose();
}
