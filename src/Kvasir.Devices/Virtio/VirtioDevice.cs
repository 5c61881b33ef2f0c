using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;

namespace Kvasir.Devices.Virtio;

/// <summary>What carries a virtio device's interrupts to the guest. Any thread calls, with no lock of the device held.</summary>
public interface IVirtioTransport
{
    void InterruptQueue(Virtqueue queue);

    void InterruptConfig();

    /// <summary>The device was reset.</summary>
    void DeviceReset();
}

/// <summary>
/// A virtio device without its transport: status, features, queues and device configuration (virtio 1.2, ch. 2 and 3). A device model derives from it, says
/// what it offers, and does its work in <see cref="Process"/> on the device's own threads.
/// </summary>
/// <remarks>
/// <para>A reset takes effect when nothing is under way any more: work on its threads and requests that end later hold the device
/// (<see cref="TryHold"/>, <see cref="Release"/>), and whoever lets go of it last completes the reset. Modern drivers poll the status for it; for the
/// others <see cref="WriteStatus"/> can wait. Pausing the VM works the same way.</para>
/// <para>Lock order: device, queue, transport (PCI function), interrupt controllers.</para>
/// </remarks>
public abstract partial class VirtioDevice : IResettable, IPausable, IDisposable
{
    /// <summary>All state of the device.</summary>
    /// <param name="Held">Buffers that the device had taken and not answered.</param>
    /// <param name="Model">What its type adds; null where that is nothing.</param>
    public readonly record struct State(
        VirtioStatus Status, VirtioFeatures Accepted, byte Generation, byte[] Config, VirtqueueState[] Queues, HeldBuffer[] Held, ModelState? Model = null);

    /// <summary>State that a device type has beside its configuration and queues.</summary>
    public abstract record ModelState;

    private const VirtioFeatures AlwaysOffered = VirtioFeatures.IndirectDescriptors | VirtioFeatures.EventIndex | VirtioFeatures.Version1 | VirtioFeatures.PackedRing;
    private const VirtioFeatures LegacyOnly = VirtioFeatures.AnyLayout;

    // Configuration
    private readonly byte[] _initialConfig;
    private readonly QueueWorker[] _workers;

    // Wiring
    private readonly Virtqueue[] _queues;
    private IVirtioTransport? _transport;

    // State
    private readonly Lock _lock = new();
    private readonly byte[] _config;
    private readonly ManualResetEventSlim _settled = new(true);
    private VirtioStatus _status;
    private VirtioFeatures _accepted;
    private byte _generation;
    private bool _failed;
    private int _holds = 1;
    private volatile bool _resetting;
    private volatile bool _paused;
    private bool _owesConfigChange;
    private bool _disposed;

    /// <param name="name">Names its threads and log lines.</param>
    /// <param name="queueSizes">The most entries of each queue, powers of two.</param>
    /// <param name="configSize">Bytes of device configuration.</param>
    /// <param name="workers">Threads; queue n is worked on by thread n modulo their number.</param>
    protected VirtioDevice(VirtioType type, string name, GuestMemory memory, ReadOnlySpan<ushort> queueSizes, int configSize, int workers = 1)
    {
        Type = type;
        Name = name;
        Memory = memory;
        _config = new byte[configSize];
        _initialConfig = new byte[configSize];
        _queues = new Virtqueue[queueSizes.Length];
        for (int i = 0; i < _queues.Length; i++)
            _queues[i] = new Virtqueue(this, memory, i, queueSizes[i]);
        _workers = new QueueWorker[Math.Clamp(workers, 1, Math.Max(1, _queues.Length))];
        for (int i = 0; i < _workers.Length; i++)
        {
            int number = i;
            _workers[i] = new QueueWorker(_workers.Length == 1 ? name : $"{name}.{i}", bits => Work(number, bits));
        }
    }

    public VirtioType Type { get; }

    public string Name { get; }

    public ReadOnlySpan<Virtqueue> Queues => _queues;

    /// <summary>Told of a driver's faults, at most once between resets; null: nobody is.</summary>
    public Action<string>? Log { get; set; }

    /// <summary>Whether packed rings are offered.</summary>
    public bool OffersPackedRings { get; init; } = true;

    /// <summary>What is offered, the type's own bits and the common ones.</summary>
    public VirtioFeatures OfferedFeatures
    {
        get
        {
            VirtioFeatures common = AlwaysOffered | LegacyOnly;
            if (!OffersPackedRings)
                common &= ~VirtioFeatures.PackedRing;
            return (VirtioFeatures)DeviceFeatures | common;
        }
    }

    /// <summary>What a driver of virtio 1.0 or later is offered.</summary>
    public VirtioFeatures ModernFeatures => OfferedFeatures & ~LegacyOnly;

    /// <summary>What a legacy driver is offered: bits 0 to 31.</summary>
    public uint LegacyFeatures => (uint)OfferedFeatures;

    public VirtioFeatures AcceptedFeatures => _accepted;

    /// <summary>The driver is one of before virtio 1.0.</summary>
    public bool IsLegacyDriver => (_accepted & VirtioFeatures.Version1) == 0;

    public int ConfigSize => _config.Length;

    /// <summary>Changes when device configuration does, so that a driver can read it whole.</summary>
    public byte ConfigGeneration => Volatile.Read(ref _generation);

    public VirtioStatus Status
    {
        get
        {
            lock (_lock)
                return _status;
        }
    }

    /// <summary>The driver runs, and nothing keeps the device from doing so.</summary>
    public bool IsRunning => (_status & (VirtioStatus.DriverOk | VirtioStatus.NeedsReset)) == VirtioStatus.DriverOk && !_resetting;

    /// <summary>The VM is paused: nothing may begin.</summary>
    protected bool IsPaused => _paused;

    /// <summary>What is under way shall end soon: the device is being reset or paused.</summary>
    protected bool MustStand => _resetting || _paused;

    protected GuestMemory Memory { get; }

    /// <summary>The type's own feature bits (0 to 23 and from 50 on).</summary>
    protected abstract ulong DeviceFeatures { get; }

    /// <summary>Whether the driver took a feature bit of the type.</summary>
    public bool Has(ulong bit) => ((ulong)_accepted & bit) != 0;

    /// <summary>Connects the transport. Once.</summary>
    public void Connect(IVirtioTransport transport) => _transport = transport;

    // What a device model does

    /// <summary>
    /// Works on a queue that the driver told of (or that may have more), on the queue's thread, with the device held. Takes buffers until there are none: the
    /// caller sees to notifications being off meanwhile. Must not wait for a disk or the network.
    /// </summary>
    protected abstract void Process(Virtqueue queue);

    /// <summary>The driver has said DRIVER_OK. Called with no lock held.</summary>
    protected virtual void Started()
    {
    }

    /// <summary>The device is being reset; nothing is under way. Forget what belongs to the driver.</summary>
    protected virtual void Stopped()
    {
    }

    /// <summary>Something other than a queue's thread asked for work by <see cref="WakeWorker"/>; on worker 0's thread, with the device held.</summary>
    protected virtual void ProcessWake()
    {
    }

    /// <summary>The driver wrote device configuration. Called with the device's lock held; the bytes are not stored before.</summary>
    /// <returns>Whether they shall be stored.</returns>
    protected virtual bool WritingConfig(int offset, ReadOnlySpan<byte> bytes) => false;

    /// <summary>The VM is about to be paused: nothing is under way. Called on the machine's thread.</summary>
    protected virtual void Pausing()
    {
    }

    /// <summary>The VM goes on.</summary>
    protected virtual void Resuming()
    {
    }

    // What a device model may call

    /// <summary>Sets device configuration, as it stands after reset too. Before the driver runs, or with <see cref="ConfigChanged"/> after.</summary>
    protected void SetConfig(int offset, ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            bytes.CopyTo(_config.AsSpan(offset));
            bytes.CopyTo(_initialConfig.AsSpan(offset));
            _generation++;
        }
    }

    /// <summary>Tells the driver that device configuration has changed.</summary>
    protected void ConfigChanged()
    {
        if ((Status & VirtioStatus.DriverOk) != 0 && !_resetting)
            _transport?.InterruptConfig();
    }

    /// <summary>A byte of device configuration as it stands.</summary>
    protected byte ConfigByte(int offset) => Volatile.Read(ref _config[offset]);

    /// <summary>Has a queue's thread look at it. A device whose back end brings the thread sends some queues there. Any thread; never waits.</summary>
    protected virtual void Wake(Virtqueue queue) => _workers[queue.Index % _workers.Length].Signal(1ul << Math.Min(queue.Index / _workers.Length, 62));

    /// <summary>Has <see cref="ProcessWake"/> called on worker 0's thread.</summary>
    protected void WakeWorker() => _workers[0].Signal(1ul << 63);

    /// <summary>Keeps the device from being reset or paused while a request is under way.</summary>
    /// <returns>False where a reset or pause is under way: the request must not begin.</returns>
    public bool TryHold()
    {
        int holds = Volatile.Read(ref _holds);
        while (holds > 0)
        {
            int seen = Interlocked.CompareExchange(ref _holds, holds + 1, holds);
            if (seen == holds)
            {
                if (!_resetting && !_paused)
                    return true;
                Release();
                return false;
            }
            holds = seen;
        }
        return false;
    }

    /// <summary>One more hold for somebody who has one: a request that goes on after its thread's work.</summary>
    protected void HoldAgain() => Interlocked.Increment(ref _holds);

    /// <summary>Lets go of a hold.</summary>
    public void Release()
    {
        if (Interlocked.Decrement(ref _holds) == 0)
            Settle();
    }

    /// <summary>The driver broke the rules: the device stops and asks for a reset.</summary>
    public void Fail(string reason)
    {
        bool tell;
        lock (_lock)
        {
            if (_failed || _resetting)
                return;
            _failed = true;
            _status |= VirtioStatus.NeedsReset;
            tell = (_status & VirtioStatus.DriverOk) != 0;
            foreach (Virtqueue queue in _queues)
                queue.Stop();
        }
        Log?.Invoke($"{Name}: the driver broke the protocol: {reason}; the device waits for its reset");
        if (tell)
            _transport?.InterruptConfig();
    }

    internal void InterruptQueue(Virtqueue queue) => _transport?.InterruptQueue(queue);

    // What a transport calls, on a vCPU's thread

    /// <summary>The driver tells of buffers in a queue.</summary>
    public void Kick(int index)
    {
        if ((uint)index < (uint)_queues.Length && _queues[index].IsLive)
            Wake(_queues[index]);
    }

    /// <summary>The doorbells of the queues whose threads can wait for one.</summary>
    /// <param name="place">Where a transport has that of a queue.</param>
    internal Doorbell[] Doorbells(Func<int, EventFd, Doorbell> place)
    {
        List<Doorbell> doorbells = [];
        for (int index = 0; index < _queues.Length; index++)
        {
            if (Bell(index) is { } bell)
                doorbells.Add(place(index, bell));
        }
        return [.. doorbells];
    }

    /// <summary>A bell that stands for kicks of a queue; null where its thread cannot wait for one.</summary>
    protected virtual EventFd? Bell(int index) => _workers[index % _workers.Length].Bell(1ul << Math.Min(index / _workers.Length, 62));

    /// <summary>Takes feature bits, until the driver has said FEATURES_OK.</summary>
    public void WriteFeatures(int word, uint value)
    {
        lock (_lock)
        {
            if ((_status & VirtioStatus.FeaturesOk) != 0 || word is not (0 or 1))
                return;
            ulong mask = 0xffff_fffful << word * 32;
            _accepted = (VirtioFeatures)(((ulong)_accepted & ~mask) | (ulong)value << word * 32);
        }
    }

    /// <summary>Takes feature bits of a legacy driver, which has no FEATURES_OK.</summary>
    public void WriteLegacyFeatures(uint value)
    {
        lock (_lock)
            _accepted = (VirtioFeatures)(value & LegacyFeatures);
    }

    /// <summary>The driver writes its status; 0 resets the device.</summary>
    /// <param name="wait">A reset is complete when the call comes back.</param>
    public void WriteStatus(byte value, bool wait)
    {
        if (value == 0)
        {
            BeginReset();
            if (wait)
                _settled.Wait();
            return;
        }
        bool started = false;
        lock (_lock)
        {
            if (_resetting)
                return;
            VirtioStatus given = (VirtioStatus)value & ~VirtioStatus.NeedsReset;
            VirtioStatus now = _status | given;
            if ((given & ~_status & VirtioStatus.FeaturesOk) != 0 && !FeaturesAreSound())
                now &= ~VirtioStatus.FeaturesOk;
            // A modern driver must have its features accepted first.
            if ((now & VirtioStatus.DriverOk) != 0 && !IsLegacyDriver && (now & VirtioStatus.FeaturesOk) == 0)
                now &= ~VirtioStatus.DriverOk;
            started = (now & ~_status & VirtioStatus.DriverOk) != 0;
            _status = now;
        }
        if (started)
            Start();
    }

    /// <summary>The driver enabled a queue, which may be while the device runs.</summary>
    public void EnableQueue(int index)
    {
        if ((uint)index >= (uint)_queues.Length)
            return;
        _queues[index].Change(state => state with { Enabled = true });
        if (IsRunning)
            StartQueue(_queues[index]);
    }

    /// <summary>Reads device configuration; what is past its end reads as zeros.</summary>
    public uint ReadConfig(int offset, AccessSize size)
    {
        uint value = 0;
        lock (_lock)
        {
            for (int i = 0; i < (int)size && offset + i < _config.Length; i++)
                value |= (uint)_config[offset + i] << i * 8;
        }
        return value;
    }

    /// <summary>Writes device configuration, where the type has something to write.</summary>
    public void WriteConfig(int offset, AccessSize size, uint value)
    {
        Span<byte> bytes = stackalloc byte[4];
        BitConverter.TryWriteBytes(bytes, value);
        bytes = bytes[..Math.Min((int)size, Math.Max(0, _config.Length - offset))];
        if (bytes.IsEmpty)
            return;
        bool changed;
        lock (_lock)
        {
            changed = WritingConfig(offset, bytes);
            if (changed)
                bytes.CopyTo(_config.AsSpan(offset));
        }
    }

    // Life

    /// <summary>The machine's reset line. Waits for what is under way.</summary>
    public void Reset()
    {
        BeginReset();
        _settled.Wait();
    }

    public void Pause()
    {
        bool wait;
        lock (_lock)
        {
            if (_paused)
                return;
            _settled.Reset();
            _paused = true;
            wait = !_resetting;
        }
        if (wait)
            Release();
        _settled.Wait();
        Pausing();
    }

    public void Resume()
    {
        lock (_lock)
        {
            if (!_paused)
                return;
            _paused = false;
            if (!_resetting)
                Volatile.Write(ref _holds, 1);
        }
        Resuming();
        if (Interlocked.Exchange(ref _owesConfigChange, false))
            ConfigChanged();
        foreach (Virtqueue queue in _queues)
        {
            if (queue.IsLive)
                Wake(queue);
        }
        WakeWorker();
    }

    /// <summary>Ends its threads. The machine has stopped all vCPUs.</summary>
    public void Dispose()
    {
        Dispose(true);
        GC.SuppressFinalize(this);
    }

    protected virtual void Dispose(bool disposing)
    {
        if (_disposed || !disposing)
            return;
        _disposed = true;
        BeginReset();
        _settled.Wait();
        foreach (QueueWorker worker in _workers)
            worker.Dispose();
        _settled.Dispose();
    }

    private bool FeaturesAreSound() => (_accepted & ~ModernFeatures) == 0 && (_accepted & VirtioFeatures.Version1) != 0;

    private void Start()
    {
        Started();
        foreach (Virtqueue queue in _queues)
            StartQueue(queue);
    }

    private void StartQueue(Virtqueue queue)
    {
        if (queue.Start(_accepted) is { } fault)
        {
            Fail(fault);
            return;
        }
        // A driver may have filled it before it said DRIVER_OK.
        if (queue.IsLive)
            Wake(queue);
    }

    private void BeginReset()
    {
        lock (_lock)
        {
            if (_resetting)
                return;
            _settled.Reset();
            _resetting = true;
            foreach (Virtqueue queue in _queues)
                queue.Stop();
            // A pause takes the device's own hold away. Where somebody has one still, the last of them completes the reset.
            if (_paused)
            {
                if (Volatile.Read(ref _holds) == 0)
                    CompleteReset();
                return;
            }
        }
        Release();
    }

    /// <summary>Nothing is under way any more.</summary>
    private void Settle()
    {
        lock (_lock)
        {
            // Somebody who came first saw to it, and the device goes on already.
            if (Volatile.Read(ref _holds) != 0)
                return;
            if (_resetting)
                CompleteReset();
            else
                _settled.Set();
        }
    }

    /// <summary>With the lock held.</summary>
    private void CompleteReset()
    {
        foreach (Virtqueue queue in _queues)
            queue.Reset();
        Stopped();
        _status = VirtioStatus.None;
        _accepted = VirtioFeatures.None;
        _failed = false;
        _initialConfig.CopyTo(_config, 0);
        _transport?.DeviceReset();
        _resetting = false;
        if (!_paused)
            Volatile.Write(ref _holds, 1);
        _settled.Set();
    }

    private void Work(int worker, ulong bits)
    {
        if (!TryHold())
            return;
        try
        {
            if ((bits >> 63) != 0)
                ProcessWake();
            for (int index = worker; index < _queues.Length; index += _workers.Length)
            {
                Virtqueue queue = _queues[index];
                if ((bits >> Math.Min(index / _workers.Length, 62) & 1) == 0 || !queue.IsLive)
                    continue;
                do
                {
                    queue.WantNotifications(false);
                    Process(queue);
                }
                while (queue.WantNotifications(true) && !_resetting && !_paused && ProcessesAgain(queue));
            }
        }
        catch (Exception e)
        {
            // A defect of ours: this device stops, and the VM lives on.
            Fail($"an internal fault: {e}");
        }
        Release();
    }

    /// <summary>Whether buffers that are left in a queue are to be worked on at once; a device that waits for something else says no.</summary>
    protected virtual bool ProcessesAgain(Virtqueue queue) => true;
}
