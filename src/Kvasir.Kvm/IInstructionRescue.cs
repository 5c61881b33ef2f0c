using Kvasir.Core;

namespace Kvasir.Kvm;

/// <summary>How the execution of one instruction outside KVM ended.</summary>
public enum RescueOutcome
{
    /// <summary>It was executed, or the fault it raised was delivered: the vCPU goes on from the new state.</summary>
    Executed,

    /// <summary>A fault while a double fault was delivered.</summary>
    TripleFault,
}

/// <summary>
/// Another processor for the same memory and buses that executes what KVM gives up on. One per vCPU; called from the vCPU's thread, which is not in
/// KVM_RUN meanwhile. Other vCPUs run.
/// </summary>
public interface IInstructionRescue
{
    /// <summary>Executes the instruction at the state's RIP and delivers the fault that it raises, if any.</summary>
    RescueOutcome Execute(ref CpuState state);

    /// <summary>Delivers an event that KVM had accepted but not delivered.</summary>
    /// <param name="state">The vCPU's state before it.</param>
    /// <param name="vector">Its vector.</param>
    /// <param name="errorCode">What the processor pushes, for exceptions that have a code.</param>
    /// <param name="external">An external interrupt or NMI, not an exception.</param>
    RescueOutcome Deliver(ref CpuState state, byte vector, uint? errorCode, bool external);

    /// <summary>Registers and the instructions at RIP, for a person.</summary>
    string Describe(in CpuState state, string reason);
}
