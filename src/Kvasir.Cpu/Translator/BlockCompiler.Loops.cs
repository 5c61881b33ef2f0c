namespace Kvasir.Cpu;

/// <content>
/// Loops that are one block: several rounds are translated one after the other. What neighbouring rounds access is then a group like any other, and flags, the look for pending
/// work and for vector registers come once for all of them.
/// </content>
internal sealed unsafe partial class BlockCompiler
{
    /// <summary>Instructions that the rounds have together at most, and rounds.</summary>
    private const int MaxUnrolled = 40;
    private const int MaxRounds = 4;

    /// <summary>Repeats the items up to a branch to the block's start, and drops what comes after that. Gives the number of items.</summary>
    private int Unroll(int count)
    {
        Rounds = 1;
        int branch = FindBackEdge(count);
        int body = branch + 1;
        int rounds = branch < 0 ? 1 : int.Min(MaxRounds, MaxUnrolled / body);
        if (rounds < 2 || !IsWorthUnrolling(body))
            return count;
        Rounds = rounds;
        for (int i = body; i < rounds * body; i++)
            _items[i] = _items[i - body];
        for (int round = 0; round < rounds - 1; round++)
            _items[round * body + branch].Inverted = true;
        return rounds * body;
    }

    /// <summary>The branch to the block's start with nothing before it that handlers execute, or -1.</summary>
    private int FindBackEdge(int count)
    {
        if (!Is64 || _block->SecondPage != Block.NoPage || (_block->Key & CodeMode.Ungrouped) != 0)
            return -1;
        for (int i = 0; i < count; i++)
        {
            ref Item item = ref _items[i];
            if (item.Kind is InstructionKind.JumpIf or InstructionKind.Jump && item.Place + item.Op->Imm == _place)
                return item.Kind == InstructionKind.Jump || item.Place + item.Op->Offset + item.Op->Length < PageSize ? i : -1;
            if (item.Kind is InstructionKind.Handler or InstructionKind.X87 or InstructionKind.InterruptFlag)
                return -1;
        }
        return -1;
    }

    /// <summary>A loop without accesses gains little.</summary>
    private bool IsWorthUnrolling(int body)
    {
        for (int i = 0; i < body; i++)
        {
            if (_items[i].Memory >= 0)
                return true;
        }
        return false;
    }
}
