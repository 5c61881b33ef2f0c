using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Debug;

/// <summary>
/// A port that keeps the last byte written: 80h shows POST codes, and like EDh it is written for the delay of a bus cycle.
/// </summary>
public sealed class LatchPort : IPortDevice, IStateful<LatchPort.State>, IResettable
{
    /// <summary>POST codes.</summary>
    public const ushort PostCode = 0x80;

    /// <summary>The delay port that Linux uses where 80h does harm.</summary>
    public const ushort Delay = 0xed;

    /// <summary>All guest-visible state.</summary>
    public record struct State(byte Value);

    // State
    private volatile byte _value;

    /// <summary>The byte written last.</summary>
    public byte Value => _value;

    public uint ReadPort(ushort port, AccessSize size) => _value;

    public void WritePort(ushort port, AccessSize size, uint value) => _value = (byte)value;

    public void Reset() => _value = 0;

    public State Save() => new(_value);

    public void Restore(in State state) => _value = state.Value;
}
