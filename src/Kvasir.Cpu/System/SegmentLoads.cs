using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// What segment registers take, and the checks of loading them (Intel SDM vol. 3, "Protection"). Methods that give false have recorded a fault and changed nothing.
/// </summary>
internal static unsafe class SegmentLoads
{
    public const int Es = 0;
    public const int Cs = 1;
    public const int Ss = 2;
    public const int Ds = 3;
    public const int Fs = 4;
    public const int Gs = 5;

    private const uint RealModeData = (uint)(SegmentAttributes.Present | SegmentAttributes.CodeOrData | SegmentAttributes.WritableOrReadable | SegmentAttributes.Accessed);
    private const uint V86Attributes = RealModeData | (uint)SegmentAttributes.DplMask;

    public static bool IsRealOrV86(VcpuBlock* s) => (s->Mode & CodeMode.RealOrV86) != 0;

    public static bool IsV86(VcpuBlock* s) => (s->SystemFlags & (ulong)Rflags.VM) != 0;

    /// <summary>A register that holds no usable segment. Its DPL bits carry the CPL where it is SS.</summary>
    public static SegmentState Null(ushort selector, int cpl = 0) => new(selector, 0, 0, (uint)SegmentAttributes.Unusable | (uint)cpl << 5);

    /// <summary>A segment of virtual-8086 mode.</summary>
    public static SegmentState Virtual8086(ushort selector) => new(selector, (ulong)selector << 4, 0xffff, V86Attributes);

    /// <summary>Loads any register but CS in the current mode. After SS the caller leaves its block.</summary>
    public static bool TryLoad(SoftVcpu vcpu, int segment, ushort selector)
    {
        VcpuBlock* s = vcpu.Block;
        if (IsRealOrV86(s))
        {
            LoadReal(vcpu, segment, selector);
            return true;
        }
        return segment == Ss ? TryLoadStack(vcpu, selector) : TryLoadData(vcpu, segment, selector);
    }

    /// <summary>Real and virtual-8086 mode: the base alone follows the selector; a limit that protected mode left stays.</summary>
    public static void LoadReal(SoftVcpu vcpu, int segment, ushort selector)
    {
        if (IsV86(vcpu.Block))
        {
            vcpu.SetSegment(segment, Virtual8086(selector));
        }
        else
        {
            SegmentState state = vcpu.GetSegment(segment);
            bool usable = (state.Attributes & (uint)(SegmentAttributes.Unusable | SegmentAttributes.Present)) == (uint)SegmentAttributes.Present;
            state = usable
                ? state with { Selector = selector, Base = (ulong)selector << 4 }
                : new SegmentState(selector, (ulong)selector << 4, 0xffff, RealModeData);
            vcpu.SetSegment(segment, in state);
        }
        if (segment is Cs or Ss)
            vcpu.UpdateMode();
    }

    /// <summary>The data segment registers in protected mode.</summary>
    public static bool TryLoadData(SoftVcpu vcpu, int segment, ushort selector)
    {
        if (DescriptorTables.IsNull(selector))
        {
            vcpu.SetSegment(segment, Null(selector));
            return true;
        }
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.GeneralProtection, 0, out Descriptor descriptor))
            return false;
        bool conforming = descriptor.IsCode && descriptor.IsConforming;
        bool privileged = conforming || (descriptor.Dpl >= (int)vcpu.Block->Cpl && descriptor.Dpl >= (selector & 3));
        if (!descriptor.IsReadable || !privileged)
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!descriptor.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
        if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in descriptor))
            return false;
        vcpu.SetSegment(segment, descriptor.ToSegment(selector));
        return true;
    }

    private static bool TryLoadStack(SoftVcpu vcpu, ushort selector)
    {
        VcpuBlock* s = vcpu.Block;
        int cpl = (int)s->Cpl;
        SegmentState state;
        if (DescriptorTables.IsNull(selector))
        {
            if (!DescriptorTables.Is64(s) || cpl == 3 || (selector & 3) != cpl)
                return Access.Record(s, ExceptionVector.GeneralProtection, 0);
            state = Null(selector, cpl);
        }
        else if (!TryReadStack(vcpu, selector, cpl, ExceptionVector.GeneralProtection, 0, out state))
        {
            return false;
        }
        vcpu.SetSegment(Ss, in state);
        vcpu.UpdateMode();
        return true;
    }

    /// <summary>A stack segment for a CPL, checked; the vector is what a bad one raises (#GP, or #TS where the selector came from a TSS).</summary>
    public static bool TryReadStack(SoftVcpu vcpu, ushort selector, int cpl, ExceptionVector vector, uint external, out SegmentState state)
    {
        state = default;
        if (DescriptorTables.IsNull(selector))
            return Access.Record(vcpu.Block, vector, external);
        if (!DescriptorTables.TryRead(vcpu, selector, vector, external, out Descriptor descriptor))
            return false;
        if ((selector & 3) != cpl || !descriptor.IsWritableData || descriptor.Dpl != cpl)
            return DescriptorTables.Fail(vcpu, vector, selector, external);
        if (!descriptor.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.StackFault, selector, external);
        if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in descriptor))
            return false;
        state = descriptor.ToSegment(selector);
        return true;
    }

    /// <summary>After a return to an outer level: data segments that the new level may not use become null.</summary>
    public static void DropInner(SoftVcpu vcpu)
    {
        VcpuBlock* s = vcpu.Block;
        for (int i = 0; i < 6; i++)
        {
            if (i is Cs or Ss)
                continue;
            SegmentAttributes a = (SegmentAttributes)s->SegAttributes[i];
            if ((a & SegmentAttributes.Unusable) != 0)
                continue;
            bool conforming = (a & (SegmentAttributes.Code | SegmentAttributes.ExpandDownOrConforming)) == (SegmentAttributes.Code | SegmentAttributes.ExpandDownOrConforming);
            if (!conforming && (uint)(a & SegmentAttributes.DplMask) >> 5 < s->Cpl)
                vcpu.SetSegment(i, Null(0));
        }
    }

    /// <summary>The flat data segment that SYSCALL, SYSENTER and their returns put in SS.</summary>
    public static SegmentState FlatStack(ushort selector, int cpl) => new(selector, 0, 0xffff_ffff, 0xc093u | (uint)cpl << 5);

    /// <summary>The flat code segment that SYSCALL, SYSENTER and their returns put in CS.</summary>
    public static SegmentState FlatCode(ushort selector, int cpl, bool is64) => new(selector, 0, 0xffff_ffff, (is64 ? 0xa09bu : 0xc09bu) | (uint)cpl << 5);

    /// <summary>Switches CS, SS, CPL and what follows from them. RSP and RIP are the caller's.</summary>
    public static void SetCodeAndStack(SoftVcpu vcpu, in SegmentState cs, in SegmentState ss, int cpl)
    {
        vcpu.Block->Cpl = (uint)cpl;
        vcpu.SetSegment(Cs, in cs);
        vcpu.SetSegment(Ss, in ss);
        vcpu.UpdateMode();
        // A change between virtual-8086 and protected mode is part of the mode; bounds were computed under the old one.
        Access.UpdateBounds(vcpu.Block, Cs);
        Access.UpdateBounds(vcpu.Block, Ss);
    }

    /// <summary>Switches CS at the same privilege.</summary>
    public static void SetCode(SoftVcpu vcpu, in SegmentState cs)
    {
        vcpu.SetSegment(Cs, in cs);
        vcpu.UpdateMode();
    }
}
