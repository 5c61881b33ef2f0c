using System;
using Kvasir.Devices.Serial;

namespace Kvasir.Machine;

/// <summary>What a board is connected to outside the VM.</summary>
public sealed record BoardConnections
{
    /// <summary>Behind the first serial port; null for a board without one.</summary>
    public ICharacterBackend? Serial { get; init; }

    /// <summary>Gives the back end of a debug console that the user added.</summary>
    public required Func<DeviceSetting, ICharacterBackend> DebugConsole { get; init; }

    /// <summary>The accelerator.</summary>
    public required ProcessorSource Processors { get; init; }
}
