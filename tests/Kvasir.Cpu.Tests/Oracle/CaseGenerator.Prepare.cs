using System;
using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <content>What single instructions want, so that more than their faults is seen.</content>
internal sealed unsafe partial class CaseGenerator
{
    /// <summary>Components that both processors have: x87, SSE, AVX.</summary>
    private const ulong Components = 7;

    private void Prepare(in Instruction instruction)
    {
        if (instruction.HasRepPrefix || instruction.HasRepnePrefix)
            SetRegister(Counter(in instruction), _dice.Percent(85) ? (ulong)_dice.Below(24) : (ulong)_dice.Below(600));
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Div or Mnemonic.Idiv:
                PrepareDivision(in instruction);
                break;
            case Mnemonic.Cmpxchg or Mnemonic.Cmpxchg8b or Mnemonic.Cmpxchg16b or Mnemonic.Scasb or Mnemonic.Scasw or Mnemonic.Scasd or Mnemonic.Scasq:
                // Equal to what memory will hold, half of the time.
                if (_dice.Percent(50))
                {
                    SetRegister(Register.RAX, 0x4141_4141_4141_4141);
                    SetRegister(Register.RDX, 0x4141_4141_4141_4141);
                }
                break;
            case Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc:
                if (instruction.Op0Kind == OpKind.Memory && instruction.Op1Kind == OpKind.Register && _dice.Percent(85))
                {
                    SetRegister(instruction.Op1Register, (ulong)(long)(_dice.Below(4096) - 2048));
                    Pin(instruction.Op1Register);
                }
                break;
            case Mnemonic.Shl or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr or Mnemonic.Sal or Mnemonic.Shld
                or Mnemonic.Shrd:
                if (_dice.Percent(60))
                    SetRegister(Register.CL, (ulong)_dice.Below(66));
                Pin(Register.RCX);
                break;
            case Mnemonic.Loop or Mnemonic.Loope or Mnemonic.Loopne or Mnemonic.Jcxz or Mnemonic.Jecxz or Mnemonic.Jrcxz:
                if (_dice.Percent(70))
                    SetRegister(_dice.Percent(50) ? Register.RCX : Register.CX, (ulong)_dice.Below(3));
                break;
            case Mnemonic.Enter or Mnemonic.Leave:
                SetRegister(Register.RBP, StackTop());
                break;
            case Mnemonic.Pcmpestri or Mnemonic.Pcmpestrm or Mnemonic.Pcmpestri64 or Mnemonic.Pcmpestrm64 or Mnemonic.Vpcmpestri or Mnemonic.Vpcmpestrm
                or Mnemonic.Vpcmpestri64 or Mnemonic.Vpcmpestrm64:
                if (_dice.Percent(75))
                {
                    SetRegister(Register.RAX, (ulong)(long)(_dice.Below(40) - 20));
                    SetRegister(Register.RDX, (ulong)(long)(_dice.Below(40) - 20));
                    Pin(Register.RAX);
                    Pin(Register.RDX);
                }
                break;
            case Mnemonic.Xsave or Mnemonic.Xsave64 or Mnemonic.Xsavec or Mnemonic.Xsavec64 or Mnemonic.Xsaveopt or Mnemonic.Xsaveopt64 or Mnemonic.Xrstor
                or Mnemonic.Xrstor64:
                SetRegister(Register.RAX, _dice.Next() & Components);
                SetRegister(Register.RDX, 0);
                Pin(Register.RAX);
                Pin(Register.RDX);
                break;
            case Mnemonic.Mov or Mnemonic.Verr or Mnemonic.Verw or Mnemonic.Lar or Mnemonic.Lsl or Mnemonic.Arpl:
                PrepareSelector(in instruction);
                break;
            case Mnemonic.Jmp or Mnemonic.Call:
                if (instruction.Op0Kind == OpKind.Register)
                {
                    SetRegister(instruction.Op0Register, CodeTarget());
                    Pin(instruction.Op0Register);
                }
                break;
            case Mnemonic.Wrfsbase or Mnemonic.Wrgsbase:
                if (_dice.Percent(50))
                    SetRegister(instruction.Op0Register, SegmentBase64());
                break;
            case Mnemonic.Bextr or Mnemonic.Bzhi or Mnemonic.Shlx or Mnemonic.Shrx or Mnemonic.Sarx:
                if (_dice.Percent(60))
                {
                    SetRegister(instruction.Op2Register, (uint)_dice.Below(70) | (uint)_dice.Below(70) << 8);
                    Pin(instruction.Op2Register);
                }
                break;
        }
    }

    private Register Counter(in Instruction instruction)
    {
        for (int i = 0; i < instruction.OpCount; i++)
        {
            switch (instruction.GetOpKind(i))
            {
                case OpKind.MemorySegSI or OpKind.MemoryESDI:
                    return Register.CX;
                case OpKind.MemorySegESI or OpKind.MemoryESEDI:
                    return Register.ECX;
            }
        }
        return _r->Mode == 64 ? Register.RCX : Register.ECX;
    }

    private void PrepareDivision(in Instruction instruction)
    {
        if (_dice.Percent(40))
            return;
        // A dividend whose quotient may fit.
        if (instruction.MemorySize.GetSize() == 1 || instruction.Op0Register.GetSize() == 1)
        {
            SetRegister(Register.AX, (ulong)(long)(_dice.Below(0x400) - 0x200));
            return;
        }
        bool negative = instruction.Mnemonic == Mnemonic.Idiv && (_r->In.Gpr[0] & 1) != 0;
        SetRegister(Register.RDX, negative ? ulong.MaxValue - (ulong)_dice.Below(4) : (ulong)_dice.Below(4));
        Pin(Register.RDX);
        Pin(Register.RAX);
    }

    private void PrepareSelector(in Instruction instruction)
    {
        int source = instruction.Mnemonic is Mnemonic.Mov or Mnemonic.Lar or Mnemonic.Lsl ? 1 : 0;
        if (instruction.Mnemonic == Mnemonic.Mov && !instruction.Op0Register.IsSegmentRegister())
            return;
        if (instruction.GetOpKind(source) != OpKind.Register)
            return;
        SetRegister(instruction.GetOpRegister(source), Selector() | _dice.Next() << 16);
        Pin(instruction.GetOpRegister(source));
    }

    private ushort Selector() => Descriptors.Loadable[_dice.Below(Descriptors.Loadable.Length)];

    /// <summary>An offset in the code segment that a branch may go to: not among the instruction's own bytes or its landing's.</summary>
    private ulong CodeTarget()
    {
        ulong start = Window.Start - _codeBase;
        ulong target;
        do
        {
            target = _dice.Percent(92) ? start + (ulong)_dice.Below(0x2000) : start + (ulong)_dice.Below((int)Window.Size);
        }
        while (target - (_r->In.Rip - 8) < 40);
        if (_r->Mode == 64 && _dice.Percent(3))
            target = NonCanonical();
        return target;
    }

    /// <summary>What memory holds for instructions that mind.</summary>
    private void Contents(in Instruction instruction, MemorySize size, Span<byte> patch, ref int length)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Cmpxchg or Mnemonic.Cmpxchg8b or Mnemonic.Cmpxchg16b when _dice.Percent(70):
                patch[..length].Fill(0x41);
                return;
            case Mnemonic.Jmp or Mnemonic.Call:
                if (instruction.Op0Kind == OpKind.Memory)
                    BitConverter.TryWriteBytes(patch, CodeTarget());
                return;
            case Mnemonic.Ret:
                BitConverter.TryWriteBytes(patch, CodeTarget());
                return;
            case Mnemonic.Popf or Mnemonic.Popfd or Mnemonic.Popfq:
                // A set trap flag is the host's debugger's matter.
                BitConverter.TryWriteBytes(patch, BitConverter.ToUInt64(patch) & ~0x100ul);
                return;
            case Mnemonic.Ldmxcsr or Mnemonic.Vldmxcsr:
                if (_dice.Percent(75))
                    BitConverter.TryWriteBytes(patch, (uint)_dice.Next() & 0xffff);
                return;
            case Mnemonic.Pop or Mnemonic.Mov or Mnemonic.Verr or Mnemonic.Verw or Mnemonic.Lar or Mnemonic.Lsl or Mnemonic.Arpl:
                BitConverter.TryWriteBytes(patch, Selector() | _dice.Next() << 16);
                return;
            case Mnemonic.Lds or Mnemonic.Les or Mnemonic.Lss or Mnemonic.Lfs or Mnemonic.Lgs:
                BitConverter.TryWriteBytes(patch[(size.GetSize() - 2)..], Selector());
                return;
            case Mnemonic.Fldcw:
                BitConverter.TryWriteBytes(patch, (ushort)(_dice.Next() & 0xffff | 0x3f));
                return;
            case Mnemonic.Fldenv or Mnemonic.Frstor:
                FillEnvironment(patch, size.GetSize() is 14 or 94);
                length = size.GetSize();
                return;
            case Mnemonic.Fxrstor or Mnemonic.Fxrstor64:
                FillImage(patch);
                length = 512;
                return;
            case Mnemonic.Xrstor or Mnemonic.Xrstor64:
                FillXsave(patch);
                length = 832;
                return;
            case Mnemonic.Fbld:
                FillDecimal(patch);
                return;
        }
        switch (size)
        {
            case MemorySize.Float80:
                (ulong significand, ushort exponent) = _dice.Extended();
                BitConverter.TryWriteBytes(patch, significand);
                BitConverter.TryWriteBytes(patch[8..], exponent);
                break;
            case MemorySize.Float64:
                BitConverter.TryWriteBytes(patch, _dice.Double());
                break;
            case MemorySize.Float32:
                BitConverter.TryWriteBytes(patch, _dice.Single());
                break;
        }
    }

    private void FillDecimal(Span<byte> patch)
    {
        for (int i = 0; i < 10; i++)
            patch[i] = (byte)(_dice.Below(10) << 4 | _dice.Below(10));
        patch[9] = (byte)(_dice.Next() & 0x80);
    }

    /// <summary>An environment as FNSTENV would have stored it, and eight registers behind it.</summary>
    private void FillEnvironment(Span<byte> patch, bool words)
    {
        Span<byte> fx = stackalloc byte[512];
        fx.Clear();
        fixed (byte* p = fx)
            FillX87(p);
        int step = words ? 2 : 4;
        patch[..128].Clear();
        for (int i = 0; i < 7; i++)
        {
            uint value = i switch
            {
                0 => BitConverter.ToUInt16(fx),
                1 => BitConverter.ToUInt16(fx[UserState.Fsw..]),
                2 => (uint)_dice.Next() & 0xffff,
                _ => 0,
            };
            if (words)
                BitConverter.TryWriteBytes(patch[(i * step)..], (ushort)value);
            else
                BitConverter.TryWriteBytes(patch[(i * step)..], i < 3 ? value | 0xffff_0000 : value);
        }
        for (int i = 0; i < 8; i++)
            fx.Slice(UserState.St0 + i * 16, 10).CopyTo(patch[(7 * step + i * 10)..]);
    }

    private void FillImage(Span<byte> patch)
    {
        patch[..512].Clear();
        fixed (byte* p = patch)
            FillX87(p);
        uint mxcsr = (uint)_dice.Next() & 0xffff;
        if (_dice.Percent(5))
            mxcsr |= 0x10000;
        BitConverter.TryWriteBytes(patch[UserState.MxcsrAt..], mxcsr);
        for (int i = 160; i < 416; i += 8)
            BitConverter.TryWriteBytes(patch[i..], _dice.Next());
    }

    private void FillXsave(Span<byte> patch)
    {
        FillImage(patch);
        patch.Slice(512, 64).Clear();
        for (int i = 576; i < 832; i += 8)
            BitConverter.TryWriteBytes(patch[i..], _dice.Next());
        ulong present = _dice.Next() & Components;
        bool compact = _dice.Percent(30);
        ulong layout = compact ? 1ul << 63 | (_dice.Percent(80) ? present : _dice.Next() & Components) : 0;
        if (_dice.Percent(5))
            patch[528 + _dice.Below(48)] = 1;
        BitConverter.TryWriteBytes(patch[512..], present);
        BitConverter.TryWriteBytes(patch[520..], layout);
    }
}
