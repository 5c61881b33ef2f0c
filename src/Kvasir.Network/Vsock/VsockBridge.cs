using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Net.Sockets;
using System.Text;
using Kvasir.Linux;
using Kvasir.Network.Sockets;

namespace Kvasir.Network.Vsock;

/// <summary>
/// Carries a guest's virtio-vsock connections to Unix sockets, without privilege and without a module in the host's kernel. A program of the host's connects to PATH, says
/// <c>CONNECT port</c> and a line feed, and reads <c>OK port</c>; a guest's connection to the host's port N goes to PATH_N, where a program listens. Sockets whose messages
/// stay whole (SOCK_SEQPACKET) are such sockets on both sides: at PATH.seqpacket, where the greeting and its answer are messages, and at PATH_N.
/// </summary>
/// <remarks>All connections live on one thread. Every buffer is bounded, whatever the guest sends: what it may not do resets the connection.</remarks>
public sealed class VsockBridge : IDisposable, ILoopWork
{
    private const int MaximumConnections = 512;

    /// <summary>Resets owed to packets that belong to no connection; while there are as many, no more packets are taken.</summary>
    private const int MaximumResets = 256;

    private const int LargestPayload = 64 * 1024;
    private const int LongestGreeting = 32;
    private const uint FirstHostPort = 1u << 30;

    // Configuration
    private readonly string _path;

    // Wiring
    private readonly Socket _listener;
    private readonly Socket _messageListener;
    private readonly NetworkLoop _loop;
    private IVsockGuest? _guest;

    // State, of the loop's thread
    private readonly Dictionary<ulong, VsockConnection> _open = [];
    private readonly List<VsockConnection> _connections = [];
    private readonly Queue<VsockPacket> _resets = new();
    private readonly byte[] _payload = new byte[LargestPayload];
    private uint _nextPort = FirstHostPort;
    private int _generation;
    private int _polledListener = -1;
    private int _polledMessageListener = -1;
    private bool _guestStands = true;
    private bool _guestFull;

    /// <param name="path">Of the socket that programs of the host's connect to.</param>
    /// <exception cref="NetworkException">It cannot be listened on.</exception>
    public VsockBridge(string path, Action<string>? log = null)
    {
        _path = path;
        _listener = Listen(path, SocketType.Stream);
        try
        {
            _messageListener = Listen(MessagePath, SocketType.Seqpacket);
        }
        catch
        {
            _listener.Dispose();
            File.Delete(path);
            throw;
        }
        _loop = new NetworkLoop("vsock", this, log);
    }

    private string MessagePath => $"{_path}.seqpacket";

    /// <summary>Begins, once, for a device.</summary>
    public void Start(IVsockGuest guest)
    {
        _guest = guest;
        _loop.Start();
    }

    /// <summary>The guest has sent packets or given buffers. Any thread.</summary>
    public void Kick() => _loop.Kick(0);

    /// <summary>A descriptor whose signals are such kicks. Any thread.</summary>
    public EventFd Bell() => _loop.Bell(0);

    public void Dispose()
    {
        _loop.Dispose();
        foreach (VsockConnection connection in _connections)
            connection.Dispose();
        _connections.Clear();
        _listener.Dispose();
        _messageListener.Dispose();
        File.Delete(_path);
        File.Delete(MessagePath);
    }

    int ILoopWork.Prepare(PollSet polls, int milliseconds)
    {
        _polledListener = -1;
        _polledMessageListener = -1;
        // While no driver runs, or the VM is paused, all wait: programs of the host's in the listener's queue.
        if (_guestStands)
            return milliseconds;
        if (_connections.Count < MaximumConnections)
        {
            _polledListener = polls.Add((int)_listener.Handle, PollEvents.Input);
            _polledMessageListener = polls.Add((int)_messageListener.Handle, PollEvents.Input);
        }
        foreach (VsockConnection connection in _connections)
        {
            PollEvents wanted = PollEvents.None;
            if (connection.Phase == VsockPhase.Greeting || (!_guestFull && connection.TakesInput))
                wanted |= PollEvents.Input;
            if (connection.HasOutput)
                wanted |= PollEvents.Output;
            // Hang-up is reported without being asked for: who waits for nothing is not listed.
            connection.Polled = wanted == PollEvents.None ? -1 : polls.Add((int)connection.Socket.Handle, wanted);
        }
        return milliseconds;
    }

    void ILoopWork.Process(PollSet polls, bool failed)
    {
        if (failed || _guestStands || !TryEnter())
            return;
        if (_polledListener >= 0 && polls.Returned(_polledListener) != PollEvents.None)
            Accept(_listener, VsockPacket.Stream);
        if (_polledMessageListener >= 0 && polls.Returned(_polledMessageListener) != PollEvents.None)
            Accept(_messageListener, VsockPacket.SequencedPackets);
        for (int index = _connections.Count - 1; index >= 0; index--)
        {
            VsockConnection connection = _connections[index];
            PollEvents found = connection.Polled >= 0 ? polls.Returned(connection.Polled) : PollEvents.None;
            connection.Polled = -1;
            if (found == PollEvents.None)
                continue;
            if (connection.Phase == VsockPhase.Greeting)
                ReadGreeting(connection);
            if (connection.HasOutput && !connection.TryWrite(_payload))
                End(connection);
            if ((found & (PollEvents.Input | PollEvents.HangUp | PollEvents.Error)) != 0 && connection.TakesInput)
                ReadHost(connection, (found & PollEvents.HangUp) != 0);
        }
        Settle();
        _guest!.Leave();
    }

    void ILoopWork.Kicked(ulong queues)
    {
        if (!TryEnter())
            return;
        _guestFull = false;
        // Resets that are owed go first, so that there is room for new ones.
        Settle();
        while (_resets.Count < MaximumResets && _guest!.TryTake(out VsockPacket packet, _payload))
            Handle(packet, _payload.AsSpan(0, (int)Math.Min(packet.Length, LargestPayload)));
        Settle();
        _guest!.Leave();
    }

    /// <exception cref="NetworkException">It cannot be listened on.</exception>
    private static Socket Listen(string path, SocketType type)
    {
        Socket listener = new(AddressFamily.Unix, type, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            UnixSockets.RemoveStale(path, type);
            listener.Bind(new UnixDomainSocketEndPoint(path));
            listener.Listen(64);
            return listener;
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException or NetworkException)
        {
            listener.Dispose();
            throw new NetworkException($"cannot listen on {path}: {e.Message}", e);
        }
    }

    private static ulong Key(uint hostPort, uint guestPort) => (ulong)hostPort << 32 | guestPort;

    private bool TryEnter()
    {
        _guestStands = !_guest!.TryEnter();
        if (_generation != _guest.Generation)
            ForgetAll();
        return !_guestStands;
    }

    /// <summary>The driver was reset, and knows of no connection any more.</summary>
    private void ForgetAll()
    {
        _generation = _guest!.Generation;
        _resets.Clear();
        _open.Clear();
        foreach (VsockConnection connection in _connections)
            connection.Dispose();
        _connections.Clear();
    }

    private static Socket? TryAccept(Socket listener)
    {
        try
        {
            return listener.Accept();
        }
        catch (SocketException)
        {
            // Nobody is there any more, or the host has no descriptor left: the next one is tried when poll says so.
            return null;
        }
    }

    private void Accept(Socket listener, ushort type)
    {
        while (_connections.Count < MaximumConnections && TryAccept(listener) is { } client)
        {
            if (type == VsockPacket.SequencedPackets && !_guest!.TakesMessages)
            {
                client.Dispose();
                continue;
            }
            client.Blocking = false;
            _connections.Add(new VsockConnection(client, type) { Phase = VsockPhase.Greeting });
        }
    }

    /// <summary>Reads <c>CONNECT port</c>, and nothing of what comes after the line.</summary>
    private void ReadGreeting(VsockConnection connection)
    {
        // A message is taken whole; of a row of bytes, one at a time.
        Span<byte> bytes = stackalloc byte[connection.KeepsMessages ? LongestGreeting : 1];
        while (true)
        {
            int length = connection.Socket.Receive(bytes, SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
                return;
            if (error != SocketError.Success || length == 0 || connection.Greeting.Length == LongestGreeting)
            {
                Drop(connection);
                return;
            }
            if (connection.KeepsMessages)
            {
                connection.Greeting = Encoding.Latin1.GetString(bytes[..length]).TrimEnd('\n');
                break;
            }
            if (bytes[0] == (byte)'\n')
                break;
            connection.Greeting += (char)bytes[0];
        }
        string text = connection.Greeting.TrimEnd('\r');
        if (!text.StartsWith("CONNECT ", StringComparison.Ordinal) || !uint.TryParse(text.AsSpan(8), NumberStyles.None, CultureInfo.InvariantCulture, out uint port))
        {
            Drop(connection);
            return;
        }
        connection.GuestPort = port;
        do
        {
            connection.HostPort = _nextPort++;
            if (_nextPort == uint.MaxValue)
                _nextPort = FirstHostPort;
        }
        while (!_open.TryAdd(Key(connection.HostPort, port), connection));
        connection.Phase = VsockPhase.Requested;
        connection.OwesRequest = true;
    }

    private void ReadHost(VsockConnection connection, bool hungUp)
    {
        if (connection.KeepsMessages)
        {
            ReadMessages(connection, hungUp);
            return;
        }
        while (connection.TakesInput)
        {
            int room = Room();
            if (room <= VsockPacket.HeaderSize)
                return;
            int most = (int)Math.Min(Math.Min((uint)(room - VsockPacket.HeaderSize), connection.Credit), LargestPayload);
            int length = connection.Socket.Receive(_payload.AsSpan(0, most), SocketFlags.None, out SocketError error);
            if (error == SocketError.WouldBlock)
                return;
            if (error != SocketError.Success)
            {
                End(connection);
                return;
            }
            if (length == 0)
            {
                // Who has closed its end, and not only one direction, reads no more either.
                connection.Host |= hungUp ? VsockShutdown.Both : VsockShutdown.Send;
                return;
            }
            connection.Sent += (uint)length;
            Give(connection, VsockOperation.Data, 0, _payload.AsSpan(0, length));
        }
    }

    private void ReadMessages(VsockConnection connection, bool hungUp)
    {
        while (connection.TakesInput && Room() > VsockPacket.HeaderSize)
        {
            int length = connection.ReadMessage();
            if (length == -1)
                return;
            if (length < 0)
            {
                End(connection);
                return;
            }
            if (length == 0)
            {
                connection.Host |= hungUp ? VsockShutdown.Both : VsockShutdown.Send;
                return;
            }
            PassMessageOn(connection);
        }
    }

    /// <summary>Gives the guest what is left of a message, as far as it has room.</summary>
    private void PassMessageOn(VsockConnection connection)
    {
        while (!connection.Message.IsEmpty && connection.Credit > 0)
        {
            int room = Room();
            if (room <= VsockPacket.HeaderSize)
                return;
            ReadOnlySpan<byte> rest = connection.Message;
            int length = (int)Math.Min(Math.Min((uint)(room - VsockPacket.HeaderSize), connection.Credit), (uint)rest.Length);
            connection.Sent += (uint)length;
            Give(connection, VsockOperation.Data, length == rest.Length ? VsockPacket.EndOfMessage : 0, rest[..length]);
            connection.Advance(length);
        }
    }

    private void Handle(in VsockPacket packet, ReadOnlySpan<byte> payload)
    {
        VsockConnection? connection = null;
        bool known = packet.Type == VsockPacket.Stream || (packet.Type == VsockPacket.SequencedPackets && _guest!.TakesMessages);
        bool sound = known && packet.DestinationCid == VsockPacket.HostCid && packet.SourceCid == _guest!.Cid;
        if (sound && _open.TryGetValue(Key(packet.DestinationPort, packet.SourcePort), out connection))
        {
            if (connection.Type != packet.Type)
            {
                // Of another kind than the connection: it is refused, and the connection stays.
                if (packet.Operation != VsockOperation.Reset)
                    _resets.Enqueue(packet);
                return;
            }
            connection.PeerSize = packet.BufferSize;
            connection.PeerForwarded = packet.Forwarded;
        }
        switch (packet.Operation)
        {
            case VsockOperation.Reset:
                if (connection is not null)
                    Drop(connection);
                break;
            case VsockOperation.Request when sound && connection is null:
                Connect(packet);
                break;
            case VsockOperation.Response when connection is { Phase: VsockPhase.Requested, OwesRequest: false }:
                connection.Phase = VsockPhase.Open;
                Greet(connection);
                break;
            case VsockOperation.Shutdown when connection is { Phase: VsockPhase.Open }:
                connection.Guest |= packet.Shutdown;
                break;
            case VsockOperation.Data when connection is { Phase: VsockPhase.Open } && (connection.Guest & VsockShutdown.Send) == 0:
                if (!connection.TryKeep(payload, (packet.Flags & VsockPacket.EndOfMessage) != 0) || !connection.TryWrite(_payload))
                    End(connection);
                break;
            case VsockOperation.CreditUpdate when connection is not null:
                break;
            case VsockOperation.CreditRequest when connection is { Phase: VsockPhase.Open }:
                connection.OwesCredit = true;
                break;
            default:
                if (connection is not null)
                    End(connection);
                else
                    _resets.Enqueue(packet);
                break;
        }
    }

    /// <summary>The guest connects to a program of the host's.</summary>
    private void Connect(in VsockPacket packet)
    {
        if (_connections.Count >= MaximumConnections)
        {
            _resets.Enqueue(packet);
            return;
        }
        SocketType type = packet.Type == VsockPacket.Stream ? SocketType.Stream : SocketType.Seqpacket;
        Socket socket = new(AddressFamily.Unix, type, ProtocolType.Unspecified) { Blocking = false };
        try
        {
            // A program that lets its queue of connections fill up refuses: nobody waits here.
            socket.Connect(new UnixDomainSocketEndPoint(string.Create(CultureInfo.InvariantCulture, $"{_path}_{packet.DestinationPort}")));
        }
        catch (Exception e) when (e is SocketException or ArgumentException)
        {
            socket.Dispose();
            _resets.Enqueue(packet);
            return;
        }
        VsockConnection connection = new(socket, packet.Type)
        {
            Phase = VsockPhase.Open,
            HostPort = packet.DestinationPort,
            GuestPort = packet.SourcePort,
            PeerSize = packet.BufferSize,
            PeerForwarded = packet.Forwarded,
            OwesResponse = true,
        };
        _connections.Add(connection);
        _open.Add(Key(connection.HostPort, connection.GuestPort), connection);
    }

    /// <summary>Tells a client that the guest has taken its connection.</summary>
    private void Greet(VsockConnection connection)
    {
        byte[] line = Encoding.ASCII.GetBytes(string.Create(CultureInfo.InvariantCulture, $"OK {connection.HostPort}\n"));
        // The socket is new and empty: it takes a line whole, or it is gone.
        if (connection.Socket.Send(line, SocketFlags.None, out _) != line.Length)
            End(connection);
    }

    /// <summary>Gives the guest what it is owed, as far as it has buffers, and ends what has come to its end.</summary>
    private void Settle()
    {
        while (_resets.Count > 0 && Room() > 0)
        {
            VsockPacket asked = _resets.Dequeue();
            _guest!.Give(
                new VsockPacket
                {
                    SourceCid = asked.DestinationCid,
                    DestinationCid = asked.SourceCid,
                    SourcePort = asked.DestinationPort,
                    DestinationPort = asked.SourcePort,
                    Type = asked.Type,
                    Operation = VsockOperation.Reset,
                },
                []);
        }
        for (int index = _connections.Count - 1; index >= 0; index--)
            Settle(_connections[index]);
        _guest!.Notify();
    }

    private void Settle(VsockConnection connection)
    {
        if (connection.Phase == VsockPhase.Open)
        {
            PassMessageOn(connection);
            PassShutdownOn(connection);
        }
        if (connection.OwesRequest && Room() > 0)
        {
            connection.OwesRequest = false;
            Give(connection, VsockOperation.Request, 0, []);
        }
        if (connection.OwesResponse && Room() > 0)
        {
            connection.OwesResponse = false;
            Give(connection, VsockOperation.Response, 0, []);
        }
        if (connection.Phase == VsockPhase.Open && connection.Host != connection.HostTold && Room() > 0)
        {
            connection.HostTold = connection.Host;
            Give(connection, VsockOperation.Shutdown, (uint)connection.Host, []);
        }
        if (connection is { Phase: VsockPhase.Open, OwesCredit: true } && Room() > 0)
            Give(connection, VsockOperation.CreditUpdate, 0, []);
        if (connection.Phase == VsockPhase.Ended && Room() > 0)
        {
            Give(connection, VsockOperation.Reset, 0, []);
            Drop(connection);
        }
    }

    /// <summary>What the guest does no more the host does not wait for, after all that came before.</summary>
    private static void PassShutdownOn(VsockConnection connection)
    {
        if (connection.HasOutput)
            return;
        VsockShutdown news = connection.Guest & ~connection.GuestPassedOn;
        if (news != VsockShutdown.None)
        {
            connection.GuestPassedOn |= news;
            try
            {
                if ((news & VsockShutdown.Send) != 0)
                    connection.Socket.Shutdown(SocketShutdown.Send);
            }
            catch (SocketException)
            {
                // The host's side has gone.
                connection.Guest |= VsockShutdown.Both;
            }
        }
        bool nothingToGuest = (connection.Guest & VsockShutdown.Receive) != 0 || (connection.Host & VsockShutdown.Send) != 0;
        if ((connection.Guest & VsockShutdown.Send) != 0 && nothingToGuest)
            connection.Phase = VsockPhase.Ended;
    }

    private int Room()
    {
        int room = _guest!.Room;
        _guestFull = room < VsockPacket.HeaderSize;
        return _guestFull ? 0 : room;
    }

    private void Give(VsockConnection connection, VsockOperation operation, uint flags, ReadOnlySpan<byte> payload)
    {
        connection.Announce();
        VsockPacket packet = new()
        {
            SourceCid = VsockPacket.HostCid,
            DestinationCid = _guest!.Cid,
            SourcePort = connection.HostPort,
            DestinationPort = connection.GuestPort,
            Length = (uint)payload.Length,
            Type = connection.Type,
            Operation = operation,
            Flags = flags,
            BufferSize = VsockConnection.BufferSize,
            Forwarded = connection.Forwarded,
        };
        _guest.Give(packet, payload);
    }

    /// <summary>Something is wrong with a connection: the guest is told, and then it is gone.</summary>
    private static void End(VsockConnection connection)
    {
        connection.Phase = VsockPhase.Ended;
        connection.OwesRequest = connection.OwesResponse = connection.OwesCredit = false;
    }

    private void Drop(VsockConnection connection)
    {
        _connections.Remove(connection);
        if (connection.Phase != VsockPhase.Greeting)
            _open.Remove(Key(connection.HostPort, connection.GuestPort));
        connection.Dispose();
    }
}
