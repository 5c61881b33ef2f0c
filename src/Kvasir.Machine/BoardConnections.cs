using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Devices.Serial;

namespace Kvasir.Machine;

/// <summary>What a board is connected to outside the VM.</summary>
public sealed record BoardConnections
{
    /// <summary>Behind the first serial port; null for a board without one.</summary>
    public ICharacterBackend? Serial { get; init; }

    /// <summary>Gives the back end of a debug console that the user added.</summary>
    public required Func<DeviceSetting, ICharacterBackend> DebugConsole { get; init; }

    public IReadOnlyList<NicConnection> Nics { get; init; } = [];

    /// <summary>The accelerator.</summary>
    public required ProcessorSource Processors { get; init; }

    /// <summary>Hz of the guest's time stamp counter on that accelerator.</summary>
    public ulong TscFrequency { get; init; } = VmClock.DefaultTscFrequency;
}
