using System;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// FXSAVE, FXRSTOR, the XSAVE family, MXCSR and XCR0 (Intel SDM vol. 1, "Managing State Using the XSAVE Feature Set"). <see cref="Op.Aux"/> is 1 for the forms with
/// 64-bit pointers (REX.W).
/// </summary>
internal static unsafe class XsaveHandlers
{
    private const int Rax = 0;
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int FxsaveBytes = 512;

    /// <summary>Outside 64-bit mode only eight registers are there.</summary>
    private static int Registers(VcpuBlock* s) => (s->Mode & CodeMode.SizeMask) == CodeMode.Code64 ? 16 : 8;

    private static ulong Requested(VcpuBlock* s) => ((uint)s->Gpr[Rax] | s->Gpr[Rdx] << 32) & s->Xcr0;

    public static Op* Fxsave(VcpuBlock* s, Op* op)
    {
        if (!FxsaveGate.Open(s))
            return Access.Fault(s, op);
        ulong linear = Access.Linear(s, op, FxsaveBytes, write: true);
        if ((linear & 15) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, 16))
            return WideAlignment.RaiseMisaligned(s, op, linear, FxsaveBytes);
        if (!Bulk.TryProbeWrite(s, linear, FxsaveBytes, BulkOrder.LastFirst))
            return Access.Fault(s, op);
        byte* area = stackalloc byte[XsaveArea.LegacyUsed];
        XsaveArea.WriteX87(s, area, allPointers: false, op->Aux != 0);
        bool sse = (s->Cr4 & (ulong)Cr4.OSFXSR) != 0;
        // Fast FXSAVE (AMD64 APM vol. 2, "FXSAVE and FXRSTOR"): the kernel does not want the XMM registers.
        bool fast = (s->Efer & (ulong)Efer.FFXSR) != 0 && s->Cpl == 0 && (s->Mode & CodeMode.SizeMask) == CodeMode.Code64;
        int registers = Registers(s);
        int bytes = XsaveArea.Mxcsr;
        if (sse)
            XsaveArea.WriteMxcsr(s, area);
        else
            new Span<byte>(area + XsaveArea.Mxcsr, 8).Clear();
        if (sse && !fast)
        {
            XsaveArea.WriteXmm(s, area, registers);
            bytes = XsaveArea.Xmm + registers * 16;
        }
        else
        {
            bytes = XsaveArea.Xmm;
        }
        return Bulk.Write(s, linear, area, bytes) ? op + 1 : Access.Fault(s, op);
    }

    public static Op* Fxrstor(VcpuBlock* s, Op* op)
    {
        if (!FxsaveGate.Open(s))
            return Access.Fault(s, op);
        ulong linear = Access.Linear(s, op, FxsaveBytes, write: false);
        if ((linear & 15) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, 16))
            return WideAlignment.RaiseMisaligned(s, op, linear, FxsaveBytes);
        byte* area = stackalloc byte[FxsaveBytes];
        if (!Bulk.TryRead(s, linear, area, FxsaveBytes, BulkOrder.LastFirst))
            return Access.Fault(s, op);
        bool sse = (s->Cr4 & (ulong)Cr4.OSFXSR) != 0;
        bool fast = (s->Efer & (ulong)Efer.FFXSR) != 0 && s->Cpl == 0 && (s->Mode & CodeMode.SizeMask) == CodeMode.Code64;
        uint mxcsr = *(uint*)(area + XsaveArea.Mxcsr);
        if (sse && (mxcsr & ~XsaveArea.MxcsrMask) != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        XsaveArea.ReadX87(s, area);
        XsaveArea.ReadPointers(s, area, op->Aux != 0);
        if (sse)
            s->Mxcsr = mxcsr;
        if (sse && !fast)
            XsaveArea.ReadXmm(s, area, Registers(s));
        return op + 1;
    }

    /// <summary>XSAVE: every requested component, in the standard format.</summary>
    public static Op* Xsave(VcpuBlock* s, Op* op) => SaveStandard(s, op, optimized: false);

    /// <summary>XSAVEOPT: components in their initial state are not written.</summary>
    public static Op* Xsaveopt(VcpuBlock* s, Op* op) => SaveStandard(s, op, optimized: true);

    public static Op* Xsavec(VcpuBlock* s, Op* op) => SaveCompacted(s, op);

    public static Op* Xsaves(VcpuBlock* s, Op* op)
    {
        if (!XsaveGate.Open(s))
            return Access.Fault(s, op);
        return s->Cpl == 0 ? SaveCompacted(s, op) : Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
    }

    public static Op* Xrstor(VcpuBlock* s, Op* op) => Restore(s, op, compactedOnly: false);

    public static Op* Xrstors(VcpuBlock* s, Op* op)
    {
        if (!XsaveGate.Open(s))
            return Access.Fault(s, op);
        return s->Cpl == 0 ? Restore(s, op, compactedOnly: true) : Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
    }

    public static Op* Xgetbv(VcpuBlock* s, Op* op)
    {
        if ((s->Cr4 & (ulong)Cr4.OSXSAVE) == 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        ulong value;
        switch ((uint)s->Gpr[Rcx])
        {
            case 0:
                value = s->Xcr0;
                break;
            case 1:
                value = s->Xcr0 & InUse(s);
                break;
            default:
                return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        }
        s->Gpr[Rax] = (uint)value;
        s->Gpr[Rdx] = value >> 32;
        return op + 1;
    }

    public static Op* Xsetbv(VcpuBlock* s, Op* op)
    {
        if ((s->Cr4 & (ulong)Cr4.OSXSAVE) == 0)
            return Access.Raise(s, op, ExceptionVector.InvalidOpcode);
        ulong value = (uint)s->Gpr[Rax] | s->Gpr[Rdx] << 32;
        const ulong sseAndAvx = XsaveArea.ComponentSse | XsaveArea.ComponentAvx;
        bool good = s->Cpl == 0
            && (uint)s->Gpr[Rcx] == 0
            && (value & ~SoftVcpu.From(s).Model.AllowedXcr0) == 0
            && (value & XsaveArea.ComponentX87) != 0
            && (value & sseAndAvx) != XsaveArea.ComponentAvx;
        if (!good)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        s->Xcr0 = value;
        return op + 1;
    }

    public static Op* Ldmxcsr<TGate>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        byte* memory = Access.Read(s, Access.Linear(s, op, 4, write: false), 4);
        if (memory == null)
            return Access.Fault(s, op);
        uint value = *(uint*)memory;
        if ((value & ~XsaveArea.MxcsrMask) != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        s->Mxcsr = value;
        return op + 1;
    }

    public static Op* Stmxcsr<TGate>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate =>
        TGate.Open(s) && Access.Store32(s, Access.Linear(s, op, 4, write: true), s->Mxcsr) ? op + 1 : Access.Fault(s, op);

    public static Op* Vzeroupper(VcpuBlock* s, Op* op)
    {
        if (!AvxGate.Open(s))
            return Access.Fault(s, op);
        XsaveArea.ReadYmm(s, null, Registers(s));
        return op + 1;
    }

    public static Op* Vzeroall(VcpuBlock* s, Op* op)
    {
        if (!AvxGate.Open(s))
            return Access.Fault(s, op);
        new Span<byte>(s->Vector, Registers(s) * VcpuBlock.VectorStride).Clear();
        return op + 1;
    }

    /// <summary>XINUSE; SSE counts as in use too while MXCSR is not its initial value.</summary>
    private static ulong InUse(VcpuBlock* s)
    {
        ulong inUse = XsaveArea.InUse(s, 16);
        return s->Mxcsr == FloatingPoint.DefaultMxcsr ? inUse : inUse | XsaveArea.ComponentSse;
    }

    private static int ImageBytes(ulong components) => (components & XsaveArea.ComponentAvx) != 0 ? XsaveArea.Size : XsaveArea.Ymm;

    private static Op* SaveStandard(VcpuBlock* s, Op* op, bool optimized)
    {
        if (!XsaveGate.Open(s))
            return Access.Fault(s, op);
        ulong requested = Requested(s);
        int size = ImageBytes(requested);
        ulong linear = Access.Linear(s, op, size, write: true);
        if ((linear & 63) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, 64))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        if (!Bulk.TryProbeWrite(s, linear, size, BulkOrder.Ends))
            return Access.Fault(s, op);
        byte* header = Access.Read(s, Bulk.Advance(s, linear, XsaveArea.StateBv), 8);
        if (header == null)
            return Access.Fault(s, op);
        ulong inUse = InUse(s);
        ulong stateBv = (*(ulong*)header & ~requested) | (inUse & requested);
        byte* area = stackalloc byte[XsaveArea.Size];
        ulong written = optimized ? requested & inUse : requested;
        bool mxcsr = (requested & (XsaveArea.ComponentSse | XsaveArea.ComponentAvx)) != 0;
        return WriteComponents(s, op, linear, area, written, mxcsr) && WriteWord(s, linear, XsaveArea.StateBv, stateBv) ? op + 1 : Access.Fault(s, op);
    }

    private static Op* SaveCompacted(VcpuBlock* s, Op* op)
    {
        if (!XsaveGate.Open(s))
            return Access.Fault(s, op);
        ulong requested = Requested(s);
        int size = ImageBytes(requested);
        ulong linear = Access.Linear(s, op, size, write: true);
        if ((linear & 63) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, 64))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        if (!Bulk.TryProbeWrite(s, linear, size, BulkOrder.Ends))
            return Access.Fault(s, op);
        ulong written = requested & InUse(s);
        byte* area = stackalloc byte[XsaveArea.Size];
        bool good = WriteComponents(s, op, linear, area, written, (written & XsaveArea.ComponentSse) != 0)
            && WriteWord(s, linear, XsaveArea.StateBv, written)
            && WriteWord(s, linear, XsaveArea.CompactBv, requested | XsaveArea.Compacted);
        return good ? op + 1 : Access.Fault(s, op);
    }

    /// <summary>Writes the given components and nothing between them. The place was found writable before.</summary>
    private static bool WriteComponents(VcpuBlock* s, Op* op, ulong linear, byte* area, ulong components, bool mxcsr)
    {
        int registers = Registers(s);
        if ((components & XsaveArea.ComponentX87) != 0)
        {
            XsaveArea.WriteX87(s, area, allPointers: false, op->Aux != 0);
            if (!Put(s, linear, area, 0, XsaveArea.Mxcsr) || !Put(s, linear, area, XsaveArea.St, 128))
                return false;
        }
        if (mxcsr)
        {
            XsaveArea.WriteMxcsr(s, area);
            if (!Put(s, linear, area, XsaveArea.Mxcsr, 8))
                return false;
        }
        if ((components & XsaveArea.ComponentSse) != 0)
        {
            XsaveArea.WriteXmm(s, area, registers);
            if (!Put(s, linear, area, XsaveArea.Xmm, registers * 16))
                return false;
        }
        if ((components & XsaveArea.ComponentAvx) == 0)
            return true;
        XsaveArea.WriteYmm(s, area, registers);
        return Put(s, linear, area, XsaveArea.Ymm, registers * 16);
    }

    private static bool Put(VcpuBlock* s, ulong linear, byte* area, int offset, int bytes) =>
        Bulk.Write(s, Bulk.Advance(s, linear, offset), area + offset, bytes);

    private static bool WriteWord(VcpuBlock* s, ulong linear, int offset, ulong value) => Access.Store64(s, Bulk.Advance(s, linear, offset), value);

    private static Op* Restore(VcpuBlock* s, Op* op, bool compactedOnly)
    {
        if (!XsaveGate.Open(s))
            return Access.Fault(s, op);
        ulong requested = Requested(s);
        ulong linear = Access.Linear(s, op, XsaveArea.Ymm, write: false);
        if ((linear & 63) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, 64))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        byte* area = stackalloc byte[XsaveArea.Size];
        if (!Bulk.TryRead(s, linear, area, XsaveArea.Ymm, BulkOrder.Ends))
            return Access.Fault(s, op);
        ulong stateBv = *(ulong*)(area + XsaveArea.StateBv);
        ulong compactBv = *(ulong*)(area + XsaveArea.CompactBv);
        bool compacted = (compactBv & XsaveArea.Compacted) != 0;
        if (!HeaderIsGood(s, area, stateBv, compactBv, compacted, compactedOnly))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        ulong load = requested & stateBv;
        if ((load & XsaveArea.ComponentAvx) != 0)
        {
            ulong upper = Access.Linear(s, op, XsaveArea.Size, write: false);
            if (!Bulk.TryRead(s, Bulk.Advance(s, upper, XsaveArea.Ymm), area + XsaveArea.Ymm, XsaveArea.YmmBytes, BulkOrder.Ascending))
                return Access.Fault(s, op);
        }
        // The standard format has MXCSR outside its component; the compacted one inside.
        bool mxcsr = compacted
            ? (load & XsaveArea.ComponentSse) != 0
            : (requested & (XsaveArea.ComponentSse | XsaveArea.ComponentAvx)) != 0;
        uint value = *(uint*)(area + XsaveArea.Mxcsr);
        if (mxcsr && (value & ~XsaveArea.MxcsrMask) != 0)
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        Apply(s, op, area, requested, load);
        if (mxcsr)
            s->Mxcsr = value;
        else if (compacted && (requested & XsaveArea.ComponentSse) != 0)
            s->Mxcsr = FloatingPoint.DefaultMxcsr;
        return op + 1;
    }

    private static bool HeaderIsGood(VcpuBlock* s, byte* area, ulong stateBv, ulong compactBv, bool compacted, bool compactedOnly)
    {
        if ((stateBv & ~s->Xcr0) != 0)
            return false;
        if (compacted)
        {
            ulong components = compactBv & ~XsaveArea.Compacted;
            return (components & ~s->Xcr0) == 0
                && (stateBv & ~components) == 0
                && !new ReadOnlySpan<byte>(area + XsaveArea.CompactBv + 8, 48).ContainsAnyExcept((byte)0);
        }
        return !compactedOnly && !new ReadOnlySpan<byte>(area + XsaveArea.CompactBv, 16).ContainsAnyExcept((byte)0);
    }

    private static void Apply(VcpuBlock* s, Op* op, byte* area, ulong requested, ulong load)
    {
        int registers = Registers(s);
        if ((load & XsaveArea.ComponentX87) != 0)
        {
            XsaveArea.ReadX87(s, area);
            XsaveArea.ReadPointers(s, area, op->Aux != 0);
        }
        else if ((requested & XsaveArea.ComponentX87) != 0)
        {
            X87State.InitializeAll(s);
        }
        if ((requested & XsaveArea.ComponentSse) != 0)
            XsaveArea.ReadXmm(s, (load & XsaveArea.ComponentSse) != 0 ? area : null, registers);
        if ((requested & XsaveArea.ComponentAvx) != 0)
            XsaveArea.ReadYmm(s, (load & XsaveArea.ComponentAvx) != 0 ? area : null, registers);
    }
}
