using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <content>
/// Blocks: up to thirty instructions with forward branches and at most one counted loop. Some registers stay pointers into the window throughout, one counts the
/// loop; all others are free.
/// </content>
internal sealed unsafe partial class CaseGenerator
{
    private const int MaxInstructions = 30;

    /// <summary>Bytes that may be used: what is left takes a last branch.</summary>
    private const int MaxBlockBytes = 440;
    private const int Counter16 = 1;
    private const int StackPointer = 4;
    private const ulong AdjustFlag = 1 << 4;
    private const ulong OverflowFlag = 1 << 11;
    private const ulong AllFlags = 0x8d5;
    private const byte ShortJump = 0xeb;
    private const byte ShortCondition = 0x70;
    private const byte LoopInstruction = 0xe2;
    private static readonly int[] Pointers64 = [3, 5, 6, 13];
    private static readonly int[] Pointers32 = [3, 5, 6];
    private readonly Dictionary<int, List<Form>> _blockForms = [];
    private readonly List<(int Start, int Skip)> _branches = [];
    private readonly List<int> _starts = [];

    /// <summary>Makes a block. The flags in <paramref name="latitude"/> are those that some instruction of it left undefined; none reads them.</summary>
    public void MakeBlock(int mode, ulong seed, ulong index, OracleRecord* record, out Latitude latitude)
    {
        _dice = new Dice(Dice.Seed(seed, (ulong)mode, ulong.MaxValue, index));
        _r = record;
        ChoosePlace(mode);
        record->CodeLinear = Window.Start + (uint)(_dice.Percent(50) ? _dice.Below(0x1d00) : 0x1000 - _dice.Below(200));
        record->In.Rip = record->CodeLinear - _codeBase;
        ulong undefined = _dice.Below(3) switch { 0 => AdjustFlag, 1 => AdjustFlag | OverflowFlag, _ => AllFlags };
        // Whether a wide operand's limit, page or alignment is checked first, and which of its bytes a fault names, is open.
        latitude = new Latitude(undefined, Latitude.AllSimdFlags, Result: false, FaultOrder: true, FaultAddress: true, FaultOptional: false, VectorsAfterFault: false, RegistersAfterFault: false);
        FillState();
        record->In.Flags &= ~(1ul << 18);
        PlacePointers(mode);
        _maker.Pointers = mode == 64 ? Pointers64 : Pointers32;
        try
        {
            record->CodeLength = (uint)FillBlock(mode, undefined);
        }
        finally
        {
            _maker.Pointers = null;
        }
    }

    private int FillBlock(int mode, ulong undefined)
    {
        List<Form> forms = BlockForms(mode);
        Span<byte> code = new(_r->Code, OracleRecord.MaxCode);
        _branches.Clear();
        _starts.Clear();
        int length = 0;
        int count = 1 + _dice.Below(MaxInstructions);
        int loopEnd = _dice.Percent(40) ? 1 + _dice.Below(count) : -1;
        for (int i = 0; i < count && length < MaxBlockBytes; i++)
        {
            _starts.Add(length);
            if (i == loopEnd)
            {
                length += PutLoop(code[length..], length, i);
                continue;
            }
            if (_dice.Percent(15))
            {
                bool conditional = undefined != AllFlags && _dice.Percent(85);
                int condition = _dice.Below(16);
                // Signed conditions read OF.
                if (conditional && (undefined & OverflowFlag) != 0 && (condition < 2 || condition >= 12))
                    condition = 4;
                _branches.Add((length, 1 + _dice.Below(5)));
                code[length] = conditional ? (byte)(ShortCondition + condition) : ShortJump;
                code[length + 1] = 0;
                length += 2;
                continue;
            }
            length += PutInstruction(forms, mode, code[length..], length, undefined);
        }
        _starts.Add(length);
        PatchBranches(code);
        return length;
    }

    /// <summary>LOOP to an earlier instruction of the block.</summary>
    private int PutLoop(Span<byte> code, int at, int instruction)
    {
        int target = _starts[_dice.Below(instruction)];
        int displacement = target - (at + 2);
        if (displacement < sbyte.MinValue)
            displacement = _starts[instruction - 1] - (at + 2);
        code[0] = LoopInstruction;
        code[1] = (byte)(sbyte)displacement;
        return 2;
    }

    private void PatchBranches(Span<byte> code)
    {
        foreach ((int start, int skip) in _branches)
        {
            int from = _starts.IndexOf(start) + 1;
            int to = Math.Min(from + skip, _starts.Count - 1);
            while (_starts[to] - (start + 2) > sbyte.MaxValue)
                to--;
            code[start + 1] = (byte)(_starts[to] - (start + 2));
        }
    }

    private int PutInstruction(List<Form> forms, int mode, Span<byte> code, int at, ulong undefined)
    {
        while (true)
        {
            Form form = forms[_dice.Below(forms.Count)];
            if (!_maker.TryMake(form, _r->In.Rip + (ulong)at, _codeBase, ref _dice, out int length))
                continue;
            Instruction instruction = Decode(mode, _maker.Bytes[..length], _r->In.Rip + (ulong)at);
            if (instruction.IsInvalid || instruction.Length != length || !MayStandInBlock(in instruction, mode, undefined))
                continue;
            _maker.Bytes[..length].CopyTo(code);
            return length;
        }
    }

    private bool MayStandInBlock(in Instruction instruction, int mode, ulong undefined)
    {
        Latitude latitude = Latitude.Of(in instruction, &_r->In);
        if ((latitude.Flags & ~undefined) != 0 || (FlagBits(instruction.RflagsRead) & undefined) != 0)
            return false;
        // A count in CL may leave what was undefined before; words shifted too far have no result.
        if (instruction.Mnemonic is Mnemonic.Shld or Mnemonic.Shrd)
            return false;
        if (instruction.HasRepPrefix || instruction.HasRepnePrefix || instruction.SegmentPrefix is Register.FS or Register.GS)
            return false;
        ref readonly InstructionInfo info = ref _information.GetInfo(in instruction);
        foreach (UsedRegister used in info.GetUsedRegisters())
        {
            if (!used.Register.IsGPR() || used.Access is OpAccess.Read or OpAccess.CondRead)
                continue;
            int number = used.Register.GetFullRegister().GetNumber();
            bool pushes = number == StackPointer && instruction.IsStackInstruction && instruction.Op0Register.GetFullRegister() != Register.RSP;
            if (!pushes && (number is Counter16 or StackPointer || Array.IndexOf(mode == 64 ? Pointers64 : Pointers32, number) >= 0))
                return false;
        }
        return true;
    }

    private static ulong FlagBits(RflagsBits bits)
    {
        ulong mask = 0;
        if ((bits & RflagsBits.CF) != 0)
            mask |= 1;
        if ((bits & RflagsBits.PF) != 0)
            mask |= 1 << 2;
        if ((bits & RflagsBits.AF) != 0)
            mask |= AdjustFlag;
        if ((bits & RflagsBits.ZF) != 0)
            mask |= 1 << 6;
        if ((bits & RflagsBits.SF) != 0)
            mask |= 1 << 7;
        if ((bits & RflagsBits.OF) != 0)
            mask |= OverflowFlag;
        return mask;
    }

    private void PlacePointers(int mode)
    {
        foreach (int pointer in mode == 64 ? Pointers64 : Pointers32)
        {
            uint target = _dice.Percent(90) ? Window.Data + 0x100 + (uint)_dice.Below(0x1e00) / 16 * 16 : ChooseTarget(8);
            // Not among the code: what ends a block there differs.
            if (target < Window.CodeEnd + 0x100)
                target = Window.DataEnd - 8;
            ulong segment = mode == 64 ? 0 : Descriptors.Load(_r->In.Selectors[pointer == 5 ? 2 : 3]).Base;
            _r->In.Gpr[pointer] = target - segment;
        }
        _r->In.Gpr[Counter16] = 1 + (ulong)_dice.Below(6);
    }

    /// <summary>What blocks are made of: no branches (they have their own), nothing that ends them for sure or leaves more open than flags.</summary>
    private List<Form> BlockForms(int mode)
    {
        if (_blockForms.TryGetValue(mode, out List<Form>? forms))
            return forms;
        forms = [];
        foreach (Form form in Forms.All(mode))
        {
            OpCodeInfo info = form.Code.ToOpCode();
            if (info.IsPrivileged || info.IsInputOutput || info.IsSaveRestore)
                continue;
            Instruction instruction = default;
            instruction.Code = form.Code;
            if (instruction.FlowControl != FlowControl.Next || instruction.IsStringInstruction || instruction.IsVsib || IsLeftOut(instruction.Mnemonic))
                continue;
            bool segment = false;
            for (int i = 0; i < info.OpCount; i++)
                segment |= info.GetOpKind(i) is OpCodeOperandKind.seg_reg or OpCodeOperandKind.es or OpCodeOperandKind.cs or OpCodeOperandKind.ss
                    or OpCodeOperandKind.ds or OpCodeOperandKind.fs or OpCodeOperandKind.gs;
            if (segment)
                continue;
            forms.Add(form);
            // The integer instructions, which a translator makes most of, come as often as all the vector ones.
            if (info.Encoding == EncodingKind.Legacy && !IsVectorForm(info))
            {
                for (int i = 0; i < 3; i++)
                    forms.Add(form);
            }
        }
        return _blockForms[mode] = forms;
    }

    private static bool IsVectorForm(OpCodeInfo info)
    {
        for (int i = 0; i < info.OpCount; i++)
        {
            if (info.GetOpKind(i) is OpCodeOperandKind.xmm_reg or OpCodeOperandKind.xmm_or_mem or OpCodeOperandKind.mm_reg or OpCodeOperandKind.mm_or_mem
                or OpCodeOperandKind.xmm_rm or OpCodeOperandKind.mm_rm)
                return true;
        }
        return false;
    }

    private static bool IsLeftOut(Mnemonic mnemonic) => mnemonic is Mnemonic.Enter or Mnemonic.Leave or Mnemonic.Popf or Mnemonic.Popfd or Mnemonic.Popfq
        or Mnemonic.Lds or Mnemonic.Les or Mnemonic.Lss or Mnemonic.Lfs or Mnemonic.Lgs or Mnemonic.Lar or Mnemonic.Lsl or Mnemonic.Verr or Mnemonic.Verw
        or Mnemonic.Bound or Mnemonic.Popa or Mnemonic.Popad or Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Wrfsbase
        or Mnemonic.Wrgsbase or Mnemonic.Xlatb or Mnemonic.Stac or Mnemonic.Clac
        // They make and show error pointers of exceptions that no instruction of the block raised: forms of their own only.
        or Mnemonic.Fldcw or Mnemonic.Fldenv or Mnemonic.Frstor or Mnemonic.Fnstenv or Mnemonic.Fnsave;
}
