using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Linux;
using Kvasir.Network.Frames;

namespace Kvasir.Network.Tap;

/// <summary>
/// A tap device. One that is missing is made, where this process may, and goes away with it; a persistent one of the user's is opened. Work on frames that
/// guest or host kernel leave undone goes through as it is.
/// </summary>
public sealed class TapNetwork : INetworkBackend
{
    // Configuration
    private readonly TapSettings _settings;

    // Wiring
    private readonly Queue[] _queues;

    /// <exception cref="NetworkException">The device cannot be opened or made.</exception>
    public TapNetwork(TapSettings settings, Action<string>? log = null)
    {
        ArgumentNullException.ThrowIfNull(settings);
        _settings = settings;
        List<TapDevice> devices = [];
        try
        {
            string name = settings.InterfaceName;
            for (int index = 0; index < settings.Queues; index++)
            {
                devices.Add(TapDevice.Open(name, multiQueue: settings.Queues > 1));
                name = devices[0].Name;
            }
            Configure(devices[0]);
        }
        catch (LinuxException e)
        {
            foreach (TapDevice device in devices)
                device.Dispose();
            throw new NetworkException($"{e.Message}{Advice(e.Errno)}", e);
        }
        InterfaceName = devices[0].Name;
        _queues = [.. devices.Select((device, index) => new Queue(this, device, index, log))];
        ReceiveOffloads = devices[0].TrySetOffloads(TapOffloads.Checksum | TapOffloads.Tso4 | TapOffloads.Tso6 | TapOffloads.TsoEcn)
            ? NetworkOffloads.All
            : NetworkOffloads.None;
        _ = devices[0].TrySetOffloads(TapOffloads.None);
    }

    /// <summary>The interface's name as the kernel gave it.</summary>
    public string InterfaceName { get; }

    public string Description => $"tap {InterfaceName}";

    public NetworkOffloads SendOffloads => NetworkOffloads.All;

    public NetworkOffloads ReceiveOffloads { get; }

    public int QueueCount => _queues.Length;

    public int Mtu => _settings.Mtu;

    public bool LinkUp => true;

    public NetworkCounters Counters { get; } = new();

    public void Start(INetworkPeer peer)
    {
        foreach (Queue queue in _queues)
            queue.Start(peer);
    }

    public void Kick(int queue) => _queues[queue % _queues.Length].Kick(queue);

    public EventFd? Bell(int queue) => _queues[queue % _queues.Length].Bell(queue);

    public bool Send(int queue, in VnetHeader header, ReadOnlySpan<byte> frame) => _queues[queue % _queues.Length].Send(header, frame);

    public void SetReceiveOffloads(NetworkOffloads offloads)
    {
        TapOffloads chosen = TapOffloads.None;
        if (offloads.HasFlag(NetworkOffloads.Checksum))
            chosen |= TapOffloads.Checksum;
        if (offloads.HasFlag(NetworkOffloads.Tso4))
            chosen |= TapOffloads.Tso4;
        if (offloads.HasFlag(NetworkOffloads.Tso6))
            chosen |= TapOffloads.Tso6;
        if (offloads.HasFlag(NetworkOffloads.TsoEcn) && chosen > TapOffloads.Checksum)
            chosen |= TapOffloads.TsoEcn;
        foreach (Queue queue in _queues)
            queue.SetOffloads(chosen);
    }

    public void Dispose()
    {
        foreach (Queue queue in _queues)
            queue.Dispose();
    }

    private static string Advice(int errno) => errno switch
    {
        NativeFile.ErrorPerm or NativeFile.ErrorAccess =>
            ": making a tap needs root; have it made once with 'ip tuntap add dev NAME mode tap user USER', or use --net user, which needs no privilege",
        NativeFile.ErrorNoEntry or NativeFile.ErrorNoDevice => ": load the module with 'modprobe tun', or use --net user",
        NativeFile.ErrorBusy => ": another process has the device",
        19 => ": there is no such interface",
        _ => "",
    };

    private void Configure(TapDevice device)
    {
        if (_settings.Mtu != 0)
            device.SetMtu(_settings.Mtu);
        if (_settings.Bridge is { } bridge)
            device.JoinBridge(bridge);
        if (_settings.HostAddress is { } address)
            device.SetHostAddress(address.GetAddressBytes(), _settings.PrefixLength);
        if (!device.IsUp())
            device.BringUp();
    }

    /// <summary>One queue and its thread.</summary>
    private sealed class Queue : ILoopWork, IDisposable
    {
        /// <summary>Frames read in one turn, so that what the guest sends gets its turn too.</summary>
        private const int Batch = 64;

        private const int LargestFrame = 65535 + FrameNumbers.EthernetHeader + FrameNumbers.VlanTag;

        private readonly TapNetwork _owner;
        private readonly TapDevice _device;
        private readonly NetworkLoop _loop;
        private readonly int _index;
        private readonly byte[] _frame = new byte[LargestFrame];
        private INetworkPeer? _peer;
        private ulong _known;
        private bool _outputWaits;
        private bool _guestFull;
        private int _polled;

        public Queue(TapNetwork owner, TapDevice device, int index, Action<string>? log)
        {
            _owner = owner;
            _device = device;
            _index = index;
            _loop = new NetworkLoop($"net-tap{index}", this, log);
        }

        public void Start(INetworkPeer peer)
        {
            _peer = peer;
            _loop.Start();
        }

        public void Kick(int queue) => _loop.Kick(queue);

        public EventFd Bell(int queue) => _loop.Bell(queue);

        public void SetOffloads(TapOffloads offloads) => _ = _device.TrySetOffloads(offloads);

        public bool Send(in VnetHeader header, ReadOnlySpan<byte> frame)
        {
            int result = FrameIo.Write(_device.Fd, header.AsBytes(), frame);
            if (result == -FrameIo.TryAgain)
            {
                _outputWaits = true;
                return false;
            }
            if (result < 0)
                _owner.Counters.Refuse();
            else
                _owner.Counters.Sent(frame.Length);
            return true;
        }

        int ILoopWork.Prepare(PollSet polls, int milliseconds)
        {
            PollEvents events = (_guestFull ? PollEvents.None : PollEvents.Input) | (_outputWaits ? PollEvents.Output : PollEvents.None);
            _polled = events == PollEvents.None ? -1 : polls.Add(_device.Fd, events);
            return milliseconds;
        }

        void ILoopWork.Process(PollSet polls, bool failed)
        {
            PollEvents found = _polled < 0 ? PollEvents.None : polls.Returned(_polled);
            if (found.HasFlag(PollEvents.Input))
                ReceiveFrames();
            if (found.HasFlag(PollEvents.Output) && _outputWaits)
            {
                _outputWaits = false;
                Transmit(_known);
            }
        }

        void ILoopWork.Kicked(ulong queues)
        {
            _guestFull = false;
            _known |= queues;
            if (!_outputWaits)
                Transmit(queues);
        }

        public void Dispose()
        {
            _loop.Dispose();
            _device.Dispose();
        }

        private void Transmit(ulong queues)
        {
            for (int queue = 0; queues != 0; queue++, queues >>= 1)
            {
                if ((queues & 1) != 0)
                    _peer!.Transmit(queue);
            }
        }

        private void ReceiveFrames()
        {
            for (int count = 0; count < Batch; count++)
            {
                if (!_peer!.CanReceive(_index))
                {
                    _guestFull = true;
                    return;
                }
                VnetHeader header = default;
                int length = FrameIo.Read(_device.Fd, header.AsWritableBytes(), _frame) - VnetHeader.Size;
                if (length <= 0)
                    return;
                if (_peer.Receive(_index, header, _frame.AsSpan(0, length)))
                    _owner.Counters.Received(length);
                else
                    _owner.Counters.Drop();
            }
        }
    }
}
