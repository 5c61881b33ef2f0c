namespace Kvasir.Kvm;

/// <summary>Which interrupt controllers are KVM's own.</summary>
public enum KernelIrqChip
{
    /// <summary>None: all are Kvasir's.</summary>
    Off,

    /// <summary>The local APICs (KVM_CAP_SPLIT_IRQCHIP).</summary>
    Split,

    /// <summary>Local APICs, I/O APIC, 8259s and the PIT (KVM_CREATE_IRQCHIP, KVM_CREATE_PIT2).</summary>
    On,
}
