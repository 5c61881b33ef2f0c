using System;
using Iced.Intel;
using Kvasir.Core;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>
/// Makes cases: a random instance of a form, a random state, and registers and memory arranged so that the operands lie where something can be seen.
/// The same seed, form and number make the same case.
/// </summary>
internal sealed unsafe partial class CaseGenerator
{
    private const int Attempts = 24;
    private const int MaxInstruction = 15;
    private readonly InstructionMaker _maker = new();
    private readonly InstructionInfoFactory _information = new();
    private readonly BytesReader _reader = new();
    private readonly Decoder[] _decoders;

    // The case being made.
    private OracleRecord* _r;
    private Dice _dice;
    private uint _pinned;
    private uint _codeBase;
    private ulong _patched;

    /// <param name="amd">Decode as AMD's processors do.</param>
    public CaseGenerator(bool amd)
    {
        DecoderOptions options = amd ? DecoderOptions.AMD : DecoderOptions.None;
        _decoders = [Decoder.Create(16, _reader, options), Decoder.Create(32, _reader, options), Decoder.Create(64, _reader, options)];
    }

    /// <summary>The decoded instruction of the last case.</summary>
    public Instruction Instruction { get; private set; }

    /// <summary>The last form could be encoded, whatever it decodes to on this vendor's processors.</summary>
    public bool IsEncodable { get; private set; }

    /// <summary>Fills a record. False: this form and number make no case (its choices cannot be encoded).</summary>
    public bool TryMake(Form form, ulong seed, ulong index, OracleRecord* record)
    {
        _dice = new Dice(Dice.Seed(seed, (ulong)form.Mode, (ulong)form.Code, index));
        _r = record;
        IsEncodable = false;
        for (int attempt = 0; attempt < Attempts; attempt++)
        {
            ChoosePlace(form.Mode);
            if (!_maker.TryMake(form, record->In.Rip, _codeBase, ref _dice, out int length))
                continue;
            IsEncodable = true;
            Span<byte> code = new(record->Code, OracleRecord.MaxCode);
            _maker.Bytes[..length].CopyTo(code);
            if (_dice.Percent(3))
                length = AddPrefixes(code, length);
            if (length > MaxInstruction)
                continue;
            Instruction = Decode(form.Mode, code[..length], record->In.Rip);
            if (Instruction.IsInvalid)
            {
                // Not so the ones that the prefixes made longer: they would go on into what follows.
                if (_decoders[form.Mode / 32].LastError == DecoderError.NoMoreBytes)
                    continue;
                // AMD's processors take LOCK VERW for VERW.
                if (form.Code.Mnemonic() is Mnemonic.Verr or Mnemonic.Verw)
                    continue;
                // How much of it a processor fetches before it gives up is its own affair.
                if (record->CodeLinear > Window.CodeEnd - 32)
                    continue;
                record->CodeLength = (uint)length;
                FillState();
                return true;
            }
            if (IsTangled(Instruction))
                continue;
            // Iced takes F3 49 90 (XCHG R8, RAX with an idle REP) for PAUSE.
            if (Instruction.Code == Code.Pause && form.Code != Code.Pause)
                continue;
            if (Instruction.Length != length || Forms.WhyNot(Instruction.Code, form.Mode) != null)
                continue;
            record->CodeLength = (uint)length;
            FillState();
            Arrange(Instruction);
            return true;
        }
        return false;
    }

    /// <summary>What prefixes made of a branch: one into its own bytes, or a LOOPcc whose condition AMD's processors take from the REP prefix.</summary>
    private bool IsTangled(in Instruction instruction)
    {
        if (instruction.Mnemonic is Mnemonic.Loope or Mnemonic.Loopne)
        {
            ReadOnlySpan<byte> code = new(_r->Code, instruction.Length);
            if (code.ContainsAny((byte)0xf2, (byte)0xf3))
                return true;
        }
        return instruction.Op0Kind is OpKind.NearBranch16 or OpKind.NearBranch32 or OpKind.NearBranch64
            && instruction.NearBranchTarget - instruction.IP < (ulong)instruction.Length + 16;
    }

    /// <summary>Decodes as the software CPU will.</summary>
    public Instruction Decode(int mode, ReadOnlySpan<byte> code, ulong rip)
    {
        _reader.Set(code);
        Decoder decoder = _decoders[mode / 32];
        decoder.IP = rip;
        decoder.Decode(out Instruction instruction);
        return instruction;
    }

    /// <summary>Where the code lies and through which segments it looks at memory.</summary>
    private void ChoosePlace(int mode)
    {
        UserState* s = &_r->In;
        _r->Mode = (uint)mode;
        ushort data = Descriptors.Data;
        ushort stack = Descriptors.Data;
        ushort code = Descriptors.Code64;
        if (mode == 32)
        {
            code = _dice.Percent(85) ? Descriptors.Code32 : Descriptors.WindowCode32;
            data = RandomData();
            stack = _dice.Percent(80) ? Descriptors.Data : _dice.Percent(60) ? Descriptors.WindowData16 : Descriptors.ShortData;
        }
        else if (mode == 16)
        {
            code = Descriptors.WindowCode16;
            data = _dice.Percent(85) ? Descriptors.WindowData16 : RandomData();
            stack = _dice.Percent(85) ? Descriptors.WindowData16 : Descriptors.Data;
        }
        s->Selectors[0] = mode == 64 ? (ushort)0 : _dice.Percent(85) ? data : RandomData();
        s->Selectors[1] = code;
        s->Selectors[2] = stack;
        s->Selectors[3] = mode == 64 ? (ushort)0 : data;
        s->Selectors[4] = mode == 64 ? (ushort)0 : RandomData();
        s->Selectors[5] = mode == 64 ? (ushort)0 : RandomData();
        _codeBase = (uint)Descriptors.Load(code).Base;
        uint at = _dice.Below(100) switch
        {
            < 84 => (uint)_dice.Below(0x1f00),
            < 94 => 0x1000 - (uint)_dice.Below(16),
            < 98 => 0x2000 - 15 - (uint)_dice.Below(16),
            _ => 0x2000 - 1 - (uint)_dice.Below(15),
        };
        _r->CodeLinear = Window.Start + at;
        s->Rip = _r->CodeLinear - _codeBase;
    }

    private ushort RandomData() => _dice.Below(12) switch
    {
        0 => Descriptors.ShortData,
        1 => Descriptors.ReadOnlyData,
        2 => Descriptors.ExpandDown,
        3 => Descriptors.WindowCode32,
        4 => 0,
        5 or 6 => Descriptors.WindowData16,
        _ => Descriptors.Data,
    };

    /// <summary>Prefixes that may mean nothing, or make it another instruction, or none.</summary>
    private int AddPrefixes(Span<byte> code, int length)
    {
        ReadOnlySpan<byte> prefixes = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x40, 0x48, 0x4f];
        int count = 1 + _dice.Below(3);
        code[..length].CopyTo(code[count..]);
        for (int i = 0; i < count; i++)
        {
            byte prefix = prefixes[_dice.Below(prefixes.Length)];
            // A REX prefix is an instruction of its own elsewhere.
            code[i] = _r->Mode != 64 && prefix >= 0x40 && prefix < 0x50 ? (byte)0x66 : prefix;
        }
        return length + count;
    }

    private void FillState()
    {
        UserState* s = &_r->In;
        _pinned = 0;
        _patched = 0;
        for (int i = 0; i < 16; i++)
            s->Gpr[i] = _dice.Integer();
        if (_r->Mode != 64)
        {
            for (int i = 0; i < 8; i++)
                s->Gpr[i] = (uint)s->Gpr[i];
        }
        SetRegister(Register.RSP, StackTop());
        const ulong arithmetic = 0x8d5;
        ulong flags = 0x202 | (_dice.Next() & arithmetic);
        if (_dice.Percent(15))
            flags |= 1 << 10;
        if (_dice.Percent(2))
            flags |= 1 << 18;
        s->Flags = flags;
        s->FsBase = 0;
        s->GsBase = 0;
        if (_r->Mode == 64)
        {
            s->FsBase = SegmentBase64();
            s->GsBase = SegmentBase64();
        }
        FillVectors(s);
        FillX87(s->Fx);
        _r->PatchLinear = Window.Data;
        _r->PatchLength = 0;
    }

    private ulong SegmentBase64() => _dice.Below(4) switch
    {
        0 => 0,
        1 => Window.Start,
        2 => (ulong)((long)_dice.Next() >> 17),
        _ => (uint)_dice.Next(),
    };

    private void FillVectors(UserState* s)
    {
        Flavour flavour = _dice.AnyFlavour();
        for (int i = 0; i < 64; i++)
            *(ulong*)(s->Ymm + i * 8) = _dice.Lane(flavour);
        uint mxcsr = 0x1f80 | (uint)_dice.Below(4) << 13;
        if (_dice.Percent(15))
            mxcsr |= 1u << 15;
        if (_dice.Percent(15))
            mxcsr |= 1u << 6;
        if (_dice.Percent(20))
            mxcsr |= (uint)_dice.Below(64);
        if (_dice.Percent(12))
            mxcsr &= ~((uint)_dice.Below(64) << 7);
        new Span<byte>(s->Fx, 512).Clear();
        s->Mxcsr = mxcsr;
    }

    /// <summary>An x87 state as FXRSTOR64 takes it.</summary>
    private void FillX87(byte* fx)
    {
        uint masks = _dice.Percent(88) ? 0x3fu : (uint)_dice.Below(64);
        uint fcw = 0x40 | masks | (uint)_dice.Below(4) << 10 | (_dice.Percent(70) ? 3u : (uint)_dice.Below(3) switch { 0 => 0u, 1 => 2u, _ => 3u }) << 8;
        uint fsw = (uint)_dice.Below(8) << 11 | (uint)(_dice.Next() & 0x4700);
        if (_dice.Percent(20))
            fsw |= (uint)_dice.Below(128) & (_dice.Percent(80) ? masks | 0x40 : 0x7f);
        if ((fsw & ~fcw & 0x3f) != 0)
            fsw |= 0x8080;
        *(ushort*)(fx + UserState.Fcw) = (ushort)fcw;
        *(ushort*)(fx + UserState.Fsw) = (ushort)fsw;
        fx[UserState.Ftw] = _dice.Percent(65) ? (byte)0xff : (byte)_dice.Next();
        *(uint*)(fx + 28) = 0xffff;
        for (int i = 0; i < 8; i++)
        {
            (ulong significand, ushort exponent) = _dice.Extended();
            *(ulong*)(fx + UserState.St0 + i * 16) = significand;
            *(ushort*)(fx + UserState.St0 + i * 16 + 8) = exponent;
        }
    }

    private ulong StackTop()
    {
        uint linear = _dice.Below(100) switch
        {
            < 85 => Window.Stack + 0x200 + (uint)_dice.Below(0x1c00) / 16 * 16,
            < 90 => Window.Stack + 0x200 + (uint)_dice.Below(0x1c00),
            < 93 => Window.Stack + (uint)_dice.Below(40),
            < 96 => Window.StackEnd - (uint)_dice.Below(40),
            < 98 => Window.Stack + 0x1000 - 20 + (uint)_dice.Below(40),
            _ => ChooseTarget(8),
        };
        SegmentState ss = Descriptors.Load(_r->In.Selectors[2]);
        if (_r->Mode == 64)
            return linear;
        uint offset = linear - (uint)ss.Base;
        return (ss.Attributes & 0x4000) != 0 ? offset : offset & 0xffff | (uint)_dice.Next() << 16;
    }

    /// <summary>Where an operand goes: mostly ordinary data, and every kind of trouble.</summary>
    private uint ChooseTarget(int size)
    {
        int span = Math.Max(size, 1);
        int alignment = size is > 0 and <= 64 && (size & (size - 1)) == 0 ? size : 64;
        int across = 1 + _dice.Below(Math.Max(span - 1, 1));
        int room = 0x2000 - Math.Min(span, 0x1000);
        return _dice.Below(100) switch
        {
            < 15 => Window.Data + (uint)_dice.Below(room),
            < 20 => Window.Data + 0x1000 - (uint)across,
            < 23 => Window.DataEnd - (uint)across,
            < 25 => Window.DataEnd + (uint)_dice.Below(0x1000),
            < 28 => Window.ReadOnly + (uint)_dice.Below(0x1000 - Math.Min(span, 0x800)) / (uint)alignment * (uint)alignment,
            < 29 => Window.AfterReadOnly - (uint)across,
            < 31 => Window.Data - (uint)across,
            < 32 => Window.ReadOnly - (uint)across,
            < 33 => Window.Start + (uint)_dice.Below(0x1000),
            < 34 => Window.Start + Descriptors.ShortLimit + 1 - (uint)across,
            < 35 => Window.Start + Descriptors.ExpandDownLimit + 1 - (uint)across,
            < 36 => Window.End - (uint)across,
            < 40 => Window.AfterReadOnly + (uint)_dice.Below(0x1000 - Math.Min(span, 0x800)),
            _ => Window.Data + (uint)_dice.Below(room) / (uint)alignment * (uint)alignment,
        };
    }

    private sealed class BytesReader : CodeReader
    {
        private readonly byte[] _bytes = new byte[OracleRecord.MaxCode];
        private int _at;
        private int _length;

        public void Set(ReadOnlySpan<byte> bytes)
        {
            bytes.CopyTo(_bytes);
            _length = bytes.Length;
            _at = 0;
        }

        public override int ReadByte() => _at < _length ? _bytes[_at++] : -1;
    }
}
