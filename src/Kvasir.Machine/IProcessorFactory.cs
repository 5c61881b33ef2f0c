using System;
using Kvasir.Core;

namespace Kvasir.Machine;

/// <summary>An accelerator as a board needs it: makes the vCPUs, and tells what firmware tables and start-up say of them.</summary>
public interface IProcessorFactory : IDisposable
{
    /// <summary>Family, model and stepping as CPUID leaf 1 gives them in EAX.</summary>
    uint Signature { get; }

    /// <summary>As CPUID leaf 80000008h gives them.</summary>
    int PhysicalAddressBits { get; }

    /// <summary>Interrupt controllers that are the accelerator's; null: the board's serve.</summary>
    IKernelInterrupts? Interrupts => null;

    /// <summary>Takes doorbells; null: each write goes to its device.</summary>
    IDoorbellTaker? Doorbells => null;

    /// <summary>Gives the accelerator's local APICs the state that the board's have, which they were made with. No vCPU runs.</summary>
    void LoadLocalApics()
    {
    }

    /// <summary>Makes vCPU <paramref name="index"/> in its power-on state. The board disposes it, before the factory.</summary>
    IVcpu Create(int index, ILocalApic apic);
}

/// <summary>Makes an accelerator for a board's memory, buses and time.</summary>
public delegate IProcessorFactory ProcessorSource(GuestMemory memory, PortBus ports, MmioBus mmio, VmClock clock);
