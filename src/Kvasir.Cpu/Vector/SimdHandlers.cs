using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of instructions that run as the host's own: by where their operands lie. <see cref="Op.Imm"/> is the thunk.</summary>
internal static unsafe class SimdHandlers
{
    /// <summary>Log2 of the memory operand's size, in <see cref="Op.Flags"/>.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static int Size(Op* op) => 1 << (op->Flags >> OpFlags.SizeShift & 15);

    public static Op* Registers<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody => TGate.Open(s) && TBody.Run(s, op, null) ? op + 1 : Access.Fault(s, op);

    public static Op* Load<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        int size = Size(op);
        ulong linear = Access.Linear(s, op, size, write: false);
        if ((linear & (ulong)(size - 1)) != 0 && !WideAlignment.Allows(s, linear, size))
            return Access.Fault(s, op);
        byte* memory = Access.Read(s, linear, size);
        return memory != null && TBody.Run(s, op, memory) ? op + 1 : Access.Fault(s, op);
    }

    /// <summary>A load that must be aligned.</summary>
    public static Op* LoadAligned<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        int size = Size(op);
        ulong linear = Access.Linear(s, op, size, write: false);
        bool misaligned = (linear & (ulong)(size - 1)) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, size);
        if (misaligned && !WideAlignment.AllowsMisaligned(s, op, linear, size))
            return Access.Fault(s, op);
        byte* memory = Access.Read(s, linear, size);
        if (memory == null)
            return Access.Fault(s, op);
        if (misaligned)
        {
            // The host's own alignment check must not see the operand.
            System.Buffer.MemoryCopy(memory, s->ThunkScratch, size, size);
            memory = s->ThunkScratch;
        }
        return TBody.Run(s, op, memory) ? op + 1 : Access.Fault(s, op);
    }

    public static Op* Store<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        int size = Size(op);
        ulong linear = Access.Linear(s, op, size, write: true);
        if ((linear & (ulong)(size - 1)) != 0 && !WideAlignment.Allows(s, linear, size))
            return Access.Fault(s, op);
        return StoreAt<TBody>(s, op, linear, size);
    }

    public static Op* StoreAligned<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        int size = Size(op);
        ulong linear = Access.Linear(s, op, size, write: true);
        if ((linear & (ulong)(size - 1)) != 0 || WideAlignment.IsPoisonMisaligned(s, op, linear, size))
            return Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
        return StoreAt<TBody>(s, op, linear, size);
    }

    /// <summary>A store of a result that may yet be undone (VCVTPS2PH): memory is written when it is known to be good.</summary>
    public static Op* StoreComputed<TGate, TBody>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate
        where TBody : struct, IBody
    {
        if (!TGate.Open(s))
            return Access.Fault(s, op);
        int size = Size(op);
        ulong linear = Access.Linear(s, op, size, write: true);
        if ((linear & (ulong)(size - 1)) != 0 && !WideAlignment.Allows(s, linear, size))
            return Access.Fault(s, op);
        byte* memory = Access.Overwrite(s, linear, size);
        if (memory == null)
            return Access.Fault(s, op);
        if (!TBody.Run(s, op, s->ThunkScratch))
        {
            s->StorePending = false;
            return Access.Fault(s, op);
        }
        System.Buffer.MemoryCopy(s->ThunkScratch, memory, size, size);
        Access.Commit(s);
        return op + 1;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Op* StoreAt<TBody>(VcpuBlock* s, Op* op, ulong linear, int size)
        where TBody : struct, IBody
    {
        byte* memory = Access.Overwrite(s, linear, size);
        if (memory == null)
            return Access.Fault(s, op);
        TBody.Run(s, op, memory);
        Access.Commit(s);
        return op + 1;
    }
}

/// <summary>Alignment of operands wider than 8 bytes.</summary>
internal static unsafe class WideAlignment
{
    private const uint MisalignedMode = 1u << 17;

    /// <summary>A misaligned operand that need not be aligned: #AC where user code has that on. Operands up to 8 bytes are looked at by the MMU.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static bool Allows(VcpuBlock* s, ulong linear, int size)
    {
        // Wider operands count as 16 bytes here; an address that is none is the access's own fault.
        if (size <= 8 || (linear & 15) == 0 || !IsChecked(s) || !IsAddress(s, linear, size))
            return true;
        return Access.Record(s, ExceptionVector.AlignmentCheck, 0);
    }

    /// <summary>Whether misaligned accesses raise #AC now.</summary>
    public static bool IsChecked(VcpuBlock* s) => s->Cpl == 3 && (s->SystemFlags & (ulong)Rflags.AC) != 0 && (s->Cr0 & (ulong)Cr0.AM) != 0;

    /// <summary>A misaligned operand that must be aligned: #GP, but for computing instructions in AMD's misaligned SSE mode (MXCSR.MM).</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static bool AllowsMisaligned(VcpuBlock* s, Op* op, ulong linear, int size)
    {
        if ((s->Mxcsr & MisalignedMode) != 0 && (op->Flags & Thunks.Strict) == 0)
            return Allows(s, linear, size);
        return Access.Record(s, ExceptionVector.GeneralProtection, 0);
    }

    /// <summary>An operand outside its segment that is misaligned too: that comes first. The segment's fault is forgotten then.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool IsPoisonMisaligned(VcpuBlock* s, Op* op, ulong linear, int size) =>
        linear == Access.Poison && s->SegmentFault != 0 && IsMisalignedOutside(s, op, size);

    /// <summary>The fault of a misaligned FXSAVE image: #AC where that is checked and not even double words are aligned, else #GP.</summary>
    public static Op* RaiseMisaligned(VcpuBlock* s, Op* op, ulong linear, int size)
    {
        bool check = (linear & 3) != 0 && IsChecked(s) && IsAddress(s, linear, size);
        return Access.Raise(s, op, check ? ExceptionVector.AlignmentCheck : ExceptionVector.GeneralProtection, 0);
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static bool IsMisalignedOutside(VcpuBlock* s, Op* op, int size)
    {
        ulong linear = s->SegBase[op->Seg] + Access.CutOffset(op->Address, Access.Offset(s, op));
        if ((linear & (ulong)(size - 1)) == 0)
            return false;
        s->SegmentFault = 0;
        return true;
    }

    private static bool IsAddress(VcpuBlock* s, ulong linear, int size) =>
        (s->Efer & (ulong)Efer.LMA) == 0 || (Mmu.IsCanonical(linear) && Mmu.IsCanonical(linear + (ulong)size - 1));
}
