using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Firmware;

/// <summary>
/// The firmware configuration device (QEMU documentation, "QEMU Firmware Configuration (fw_cfg) Device"): ports 510h (selector),
/// 511h (data) and
/// 514h-51Bh (DMA address, big-endian). Items are filled in before the guest runs.
/// </summary>
/// <remarks>
/// A DMA transfer is over when the write that starts it returns. Descriptors that point outside of memory set the error bit,
/// where even that can be written.
/// </remarks>
public sealed class FwCfg : IPortDevice, IStateful<FwCfg.State>, IResettable
{
    public const ushort SelectorPort = 0x510;
    public const ushort DataPort = 0x511;
    public const ushort DmaHighPort = 0x514;
    public const ushort DmaLowPort = 0x518;

    /// <summary>Keys with an architectural meaning.</summary>
    public const ushort SignatureKey = 0x0000;
    public const ushort FeaturesKey = 0x0001;
    public const ushort DirectoryKey = 0x0019;

    /// <summary>The first key given to a named file; there is room for <see cref="FileSlots"/> of them.</summary>
    public const ushort FirstFileKey = 0x0020;

    public const int FileSlots = 0x3fe0;

    /// <summary>Longest name of a file, in bytes without the final zero.</summary>
    public const int MaximumName = 55;

    private const int ChunkSize = 4096;
    private const int DirectoryEntrySize = 64;

    /// <summary>Keys are 14 bits; bit 14 once chose writing, bit 15 the architecture's own items.</summary>
    private const ushort KeyMask = 0xbfff;

    /// <summary>"QEMU CFG", what reads of the DMA address give.</summary>
    private const ulong DmaSignature = 0x5145_4d55_2043_4647;

    [Flags]
    private enum DmaControl : uint
    {
        None = 0,
        Error = 1 << 0,
        Read = 1 << 1,
        Skip = 1 << 2,
        Select = 1 << 3,
        Write = 1 << 4,
    }

    /// <summary>
    /// All guest-visible state. The contents of writable items are not part of it; <see cref="WritableItems"/> gives them.
    /// </summary>
    public record struct State
    {
        public ushort Selected;
        public uint Offset;
        public uint DmaHigh;
    }

    private sealed class Item(byte[] content, bool writable, Action<ReadOnlyMemory<byte>>? written)
    {
        public byte[] Content { get; } = content;

        public bool Writable { get; } = writable;

        public Action<ReadOnlyMemory<byte>>? Written { get; } = written;
    }

    // Wiring
    private readonly GuestMemory _memory;
    private readonly SortedDictionary<string, (ushort Key, int Size)> _files = new(StringComparer.Ordinal);
    private readonly Dictionary<ushort, Item> _items = [];
    private readonly byte[] _chunk = new byte[ChunkSize];

    // State
    private readonly Lock _lock = new();
    private State _state;

    /// <param name="memory">Where DMA reads and writes.</param>
    public FwCfg(GuestMemory memory)
    {
        _memory = memory;
        AddItem(SignatureKey, "QEMU"u8.ToArray());
        // Traditional and DMA interfaces.
        AddItem(FeaturesKey, [3, 0, 0, 0]);
        AddItem(DirectoryKey, new byte[4]);
    }

    /// <summary>Keys and contents of the items that the guest may write, for snapshots.</summary>
    public IEnumerable<(ushort Key, byte[] Content)> WritableItems
    {
        get
        {
            lock (_lock)
            {
                List<(ushort, byte[])> result = [];
                foreach ((ushort key, Item item) in _items)
                {
                    if (item.Writable)
                        result.Add((key, [.. item.Content]));
                }
                return result;
            }
        }
    }

    /// <summary>Claims its ports.</summary>
    public void Map(PortBus bus)
    {
        bus.Map(SelectorPort, 2, this, AccessSize.Word);
        bus.Map(DmaHighPort, 8, this, AccessSize.Dword);
    }

    /// <summary>Puts in an item under a number of its own, in the place of an older one.</summary>
    public void AddItem(ushort key, byte[] content)
    {
        lock (_lock)
            _items[(ushort)(key & KeyMask)] = new Item(content, writable: false, written: null);
    }

    /// <summary>Puts in a named file, in the place of an older one of the same name. The directory lists files by name.</summary>
    /// <param name="name">ASCII, at most <see cref="MaximumName"/> characters: "etc/acpi/tables".</param>
    /// <param name="content">Not copied.</param>
    /// <param name="writable">The guest may write to it, by DMA.</param>
    /// <param name="written">Told of the whole content after each such write, on the vCPU's thread.</param>
    /// <returns>The key under which the guest finds it.</returns>
    /// <exception cref="ArgumentException">The name is empty, too long or not ASCII, or there is no room for another file.</exception>
    public ushort AddFile(string name, byte[] content, bool writable = false, Action<ReadOnlyMemory<byte>>? written = null)
    {
        if (name.Length is 0 or > MaximumName || !Ascii.IsValid(name))
            throw new ArgumentException($"'{name}' cannot be the name of a fw_cfg file: 1 to {MaximumName} ASCII characters", nameof(name));
        lock (_lock)
        {
            ushort key;
            if (_files.TryGetValue(name, out (ushort Key, int Size) old))
                key = old.Key;
            else if (_files.Count < FileSlots)
                key = (ushort)(FirstFileKey + _files.Count);
            else
                throw new ArgumentException($"there is no room for the fw_cfg file '{name}': {FileSlots} are there already", nameof(name));
            _files[name] = (key, content.Length);
            _items[key] = new Item(content, writable, written);
            _items[DirectoryKey] = new Item(BuildDirectory(), writable: false, written: null);
            return key;
        }
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
        {
            switch (port)
            {
                case SelectorPort:
                    // The selector cannot be read; a wider read does not reach the data port either.
                    return 0;
                case DataPort:
                    return ReadByte();
                case >= DmaHighPort and < DmaHighPort + 8:
                    ulong shifted = BinaryPrimitives.ReverseEndianness(DmaSignature) >> (port - DmaHighPort) * 8;
                    return (uint)shifted;
                default:
                    return uint.MaxValue;
            }
        }
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        Action<ReadOnlyMemory<byte>>? written = null;
        byte[]? content = null;
        lock (_lock)
        {
            switch (port)
            {
                case SelectorPort when size >= AccessSize.Word:
                    Select((ushort)value);
                    break;
                case DmaHighPort when size == AccessSize.Dword:
                    _state.DmaHigh = BinaryPrimitives.ReverseEndianness(value);
                    break;
                case DmaLowPort when size == AccessSize.Dword:
                    ulong address = (ulong)_state.DmaHigh << 32 | BinaryPrimitives.ReverseEndianness(value);
                    _state.DmaHigh = 0;
                    Item? target = Transfer(address);
                    written = target?.Written;
                    content = target?.Content;
                    break;
                default:
                    // The data port once took writes; it ignores them since DMA came.
                    break;
            }
        }
        written?.Invoke(content);
    }

    public void Reset()
    {
        lock (_lock)
            _state = default;
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
            _state = state;
    }

    private void Select(ushort key)
    {
        _state.Selected = (ushort)(key & KeyMask);
        _state.Offset = 0;
    }

    private byte ReadByte()
    {
        if (!_items.TryGetValue(_state.Selected, out Item? item) || _state.Offset >= (uint)item.Content.Length)
            return 0;
        return item.Content[_state.Offset++];
    }

    /// <summary>Carries out the descriptor at an address: control, length, address, each big-endian.</summary>
    /// <returns>The item that was written.</returns>
    private Item? Transfer(ulong descriptor)
    {
        Span<byte> fields = stackalloc byte[16];
        if (descriptor > ulong.MaxValue - 16 || !_memory.TryRead(new Gpa(descriptor), fields))
        {
            Complete(descriptor, failed: true);
            return null;
        }
        DmaControl control = (DmaControl)BinaryPrimitives.ReadUInt32BigEndian(fields);
        uint length = BinaryPrimitives.ReadUInt32BigEndian(fields[4..]);
        ulong address = BinaryPrimitives.ReadUInt64BigEndian(fields[8..]);
        if ((control & DmaControl.Select) != 0)
            Select((ushort)((uint)control >> 16));
        _items.TryGetValue(_state.Selected, out Item? item);
        bool fine = true;
        bool wrote = false;
        if ((control & DmaControl.Read) != 0)
        {
            fine = ReadTo(item, address, length);
        }
        else if ((control & DmaControl.Write) != 0)
        {
            fine = item is not null && item.Writable && WriteFrom(item, address, length);
            wrote = fine;
        }
        else if ((control & DmaControl.Skip) != 0)
        {
            Advance(length);
        }
        Complete(descriptor, !fine);
        return wrote ? item : null;
    }

    /// <summary>Tells the guest how it went: the control field becomes 0, or the error bit.</summary>
    private void Complete(ulong descriptor, bool failed)
    {
        Span<byte> control = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32BigEndian(control, failed ? (uint)DmaControl.Error : 0);
        // Where the descriptor is not in memory nothing can be told.
        _ = _memory.TryWrite(new Gpa(descriptor), control);
    }

    /// <summary>Copies an item's bytes to memory; past its end there are zeros.</summary>
    private bool ReadTo(Item? item, ulong address, uint length)
    {
        // Checked as a whole first: a hostile length costs nothing.
        if (!_memory.IsBacked(address, length))
            return false;
        ReadOnlySpan<byte> rest = Rest(item);
        uint take = Math.Min(length, (uint)rest.Length);
        if (!_memory.TryWrite(new Gpa(address), rest[..(int)take]))
            return false;
        Advance(take);
        Array.Clear(_chunk);
        for (uint done = take; done < length;)
        {
            uint run = Math.Min(length - done, ChunkSize);
            if (!_memory.TryWrite(new Gpa(address + done), _chunk.AsSpan(0, (int)run)))
                return false;
            done += run;
        }
        return true;
    }

    private bool WriteFrom(Item item, ulong address, uint length)
    {
        uint room = (uint)item.Content.Length - Math.Min(_state.Offset, (uint)item.Content.Length);
        if (length > room)
            return false;
        if (!_memory.IsBacked(address, length) || !_memory.TryRead(new Gpa(address), item.Content.AsSpan((int)_state.Offset, (int)length)))
            return false;
        Advance(length);
        return true;
    }

    private ReadOnlySpan<byte> Rest(Item? item) =>
        item is null || _state.Offset >= (uint)item.Content.Length ? [] : item.Content.AsSpan((int)_state.Offset);

    private void Advance(uint length) => _state.Offset = length > uint.MaxValue - _state.Offset ? uint.MaxValue : _state.Offset + length;

    /// <summary>The file directory: a count, then size, key, two reserved bytes and the name of each, numbers big-endian.</summary>
    private byte[] BuildDirectory()
    {
        byte[] directory = new byte[4 + _files.Count * DirectoryEntrySize];
        BinaryPrimitives.WriteUInt32BigEndian(directory, (uint)_files.Count);
        int at = 4;
        foreach ((string name, (ushort key, int size)) in _files)
        {
            Span<byte> entry = directory.AsSpan(at, DirectoryEntrySize);
            BinaryPrimitives.WriteUInt32BigEndian(entry, (uint)size);
            BinaryPrimitives.WriteUInt16BigEndian(entry[4..], key);
            Encoding.ASCII.GetBytes(name, entry[8..]);
            at += DirectoryEntrySize;
        }
        return directory;
    }
}
