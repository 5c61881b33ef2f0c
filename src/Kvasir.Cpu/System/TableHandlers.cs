using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of GDTR, IDTR, LDTR, TR and the machine status word.</summary>
internal static unsafe class TableHandlers
{
    // SGDT, SIDT, LGDT, LIDT: the operand is 16 bits of limit and a base of 32 or (64-bit mode) 64 bits.

    public static Op* StoreGdt(VcpuBlock* s, Op* op) => Store(s, op, SoftVcpu.From(s).Gdtr);

    public static Op* StoreIdt(VcpuBlock* s, Op* op) => Store(s, op, SoftVcpu.From(s).Idtr);

    public static Op* LoadGdt(VcpuBlock* s, Op* op)
    {
        if (!TryLoad(s, op, out TableState table))
            return Access.Fault(s, op);
        SoftVcpu.From(s).Gdtr = table;
        return op + 1;
    }

    public static Op* LoadIdt(VcpuBlock* s, Op* op)
    {
        if (!TryLoad(s, op, out TableState table))
            return Access.Fault(s, op);
        SoftVcpu.From(s).Idtr = table;
        return op + 1;
    }

    private static Op* Store(VcpuBlock* s, Op* op, TableState table)
    {
        if (!TryAllowReading(s))
            return Access.Fault(s, op);
        int size = DescriptorTables.Is64(s) ? 10 : 6;
        byte* p = Access.Overwrite(s, Access.Linear(s, op, size, write: true), size);
        if (p == null)
            return Access.Fault(s, op);
        *(ushort*)p = table.Limit;
        if (size == 10)
            *(ulong*)(p + 2) = table.Base;
        else
            *(uint*)(p + 2) = (uint)table.Base;
        Access.Commit(s);
        return op + 1;
    }

    private static bool TryLoad(VcpuBlock* s, Op* op, out TableState table)
    {
        table = default;
        if (s->Cpl != 0)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        bool is64 = DescriptorTables.Is64(s);
        int size = is64 ? 10 : 6;
        byte* p = Access.Read(s, Access.Linear(s, op, size, write: false), size);
        if (p == null)
            return false;
        ulong address = is64 ? *(ulong*)(p + 2) : *(uint*)(p + 2);
        // A 16-bit operand size takes 24 bits of base, as the 286 had.
        if ((op->Flags >> OpFlags.SizeShift & 15) == 2)
            address &= 0xff_ffff;
        if (is64 && !Mmu.IsCanonical(address))
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        table = new TableState(address, *(ushort*)p);
        return true;
    }

    /// <summary>UMIP: programs may not see where system tables are.</summary>
    private static bool TryAllowReading(VcpuBlock* s) =>
        (s->Cr4 & (ulong)Cr4.UMIP) == 0 || s->Cpl == 0 || Access.Record(s, ExceptionVector.GeneralProtection, 0);

    // SLDT, STR, SMSW: a 16-bit store to memory, or a register of any size.

    public static Op* StoreLdtMemory(VcpuBlock* s, Op* op) => StoreMemory(s, op, SoftVcpu.From(s).Ldtr.Selector, isProtected: true);

    public static Op* StoreTaskMemory(VcpuBlock* s, Op* op) => StoreMemory(s, op, SoftVcpu.From(s).Tr.Selector, isProtected: true);

    public static Op* StoreStatusMemory(VcpuBlock* s, Op* op) => StoreMemory(s, op, (ushort)s->Cr0, isProtected: false);

    public static Op* StoreLdtRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => StoreRegister<TWidth>(s, op, SoftVcpu.From(s).Ldtr.Selector, isProtected: true);

    public static Op* StoreTaskRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => StoreRegister<TWidth>(s, op, SoftVcpu.From(s).Tr.Selector, isProtected: true);

    /// <summary>SMSW to a register gives as much of CR0 as the register holds.</summary>
    public static Op* StoreStatusRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => StoreRegister<TWidth>(s, op, s->Cr0, isProtected: false);

    private static Op* StoreMemory(VcpuBlock* s, Op* op, ushort value, bool isProtected)
    {
        if (isProtected && (s->Mode & CodeMode.RealOrV86) != 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        if (!TryAllowReading(s))
            return Access.Fault(s, op);
        return Access.Store16(s, Access.Linear(s, op, 2, write: true), value) ? op + 1 : Access.Fault(s, op);
    }

    private static Op* StoreRegister<TWidth>(VcpuBlock* s, Op* op, ulong value, bool isProtected)
        where TWidth : struct, IWidth
    {
        if (isProtected && (s->Mode & CodeMode.RealOrV86) != 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        if (!TryAllowReading(s))
            return Access.Fault(s, op);
        TWidth.SetRegister((byte*)s + op->R0, value);
        return op + 1;
    }

    // LLDT, LTR, LMSW: a 16-bit operand in a register (R1) or memory (Aux).

    public static Op* LoadLdt(VcpuBlock* s, Op* op)
    {
        if (!TrySelectorOperand(s, op, out ushort selector))
            return Access.Fault(s, op);
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (DescriptorTables.IsNull(selector))
        {
            vcpu.Ldtr = SegmentLoads.Null(selector);
            return op + 1;
        }
        if (!TryReadSystem(vcpu, selector, 1u << (int)SystemDescriptorType.Ldt, out SegmentState state))
            return Access.Fault(s, op);
        vcpu.Ldtr = state;
        return op + 1;
    }

    public static Op* LoadTask(VcpuBlock* s, Op* op)
    {
        if (!TrySelectorOperand(s, op, out ushort selector))
            return Access.Fault(s, op);
        SoftVcpu vcpu = SoftVcpu.From(s);
        uint types = 1u << (int)SystemDescriptorType.Tss32Available;
        if (!DescriptorTables.IsLongMode(s))
            types |= 1u << (int)SystemDescriptorType.Tss16Available;
        if (DescriptorTables.IsNull(selector))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        if (!TryReadSystem(vcpu, selector, types, out SegmentState state) || !DescriptorTables.TryWriteType(vcpu, selector, (state.Attributes & 0xff) | 2))
            return Access.Fault(s, op);
        vcpu.Tr = state with { Attributes = state.Attributes | 2 };
        return op + 1;
    }

    /// <summary>LMSW: PE, MP, EM and TS; PE can be set but not cleared.</summary>
    public static Op* LoadStatus(VcpuBlock* s, Op* op)
    {
        if (s->Cpl != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        ushort value = *(ushort*)((byte*)s + op->R1);
        if (op->Aux == SelectorHandlers.Memory)
        {
            byte* p = Access.Read(s, Access.Linear(s, op, 2, write: false), 2);
            if (p == null)
                return Access.Fault(s, op);
            value = *(ushort*)p;
        }
        ulong cr0 = (s->Cr0 & ~(ulong)(Cr0.MP | Cr0.EM | Cr0.TS)) | ((ulong)value & 15);
        return ControlRegisterWrites.TryWriteCr0(SoftVcpu.From(s), cr0) ? Access.Leave(s, op) : Access.Fault(s, op);
    }

    private static bool TrySelectorOperand(VcpuBlock* s, Op* op, out ushort selector)
    {
        selector = 0;
        if ((s->Mode & CodeMode.RealOrV86) != 0)
            return Access.Record(s, ExceptionVector.InvalidOpcode);
        if (s->Cpl != 0)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (op->Aux != SelectorHandlers.Memory)
        {
            selector = *(ushort*)((byte*)s + op->R1);
            return true;
        }
        byte* p = Access.Read(s, Access.Linear(s, op, 2, write: false), 2);
        if (p == null)
            return false;
        selector = *(ushort*)p;
        return true;
    }

    /// <summary>A system descriptor of the GDT; in long mode it has 16 bytes.</summary>
    private static bool TryReadSystem(SoftVcpu vcpu, ushort selector, uint types, out SegmentState state)
    {
        state = default;
        if ((selector & 4) != 0)
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!DescriptorTables.TryRead(vcpu, selector, ExceptionVector.GeneralProtection, 0, out Descriptor descriptor))
            return false;
        if (!descriptor.IsSystem || (types >> (int)descriptor.SystemType & 1) == 0)
            return DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
        if (!descriptor.IsPresent)
            return DescriptorTables.Fail(vcpu, ExceptionVector.SegmentNotPresent, selector);
        state = descriptor.ToSegment(selector);
        if (!DescriptorTables.IsLongMode(vcpu.Block))
            return true;
        if (!DescriptorTables.TryReadUpper(vcpu, selector, ExceptionVector.GeneralProtection, 0, out ulong upper))
            return false;
        state.Base |= upper << 32;
        return Mmu.IsCanonical(state.Base) || DescriptorTables.Fail(vcpu, ExceptionVector.GeneralProtection, selector);
    }
}
