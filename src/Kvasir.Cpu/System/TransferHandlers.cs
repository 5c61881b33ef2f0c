using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of far transfers, software interrupts and returns. Each leaves its block.</summary>
internal static unsafe class TransferHandlers
{
    private static int Size(Op* op) => op->Flags >> OpFlags.SizeShift & 15;

    private static Op* Finish(VcpuBlock* s, Op* op, bool transferred) => transferred ? Access.Transferred(s, op) : Access.Fault(s, op);

    /// <summary>ptr16:16, ptr16:32: offset in <see cref="Op.Imm"/>, selector in <see cref="Op.Aux"/>.</summary>
    public static Op* JumpFar(VcpuBlock* s, Op* op) =>
        Finish(s, op, FarTransfers.TryTransfer(SoftVcpu.From(s), op->Aux, (ulong)op->Imm, Size(op), Access.NextRip(s, op), call: false));

    public static Op* CallFar(VcpuBlock* s, Op* op) =>
        Finish(s, op, FarTransfers.TryTransfer(SoftVcpu.From(s), op->Aux, (ulong)op->Imm, Size(op), Access.NextRip(s, op), call: true));

    public static Op* JumpFarMemory(VcpuBlock* s, Op* op) => Indirect(s, op, call: false);

    public static Op* CallFarMemory(VcpuBlock* s, Op* op) => Indirect(s, op, call: true);

    private static Op* Indirect(VcpuBlock* s, Op* op, bool call)
    {
        if (!SegmentHandlers.TryReadFarPointer(s, op, Size(op), out ulong offset, out ushort selector))
            return Access.Fault(s, op);
        return Finish(s, op, FarTransfers.TryTransfer(SoftVcpu.From(s), selector, offset, Size(op), Access.NextRip(s, op), call));
    }

    /// <summary>RET far; <see cref="Op.Imm"/> bytes of arguments are dropped.</summary>
    public static Op* ReturnFar(VcpuBlock* s, Op* op) => Finish(s, op, FarReturns.TryReturn(SoftVcpu.From(s), Size(op), (ulong)op->Imm));

    public static Op* InterruptReturn(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        if (!FarReturns.TryInterruptReturn(vcpu, Size(op), Access.NextRip(s, op)))
            return Access.Fault(s, op);
        vcpu.NmiBlocked = false;
        return Access.Transferred(s, op);
    }

    /// <summary>INT n: the vector is <see cref="Op.Imm"/>.</summary>
    public static Op* Interrupt(VcpuBlock* s, Op* op) => Software(s, op, (byte)op->Imm, EventKind.Software);

    public static Op* Int3(VcpuBlock* s, Op* op) => Software(s, op, (byte)ExceptionVector.Breakpoint, EventKind.SoftwareException);

    public static Op* Int1(VcpuBlock* s, Op* op) => Software(s, op, (byte)ExceptionVector.Debug, EventKind.PrivilegedSoftware);

    public static Op* IntO(VcpuBlock* s, Op* op) =>
        LazyFlags.Overflow(s) ? Software(s, op, (byte)ExceptionVector.Overflow, EventKind.SoftwareException) : op + 1;

    private static Op* Software(VcpuBlock* s, Op* op, byte vector, EventKind kind) =>
        Finish(s, op, SoftVcpu.From(s).Interrupts.TrySoftware(vector, kind, Access.NextRip(s, op)));

    /// <summary>BOUND: #BR where a signed index lies outside the two bounds in memory.</summary>
    public static Op* Bound<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes * 2, write: false), TWidth.Bytes * 2);
        if (p == null)
            return Access.Fault(s, op);
        long index = (long)TWidth.SignExtend(TWidth.Get((byte*)s + op->R0));
        long lower = (long)TWidth.SignExtend(TWidth.Get(p));
        long upper = (long)TWidth.SignExtend(TWidth.Get(p + TWidth.Bytes));
        return index < lower || index > upper ? Access.Raise(s, op, ExceptionVector.BoundRange) : op + 1;
    }
}
