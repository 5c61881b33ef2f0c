using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.Network.Vsock;

namespace Kvasir.Devices.Virtio;

/// <summary>Virtio socket device (virtio 1.2, 5.10), for streams and sequenced packets. Packets move on the bridge's thread, both ways.</summary>
public sealed class VirtioVsock : VirtioDevice, IVsockGuest
{
    /// <summary>The smallest context identifier that a guest can have.</summary>
    public const ulong FirstCid = 3;

    /// <summary>One past the largest: this and what is above stands for "any", or is reserved.</summary>
    public const ulong EndOfCids = uint.MaxValue;

    private const ushort QueueSize = 128;
    private const int ReceiveQueue = 0;
    private const int TransmitQueue = 1;
    private const int EventQueue = 2;
    private const int ConfigBytes = 8;

    [Flags]
    private enum Feature : ulong
    {
        Stream = 1 << 0,
        SequencedPackets = 1 << 1,
    }

    // Wiring
    private readonly VsockBridge _bridge;

    // State
    private volatile int _generation;

    /// <summary>The driver is to hear that all its connections are gone: they ended with the VM that was saved.</summary>
    private volatile bool _owesReset;

    // State of the bridge's thread; nobody else has it while the device is held
    private VirtqueueElement? _buffer;

    /// <param name="bridge">Whoever made it disposes it, before this device.</param>
    /// <param name="cid">The guest's context identifier.</param>
    public VirtioVsock(string name, GuestMemory memory, VsockBridge bridge, ulong cid = FirstCid)
        : base(VirtioType.Vsock, name, memory, [QueueSize, QueueSize, QueueSize], ConfigBytes)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(cid, FirstCid);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(cid, EndOfCids);
        _bridge = bridge;
        Cid = cid;
        Span<byte> config = stackalloc byte[ConfigBytes];
        BinaryPrimitives.WriteUInt64LittleEndian(config, cid);
        SetConfig(0, config);
    }

    public ulong Cid { get; }

    public int Generation => _generation;

    public bool TakesMessages => Has((ulong)Feature.SequencedPackets);

    protected override ulong DeviceFeatures => (ulong)(Feature.Stream | Feature.SequencedPackets);

    /// <summary>Begins to carry packets. Once, before the VM runs.</summary>
    public void Connect() => _bridge.Start(this);

    public bool TryEnter()
    {
        if (!TryHold())
            return false;
        if (IsRunning)
            return true;
        Release();
        return false;
    }

    public void Leave() => Release();

    public bool TryTake(out VsockPacket packet, Span<byte> payload)
    {
        packet = default;
        Virtqueue queue = Queues[TransmitQueue];
        if (MustStand)
            return false;
        if (queue.Pop() is not { } element && (!queue.WantNotifications(true) || (element = queue.Pop()) is null))
            return false;
        if (!element.TryRead(0, out packet))
        {
            // Without a header nobody can be told; the buffer goes back.
            packet = default;
        }
        else if (packet.Length > payload.Length || packet.Length > element.ReadableLength - VsockPacket.HeaderSize)
        {
            packet.Operation = VsockOperation.Invalid;
        }
        else
        {
            element.Read(VsockPacket.HeaderSize, payload[..(int)packet.Length]);
        }
        queue.Push(element, 0);
        return true;
    }

    public int Room
    {
        get
        {
            Virtqueue queue = Queues[ReceiveQueue];
            while (!MustStand)
            {
                if (_buffer is null)
                {
                    _buffer = queue.Pop();
                    if (_buffer is null && queue.WantNotifications(true))
                        _buffer = queue.Pop();
                    if (_buffer is null)
                        return 0;
                    queue.WantNotifications(false);
                }
                if (_buffer.WritableLength >= VsockPacket.HeaderSize)
                    return (int)Math.Min(_buffer.WritableLength, int.MaxValue);
                // Not even a header fits.
                queue.Push(_buffer, 0);
                _buffer = null;
            }
            return 0;
        }
    }

    public void Give(in VsockPacket packet, ReadOnlySpan<byte> payload)
    {
        VirtqueueElement buffer = _buffer!;
        _buffer = null;
        buffer.Write(0, MemoryMarshal.AsBytes(new ReadOnlySpan<VsockPacket>(in packet)));
        int written = buffer.Write(VsockPacket.HeaderSize, payload);
        buffer.Queue.Push(buffer, (uint)(VsockPacket.HeaderSize + written));
    }

    public void Notify()
    {
        Queues[ReceiveQueue].Notify();
        Queues[TransmitQueue].Notify();
    }

    /// <summary>Packets go by the bridge's thread.</summary>
    protected override EventFd? Bell(int index) => index == EventQueue ? base.Bell(index) : _bridge.Bell();

    protected override void Wake(Virtqueue queue)
    {
        if (queue.Index == EventQueue)
            base.Wake(queue);
        else
            _bridge.Kick();
    }

    protected override void Process(Virtqueue queue)
    {
        if (queue.Index == EventQueue)
            SendEvent();
    }

    /// <summary>The buffers stay until there is something to tell.</summary>
    protected override bool ProcessesAgain(Virtqueue queue) => _owesReset;

    protected override void ProcessWake() => SendEvent();

    /// <summary>Sockets of the host's are not in a state, and the guest may have another context identifier here.</summary>
    protected override void RestoreModel(ModelState? model)
    {
        Span<byte> config = stackalloc byte[ConfigBytes];
        BinaryPrimitives.WriteUInt64LittleEndian(config, Cid);
        KeepConfig(0, config);
        _owesReset = IsRunning;
    }

    /// <summary>Tells of a transport reset (virtio 1.2, 5.10.6.7). On the device's thread.</summary>
    private void SendEvent()
    {
        const int eventSize = 4;
        const uint transportReset = 0;
        Virtqueue queue = Queues[EventQueue];
        while (_owesReset && queue.Pop() is { } element)
        {
            bool told = element.TryWrite(0, transportReset);
            _owesReset = !told;
            queue.Push(element, told ? eventSize : 0u);
        }
        queue.Notify();
    }

    private protected override void CollectHeld(List<VirtqueueElement> held)
    {
        if (_buffer is not null)
            held.Add(_buffer);
    }

    protected override void Stopped()
    {
        if (_buffer is { } buffer)
            buffer.Queue.Forget(buffer);
        _buffer = null;
        _owesReset = false;
        _generation++;
        _bridge.Kick();
    }
}
