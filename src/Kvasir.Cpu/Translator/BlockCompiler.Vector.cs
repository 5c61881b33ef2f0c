using Iced.Intel;

namespace Kvasir.Cpu;

/// <content>Instructions on vector registers, which lie in the host's of the same number.</content>
internal sealed unsafe partial class BlockCompiler
{
    private bool IsVector(in Instruction instruction)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Vzeroupper or Mnemonic.Vzeroall:
                // Outside 64-bit mode they leave registers 8-15 alone.
                return Is64;
            case Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Vmaskmovps or Mnemonic.Vmaskmovpd or Mnemonic.Vpmaskmovd or Mnemonic.Vpmaskmovq
                or Mnemonic.Vgatherdps or Mnemonic.Vgatherdpd or Mnemonic.Vgatherqps or Mnemonic.Vgatherqpd or Mnemonic.Vpgatherdd or Mnemonic.Vpgatherdq
                or Mnemonic.Vpgatherqd or Mnemonic.Vpgatherqq:
                return false;
            default:
                break;
        }
        // CMPSD and MOVSD are names of string instructions too.
        if (instruction.IsStringInstruction || instruction.Encoding is not (EncodingKind.Legacy or EncodingKind.VEX))
            return false;
        Traits traits = ThunkTraits.Of(in instruction);
        return (traits & (Traits.Vector | Traits.Mmx)) == Traits.Vector;
    }

    private static int LevelOf(in Instruction instruction) => instruction.Encoding == EncodingKind.VEX ? VectorCode.Avx : VectorCode.Sse;

    private void EmitVector(int i)
    {
        ref Item item = ref _items[i];
        bool needAfter = _need[i + 1];
        if (needAfter && !item.WritesAllFlags)
            BeforeWrite(item.Written);
        EmitVectorCheck(i, LevelOf(in item.Instruction));
        if (item.Memory < 0)
        {
            if (item.WritesFlags && !item.WritesAllFlags && needAfter)
                EnsureHost();
            EmitGuest(in item.Instruction, item.Written);
            if (item.WritesFlags)
                HostHoldsFlags();
            return;
        }
        int size = MemorySize(in item.Instruction);
        EmitAddress(i, size, item.MemoryWritten, SimdLowering.MustAlign(in item.Instruction, size, out _) ? size : 1);
        FlagTracker before = _flags;
        EmitGuest(in item.Instruction, item.Written);
        if (item.WritesFlags)
            HostHoldsFlags();
        before.Host = false;
        AddCold(i, in before, reload: item.WritesFlags && needAfter);
    }

    /// <summary>Makes sure that the guest's vector registers are in the host's: once in a block.</summary>
    private void EmitVectorCheck(int i, int level)
    {
        if (level <= _vectorLevel)
            return;
        BeforeClobber(_need[i]);
        EmitLiveCheck(_items[i].Op, level);
        _vectorLevel = level;
    }

    /// <summary>Loads state out of line where it is not live. Where it must not be, the interpreter goes on at the operation.</summary>
    private void EmitLiveCheck(Op* op, int level)
    {
        _a.TestImmediateByteMemory(Layout.State, Layout.VectorLive, level);
        int field = _a.JumpIf(Condition.Equal);
        _a.ForgetMirror();
        _vectorLoads.Add(new VectorLoad { Field = field, Resume = _a.Length, Level = level, Op = op, Flags = _flags });
    }

    private void EmitVectorLoads()
    {
        foreach (VectorLoad load in _vectorLoads)
        {
            _a.Fix(load.Field);
            // Where it must not be, the interpreter goes on at the instruction: it raises what there is to raise.
            _a.CallTo(load.Level switch { VectorCode.X87 => _stubs.NeedX87, VectorCode.Avx => _stubs.NeedAvx, _ => _stubs.NeedSse });
            _sites.Add(new CodeSite { After = (uint)_a.Length, Op = (uint)OpOffset(load.Op), Mirrored = CodeSite.NotMirrored, Flags = new FlagRecipe(in load.Flags) });
            _a.Fix(_a.Jump(), load.Resume);
        }
    }
}
