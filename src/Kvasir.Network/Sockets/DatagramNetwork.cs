using System;
using System.IO;
using System.Net.Sockets;
using Kvasir.Linux;

namespace Kvasir.Network.Sockets;

/// <summary>A link over datagram sockets, one frame in each. The other end may come and go unnoticed, as on a wire.</summary>
public sealed class DatagramNetwork : SocketNetwork
{
    private const int Batch = 64;
    private const int BufferSize = 1 << 20;
    private const int RetryMilliseconds = 200;

    // Configuration
    private readonly string _localPath;
    private readonly string _remotePath;

    // Wiring
    private readonly Socket _receiver;

    // State, of the loop's thread
    private readonly byte[] _frame = new byte[LargestFrame];
    private Socket? _sender;
    private long _nextTry;
    private int _polled;

    /// <exception cref="NetworkException">The local path cannot be had.</exception>
    public DatagramNetwork(string localPath, string remotePath, Action<string>? log = null)
        : base("net-dgram", log)
    {
        _localPath = localPath;
        _remotePath = remotePath;
        _receiver = new Socket(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified);
        try
        {
            UnixSockets.RemoveStale(localPath, SocketType.Dgram);
            _receiver.Bind(new UnixDomainSocketEndPoint(localPath));
            _receiver.ReceiveBufferSize = BufferSize;
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException or NetworkException)
        {
            _receiver.Dispose();
            base.Dispose(true);
            throw new NetworkException($"cannot receive at {localPath}: {e.Message}", e);
        }
    }

    public override string Description => $"socket {_localPath} to {_remotePath}";

    public override bool LinkUp => true;

    private protected override int OutputSocket => (int)(_sender ?? _receiver).Handle;

    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        _sender?.Dispose();
        _receiver.Dispose();
        File.Delete(_localPath);
    }

    private protected override int PrepareInput(PollSet polls, int milliseconds)
    {
        _polled = GuestFull ? -1 : polls.Add((int)_receiver.Handle, PollEvents.Input);
        return milliseconds;
    }

    private protected override void ProcessInput(PollSet polls)
    {
        if (_polled < 0 || polls.Returned(_polled) == PollEvents.None)
            return;
        for (int count = 0; count < Batch; count++)
        {
            if (!Peer!.CanReceive(0))
            {
                GuestFull = true;
                return;
            }
            int length = FrameIo.Receive((int)_receiver.Handle, _frame);
            if (length < 0)
                return;
            if (Peer.Receive(0, default, _frame.AsSpan(0, length)))
                Counters.Received(length);
            else
                Counters.Drop();
        }
    }

    private protected override void AfterKick()
    {
    }

    private protected override int Whole(ReadOnlySpan<byte> frame) => frame.Length;

    private protected override bool TryWrite(ReadOnlySpan<byte> frame, int from, out int written)
    {
        written = frame.Length;
        if (!TryFindOther())
        {
            Counters.Drop();
            return true;
        }
        int result = FrameIo.Send((int)_sender!.Handle, frame);
        if (result == -FrameIo.TryAgain)
        {
            written = 0;
            return false;
        }
        if (result < 0)
        {
            // The other end has gone, or was started anew under the same path.
            Counters.Drop();
            _sender.Dispose();
            _sender = null;
        }
        return true;
    }

    private bool TryFindOther()
    {
        if (_sender is not null)
            return true;
        long now = Environment.TickCount64;
        if (now < _nextTry)
            return false;
        _nextTry = now + RetryMilliseconds;
        Socket socket = new(AddressFamily.Unix, SocketType.Dgram, ProtocolType.Unspecified) { SendBufferSize = BufferSize };
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(_remotePath));
        }
        catch (SocketException)
        {
            socket.Dispose();
            return false;
        }
        _sender = socket;
        return true;
    }
}
