using Kvasir.Core;

namespace Kvasir.Machine;

/// <summary>The local APIC as a rescuing vCPU sees it: the time stamp counter's offset is KVM's to report, not that of each state that passes through.</summary>
internal sealed class RescueApic(ILocalApic apic) : ILocalApic
{
    public bool HasInterrupt => apic.HasInterrupt;

    public byte TaskPriorityClass
    {
        get => apic.TaskPriorityClass;
        set => apic.TaskPriorityClass = value;
    }

    public ulong Base => apic.Base;

    public long TscOffset { get; set; }

    public IMmioDevice Registers => apic.Registers;

    public int Acknowledge() => apic.Acknowledge();

    public bool TryReadMsr(uint msr, out ulong value) => apic.TryReadMsr(msr, out value);

    public bool TryWriteMsr(uint msr, ulong value) => apic.TryWriteMsr(msr, value);

    public void Init() => apic.Init();
}
