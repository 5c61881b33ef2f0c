using System;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Chipset;

/// <summary>
/// Port 61h: the gate of PIT counter 2, the speaker, and the refresh toggle that old software times loops with (82371SB
/// datasheet, "NMI Status and Control").
/// </summary>
public sealed class SpeakerGate(VmClock clock, Pit8254 pit) : IPortDevice, IStateful<SpeakerGate.State>, IResettable
{
    /// <summary>The port it sits at.</summary>
    public const ushort Port = 0x61;

    /// <summary>Nanoseconds between two memory refreshes: 18 pulses of the 1.193182 MHz clock.</summary>
    private const long RefreshPeriod = 15_086;

    [Flags]
    private enum Bits : byte
    {
        None = 0,
        Gate2 = 1 << 0,
        SpeakerData = 1 << 1,
        ParityCheckDisable = 1 << 2,
        ChannelCheckDisable = 1 << 3,
        Writable = Gate2 | SpeakerData | ParityCheckDisable | ChannelCheckDisable,
        RefreshToggle = 1 << 4,
        Output2 = 1 << 5,
    }

    /// <summary>All guest-visible state: bits 3:0 of the port.</summary>
    public record struct State(byte Control);

    // State
    private readonly Lock _lock = new();
    private State _state;

    public uint ReadPort(ushort port, AccessSize size)
    {
        Bits value = (clock.Now / RefreshPeriod & 1) != 0 ? Bits.RefreshToggle : Bits.None;
        if (pit.Output2)
            value |= Bits.Output2;
        lock (_lock)
            return (uint)value | _state.Control;
    }

    public void WritePort(ushort port, AccessSize size, uint value)
    {
        lock (_lock)
        {
            _state.Control = (byte)(value & (uint)Bits.Writable);
            pit.SetGate2((value & (uint)Bits.Gate2) != 0);
        }
    }

    public void Reset()
    {
        lock (_lock)
        {
            _state = default;
            pit.SetGate2(false);
        }
    }

    public State Save()
    {
        lock (_lock)
            return _state;
    }

    /// <summary>The gate itself is in the PIT's state.</summary>
    public void Restore(in State state)
    {
        lock (_lock)
            _state = state;
    }
}
