using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Delivery through the gates of protected and long mode.</content>
public sealed unsafe partial class InterruptDelivery
{
    private const ulong ClearedByGate = (ulong)(Rflags.TF | Rflags.NT | Rflags.RF | Rflags.VM);

    private bool DeliverProtected(byte vector, EventKind kind, bool hasError, uint error, ulong rip, ulong flags)
    {
        uint external = External(kind);
        uint idtError = (uint)vector << 3 | 2 | external;
        bool longMode = DescriptorTables.IsLongMode(_s);
        uint entryBytes = longMode ? 16u : 8u;
        if (vector * entryBytes + entryBytes - 1 > _vcpu.Idtr.Limit)
            return Access.Record(_s, ExceptionVector.GeneralProtection, idtError);
        ulong entry = DescriptorTables.CutLinear(_s, _vcpu.Idtr.Base + vector * entryBytes);
        if (!_vcpu.Mmu.TryReadSystem(entry, 8, out ulong raw))
            return false;
        Descriptor gate = new(raw);
        if (!IsInterruptGate(in gate, longMode))
            return Access.Record(_s, ExceptionVector.GeneralProtection, idtError);
        if (kind is EventKind.Software or EventKind.SoftwareException && gate.Dpl < (int)_s->Cpl)
            return Access.Record(_s, ExceptionVector.GeneralProtection, idtError);
        if (!gate.IsPresent)
            return Access.Record(_s, ExceptionVector.SegmentNotPresent, idtError);
        if (gate.SystemType == SystemDescriptorType.TaskGate)
            return DeliverToTask(gate.GateSelector, rip, flags, hasError, error, external);

        ushort selector = gate.GateSelector;
        if (DescriptorTables.IsNull(selector))
            return Access.Record(_s, ExceptionVector.GeneralProtection, external);
        if (!DescriptorTables.TryRead(_vcpu, selector, ExceptionVector.GeneralProtection, external, out Descriptor code))
            return false;
        int cpl = (int)_s->Cpl;
        if (!code.IsCode || code.Dpl > cpl || (longMode && (!code.IsLong || code.IsDefault32)))
            return DescriptorTables.Fail(_vcpu, ExceptionVector.GeneralProtection, selector, external);
        if (!code.IsPresent)
            return DescriptorTables.Fail(_vcpu, ExceptionVector.SegmentNotPresent, selector, external);
        int newCpl = code.IsConforming ? cpl : code.Dpl;
        if (SegmentLoads.IsV86(_s) && newCpl != 0)
            return DescriptorTables.Fail(_vcpu, ExceptionVector.GeneralProtection, selector, external);
        if (!DescriptorTables.TryMarkAccessed(_vcpu, selector, in code))
            return false;

        SegmentState cs = code.ToSegment((ushort)((selector & ~3) | newCpl));
        if (longMode)
        {
            if (!_vcpu.Mmu.TryReadSystem(entry + 8, 8, out ulong upper))
                return false;
            return DeliverLong(in gate, upper << 32 | gate.GateOffset, in cs, newCpl, hasError, error, rip, flags, external);
        }
        return DeliverLegacy(in gate, in cs, newCpl, hasError, error, rip, flags, external);
    }

    private static bool IsInterruptGate(in Descriptor gate, bool longMode)
    {
        if (!gate.IsSystem)
            return false;
        return gate.SystemType switch
        {
            SystemDescriptorType.InterruptGate32 or SystemDescriptorType.TrapGate32 => true,
            SystemDescriptorType.TaskGate or SystemDescriptorType.InterruptGate16 or SystemDescriptorType.TrapGate16 => !longMode,
            _ => false,
        };
    }

    /// <summary>64-bit gates: the stack is always pushed, aligned to 16 bytes, perhaps from the interrupt stack table.</summary>
    private bool DeliverLong(in Descriptor gate, ulong target, in SegmentState cs, int newCpl, bool hasError, uint error, ulong rip, ulong flags, uint external)
    {
        int cpl = (int)_s->Cpl;
        if (!Mmu.IsCanonical(target))
            return Access.Record(_s, ExceptionVector.GeneralProtection, external);
        ulong pointer = _s->Gpr[4];
        if (gate.GateIst != 0 || newCpl < cpl)
        {
            uint offset = gate.GateIst != 0 ? 28u + (uint)gate.GateIst * 8 : 4u + (uint)newCpl * 8;
            if (offset + 7 > _vcpu.Tr.Limit)
                return DescriptorTables.Fail(_vcpu, ExceptionVector.InvalidTss, _vcpu.Tr.Selector, external);
            if (!_vcpu.Mmu.TryReadSystem(_vcpu.Tr.Base + offset, 8, out pointer))
                return false;
        }
        StackCursor stack = StackCursor.Flat(_vcpu, pointer & ~15ul, newCpl, external);
        bool pushed = stack.TryPush(8, _s->SegSelector[SegmentLoads.Ss])
            && stack.TryPush(8, _s->Gpr[4])
            && stack.TryPush(8, flags)
            && stack.TryPush(8, _s->SegSelector[SegmentLoads.Cs])
            && stack.TryPush(8, rip)
            && (!hasError || stack.TryPush(8, error));
        if (!pushed)
            return false;
        ClearFlags(in gate);
        SegmentState ss = newCpl < cpl ? SegmentLoads.Null((ushort)newCpl, newCpl) : _vcpu.GetSegment(SegmentLoads.Ss);
        SegmentLoads.SetCodeAndStack(_vcpu, in cs, in ss, newCpl);
        _s->Gpr[4] = stack.Pointer;
        _s->Rip = target;
        return true;
    }

    private bool DeliverLegacy(in Descriptor gate, in SegmentState cs, int newCpl, bool hasError, uint error, ulong rip, ulong flags, uint external)
    {
        int size = ((int)gate.SystemType & 8) != 0 ? 4 : 2;
        ulong target = size == 4 ? gate.GateOffset : gate.GateOffset & 0xffff;
        bool v86 = SegmentLoads.IsV86(_s);
        StackCursor stack;
        SegmentState ss;
        if (newCpl < (int)_s->Cpl)
        {
            if (!TaskState.TryReadStack(_vcpu, newCpl, external, out ushort stackSelector, out uint pointer)
                || !SegmentLoads.TryReadStack(_vcpu, stackSelector, newCpl, ExceptionVector.InvalidTss, external, out ss))
                return false;
            stack = StackCursor.In(_vcpu, in ss, pointer, newCpl, ((uint)stackSelector & 0xfffc) | external);
        }
        else
        {
            ss = _vcpu.GetSegment(SegmentLoads.Ss);
            stack = StackCursor.Current(_vcpu, external);
        }
        if (target > cs.Limit)
            return Access.Record(_s, ExceptionVector.GeneralProtection, external);
        if (newCpl < (int)_s->Cpl)
        {
            bool kept = !v86
                || (stack.TryPush(size, _s->SegSelector[SegmentLoads.Gs])
                    && stack.TryPush(size, _s->SegSelector[SegmentLoads.Fs])
                    && stack.TryPush(size, _s->SegSelector[SegmentLoads.Ds])
                    && stack.TryPush(size, _s->SegSelector[SegmentLoads.Es]));
            if (!kept || !stack.TryPush(size, _s->SegSelector[SegmentLoads.Ss]) || !stack.TryPush(size, _s->Gpr[4]))
                return false;
        }
        bool pushed = stack.TryPush(size, flags)
            && stack.TryPush(size, _s->SegSelector[SegmentLoads.Cs])
            && stack.TryPush(size, rip)
            && (!hasError || stack.TryPush(size, error));
        if (!pushed)
            return false;
        ClearFlags(in gate);
        SegmentLoads.SetCodeAndStack(_vcpu, in cs, in ss, newCpl);
        Stack.SetPointer(_s, stack.Pointer);
        _s->Rip = target;
        if (v86)
        {
            for (int i = 0; i < 6; i++)
            {
                if (i is not (SegmentLoads.Cs or SegmentLoads.Ss))
                    _vcpu.SetSegment(i, SegmentLoads.Null(0));
            }
        }
        return true;
    }

    private void ClearFlags(in Descriptor gate)
    {
        ulong cleared = ClearedByGate;
        if (((int)gate.SystemType & 1) == 0)
            cleared |= (ulong)Rflags.IF;
        _s->SystemFlags &= ~cleared;
    }

    private bool DeliverToTask(ushort selector, ulong rip, ulong flags, bool hasError, uint error, uint external)
    {
        if ((selector & 4) != 0 || DescriptorTables.IsNull(selector))
            return DescriptorTables.Fail(_vcpu, ExceptionVector.GeneralProtection, selector, external);
        if (!TaskSwitching.TrySwitch(_vcpu, selector, TaskSwitchKind.Gate, rip, flags, external))
            return false;
        return !hasError || _s->FaultVector != Fault.None || TaskSwitching.PushError(_vcpu, error);
    }
}
