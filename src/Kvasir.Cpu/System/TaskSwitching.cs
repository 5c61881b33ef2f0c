using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>What asked for a task switch: decides busy bits, the back link and NT.</summary>
internal enum TaskSwitchKind
{
    Jump,
    Call,
    Return,

    /// <summary>An interrupt or exception through a task gate: nests as a call does.</summary>
    Gate,
}

/// <summary>
/// Hardware task switches between 16-bit and 32-bit task state segments (Intel SDM vol. 3, ch. "Task Management"). Long mode has none.
/// </summary>
internal static unsafe class TaskSwitching
{
    private const uint Minimum16 = 0x2b;
    private const uint Minimum32 = 0x67;

    // Offsets in a 32-bit TSS; a 16-bit one has words in the same order from 0eh on.
    private const uint Cr3At = 0x1c;
    private const uint EipAt = 0x20;
    private const uint TrapAt = 0x64;
    private const uint IpAt = 0x0e;

    /// <summary>
    /// Switches to the task of a TSS selector in the GDT. Gate and descriptor privileges were checked by the caller.
    /// </summary>
    /// <returns>
    /// False: a fault was recorded and the old task goes on. True: the new task's state is loaded; a fault that belongs to it may be recorded.
    /// </returns>
    public static bool TrySwitch(SoftVcpu vcpu, ushort selector, TaskSwitchKind kind, ulong rip, ulong flags, uint external)
    {
        VcpuBlock* s = vcpu.Block;
        ExceptionVector bad = kind == TaskSwitchKind.Return ? ExceptionVector.InvalidTss : ExceptionVector.GeneralProtection;
        if ((selector & 4) != 0 || DescriptorTables.IsNull(selector))
            return DescriptorTables.Fail(vcpu, bad, selector, external);
        if (!DescriptorTables.TryRead(vcpu, selector, bad, external, out Descriptor next))
            return false;
        bool typeFits = next.IsSystem && (kind == TaskSwitchKind.Return
            ? next.SystemType is SystemDescriptorType.Tss16Busy or SystemDescriptorType.Tss32Busy
            : next.SystemType is SystemDescriptorType.Tss16Available or SystemDescriptorType.Tss32Available);
        if (!typeFits)
            return DescriptorTables.Fail(vcpu, bad, selector, external);
        if (!next.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector, external);
        bool wide = ((int)next.SystemType & 8) != 0;
        if (next.Limit < (wide ? Minimum32 : Minimum16))
            return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, selector, external);

        // Everything that may fault in the old task comes first: both segments are touched before anything changes.
        bool oldWide = TaskState.Is32(in vcpu.Tr);
        uint oldMinimum = oldWide ? Minimum32 : Minimum16;
        if (vcpu.Tr.Limit < oldMinimum)
            return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, vcpu.Tr.Selector, external);
        if (!vcpu.Mmu.TryProbeWrite(AccessRights.Supervisor, vcpu.Tr.Base, (int)oldMinimum + 1))
            return false;
        NewTask task;
        if (!TryReadTask(vcpu, next.Base, wide, &task))
            return false;
        bool nests = kind is TaskSwitchKind.Call or TaskSwitchKind.Gate;
        if (nests && !vcpu.Mmu.TryProbeWrite(AccessRights.Supervisor, next.Base, 2))
            return false;

        if (kind is TaskSwitchKind.Jump or TaskSwitchKind.Return && !TrySetBusy(vcpu, vcpu.Tr.Selector, busy: false))
            return false;
        if (kind == TaskSwitchKind.Return)
            flags &= ~(ulong)Rflags.NT;
        SaveTask(vcpu, vcpu.Tr.Base, oldWide, rip, flags);
        if (nests)
        {
            vcpu.Mmu.TryWriteSystem(next.Base, 2, vcpu.Tr.Selector);
            task.Flags |= (ulong)Rflags.NT;
        }
        if (kind != TaskSwitchKind.Return && !TrySetBusy(vcpu, selector, busy: true))
            return false;

        // From here on the new task runs, and what goes wrong is its own.
        vcpu.Tr = next.ToSegment(selector);
        vcpu.Tr.Attributes |= 2;
        s->Cr0 |= (ulong)Cr0.TS;
        LoadTask(vcpu, &task, wide);
        return true;
    }

    /// <summary>The error code of an exception that switched tasks goes to the new task's stack. A fault there is the new task's.</summary>
    public static bool PushError(SoftVcpu vcpu, uint error)
    {
        StackCursor stack = StackCursor.Current(vcpu);
        if (stack.TryPush(TaskState.Is32(in vcpu.Tr) ? 4 : 2, error))
            Stack.SetPointer(vcpu.Block, stack.Pointer);
        return true;
    }

    private struct NewTask
    {
        public ulong Cr3;
        public ulong Rip;
        public ulong Flags;
        public fixed uint Registers[8];
        public fixed ushort Selectors[6];
        public ushort Ldt;
        public bool Trap;
    }

    private static bool TryReadTask(SoftVcpu vcpu, ulong at, bool wide, NewTask* task)
    {
        *task = default;
        Mmu mmu = vcpu.Mmu;
        int size = wide ? 4 : 2;
        uint offset = wide ? EipAt : IpAt;
        ulong value = 0;
        if (wide)
        {
            if (!mmu.TryReadSystem((uint)(at + Cr3At), 4, out task->Cr3) || !mmu.TryReadSystem((uint)(at + TrapAt), 1, out value))
                return false;
            task->Trap = (value & 1) != 0;
        }
        if (!mmu.TryReadSystem((uint)(at + offset), size, out task->Rip) || !mmu.TryReadSystem((uint)(at + offset + (uint)size), size, out task->Flags))
            return false;
        offset += (uint)size * 2;
        for (int i = 0; i < 8; i++, offset += (uint)size)
        {
            if (!mmu.TryReadSystem((uint)(at + offset), size, out value))
                return false;
            // A 16-bit task leaves the upper halves as all ones.
            task->Registers[i] = wide ? (uint)value : (uint)value | 0xffff_0000;
        }
        int segments = wide ? 6 : 4;
        for (int i = 0; i < segments; i++, offset += (uint)size)
        {
            if (!mmu.TryReadSystem((uint)(at + offset), 2, out value))
                return false;
            task->Selectors[i] = (ushort)value;
        }
        if (!mmu.TryReadSystem((uint)(at + offset), 2, out value))
            return false;
        task->Ldt = (ushort)value;
        return true;
    }

    /// <summary>Writes the dynamic part of the old TSS; it was probed.</summary>
    private static void SaveTask(SoftVcpu vcpu, ulong at, bool wide, ulong rip, ulong flags)
    {
        VcpuBlock* s = vcpu.Block;
        Mmu mmu = vcpu.Mmu;
        int size = wide ? 4 : 2;
        uint offset = wide ? EipAt : IpAt;
        mmu.TryWriteSystem((uint)(at + offset), size, rip);
        mmu.TryWriteSystem((uint)(at + offset + (uint)size), size, flags);
        offset += (uint)size * 2;
        for (int i = 0; i < 8; i++, offset += (uint)size)
            mmu.TryWriteSystem((uint)(at + offset), size, s->Gpr[i]);
        int segments = wide ? 6 : 4;
        for (int i = 0; i < segments; i++, offset += (uint)size)
            mmu.TryWriteSystem((uint)(at + offset), 2, s->SegSelector[i]);
    }

    private static bool TrySetBusy(SoftVcpu vcpu, ushort selector, bool busy)
    {
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.InvalidTss, 0, out Descriptor descriptor))
            return false;
        ulong type = descriptor.Raw >> 40 & 0xff;
        return DescriptorTables.TryWriteType(vcpu, selector, busy ? type | 2 : type & ~2ul);
    }

    private static void LoadTask(SoftVcpu vcpu, NewTask* task, bool wide)
    {
        VcpuBlock* s = vcpu.Block;
        if (wide && (s->Cr0 & (ulong)Cr0.PG) != 0)
        {
            s->Cr3 = task->Cr3;
            vcpu.Mmu.SwitchAddressSpace(keep: false);
        }
        const ulong settable = (ulong)(Rflags.Arithmetic | Rflags.TF | Rflags.IF | Rflags.DF | Rflags.IOPL | Rflags.NT | Rflags.RF | Rflags.VM
            | Rflags.AC | Rflags.VIF | Rflags.VIP | Rflags.ID);
        ulong flags = task->Flags & settable;
        LazyFlags.Write(s, wide ? flags : flags & 0xffff);
        for (int i = 0; i < 8; i++)
            s->Gpr[i] = task->Registers[i];
        s->Rip = task->Rip;
        vcpu.Debug.TaskSwitched();
        bool v86 = SegmentLoads.IsV86(s);
        s->Cpl = v86 ? 3u : (uint)(task->Selectors[SegmentLoads.Cs] & 3);
        // Selectors are visible at once; hidden parts only where the descriptors hold.
        for (int i = 0; i < 6; i++)
            vcpu.SetSegment(i, v86 ? SegmentLoads.Virtual8086(task->Selectors[i]) : SegmentLoads.Null(task->Selectors[i], (int)s->Cpl));
        vcpu.Ldtr = SegmentLoads.Null(task->Ldt);
        vcpu.UpdateMode();
        vcpu.UpdateAllBounds();
        if (TryLoadLdt(vcpu, task->Ldt) && !v86)
            TryLoadSegments(vcpu, task);
        vcpu.UpdateMode();
        if (s->FaultVector == Fault.None && s->Rip > s->SegLimit[SegmentLoads.Cs])
            Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (s->FaultVector == Fault.None && task->Trap)
            vcpu.Debug.TrapTask();
    }

    private static bool TryLoadLdt(SoftVcpu vcpu, ushort selector)
    {
        if (DescriptorTables.IsNull(selector))
            return true;
        if ((selector & 4) != 0)
            return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, selector);
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.InvalidTss, 0, out Descriptor ldt))
            return false;
        if (!ldt.IsSystem || ldt.SystemType != SystemDescriptorType.Ldt || !ldt.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, selector);
        vcpu.Ldtr = ldt.ToSegment(selector);
        return true;
    }

    private static void TryLoadSegments(SoftVcpu vcpu, NewTask* task)
    {
        VcpuBlock* s = vcpu.Block;
        ushort codeSelector = task->Selectors[SegmentLoads.Cs];
        int cpl = codeSelector & 3;
        if (DescriptorTables.IsNull(codeSelector))
        {
            DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, codeSelector);
            return;
        }
        if (!DescriptorTables.TryRead(vcpu, codeSelector, ExceptionVector.InvalidTss, 0, out Descriptor code))
            return;
        if (!code.IsCode || (code.IsConforming ? code.Dpl > cpl : code.Dpl != cpl))
        {
            DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, codeSelector);
            return;
        }
        if (!code.IsPresent)
        {
            DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, codeSelector);
            return;
        }
        if (!DescriptorTables.TryMarkAccessed(vcpu, codeSelector, in code))
            return;
        vcpu.SetSegment(SegmentLoads.Cs, code.ToSegment(codeSelector));
        vcpu.UpdateMode();
        if (!SegmentLoads.TryReadStack(vcpu, task->Selectors[SegmentLoads.Ss], cpl, ExceptionVector.InvalidTss, 0, out SegmentState ss))
            return;
        vcpu.SetSegment(SegmentLoads.Ss, in ss);
        vcpu.UpdateMode();
        for (int i = 0; i < 6; i++)
        {
            if (i is SegmentLoads.Cs or SegmentLoads.Ss)
                continue;
            if (SegmentLoads.TryLoadData(vcpu, i, task->Selectors[i]))
                continue;
            // A bad selector in a TSS is #TS, an absent segment stays #NP.
            if (s->FaultVector == (byte)ExceptionVector.GeneralProtection)
                DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, task->Selectors[i]);
            return;
        }
    }
}
