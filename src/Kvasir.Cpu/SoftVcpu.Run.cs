using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>The execution loop.</content>
public sealed unsafe partial class SoftVcpu
{
    private const ulong StepFlags = (ulong)(Rflags.TF | Rflags.RF);
    private const int TrailLength = 8;

    // For reports of what went wrong.
    private readonly (ulong Rip, byte Vector)[] _trail = new (ulong, byte)[TrailLength];
    private long _remembered;

    public VcpuExit Run()
    {
        Barrier.Enter();
        try
        {
            while (true)
            {
                if (_s->Pending != 0 && TryHandlePending(out VcpuExit exit))
                    return exit;
                if (_activity != VcpuActivity.Active)
                {
                    if (_activity == VcpuActivity.Shutdown)
                        return ReportTripleFault();
                    if (!TryWake())
                        continue;
                }
                if (NmiWaiting && !NmiBlocked && !InterruptShadow)
                    TakeNmi();
                if (InterruptShadow)
                {
                    // Only an event that waits makes the shadow visible.
                    if (_s->Pending != 0 || Apic.HasInterrupt)
                    {
                        InterruptShadow = false;
                        StepOne();
                        DeliverFault();
                        continue;
                    }
                    InterruptShadow = false;
                }
                else if ((_s->SystemFlags & (ulong)Rflags.IF) != 0 && Apic.HasInterrupt)
                {
                    TakeInterrupt();
                    continue;
                }
                if ((_s->SystemFlags & StepFlags) != 0 || Debug.IsActive)
                {
                    StepOne();
                    DeliverFault();
                    continue;
                }
                if (_s->InterruptWaiting && !Apic.HasInterrupt)
                    _s->InterruptWaiting = false;
                Remember(_s->Rip, Fault.None);
                Op* op = Branches.Jump(_s, _s->Rip);
                while (op != null)
                    op = op->Handler(_s, op);
                DeliverFault();
            }
        }
        finally
        {
            Barrier.Leave();
        }
    }

    /// <summary>
    /// Executes one instruction, or takes one pending event, and delivers what it raised. For debuggers and tests; <see cref="Run"/> must not be running.
    /// </summary>
    /// <returns>Null while the vCPU can go on.</returns>
    public VcpuExit? Step()
    {
        Barrier.Enter();
        try
        {
            if (_s->Pending != 0 && TryHandlePending(out VcpuExit exit))
                return exit;
            if (_activity == VcpuActivity.Shutdown)
                return ReportTripleFault();
            if (_activity != VcpuActivity.Active && !CanWake())
                return null;
            _activity = VcpuActivity.Active;
            if (NmiWaiting && !NmiBlocked && !InterruptShadow)
            {
                TakeNmi();
                return null;
            }
            if (!InterruptShadow && (_s->SystemFlags & (ulong)Rflags.IF) != 0 && Apic.HasInterrupt)
            {
                TakeInterrupt();
                return null;
            }
            InterruptShadow = false;
            StepOne();
            DeliverFault();
            return _activity == VcpuActivity.Shutdown ? ReportTripleFault() : null;
        }
        finally
        {
            Barrier.Leave();
        }
    }

    /// <summary>One instruction without looking at anything that waits; breakpoints and the trap flag are honoured. Leaves a fault recorded.</summary>
    private void StepOne()
    {
        bool trap = (_s->SystemFlags & (ulong)Rflags.TF) != 0;
        bool resume = (_s->SystemFlags & (ulong)Rflags.RF) != 0;
        ulong rip = _s->Rip;
        ulong linear = rip;
        if ((_s->Mode & CodeMode.SizeMask) != CodeMode.Code64)
        {
            if (rip > _s->SegLimit[1])
            {
                Access.Record(_s, ExceptionVector.GeneralProtection, 0);
                return;
            }
            linear = (uint)(_s->SegBase[1] + rip);
        }
        bool debugShadow = DebugShadow;
        DebugShadow = false;
        if (!resume && !debugShadow && Debug.CheckCode(linear))
            return;
        Op* op = Decoder.DecodeOne(linear);
        if (op == null)
            return;
        _s->BlockRip = rip;
        Debug.BeginInstruction();
        // RF lasts for one instruction; one that loads it (IRET, POPF, a task switch) does so after this.
        _s->SystemFlags &= ~(ulong)Rflags.RF;
        Op* next = op->Handler(_s, op);
        if (_s->FaultVector != Fault.None)
        {
            if (resume)
                _s->SystemFlags |= (ulong)Rflags.RF;
            return;
        }
        if (next == op + 1)
        {
            _s->Rip = Access.NextRip(_s, op);
            _s->Retired++;
        }
        else if (next == op)
        {
            // A repeated string instruction that was interrupted between iterations.
            _s->Rip = rip;
        }
        else if (next != null)
        {
            _s->Rip = _s->BlockRip;
        }
        Debug.EndInstruction(trap && !DebugShadow);
    }

    /// <summary>Delivers the recorded fault, if any.</summary>
    private void DeliverFault()
    {
        if (_s->FaultVector == Fault.None)
            return;
        Remember(_s->Rip, _s->FaultVector);
        if (!Interrupts.DeliverFault())
            _activity = VcpuActivity.Shutdown;
    }

    /// <summary>The last places where the loop was entered (vector <see cref="Fault.None"/>) and exceptions it delivered, oldest first.</summary>
    internal (ulong Rip, byte Vector)[] Trail()
    {
        int count = (int)System.Math.Min(_remembered, TrailLength);
        (ulong, byte)[] trail = new (ulong, byte)[count];
        for (int i = 0; i < count; i++)
            trail[i] = _trail[(_remembered - count + i) & (TrailLength - 1)];
        return trail;
    }

    private void Remember(ulong rip, byte vector)
    {
        _trail[_remembered & (TrailLength - 1)] = (rip, vector);
        _remembered++;
    }

    private void TakeInterrupt()
    {
        _s->InterruptWaiting = true;
        int vector = Apic.Acknowledge();
        if (vector < 0)
            return;
        _activity = VcpuActivity.Active;
        if (!Interrupts.DeliverExternal((byte)vector))
            _activity = VcpuActivity.Shutdown;
    }

    /// <summary>Handles what other threads left. True: <see cref="Run"/> returns with <paramref name="exit"/>.</summary>
    private bool TryHandlePending(out VcpuExit exit)
    {
        exit = VcpuExit.Kicked;
        PendingWork work = (PendingWork)Interlocked.Exchange(ref _s->Pending, 0);
        if ((work & PendingWork.Interrupt) != 0)
            _s->InterruptWaiting = true;
        if ((work & PendingWork.Exclusive) != 0)
        {
            Barrier.Leave();
            Barrier.Enter();
        }
        if (CodeCacheFull)
            EmptyCodeCache();
        if ((work & PendingWork.Init) != 0)
        {
            HandleInit();
            work &= ~(PendingWork.Nmi | PendingWork.Smi);
        }
        if ((work & PendingWork.Sipi) != 0 && _activity == VcpuActivity.WaitForSipi)
            HandleSipi((byte)Volatile.Read(ref _sipiVector));
        if ((work & PendingWork.Nmi) != 0)
        {
            if (_activity == VcpuActivity.WaitForSipi || NmiBlocked || InterruptShadow)
            {
                if (_activity != VcpuActivity.WaitForSipi)
                    NmiWaiting = true;
            }
            else
            {
                TakeNmi();
            }
        }
        return (work & PendingWork.Kick) != 0;
    }

    /// <summary>An NMI waits for the end of the handler that runs (its IRET leaves the block), or of an interrupt shadow.</summary>
    public bool NmiWaiting { get; set; }

    private void TakeNmi()
    {
        NmiWaiting = false;
        NmiBlocked = true;
        _activity = VcpuActivity.Active;
        if (!Interrupts.DeliverNmi())
            _activity = VcpuActivity.Shutdown;
    }

    private void EmptyCodeCache()
    {
        Barrier.Leave();
        Barrier.BeginExclusiveBetweenInstructions();
        if (Code.IsFull)
        {
            Code.Empty();
            foreach (SoftVcpu vcpu in Barrier.Vcpus)
                vcpu.Mmu.FlushJumpCache();
        }
        Barrier.EndExclusive(null);
        Barrier.Enter();
        CodeCacheFull = false;
    }

    private bool CanWake() => _activity == VcpuActivity.Halted && (_s->SystemFlags & (ulong)Rflags.IF) != 0 && Apic.HasInterrupt;

    /// <summary>Sleeps until something is pending. True: active again.</summary>
    private bool TryWake()
    {
        if (CanWake())
        {
            _activity = VcpuActivity.Active;
            return true;
        }
        Barrier.Leave();
        Volatile.Write(ref _sleeping, 1);
        Interlocked.MemoryBarrier();
        while (Volatile.Read(ref _s->Pending) == 0)
            Futex.Wait(&_s->Pending, 0, long.MaxValue);
        Volatile.Write(ref _sleeping, 0);
        Barrier.Enter();
        return false;
    }

    private VcpuExit ReportTripleFault()
    {
        FailureReport = FailureReports.TripleFault(this);
        return VcpuExit.TripleFault;
    }

    /// <summary>INIT (Intel SDM vol. 3, "Processor States Following INIT"): as reset, but the floating-point state, MTRRs, TSC and caching bits stay.</summary>
    private void HandleInit()
    {
        GetState(out CpuState old);
        CpuState state = CpuState.AtReset(Model.Signature);
        state.Cr0 = (old.Cr0 & (ulong)(Cr0.CD | Cr0.NW)) | (ulong)Cr0.ET;
        state.Xsave = old.Xsave;
        state.Xcr0 = old.Xcr0;
        state.MtrrDefType = old.MtrrDefType;
        state.MtrrFixed = old.MtrrFixed;
        state.MtrrVariable = old.MtrrVariable;
        state.Pat = old.Pat;
        state.TscOffset = old.TscOffset;
        state.TscAdjust = old.TscAdjust;
        state.TscAux = old.TscAux;
        state.MiscEnable = old.MiscEnable;
        SetState(in state);
        Apic.Init();
        _activity = (Apic.Base & 1u << 8) != 0 ? VcpuActivity.Active : VcpuActivity.WaitForSipi;
    }

    private void HandleSipi(byte vector)
    {
        _s->SegSelector[1] = (ushort)(vector << 8);
        _s->SegBase[1] = (ulong)vector << 12;
        _s->Rip = 0;
        Access.UpdateBounds(_s, 1);
        _activity = VcpuActivity.Active;
        UpdateMode();
    }
}
