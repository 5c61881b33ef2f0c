using System;
using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>What a vCPU is connected to.</summary>
public sealed record KvmVcpuWiring
{
    public required PortBus Ports { get; init; }

    public required MmioBus Mmio { get; init; }

    public required ILocalApic Apic { get; init; }

    public required VmClock Clock { get; init; }

    /// <summary>The processor model's CPUID leaves for this vCPU; those that KVM does not support are taken out.</summary>
    public required IReadOnlyList<CpuidEntry> Cpuid { get; init; }

    /// <summary>Family, model and stepping, as INIT leaves them in EDX.</summary>
    public required uint Signature { get; init; }

    /// <summary>Executes what KVM gives up on; null: the vCPU fails there.</summary>
    public IInstructionRescue? Rescue { get; init; }

    /// <summary>Counts the rescued instructions of the VM.</summary>
    public RescueLog? RescueLog { get; init; }

    /// <summary>Hears of what the guest asked for in vain, one line each, at a limited rate.</summary>
    public Action<string>? Log { get; init; }
}
