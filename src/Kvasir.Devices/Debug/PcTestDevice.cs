using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Debug;

/// <summary>
/// The device that bare-metal test suites know as pc-testdev: a 4-byte register at ports E0h (any width) and E8h (byte by byte),
/// a page flush port
/// E4h, interrupt lines at ports 2000h+n, and 64 KiB of device memory at FF000000h.
/// </summary>
/// <remarks>
/// The flush port would drop a host mapping of a page so that the next access faults on the host; there is nothing to drop here,
/// so it only takes writes.
/// </remarks>
public sealed class PcTestDevice : IPortDevice, IMmioDevice, IStateful<PcTestDevice.State>, IResettable
{
    public const ushort RegisterPort = 0xe0;
    public const ushort FlushPort = 0xe4;
    public const ushort BytePort = 0xe8;
    public const ushort FirstLinePort = 0x2000;
    public const int LineCount = 24;
    public const ulong MemoryAddress = 0xff00_0000;
    public const int MemorySize = 0x1_0000;

    /// <summary>All guest-visible state but the memory, which <see cref="Memory"/> gives.</summary>
    /// <param name="Register">The 4-byte register.</param>
    /// <param name="Lines">Levels of the interrupt lines.</param>
    public record struct State(uint Register, uint Lines);

    // Wiring
    private readonly IIrqLine[] _lines;

    // State
    private readonly Lock _lock = new();
    private readonly byte[] _memory = new byte[MemorySize];
    private State _state;

    /// <param name="lines">GSIs 0 to 23.</param>
    public PcTestDevice(ReadOnlySpan<IIrqLine> lines)
    {
        if (lines.Length != LineCount)
            throw new ArgumentException($"the test device drives {LineCount} lines, not {lines.Length}", nameof(lines));
        _lines = lines.ToArray();
    }

    /// <summary>The device memory, for snapshots.</summary>
    public Memory<byte> Memory => _memory;

    /// <summary>Claims its ports and its memory.</summary>
    public void Map(PortBus ports, MmioBus mmio)
    {
        ports.Map(RegisterPort, 4, this, AccessSize.Dword);
        ports.Map(FlushPort, 4, this, AccessSize.Dword);
        ports.Map(BytePort, 4, this);
        ports.Map(FirstLinePort, LineCount, this);
        mmio.Map(new Gpa(MemoryAddress), MemorySize, this);
    }

    public uint ReadPort(ushort port, AccessSize size)
    {
        if (!IsRegister(port))
            return uint.MaxValue;
        lock (_lock)
            return _state.Register >> (port & 3) * 8;
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        lock (_lock)
        {
            if (IsRegister(port))
            {
                int shift = (port & 3) * 8;
                uint mask = (size == AccessSize.Dword ? uint.MaxValue : (1u << (int)size * 8) - 1) << shift;
                _state.Register = (_state.Register & ~mask) | (value << shift & mask);
            }
            else if (port >= FirstLinePort)
            {
                int line = port - FirstLinePort;
                uint bit = 1u << line;
                _state.Lines = value != 0 ? _state.Lines | bit : _state.Lines & ~bit;
                _lines[line].Set(value != 0);
            }
        }
    }

    public ulong Read(ulong offset, AccessSize size)
    {
        lock (_lock)
        {
            ulong value = 0;
            for (int i = 0; i < (int)size; i++)
                value |= (ulong)_memory[(int)offset + i] << i * 8;
            return value;
        }
    }

    public void Write(ulong offset, AccessSize size, ulong value)
    {
        lock (_lock)
        {
            for (int i = 0; i < (int)size; i++)
                _memory[(int)offset + i] = (byte)(value >> i * 8);
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            _state = default;
            Array.Clear(_memory);
            DriveLines();
        }
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            DriveLines();
        }
    }

    private static bool IsRegister(ushort port) => port is (>= RegisterPort and < RegisterPort + 4) or (>= BytePort and < BytePort + 4);

    private void DriveLines()
    {
        for (int i = 0; i < LineCount; i++)
            _lines[i].Set((_state.Lines & 1u << i) != 0);
    }
}
