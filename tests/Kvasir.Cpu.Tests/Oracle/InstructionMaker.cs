using System;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Makes random instances of a form: registers, addressing, immediates, prefixes.</summary>
internal sealed class InstructionMaker
{
    private readonly byte[] _bytes = new byte[32];
    private readonly ArrayWriter _writer;
    private readonly Encoder[] _encoders;

    public InstructionMaker()
    {
        _writer = new ArrayWriter(_bytes);
        _encoders = [Encoder.Create(16, _writer), Encoder.Create(32, _writer), Encoder.Create(64, _writer)];
    }

    /// <summary>Where set: numbers of the registers that memory operands may have as their base; they have no index then.</summary>
    public int[]? Pointers { get; set; }

    /// <summary>Makes an instance.</summary>
    /// <param name="form">The form.</param>
    /// <param name="rip">Its offset in the code segment.</param>
    /// <param name="codeBase">Base of the code segment.</param>
    /// <param name="dice">Where choices come from.</param>
    /// <param name="length">Bytes of it, in <see cref="Bytes"/>.</param>
    /// <returns>False where these choices cannot be encoded together.</returns>
    public bool TryMake(Form form, ulong rip, uint codeBase, ref Dice dice, out int length)
    {
        length = 0;
        OpCodeInfo info = form.Code.ToOpCode();
        Instruction instruction = default;
        instruction.Code = form.Code;
        int addressBits = ChooseAddressSize(form.Mode, info, ref dice);
        for (int i = 0; i < info.OpCount; i++)
        {
            if (!TrySetOperand(ref instruction, i, info.GetOpKind(i), form.Mode, addressBits, rip, codeBase, ref dice))
                return false;
        }
        SetPrefixes(ref instruction, info, form.Mode, ref dice);
        _writer.Length = 0;
        Encoder encoder = _encoders[form.Mode / 32];
        if (!encoder.TryEncode(instruction, rip, out _, out _))
            return false;
        length = _writer.Length;
        return true;
    }

    public ReadOnlySpan<byte> Bytes => _bytes;

    private static int ChooseAddressSize(int mode, OpCodeInfo info, ref Dice dice)
    {
        if (info.AddressSize != 0)
            return info.AddressSize;
        return mode switch
        {
            64 => dice.Percent(90) ? 64 : 32,
            32 => dice.Percent(85) ? 32 : 16,
            _ => dice.Percent(70) ? 16 : 32,
        };
    }

    private static void SetPrefixes(ref Instruction instruction, OpCodeInfo info, int mode, ref Dice dice)
    {
        if (info.CanUseLockPrefix && dice.Percent(40))
            instruction.HasLockPrefix = true;
        if ((info.CanUseRepPrefix || info.CanUseRepnePrefix) && dice.Percent(60))
        {
            if (info.CanUseRepnePrefix && (!info.CanUseRepPrefix || dice.Percent(50)))
                instruction.HasRepnePrefix = true;
            else
                instruction.HasRepPrefix = true;
        }
        if (dice.Percent(15))
        {
            instruction.SegmentPrefix = mode == 64 && dice.Percent(75)
                ? dice.Percent(50) ? Register.FS : Register.GS
                : Register.ES + dice.Below(6);
        }
    }

    private bool TrySetOperand(
        ref Instruction instruction, int operand, OpCodeOperandKind kind, int mode, int addressBits, ulong rip, uint codeBase, ref Dice dice)
    {
        int registers = mode == 64 ? 16 : 8;
        bool memory = dice.Percent(60);
        switch (kind)
        {
            case OpCodeOperandKind.mem:
            case OpCodeOperandKind.mem_mib:
            case OpCodeOperandKind.mem_mpx:
            case OpCodeOperandKind.sibmem:
                SetMemory(ref instruction, operand, mode, addressBits, rip, codeBase, Register.None, ref dice);
                return true;
            case OpCodeOperandKind.mem_offs:
                SetAbsolute(ref instruction, operand, mode, addressBits, ref dice);
                return true;
            case OpCodeOperandKind.mem_vsib32x or OpCodeOperandKind.mem_vsib64x:
                SetMemory(ref instruction, operand, mode, Math.Max(addressBits, 32), rip, codeBase, Register.XMM0 + dice.Below(registers), ref dice);
                return true;
            case OpCodeOperandKind.mem_vsib32y or OpCodeOperandKind.mem_vsib64y:
                SetMemory(ref instruction, operand, mode, Math.Max(addressBits, 32), rip, codeBase, Register.YMM0 + dice.Below(registers), ref dice);
                return true;
            case OpCodeOperandKind.r8_or_mem or OpCodeOperandKind.r16_or_mem or OpCodeOperandKind.r32_or_mem or OpCodeOperandKind.r64_or_mem
                or OpCodeOperandKind.mm_or_mem or OpCodeOperandKind.xmm_or_mem or OpCodeOperandKind.ymm_or_mem when memory:
                SetMemory(ref instruction, operand, mode, addressBits, rip, codeBase, Register.None, ref dice);
                return true;
        }
        Register register = kind switch
        {
            OpCodeOperandKind.r8_or_mem or OpCodeOperandKind.r8_reg or OpCodeOperandKind.r8_opcode => ByteRegister(mode, ref dice),
            OpCodeOperandKind.r16_or_mem or OpCodeOperandKind.r16_reg or OpCodeOperandKind.r16_reg_mem or OpCodeOperandKind.r16_rm or OpCodeOperandKind.r16_opcode
                => Register.AX + dice.Below(registers),
            OpCodeOperandKind.r32_or_mem or OpCodeOperandKind.r32_reg or OpCodeOperandKind.r32_reg_mem or OpCodeOperandKind.r32_rm or OpCodeOperandKind.r32_opcode
                or OpCodeOperandKind.r32_vvvv => Register.EAX + dice.Below(registers),
            OpCodeOperandKind.r64_or_mem or OpCodeOperandKind.r64_reg or OpCodeOperandKind.r64_reg_mem or OpCodeOperandKind.r64_rm or OpCodeOperandKind.r64_opcode
                or OpCodeOperandKind.r64_vvvv => Register.RAX + dice.Below(registers),
            OpCodeOperandKind.mm_or_mem or OpCodeOperandKind.mm_reg or OpCodeOperandKind.mm_rm => Register.MM0 + dice.Below(8),
            OpCodeOperandKind.xmm_or_mem or OpCodeOperandKind.xmm_reg or OpCodeOperandKind.xmm_rm or OpCodeOperandKind.xmm_vvvv or OpCodeOperandKind.xmm_is4
                or OpCodeOperandKind.xmm_is5 => Register.XMM0 + dice.Below(registers),
            OpCodeOperandKind.ymm_or_mem or OpCodeOperandKind.ymm_reg or OpCodeOperandKind.ymm_rm or OpCodeOperandKind.ymm_vvvv or OpCodeOperandKind.ymm_is4
                or OpCodeOperandKind.ymm_is5 => Register.YMM0 + dice.Below(registers),
            OpCodeOperandKind.seg_reg => Register.ES + dice.Below(6),
            OpCodeOperandKind.cr_reg => dice.Below(5) switch { 0 => Register.CR0, 1 => Register.CR2, 2 => Register.CR3, 3 => Register.CR4, _ => mode == 64 ? Register.CR8 : Register.CR0 },
            OpCodeOperandKind.dr_reg => Register.DR0 + dice.Below(8),
            OpCodeOperandKind.al => Register.AL,
            OpCodeOperandKind.cl => Register.CL,
            OpCodeOperandKind.ax => Register.AX,
            OpCodeOperandKind.dx => Register.DX,
            OpCodeOperandKind.eax => Register.EAX,
            OpCodeOperandKind.rax => Register.RAX,
            OpCodeOperandKind.st0 => Register.ST0,
            OpCodeOperandKind.sti_opcode => Register.ST0 + dice.Below(8),
            OpCodeOperandKind.es => Register.ES,
            OpCodeOperandKind.cs => Register.CS,
            OpCodeOperandKind.ss => Register.SS,
            OpCodeOperandKind.ds => Register.DS,
            OpCodeOperandKind.fs => Register.FS,
            OpCodeOperandKind.gs => Register.GS,
            _ => Register.None,
        };
        if (register != Register.None)
        {
            instruction.SetOpKind(operand, OpKind.Register);
            instruction.SetOpRegister(operand, register);
            return true;
        }
        return TrySetOther(ref instruction, operand, kind, addressBits, rip, codeBase, ref dice);
    }

    private static Register ByteRegister(int mode, ref Dice dice)
    {
        // AL-BL and AH-BH, or SPL-DIL and R8L-R15L.
        if (mode != 64 || dice.Percent(50))
            return Register.AL + dice.Below(8);
        return Register.SPL + dice.Below(12);
    }

    private static bool TrySetOther(
        ref Instruction instruction, int operand, OpCodeOperandKind kind, int addressBits, ulong rip, uint codeBase, ref Dice dice)
    {
        switch (kind)
        {
            case OpCodeOperandKind.imm8:
                instruction.SetOpKind(operand, operand == 1 && instruction.Mnemonic == Mnemonic.Enter ? OpKind.Immediate8_2nd : OpKind.Immediate8);
                instruction.SetImmediate(operand, (ulong)(byte)dice.Integer());
                return true;
            case OpCodeOperandKind.imm8_const_1:
                instruction.SetOpKind(operand, OpKind.Immediate8);
                instruction.SetImmediate(operand, 1ul);
                return true;
            case OpCodeOperandKind.imm8sex16:
                instruction.SetOpKind(operand, OpKind.Immediate8to16);
                instruction.SetImmediate(operand, (long)(sbyte)dice.Integer());
                return true;
            case OpCodeOperandKind.imm8sex32:
                instruction.SetOpKind(operand, OpKind.Immediate8to32);
                instruction.SetImmediate(operand, (long)(sbyte)dice.Integer());
                return true;
            case OpCodeOperandKind.imm8sex64:
                instruction.SetOpKind(operand, OpKind.Immediate8to64);
                instruction.SetImmediate(operand, (long)(sbyte)dice.Integer());
                return true;
            case OpCodeOperandKind.imm16:
                instruction.SetOpKind(operand, OpKind.Immediate16);
                instruction.SetImmediate(operand, (ulong)(ushort)dice.Integer());
                return true;
            case OpCodeOperandKind.imm32:
                instruction.SetOpKind(operand, OpKind.Immediate32);
                instruction.SetImmediate(operand, (ulong)(uint)dice.Integer());
                return true;
            case OpCodeOperandKind.imm32sex64:
                instruction.SetOpKind(operand, OpKind.Immediate32to64);
                instruction.SetImmediate(operand, (long)(int)dice.Integer());
                return true;
            case OpCodeOperandKind.imm64:
                instruction.SetOpKind(operand, OpKind.Immediate64);
                instruction.SetImmediate(operand, dice.Integer());
                return true;
            case OpCodeOperandKind.br16_1 or OpCodeOperandKind.br16_2:
                instruction.SetOpKind(operand, OpKind.NearBranch16);
                instruction.NearBranch16 = (ushort)BranchTarget(rip, codeBase, ref dice);
                return true;
            case OpCodeOperandKind.br32_1 or OpCodeOperandKind.br32_4:
                instruction.SetOpKind(operand, OpKind.NearBranch32);
                instruction.NearBranch32 = (uint)BranchTarget(rip, codeBase, ref dice);
                return true;
            case OpCodeOperandKind.br64_1 or OpCodeOperandKind.br64_4:
                instruction.SetOpKind(operand, OpKind.NearBranch64);
                instruction.NearBranch64 = BranchTarget(rip, codeBase, ref dice);
                return true;
            case OpCodeOperandKind.seg_rSI:
                instruction.SetOpKind(operand, addressBits switch { 64 => OpKind.MemorySegRSI, 32 => OpKind.MemorySegESI, _ => OpKind.MemorySegSI });
                return true;
            case OpCodeOperandKind.es_rDI:
                instruction.SetOpKind(operand, addressBits switch { 64 => OpKind.MemoryESRDI, 32 => OpKind.MemoryESEDI, _ => OpKind.MemoryESDI });
                return true;
            case OpCodeOperandKind.seg_rDI:
                instruction.SetOpKind(operand, addressBits switch { 64 => OpKind.MemorySegRDI, 32 => OpKind.MemorySegEDI, _ => OpKind.MemorySegDI });
                return true;
            case OpCodeOperandKind.seg_rBX_al:
                instruction.SetOpKind(operand, OpKind.Memory);
                instruction.MemoryBase = addressBits switch { 64 => Register.RBX, 32 => Register.EBX, _ => Register.BX };
                instruction.MemoryIndex = Register.AL;
                instruction.MemoryIndexScale = 1;
                return true;
            default:
                return false;
        }
    }

    /// <summary>Somewhere in the code pages, but not among the instruction's own bytes or its landing's.</summary>
    private static ulong BranchTarget(ulong rip, uint codeBase, ref Dice dice)
    {
        uint start = Window.Start - codeBase;
        ulong target;
        do
        {
            target = dice.Below(10) switch
            {
                0 => start + (uint)dice.Below((int)(Window.CodeEnd - Window.Start)),
                < 6 => rip + 32 + (uint)dice.Below(90),
                _ => rip - 1 - (uint)dice.Below(110),
            };
        }
        while (target - rip < 32 || target - start >= Window.CodeEnd - Window.Start);
        return target;
    }

    private static void SetAbsolute(ref Instruction instruction, int operand, int mode, int addressBits, ref Dice dice)
    {
        instruction.SetOpKind(operand, OpKind.Memory);
        instruction.MemoryDisplSize = addressBits / 8;
        uint linear = Window.Data + (uint)dice.Below(0x2000);
        instruction.MemoryDisplacement64 = mode != 64 && (addressBits == 16 || dice.Percent(20)) ? linear - Window.Start : linear;
    }

    private void SetMemory(
        ref Instruction instruction, int operand, int mode, int addressBits, ulong rip, uint codeBase, Register vectorIndex, ref Dice dice)
    {
        instruction.SetOpKind(operand, OpKind.Memory);
        instruction.MemoryIndexScale = 1;
        if (Pointers != null)
        {
            int pointer = Pointers[dice.Below(Pointers.Length)];
            instruction.MemoryBase = (addressBits switch { 64 => Register.RAX, 32 => Register.EAX, _ => Register.AX }) + pointer;
            instruction.MemoryDisplSize = 1;
            instruction.MemoryDisplacement64 = CutTo(addressBits / 8, (sbyte)dice.Next());
            return;
        }
        if (addressBits == 16)
        {
            SetMemory16(ref instruction, ref dice);
            return;
        }
        int registers = mode == 64 ? 16 : 8;
        Register first = addressBits == 64 ? Register.RAX : Register.EAX;
        int absoluteSize = addressBits / 8;
        if (vectorIndex == Register.None && dice.Percent(8))
        {
            uint linear = Window.Data + (uint)dice.Below(0x2000);
            if (mode == 64 && dice.Percent(60))
            {
                instruction.MemoryBase = addressBits == 64 ? Register.RIP : Register.EIP;
                instruction.MemoryDisplSize = absoluteSize;
                instruction.MemoryDisplacement64 = linear;
                return;
            }
            instruction.MemoryDisplSize = absoluteSize;
            instruction.MemoryDisplacement64 = mode != 64 && dice.Percent(20) ? linear - Window.Start : linear;
            return;
        }
        instruction.MemoryBase = first + dice.Below(registers);
        if (vectorIndex != Register.None)
        {
            instruction.MemoryIndex = vectorIndex;
            instruction.MemoryIndexScale = 1 << dice.Below(4);
        }
        else if (dice.Percent(40))
        {
            int index = dice.Below(registers);
            if (index != 4)
            {
                instruction.MemoryIndex = first + index;
                instruction.MemoryIndexScale = 1 << dice.Below(4);
                if (dice.Percent(10))
                    instruction.MemoryBase = Register.None;
            }
        }
        SetDisplacement(ref instruction, absoluteSize, ref dice);
    }

    private static void SetDisplacement(ref Instruction instruction, int absoluteSize, ref Dice dice)
    {
        if (instruction.MemoryBase == Register.None)
        {
            instruction.MemoryDisplSize = absoluteSize;
            instruction.MemoryDisplacement64 = CutTo(absoluteSize, dice.Below(4096));
            return;
        }
        switch (dice.Below(3))
        {
            case 0:
                instruction.MemoryDisplSize = 0;
                break;
            case 1:
                instruction.MemoryDisplSize = 1;
                instruction.MemoryDisplacement64 = CutTo(absoluteSize, (sbyte)dice.Integer());
                break;
            default:
                instruction.MemoryDisplSize = absoluteSize;
                instruction.MemoryDisplacement64 = CutTo(absoluteSize, (int)dice.Integer());
                break;
        }
    }

    private static ulong CutTo(int bytes, long value) => bytes switch
    {
        8 => (ulong)value,
        4 => (uint)value,
        _ => (ushort)value,
    };

    private static void SetMemory16(ref Instruction instruction, ref Dice dice)
    {
        (Register Base, Register Index) pair = dice.Below(9) switch
        {
            0 => (Register.BX, Register.SI),
            1 => (Register.BX, Register.DI),
            2 => (Register.BP, Register.SI),
            3 => (Register.BP, Register.DI),
            4 => (Register.SI, Register.None),
            5 => (Register.DI, Register.None),
            6 => (Register.BP, Register.None),
            7 => (Register.BX, Register.None),
            _ => (Register.None, Register.None),
        };
        instruction.MemoryBase = pair.Base;
        instruction.MemoryIndex = pair.Index;
        if (pair.Base == Register.None)
        {
            instruction.MemoryDisplSize = 2;
            instruction.MemoryDisplacement64 = (ushort)(Window.Data + dice.Below(0x2000));
            return;
        }
        SetDisplacement(ref instruction, 2, ref dice);
    }

    private sealed class ArrayWriter(byte[] bytes) : CodeWriter
    {
        public int Length { get; set; }

        public override void WriteByte(byte value)
        {
            if (Length < bytes.Length)
                bytes[Length++] = value;
        }
    }
}
