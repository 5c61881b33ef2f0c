using System;
using System.IO;
using System.Net.Sockets;
using Kvasir.Linux;
using Kvasir.Network.Frames;

namespace Kvasir.Network.Sockets;

/// <summary>
/// A link over Unix sockets to one other VM, of Kvasir or QEMU (its netdevs <c>stream</c> and <c>dgram</c>). What the guest leaves undone is done here, as
/// the other end takes plain frames only. Needs no privilege.
/// </summary>
public abstract class SocketNetwork : INetworkBackend, ILoopWork
{
    /// <summary>The longest frame that the other end may send, in bytes: what QEMU takes too.</summary>
    protected const int LargestFrame = 4096 + 65536;

    /// <summary>Room for the segments of the largest TCP segment.</summary>
    private const int OutputCapacity = 512 << 10;

    /// <summary>The smallest segment that a TCP of our time sends (Linux: tcp_min_snd_mss); smaller ones only multiply work.</summary>
    private const int SmallestSegment = 48;

    // Configuration
    private readonly Action<string>? _log;

    // Wiring
    private readonly NetworkLoop _loop;

    // State, of the loop's thread
    private readonly FrameQueue _output = new(OutputCapacity);
    private readonly byte[] _scratch = new byte[LargestFrame];
    private ulong _known;
    private bool _outputWaits;
    private int _polledOutput;

    private protected SocketNetwork(string name, Action<string>? log)
    {
        _log = log;
        _loop = new NetworkLoop(name, this, log);
    }

    public abstract string Description { get; }

    public NetworkOffloads SendOffloads => NetworkOffloads.All;

    public NetworkOffloads ReceiveOffloads => NetworkOffloads.None;

    public int QueueCount => 1;

    public int Mtu => 0;

    public abstract bool LinkUp { get; }

    public NetworkCounters Counters { get; } = new();

    private protected INetworkPeer? Peer { get; private set; }

    /// <summary>The guest has no room: nothing is read until it is kicked.</summary>
    private protected bool GuestFull { get; set; }

    public void Start(INetworkPeer peer)
    {
        Peer = peer;
        _loop.Start();
    }

    public void Kick(int queue) => _loop.Kick(queue);

    public EventFd? Bell(int queue) => _loop.Bell(queue);

    public void SetReceiveOffloads(NetworkOffloads offloads)
    {
        // The other end sends plain frames.
    }

    public bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (!LinkUp || frame.Length > LargestFrame)
        {
            Counters.Drop();
            return true;
        }
        if (!Flush())
            return false;
        if (header.Kind != VnetSegments.None)
            return SendSegments(header, frame);
        ReadOnlySpan<byte> complete = frame;
        if ((header.Flags & VnetFlags.NeedsChecksum) != 0)
        {
            Span<byte> copy = _scratch.AsSpan(0, frame.Length);
            frame.CopyTo(copy);
            if (!InternetChecksum.TryComplete(header, copy))
            {
                Counters.Refuse();
                return true;
            }
            complete = copy;
        }
        // A frame that begins to go out is this end's to finish; one that cannot begin stays with the guest.
        if (!TryWrite(complete, 0, out int written) && written == 0)
        {
            _outputWaits = true;
            return false;
        }
        Counters.Sent(frame.Length);
        if (written < Whole(complete))
        {
            _ = _output.TryAdd(complete);
            Written = written;
            _outputWaits = true;
        }
        return true;
    }

    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    protected virtual void Dispose(bool disposing) => _loop.Dispose();

    int ILoopWork.Prepare(PollSet polls, int milliseconds)
    {
        _polledOutput = -1;
        if (_outputWaits && LinkUp)
            _polledOutput = polls.Add(OutputSocket, PollEvents.Output);
        return PrepareInput(polls, milliseconds);
    }

    void ILoopWork.Process(PollSet polls, bool failed)
    {
        bool writable = _polledOutput >= 0 && polls.Returned(_polledOutput) != PollEvents.None;
        ProcessInput(polls);
        if (writable)
            Resume();
    }

    void ILoopWork.Kicked(ulong queues)
    {
        GuestFull = false;
        AfterKick();
        _known |= queues;
        if (!_outputWaits)
            Transmit(queues);
    }

    /// <summary>Bytes of the first waiting frame, with what precedes it, that have gone out.</summary>
    private protected int Written { get; set; }

    private protected abstract int OutputSocket { get; }

    private protected abstract int PrepareInput(PollSet polls, int milliseconds);

    private protected abstract void ProcessInput(PollSet polls);

    /// <summary>The guest has room again.</summary>
    private protected abstract void AfterKick();

    /// <summary>Writes a frame with what precedes it on the socket.</summary>
    /// <param name="frame">The frame.</param>
    /// <param name="from">Bytes that have gone out before.</param>
    /// <param name="written">Bytes that have gone out now, those before included. All of them where the frame cannot be sent at all.</param>
    /// <returns>False where the socket has no room for the rest.</returns>
    private protected abstract bool TryWrite(ReadOnlySpan<byte> frame, int from, out int written);

    /// <summary>Bytes of a frame on the socket.</summary>
    private protected abstract int Whole(ReadOnlySpan<byte> frame);

    private protected void Log(string text) => _log?.Invoke(text);

    private protected T Ask<T>(Func<T> action) => _loop.Ask(action);

    /// <summary>The link is gone: what waited for it is dropped.</summary>
    private protected void DropOutput()
    {
        while (!_output.IsEmpty)
        {
            _output.Remove();
            Counters.Drop();
        }
        Written = 0;
        _outputWaits = false;
    }

    /// <summary>Lets the guest go on after the link is there again or has room.</summary>
    private protected void Resume()
    {
        if (!Flush())
            return;
        _outputWaits = false;
        Transmit(_known);
    }

    private bool SendSegments(in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        Segmenter segmenter = new(header, frame);
        if (!segmenter.IsValid || header.SegmentSize < SmallestSegment)
        {
            Counters.Refuse();
            return true;
        }
        int length;
        while ((length = segmenter.Next(_scratch)) > 0)
        {
            if (_output.TryAdd(_scratch.AsSpan(0, length)))
                Counters.Sent(length);
            else
                Counters.Drop();
        }
        _outputWaits = !Flush();
        return true;
    }

    private void Transmit(ulong queues)
    {
        for (int queue = 0; queues != 0; queue++, queues >>= 1)
        {
            if ((queues & 1) != 0)
                Peer!.Transmit(queue);
        }
    }

    /// <returns>Whether nothing waits any more.</returns>
    private bool Flush()
    {
        while (!_output.IsEmpty)
        {
            ReadOnlySpan<byte> frame = _output.Peek();
            if (!TryWrite(frame, Written, out int written))
            {
                Written = written;
                _outputWaits = true;
                return false;
            }
            // The link may have broken in this write, and everything was dropped.
            if (_output.IsEmpty)
                return true;
            Written = 0;
            _output.Remove();
        }
        return true;
    }
}
