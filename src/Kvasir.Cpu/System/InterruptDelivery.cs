using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Where an event comes from: decides privilege checks and the EXT bit of what goes wrong meanwhile.</summary>
internal enum EventKind
{
    /// <summary>A fault or trap of the processor.</summary>
    Exception,

    /// <summary>An interrupt from outside, or an NMI.</summary>
    External,

    /// <summary>INT n.</summary>
    Software,

    /// <summary>INT3 or INTO.</summary>
    SoftwareException,

    /// <summary>INT1: no privilege check.</summary>
    PrivilegedSoftware,
}

/// <summary>Exceptions and interrupts through the IVT or IDT, in every mode (Intel SDM vol. 3, ch. "Interrupt and Exception Handling").</summary>
/// <remarks>A delivery that faults leaves registers as they were; what it pushed lies below the stack pointer.</remarks>
public sealed unsafe partial class InterruptDelivery
{
    private const ulong ClearedByRealMode = (ulong)(Rflags.IF | Rflags.TF | Rflags.AC | Rflags.RF);

    // Wiring
    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;

    internal InterruptDelivery(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
    }

    /// <summary>Delivers the fault recorded in the block, double faults included, and clears it. False: triple fault, the processor shuts down.</summary>
    public bool DeliverFault()
    {
        ExceptionVector vector = (ExceptionVector)_s->FaultVector;
        while (true)
        {
            uint error = _s->FaultError;
            bool hasError = _s->FaultHasError;
            if (vector == ExceptionVector.PageFault)
                _s->Cr2 = _s->FaultAddress;
            Forget();
            if (Deliver((byte)vector, EventKind.Exception, hasError, error, _s->Rip, SetsResume(vector)) && _s->FaultVector == Fault.None)
            {
                if (vector == ExceptionVector.Debug)
                    _vcpu.Debug.Delivered();
                return true;
            }
            if (vector == ExceptionVector.DoubleFault)
            {
                Forget();
                return false;
            }
            ExceptionVector second = (ExceptionVector)_s->FaultVector;
            if (MakesDoubleFault(vector, second))
            {
                // The address of the second page fault is what CR2 shows.
                if (second == ExceptionVector.PageFault)
                    _s->Cr2 = _s->FaultAddress;
                Access.Record(_s, ExceptionVector.DoubleFault, 0);
                second = ExceptionVector.DoubleFault;
            }
            vector = second;
        }
    }

    /// <summary>Delivers an external interrupt. False: triple fault.</summary>
    public bool DeliverExternal(byte vector)
    {
        bool delivered = Deliver(vector, EventKind.External, hasError: false, 0, _s->Rip, resume: false);
        return (delivered && _s->FaultVector == Fault.None) || DeliverFault();
    }

    /// <summary>Delivers an NMI. False: triple fault.</summary>
    public bool DeliverNmi() => DeliverExternal((byte)ExceptionVector.Nmi);

    /// <summary>
    /// INT n, INT3, INTO, INT1 and BOUND's kin: an event that an instruction asks for. False: a fault of the instruction was recorded. True: transferred;
    /// a task switch may have recorded a fault of the new task.
    /// </summary>
    internal bool TrySoftware(byte vector, EventKind kind, ulong next)
    {
        if (kind == EventKind.Software && SegmentLoads.IsV86(_s))
        {
            bool trusted = (_s->SystemFlags & (ulong)Rflags.IOPL) == (ulong)Rflags.IOPL;
            if ((_s->Cr4 & (ulong)Cr4.VME) != 0)
            {
                if (!TryReadRedirection(vector, out bool redirect))
                    return false;
                if (redirect)
                    return DeliverVirtual(vector, next, trusted);
            }
            if (!trusted)
                return Access.Record(_s, ExceptionVector.GeneralProtection, 0);
        }
        return Deliver(vector, kind, hasError: false, 0, next, resume: false);
    }

    private static bool IsContributory(ExceptionVector vector) => vector
        is ExceptionVector.DivideError or ExceptionVector.InvalidTss or ExceptionVector.SegmentNotPresent
        or ExceptionVector.StackFault or ExceptionVector.GeneralProtection or ExceptionVector.ControlProtection;

    /// <summary>The table of Intel SDM vol. 3, "Conditions for Generating a Double Fault".</summary>
    private static bool MakesDoubleFault(ExceptionVector first, ExceptionVector second) =>
        IsContributory(first) ? IsContributory(second)
        : first == ExceptionVector.PageFault && (IsContributory(second) || second == ExceptionVector.PageFault);

    /// <summary>Faults push RF set, so that a breakpoint at the instruction does not match again; traps and #DB push what RF was.</summary>
    private bool SetsResume(ExceptionVector vector) => vector switch
    {
        ExceptionVector.Debug => _vcpu.Debug.FaultIsGeneralDetect,
        ExceptionVector.Breakpoint or ExceptionVector.Overflow or ExceptionVector.DoubleFault or ExceptionVector.MachineCheck => false,
        _ => true,
    };

    private void Forget()
    {
        _s->FaultVector = Fault.None;
        _s->FaultNonCanonical = false;
        _s->SegmentFault = 0;
    }

    private bool Deliver(byte vector, EventKind kind, bool hasError, uint error, ulong rip, bool resume)
    {
        ulong flags = LazyFlags.Read(_s);
        if (resume)
            flags |= (ulong)Rflags.RF;
        bool delivered = (_s->Cr0 & (ulong)Cr0.PE) == 0
            ? DeliverReal(vector, kind, rip, flags)
            : DeliverProtected(vector, kind, hasError, error, rip, flags);
        if (delivered)
        {
            if (kind is EventKind.Software or EventKind.SoftwareException or EventKind.PrivilegedSoftware)
                _vcpu.Debug.SuppressStep();
            _vcpu.InterruptShadow = false;
            _vcpu.DebugShadow = false;
        }
        return delivered;
    }

    private static uint External(EventKind kind) => kind is EventKind.Software or EventKind.SoftwareException ? 0u : 1u;

    /// <summary>Real mode: four bytes of the IVT, three words on the stack, no error code.</summary>
    private bool DeliverReal(byte vector, EventKind kind, ulong rip, ulong flags)
    {
        if (vector * 4u + 3 > _vcpu.Idtr.Limit)
            return Access.Record(_s, ExceptionVector.GeneralProtection, (uint)vector << 3 | 2 | External(kind));
        if (!_vcpu.Mmu.TryReadSystem(DescriptorTables.CutLinear(_s, _vcpu.Idtr.Base + vector * 4u), 4, out ulong entry))
            return false;
        StackCursor stack = StackCursor.Current(_vcpu);
        if (!stack.TryPush(2, flags) || !stack.TryPush(2, _s->SegSelector[SegmentLoads.Cs]) || !stack.TryPush(2, rip))
            return false;
        Stack.SetPointer(_s, stack.Pointer);
        _s->SystemFlags &= ~ClearedByRealMode;
        _s->Rip = entry & 0xffff;
        SegmentLoads.LoadReal(_vcpu, SegmentLoads.Cs, (ushort)(entry >> 16));
        return true;
    }

    /// <summary>INT n of virtual-8086 mode that the redirection bitmap gives to the 8086 program (Intel SDM vol. 3, "Class 3 — Software Interrupt Handling").</summary>
    private bool DeliverVirtual(byte vector, ulong rip, bool trusted)
    {
        if (!_vcpu.Mmu.TryReadAs(AccessRights.User, vector * 4u, 4, out ulong entry))
            return false;
        ulong flags = LazyFlags.Read(_s);
        if (!trusted)
        {
            flags = (flags & ~(ulong)Rflags.IF) | (ulong)Rflags.IOPL;
            if ((flags & (ulong)Rflags.VIF) != 0)
                flags |= (ulong)Rflags.IF;
        }
        StackCursor stack = StackCursor.Current(_vcpu);
        if (!stack.TryPush(2, flags) || !stack.TryPush(2, _s->SegSelector[SegmentLoads.Cs]) || !stack.TryPush(2, rip))
            return false;
        Stack.SetPointer(_s, stack.Pointer);
        ulong cleared = (ulong)(Rflags.TF | Rflags.RF) | (ulong)(trusted ? Rflags.IF : Rflags.VIF);
        _s->SystemFlags &= ~cleared;
        _s->Rip = entry & 0xffff;
        SegmentLoads.LoadReal(_vcpu, SegmentLoads.Cs, (ushort)(entry >> 16));
        return true;
    }

    /// <summary>The bit of a vector in the 32 bytes before the I/O permission bitmap: clear where the 8086 program handles it itself.</summary>
    private bool TryReadRedirection(byte vector, out bool redirect)
    {
        redirect = false;
        if (!TaskState.Is32(_vcpu.Tr) || _vcpu.Tr.Limit < 0x67)
            return Access.Record(_s, ExceptionVector.GeneralProtection, 0);
        if (!_vcpu.Mmu.TryReadSystem(TaskState.Linear(_vcpu, 0x66), 2, out ulong map))
            return false;
        ulong offset = map - 32 + vector / 8u;
        if (map < 32 || offset > _vcpu.Tr.Limit)
            return Access.Record(_s, ExceptionVector.GeneralProtection, 0);
        if (!_vcpu.Mmu.TryReadSystem(TaskState.Linear(_vcpu, offset), 1, out ulong bits))
            return false;
        redirect = (bits >> (vector & 7) & 1) == 0;
        return true;
    }
}
