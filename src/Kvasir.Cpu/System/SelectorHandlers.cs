using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// Handlers that examine selectors: LAR, LSL, VERR, VERW, ARPL. The selector's operand is a register (<see cref="Op.R1"/>) or memory.
/// All are #UD in real and virtual-8086 mode.
/// </summary>
internal static unsafe class SelectorHandlers
{
    /// <summary>Value of <see cref="Op.Aux"/> where the operand is memory.</summary>
    public const ushort Memory = 1;

    // System types that LAR and LSL accept, by bit: outside and in long mode.
    private const uint LarTypes = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 4 | 1u << 5 | 1u << 9 | 1u << 11 | 1u << 12;
    private const uint LarLongTypes = 1u << 2 | 1u << 9 | 1u << 11 | 1u << 12;
    private const uint LslTypes = 1u << 1 | 1u << 2 | 1u << 3 | 1u << 9 | 1u << 11;
    private const uint LslLongTypes = 1u << 2 | 1u << 9 | 1u << 11;

    public static Op* LoadAccessRights<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if (!TryOperand(s, op, out ushort selector))
            return Access.Fault(s, op);
        bool good = TryExamine(s, selector, LarTypes, LarLongTypes, out Descriptor descriptor);
        if (s->FaultVector != Fault.None)
            return Access.Fault(s, op);
        LazyFlags.SetZero(s, good);
        if (good)
            TWidth.SetRegister((byte*)s + op->R0, descriptor.Raw >> 32 & 0x00ff_ff00);
        return op + 1;
    }

    public static Op* LoadSegmentLimit<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        if (!TryOperand(s, op, out ushort selector))
            return Access.Fault(s, op);
        bool good = TryExamine(s, selector, LslTypes, LslLongTypes, out Descriptor descriptor);
        if (s->FaultVector != Fault.None)
            return Access.Fault(s, op);
        LazyFlags.SetZero(s, good);
        if (good)
            TWidth.SetRegister((byte*)s + op->R0, descriptor.Limit);
        return op + 1;
    }

    public static Op* VerifyRead(VcpuBlock* s, Op* op) => Verify(s, op, write: false);

    public static Op* VerifyWrite(VcpuBlock* s, Op* op) => Verify(s, op, write: true);

    private static Op* Verify(VcpuBlock* s, Op* op, bool write)
    {
        if (!TryOperand(s, op, out ushort selector))
            return Access.Fault(s, op);
        bool good = TryExamine(s, selector, 0, 0, out Descriptor descriptor);
        if (s->FaultVector != Fault.None)
            return Access.Fault(s, op);
        LazyFlags.SetZero(s, good && (write ? descriptor.IsWritableData : descriptor.IsReadable));
        return op + 1;
    }

    /// <summary>ARPL: raises the RPL of the destination (<see cref="Op.R0"/> or memory) to that of the source (<see cref="Op.R1"/>).</summary>
    public static Op* AdjustRpl(VcpuBlock* s, Op* op)
    {
        if ((s->Mode & CodeMode.RealOrV86) != 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        int rpl = *(ushort*)((byte*)s + op->R1) & 3;
        ushort* destination = (ushort*)((byte*)s + op->R0);
        if (op->Aux == Memory)
        {
            destination = (ushort*)Access.Read(s, Access.Linear(s, op, 2, write: false), 2);
            if (destination == null)
                return Access.Fault(s, op);
        }
        bool raised = (*destination & 3) < rpl;
        if (raised && op->Aux == Memory)
        {
            // The operand is written only where it changes: a read-only one is no fault otherwise.
            destination = (ushort*)Access.Modify(s, Access.Linear(s, op, 2, write: true), 2);
            if (destination == null)
                return Access.Fault(s, op);
        }
        if (raised)
            *destination = (ushort)((*destination & ~3) | rpl);
        Access.Commit(s);
        LazyFlags.SetZero(s, raised);
        return op + 1;
    }

    /// <summary>The selector operand. False: a fault was recorded (#UD where the mode has no selectors).</summary>
    private static bool TryOperand(VcpuBlock* s, Op* op, out ushort selector)
    {
        selector = 0;
        if ((s->Mode & CodeMode.RealOrV86) != 0)
            return Access.Record(s, ExceptionVector.InvalidOpcode);
        if (op->Aux != Memory)
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

    /// <summary>Whether a descriptor is visible at the current privilege and of a type that counts. A page fault is recorded.</summary>
    private static bool TryExamine(VcpuBlock* s, ushort selector, uint types, uint longTypes, out Descriptor descriptor)
    {
        descriptor = default;
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (DescriptorTables.IsNull(selector) || !DescriptorTables.TryLocate(vcpu, selector, 8, out ulong linear))
            return false;
        if (!vcpu.Mmu.TryReadSystem(linear, 8, out ulong raw))
            return false;
        descriptor = new Descriptor(raw);
        if (descriptor.IsSystem && ((DescriptorTables.IsLongMode(s) ? longTypes : types) >> (int)descriptor.SystemType & 1) == 0)
            return false;
        if (descriptor.IsCode && descriptor.IsConforming)
            return true;
        return descriptor.Dpl >= (int)s->Cpl && descriptor.Dpl >= (selector & 3);
    }
}
