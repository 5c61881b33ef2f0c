using System.Collections.Generic;
using Kvasir.Devices.Chipset;

namespace Kvasir.Machine;

/// <summary>The state of interrupt controllers that are an accelerator's, as the board's own have it, so that a VM can go on where the board's serve, and the other way.</summary>
/// <param name="LocalApics">By vCPU.</param>
/// <param name="Wired">The others; null: they are the board's.</param>
public sealed record InterruptControllers(IReadOnlyList<LocalApic.State> LocalApics, WiredControllers? Wired);

/// <summary>What the wires of a PC's devices lead to, and the timer that goes with it.</summary>
public sealed record WiredControllers(Pic8259.State Pic, IoApic.State IoApic, Pit8254.State Pit);
