using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of port I/O: IN, OUT, INS, OUTS (Intel SDM vol. 1, ch. "Input/Output").</summary>
internal static unsafe class PortHandlers
{
    /// <summary>Value of <see cref="Op.Aux"/> where the port is in DX; else it is <see cref="Op.Imm"/>.</summary>
    public const ushort PortInDx = 1;

    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rsi = 6;
    private const int Rdi = 7;

    public static Op* In<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ushort port = Port(s, op);
        if (!TryAllow(vcpu, port, TWidth.Bytes))
            return Access.Fault(s, op);
        TWidth.SetRegister((byte*)&s->Gpr[0], vcpu.Ports.Read(port, (AccessSize)TWidth.Bytes));
        return op + 1;
    }

    public static Op* Out<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ushort port = Port(s, op);
        if (!TryAllow(vcpu, port, TWidth.Bytes))
            return Access.Fault(s, op);
        vcpu.Ports.Write(port, (AccessSize)TWidth.Bytes, (uint)TWidth.Get((byte*)&s->Gpr[0]));
        return op + 1;
    }

    /// <summary>INS: the destination is checked before the port is read, so that a fault loses nothing.</summary>
    public static Op* InString<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ushort port = (ushort)s->Gpr[Rdx];
        if (!TryAllow(vcpu, port, TWidth.Bytes))
            return Access.Fault(s, op);
        bool repeats = Repeats(op);
        if (repeats && Count(s, op) == 0)
            return op + 1;
        while (true)
        {
            byte* p = Access.Overwrite(s, Linear(s, op, s->Gpr[Rdi], TWidth.Bytes, write: true), TWidth.Bytes);
            if (p == null)
                return Access.Fault(s, op);
            TWidth.Put(p, vcpu.Ports.Read(port, (AccessSize)TWidth.Bytes));
            Access.Commit(s);
            Advance(s, op, Rdi, TWidth.Bytes);
            if (!repeats || CountDown(s, op) == 0)
                return op + 1;
            if (MustPause(s, vcpu))
                return Pause(s, op);
        }
    }

    public static Op* OutString<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ushort port = (ushort)s->Gpr[Rdx];
        if (!TryAllow(vcpu, port, TWidth.Bytes))
            return Access.Fault(s, op);
        bool repeats = Repeats(op);
        if (repeats && Count(s, op) == 0)
            return op + 1;
        while (true)
        {
            byte* p = Access.Read(s, Linear(s, op, s->Gpr[Rsi], TWidth.Bytes, write: false), TWidth.Bytes);
            if (p == null)
                return Access.Fault(s, op);
            vcpu.Ports.Write(port, (AccessSize)TWidth.Bytes, (uint)TWidth.Get(p));
            Advance(s, op, Rsi, TWidth.Bytes);
            if (!repeats || CountDown(s, op) == 0)
                return op + 1;
            if (MustPause(s, vcpu))
                return Pause(s, op);
        }
    }

    /// <summary>
    /// IOPL, or the I/O permission bitmap of a 32-bit TSS, must allow the ports. False: a fault was recorded. Breakpoints on ports are noted.
    /// </summary>
    private static bool TryAllow(SoftVcpu vcpu, ushort port, int size)
    {
        VcpuBlock* s = vcpu.Block;
        bool free = (s->Cr0 & (ulong)Cr0.PE) == 0 || (!SegmentLoads.IsV86(s) && s->Cpl <= (s->SystemFlags >> 12 & 3));
        if (!free && !TryBitmap(vcpu, port, size))
            return false;
        if (vcpu.Debug.HasPortBreakpoints)
            vcpu.Debug.CheckPort(port, size);
        return true;
    }

    private static bool TryBitmap(SoftVcpu vcpu, ushort port, int size)
    {
        VcpuBlock* s = vcpu.Block;
        const uint mapBaseAt = 0x66;
        if (!TaskState.Is32(in vcpu.Tr) || vcpu.Tr.Limit < mapBaseAt + 1)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (!vcpu.Mmu.TryReadSystem(TaskState.Linear(vcpu, mapBaseAt), 2, out ulong map))
            return false;
        // Two bytes are read always: the bits of a wide access may lie in both.
        ulong at = map + port / 8u;
        if (at + 1 > vcpu.Tr.Limit)
            return Access.Record(s, ExceptionVector.GeneralProtection, 0);
        if (!vcpu.Mmu.TryReadSystem(TaskState.Linear(vcpu, at), 2, out ulong bits))
            return false;
        ulong wanted = (1ul << size) - 1;
        return (bits >> (port & 7) & wanted) == 0 || Access.Record(s, ExceptionVector.GeneralProtection, 0);
    }

    private static ushort Port(VcpuBlock* s, Op* op) => op->Aux == PortInDx ? (ushort)s->Gpr[Rdx] : (ushort)op->Imm;

    private static bool Repeats(Op* op) => (op->Flags & (OpFlags.Rep | OpFlags.Repne)) != 0;

    private static ulong Count(VcpuBlock* s, Op* op) => Access.CutOffset(op->Address, s->Gpr[Rcx]);

    private static ulong CountDown(VcpuBlock* s, Op* op)
    {
        SetCut(s, op, Rcx, s->Gpr[Rcx] - 1);
        return Count(s, op);
    }

    private static void Advance(VcpuBlock* s, Op* op, int register, int bytes)
    {
        bool down = (s->SystemFlags & (ulong)Rflags.DF) != 0;
        SetCut(s, op, register, s->Gpr[register] + (ulong)(down ? -bytes : bytes));
    }

    /// <summary>Address registers have the address size; a 32-bit one clears the upper half.</summary>
    private static void SetCut(VcpuBlock* s, Op* op, int register, ulong value)
    {
        if (op->Address == AddressKind.Legacy16)
            *(ushort*)&s->Gpr[register] = (ushort)value;
        else
            s->Gpr[register] = Access.CutOffset(op->Address, value);
    }

    private static ulong Linear(VcpuBlock* s, Op* op, ulong offset, int size, bool write)
    {
        offset = Access.CutOffset(op->Address, offset);
        return op->Address is AddressKind.Long or AddressKind.Long32
            ? s->SegBase[op->Seg] + offset
            : Access.LegacySegment(s, op->Seg, offset, size, write);
    }

    /// <summary>Whether the loop ends for now: something waits, or every iteration traps.</summary>
    private static bool MustPause(VcpuBlock* s, SoftVcpu vcpu) =>
        s->Pending != 0 || (s->SystemFlags & (ulong)Rflags.TF) != 0 || vcpu.Debug.IsActive;

    private static Op* Pause(VcpuBlock* s, Op* op)
    {
        s->Rip = Access.CurrentRip(s, op);
        s->Retired += (ulong)(op->Ordinal - 1);
        return null;
    }
}
