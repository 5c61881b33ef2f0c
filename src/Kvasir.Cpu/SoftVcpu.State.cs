using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Architectural state in and out.</content>
public sealed unsafe partial class SoftVcpu
{
    /// <summary>LDTR and TR with their hidden parts.</summary>
    internal SegmentState Ldtr;
    internal SegmentState Tr;
    internal TableState Gdtr;
    internal TableState Idtr;

    public void GetState(out CpuState state)
    {
        state = default;
        for (int i = 0; i < 16; i++)
            state.Gpr[i] = _s->Gpr[i];
        state.Rip = _s->Rip;
        state.Rflags = LazyFlags.Read(_s);
        state.Es = GetSegment(0);
        state.Cs = GetSegment(1);
        state.Ss = GetSegment(2);
        state.Ds = GetSegment(3);
        state.Fs = GetSegment(4);
        state.Gs = GetSegment(5);
        state.Ldtr = Ldtr;
        state.Tr = Tr;
        state.Gdtr = Gdtr;
        state.Idtr = Idtr;
        state.Cr0 = _s->Cr0;
        state.Cr2 = _s->Cr2;
        state.Cr3 = _s->Cr3;
        state.Cr4 = _s->Cr4;
        state.Xcr0 = _s->Xcr0;
        state.Efer = _s->Efer;
        Debug.Get(ref state);
        Msrs.Get(ref state);
        Vectors.Get(ref state);
        state.TscOffset = TscOffset;
        state.Activity = _activity;
        state.InterruptShadow = InterruptShadow;
        state.NmiBlocked = NmiBlocked;
        state.NmiPending = NmiWaiting;
    }

    public void SetState(in CpuState state)
    {
        for (int i = 0; i < 16; i++)
            _s->Gpr[i] = state.Gpr[i];
        _s->Rip = state.Rip;
        LazyFlags.Write(_s, state.Rflags);
        _s->Cr0 = state.Cr0;
        _s->Cr2 = state.Cr2;
        _s->Cr3 = state.Cr3;
        _s->Cr4 = state.Cr4;
        _s->Xcr0 = state.Xcr0;
        _s->Efer = state.Efer;
        // The mode decides what segments allow: it comes before their bounds.
        SetSegmentRaw(1, in state.Cs);
        SetSegmentRaw(2, in state.Ss);
        _s->Cpl = (state.Cr0 & (ulong)Cr0.PE) == 0 ? 0u
            : (state.Rflags & (ulong)Rflags.VM) != 0 ? 3u
            : state.Ss.Attributes >> 5 & 3;
        Ldtr = state.Ldtr;
        Tr = state.Tr;
        Gdtr = state.Gdtr;
        Idtr = state.Idtr;
        Debug.Set(in state);
        Msrs.Set(in state);
        Vectors.Set(in state);
        TscOffset = state.TscOffset;
        _activity = state.Activity;
        InterruptShadow = state.InterruptShadow;
        DebugShadow = false;
        NmiBlocked = state.NmiBlocked;
        NmiWaiting = state.NmiPending;
        if (NmiWaiting)
            Post(PendingWork.Resynchronize);
        _s->InterruptWaiting = true;
        _s->FaultVector = Fault.None;
        _s->SegmentFault = 0;
        _s->StorePending = false;
        UpdateMode();
        SetSegment(0, in state.Es);
        SetSegment(1, in state.Cs);
        SetSegment(2, in state.Ss);
        SetSegment(3, in state.Ds);
        SetSegment(4, in state.Fs);
        SetSegment(5, in state.Gs);
        Mmu.FlushAll();
        Mmu.SwitchAddressSpace(keep: false);
    }

    /// <summary>A segment register (encoding order) with its hidden part.</summary>
    public SegmentState GetSegment(int segment) =>
        new(_s->SegSelector[segment], _s->SegBase[segment], _s->SegLimit[segment], _s->SegAttributes[segment]);

    /// <summary>Sets a segment register and what accesses through it are checked against. After CS or SS: <see cref="UpdateMode"/>.</summary>
    public void SetSegment(int segment, in SegmentState state)
    {
        SetSegmentRaw(segment, in state);
        Access.UpdateBounds(_s, segment);
    }

    /// <summary>Computes the bounds of all segments again: after a change between protected and real or virtual-8086 mode.</summary>
    public void UpdateAllBounds()
    {
        for (int i = 0; i < 6; i++)
            Access.UpdateBounds(_s, i);
    }

    private void SetSegmentRaw(int segment, in SegmentState state)
    {
        _s->SegSelector[segment] = state.Selector;
        _s->SegBase[segment] = state.Base;
        _s->SegLimit[segment] = state.Limit;
        _s->SegAttributes[segment] = state.Attributes;
    }
}
