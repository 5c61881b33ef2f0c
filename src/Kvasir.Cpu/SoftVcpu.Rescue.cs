using System.Threading;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Single instructions on behalf of another accelerator, which keeps the vCPU's state and its local APIC.</content>
public sealed unsafe partial class SoftVcpu
{
    /// <summary>Executes one instruction and delivers the fault that it raises. Interrupts, NMIs and kicks are the other accelerator's.</summary>
    /// <returns>False: triple fault.</returns>
    public bool ExecuteInstruction()
    {
        BeginBorrowed();
        try
        {
            InterruptShadow = false;
            StepOne();
            DeliverFault();
            return _activity != VcpuActivity.Shutdown;
        }
        finally
        {
            Barrier.Leave();
        }
    }

    /// <summary>Delivers an event: an exception, or an external interrupt or NMI.</summary>
    /// <param name="vector">Its vector.</param>
    /// <param name="errorCode">An exception's error code, where it has one.</param>
    /// <param name="external">No exception.</param>
    /// <returns>False: triple fault.</returns>
    public bool DeliverEvent(byte vector, uint? errorCode, bool external)
    {
        BeginBorrowed();
        try
        {
            if (external)
            {
                if (!Interrupts.DeliverExternal(vector))
                    _activity = VcpuActivity.Shutdown;
                return _activity != VcpuActivity.Shutdown;
            }
            _s->FaultAddress = _s->Cr2;
            if (errorCode is { } code)
                Access.Record(_s, (ExceptionVector)vector, code);
            else
                Access.Record(_s, (ExceptionVector)vector);
            DeliverFault();
            return _activity != VcpuActivity.Shutdown;
        }
        finally
        {
            Barrier.Leave();
        }
    }

    /// <summary>Enters guest code without work left by other threads: what they wanted has happened once the barrier lets this vCPU in.</summary>
    private void BeginBorrowed()
    {
        if (CodeCacheFull)
        {
            Barrier.Enter();
            EmptyCodeCache();
            Barrier.Leave();
        }
        Barrier.Enter();
        Interlocked.Exchange(ref _s->Pending, 0);
    }
}
