using System;
using Iced.Intel;
using Kvasir.Core;

namespace Kvasir.Cpu.Tests.Oracle;

/// <content>Registers and memory arranged for the instruction.</content>
internal sealed unsafe partial class CaseGenerator
{
    private void Arrange(in Instruction instruction)
    {
        // Alignment checks of wide and vector operands differ from processor to processor.
        if (instruction.MemorySize.GetSize() is > 8 or 6 || instruction.Encoding != EncodingKind.Legacy || instruction.IsSaveRestoreInstruction
            || instruction.Mnemonic is Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Bound or Mnemonic.Lds or Mnemonic.Les or Mnemonic.Lss
                or Mnemonic.Lfs or Mnemonic.Lgs)
            _r->In.Flags &= ~(1ul << 18);
        Prepare(in instruction);
        ref readonly InstructionInfo info = ref _information.GetInfo(in instruction, InstructionInfoOptions.NoRegisterUsage);
        bool first = true;
        foreach (UsedMemory memory in info.GetUsedMemory())
        {
            ulong linear = Place(in memory, IsStack(in memory, in instruction));
            if (first)
                PutOperand(in instruction, linear, in memory);
            first = false;
        }
    }

    /// <summary>Sets the base register, where it is still free, so that the operand lies at a chosen target. Gives the operand's linear address.</summary>
    private ulong Place(in UsedMemory memory, bool stack)
    {
        int size = Math.Max(memory.MemorySize.GetSize(), 1);
        int width = memory.AddressSize switch { CodeSize.Code16 => 16, CodeSize.Code32 => 32, _ => 64 };
        Register baseRegister = memory.Base;
        if (stack && _r->Mode != 64)
        {
            // Iced goes by the code's mode; the stack segment decides.
            bool big = (Descriptors.Load(_r->In.Selectors[2]).Attributes & 0x4000) != 0;
            width = big ? 32 : 16;
            baseRegister = big ? Register.ESP : Register.SP;
        }
        ulong mask = width == 64 ? ulong.MaxValue : (1ul << width) - 1;
        ulong segment = SegmentBase(memory.Segment);
        bool vector = memory.VsibSize != 0;
        if (vector)
            FillVectorIndex(memory.Index);
        ulong index = vector || memory.Index == Register.None ? 0 : (GetRegister(memory.Index) & mask) * (ulong)memory.Scale;
        ulong target = ChooseTarget(size);
        if (_r->Mode == 64 && _dice.Percent(2))
            target = NonCanonical();
        ulong displacement = stack ? (ulong)(long)(short)memory.Displacement : memory.Displacement;
        ulong offset = target - segment - displacement;
        if (memory.Base == Register.None)
        {
            if (memory.Index != Register.None && !vector && IsFree(memory.Index))
            {
                SetRegister(memory.Index, offset / (ulong)memory.Scale);
                index = (GetRegister(memory.Index) & mask) * (ulong)memory.Scale;
            }
        }
        else if (memory.Base is Register.RIP or Register.EIP)
        {
            // Iced gives the displacement as the address itself.
            return segment + memory.Displacement;
        }
        else if (IsFree(memory.Base))
        {
            if (memory.Base == memory.Index)
            {
                SetRegister(baseRegister, (offset & mask) / ((ulong)memory.Scale + 1));
                index = (GetRegister(memory.Index) & mask) * (ulong)memory.Scale;
            }
            else
            {
                SetRegister(baseRegister, offset - index);
            }
        }
        Pin(memory.Base);
        if (!vector)
            Pin(memory.Index);
        ulong start = memory.Base == Register.None ? 0 : GetRegister(baseRegister);
        ulong linear = segment + ((start + index + displacement) & mask);
        return _r->Mode == 64 ? linear : (uint)linear;
    }

    /// <summary>The stack's top as an implicit operand, not ESP as a base register.</summary>
    private static bool IsStack(in UsedMemory memory, in Instruction instruction)
    {
        if (memory.Base is not (Register.SP or Register.ESP or Register.RSP) || memory.Index != Register.None || !instruction.IsStackInstruction)
            return false;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Memory && instruction.MemoryBase == memory.Base && instruction.MemoryDisplacement64 == memory.Displacement)
                return false;
        }
        return true;
    }

    private ulong NonCanonical() => _dice.Below(3) switch
    {
        // Not across the boundary: whether the canonical part's page fault comes first differs.
        0 => 0x0000_8000_0000_0000ul + (ulong)_dice.Below(16),
        1 => 0xffff_8000_0000_0000ul - 1024 - (ulong)_dice.Below(16),
        _ => _dice.Next(),
    };

    /// <summary>Indices of a gather near its base, some in the same page, some beyond it.</summary>
    private void FillVectorIndex(Register register)
    {
        int number = register.GetNumber();
        bool wide = _dice.Percent(50);
        for (int i = 0; i < 4; i++)
        {
            ulong* lane = (ulong*)(_r->In.Ymm + number * 32) + i;
            int range = _dice.Percent(80) ? 256 : 4096;
            ulong low = (ulong)(long)(_dice.Below(range) - range / 2);
            ulong high = (ulong)(long)(_dice.Below(range) - range / 2);
            *lane = wide ? low : (uint)low | high << 32;
        }
    }

    /// <summary>Puts values worth seeing where the first memory operand lies.</summary>
    private void PutOperand(in Instruction instruction, ulong linear, in UsedMemory memory)
    {
        if (_patched != 0)
            return;
        int room = Math.Min(Window.DataRun(linear), OracleRecord.MaxPatch);
        if (room == 0)
            return;
        Span<byte> patch = stackalloc byte[OracleRecord.MaxPatch];
        int length = 64;
        Flavour flavour = _dice.AnyFlavour();
        for (int i = 0; i < length; i += 8)
            BitConverter.TryWriteBytes(patch[i..], _dice.Lane(flavour));
        Contents(in instruction, memory.MemorySize, patch, ref length);
        length = Math.Min(length, room);
        if (length == 0)
            return;
        patch[..length].CopyTo(new Span<byte>(_r->Patch, OracleRecord.MaxPatch));
        _r->PatchLinear = (uint)linear;
        _r->PatchLength = (uint)length;
        _patched = linear;
    }

    private ulong SegmentBase(Register segment)
    {
        if (_r->Mode == 64)
        {
            return segment switch
            {
                Register.FS => _r->In.FsBase,
                Register.GS => _r->In.GsBase,
                _ => 0,
            };
        }
        SegmentState state = Descriptors.Load(_r->In.Selectors[segment - Register.ES]);
        return state.Base;
    }

    private bool IsFree(Register register) => (_pinned & 1u << register.GetFullRegister().GetNumber()) == 0;

    /// <summary>Later arrangements leave the register alone.</summary>
    private void Pin(Register register)
    {
        if (register.IsGPR())
            _pinned |= 1u << register.GetFullRegister().GetNumber();
    }

    private ulong GetRegister(Register register)
    {
        ulong full = _r->In.Gpr[register.GetFullRegister().GetNumber()];
        return register.GetSize() switch
        {
            1 => register is >= Register.AH and <= Register.BH ? (byte)(full >> 8) : (byte)full,
            2 => (ushort)full,
            4 => (uint)full,
            _ => full,
        };
    }

    /// <summary>Sets the register alone; what surrounds it stays.</summary>
    private void SetRegister(Register register, ulong value)
    {
        ref ulong full = ref _r->In.Gpr[register.GetFullRegister().GetNumber()];
        full = register.GetSize() switch
        {
            1 when register is >= Register.AH and <= Register.BH => full & ~0xff00ul | (value & 0xff) << 8,
            1 => full & ~0xfful | value & 0xff,
            2 => full & ~0xfffful | value & 0xffff,
            4 => full & ~0xffff_fffful | value & 0xffff_ffff,
            _ => _r->Mode == 64 ? value : (uint)value,
        };
    }
}
