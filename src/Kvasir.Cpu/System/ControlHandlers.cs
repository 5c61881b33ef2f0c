using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of control and debug registers and translation invalidation.</summary>
internal static unsafe class ControlHandlers
{
    private static bool TryPrivileged(VcpuBlock* s) => s->Cpl == 0 || Access.Record(s, ExceptionVector.GeneralProtection, 0);

    private static void SetRegister(VcpuBlock* s, Op* op, ulong value) => *(ulong*)((byte*)s + op->R0) = DescriptorTables.Is64(s) ? value : (uint)value;

    private static ulong Source(VcpuBlock* s, Op* op)
    {
        ulong value = *(ulong*)((byte*)s + op->R0);
        return DescriptorTables.Is64(s) ? value : (uint)value;
    }

    /// <summary>MOV from CRn; <see cref="Op.Aux"/> is n.</summary>
    public static Op* ReadControl(VcpuBlock* s, Op* op)
    {
        if (!TryPrivileged(s))
            return Access.Fault(s, op);
        ulong value = op->Aux switch
        {
            0 => s->Cr0,
            2 => s->Cr2,
            3 => s->Cr3,
            4 => s->Cr4,
            _ => SoftVcpu.From(s).Apic.TaskPriorityClass,
        };
        SetRegister(s, op, value);
        return op + 1;
    }

    public static Op* WriteControl(VcpuBlock* s, Op* op)
    {
        if (!TryPrivileged(s))
            return Access.Fault(s, op);
        SoftVcpu vcpu = SoftVcpu.From(s);
        ulong value = Source(s, op);
        bool good;
        switch (op->Aux)
        {
            case 0:
                good = ControlRegisterWrites.TryWriteCr0(vcpu, value);
                break;
            case 2:
                s->Cr2 = value;
                return op + 1;
            case 3:
                good = ControlRegisterWrites.TryWriteCr3(vcpu, value);
                break;
            case 4:
                good = ControlRegisterWrites.TryWriteCr4(vcpu, value);
                break;
            default:
                good = value <= 15 || Access.Record(s, ExceptionVector.GeneralProtection, 0);
                if (good)
                    vcpu.Apic.TaskPriorityClass = (byte)value;
                break;
        }
        return good ? Access.Leave(s, op) : Access.Fault(s, op);
    }

    public static Op* ClearTaskSwitched(VcpuBlock* s, Op* op)
    {
        if (!TryPrivileged(s))
            return Access.Fault(s, op);
        s->Cr0 &= ~(ulong)Cr0.TS;
        return op + 1;
    }

    // Debug registers: Aux is the number; 4 and 5 are 6 and 7 unless CR4.DE.

    public static Op* ReadDebug(VcpuBlock* s, Op* op)
    {
        if (!TryDebugAccess(s, op, out int number))
            return Access.Fault(s, op);
        SetRegister(s, op, SoftVcpu.From(s).Debug.Read(number));
        return op + 1;
    }

    public static Op* WriteDebug(VcpuBlock* s, Op* op)
    {
        if (!TryDebugAccess(s, op, out int number))
            return Access.Fault(s, op);
        ulong value = Source(s, op);
        if (number >= 6 && value >> 32 != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        SoftVcpu.From(s).Debug.Write(number, value);
        return Access.Leave(s, op);
    }

    private static bool TryDebugAccess(VcpuBlock* s, Op* op, out int number)
    {
        number = op->Aux;
        // The privilege comes first: a user program's access to DR4 is #GP, not #UD.
        if (!TryPrivileged(s))
            return false;
        if (number is 4 or 5)
        {
            if ((s->Cr4 & (ulong)Cr4.DE) != 0)
                return Access.Record(s, ExceptionVector.InvalidOpcode);
            number += 2;
        }
        return SoftVcpu.From(s).Debug.TryAccess();
    }

    // Translations.

    /// <summary>INVLPG: a non-canonical address is no error.</summary>
    public static Op* InvalidatePage(VcpuBlock* s, Op* op)
    {
        if (!TryPrivileged(s))
            return Access.Fault(s, op);
        ulong linear = s->SegBase[op->Seg] + Access.CutOffset(op->Address, Access.Offset(s, op));
        SoftVcpu.From(s).Mmu.FlushPage(DescriptorTables.Is64(s) ? linear : (uint)linear);
        return Access.Leave(s, op);
    }

    /// <summary>INVPCID: the type is in a register, PCID and address in 16 bytes of memory.</summary>
    public static Op* InvalidatePcid(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!vcpu.Model.Has(CpuFeature.Invpcid) || (s->Cr0 & (ulong)Cr0.PE) == 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        if (!TryPrivileged(s))
            return Access.Fault(s, op);
        byte* p = Access.Read(s, Access.Linear(s, op, 16, write: false), 16);
        if (p == null)
            return Access.Fault(s, op);
        ulong type = Source(s, op);
        ulong pcid = *(ulong*)p;
        ulong linear = *(ulong*)(p + 8);
        bool pcids = (s->Cr4 & (ulong)Cr4.PCIDE) != 0;
        bool badPcid = type <= 1 && !pcids && (pcid & 0xfff) != 0;
        if (type > 3 || pcid >> 12 != 0 || badPcid || (type == 0 && !Mmu.IsCanonical(linear)))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        switch (type)
        {
            case 0:
                vcpu.Mmu.FlushPage(linear);
                break;
            case 1 when pcids:
                vcpu.Mmu.FlushPcid(pcid);
                break;
            case 2:
                vcpu.Mmu.FlushAll();
                break;
            default:
                vcpu.Mmu.FlushAllButGlobal();
                break;
        }
        return Access.Leave(s, op);
    }
}
