using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Text;
using Kvasir.Linux;
using Kvasir.Network.Frames;
using Kvasir.Network.Interop;

namespace Kvasir.Network.User;

/// <summary>
/// User-mode NAT: the guest's connections become sockets of this process, through libslirp. Needs no privilege. The stack and all frames live on one thread.
/// </summary>
public sealed class UserNetwork : INetworkBackend, ILoopWork, ISlirpOwner
{
    /// <summary>Bytes of frames for a guest that has no room; while any wait, no socket is read.</summary>
    private const int PendingCapacity = 1 << 20;

    private const int LargestFrame = 65535 + FrameNumbers.EthernetHeader + FrameNumbers.VlanTag;

    // Configuration
    private readonly UserNetworkSettings _settings;
    private readonly Action<string>? _log;

    // Wiring
    private readonly SlirpStack _stack;
    private readonly NetworkLoop _loop;
    private readonly GuestFilter _filter;
    private INetworkPeer? _peer;

    // State, of the loop's thread
    private readonly List<PortForward> _forwards = [];
    private readonly FrameQueue _pending = new(PendingCapacity);
    private readonly byte[] _frame = new byte[LargestFrame];
    private bool _filled;
    private long _guestErrors;

    /// <exception cref="NetworkException">libslirp is missing, or a forward's port cannot be had.</exception>
    public UserNetwork(UserNetworkSettings settings, Action<string>? log = null)
    {
        ArgumentNullException.ThrowIfNull(settings);
        _settings = settings;
        _log = log;
        _filter = new GuestFilter(settings);
        _stack = new SlirpStack(settings, this);
        _loop = new NetworkLoop("net-user", this, log);
        try
        {
            foreach (PortForward forward in settings.Forwards)
                Open(forward);
        }
        catch (NetworkException)
        {
            Dispose();
            throw;
        }
    }

    /// <summary>The version of libslirp on this host; null where there is none.</summary>
    public static string? LibraryVersion => LibSlirp.FindVersion();

    public string Description => "user";

    /// <summary>The stack takes segments of any size up to IP's limit, and checksums are completed here.</summary>
    public NetworkOffloads SendOffloads => NetworkOffloads.All;

    public NetworkOffloads ReceiveOffloads => NetworkOffloads.Checksum;

    public int QueueCount => 1;

    public int Mtu => _settings.Mtu;

    public bool LinkUp => true;

    public NetworkCounters Counters { get; } = new();

    public void Start(INetworkPeer peer)
    {
        _peer = peer;
        _loop.Start();
    }

    public void Kick(int queue) => _loop.Kick(queue);

    public EventFd? Bell(int queue) => _loop.Bell(queue);

    public void SetReceiveOffloads(NetworkOffloads offloads)
    {
        // Frames from the stack are complete; whether they are marked so changes nothing for a guest that does not look.
    }

    public bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame)
    {
        if (frame.Length > LargestFrame || !_filter.IsAllowed(frame))
        {
            Counters.Refuse();
            return true;
        }
        Counters.Sent(frame.Length);
        if ((header.Flags & VnetFlags.NeedsChecksum) == 0)
        {
            _stack.Input(frame);
            return true;
        }
        Span<byte> copy = _frame.AsSpan(0, frame.Length);
        frame.CopyTo(copy);
        if (InternetChecksum.TryComplete(header, copy))
            _stack.Input(copy);
        else
            Counters.Refuse();
        return true;
    }

    /// <summary>Opens a port of the host. Any thread.</summary>
    /// <exception cref="NetworkException">It cannot be had, or is open already.</exception>
    public void AddForward(PortForward forward)
    {
        ArgumentNullException.ThrowIfNull(forward);
        _loop.Ask(() =>
        {
            Open(forward);
            return true;
        });
    }

    /// <summary>Closes a port of the host; connections that came through it stay. Any thread.</summary>
    /// <returns>False where none such is open.</returns>
    public bool RemoveForward(PortForward forward)
    {
        ArgumentNullException.ThrowIfNull(forward);
        return _loop.Ask(() =>
        {
            int index = _forwards.FindIndex(forward.HasSameHostSide);
            if (index < 0)
                return false;
            _forwards.RemoveAt(index);
            return _stack.RemoveForward(forward);
        });
    }

    /// <summary>The open ports. Any thread.</summary>
    public IReadOnlyList<PortForward> Forwards => _loop.Ask(() => _forwards.ToArray());

    /// <summary>Connections and forwards as a table for a person. Any thread.</summary>
    public string DescribeConnections() => _loop.Ask(_stack.ConnectionInfo);

    public void Dispose()
    {
        _loop.Dispose();
        _stack.Dispose();
    }

    int ILoopWork.Prepare(PollSet polls, int milliseconds)
    {
        _filled = _pending.IsEmpty;
        return _filled ? _stack.FillPolls(polls, milliseconds) : _stack.UntilTimer(milliseconds);
    }

    void ILoopWork.Process(PollSet polls, bool failed)
    {
        if (_filled)
            _stack.ProcessPolls(polls, failed);
        _stack.RunTimers();
    }

    void ILoopWork.Kicked(ulong queues)
    {
        DeliverPending();
        for (int queue = 0; queues != 0; queue++, queues >>= 1)
        {
            if ((queues & 1) != 0)
                _peer!.Transmit(queue);
        }
    }

    void ISlirpOwner.FrameForGuest(ReadOnlySpan<byte> frame)
    {
        _filter.Note(frame);
        if (_pending.IsEmpty && Deliver(frame))
            return;
        if (!_pending.TryAdd(frame))
            Counters.Drop();
    }

    void ISlirpOwner.GuestError(string message)
    {
        // The guest decides how often: the first few tell all there is to tell.
        if (_guestErrors++ < 16)
            _log?.Invoke($"user network: {message.TrimEnd()}");
    }

    private bool Deliver(ReadOnlySpan<byte> frame)
    {
        VnetHeader header = new() { Flags = VnetFlags.DataValid };
        // Before the start there is nobody to take it.
        if (_peer is null || !_peer.Receive(0, header, frame))
            return false;
        Counters.Received(frame.Length);
        return true;
    }

    private void DeliverPending()
    {
        while (!_pending.IsEmpty && Deliver(_pending.Peek()))
            _pending.Remove();
    }

    private void Open(PortForward forward)
    {
        if (_forwards.Any(forward.HasSameHostSide))
            throw new NetworkException($"the forward {forward} is open already");
        int errno = _stack.AddForward(forward);
        if (errno != 0)
            throw new NetworkException($"cannot open the forward {forward}: {Marshal.GetPInvokeErrorMessage(errno)}");
        _forwards.Add(forward);
    }
}
