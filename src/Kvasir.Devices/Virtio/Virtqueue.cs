using System;
using System.Collections.Generic;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <summary>What the driver set up of a queue, and how far the device has come in it.</summary>
public record struct VirtqueueState
{
    public ushort Size;
    public bool Enabled;

    /// <summary>Guest-physical addresses: descriptor area, driver area, device area.</summary>
    public ulong Descriptors;
    public ulong Driver;
    public ulong Device;

    /// <summary>The transport's interrupt vector.</summary>
    public ushort Vector;

    /// <summary>The next available entry (split: a free-running index; packed: a position).</summary>
    public ushort NextAvailable;

    /// <summary>The next used entry, likewise.</summary>
    public ushort NextUsed;

    /// <summary>Packed rings: the wrap counters of both.</summary>
    public bool AvailableWrap;
    public bool UsedWrap;
}

/// <summary>
/// A virtqueue as the device sees it, split or packed (virtio 1.2, 2.6 to 2.8). A ring that breaks the rules puts the device into NEEDS_RESET, and the queue
/// gives nothing more. Any thread may call; calls take the queue's lock, which comes after the device's in the lock order. Nothing here allocates once the
/// queue has seen its deepest use.
/// </summary>
public sealed partial class Virtqueue
{
    public const int MaximumSize = 32768;

    [StructLayout(LayoutKind.Sequential, Size = 16)]
    private readonly record struct Descriptor(ulong Address, uint Length, ushort FlagsOrId, ushort NextOrFlags)
    {
        public DescriptorFlags SplitFlags => (DescriptorFlags)FlagsOrId;

        public ushort Next => NextOrFlags;

        public ushort PackedId => FlagsOrId;

        public DescriptorFlags PackedFlags => (DescriptorFlags)NextOrFlags;
    }

    // Configuration
    private readonly ushort _maximum;

    // Wiring
    private readonly VirtioDevice _device;
    private readonly GuestMemory _memory;

    // State
    private readonly Lock _lock = new();
    private VirtqueueState _state;
    private bool _live;
    private bool _packed;
    private bool _eventIndex;
    private bool _indirect;
    private GuestRun _descriptors;
    private GuestRun _driver;
    private GuestRun _used;
    private VirtqueueElement?[] _free = new VirtqueueElement?[16];
    private int _freeCount;

    /// <summary>Buffers that were taken and not given back.</summary>
    private int _out;
    private int _unsignalled;
    private bool _notifying = true;

    /// <summary>Buffers that the saved device held: taken again before any of the ring's.</summary>
    private readonly LinkedList<VirtqueueElement> _again = new();

    internal Virtqueue(VirtioDevice device, GuestMemory memory, int index, ushort maximumSize)
    {
        _device = device;
        _memory = memory;
        Index = index;
        _maximum = maximumSize;
        Reset();
    }

    public int Index { get; }

    /// <summary>The most entries that the driver may ask for.</summary>
    public ushort Maximum => _maximum;

    /// <summary>What the driver set up. Transports write it while the queue is not enabled.</summary>
    public VirtqueueState Setup
    {
        get
        {
            lock (_lock)
                return _state;
        }
    }

    /// <summary>The queue takes part: enabled, and the device runs.</summary>
    public bool IsLive => Volatile.Read(ref _live);

    /// <summary>Takes the next buffer.</summary>
    /// <returns>Null where there is none, or where the ring is broken.</returns>
    public VirtqueueElement? Pop()
    {
        VirtqueueElement? element = null;
        return Pop(new Span<VirtqueueElement?>(ref element)) > 0 ? element : null;
    }

    /// <summary>Takes the next buffers, as many as there are and as fit.</summary>
    /// <returns>How many. None where there are none, or where the ring is broken.</returns>
    public int Pop(Span<VirtqueueElement?> elements)
    {
        string? fault = null;
        int count = 0;
        lock (_lock)
        {
            while (_live && count < elements.Length && HasMore)
            {
                if (_again.First is { } again)
                {
                    _again.RemoveFirst();
                    elements[count++] = again.Value;
                    continue;
                }
                VirtqueueElement element = Take();
                bool found = false;
                // A driver that uses entries again before it got them back could have a device hold any number of requests.
                if (_out > _state.Size)
                    fault = "more buffers than entries";
                else
                    fault = _packed ? PopPacked(element, out found) : PopSplit(element, out found);
                if (fault is null && found)
                {
                    elements[count++] = element;
                    continue;
                }
                Give(element);
                if (fault is not null)
                    _live = false;
                break;
            }
        }
        if (fault is not null)
            _device.Fail($"queue {Index}: {fault}");
        return count;
    }

    /// <summary>Whether a buffer waits.</summary>
    public bool HasAvailable
    {
        get
        {
            lock (_lock)
                return _live && HasMore;
        }
    }

    private bool HasMore => _again.Count > 0 || IsMoreInRing;

    private bool IsMoreInRing => _packed ? IsAvailablePacked() : AvailableIndex != _state.NextAvailable;

    /// <summary>Gives a buffer back to the driver. <see cref="Notify"/> tells it, after the last of several.</summary>
    /// <param name="element">What <see cref="Pop"/> gave; the caller forgets it.</param>
    /// <param name="written">Bytes written at the start of its writable part.</param>
    public void Push(VirtqueueElement element, uint written) => Push([(element, written)]);

    /// <summary>Gives several buffers back at once, in their order: the driver sees all of them or none.</summary>
    /// <param name="elements">What <see cref="Pop"/> gave, and how much of each was written, as for <see cref="Push"/>. The caller forgets them.</param>
    public void Push(ReadOnlySpan<(VirtqueueElement Element, uint Written)> elements)
    {
        Interlocked.MemoryBarrier();
        foreach (ref readonly (VirtqueueElement Element, uint Written) item in elements)
            item.Element.NoteOrderedWrites();
        lock (_lock)
        {
            if (_live)
            {
                if (_packed)
                    PushPacked(elements);
                else
                    PushSplit(elements);
            }
            foreach (ref readonly (VirtqueueElement Element, uint Written) item in elements)
                Give(item.Element);
        }
    }

    /// <summary>Drops a buffer without telling the driver: after a reset, or where the device gives up on the ring.</summary>
    public void Forget(VirtqueueElement element)
    {
        lock (_lock)
            Give(element);
    }

    /// <summary>Puts the buffer that was taken last back, so that the next <see cref="Pop"/> finds it again.</summary>
    public void Unpop(VirtqueueElement element)
    {
        lock (_lock)
        {
            if (_live && element.WasHeld)
            {
                _again.AddFirst(element);
                return;
            }
            if (_live && _packed)
                RewindPacked(element.Entries);
            else if (_live)
                _state.NextAvailable--;
            Give(element);
        }
    }

    /// <summary>Interrupts the driver if it wants to hear of what was pushed.</summary>
    public void Notify()
    {
        bool wanted;
        lock (_lock)
        {
            if (!_live || _unsignalled == 0)
                return;
            // What was pushed must be visible before the driver's wish is read (virtio 1.2, 2.7.7.1).
            Interlocked.MemoryBarrier();
            wanted = _packed ? WantsPacked() : WantsSplit();
            _unsignalled = 0;
        }
        if (wanted)
            _device.InterruptQueue(this);
    }

    /// <summary><see cref="Push"/> and <see cref="Notify"/>.</summary>
    public void Complete(VirtqueueElement element, uint written)
    {
        Push(element, written);
        Notify();
    }

    /// <summary>Asks the driver to tell of new buffers, or not to. A hint: it may tell all the same.</summary>
    /// <returns>With <paramref name="wanted"/>: whether buffers came meanwhile, of which the driver may not tell.</returns>
    public bool WantNotifications(bool wanted)
    {
        lock (_lock)
        {
            if (!_live)
                return false;
            _notifying = wanted;
            if (_packed)
                TellPacked(wanted);
            else
                TellSplit(wanted);
            if (!wanted)
                return false;
            Interlocked.MemoryBarrier();
            return HasMore;
        }
    }

    // For transports and the device

    internal void Change(Func<VirtqueueState, VirtqueueState> change)
    {
        lock (_lock)
        {
            if (!_state.Enabled)
                _state = change(_state);
        }
    }

    internal void SetVector(ushort vector)
    {
        lock (_lock)
            _state.Vector = vector;
    }

    internal void Reset()
    {
        lock (_lock)
        {
            _live = false;
            _state = new VirtqueueState { Size = _maximum, Vector = Pci.Msix.NoVector, AvailableWrap = true, UsedWrap = true };
            _unsignalled = 0;
            _notifying = true;
            ForgetHeld();
        }
    }

    /// <summary>Finds the rings in memory and lets the queue take part.</summary>
    /// <returns>What is wrong with them, or null.</returns>
    internal string? Start(VirtioFeatures features)
    {
        lock (_lock)
        {
            if (!_state.Enabled || _live)
                return null;
            _packed = (features & VirtioFeatures.PackedRing) != 0;
            _eventIndex = (features & VirtioFeatures.EventIndex) != 0;
            _indirect = (features & VirtioFeatures.IndirectDescriptors) != 0;
            if (Find(_state, _packed, out _descriptors, out _driver, out _used) is { } fault)
                return fault;
            _live = true;
            return null;
        }
    }

    /// <summary>Looks whether a saved state can be one of this queue.</summary>
    /// <param name="runs">The driver had said DRIVER_OK.</param>
    /// <param name="live">And nothing was wrong with the device.</param>
    /// <returns>What is wrong with it, or null.</returns>
    internal string? Fault(in VirtqueueState state, VirtioFeatures features, bool runs, bool live)
    {
        bool packed = (features & VirtioFeatures.PackedRing) != 0;
        bool fresh = state is { NextAvailable: 0, NextUsed: 0, AvailableWrap: true, UsedWrap: true };
        if (!fresh && (!runs || !state.Enabled || (packed && (state.NextAvailable >= state.Size || state.NextUsed >= state.Size))))
            return $"queue {Index}: no such place in its ring: {state.NextAvailable}, {state.NextUsed}";
        // What a driver sets up before it runs is looked at when it does.
        return live && state.Enabled ? Find(state, packed, out _, out _, out _) : null;
    }

    /// <summary>Finds a queue's rings in memory.</summary>
    /// <returns>What is wrong with them, or null.</returns>
    private string? Find(in VirtqueueState state, bool packed, out GuestRun descriptors, out GuestRun driver, out GuestRun device)
    {
        (descriptors, driver, device) = (default, default, default);
        ulong size = state.Size;
        if (size == 0 || size > _maximum || (!packed && (size & (size - 1)) != 0))
            return $"queue {Index}: {size} entries are not possible";
        ulong driverSize = packed ? 4 : 6 + 2 * size;
        ulong deviceSize = packed ? 4 : 6 + 8 * size;
        if (!Whole(state.Descriptors, size * 16, out descriptors) || !Whole(state.Driver, driverSize, out driver) || !Whole(state.Device, deviceSize, out device))
            return $"queue {Index}: its rings are not in memory";
        if ((state.Descriptors & 15) != 0 || (state.Driver & (packed ? 3u : 1u)) != 0 || (state.Device & 3) != 0)
            return $"queue {Index}: its rings are not aligned";
        return null;
    }

    internal void Stop()
    {
        lock (_lock)
            _live = false;
    }

    /// <param name="state">What the driver set up, and how far the saved device had come.</param>
    /// <param name="held">What that one had taken and not answered; those of other queues are left out.</param>
    internal void Restore(in VirtqueueState state, HeldBuffer[] held)
    {
        lock (_lock)
        {
            _live = false;
            _state = state;
            ForgetHeld();
            foreach (HeldBuffer buffer in held)
            {
                if (buffer.Queue != Index)
                    continue;
                VirtqueueElement element = Take();
                element.Restore(_memory, buffer);
                _again.AddLast(element);
            }
        }
    }

    /// <summary>Adds what waits to be taken again to what a device holds.</summary>
    internal void CollectHeld(List<VirtqueueElement> held)
    {
        lock (_lock)
            held.AddRange(_again);
    }

    private void ForgetHeld()
    {
        foreach (VirtqueueElement element in _again)
            Give(element);
        _again.Clear();
    }

    private bool Whole(ulong address, ulong length, out GuestRun run) =>
        _memory.TryGetRun(new Gpa(address), length, write: true, out run) && (ulong)run.Length == length;

    private VirtqueueElement Take()
    {
        VirtqueueElement element = _freeCount > 0 ? _free[--_freeCount]! : new VirtqueueElement(this);
        element.Clear();
        _out++;
        return element;
    }

    private void Give(VirtqueueElement element)
    {
        _out--;
        if (_freeCount == _free.Length)
            Array.Resize(ref _free, _free.Length * 2);
        _free[_freeCount++] = element;
    }

    /// <summary>Appends the descriptors of an indirect table.</summary>
    private string? AppendIndirect(VirtqueueElement element, ulong table, uint length, bool chained, ref int seen)
    {
        if (length == 0 || (length & 15) != 0)
            return $"an indirect table has {length} bytes";
        uint count = length / 16;
        uint at = 0;
        uint visited = 0;
        while (true)
        {
            if (++seen > VirtqueueElement.MaximumDescriptors || ++visited > count)
                return "a chain is longer than a device has to take, or a loop";
            if (!_memory.TryRead(new Gpa(table + at * 16ul), out Descriptor descriptor))
                return $"an indirect table's address {table:x} is no memory";
            DescriptorFlags flags = chained ? descriptor.SplitFlags : descriptor.PackedFlags;
            if ((flags & DescriptorFlags.Indirect) != 0)
                return "an indirect table in an indirect table";
            string? fault = element.Append(_memory, descriptor.Address, descriptor.Length, (flags & DescriptorFlags.Write) != 0);
            if (fault is not null)
                return fault;
            if (!chained)
            {
                if (++at == count)
                    return null;
                continue;
            }
            if ((flags & DescriptorFlags.Next) == 0)
                return null;
            at = descriptor.Next;
            if (at >= count)
                return "an indirect descriptor's next is outside its table";
        }
    }

    private static ref T At<T>(Span<byte> bytes, int offset)
        where T : unmanaged => ref MemoryMarshal.AsRef<T>(bytes.Slice(offset, Unsafe.SizeOf<T>()));
}
