namespace Kvasir.Cpu;

/// <content>What was found out about instructions before: most of a block's were seen in others.</content>
internal sealed unsafe partial class BlockCompiler
{
    private const int Remembered = 2048;
    private readonly Known[] _known = new Known[Remembered];

    /// <summary>An instruction of at most eight bytes, with its mode and its length.</summary>
    private struct Known
    {
        public ulong Bytes;
        public uint Mode;
        public int Length;
        public Item Item;
    }

    /// <summary>The bytes of an instruction, in the low bits. False: it is too long, or too near to the page's end for one read.</summary>
    private bool TryGetBytes(Op* op, byte* bytes, out ulong value)
    {
        value = 0;
        int length = op->Length;
        if (length > sizeof(ulong) || _place + op->Offset > PageSize - sizeof(ulong) || _block->SecondPage != Block.NoPage || (op->Flags & OpFlags.Undefined) != 0)
            return false;
        value = *(ulong*)(bytes + op->Offset) & (ulong.MaxValue >> (64 - (length * 8)));
        return true;
    }

    private ref Known Slot(ulong bytes) => ref _known[(bytes * 0x9e37_79b9_7f4a_7c15) >> 53];

    private bool TryRecall(ref Item item, Op* op, byte* bytes)
    {
        if (!TryGetBytes(op, bytes, out ulong value))
            return false;
        ref Known known = ref Slot(value);
        if (known.Bytes != value || known.Length != op->Length || known.Mode != _mode)
            return false;
        item = known.Item;
        item.Op = op;
        return true;
    }

    /// <summary>Remembers an instruction that is the same wherever it is.</summary>
    private void Remember(in Item item, byte* bytes)
    {
        if (item.Kind is InstructionKind.Jump or InstructionKind.JumpIf or InstructionKind.CounterJump or InstructionKind.Call or InstructionKind.InterruptFlag
            || item.Op->Base == VcpuBlock.BlockRipOffset || !TryGetBytes(item.Op, bytes, out ulong value))
            return;
        Slot(value) = new Known { Bytes = value, Mode = _mode, Length = item.Op->Length, Item = item };
    }
}
