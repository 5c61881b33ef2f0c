using System;
using System.Collections.Generic;
using System.Linq;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Virtio;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>One part of a buffer.</summary>
public readonly record struct Part(ulong Address, uint Length, bool DeviceWrites);

/// <summary>
/// The driver's side of one virtqueue, written from the specification alone (virtio 1.2, 2.7 and 2.8), split or packed. It uses nothing of the device's code.
/// </summary>
public sealed class ModelQueue
{
    private const ushort Next = 1;
    private const ushort Write = 2;
    private const ushort Indirect = 4;

    private readonly GuestMemory _memory;
    private readonly bool _packed;
    private readonly bool _eventIndex;
    private readonly ulong _tables;
    private readonly GuestRun _descriptors;
    private readonly GuestRun _driver;
    private readonly GuestRun _device;
    private readonly Stack<ushort> _freeHeads = new();
    private readonly ushort[] _lengthOf;
    private readonly ushort[] _nextOf;
    private ushort _available;
    private ushort _used;
    private bool _availableWrap = true;
    private bool _usedWrap = true;
    private int _freeSlots;
    private ushort _kicked;
    private int _addedSinceKick;

    /// <param name="at">Where the rings stand: 1 MiB is enough for 1,024 entries and their indirect tables.</param>
    public ModelQueue(GuestMemory memory, int index, ushort size, ulong at, bool packed, bool eventIndex)
    {
        _memory = memory;
        Index = index;
        Size = size;
        _packed = packed;
        _eventIndex = eventIndex;
        Descriptors = at;
        Driver = at + size * 16ul;
        Device = (Driver + 6 + 2ul * size + 63) & ~63ul;
        _tables = (Device + 6 + 8ul * size + 4095) & ~4095ul;
        memory.TryWrite(new Gpa(at), new byte[(int)(_tables - at)]);
        _descriptors = Run(Descriptors, size * 16ul);
        _driver = Run(Driver, 6 + 2ul * size);
        _device = Run(Device, 6 + 8ul * size);
        _lengthOf = new ushort[size];
        _nextOf = new ushort[size];
        _freeSlots = size;
        for (int i = size - 1; i >= 0; i--)
            _freeHeads.Push((ushort)i);
        WantInterrupts(true);
    }

    public int Index { get; }

    public ushort Size { get; }

    public ulong Descriptors { get; }

    public ulong Driver { get; }

    public ulong Device { get; }

    /// <summary>Makes a buffer available.</summary>
    /// <returns>The identifier by which <see cref="TryTake"/> gives it back, or -1 where there is no room.</returns>
    public int TryAdd(ReadOnlySpan<Part> parts, bool indirect)
    {
        int slots = indirect ? 1 : parts.Length;
        if (_freeSlots < slots || _freeHeads.Count < (_packed ? 1 : slots))
            return -1;
        int id = _packed ? AddPacked(parts, indirect) : AddSplit(parts, indirect);
        _freeSlots -= slots;
        _addedSinceKick++;
        return id;
    }

    /// <summary>Takes back a buffer that the device is done with.</summary>
    public bool TryTake(out int id, out uint written)
    {
        id = -1;
        written = 0;
        if (_packed)
            return TakePacked(out id, out written);
        ushort published = Volatile.Read(ref Word(_device, 2));
        if (published == _used)
            return false;
        int at = 4 + 8 * (_used % Size);
        id = (int)Double(_device, at);
        written = Double(_device, at + 4);
        _used++;
        ushort head = (ushort)id;
        for (int i = _lengthOf[id]; i > 0; i--)
        {
            ushort next = _nextOf[head];
            _freeHeads.Push(head);
            head = next;
            _freeSlots++;
        }
        if (_eventIndex)
            Volatile.Write(ref Word(_driver, 4 + 2 * Size), _used);
        return true;
    }

    /// <summary>Whether the device wants to be told of what was added since the last question.</summary>
    public bool NeedsKick()
    {
        Interlocked.MemoryBarrier();
        int added = _addedSinceKick;
        _addedSinceKick = 0;
        if (added == 0)
            return false;
        if (_packed)
            return NeedsKickPacked();
        if (!_eventIndex)
            return (Volatile.Read(ref Word(_device, 0)) & 1) == 0;
        ushort old = _kicked;
        _kicked = _available;
        ushort wanted = Volatile.Read(ref Word(_device, 4 + 8 * Size));
        return (ushort)(_available - wanted - 1) < (ushort)(_available - old);
    }

    /// <summary>Asks for interrupts, or not to have them.</summary>
    public void WantInterrupts(bool wanted)
    {
        if (_packed)
        {
            if (wanted && _eventIndex)
            {
                Word(_driver, 0) = (ushort)(_used | (_usedWrap ? 0x8000 : 0));
                Volatile.Write(ref Word(_driver, 2), 2);
                return;
            }
            Volatile.Write(ref Word(_driver, 2), wanted ? (ushort)0 : (ushort)1);
            return;
        }
        if (_eventIndex)
            Volatile.Write(ref Word(_driver, 4 + 2 * Size), wanted ? _used : (ushort)(_used - 1));
        else
            Volatile.Write(ref Word(_driver, 0), wanted ? (ushort)0 : (ushort)1);
    }

    private GuestRun Run(ulong address, ulong length)
    {
        if (!_memory.TryGetRun(new Gpa(address), length, true, out GuestRun run) || (ulong)run.Length != length)
            throw new ArgumentException("no memory for a queue");
        return run;
    }

    private static ref ushort Word(in GuestRun run, int offset) => ref MemoryMarshal.AsRef<ushort>(run.Span[offset..]);

    private static ref uint Double(in GuestRun run, int offset) => ref MemoryMarshal.AsRef<uint>(run.Span[offset..]);

    private static void Put(Span<byte> at, ulong address, uint length, ushort third, ushort fourth)
    {
        MemoryMarshal.Write(at, address);
        MemoryMarshal.Write(at[8..], length);
        MemoryMarshal.Write(at[12..], third);
        MemoryMarshal.Write(at[14..], fourth);
    }

    /// <summary>Writes an indirect table for a slot.</summary>
    private ulong Table(int slot, ReadOnlySpan<Part> parts)
    {
        ulong address = _tables + (ulong)slot * 512;
        Span<byte> table = Run(address, (ulong)parts.Length * 16).Span;
        for (int i = 0; i < parts.Length; i++)
        {
            ushort flags = parts[i].DeviceWrites ? Write : (ushort)0;
            if (_packed)
                Put(table[(i * 16)..], parts[i].Address, parts[i].Length, 0, flags);
            else
                Put(table[(i * 16)..], parts[i].Address, parts[i].Length, (ushort)(flags | (i + 1 < parts.Length ? Next : 0)), (ushort)(i + 1));
        }
        return address;
    }

    private int AddSplit(ReadOnlySpan<Part> parts, bool indirect)
    {
        int slots = indirect ? 1 : parts.Length;
        ushort head = _freeHeads.Pop();
        ushort at = head;
        for (int i = 0; i < slots; i++)
        {
            ushort next = i + 1 < slots ? _freeHeads.Pop() : (ushort)0;
            _nextOf[at] = next;
            if (indirect)
                Put(_descriptors.Span[(at * 16)..], Table(at, parts), (uint)parts.Length * 16, Indirect, 0);
            else
                Put(_descriptors.Span[(at * 16)..], parts[i].Address, parts[i].Length, (ushort)((parts[i].DeviceWrites ? Write : 0) | (i + 1 < slots ? Next : 0)), next);
            at = next;
        }
        _lengthOf[head] = (ushort)slots;
        Word(_driver, 4 + 2 * (_available % Size)) = head;
        _available++;
        Volatile.Write(ref Word(_driver, 2), _available);
        return head;
    }

    private int AddPacked(ReadOnlySpan<Part> parts, bool indirect)
    {
        int slots = indirect ? 1 : parts.Length;
        ushort id = _freeHeads.Pop();
        int first = _available;
        ushort firstFlags = 0;
        for (int i = 0; i < slots; i++)
        {
            ushort flags = (ushort)(_availableWrap ? 1 << 7 : 1 << 15);
            if (!indirect)
                flags |= (ushort)((parts[i].DeviceWrites ? Write : 0) | (i + 1 < slots ? Next : 0));
            else
                flags |= Indirect;
            Span<byte> slot = _descriptors.Span[(_available * 16)..];
            MemoryMarshal.Write(slot, indirect ? Table(_available, parts) : parts[i].Address);
            MemoryMarshal.Write(slot[8..], indirect ? (uint)parts.Length * 16 : parts[i].Length);
            MemoryMarshal.Write(slot[12..], id);
            // The first descriptor's flags make the whole chain available: they come last.
            if (i == 0)
                firstFlags = flags;
            else
                MemoryMarshal.Write(slot[14..], flags);
            if (++_available == Size)
            {
                _available = 0;
                _availableWrap = !_availableWrap;
            }
        }
        _lengthOf[id] = (ushort)slots;
        Volatile.Write(ref Word(_descriptors, first * 16 + 14), firstFlags);
        return id;
    }

    private bool TakePacked(out int id, out uint written)
    {
        id = -1;
        written = 0;
        ushort flags = Volatile.Read(ref Word(_descriptors, _used * 16 + 14));
        if (((flags & 1 << 7) != 0) != _usedWrap || ((flags & 1 << 15) != 0) != _usedWrap)
            return false;
        id = Word(_descriptors, _used * 16 + 12);
        written = Double(_descriptors, _used * 16 + 8);
        int slots = _lengthOf[id];
        int next = _used + slots;
        if (next >= Size)
        {
            next -= Size;
            _usedWrap = !_usedWrap;
        }
        _used = (ushort)next;
        _freeHeads.Push((ushort)id);
        _freeSlots += slots;
        if (_eventIndex)
            WantInterrupts(true);
        return true;
    }

    private bool NeedsKickPacked()
    {
        ushort flags = (ushort)(Volatile.Read(ref Word(_device, 2)) & 3);
        // With an event index this driver tells the device more often than it has to, which is allowed.
        return flags != 1;
    }
}

/// <summary>A driver of a device over its memory-mapped registers (virtio 1.2, 4.2).</summary>
public sealed class ModelDriver
{
    public const ulong RingIndirect = 1ul << 28;
    public const ulong RingEventIndex = 1ul << 29;
    public const ulong Version1 = 1ul << 32;
    public const ulong RingPacked = 1ul << 34;

    private readonly VirtioMmio _registers;
    private readonly Doorbell[] _doorbells;
    private int _kicks;
    private readonly VirtioDevice _device;
    private readonly GuestMemory _memory;

    public ModelDriver(VirtioDevice device, GuestMemory memory)
    {
        _device = device;
        _memory = memory;
        Irq = new ProbeLine();
        _registers = new VirtioMmio(device, Irq);
        _doorbells = [.. _registers.Doorbells];
    }

    internal ProbeLine Irq { get; }

    public uint this[int register]
    {
        get => (uint)_registers.Read((ulong)register, AccessSize.Dword);
        set => _registers.Write((ulong)register, AccessSize.Dword, value);
    }

    public uint Status
    {
        get => this[0x70];
        set => this[0x70] = value;
    }

    /// <summary>Goes through the initialisation of 3.1.1 up to DRIVER_OK.</summary>
    /// <param name="features">What to take of what is offered.</param>
    /// <param name="at">Where in memory the queues go, 1 MiB each.</param>
    public ModelQueue[] Start(ulong features, ushort size, ulong at)
    {
        Status = 0;
        Status = 1;
        Status = 3;
        ulong accepted = Offered & features;
        for (uint word = 0; word < 2; word++)
        {
            this[0x24] = word;
            this[0x20] = (uint)(accepted >> (int)word * 32);
        }
        Status = 11;
        if ((Status & 8) == 0)
            throw new InvalidOperationException($"the device refuses the features {accepted:x}");
        ModelQueue[] queues = new ModelQueue[_device.Queues.Length];
        for (int i = 0; i < queues.Length; i++)
        {
            ModelQueue queue = new(_memory, i, size, at + (ulong)i * 0x10_0000, (accepted & RingPacked) != 0, (accepted & RingEventIndex) != 0);
            Enable(queue);
            queues[i] = queue;
        }
        Status = 15;
        return queues;
    }

    public ulong Offered
    {
        get
        {
            this[0x14] = 1;
            ulong high = this[0x10];
            this[0x14] = 0;
            return high << 32 | this[0x10];
        }
    }

    public void Enable(ModelQueue queue)
    {
        this[0x30] = (uint)queue.Index;
        this[0x38] = queue.Size;
        SetAddress(0x80, queue.Descriptors);
        SetAddress(0x90, queue.Driver);
        SetAddress(0xa0, queue.Device);
        this[0x44] = 1;
    }

    public void SetAddress(int register, ulong address)
    {
        this[register] = (uint)address;
        this[register + 4] = (uint)(address >> 32);
    }

    /// <summary>Tells of buffers: by a write that comes to the device, and every other time as an accelerator does that takes the write for itself.</summary>
    public void Kick(int queue)
    {
        Doorbell doorbell = _kicks++ % 2 == 0 ? default : _doorbells.FirstOrDefault(d => d.Match == (ulong)queue);
        if (doorbell.Bell is { } bell)
            bell.Signal();
        else
            this[0x50] = (uint)queue;
    }

    /// <summary>Waits until a buffer comes back.</summary>
    public (int Id, uint Written) Wait(ModelQueue queue, int milliseconds = 120_000)
    {
        int id = -1;
        uint written = 0;
        if (!SpinWait.SpinUntil(() => queue.TryTake(out id, out written), milliseconds))
            throw new TimeoutException($"the device answered nothing; status {Status:x}");
        return (id, written);
    }
}
