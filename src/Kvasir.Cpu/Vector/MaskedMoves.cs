using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// Moves whose elements a mask chooses: an element that is not chosen is not touched in memory (Intel SDM vol. 2, MASKMOV, VMASKMOV, VPMASKMOV). The vector
/// operands' places are as in thunks (units of 4 bytes); the element's size is the type argument's, the vector's in <see cref="Op.Flags"/>.
/// </summary>
internal static unsafe class MaskedMoves
{
    /// <summary>VMASKMOVPS/PD, VPMASKMOVD/Q from memory: operands destination, mask.</summary>
    public static Op* Load<TElement>(VcpuBlock* s, Op* op)
        where TElement : struct, IWidth
    {
        if (!AvxGate.Open(s))
            return Access.Fault(s, op);
        int size = SimdHandlers.Size(op);
        byte* mask = Register(s, op->R1);
        byte* result = stackalloc byte[VcpuBlock.VectorStride];
        for (int i = 0; i < VcpuBlock.VectorStride; i++)
            result[i] = 0;
        for (int at = 0; at < size; at += TElement.Bytes)
        {
            if (!IsChosen<TElement>(mask + at))
                continue;
            if (!TryRead<TElement>(s, ElementAddress(s, op, at, TElement.Bytes, write: false), out ulong value))
                return Access.Fault(s, op);
            TElement.Put(result + at, value);
        }
        System.Buffer.MemoryCopy(result, Register(s, op->R0), VcpuBlock.VectorStride, VcpuBlock.VectorStride);
        return op + 1;
    }

    /// <summary>The same to memory: operands mask, source (places 1 and 2).</summary>
    public static Op* Store<TElement>(VcpuBlock* s, Op* op)
        where TElement : struct, IWidth
    {
        if (!AvxGate.Open(s))
            return Access.Fault(s, op);
        int size = SimdHandlers.Size(op);
        byte* mask = Register(s, op->R1);
        byte* source = Register(s, (byte)op->Aux);
        // Nothing is written before every chosen element is known to be writable.
        for (int at = 0; at < size; at += TElement.Bytes)
        {
            if (IsChosen<TElement>(mask + at) && !Bulk.TryProbeWrite(s, ElementAddress(s, op, at, TElement.Bytes, write: true), TElement.Bytes, BulkOrder.Ascending))
                return Access.Fault(s, op);
        }
        for (int at = 0; at < size; at += TElement.Bytes)
        {
            if (!IsChosen<TElement>(mask + at))
                continue;
            if (!TryWrite<TElement>(s, ElementAddress(s, op, at, TElement.Bytes, write: true), TElement.Get(source + at)))
                return Access.Fault(s, op);
        }
        return op + 1;
    }

    /// <summary>MASKMOVDQU and VMASKMOVDQU: bytes to the place RDI names.</summary>
    public static Op* StoreBytes<TGate>(VcpuBlock* s, Op* op)
        where TGate : struct, IGate =>
        TGate.Open(s) && StoreChosenBytes(s, op, Register(s, op->R1), Register(s, (byte)op->Aux), 16) ? op + 1 : Access.Fault(s, op);

    /// <summary>MASKMOVQ. The places of MMX registers are in units of 2 bytes.</summary>
    public static Op* StoreMmxBytes(VcpuBlock* s, Op* op)
    {
        if (!MmxGate.Open(s))
            return Access.Fault(s, op);
        X87State.EnterMmx(s);
        byte* source = s->X87 + XsaveArea.St + op->R1 * 8;
        byte* mask = s->X87 + XsaveArea.St + (byte)op->Aux * 8;
        return StoreChosenBytes(s, op, source, mask, 8) ? op + 1 : Access.Fault(s, op);
    }

    private static bool StoreChosenBytes(VcpuBlock* s, Op* op, byte* source, byte* mask, int size)
    {
        // Seen on AMD processors: the whole operand is checked whatever the mask says. Others may leave it out where no byte is chosen.
        bool any = HostFeatures.IsAmd;
        for (int at = 0; at < size; at++)
            any |= (mask[at] & 0x80) != 0;
        ulong linear = ElementAddress(s, op, 0, size, write: true);
        if (any && (linear & (ulong)(size - 1)) != 0 && s->SegmentFault == 0 && WideAlignment.IsChecked(s))
            return Access.Record(s, ExceptionVector.AlignmentCheck, 0);
        if (any && !Bulk.TryProbeWrite(s, linear, size, BulkOrder.Ascending))
            return false;
        s->SegmentFault = 0;
        for (int at = 0; at < size; at++)
        {
            if ((mask[at] & 0x80) != 0 && !Access.Store8(s, ElementAddress(s, op, at, 1, write: true), source[at]))
                return false;
        }
        return true;
    }

    /// <summary>Reads an element: masked moves and gathers do not check alignment.</summary>
    public static bool TryRead<TElement>(VcpuBlock* s, ulong linear, out ulong value)
        where TElement : struct, IWidth
    {
        if (s->SegmentFault == 0 && WideAlignment.IsChecked(s))
        {
            Mmu mmu = SoftVcpu.From(s).Mmu;
            return mmu.TryReadAs(mmu.CurrentRights, linear, TElement.Bytes, out value);
        }
        byte* memory = Access.Read(s, linear, TElement.Bytes);
        value = memory == null ? 0 : TElement.Get(memory);
        return memory != null;
    }

    private static bool TryWrite<TElement>(VcpuBlock* s, ulong linear, ulong value)
        where TElement : struct, IWidth
    {
        if (s->SegmentFault == 0 && WideAlignment.IsChecked(s))
        {
            Mmu mmu = SoftVcpu.From(s).Mmu;
            return mmu.TryWriteAs(mmu.CurrentRights, linear, TElement.Bytes, value);
        }
        byte* memory = Access.Overwrite(s, linear, TElement.Bytes);
        if (memory == null)
            return false;
        TElement.Put(memory, value);
        Access.Commit(s);
        return true;
    }

    private static byte* Register(VcpuBlock* s, byte place) => s->Vector + place * 8;

    private static bool IsChosen<TElement>(byte* mask)
        where TElement : struct, IWidth => (mask[TElement.Bytes - 1] & 0x80) != 0;

    /// <summary>The linear address of the element <paramref name="at"/> bytes into the operand, its own limit checked.</summary>
    private static ulong ElementAddress(VcpuBlock* s, Op* op, int at, int size, bool write) =>
        Gathers.LinearOf(s, op, Access.Offset(s, op) + (ulong)at, size, write);
}
