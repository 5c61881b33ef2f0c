using System;
using System.Runtime.InteropServices;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <content>Architectural state in and out.</content>
public sealed unsafe partial class KvmVcpu
{
    private const uint TypeMask = 0xf;
    private const int StatePlaces = 42;
    private const int FirstFixedMtrr = 15;
    private const int FirstVariableMtrr = 26;

    /// <summary>Bits of the header's XSTATE_BV that the image has room for: x87, SSE, AVX.</summary>
    private const ulong ImageComponents = 7;

    /// <summary>Offset of XSTATE_BV in 64-bit words (Intel SDM vol. 1, "XSAVE Header").</summary>
    private const int XstateWord = 64;

    /// <summary>Words of <see cref="CpuState.Xsave"/>.</summary>
    private const int ImageWords = 104;

    private readonly KvmMsrBuffer _msrs;
    private KvmXsave _extended;
    private ulong _allowedXcr0 = 3;
    private bool _running;

    /// <summary>The shared page has the registers as they are.</summary>
    private bool _registersShared;

    /// <summary>What KVM last had, or was last given, of registers that it does not keep.</summary>
    private CpuState _kept;
    private long _tscOffset = long.MinValue;

    public void GetState(out CpuState state)
    {
        state = _kept;
        if (!_registersShared)
        {
            KvmSyncRegisters* registers = &Page->Registers;
            Call(KvmRequest.GetRegisters, &registers->General, "read the registers");
            Call(KvmRequest.GetSpecialRegisters, &registers->Special, "read the special registers");
            Call(KvmRequest.GetEvents, &registers->Events, "read the pending events");
        }
        FromKvm(in Page->Registers.General, ref state);
        FromKvm(in Page->Registers.Special, ref state);
        KvmDebugRegisters debug;
        Call(KvmRequest.GetDebugRegisters, &debug, "read the debug registers");
        (state.Dr0, state.Dr1, state.Dr2, state.Dr3, state.Dr6, state.Dr7) = (debug.Dr0, debug.Dr1, debug.Dr2, debug.Dr3, debug.Dr6, debug.Dr7);
        KvmXsave xsave;
        Call(KvmRequest.GetXsave, &xsave, "read the floating-point state");
        ((ReadOnlySpan<ulong>)xsave)[..ImageWords].CopyTo(state.Xsave);
        _extended = xsave;
        state.Xsave[XstateWord] &= ImageComponents;
        state.Xcr0 = ReadXcr0();
        ReadMsrs(ref state);
        KvmEvents events = Page->Registers.Events;
        state.InterruptShadow = events.Shadow != 0;
        state.NmiBlocked = events.NmiMasked != 0;
        state.NmiPending = events.NmiPending != 0 || events.NmiInjected != 0;
        if (_running)
            _tscOffset = ReadTscOffset();
        state.TscOffset = _tscOffset;
        state.Activity = _kernelInterrupts is null || _activity == VcpuActivity.Shutdown ? _activity : ReadActivity();
    }

    /// <summary>Ends what the guest had KVM write to its memory, as RESET does. Only while the vCPU is not running.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public void ResetParavirtual()
    {
        KvmMsrBuffer one = default;
        one.Count = 1;
        foreach (uint msr in Paravirtual.Msrs)
        {
            one.Entries[0] = new KvmMsrEntry { Index = msr };
            // One that this KVM does not have holds nothing.
            if (_vm.System.MsrList.Contains(msr) && Call(KvmRequest.SetMsrs, &one, "reset KVM's clock") != 1)
                throw new LinuxException($"KVM does not take 0 for MSR {msr:x}h of vCPU {Index}");
        }
    }

    /// <summary>Has a guest that uses KVM's clock know that it did not run for a while: its watchdogs then do not bark. Only while the vCPU is not running.</summary>
    public void TellOfPause() => _ = _calls.Ioctl(_fd, KvmRequest.TellOfPause, 0);

    public void SetState(in CpuState state)
    {
        _extended = default;
        WriteState(in state);
    }

    /// <summary>Gives KVM what waits for it in the shared page, for a call that goes by it.</summary>
    private void FlushRegisters()
    {
        if (Page->DirtyRegisters == 0)
            return;
        KvmSyncRegisters* registers = &Page->Registers;
        Page->DirtyRegisters = 0;
        Call(KvmRequest.SetSpecialRegisters, &registers->Special, "write the special registers");
        Call(KvmRequest.SetRegisters, &registers->General, "write the registers");
        Call(KvmRequest.SetEvents, &registers->Events, "write the pending events");
    }

    /// <summary>As <see cref="SetState"/>, but what the processor has of vector state beyond <see cref="CpuState"/> stays as it was read last.</summary>
    /// <param name="state">The state.</param>
    /// <param name="later">KVM may take the registers when the guest goes on: nothing needs them before.</param>
    private void WriteState(in CpuState state, bool later = false)
    {
        _kept = state;
        KvmSyncRegisters* registers = &Page->Registers;
        registers->Special = default;
        ToKvm(in state, ref registers->Special);
        registers->General = ToKvm(in state);
        registers->Events = EventsOf(in state);
        // The order in which KVM takes them from the page, too.
        Page->DirtyRegisters = KvmSyncRegisters.All;
        _registersShared = later && Page->ValidRegisters != 0;
        if (!_registersShared)
            FlushRegisters();
        WriteXcr0(state.Xcr0);
        KvmXsave xsave = _extended;
        ulong beyond = xsave[XstateWord] & ~ImageComponents;
        ((ReadOnlySpan<ulong>)state.Xsave).CopyTo(xsave);
        xsave[XstateWord] = (xsave[XstateWord] & (_allowedXcr0 | 3) & ImageComponents) | beyond;
        Call(KvmRequest.SetXsave, &xsave, "write the floating-point state");
        WriteMsrs(in state);
        if (state.TscOffset != _tscOffset)
            WriteTscOffset(state.TscOffset);
        KvmDebugRegisters debug = new() { Dr0 = state.Dr0, Dr1 = state.Dr1, Dr2 = state.Dr2, Dr3 = state.Dr3, Dr6 = state.Dr6, Dr7 = state.Dr7 };
        Call(KvmRequest.SetDebugRegisters, &debug, "write the debug registers");
        if (_kernelInterrupts is not null)
            WriteActivity(state.Activity);
        else
            _activity = state.Activity;
        _interruptible = (state.Rflags & (ulong)Rflags.IF) != 0;
        _stateWritten = true;
        ReloadTaskPriority();
        if (_vm.MendsRing3)
            FollowGates(in state);
    }

    private static KvmEvents EventsOf(in CpuState state)
    {
        const byte stiShadow = 2;
        return new KvmEvents
        {
            Flags = KvmEvents.NmiPendingValid | KvmEvents.ShadowValid,
            Shadow = state.InterruptShadow ? stiShadow : (byte)0,
            NmiMasked = state.NmiBlocked ? (byte)1 : (byte)0,
            NmiPending = state.NmiPending ? (byte)1 : (byte)0,
        };
    }

    private static void FromKvm(in KvmRegisters r, ref CpuState state)
    {
        ReadOnlySpan<ulong> inOrder = [r.Rax, r.Rcx, r.Rdx, r.Rbx, r.Rsp, r.Rbp, r.Rsi, r.Rdi, r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15];
        inOrder.CopyTo(state.Gpr);
        state.Rip = r.Rip;
        state.Rflags = r.Rflags;
    }

    private static KvmRegisters ToKvm(in CpuState s) => new()
    {
        Rax = s.Gpr[0],
        Rcx = s.Gpr[1],
        Rdx = s.Gpr[2],
        Rbx = s.Gpr[3],
        Rsp = s.Gpr[4],
        Rbp = s.Gpr[5],
        Rsi = s.Gpr[6],
        Rdi = s.Gpr[7],
        R8 = s.Gpr[8],
        R9 = s.Gpr[9],
        R10 = s.Gpr[10],
        R11 = s.Gpr[11],
        R12 = s.Gpr[12],
        R13 = s.Gpr[13],
        R14 = s.Gpr[14],
        R15 = s.Gpr[15],
        Rip = s.Rip,
        Rflags = s.Rflags,
    };

    private static void FromKvm(in KvmSpecialRegisters s, ref CpuState state)
    {
        state.Es = FromKvm(in s.Es);
        state.Cs = FromKvm(in s.Cs);
        state.Ss = FromKvm(in s.Ss);
        state.Ds = FromKvm(in s.Ds);
        state.Fs = FromKvm(in s.Fs);
        state.Gs = FromKvm(in s.Gs);
        state.Ldtr = FromKvm(in s.Ldt);
        state.Tr = FromKvm(in s.Tr);
        state.Gdtr = new TableState(s.Gdt.Base, s.Gdt.Limit);
        state.Idtr = new TableState(s.Idt.Base, s.Idt.Limit);
        (state.Cr0, state.Cr2, state.Cr3, state.Cr4, state.Efer) = (s.Cr0, s.Cr2, s.Cr3, s.Cr4, s.Efer);
    }

    private void ToKvm(in CpuState state, ref KvmSpecialRegisters s)
    {
        s.Es = ToKvm(in state.Es);
        s.Cs = ToKvm(in state.Cs);
        s.Ss = ToKvm(in state.Ss);
        s.Ds = ToKvm(in state.Ds);
        s.Fs = ToKvm(in state.Fs);
        s.Gs = ToKvm(in state.Gs);
        s.Ldt = ToKvm(in state.Ldtr);
        s.Tr = ToKvm(in state.Tr);
        s.Gdt.Base = state.Gdtr.Base;
        s.Gdt.Limit = state.Gdtr.Limit;
        s.Idt.Base = state.Idtr.Base;
        s.Idt.Limit = state.Idtr.Limit;
        (s.Cr0, s.Cr2, s.Cr3, s.Cr4, s.Efer) = (state.Cr0, state.Cr2, state.Cr3, state.Cr4, state.Efer);
        if (_kernelInterrupts is not null)
        {
            // Both are the kernel's APIC's, and stay as they are.
            KvmSpecialRegisters now;
            Call(KvmRequest.GetSpecialRegisters, &now, "read the special registers");
            (s.Cr8, s.ApicBase) = (now.Cr8, now.ApicBase);
            return;
        }
        s.Cr8 = _apic.TaskPriorityClass;
        s.ApicBase = _apic.Base;
    }

    private static SegmentState FromKvm(in KvmSegment s) => new(
        s.Selector, s.Base, s.Limit,
        s.Type | (uint)s.S << 4 | (uint)s.Dpl << 5 | (uint)s.Present << 7 | (uint)s.Avl << 12 | (uint)s.L << 13 | (uint)s.Db << 14 | (uint)s.G << 15
            | (uint)s.Unusable << 16);

    private static KvmSegment ToKvm(in SegmentState s) => new()
    {
        Base = s.Base,
        Limit = s.Limit,
        Selector = s.Selector,
        Type = (byte)(s.Attributes & TypeMask),
        S = (byte)(s.Attributes >> 4 & 1),
        Dpl = (byte)(s.Attributes >> 5 & 3),
        Present = (byte)(s.Attributes >> 7 & 1),
        Avl = (byte)(s.Attributes >> 12 & 1),
        L = (byte)(s.Attributes >> 13 & 1),
        Db = (byte)(s.Attributes >> 14 & 1),
        G = (byte)(s.Attributes >> 15 & 1),
        Unusable = (byte)(s.Attributes >> 16 & 1),
    };

    private ulong ReadXcr0()
    {
        if (_allowedXcr0 <= 3)
            return _kept.Xcr0;
        KvmXcrs xcrs;
        Call(KvmRequest.GetXcrs, &xcrs, "read XCR0");
        return xcrs.Value;
    }

    private void WriteXcr0(ulong value)
    {
        if (_allowedXcr0 <= 3)
            return;
        KvmXcrs xcrs = new() { Count = 1, Value = value & _allowedXcr0 | 1 };
        Call(KvmRequest.SetXcrs, &xcrs, "write XCR0");
    }

    // Model-specific registers

    private static uint MsrAt(int place) => place switch
    {
        0 => Msr.Star,
        1 => Msr.Lstar,
        2 => Msr.Cstar,
        3 => Msr.Fmask,
        4 => Msr.KernelGsBase,
        5 => Msr.SysenterCs,
        6 => Msr.SysenterEsp,
        7 => Msr.SysenterEip,
        8 => Msr.Pat,
        9 => Msr.TscAux,
        10 => Msr.TscAdjust,
        11 => Msr.Xss,
        12 => Msr.MiscEnable,
        13 => Msr.SpecCtrl,
        14 => Msr.MtrrDefType,
        FirstFixedMtrr => Msr.MtrrFix64k00000,
        FirstFixedMtrr + 1 => Msr.MtrrFix16k80000,
        FirstFixedMtrr + 2 => Msr.MtrrFix16kA0000,
        < FirstVariableMtrr => Msr.MtrrFix4kC0000 + (uint)(place - FirstFixedMtrr - 3),
        _ => Msr.MtrrPhysBase0 + (uint)(place - FirstVariableMtrr),
    };

    private static ref ulong FieldAt(ref CpuState s, int place)
    {
        switch (place)
        {
            case 0: return ref s.Star;
            case 1: return ref s.Lstar;
            case 2: return ref s.Cstar;
            case 3: return ref s.Fmask;
            case 4: return ref s.KernelGsBase;
            case 5: return ref s.SysenterCs;
            case 6: return ref s.SysenterEsp;
            case 7: return ref s.SysenterEip;
            case 8: return ref s.Pat;
            case 9: return ref s.TscAux;
            case 10: return ref s.TscAdjust;
            case 11: return ref s.Xss;
            case 12: return ref s.MiscEnable;
            case 13: return ref s.SpecCtrl;
            case 14: return ref s.MtrrDefType;
            case < FirstVariableMtrr: return ref s.MtrrFixed[place - FirstFixedMtrr];
            default: return ref s.MtrrVariable[place - FirstVariableMtrr];
        }
    }

    /// <summary>Which of the state's MSRs KVM reads and takes back.</summary>
    private KvmMsrBuffer FindMsrs()
    {
        KvmMsrBuffer found = default;
        KvmMsrBuffer one = default;
        for (int place = 0; place < StatePlaces; place++)
        {
            one.Count = 1;
            one.Entries[0] = new KvmMsrEntry { Index = MsrAt(place) };
            if (_calls.Ioctl(_fd, KvmRequest.GetMsrs, &one) == 1 && _calls.Ioctl(_fd, KvmRequest.SetMsrs, &one) == 1)
            {
                found.Places[(int)found.Count] = (byte)place;
                found.Entries[(int)found.Count++] = new KvmMsrEntry { Index = MsrAt(place) };
            }
        }
        return found;
    }

    private void ReadMsrs(ref CpuState state)
    {
        KvmMsrBuffer buffer = _msrs;
        int count = Call(KvmRequest.GetMsrs, &buffer, "read the model-specific registers");
        if (count != buffer.Count)
            throw new LinuxException($"KVM did not give MSR {buffer.Entries[count].Index:x}h of vCPU {Index}");
        for (int i = 0; i < count; i++)
            FieldAt(ref state, buffer.Places[i]) = buffer.Entries[i].Value;
    }

    private void WriteMsrs(in CpuState state)
    {
        CpuState copy = state;
        KvmMsrBuffer buffer = _msrs;
        for (int i = 0; i < buffer.Count; i++)
            buffer.Entries[i].Value = FieldAt(ref copy, buffer.Places[i]);
        int count = Call(KvmRequest.SetMsrs, &buffer, "write the model-specific registers");
        if (count != buffer.Count)
            throw new LinuxException($"KVM does not take {buffer.Entries[count].Value:x}h for MSR {buffer.Entries[count].Index:x}h of vCPU {Index}");
    }

    // Time stamp counter

    /// <summary>The guest's counter less what <see cref="VmClock.TscNow"/> shows.</summary>
    private long ReadTscOffset()
    {
        KvmMsrBuffer one = default;
        one.Count = 1;
        one.Entries[0] = new KvmMsrEntry { Index = Msr.Tsc };
        if (Call(KvmRequest.GetMsrs, &one, "read the time stamp counter") != 1)
            throw new LinuxException($"KVM does not give the time stamp counter of vCPU {Index}");
        return (long)(one.Entries[0].Value - _clock.TscNow);
    }

    private void WriteTscOffset(long offset)
    {
        KvmMsrBuffer one = default;
        one.Count = 1;
        one.Entries[0] = new KvmMsrEntry { Index = Msr.Tsc, Value = _clock.TscNow + (ulong)offset };
        if (Call(KvmRequest.SetMsrs, &one, "write the time stamp counter") != 1)
            throw new LinuxException($"KVM does not take a time stamp counter for vCPU {Index}");
        _tscOffset = offset;
        _apic.TscOffset = offset;
    }

    /// <summary>The TSC deadline of KVM's local APIC; 0: none. Only while the vCPU is not running, or on its thread.</summary>
    /// <exception cref="LinuxException">KVM refused.</exception>
    public ulong TscDeadline
    {
        get
        {
            KvmMsrBuffer one = default;
            one.Count = 1;
            one.Entries[0] = new KvmMsrEntry { Index = Msr.TscDeadline };
            return Call(KvmRequest.GetMsrs, &one, "read the TSC deadline") == 1 ? one.Entries[0].Value : 0;
        }

        set
        {
            KvmMsrBuffer one = default;
            one.Count = 1;
            one.Entries[0] = new KvmMsrEntry { Index = Msr.TscDeadline, Value = value };
            if (Call(KvmRequest.SetMsrs, &one, "write the TSC deadline") != 1 && value != 0)
                throw new LinuxException($"KVM does not take a TSC deadline for vCPU {Index}");
        }
    }

    /// <summary>The host's counter went on while the VM's clock stood: puts the guest's back to where it was.</summary>
    private void SynchronizeTsc()
    {
        long tolerance = (long)(_clock.TscFrequency / 1000);
        if (Math.Abs(ReadTscOffset() - _tscOffset) <= tolerance)
            return;
        WriteTscOffset(_tscOffset);
        // The kernel's APIC timer waits by the counter as it was when the deadline was written.
        if (_kernelInterrupts is not null && TscDeadline is not 0 and ulong deadline)
            TscDeadline = deadline;
    }

    [System.Runtime.CompilerServices.InlineArray(StatePlaces)]
    private struct MsrEntries
    {
        private KvmMsrEntry _first;
    }

    [System.Runtime.CompilerServices.InlineArray(StatePlaces)]
    private struct MsrPlaces
    {
        private byte _first;
    }

    /// <summary>As KVM_GET_MSRS and KVM_SET_MSRS take it, and after that whose fields of <see cref="CpuState"/> the entries are.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct KvmMsrBuffer
    {
        public uint Count;
        private readonly uint _padding;
        public MsrEntries Entries;
        public MsrPlaces Places;
    }
}
