using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <content>The loop around KVM_RUN.</content>
public sealed unsafe partial class KvmVcpu
{
    private const ulong BootProcessorBit = 1ul << 8;

    public VcpuExit Run()
    {
        _thread = KickSignal.CurrentThread;
        try
        {
            _vm.UpdateSlots();
            SynchronizeTsc();
            _running = true;
            return RunLoop();
        }
        catch (LinuxException e)
        {
            // KVM refused something that it should not: this VM ends, others go on.
            FailureReport = $"vCPU {Index}: {e.Message}\n";
            return VcpuExit.Failure;
        }
        finally
        {
            _running = false;
        }
    }

    private VcpuExit RunLoop()
    {
        while (true)
        {
            Volatile.Write(ref Page->ImmediateExit, 0);
            Interlocked.MemoryBarrier();
            if (*_pending != 0 && TryHandleWork(out VcpuExit exit))
                return exit;
            if (_activity != VcpuActivity.Active)
            {
                if (_activity == VcpuActivity.Shutdown)
                    return ReportTripleFault();
                if (!TryWake())
                    continue;
            }
            PrepareInterrupt();
            int result = Enter();
            if (result < 0)
            {
                if (result is -Errno.Interrupted or -Errno.Again)
                    continue;
                return Fail($"KVM_RUN failed: {new LinuxException("run the vCPU", -result).Message}");
            }
            if (HandleExit() is { } end)
                return end;
        }
    }

    /// <summary>Runs the guest until something happens.</summary>
    /// <returns>What KVM_RUN gave: 0, or a negated error number.</returns>
    private int Enter()
    {
        Volatile.Write(ref _inKernel, 1);
        Interlocked.MemoryBarrier();
        // Work left before this point may have come without a signal.
        if (*_pending != 0)
            Page->ImmediateExit = 1;
        Entries++;
        int result = _calls.Ioctl(_fd, KvmRequest.Run, 0);
        Volatile.Write(ref _inKernel, 0);
        _registersShared = Page->ValidRegisters != 0;
        if (_coalesced is { } ring)
            ring.Drain();
        // KVM takes the result of an I/O instruction first, whatever it does then.
        _completing = false;
        _stateWritten = false;
        byte priority = (byte)Page->Cr8;
        if (priority != _taskPriority && _kernelInterrupts is null)
        {
            _taskPriority = priority;
            _apic.TaskPriorityClass = priority;
        }
        return result;
    }

    /// <summary>Gives KVM the interrupt that waits, where the guest takes it now; else asks to be told when it does.</summary>
    private void PrepareInterrupt()
    {
        if (_kernelInterrupts is { } kernel)
        {
            PrepareExternal(kernel);
            return;
        }
        bool waits = _apic.HasInterrupt;
        // After its state was written, what KVM last said of the guest's readiness is old.
        if (waits && !_stateWritten && Page->ReadyForInterrupt != 0 && Page->InterruptFlag != 0)
        {
            int vector = _apic.Acknowledge();
            if (vector >= 0)
            {
                uint number = (uint)vector;
                Call(KvmRequest.Interrupt, &number, "interrupt the guest");
                Page->ReadyForInterrupt = 0;
                _registersShared = false;
            }
            waits = _apic.HasInterrupt;
        }
        Page->RequestInterruptWindow = waits ? (byte)1 : (byte)0;
    }

    /// <summary>As <see cref="PrepareInterrupt"/>, for the board's 8259s beside local APICs that are KVM's.</summary>
    private void PrepareExternal(KvmInterrupts kernel)
    {
        if (Index != 0 || kernel.HasWires)
            return;
        if (kernel.ExternalWaits && !_stateWritten && Page->ReadyForInterrupt != 0)
        {
            int vector = kernel.AcknowledgeExternal();
            if (vector >= 0)
            {
                uint number = (uint)vector;
                Call(KvmRequest.Interrupt, &number, "interrupt the guest");
                Page->ReadyForInterrupt = 0;
                _registersShared = false;
            }
        }
        Page->RequestInterruptWindow = kernel.ExternalWaits ? (byte)1 : (byte)0;
    }

    /// <summary>Handles what other threads left. True: <see cref="Run"/> returns.</summary>
    private bool TryHandleWork(out VcpuExit exit)
    {
        exit = VcpuExit.Kicked;
        Work work = (Work)Interlocked.Exchange(ref *_pending, 0);
        if ((work & (Work.Init | Work.Sipi | Work.Kick)) != 0 && !TryComplete(out exit))
            return true;
        if ((work & Work.Init) != 0)
        {
            HandleInit();
            work &= ~Work.Nmi;
        }
        if ((work & Work.Sipi) != 0 && _activity == VcpuActivity.WaitForSipi)
            HandleSipi((byte)Volatile.Read(ref _sipiVector));
        if ((work & Work.Nmi) != 0 && _activity != VcpuActivity.WaitForSipi)
        {
            _activity = _activity == VcpuActivity.Halted ? VcpuActivity.Active : _activity;
            FlushRegisters();
            KvmSystem.Check(_calls.Ioctl(_fd, KvmRequest.Nmi, 0), $"send an NMI to vCPU {Index}");
            _registersShared = false;
        }
        if ((work & Work.Kick) == 0)
            return false;
        SettleEvents();
        _tscOffset = ReadTscOffset();
        return true;
    }

    /// <summary>
    /// Lets KVM finish an I/O instruction whose result it was given but did not take yet: registers are in between until then (api.rst, KVM_RUN).
    /// </summary>
    /// <returns>False where that ended in an exit that ends the run.</returns>
    private bool TryComplete(out VcpuExit exit)
    {
        exit = VcpuExit.Kicked;
        while (_completing)
        {
            Page->ImmediateExit = 1;
            int result = Enter();
            if (result is -Errno.Interrupted or -Errno.Again)
                break;
            VcpuExit? end = result < 0 ? Fail($"KVM_RUN failed: {new LinuxException("run the vCPU", -result).Message}") : HandleExit();
            if (end is { } reason)
            {
                exit = reason;
                return false;
            }
        }
        return true;
    }

    /// <summary>Sleeps until something is pending. True: active again.</summary>
    private bool TryWake()
    {
        if (_activity == VcpuActivity.Halted && _interruptible && _apic.HasInterrupt)
        {
            _activity = VcpuActivity.Active;
            return true;
        }
        Volatile.Write(ref _sleeping, 1);
        Interlocked.MemoryBarrier();
        while (Volatile.Read(ref *_pending) == 0)
            Futex.Wait(_pending, 0, long.MaxValue);
        Volatile.Write(ref _sleeping, 0);
        return false;
    }

    /// <summary>INIT (Intel SDM vol. 3, "Processor States Following INIT"): as reset, but the floating-point state, MTRRs, TSC and caching bits stay.</summary>
    private void HandleInit()
    {
        GetState(out CpuState old);
        CpuState state = CpuState.AtReset(_wiring.Signature);
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
        _apic.Init();
        state.Activity = (_apic.Base & BootProcessorBit) != 0 ? VcpuActivity.Active : VcpuActivity.WaitForSipi;
        SetState(in state);
    }

    private void HandleSipi(byte vector)
    {
        GetState(out CpuState state);
        state.Cs = state.Cs with { Selector = (ushort)(vector << 8), Base = (ulong)vector << 12 };
        state.Rip = 0;
        state.Activity = VcpuActivity.Active;
        SetState(in state);
    }

    private VcpuExit ReportTripleFault()
    {
        GetState(out CpuState state);
        // On AMD's processors KVM has reset the vCPU by now: what the processor leaves is undefined there (APM vol. 2, "Shutdown Intercept").
        CpuState reset = CpuState.AtReset();
        bool lost = state.Rip == reset.Rip && state.Cs.Base == reset.Cs.Base && (state.Cr0 & 1) == 0;
        FailureReport = Describe(lost ? "triple fault; this host's KVM keeps no registers of it and shows those of a reset" : "triple fault");
        return VcpuExit.TripleFault;
    }

    private VcpuExit Fail(string reason)
    {
        FailureReport = Describe(reason);
        return VcpuExit.Failure;
    }

    private string Describe(string reason)
    {
        GetState(out CpuState state);
        return _wiring.Rescue is { } rescue ? rescue.Describe(in state, reason) : $"vCPU {Index}: {reason}; rip {state.Rip:x16}, cr0 {state.Cr0:x}, cr3 {state.Cr3:x}, efer {state.Efer:x}\n";
    }
}
