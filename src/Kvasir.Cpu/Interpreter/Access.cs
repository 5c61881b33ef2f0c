using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// How handlers reach guest memory. The fast path is one compare against the software TLB, which covers the tag and the page's end; everything else (misses,
/// page crossings, MMIO, pages with code, alignment checks, watchpoints) is out of line in <see cref="Mmu"/>. A null pointer or false means that a fault was
/// recorded: the handler changes nothing more and returns <see cref="Fault"/>.
/// </summary>
public static unsafe class Access
{
    /// <summary>Linear address that no TLB entry holds: given for an operand whose segment check failed.</summary>
    public const ulong Poison = 0x8000_0000_0000_0000;

    /// <summary>The linear address of the operation's memory operand of <paramref name="size"/> bytes.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Linear(VcpuBlock* s, Op* op, int size, bool write)
    {
        ulong offset = Offset(s, op);
        if (op->Address == AddressKind.Long)
            return offset + s->SegBase[op->Seg];
        return LinearLegacy(s, op, offset, size, write);
    }

    /// <summary>The effective address before segmentation, not yet cut to the address size.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong Offset(VcpuBlock* s, Op* op) =>
        *(ulong*)((byte*)s + op->Base) + (*(ulong*)((byte*)s + op->Index) << op->Scale) + (ulong)op->Disp;

    /// <summary>The effective address cut to the operation's address size (LEA, string and bit addressing).</summary>
    public static ulong CutOffset(AddressKind kind, ulong offset) => kind switch
    {
        AddressKind.Long => offset,
        AddressKind.Legacy16 => (ushort)offset,
        _ => (uint)offset,
    };

    /// <summary>Segmentation outside plain 64-bit addressing. A failed check leaves its vector in <see cref="VcpuBlock.SegmentFault"/> and gives <see cref="Poison"/>.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static ulong LinearLegacy(VcpuBlock* s, Op* op, ulong offset, int size, bool write)
    {
        offset = CutOffset(op->Address, offset);
        if (op->Address == AddressKind.Long32)
            return offset + s->SegBase[op->Seg];
        return LegacySegment(s, op->Seg, offset, size, write);
    }

    /// <summary>Base + offset with the limit and type checks of legacy and compatibility mode.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong LegacySegment(VcpuBlock* s, int segment, ulong offset, int size, bool write)
    {
        ulong end = write ? s->SegWriteEnd[segment] : s->SegReadEnd[segment];
        if (offset + (ulong)size <= end)
            return (uint)(s->SegBase[segment] + offset);
        return LegacySegmentSlow(s, segment, offset, size, write);
    }

    /// <summary>Whether a segment may be used so at all, limit apart (Intel SDM vol. 3, "Type Checking").</summary>
    public static bool SegmentAllows(VcpuBlock* s, int segment, bool write)
    {
        SegmentAttributes a = (SegmentAttributes)s->SegAttributes[segment];
        if ((a & SegmentAttributes.Unusable) != 0 || (a & SegmentAttributes.Present) == 0)
            return false;
        if ((s->Mode & CodeMode.RealOrV86) != 0)
            return true;
        if ((a & SegmentAttributes.Code) != 0)
            return !write && (a & SegmentAttributes.WritableOrReadable) != 0;
        return !write || (a & SegmentAttributes.WritableOrReadable) != 0;
    }

    /// <summary>Whether [offset, offset + size) lies inside a segment's limit, expand-down segments included.</summary>
    public static bool WithinLimit(VcpuBlock* s, int segment, ulong offset, int size)
    {
        SegmentAttributes a = (SegmentAttributes)s->SegAttributes[segment];
        ulong last = offset + (ulong)size - 1;
        bool expandDown = (a & (SegmentAttributes.Code | SegmentAttributes.ExpandDownOrConforming)) == SegmentAttributes.ExpandDownOrConforming;
        if (!expandDown)
            return last <= s->SegLimit[segment];
        ulong top = (a & SegmentAttributes.Default32) != 0 ? 0xffff_ffff : 0xffff;
        return offset > s->SegLimit[segment] && last <= top;
    }

    /// <summary>Computes the fast-path bounds of a segment from its base, limit and attributes; for whoever loads one.</summary>
    public static void UpdateBounds(VcpuBlock* s, int segment)
    {
        SegmentAttributes a = (SegmentAttributes)s->SegAttributes[segment];
        bool expandDown = (a & (SegmentAttributes.Code | SegmentAttributes.ExpandDownOrConforming)) == SegmentAttributes.ExpandDownOrConforming;
        ulong end = expandDown ? 0 : (ulong)s->SegLimit[segment] + 1;
        s->SegReadEnd[segment] = SegmentAllows(s, segment, write: false) ? end : 0;
        s->SegWriteEnd[segment] = SegmentAllows(s, segment, write: true) ? end : 0;
    }

    /// <summary>A pointer to <paramref name="size"/> readable bytes: guest memory itself, or a copy in the scratch area. Null after a fault.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* Read(VcpuBlock* s, ulong linear, int size)
    {
        TlbEntry* entry = s->ReadTlb + (linear >> 12 & Tlb.IndexMask);
        ulong offset = linear ^ entry->Tag;
        if (offset <= (ulong)(4096 - size))
            return entry->Host + offset;
        return Mmu.ReadSlow(s, linear, size);
    }

    /// <summary>
    /// A pointer to <paramref name="size"/> bytes to change in place: guest memory, or the scratch area with the bytes in it. The caller writes, then calls
    /// <see cref="Commit"/>. Null after a fault.
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* Modify(VcpuBlock* s, ulong linear, int size, bool locked = false)
    {
        TlbEntry* entry = s->WriteTlb + (linear >> 12 & Tlb.IndexMask);
        ulong offset = linear ^ entry->Tag;
        if (offset <= (ulong)(4096 - size))
            return entry->Host + offset;
        return Mmu.ModifySlow(s, linear, size, locked);
    }

    /// <summary>
    /// A pointer to <paramref name="size"/> bytes to overwrite wholly: as <see cref="Modify"/>, but nothing is read first (a device's register may mind).
    /// </summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static byte* Overwrite(VcpuBlock* s, ulong linear, int size)
    {
        TlbEntry* entry = s->WriteTlb + (linear >> 12 & Tlb.IndexMask);
        ulong offset = linear ^ entry->Tag;
        if (offset <= (ulong)(4096 - size))
            return entry->Host + offset;
        return Mmu.OverwriteSlow(s, linear, size);
    }

    /// <summary>Finishes a store that <see cref="Modify"/> or <see cref="Overwrite"/> left pending.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Commit(VcpuBlock* s)
    {
        if (s->StorePending)
            Mmu.CommitStore(s);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Store8(VcpuBlock* s, ulong linear, byte value)
    {
        byte* p = Overwrite(s, linear, 1);
        if (p == null)
            return false;
        *p = value;
        Commit(s);
        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Store16(VcpuBlock* s, ulong linear, ushort value)
    {
        byte* p = Overwrite(s, linear, 2);
        if (p == null)
            return false;
        *(ushort*)p = value;
        Commit(s);
        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Store32(VcpuBlock* s, ulong linear, uint value)
    {
        byte* p = Overwrite(s, linear, 4);
        if (p == null)
            return false;
        *(uint*)p = value;
        Commit(s);
        return true;
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static bool Store64(VcpuBlock* s, ulong linear, ulong value)
    {
        byte* p = Overwrite(s, linear, 8);
        if (p == null)
            return false;
        *(ulong*)p = value;
        Commit(s);
        return true;
    }

    /// <summary>
    /// Leaves the block at an instruction that faulted: RIP is the instruction's own, the fault as recorded. Returns null for the handler to return.
    /// </summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Op* Fault(VcpuBlock* s, Op* op)
    {
        if (s->FaultNonCanonical)
        {
            s->FaultNonCanonical = false;
            if ((op->Flags & OpFlags.StackSegment) != 0)
                s->FaultVector = (byte)ExceptionVector.StackFault;
        }
        s->Rip = CurrentRip(s, op);
        s->Retired += (ulong)(op->Ordinal - 1);
        return null;
    }

    /// <summary>As <see cref="Fault"/>, for an access to the stack by an instruction whose explicit operand lies elsewhere.</summary>
    public static Op* StackFault(VcpuBlock* s, Op* op)
    {
        if (s->FaultNonCanonical)
            s->FaultVector = (byte)ExceptionVector.StackFault;
        s->FaultNonCanonical = false;
        return Fault(s, op);
    }

    /// <summary>Raises an exception with an error code at this instruction.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Op* Raise(VcpuBlock* s, Op* op, ExceptionVector vector, uint errorCode)
    {
        Record(s, vector, errorCode);
        return Fault(s, op);
    }

    /// <summary>Raises an exception without an error code at this instruction.</summary>
    [MethodImpl(MethodImplOptions.NoInlining)]
    public static Op* Raise(VcpuBlock* s, Op* op, ExceptionVector vector)
    {
        Record(s, vector);
        return Fault(s, op);
    }

    /// <summary>Records an exception with an error code; false, for methods that report failure so.</summary>
    public static bool Record(VcpuBlock* s, ExceptionVector vector, uint errorCode)
    {
        s->FaultVector = (byte)vector;
        s->FaultHasError = true;
        s->FaultError = errorCode;
        s->FaultNonCanonical = false;
        return false;
    }

    /// <summary>Records an exception without an error code; false, for methods that report failure so.</summary>
    public static bool Record(VcpuBlock* s, ExceptionVector vector)
    {
        s->FaultVector = (byte)vector;
        s->FaultHasError = false;
        s->FaultNonCanonical = false;
        return false;
    }

    /// <summary>RIP of an operation's instruction, cut to the mode's width.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong CurrentRip(VcpuBlock* s, Op* op) => CutRip(s, s->BlockRip + op->Offset);

    /// <summary>RIP of the instruction after an operation's, cut to the mode's width.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ulong NextRip(VcpuBlock* s, Op* op) => CutRip(s, s->BlockRip + op->Offset + op->Length);

    /// <summary>Leaves the block after an instruction that retires and changed what blocks depend on: the next one is looked up anew.</summary>
    public static Op* Leave(VcpuBlock* s, Op* op)
    {
        s->Rip = NextRip(s, op);
        s->Retired += op->Ordinal;
        return null;
    }

    /// <summary>Leaves the block after an instruction that retires and set <see cref="VcpuBlock.Rip"/> itself (far transfers, IRET, SYSCALL).</summary>
    public static Op* Transferred(VcpuBlock* s, Op* op)
    {
        s->Retired += op->Ordinal;
        return null;
    }

    private static ulong CutRip(VcpuBlock* s, ulong rip) => (s->Mode & CodeMode.SizeMask) switch
    {
        CodeMode.Code64 => rip,
        CodeMode.Code32 => (uint)rip,
        _ => (uint)rip,
    };

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static ulong LegacySegmentSlow(VcpuBlock* s, int segment, ulong offset, int size, bool write)
    {
        if (SegmentAllows(s, segment, write) && WithinLimit(s, segment, offset, size))
            return (uint)(s->SegBase[segment] + offset);
        s->SegmentFault = (byte)(segment == 2 ? ExceptionVector.StackFault : ExceptionVector.GeneralProtection);
        return Poison;
    }
}
