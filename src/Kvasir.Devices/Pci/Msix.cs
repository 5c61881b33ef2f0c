using System;
using System.Buffers.Binary;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Pci;

/// <summary>
/// MSI-X (PCI Local Bus specification 3.0, 6.8.2): a table of messages with a mask bit each, and pending bits for those that came while masked.
/// The table stands at the start of its region, the pending bits in the region's second half.
/// </summary>
public sealed class Msix : IMmioDevice
{
    public const int MaximumVectors = 2048;

    /// <summary>A vector register's value for "none" in devices that let the driver choose.</summary>
    public const ushort NoVector = 0xffff;

    private const int EntrySize = 16;
    private const ushort Enable = 1 << 15;
    private const ushort FunctionMask = 1 << 14;

    private enum Field
    {
        AddressLow = 0,
        AddressHigh = 4,
        Data = 8,
        Control = 12,
    }

    // Configuration
    private readonly int _capability;
    private readonly ulong _pendingOffset;

    // Wiring
    private readonly PciFunction _function;

    // State
    private readonly Lock _lock = new();
    private readonly byte[] _table;
    private readonly ulong[] _pending;

    internal Msix(PciFunction function, int bar, int vectors)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(vectors, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(vectors, MaximumVectors);
        _function = function;
        Vectors = vectors;
        _table = new byte[vectors * EntrySize];
        _pending = new ulong[(vectors + 63) / 64];
        ulong half = Math.Max(2048, System.Numerics.BitOperations.RoundUpToPowerOf2((uint)_table.Length));
        _pendingOffset = half;
        byte[] body = new byte[10];
        BinaryPrimitives.WriteUInt16LittleEndian(body, (ushort)(vectors - 1));
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(2), (uint)bar);
        BinaryPrimitives.WriteUInt32LittleEndian(body.AsSpan(6), (uint)(half | (uint)bar));
        _capability = function.AddCapability(PciCapabilityId.Msix, body);
        function.Writable16(_capability + 2, Enable | FunctionMask);
        function.AddMemoryBar(bar, PciBarKind.Memory32, half * 2, this, AccessSize.Qword);
        Reset();
    }

    public int Vectors { get; }

    /// <summary>The driver has switched it on: legacy interrupts and MSI are off then.</summary>
    public bool Enabled => (_function.Get16(_capability + 2) & Enable) != 0;

    private bool Masked => (_function.Get16(_capability + 2) & FunctionMask) != 0;

    /// <summary>Sends a vector's message, or notes it as pending while it is masked. Any thread; vectors that are not there are ignored.</summary>
    public void Send(int vector)
    {
        if ((uint)vector >= (uint)Vectors)
            return;
        ulong address;
        uint data;
        lock (_lock)
        {
            if (!Enabled)
                return;
            if (Masked || (Word(vector, Field.Control) & 1) != 0)
            {
                _pending[vector / 64] |= 1ul << (vector & 63);
                return;
            }
            (address, data) = Message(vector);
        }
        _function.SendMsi(address, data);
    }

    /// <summary>Whether a vector waits for its unmasking.</summary>
    public bool IsPending(int vector)
    {
        lock (_lock)
            return (_pending[vector / 64] >> (vector & 63) & 1) != 0;
    }

    public ulong Read(ulong offset, AccessSize size)
    {
        // Software is told to use whole double words; what else it does reads as what lies there.
        int bytes = (int)size;
        ulong value = 0;
        lock (_lock)
        {
            for (int i = 0; i < bytes; i++)
                value |= (ulong)ReadByte(offset + (ulong)i) << i * 8;
        }
        return value;
    }

    public void Write(ulong offset, AccessSize size, ulong value)
    {
        int bytes = (int)size;
        if (offset + (ulong)bytes > (ulong)_table.Length || (bytes < 4) || (offset & 3) != 0)
            return;
        lock (_lock)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(_table.AsSpan((int)offset), (uint)value);
            if (bytes == 8)
                BinaryPrimitives.WriteUInt32LittleEndian(_table.AsSpan((int)offset + 4), (uint)(value >> 32));
        }
        Release((int)offset / EntrySize);
    }

    internal void Reset()
    {
        lock (_lock)
        {
            Array.Clear(_table);
            Array.Clear(_pending);
            for (int vector = 0; vector < Vectors; vector++)
                _table[vector * EntrySize + (int)Field.Control] = 1;
        }
    }

    internal void ConfigWritten(int offset, int bytes)
    {
        if (offset >= _capability + 4 || offset + bytes <= _capability + 2)
            return;
        for (int vector = 0; vector < Vectors; vector++)
            Release(vector);
    }

    /// <summary>Bytes of what <see cref="SaveTable"/> gives.</summary>
    internal int StateSize => _table.Length + _pending.Length * 8;

    internal byte[] SaveTable()
    {
        lock (_lock)
        {
            byte[] all = new byte[StateSize];
            _table.CopyTo(all, 0);
            Buffer.BlockCopy(_pending, 0, all, _table.Length, _pending.Length * 8);
            return all;
        }
    }

    internal void RestoreTable(byte[] all)
    {
        lock (_lock)
        {
            Array.Copy(all, _table, _table.Length);
            Buffer.BlockCopy(all, _table.Length, _pending, 0, _pending.Length * 8);
        }
    }

    /// <summary>Sends what was pending, where nothing masks it any more.</summary>
    private void Release(int vector)
    {
        ulong address;
        uint data;
        lock (_lock)
        {
            ulong bit = 1ul << (vector & 63);
            if ((_pending[vector / 64] & bit) == 0 || !Enabled || Masked || (Word(vector, Field.Control) & 1) != 0)
                return;
            _pending[vector / 64] &= ~bit;
            (address, data) = Message(vector);
        }
        _function.SendMsi(address, data);
    }

    private byte ReadByte(ulong offset)
    {
        if (offset < (ulong)_table.Length)
            return _table[offset];
        ulong pending = offset - _pendingOffset;
        if (offset >= _pendingOffset && pending < (ulong)_pending.Length * 8)
            return (byte)(_pending[pending / 8] >> (int)(pending % 8) * 8);
        return 0;
    }

    private (ulong Address, uint Data) Message(int vector) =>
        (Word(vector, Field.AddressLow) & ~3u | (ulong)Word(vector, Field.AddressHigh) << 32, Word(vector, Field.Data));

    private uint Word(int vector, Field field) => BinaryPrimitives.ReadUInt32LittleEndian(_table.AsSpan(vector * EntrySize + (int)field));
}
