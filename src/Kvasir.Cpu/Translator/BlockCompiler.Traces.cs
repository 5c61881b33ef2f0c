namespace Kvasir.Cpu;

/// <content>
/// Traces: where a block ends, or branches nearly always, to another one further on in the page, that one's instructions follow in the same translation. The interpreter
/// has counted which branches were taken while the block became warm. So a hot path is one piece of code with ways out, whatever its layout in memory.
/// </content>
internal sealed unsafe partial class BlockCompiler
{
    /// <summary>Of so many times that execution came to a branch ...</summary>
    private const int TakenOf = 4;

    /// <summary>... it went to the target at least so often: the target follows.</summary>
    private const int TakenLeast = 3;

    private const int MaxJoined = 8;

    /// <summary>Bytes from the block's first to the end of what is in its translation.</summary>
    public int Covered { get; private set; }

    /// <summary>Guest instructions that were translated, each once.</summary>
    public int Instructions { get; private set; }

    /// <summary>Blocks that the translation goes through.</summary>
    public int Joined { get; private set; }

    /// <summary>Analyses the instructions of the block and of those that follow it. Gives their number.</summary>
    private int Gather(SoftVcpu vcpu, Block* block, byte* bytes)
    {
        Block* current = block;
        int place = _place;
        int count = 0;
        // The entry that makes it warm is not executed yet.
        int reached = block->First->Aux - 1;
        Joined = 1;
        Covered = block->Bytes;
        int next = 0;
        while (next < current->Operations - 2 && count < MaxInstructions)
        {
            Op* op = current->First + 1 + next++;
            ref Item item = ref _items[count++];
            _block = current;
            _place = place;
            Analyse(ref item, op, bytes);
            item.Place = place;
            if (item.Kind is not (InstructionKind.Jump or InstructionKind.JumpIf) || !Is64)
                continue;
            int taken = item.Kind == InstructionKind.Jump ? reached : op->Aux;
            Block* target = Joined < MaxJoined && count < MaxInstructions && taken * TakenOf >= reached * TakenLeast ? Follower(block, in item) : null;
            if (target == null)
            {
                reached -= taken;
                continue;
            }
            item.Inverted = true;
            item.MayFault &= item.Kind != InstructionKind.Jump;
            reached = taken;
            current = target;
            next = 0;
            place = (int)(target->Key >> 8) & (PageSize - 1);
            bytes = vcpu.Memory.Host + (target->Key >> 8);
            Joined++;
            Covered = int.Max(Covered, place + target->Bytes - (int)((block->Key >> 8) & (PageSize - 1)));
        }
        // The instruction after STI comes before any interrupt: in another block only its handler sees to that.
        if (_items[count - 1].Kind == InstructionKind.InterruptFlag && _items[count - 1].Instruction.Mnemonic == Iced.Intel.Mnemonic.Sti)
            _items[count - 1].Kind = InstructionKind.Handler;
        _block = block;
        _place = (int)(block->Key >> 8) & (PageSize - 1);
        return count;
    }

    /// <summary>The block that a branch leads to, if it may follow: further on in the page, and known.</summary>
    private static Block* Follower(Block* block, in Item branch)
    {
        if (block->SecondPage != Block.NoPage || (block->Key & CodeMode.Ungrouped) != 0 || branch.Op->Disp == 0)
            return null;
        // Where it is not taken it goes on in the page as well.
        if (branch.Place + branch.Op->Offset + branch.Op->Length >= PageSize)
            return null;
        // The link of a branch to its own page (see Branches.Taken).
        Block* target = Translator.BlockOf((Op*)branch.Op->Disp);
        return target != null && !target->Invalid && target->SecondPage == Block.NoPage && (byte)target->Key == (byte)block->Key && target->Key >> 20 == block->Key >> 20
            && target->Key > block->Key ? target : null;
    }
}
