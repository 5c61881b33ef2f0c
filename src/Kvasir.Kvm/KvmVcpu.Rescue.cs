using System.Diagnostics;
using Kvasir.Core;
using Kvasir.Linux;

namespace Kvasir.Kvm;

/// <content>Going on where KVM gives up.</content>
public sealed unsafe partial class KvmVcpu
{
    /// <summary>Has the software CPU execute the instruction that KVM's emulator does not know.</summary>
    private VcpuExit? Rescue()
    {
        if (_wiring.Rescue is not { } rescue)
            return Fail("KVM cannot execute the instruction");
        ulong bytes0 = Page->InternalData1;
        ulong bytes1 = Page->InternalData2;
        long begun = Stopwatch.GetTimestamp();
        GetState(out CpuState state);
        return Execute(rescue, ref state, begun, bytes0, bytes1);
    }

    private VcpuExit? Execute(IInstructionRescue rescue, ref CpuState state, long begun, ulong bytes0, ulong bytes1)
    {
        ulong rip = state.Rip;
        ulong code = state.Cs.Base;
        RescueOutcome outcome = rescue.Execute(ref state);
        // A #UD that the software CPU raised is one: the breakpoint on its handler must not question it again.
        if (outcome == RescueOutcome.Executed && _invalidOpcodeHandler != 0 && state.Rip == _invalidOpcodeHandler)
            outcome = rescue.Execute(ref state);
        try
        {
            // A KVM that gives up once does so again: from now on it leaves the registers in the shared page each time that it comes back.
            if (Page->ValidRegisters == 0 && _vm.SharesRegisters)
                Page->ValidRegisters = KvmSyncRegisters.All;
            WriteState(in state, later: true);
        }
        catch (LinuxException e)
        {
            FailureReport = rescue.Describe(in state, $"KVM could not execute an instruction, and does not take the state that it leads to: {e.Message}");
            return VcpuExit.Failure;
        }
        _wiring.RescueLog?.Add(Index, code + rip, bytes0, bytes1, begun);
        if (outcome != RescueOutcome.TripleFault)
            return null;
        _activity = VcpuActivity.Shutdown;
        return ReportTripleFault();
    }

    /// <summary>
    /// An event that KVM has accepted but not delivered when the run ends is no part of <see cref="CpuState"/>: it is delivered here, so that the state
    /// is whole.
    /// </summary>
    private void SettleEvents()
    {
        if (_wiring.Rescue is not { } rescue)
            return;
        FlushRegisters();
        KvmEvents events;
        Call(KvmRequest.GetEvents, &events, "read the pending events");
        bool exception = (events.ExceptionInjected | events.ExceptionPending) != 0;
        if (!exception && events.InterruptInjected == 0)
            return;
        GetState(out CpuState state);
        byte vector = exception ? events.ExceptionVector : events.InterruptVector;
        uint? code = exception && events.ExceptionHasCode != 0 ? events.ExceptionCode : null;
        if (rescue.Deliver(ref state, vector, code, external: !exception) == RescueOutcome.TripleFault)
            state.Activity = VcpuActivity.Shutdown;
        WriteState(in state);
    }
}
