using System;
using System.Buffers.Binary;
using System.IO;
using System.Net.Sockets;
using Kvasir.Linux;

namespace Kvasir.Network.Sockets;

/// <summary>A link over a stream socket: before each frame its length, four bytes, big endian. One other end at a time, which may come and go.</summary>
public sealed class StreamNetwork : SocketNetwork
{
    private const int Prefix = 4;
    private const int RetryMilliseconds = 500;

    // Configuration
    private readonly string _path;
    private readonly bool _listens;

    // Wiring
    private readonly Socket? _listener;

    // State, of the loop's thread
    private readonly byte[] _input = new byte[4 * (Prefix + LargestFrame)];
    private int _inputStart;
    private int _inputEnd;
    private Socket? _link;
    private volatile bool _linkUp;
    private long _nextTry;
    private int _polledListener;
    private int _polledLink;

    /// <exception cref="NetworkException">The path cannot be listened on.</exception>
    public StreamNetwork(string path, bool listens, Action<string>? log = null)
        : base("net-stream", log)
    {
        _path = path;
        _listens = listens;
        if (!listens)
            return;
        try
        {
            UnixSockets.RemoveStale(path, SocketType.Stream);
            _listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { Blocking = false };
            _listener.Bind(new UnixDomainSocketEndPoint(path));
            _listener.Listen(1);
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException or NetworkException)
        {
            _listener?.Dispose();
            base.Dispose(true);
            throw new NetworkException($"cannot listen on {path}: {e.Message}", e);
        }
    }

    public override string Description => $"socket {(_listens ? "listening on" : "to")} {_path}";

    public override bool LinkUp => _linkUp;

    private protected override int OutputSocket => (int)_link!.Handle;

    protected override void Dispose(bool disposing)
    {
        base.Dispose(disposing);
        _link?.Dispose();
        if (_listener is null)
            return;
        _listener.Dispose();
        File.Delete(_path);
    }

    private protected override int PrepareInput(PollSet polls, int milliseconds)
    {
        _polledListener = -1;
        _polledLink = -1;
        if (_link is not null)
        {
            // Hang-up is reported without being asked for.
            _polledLink = polls.Add((int)_link.Handle, GuestFull ? PollEvents.None : PollEvents.Input);
            return milliseconds;
        }
        if (_listener is not null)
        {
            _polledListener = polls.Add((int)_listener.Handle, PollEvents.Input);
            return milliseconds;
        }
        TryConnect();
        if (_link is null)
            return RetryMilliseconds;
        _polledLink = polls.Add((int)_link.Handle, PollEvents.Input);
        return milliseconds;
    }

    private protected override void ProcessInput(PollSet polls)
    {
        if (_polledListener >= 0 && polls.Returned(_polledListener) != PollEvents.None)
            Accept();
        if (_polledLink < 0 || _link is null)
            return;
        PollEvents found = polls.Returned(_polledLink);
        if (found.HasFlag(PollEvents.Input))
            ReadFrames();
        else if ((found & (PollEvents.HangUp | PollEvents.Error)) != 0)
            HangUp();
    }

    private protected override void AfterKick()
    {
        if (!DeliverFrames())
            HangUp();
    }

    private protected override int Whole(ReadOnlySpan<byte> frame) => Prefix + frame.Length;

    private protected override bool TryWrite(ReadOnlySpan<byte> frame, int from, out int written)
    {
        Span<byte> prefix = stackalloc byte[Prefix];
        BinaryPrimitives.WriteInt32BigEndian(prefix, frame.Length);
        int done = from;
        while (done < Whole(frame))
        {
            int result = done < Prefix
                ? FrameIo.Send((int)_link!.Handle, prefix[done..], frame)
                : FrameIo.Send((int)_link!.Handle, frame[(done - Prefix)..]);
            if (result < 0)
            {
                written = done;
                if (result == -FrameIo.TryAgain)
                    return false;
                written = Whole(frame);
                HangUp();
                return true;
            }
            done += result;
        }
        written = done;
        return true;
    }

    private void TryConnect()
    {
        long now = Environment.TickCount64;
        if (now < _nextTry)
            return;
        _nextTry = now + RetryMilliseconds;
        Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            socket.Connect(new UnixDomainSocketEndPoint(_path));
        }
        catch (SocketException)
        {
            // Nobody is there yet.
            socket.Dispose();
            return;
        }
        Take(socket);
    }

    private void Accept()
    {
        try
        {
            Take(_listener!.Accept());
        }
        catch (SocketException)
        {
            // Whoever it was has left again.
        }
    }

    private void Take(Socket socket)
    {
        _link = socket;
        _inputStart = 0;
        _inputEnd = 0;
        _linkUp = true;
        Peer!.LinkChanged(true);
        Resume();
    }

    private void HangUp()
    {
        if (_link is null)
            return;
        _link.Dispose();
        _link = null;
        _linkUp = false;
        _nextTry = Environment.TickCount64 + RetryMilliseconds;
        DropOutput();
        Peer!.LinkChanged(false);
    }

    private void ReadFrames()
    {
        if (_inputStart > 0 && _input.Length - _inputEnd < Prefix + LargestFrame)
        {
            _input.AsSpan(_inputStart.._inputEnd).CopyTo(_input);
            _inputEnd -= _inputStart;
            _inputStart = 0;
        }
        int result = FrameIo.Receive((int)_link!.Handle, _input.AsSpan(_inputEnd));
        if (result == -FrameIo.TryAgain)
            return;
        if (result <= 0)
        {
            HangUp();
            return;
        }
        _inputEnd += result;
        if (!DeliverFrames())
            HangUp();
    }

    /// <returns>False where the other end does not speak this protocol.</returns>
    private bool DeliverFrames()
    {
        while (_inputEnd - _inputStart >= Prefix)
        {
            uint length = BinaryPrimitives.ReadUInt32BigEndian(_input.AsSpan(_inputStart));
            if (length > LargestFrame)
            {
                Log($"the other end of {_path} announces a frame of {length} bytes: hanging up");
                return false;
            }
            if (_inputEnd - _inputStart - Prefix < length)
                break;
            if (!Peer!.CanReceive(0))
            {
                GuestFull = true;
                return true;
            }
            if (Peer.Receive(0, default, _input.AsSpan(_inputStart + Prefix, (int)length)))
                Counters.Received((int)length);
            else
                Counters.Drop();
            _inputStart += Prefix + (int)length;
        }
        return true;
    }
}
