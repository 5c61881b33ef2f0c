using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>
/// Emits thunks: host functions of a vCPU's block, a pointer to the memory operand and the operation. A thunk loads the guest registers its instruction
/// names, executes the instruction, and stores what it wrote. Registers are found through the operation, so one thunk serves every choice of registers. Not
/// thread-safe.
/// </summary>
internal sealed class ThunkCompiler
{
    private readonly List<byte> _bytes = [];
    private readonly Encoder _encoder;
    private readonly Encoder[] _originals;
    private readonly InstructionInfoFactory _info = new();

    public ThunkCompiler()
    {
        Sink sink = new(_bytes);
        _encoder = Encoder.Create(64, sink);
        _originals = [Encoder.Create(16, sink), Encoder.Create(32, sink), Encoder.Create(64, sink)];
    }

    /// <summary>The instruction's own bytes in 64-bit code: what a thunk is known by. Empty: it has no form there.</summary>
    public ReadOnlySpan<byte> Encode(in Instruction instruction)
    {
        _bytes.Clear();
        if (!_encoder.TryEncode(in instruction, 0, out _, out _))
            _bytes.Clear();
        return System.Runtime.InteropServices.CollectionsMarshal.AsSpan(_bytes);
    }

    /// <summary>The instruction's bytes in the mode it was decoded in. Empty: it cannot be encoded.</summary>
    public ReadOnlySpan<byte> EncodeOriginal(in Instruction instruction)
    {
        _bytes.Clear();
        int mode = instruction.CodeSize switch
        {
            CodeSize.Code16 => 0,
            CodeSize.Code32 => 1,
            _ => 2,
        };
        if (!_originals[mode].TryEncode(in instruction, instruction.IP, out _, out _))
            _bytes.Clear();
        return System.Runtime.InteropServices.CollectionsMarshal.AsSpan(_bytes);
    }

    /// <summary>A thunk for an instruction on vector, MMX and general registers whose operands are those <see cref="ThunkLayout"/> gives.</summary>
    public byte[] Compile(in Instruction instruction)
    {
        Traits traits = ThunkTraits.Of(in instruction);
        _bytes.Clear();
        InstructionInfo info = _info.GetInfo(in instruction, InstructionInfoOptions.NoRegisterUsage);
        Emit(Instruction.Create(Code.Mov_r64_rm64, ThunkLayout.Operation, Register.RDX));
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) == OpKind.Register)
                Load(i, instruction.GetOpRegister(i));
        }
        LoadImplicit(traits);
        if ((traits & Traits.Mxcsr) != 0)
            Emit(Instruction.Create(Code.Ldmxcsr_m32, At(ThunkLayout.Mxcsr)));
        if ((traits & Traits.FlagsIn) != 0)
            LoadFlags();
        Emit(in instruction);
        if ((traits & Traits.FlagsOut) != 0)
            CaptureFlags();
        if ((traits & Traits.Mxcsr) != 0)
            Emit(Instruction.Create(Code.Stmxcsr_m32, At(ThunkLayout.Mxcsr)));
        bool vex = instruction.Encoding == EncodingKind.VEX;
        // Backwards: where two destinations are one register (MULX) the first operand's value stays.
        for (int i = instruction.OpCount - 1; i >= 0; i--)
        {
            if (instruction.GetOpKind(i) == OpKind.Register && info.GetOpAccess(i) is OpAccess.Write or OpAccess.ReadWrite or OpAccess.CondWrite or OpAccess.ReadCondWrite)
                Store(i, instruction.GetOpRegister(i), vex);
        }
        StoreImplicit(traits, vex);
        if ((traits & Traits.Mmx) != 0)
            Emit(Instruction.Create(Code.Emms));
        if (vex && (traits & Traits.Vector) != 0)
            Emit(Instruction.Create(Code.VEX_Vzeroupper));
        Emit(Instruction.Create(Code.Retnq));
        return [.. _bytes];
    }

    /// <summary>A thunk for an x87 instruction: the guest's floating-point state is the host's just around it, whatever exceptions it has unmasked.</summary>
    public byte[] CompileX87(in Instruction instruction)
    {
        Traits traits = ThunkTraits.Of(in instruction);
        _bytes.Clear();
        Emit(Instruction.Create(Code.Mov_r32_imm32, Register.EAX, 1));
        Emit(Instruction.Create(Code.Xor_r32_rm32, Register.EDX, Register.EDX));
        Emit(Instruction.Create(Code.Xrstor64_mem, At(ThunkLayout.X87)));
        if ((traits & Traits.FlagsIn) != 0)
            LoadFlags();
        Emit(in instruction);
        if ((traits & Traits.FlagsOut) != 0)
        {
            CaptureFlags();
            Emit(Instruction.Create(Code.Mov_r32_rm32, Register.R8D, Register.EAX));
        }
        Emit(Instruction.Create(Code.Mov_r32_imm32, Register.EAX, 1));
        // Neither waits: an exception that is pending now is looked at in the saved state and must not reach the host.
        Emit(Instruction.Create(Code.Xsave64_mem, At(ThunkLayout.X87)));
        Emit(Instruction.Create(Code.Fninit));
        if ((traits & Traits.FlagsOut) != 0)
            Emit(Instruction.Create(Code.Mov_r32_rm32, Register.EAX, Register.R8D));
        Emit(Instruction.Create(Code.Retnq));
        return [.. _bytes];
    }

    /// <summary>A function that compares and exchanges 16 bytes atomically: (byte* place, ulong* expected, ulong* value) gives 1 where they were equal; else what was there goes to expected.</summary>
    public byte[] CompileCompareExchange16()
    {
        _bytes.Clear();
        Emit(Instruction.Create(Code.Push_r64, Register.RBX));
        Emit(Instruction.Create(Code.Mov_r64_rm64, Register.R8, Register.RDX));
        Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RBX, new MemoryOperand(Register.R8)));
        Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RCX, new MemoryOperand(Register.R8, 8, 1)));
        Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RAX, new MemoryOperand(Register.RSI)));
        Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RDX, new MemoryOperand(Register.RSI, 8, 1)));
        Instruction exchange = Instruction.Create(Code.Cmpxchg16b_m128, new MemoryOperand(Register.RDI));
        exchange.HasLockPrefix = true;
        Emit(in exchange);
        Emit(Instruction.Create(Code.Mov_rm64_r64, new MemoryOperand(Register.RSI), Register.RAX));
        Emit(Instruction.Create(Code.Mov_rm64_r64, new MemoryOperand(Register.RSI, 8, 1), Register.RDX));
        Emit(Instruction.Create(Code.Sete_rm8, Register.AL));
        Emit(Instruction.Create(Code.Movzx_r32_rm8, Register.EAX, Register.AL));
        Emit(Instruction.Create(Code.Pop_r64, Register.RBX));
        Emit(Instruction.Create(Code.Retnq));
        return [.. _bytes];
    }

    /// <summary>A function that loads MXCSR from its first argument.</summary>
    public byte[] CompileLoadMxcsr()
    {
        _bytes.Clear();
        Emit(Instruction.Create(Code.Ldmxcsr_m32, new MemoryOperand(Register.RDI)));
        Emit(Instruction.Create(Code.Retnq));
        return [.. _bytes];
    }

    /// <summary>A function that saves the host's legacy floating-point state (FXSAVE) to its first argument.</summary>
    public byte[] CompileFxsave()
    {
        _bytes.Clear();
        Emit(Instruction.Create(Code.Fxsave64_m512byte, new MemoryOperand(Register.RDI)));
        Emit(Instruction.Create(Code.Retnq));
        return [.. _bytes];
    }

    private static MemoryOperand At(int offset) => new(ThunkLayout.State, offset, 8);

    /// <summary>The operand's vector register in the block: its place counts in units of 4 bytes, so that the index's scale of 8 makes 32.</summary>
    private static MemoryOperand VectorAt => new(ThunkLayout.State, ThunkLayout.Place, 8, ThunkLayout.Vector, 8);

    /// <summary>The operand's MMX register: its place counts in units of 2 bytes.</summary>
    private static MemoryOperand MmxAt(int offset) => new(ThunkLayout.State, ThunkLayout.Place, 8, ThunkLayout.X87 + 32 + offset, 8);

    private static MemoryOperand GeneralAt => new(ThunkLayout.State, ThunkLayout.Place, 1);

    private static MemoryOperand GeneralAtNumber(int number) => new(ThunkLayout.State, number * 8, 1);

    private void LoadPlace(int operand) =>
        Emit(Instruction.Create(Code.Movzx_r32_rm8, Register.R10D, new MemoryOperand(ThunkLayout.Operation, ThunkLayout.PlaceOf(operand), 1)));

    private void Load(int operand, Register register)
    {
        LoadPlace(operand);
        if (register.IsXMM())
            Emit(Instruction.Create(Code.Movaps_xmm_xmmm128, register, VectorAt));
        else if (register.IsYMM())
            Emit(Instruction.Create(Code.VEX_Vmovaps_ymm_ymmm256, register, VectorAt));
        else if (register.IsMM())
            Emit(Instruction.Create(Code.Movq_mm_mmm64, register, MmxAt(0)));
        else if (register.IsGPR8())
            Emit(Instruction.Create(Code.Movzx_r32_rm8, register.GetFullRegister32(), GeneralAt));
        else
            Emit(Instruction.Create(Code.Mov_r64_rm64, register.GetFullRegister(), GeneralAt));
    }

    private void Store(int operand, Register register, bool vex)
    {
        LoadPlace(operand);
        if (register.IsYMM() || (register.IsXMM() && vex))
        {
            Emit(Instruction.Create(Code.VEX_Vmovaps_ymmm256_ymm, VectorAt, register.IsYMM() ? register : Register.YMM0 + (register - Register.XMM0)));
        }
        else if (register.IsXMM())
        {
            Emit(Instruction.Create(Code.Movaps_xmmm128_xmm, VectorAt, register));
        }
        else if (register.IsMM())
        {
            Emit(Instruction.Create(Code.Movq_mmm64_mm, MmxAt(0), register));
            // Writing an MMX register sets the sign and exponent of the x87 register it lies in (Intel SDM vol. 3, "Effect of Instructions on x87 FPU State").
            Emit(Instruction.Create(Code.Mov_rm16_imm16, MmxAt(8), 0xffff));
        }
        else if (register.IsGPR16())
        {
            Emit(Instruction.Create(Code.Mov_rm16_r16, GeneralAt, register));
        }
        else
        {
            // A 32-bit result has cleared the host register's upper half, as it does the guest's.
            Emit(Instruction.Create(Code.Mov_rm64_r64, GeneralAt, register.GetFullRegister()));
        }
    }

    private void LoadImplicit(Traits traits)
    {
        if ((traits & Traits.ReadsXmm0) != 0)
            Emit(Instruction.Create(Code.Movaps_xmm_xmmm128, Register.XMM0, At(ThunkLayout.Vector)));
        if ((traits & Traits.ReadsRaxRdx) != 0)
            Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RAX, GeneralAtNumber(0)));
        if ((traits & Traits.ReadsRaxRdx) != 0 || (traits & Traits.ReadsRdx) != 0)
            Emit(Instruction.Create(Code.Mov_r64_rm64, Register.RDX, GeneralAtNumber(2)));
    }

    private void StoreImplicit(Traits traits, bool vex)
    {
        if ((traits & Traits.WritesRcx) != 0)
            Emit(Instruction.Create(Code.Mov_rm64_r64, GeneralAtNumber(1), Register.RCX));
        if ((traits & Traits.WritesXmm0) == 0)
            return;
        if (vex)
            Emit(Instruction.Create(Code.VEX_Vmovaps_ymmm256_ymm, At(ThunkLayout.Vector), Register.YMM0));
        else
            Emit(Instruction.Create(Code.Movaps_xmmm128_xmm, At(ThunkLayout.Vector), Register.XMM0));
    }

    private void LoadFlags()
    {
        Emit(Instruction.Create(Code.Mov_r32_rm32, Register.EAX, At(ThunkLayout.Flags)));
        // 1 + 7Fh overflows, 0 + 7Fh does not; the other five come from AH.
        Emit(Instruction.Create(Code.Add_AL_imm8, Register.AL, 0x7f));
        Emit(Instruction.Create(Code.Sahf));
    }

    private void CaptureFlags()
    {
        Emit(Instruction.Create(Code.Lahf));
        Emit(Instruction.Create(Code.Seto_rm8, Register.AL));
        Emit(Instruction.Create(Code.Movzx_r32_rm16, Register.EAX, Register.AX));
    }

    private void Emit(in Instruction instruction) => _encoder.Encode(in instruction, 0);

    private sealed class Sink(List<byte> bytes) : CodeWriter
    {
        public override void WriteByte(byte value) => bytes.Add(value);
    }
}
