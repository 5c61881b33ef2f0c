using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// A stack that is read or written before anything of the processor's state changes: the current one, or one that a transfer is about to switch to.
/// Methods that give false have recorded a fault.
/// </summary>
internal unsafe struct StackCursor
{
    private readonly SoftVcpu _vcpu;
    private readonly AccessRights _rights;
    private readonly SegmentState _segment;
    private readonly ulong _mask;
    private readonly uint _error;
    private readonly bool _flat;

    private StackCursor(SoftVcpu vcpu, AccessRights rights, in SegmentState segment, ulong mask, uint error, bool flat, ulong pointer)
    {
        _vcpu = vcpu;
        _rights = rights;
        _segment = segment;
        _mask = mask;
        _error = error;
        _flat = flat;
        Pointer = pointer & mask;
    }

    /// <summary>The stack pointer after what was pushed and popped, cut to the stack's width.</summary>
    public ulong Pointer { get; private set; }

    /// <summary>The stack in use. <paramref name="error"/> is the error code where its limit is met.</summary>
    public static StackCursor Current(SoftVcpu vcpu, uint error = 0)
    {
        VcpuBlock* s = vcpu.Block;
        AccessRights rights = vcpu.Mmu.CurrentRights;
        return DescriptorTables.Is64(s)
            ? new StackCursor(vcpu, rights, default, ulong.MaxValue, error, true, s->Gpr[4])
            : Segmented(vcpu, rights, vcpu.GetSegment(2), s->Gpr[4], error);
    }

    /// <summary>Another stack, in a segment.</summary>
    public static StackCursor In(SoftVcpu vcpu, in SegmentState segment, ulong pointer, int cpl, uint error) =>
        Segmented(vcpu, Rights(vcpu, cpl), in segment, pointer, error);

    /// <summary>Another stack of 64-bit mode.</summary>
    public static StackCursor Flat(SoftVcpu vcpu, ulong pointer, int cpl, uint error) =>
        new(vcpu, Rights(vcpu, cpl), default, ulong.MaxValue, error, true, pointer);

    public bool TryPush(int size, ulong value)
    {
        ulong pointer = Pointer - (ulong)size & _mask;
        if (!TryAddress(pointer, size, out ulong linear))
            return false;
        if (!_vcpu.Mmu.TryWriteAs(_rights, linear, size, value))
            return ConvertNonCanonical();
        Pointer = pointer;
        return true;
    }

    public bool TryPop(int size, out ulong value)
    {
        if (!TryPeek(0, size, out value))
            return false;
        Pointer = Pointer + (ulong)size & _mask;
        return true;
    }

    /// <summary>Reads at a distance from the pointer.</summary>
    public readonly bool TryPeek(ulong distance, int size, out ulong value)
    {
        value = 0;
        if (!TryAddress(Pointer + distance & _mask, size, out ulong linear))
            return false;
        return _vcpu.Mmu.TryReadAs(_rights, linear, size, out value) || ConvertNonCanonical();
    }

    /// <summary>Moves the pointer up without reading.</summary>
    public void Skip(ulong bytes) => Pointer = Pointer + bytes & _mask;

    /// <summary>Rights of accesses at a CPL, as the MMU chooses them for that CPL.</summary>
    public static AccessRights Rights(SoftVcpu vcpu, int cpl)
    {
        VcpuBlock* s = vcpu.Block;
        if (cpl == 3)
            return AccessRights.User;
        bool free = (s->Cr4 & (ulong)Cr4.SMAP) == 0 || (s->SystemFlags & (ulong)Rflags.AC) != 0;
        return free ? AccessRights.SupervisorAc : AccessRights.Supervisor;
    }

    private static StackCursor Segmented(SoftVcpu vcpu, AccessRights rights, in SegmentState segment, ulong pointer, uint error)
    {
        ulong mask = (segment.Attributes & (uint)SegmentAttributes.Default32) != 0 ? 0xffff_ffff : 0xffff;
        return new StackCursor(vcpu, rights, in segment, mask, error, false, pointer);
    }

    private readonly bool TryAddress(ulong offset, int size, out ulong linear)
    {
        if (_flat)
        {
            linear = offset;
            return true;
        }
        linear = (uint)(_segment.Base + offset);
        return SegmentLimits.Holds(in _segment, offset, size) || Access.Record(_vcpu.Block, ExceptionVector.StackFault, _error);
    }

    private readonly bool ConvertNonCanonical()
    {
        VcpuBlock* s = _vcpu.Block;
        if (s->FaultNonCanonical)
            Access.Record(s, ExceptionVector.StackFault, _error);
        return false;
    }
}

/// <summary>Limit checks of segments that are not, or not yet, in a register.</summary>
internal static class SegmentLimits
{
    /// <summary>Whether [offset, offset + size) lies in a present data segment, expand-down ones included.</summary>
    public static bool Holds(in SegmentState segment, ulong offset, int size)
    {
        SegmentAttributes a = (SegmentAttributes)segment.Attributes;
        if ((a & SegmentAttributes.Unusable) != 0)
            return false;
        ulong last = offset + (ulong)size - 1;
        bool expandDown = (a & (SegmentAttributes.Code | SegmentAttributes.ExpandDownOrConforming)) == SegmentAttributes.ExpandDownOrConforming;
        if (!expandDown)
            return last <= segment.Limit;
        return offset > segment.Limit && last <= ((a & SegmentAttributes.Default32) != 0 ? 0xffff_ffff : 0xffff);
    }
}
