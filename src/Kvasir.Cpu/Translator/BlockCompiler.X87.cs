using Iced.Intel;

namespace Kvasir.Cpu;

/// <content>x87 instructions: the guest's x87 state is the host's while <see cref="VectorCode.X87"/> is set, which it is only where every exception is masked.</content>
internal sealed unsafe partial class BlockCompiler
{
    /// <summary>Whether the check was made in this block.</summary>
    private bool _x87Checked;

    private void EmitX87(int i)
    {
        ref Item item = ref _items[i];
        bool needAfter = _need[i + 1];
        if (!_x87Checked)
        {
            BeforeClobber(_need[i]);
            EmitLiveCheck(item.Op, VectorCode.X87);
            _x87Checked = true;
        }
        if (item.Instruction.Mnemonic is Mnemonic.Wait or Mnemonic.Fnop)
            return;
        if (item.Memory < 0)
        {
            if (item.ReadsFlags)
                EnsureHost();
            EmitGuest(in item.Instruction, item.Written);
            if (item.WritesFlags)
                HostHoldsFlags();
            NoteX87(item.Op, memory: false);
            return;
        }
        int size = MemorySize(in item.Instruction);
        BeforeClobber(_need[i]);
        EmitOffset(item.Op);
        _a.Store(Layout.State, Layout.Spare, Layout.T0);
        if (item.Op->Address is AddressKind.Legacy16 or AddressKind.Legacy32)
            EmitSegment(item.Op->Seg, size, item.MemoryWritten);
        else if (item.Op->Seg != 6)
            _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.State, Layout.SegBase + (item.Op->Seg * 8));
        _operand = 0;
        EmitTranslation(size, item.MemoryWritten, stack: false);
        FlagTracker before = _flags;
        EmitGuest(in item.Instruction, item.Written);
        if (item.Instruction.Mnemonic != Mnemonic.Fnstcw)
            NoteX87(item.Op, memory: true);
        AddCold(i, in before, reload: needAfter && _flags.Host);
    }

    /// <summary>The last-instruction pointers, as <see cref="X87Handlers"/> keeps them; the operand's offset is in <see cref="VcpuBlock.Spare"/>. Changes T1, no flags.</summary>
    private void NoteX87(Op* op, bool memory)
    {
        _a.Load(Layout.T1, Layout.State, Layout.CodeBase);
        _a.Lea(Layout.T1, Layout.T1, _place + op->Offset);
        if (!Is64)
            _a.Move(Layout.T1, Layout.T1, 4);
        _a.Store(Layout.State, Layout.FpuIp, Layout.T1);
        StoreSelector(Layout.FpuCs, CodeSegment);
        if (HostFeatures.IsAmd)
            _a.StoreImmediate(Layout.State, Layout.FpuOpcode, X87Handlers.OpcodeOf(op), 2);
        if (!memory || HostFeatures.DataPointerOnExceptionOnly)
            return;
        _a.Load(Layout.T1, Layout.State, Layout.Spare);
        _a.Store(Layout.State, Layout.FpuDp, Layout.T1);
        StoreSelector(Layout.FpuDs, X87Handlers.SegmentOf(op));
    }

    private void StoreSelector(int displacement, int segment)
    {
        if (HostFeatures.SelectorsDeprecated)
        {
            _a.StoreImmediate(Layout.State, displacement, 0, 2);
            return;
        }
        _a.Load(Layout.T1, Layout.State, Layout.SegSelector + (segment * 2), 2);
        _a.Store(Layout.State, displacement, Layout.T1, 2);
    }
}
