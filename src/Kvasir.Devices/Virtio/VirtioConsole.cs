using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Serial;

namespace Kvasir.Devices.Virtio;

/// <summary>One port of a console device.</summary>
/// <param name="Backend">The host side.</param>
/// <param name="Name">Under /dev/virtio-ports in a Linux guest; empty for a console.</param>
public sealed record ConsolePort(ICharacterBackend Backend, string Name = "")
{
    /// <summary>It is a terminal (hvc0), not a plain channel.</summary>
    public bool IsConsole => Name.Length == 0;
}

/// <summary>Virtio console with several ports (virtio 1.2, 5.3).</summary>
public sealed partial class VirtioConsole : VirtioDevice
{
    public const int MaximumPorts = 16;

    private const ushort QueueSize = 64;
    private const int ConfigBytes = 12;
    private const int ControlReceive = 2;
    private const int ControlSend = 3;

    /// <summary>Control messages that are kept: a driver that reads none of them does not make the device keep them all.</summary>
    private const int MostMessages = 256;

    /// <summary>Bytes of input that wait for the guest, for each port.</summary>
    private const int InputCapacity = 1 << 16;

    [Flags]
    private enum Feature : ulong
    {
        Size = 1 << 0,
        MultiPort = 1 << 1,
        EmergencyWrite = 1 << 2,
    }

    private enum Config
    {
        Columns = 0,
        Rows = 2,
        MaximumPorts = 4,
        EmergencyWrite = 8,
    }

    private enum ControlEvent : ushort
    {
        DeviceReady = 0,
        PortAdd = 1,
        PortRemove = 2,
        PortReady = 3,
        ConsolePort = 4,
        Resize = 5,
        PortOpen = 6,
        PortName = 7,
    }

    // Wiring
    private readonly Port[] _ports;

    // State
    private readonly Lock _lock = new();
    private readonly Queue<byte[]> _control = new();
    private (ushort Columns, ushort Rows) _size = (80, 25);

    public VirtioConsole(string name, GuestMemory memory, IReadOnlyList<ConsolePort> ports)
        : base(VirtioType.Console, name, memory, Sizes(ports.Count), ConfigBytes)
    {
        if (ports.Count is 0 or > MaximumPorts)
            throw new ArgumentException($"a console has 1 to {MaximumPorts} ports", nameof(ports));
        Span<byte> config = stackalloc byte[ConfigBytes];
        config.Clear();
        BinaryPrimitives.WriteUInt16LittleEndian(config, _size.Columns);
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.Rows..], _size.Rows);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.MaximumPorts..], ports.Count);
        SetConfig(0, config);
        _ports = new Port[ports.Count];
        for (int i = 0; i < _ports.Length; i++)
        {
            _ports[i] = new Port(this, i, ports[i]);
            ports[i].Backend.Attach(_ports[i]);
        }
    }

    protected override ulong DeviceFeatures => (ulong)(Feature.Size | Feature.MultiPort | Feature.EmergencyWrite);

    private bool MultiPort => Has((ulong)Feature.MultiPort);

    /// <summary>The terminal has a new size.</summary>
    public void Resize(ushort columns, ushort rows)
    {
        lock (_lock)
            _size = (columns, rows);
        Span<byte> size = stackalloc byte[4];
        BinaryPrimitives.WriteUInt16LittleEndian(size, columns);
        BinaryPrimitives.WriteUInt16LittleEndian(size[2..], rows);
        SetConfig((int)Config.Columns, size);
        if (!MultiPort)
        {
            ConfigChanged();
            return;
        }
        for (int i = 0; i < _ports.Length; i++)
        {
            if (_ports[i].Settings.IsConsole)
                SendResize(i);
        }
        WakeWorker();
    }

    protected override bool WritingConfig(int offset, ReadOnlySpan<byte> bytes)
    {
        // What a dying kernel says goes out at once, and is no state.
        if (offset == (int)Config.EmergencyWrite)
            _ports[0].Settings.Backend.Write(bytes[..1]);
        return false;
    }

    protected override void Process(Virtqueue queue)
    {
        switch (queue.Index)
        {
            case ControlReceive:
                SendControl();
                break;
            case ControlSend:
                while (queue.Pop() is { } element)
                {
                    Control(element);
                    queue.Push(element, 0);
                }
                queue.Notify();
                SendControl();
                break;
            default:
                Port? port = PortOf(queue.Index, out bool transmit);
                if (port is not null && transmit)
                    port.Transmit(queue);
                else
                    port?.Deliver(queue);
                break;
        }
    }

    protected override bool ProcessesAgain(Virtqueue queue) => queue.Index == ControlSend;

    protected override void ProcessWake()
    {
        SendControl();
        foreach (Port port in _ports)
        {
            port.Transmit(Queues[TransmitQueue(port.Index)]);
            port.Deliver(Queues[TransmitQueue(port.Index) - 1]);
        }
    }

    private protected override void CollectHeld(List<VirtqueueElement> held)
    {
        foreach (Port port in _ports)
        {
            if (port.Sending is { } sending)
                held.Add(sending);
        }
    }

    protected override void Stopped()
    {
        lock (_lock)
            _control.Clear();
        foreach (Port port in _ports)
            port.Stopped();
    }

    private static ushort[] Sizes(int ports)
    {
        // Receive and transmit of port 0, two control queues, then the other ports'.
        ushort[] sizes = new ushort[2 + 2 * Math.Max(1, ports)];
        Array.Fill(sizes, QueueSize);
        return sizes;
    }

    private static int TransmitQueue(int port) => port == 0 ? 1 : 3 + 2 * port;

    private Port? PortOf(int queue, out bool transmit)
    {
        transmit = (queue & 1) != 0;
        int port = queue < 2 ? 0 : queue / 2 - 1;
        return port < _ports.Length && (port == 0 || MultiPort) ? _ports[port] : null;
    }

    /// <summary>A control message of the driver's (5.3.6.2).</summary>
    private void Control(VirtqueueElement element)
    {
        Span<byte> message = stackalloc byte[8];
        if (element.Read(0, message) < 8)
            return;
        uint id = BinaryPrimitives.ReadUInt32LittleEndian(message);
        ControlEvent kind = (ControlEvent)BinaryPrimitives.ReadUInt16LittleEndian(message[4..]);
        ushort value = BinaryPrimitives.ReadUInt16LittleEndian(message[6..]);
        if (kind == ControlEvent.DeviceReady)
        {
            for (int i = 0; value == 1 && i < _ports.Length; i++)
                Queue(i, ControlEvent.PortAdd, 1);
            return;
        }
        if (id >= (uint)_ports.Length)
            return;
        Port port = _ports[id];
        switch (kind)
        {
            case ControlEvent.PortReady when value == 1:
                if (port.Settings.IsConsole)
                {
                    Queue((int)id, ControlEvent.ConsolePort, 1);
                    SendResize((int)id);
                }
                else
                {
                    Queue((int)id, ControlEvent.PortName, 1, Encoding.ASCII.GetBytes(port.Settings.Name));
                }
                port.TellConnectedFirst();
                break;
            case ControlEvent.PortOpen:
                port.Open(value != 0);
                break;
            default:
                break;
        }
    }

    private void SendResize(int port)
    {
        byte[] size = new byte[4];
        lock (_lock)
        {
            // As the specification has it (5.3.6.2). Linux's driver took rows first until 2025, and then its stable series were mended, too.
            BinaryPrimitives.WriteUInt16LittleEndian(size, _size.Columns);
            BinaryPrimitives.WriteUInt16LittleEndian(size.AsSpan(2), _size.Rows);
        }
        Queue(port, ControlEvent.Resize, 0, size);
    }

    private void Queue(int port, ControlEvent kind, ushort value, ReadOnlySpan<byte> more = default)
    {
        byte[] message = new byte[8 + more.Length];
        BinaryPrimitives.WriteInt32LittleEndian(message, port);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(4), (ushort)kind);
        BinaryPrimitives.WriteUInt16LittleEndian(message.AsSpan(6), value);
        more.CopyTo(message.AsSpan(8));
        lock (_lock)
        {
            if (IsRunning && _control.Count < MostMessages)
                _control.Enqueue(message);
        }
    }

    private void SendControl()
    {
        Virtqueue queue = Queues[ControlReceive];
        lock (_lock)
        {
            while (_control.Count > 0 && queue.Pop() is { } element)
            {
                byte[] message = _control.Dequeue();
                queue.Push(element, (uint)element.Write(0, message));
            }
        }
        queue.Notify();
    }

    /// <summary>A port: what the guest sends goes to the back end as it takes it, what comes waits in a ring for the guest's buffers.</summary>
    private sealed partial class Port(VirtioConsole console, int index, ConsolePort settings) : ICharacterDevice
    {
        private readonly Lock _lock = new();
        private readonly byte[] _input = new byte[InputCapacity];
        private readonly byte[] _chunk = new byte[4096];
        private VirtqueueElement? _sending;
        private int _first;
        private int _count;
        private bool _open;
        private bool _refused;

        /// <summary>Somebody is at the other side, and what the guest was told of it, as soon as it asked.</summary>
        private bool _connected = true;
        private bool? _told;

        public int Index => index;

        /// <summary>What the back end has taken a part of, and how much (<see cref="VirtqueueElement.Progress"/>).</summary>
        public VirtqueueElement? Sending => _sending;

        public ConsolePort Settings => settings;

        public int Receive(ReadOnlySpan<byte> bytes)
        {
            int taken = 0;
            lock (_lock)
            {
                while (taken < bytes.Length && _count < InputCapacity)
                    _input[(_first + _count++) % InputCapacity] = bytes[taken++];
                _refused |= taken < bytes.Length;
            }
            console.WakeWorker();
            return taken;
        }

        public void OutputPossible() => console.WakeWorker();

        public void ReceiveBreak()
        {
        }

        public void SetConnected(bool connected)
        {
            lock (_lock)
                _connected = connected;
            TellConnected();
            console.WakeWorker();
        }

        /// <summary>The guest is ready to hear whether somebody is at the other side.</summary>
        public void TellConnectedFirst()
        {
            lock (_lock)
            {
                _told = _connected;
                console.Queue(index, ControlEvent.PortOpen, _connected ? (ushort)1 : (ushort)0);
            }
        }

        /// <summary>Tells the guest whether somebody is at the other side, where it heard otherwise.</summary>
        private void TellConnected()
        {
            lock (_lock)
            {
                if (_told is not { } told || told == _connected)
                    return;
                _told = _connected;
                console.Queue(index, ControlEvent.PortOpen, _connected ? (ushort)1 : (ushort)0);
            }
        }

        public void Open(bool open)
        {
            lock (_lock)
                _open = open;
            console.WakeWorker();
        }

        /// <summary>On the device's thread.</summary>
        public void Transmit(Virtqueue queue)
        {
            while (true)
            {
                if (_sending is null)
                {
                    _sending = queue.Pop();
                    if (_sending is null)
                        break;
                }
                while (_sending.Progress < _sending.ReadableLength)
                {
                    int length = _sending.Read(_sending.Progress, _chunk);
                    int taken = settings.Backend.Write(_chunk.AsSpan(0, length));
                    _sending.Progress += taken;
                    if (taken < length)
                    {
                        queue.Notify();
                        return;
                    }
                }
                queue.Push(_sending, 0);
                _sending = null;
            }
            queue.Notify();
        }

        /// <summary>On the device's thread.</summary>
        public void Deliver(Virtqueue queue)
        {
            bool resume = false;
            lock (_lock)
            {
                // A channel that no program has open keeps its input.
                if (!settings.IsConsole && console.MultiPort && !_open)
                    return;
                while (_count > 0 && queue.Pop() is { } element)
                {
                    int run = Math.Min(_count, InputCapacity - _first);
                    int given = element.Write(0, _input.AsSpan(_first, run));
                    _first = (_first + given) % InputCapacity;
                    _count -= given;
                    queue.Push(element, (uint)given);
                    if (given == 0)
                        break;
                }
                if (_refused && _count < InputCapacity)
                {
                    _refused = false;
                    resume = true;
                }
            }
            queue.Notify();
            if (resume)
                settings.Backend.ResumeInput();
        }

        public void Stopped()
        {
            _sending?.Queue.Forget(_sending);
            _sending = null;
            lock (_lock)
            {
                _open = false;
                _told = null;
            }
        }
    }
}
