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

    /// <summary>Nanoseconds that the guest needs between two timer interrupts to get anything else done; 0: any.</summary>
    long TimerSpacing => 0;

    /// <summary>Takes doorbells; null: each write goes to its device.</summary>
    IDoorbellTaker? Doorbells => null;

    /// <summary>
    /// RESET for what the accelerator has of its own: its local APICs get the state that the board's have, which they were made with. No vCPU runs.
    /// </summary>
    void Reset()
    {
    }

    /// <summary>The state of the interrupt controllers that are the accelerator's; null: all are the board's. All vCPUs stand.</summary>
    InterruptControllers? TakeControllers() => null;

    /// <summary>Puts such a state in, wherever it was taken from. All vCPUs stand.</summary>
    void GiveControllers(InterruptControllers state)
    {
    }

    /// <summary>The VM stands from now on: so does time that the accelerator tells the guest. All vCPUs stand.</summary>
    void Pause()
    {
    }

    /// <summary>It goes on.</summary>
    void Resume()
    {
    }

    /// <summary>Makes vCPU <paramref name="index"/> in its power-on state. The board disposes it, before the factory.</summary>
    IVcpu Create(int index, ILocalApic apic);
}

/// <summary>Makes an accelerator for a board's memory, buses and time.</summary>
public delegate IProcessorFactory ProcessorSource(GuestMemory memory, PortBus ports, MmioBus mmio, VmClock clock);
