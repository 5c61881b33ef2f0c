using System;
using System.Buffers.Binary;
using System.Threading;

namespace Kvasir.Devices.Pci;

/// <summary>MSI with 64-bit addresses and per-vector masking (PCI Local Bus specification 3.0, 6.8.1). All its registers are in configuration space.</summary>
public sealed class Msi
{
    private const ushort Enable = 1 << 0;
    private const ushort Wide = 1 << 7;
    private const ushort Maskable = 1 << 8;

    private enum Offset
    {
        Control = 2,
        Address = 4,
        AddressHigh = 8,
        Data = 12,
        Mask = 16,
        Pending = 20,
        End = 24,
    }

    // Configuration
    private readonly int _capability;
    private readonly int _vectors;

    // Wiring
    private readonly PciFunction _function;

    // State
    private readonly Lock _lock = new();

    internal Msi(PciFunction function, int vectors)
    {
        if (vectors is < 1 or > 32 || !System.Numerics.BitOperations.IsPow2(vectors))
            throw new ArgumentOutOfRangeException(nameof(vectors));
        _function = function;
        _vectors = vectors;
        byte[] body = new byte[(int)Offset.End - 2];
        int log = System.Numerics.BitOperations.Log2((uint)vectors);
        BinaryPrimitives.WriteUInt16LittleEndian(body, (ushort)(Wide | Maskable | log << 1));
        _capability = function.AddCapability(PciCapabilityId.Msi, body);
        function.Writable16(_capability + (int)Offset.Control, Enable | 7 << 4);
        function.Writable32(_capability + (int)Offset.Address, ~3u);
        function.Writable32(_capability + (int)Offset.AddressHigh, uint.MaxValue);
        function.Writable16(_capability + (int)Offset.Data, ushort.MaxValue);
        function.Writable32(_capability + (int)Offset.Mask, vectors == 32 ? uint.MaxValue : (1u << vectors) - 1);
    }

    public bool Enabled => (_function.Get16(_capability + (int)Offset.Control) & Enable) != 0;

    /// <summary>Sends a vector's message, or notes it as pending while it is masked. Any thread.</summary>
    public void Send(int vector)
    {
        lock (_lock)
        {
            if (!Enabled)
                return;
            // A driver that was given fewer vectors gets them folded onto those it has.
            int enabled = 1 << (_function.Get16(_capability + (int)Offset.Control) >> 4 & 7);
            vector &= Math.Min(enabled, _vectors) - 1;
            if ((Get(Offset.Mask) >> vector & 1) != 0)
            {
                Set(Offset.Pending, Get(Offset.Pending) | 1u << vector);
                return;
            }
        }
        Post(vector);
    }

    internal void Reset()
    {
    }

    internal void ConfigWritten(int offset, int bytes)
    {
        if (offset >= _capability + (int)Offset.End || offset + bytes <= _capability)
            return;
        uint release;
        lock (_lock)
        {
            release = Enabled ? Get(Offset.Pending) & ~Get(Offset.Mask) : 0;
            if (release != 0)
                Set(Offset.Pending, Get(Offset.Pending) & ~release);
        }
        for (; release != 0; release &= release - 1)
            Post(System.Numerics.BitOperations.TrailingZeroCount(release));
    }

    private void Post(int vector)
    {
        ulong address = Get(Offset.Address) & ~3u | (ulong)Get(Offset.AddressHigh) << 32;
        _function.SendMsi(address, (Get(Offset.Data) & 0xffff) | (uint)vector);
    }

    private uint Get(Offset offset) => _function.Load(_capability + (int)offset, 4);

    private void Set(Offset offset, uint value) => _function.Store(_capability + (int)offset, 4, value);
}
