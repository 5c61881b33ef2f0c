using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// The A20 line: whether address bit 20 reaches the bus. The keyboard controller and port 92h both drive it; the last one that
/// did wins, as on
/// chipsets that snoop the controller's commands.
/// </summary>
public sealed class A20Gate : IStateful<A20Gate.State>, IResettable
{
    /// <summary>All guest-visible state.</summary>
    public record struct State(bool Enabled);

    // Wiring
    private readonly Action<bool> _changed;

    // State
    private readonly Lock _lock = new();
    private State _state = new(Enabled: true);

    /// <param name="changed">Told of each change, under the gate's lock.</param>
    public A20Gate(Action<bool> changed)
    {
        _changed = changed;
    }

    /// <summary>Address bit 20 is passed on: as after reset, and as every operating system since DOS wants it.</summary>
    public bool Enabled
    {
        get
        {
            lock (_lock)
                return _state.Enabled;
        }
    }

    public void Set(bool enabled)
    {
        lock (_lock)
        {
            if (enabled == _state.Enabled)
                return;
            _state.Enabled = enabled;
            _changed(enabled);
        }
    }

    public void Reset() => Set(true);

    public State Save() => new(Enabled);

    public void Restore(in State state)
    {
        lock (_lock)
        {
            _state = state;
            _changed(state.Enabled);
        }
    }
}

/// <summary>Port 92h, system control port A of the PS/2: fast A20 and fast reset.</summary>
public sealed class FastA20Port(A20Gate a20, IPowerControl power) : IPortDevice, IStateful<FastA20Port.State>, IResettable
{
    public const ushort Port = 0x92;

    [Flags]
    private enum Bits : byte
    {
        None = 0,
        Reset = 1 << 0,
        A20 = 1 << 1,
        Kept = 0xff & ~A20,
    }

    /// <summary>All guest-visible state: what was written, without A20, which has its own.</summary>
    public record struct State(byte Value);

    // State
    private readonly Lock _lock = new();
    private State _state;

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
            return (uint)(_state.Value | (a20.Enabled ? (byte)Bits.A20 : 0));
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        bool reset;
        lock (_lock)
        {
            // Only the rise of bit 0 resets.
            reset = (value & (uint)Bits.Reset) != 0 && (_state.Value & (byte)Bits.Reset) == 0;
            _state.Value = (byte)(value & (uint)Bits.Kept);
            a20.Set((value & (uint)Bits.A20) != 0);
        }
        if (reset)
            power.Reset();
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
}

/// <summary>
/// The reset control register at CF9h (82371SB and ICH9 datasheets, "RST_CNT"), which the FADT names as the reset register.
/// </summary>
public sealed class ResetControlPort(IPowerControl power) : IPortDevice, IStateful<ResetControlPort.State>, IResettable
{
    public const ushort Port = 0xcf9;

    [Flags]
    private enum Bits : byte
    {
        None = 0,
        SystemReset = 1 << 1,
        ResetCpu = 1 << 2,
        FullReset = 1 << 3,

        /// <summary>The trigger bit reads as what was written last, until the reset clears it.</summary>
        Kept = SystemReset | ResetCpu | FullReset,
    }

    /// <summary>All guest-visible state.</summary>
    public record struct State(byte Value);

    // State
    private readonly Lock _lock = new();
    private State _state;

    public uint ReadPort(ushort port, AccessSize size)
    {
        lock (_lock)
            return _state.Value;
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        bool reset;
        lock (_lock)
        {
            // Soft and hard reset differ in nothing that a guest could see here; both begin with the rise of bit 2.
            reset = (value & (uint)Bits.ResetCpu) != 0 && (_state.Value & (byte)Bits.ResetCpu) == 0;
            _state.Value = (byte)(value & (uint)Bits.Kept);
        }
        if (reset)
            power.Reset();
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
}
