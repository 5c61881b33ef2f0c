using System;
using System.Collections.Generic;
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
/// <param name="type">Of the packets: <see cref="VsockPacket.Stream"/> or <see cref="VsockPacket.SequencedPackets"/>; the socket's type fits it.</param>
internal sealed class VsockConnection(Socket socket, ushort type) : IDisposable
{
    /// <summary>Bytes kept for a host program that does not read: what the guest is told of as the buffer's size.</summary>
    public const int BufferSize = 64 * 1024;

    private byte[]? _kept;
    private int _first;

    /// <summary>Lengths of the messages in what is kept, and of the one that is not whole yet.</summary>
    private readonly Queue<int>? _messages = type == VsockPacket.SequencedPackets ? new Queue<int>() : null;
    private int _begun;

    /// <summary>A message of the host's on its way to the guest.</summary>
    private byte[]? _message;
    private int _messageAt;
    private int _messageLength;
    private uint _announced;

    public Socket Socket { get; } = socket;

    public ushort Type { get; } = type;

    /// <summary>Messages, not a row of bytes.</summary>
    public bool KeepsMessages => _messages is not null;

    public VsockPhase Phase { get; set; }

    /// <summary>What its client said so far, before it is open.</summary>
    public string Greeting { get; set; } = "";

    public uint HostPort { get; set; }

    public uint GuestPort { get; set; }

    /// <summary>Bytes of the guest's that the host has not taken yet.</summary>
    public int Kept { get; private set; }

    /// <summary>There is something that the host can take.</summary>
    public bool HasOutput => _messages is null ? Kept > 0 : _messages.Count > 0;

    /// <summary>What the guest has yet to get of a message.</summary>
    public ReadOnlySpan<byte> Message => _message.AsSpan(_messageAt, _messageLength - _messageAt);

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

    public bool TakesInput => Phase == VsockPhase.Open && (Host & VsockShutdown.Send) == 0 && (Guest & VsockShutdown.Receive) == 0 && Credit > 0 && _messageAt == _messageLength;

    /// <summary>Keeps what the guest sent.</summary>
    /// <param name="last">A message ends with it.</param>
    /// <returns>False where it sent more than it was told there is room for.</returns>
    public bool TryKeep(ReadOnlySpan<byte> bytes, bool last)
    {
        if (bytes.Length > BufferSize - Kept)
            return false;
        if (_messages is not null)
        {
            // Empty messages take no room of what the guest was told.
            if (_messages.Count >= BufferSize)
                return false;
            _begun += bytes.Length;
            if (last)
            {
                _messages.Enqueue(_begun);
                _begun = 0;
            }
        }
        _kept ??= new byte[BufferSize];
        int at = (_first + Kept) % BufferSize;
        int run = Math.Min(bytes.Length, BufferSize - at);
        bytes[..run].CopyTo(_kept.AsSpan(at));
        bytes[run..].CopyTo(_kept);
        Kept += bytes.Length;
        return true;
    }

    /// <summary>Writes to the host what was kept, as far as it takes it.</summary>
    /// <param name="scratch">Room for a message that does not lie in one piece.</param>
    /// <returns>False where the host's side is gone.</returns>
    public bool TryWrite(Span<byte> scratch)
    {
        while (HasOutput)
        {
            int length = _messages is null ? Kept : _messages.Peek();
            int run = Math.Min(length, BufferSize - _first);
            ReadOnlySpan<byte> piece = _kept.AsSpan(_first, run);
            if (_messages is not null && run < length)
            {
                piece.CopyTo(scratch);
                _kept.AsSpan(0, length - run).CopyTo(scratch[run..]);
                piece = scratch[..length];
            }
            int done = Socket.Send(piece, SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
                break;
            if (error != SocketError.Success)
                return false;
            _ = _messages?.Dequeue();
            _first = (_first + done) % BufferSize;
            Kept -= done;
            Forwarded += (uint)done;
        }
        // The guest need not ask: it hears before its room is used up.
        OwesCredit |= Forwarded - _announced >= BufferSize / 4;
        return true;
    }

    /// <summary>Takes the host's next message, where the last one has been sent whole.</summary>
    /// <returns>Bytes, 0 at the end, -1 where there is none yet, -2 where it is longer than <see cref="BufferSize"/> or the socket has failed.</returns>
    public int ReadMessage()
    {
        // One byte more than may come shows that more has come.
        _message ??= new byte[BufferSize + 1];
        int length = Socket.Receive(_message, SocketFlags.None, out SocketError error);
        if (error == SocketError.WouldBlock)
            return -1;
        if (error != SocketError.Success || length > BufferSize || (uint)length > PeerSize)
            return -2;
        (_messageAt, _messageLength) = (0, length);
        return length;
    }

    /// <summary>A part of the message is on its way.</summary>
    public void Advance(int bytes) => _messageAt += bytes;

    /// <summary>A packet to the guest says how much was taken.</summary>
    public void Announce()
    {
        _announced = Forwarded;
        OwesCredit = false;
    }

    public void Dispose() => Socket.Dispose();
}
