using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// Far jumps and calls (Intel SDM vol. 2, JMP and CALL). False: a fault of the instruction was recorded and nothing changed. True: transferred;
/// after a task switch a fault of the new task may be recorded.
/// </summary>
internal static unsafe class FarTransfers
{
    /// <param name="vcpu">The processor.</param>
    /// <param name="selector">The target's selector.</param>
    /// <param name="offset">The target's offset, cut to the operand size.</param>
    /// <param name="size">Operand size in bytes.</param>
    /// <param name="next">RIP after the instruction.</param>
    /// <param name="call">Pushes a return address.</param>
    public static bool TryTransfer(SoftVcpu vcpu, ushort selector, ulong offset, int size, ulong next, bool call)
    {
        VcpuBlock* s = vcpu.Block;
        if (SegmentLoads.IsRealOrV86(s))
            return TryReal(vcpu, selector, offset, size, next, call);
        if (DescriptorTables.IsNull(selector))
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.GeneralProtection, 0, out Descriptor target))
            return false;
        return target.IsSystem
            ? TrySystem(vcpu, selector, in target, next, call)
            : TryCode(vcpu, selector, in target, offset, size, next, call);
    }

    private static bool TryReal(SoftVcpu vcpu, ushort selector, ulong offset, int size, ulong next, bool call)
    {
        VcpuBlock* s = vcpu.Block;
        if (offset > s->SegLimit[SegmentLoads.Cs])
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (call && !TryPushReturn(vcpu, size, next))
            return false;
        s->Rip = offset;
        SegmentLoads.LoadReal(vcpu, SegmentLoads.Cs, selector);
        return true;
    }

    private static bool TryCode(SoftVcpu vcpu, ushort selector, in Descriptor target, ulong offset, int size, ulong next, bool call)
    {
        VcpuBlock* s = vcpu.Block;
        int cpl = (int)s->Cpl;
        bool allowed = target.IsCode && (target.IsConforming ? target.Dpl <= cpl : (selector & 3) <= cpl && target.Dpl == cpl);
        if (!allowed)
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!target.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
        if (!TryCheckTarget(vcpu, selector, in target, ref offset))
            return false;
        if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in target))
            return false;
        if (call && !TryPushReturn(vcpu, size, next))
            return false;
        SegmentLoads.SetCode(vcpu, target.ToSegment((ushort)((selector & ~3) | cpl)));
        s->Rip = offset;
        return true;
    }

    /// <summary>Whether an offset is a place in a code segment; it is cut to 32 bits where the segment is not a 64-bit one.</summary>
    public static bool TryCheckTarget(SoftVcpu vcpu, ushort selector, in Descriptor code, ref ulong offset)
    {
        VcpuBlock* s = vcpu.Block;
        if (DescriptorTables.IsLongMode(s) && code.IsLong)
        {
            if (code.IsDefault32)
                return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
            return Mmu.IsCanonical(offset) || Access.Record(s, ExceptionVector.GeneralProtection, 0);
        }
        offset = (uint)offset;
        return offset <= code.Limit || Access.Record(s, ExceptionVector.GeneralProtection, 0);
    }

    private static bool TryPushReturn(SoftVcpu vcpu, int size, ulong next)
    {
        VcpuBlock* s = vcpu.Block;
        StackCursor stack = StackCursor.Current(vcpu);
        if (!stack.TryPush(size, s->SegSelector[SegmentLoads.Cs]) || !stack.TryPush(size, next))
            return false;
        Stack.SetPointer(s, stack.Pointer);
        return true;
    }

    private static bool TrySystem(SoftVcpu vcpu, ushort selector, in Descriptor target, ulong next, bool call)
    {
        VcpuBlock* s = vcpu.Block;
        bool longMode = DescriptorTables.IsLongMode(s);
        SystemDescriptorType type = target.SystemType;
        bool known = longMode
            ? type == SystemDescriptorType.CallGate32
            : type is SystemDescriptorType.CallGate16 or SystemDescriptorType.CallGate32 or SystemDescriptorType.TaskGate
                or SystemDescriptorType.Tss16Available or SystemDescriptorType.Tss32Available;
        if (!known || target.Dpl < (int)s->Cpl || target.Dpl < (selector & 3))
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!target.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
        TaskSwitchKind kind = call ? TaskSwitchKind.Call : TaskSwitchKind.Jump;
        return type switch
        {
            SystemDescriptorType.TaskGate => TaskSwitching.TrySwitch(vcpu, target.GateSelector, kind, next, LazyFlags.Read(s), 0),
            SystemDescriptorType.Tss16Available or SystemDescriptorType.Tss32Available
                => TaskSwitching.TrySwitch(vcpu, selector, kind, next, LazyFlags.Read(s), 0),
            _ => TryGate(vcpu, selector, in target, longMode, next, call),
        };
    }

    private static bool TryGate(SoftVcpu vcpu, ushort gateSelector, in Descriptor gate, bool longMode, ulong next, bool call)
    {
        VcpuBlock* s = vcpu.Block;
        int size = longMode ? 8 : gate.SystemType == SystemDescriptorType.CallGate32 ? 4 : 2;
        ulong offset = size == 2 ? gate.GateOffset & 0xffff : gate.GateOffset;
        if (longMode)
        {
            if (!DescriptorTables.TryReadUpper(vcpu, gateSelector, ExceptionVector.GeneralProtection, 0, out ulong upper))
                return false;
            offset |= upper << 32;
        }
        ushort selector = gate.GateSelector;
        if (DescriptorTables.IsNull(selector))
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.GeneralProtection, 0, out Descriptor code))
            return false;
        int cpl = (int)s->Cpl;
        bool inward = call && !code.IsConforming && code.Dpl < cpl;
        bool allowed = code.IsCode && (code.IsConforming || call ? code.Dpl <= cpl : code.Dpl == cpl);
        if (!allowed || (longMode && !code.IsLong))
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!code.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
        if (!TryCheckTarget(vcpu, selector, in code, ref offset))
            return false;
        if (inward)
            return TryInward(vcpu, in gate, selector, in code, offset, size, next);
        if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
            return false;
        if (call && !TryPushReturn(vcpu, size, next))
            return false;
        SegmentLoads.SetCode(vcpu, code.ToSegment((ushort)((selector & ~3) | cpl)));
        s->Rip = offset;
        return true;
    }

    /// <summary>A call to an inner level: the stack comes from the TSS, parameters are copied from the old one.</summary>
    private static bool TryInward(SoftVcpu vcpu, in Descriptor gate, ushort selector, in Descriptor code, ulong offset, int size, ulong next)
    {
        VcpuBlock* s = vcpu.Block;
        int newCpl = code.Dpl;
        SegmentState ss;
        StackCursor stack;
        if (size == 8)
        {
            uint at = 4u + (uint)newCpl * 8;
            if (at + 7 > vcpu.Tr.Limit)
                return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, vcpu.Tr.Selector);
            if (!vcpu.Mmu.TryReadSystem(vcpu.Tr.Base + at, 8, out ulong pointer))
                return false;
            ss = SegmentLoads.Null((ushort)newCpl, newCpl);
            stack = StackCursor.Flat(vcpu, pointer, newCpl, 0);
        }
        else
        {
            if (!TaskState.TryReadStack(vcpu, newCpl, 0, out ushort stackSelector, out uint pointer)
                || !SegmentLoads.TryReadStack(vcpu, stackSelector, newCpl, ExceptionVector.InvalidTss, 0, out ss))
                return false;
            stack = StackCursor.In(vcpu, in ss, pointer, newCpl, (uint)stackSelector & 0xfffc);
        }
        if (!stack.TryPush(size, s->SegSelector[SegmentLoads.Ss]) || !stack.TryPush(size, s->Gpr[4]))
            return false;
        if (size != 8)
        {
            StackCursor old = StackCursor.Current(vcpu);
            for (int i = gate.GateCount - 1; i >= 0; i--)
            {
                if (!old.TryPeek((ulong)(i * size), size, out ulong parameter) || !stack.TryPush(size, parameter))
                    return false;
            }
        }
        if (!stack.TryPush(size, s->SegSelector[SegmentLoads.Cs]) || !stack.TryPush(size, next))
            return false;
        if (!DescriptorTables.TryMarkAccessed(vcpu, selector, in code))
            return false;
        SegmentLoads.SetCodeAndStack(vcpu, code.ToSegment((ushort)((selector & ~3) | newCpl)), in ss, newCpl);
        Stack.SetPointer(s, stack.Pointer);
        s->Rip = offset;
        return true;
    }
}
