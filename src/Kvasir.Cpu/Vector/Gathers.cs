namespace Kvasir.Cpu;

/// <summary>
/// AVX2 gathers (Intel SDM vol. 2, VPGATHERDD and its like). Elements are read one by one from the lowest on; a fault leaves those that were read in the
/// destination and their mask elements clear, so that the instruction goes on where it stopped.
/// </summary>
internal static unsafe class Gathers
{
    /// <summary>
    /// Operands: destination (place 0), index (low byte of <see cref="Op.Aux"/>), mask (high byte). <see cref="Op.Imm"/> is the number of elements;
    /// <see cref="Op.R1"/> the vector's size in bytes.
    /// </summary>
    public static Op* Gather<TElement, TIndex>(VcpuBlock* s, Op* op)
        where TElement : struct, IWidth
        where TIndex : struct, IWidth
    {
        if (!AvxGate.Open(s))
            return Access.Fault(s, op);
        byte* destination = s->Vector + op->R0 * 8;
        byte* index = s->Vector + (byte)op->Aux * 8;
        byte* mask = s->Vector + (op->Aux >> 8) * 8;
        int count = (int)op->Imm;
        int bytes = count * TElement.Bytes;
        for (int i = 0; i < count; i++)
        {
            if ((mask[(i + 1) * TElement.Bytes - 1] & 0x80) == 0)
            {
                TElement.Put(mask + i * TElement.Bytes, 0);
                continue;
            }
            ulong offset = Access.Offset(s, op) + (TIndex.SignExtend(TIndex.Get(index + i * TIndex.Bytes)) << op->Scale);
            if (!MaskedMoves.TryRead<TElement>(s, LinearOf(s, op, offset, TElement.Bytes, write: false), out ulong value))
                return Access.Fault(s, op);
            TElement.Put(destination + i * TElement.Bytes, value);
            TElement.Put(mask + i * TElement.Bytes, 0);
        }
        new System.Span<byte>(mask, VcpuBlock.VectorStride).Clear();
        new System.Span<byte>(destination + bytes, VcpuBlock.VectorStride - bytes).Clear();
        return op + 1;
    }

    /// <summary>The linear address of an offset that is not the operand's own but belongs to it: address size, segment and limit as for it.</summary>
    public static ulong LinearOf(VcpuBlock* s, Op* op, ulong offset, int size, bool write) => op->Address switch
    {
        AddressKind.Long => offset + s->SegBase[op->Seg],
        AddressKind.Long32 => (uint)offset + s->SegBase[op->Seg],
        _ => Access.LegacySegment(s, op->Seg, Access.CutOffset(op->Address, offset), size, write),
    };
}
