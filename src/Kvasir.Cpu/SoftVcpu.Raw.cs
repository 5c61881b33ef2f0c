using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Execution without delivery, for tests that compare with another processor.</content>
public sealed unsafe partial class SoftVcpu
{
    /// <summary>Executes one instruction, as <see cref="Step"/>, but delivers nothing: a fault stays recorded in <see cref="Block"/>.</summary>
    /// <returns>The fault's vector, or <see cref="Fault.None"/>.</returns>
    internal byte StepRaw()
    {
        Barrier.Enter();
        try
        {
            InterruptShadow = false;
            _s->FaultVector = Fault.None;
            StepOne();
            return _s->FaultVector;
        }
        finally
        {
            Barrier.Leave();
        }
    }

    /// <summary>Executes blocks as <see cref="Run"/> does until a fault, which stays recorded in <see cref="Block"/>, or a <see cref="Kick"/>.</summary>
    /// <returns>The fault's vector, or <see cref="Fault.None"/> after a kick.</returns>
    internal byte RunRaw()
    {
        Barrier.Enter();
        try
        {
            _s->FaultVector = Fault.None;
            while (_s->FaultVector == Fault.None)
            {
                if (_s->Pending != 0 && TryHandlePending(out _))
                    break;
                InterruptShadow = false;
                if ((_s->SystemFlags & StepFlags) != 0 || Debug.IsActive)
                {
                    StepOne();
                    continue;
                }
                Op* op = Branches.Jump(_s, _s->Rip);
                while (op != null)
                    op = op->Handler(_s, op);
            }
            return _s->FaultVector;
        }
        finally
        {
            Barrier.Leave();
        }
    }
}
