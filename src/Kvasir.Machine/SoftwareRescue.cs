using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>The software CPU as the one that executes what KVM gives up on.</summary>
internal sealed class SoftwareRescue(SoftVcpu vcpu) : IInstructionRescue
{
    public RescueOutcome Execute(ref CpuState state)
    {
        vcpu.SetState(in state);
        bool goesOn = vcpu.ExecuteInstruction();
        vcpu.GetState(out state);
        return goesOn ? RescueOutcome.Executed : RescueOutcome.TripleFault;
    }

    public RescueOutcome Deliver(ref CpuState state, byte vector, uint? errorCode, bool external)
    {
        vcpu.SetState(in state);
        bool goesOn = vcpu.DeliverEvent(vector, errorCode, external);
        vcpu.GetState(out state);
        return goesOn ? RescueOutcome.Executed : RescueOutcome.TripleFault;
    }

    public string Describe(in CpuState state, string reason)
    {
        vcpu.SetState(in state);
        return FailureReports.Describe(vcpu, reason);
    }
}
