using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers near branches and stack instructions.</summary>
public static unsafe class ControlFlowLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Jmp:
                return Jump(in instruction, ref op, in context);
            case Mnemonic.Call:
                return Call(in instruction, ref op, in context);
            case Mnemonic.Ret:
                op.Imm = instruction.OpCount == 1 ? instruction.Immediate16 : 0;
                op.Handler = IntegerLowering.Pick(ReturnBytes(instruction.Code), null, &Branches.Return<W16>, &Branches.Return<W32>, &Branches.Return<W64>);
                return Lowered.End;
            case Mnemonic.Push:
                return Push(in instruction, ref op, in context);
            case Mnemonic.Pop:
                return Pop(in instruction, ref op, in context);
            case Mnemonic.Pusha:
                op.Handler = &Stack.PushAll<W16>;
                return Lowered.Next;
            case Mnemonic.Pushad:
                op.Handler = &Stack.PushAll<W32>;
                return Lowered.Next;
            case Mnemonic.Popa:
                op.Handler = &Stack.PopAll<W16>;
                return Lowered.Next;
            case Mnemonic.Popad:
                op.Handler = &Stack.PopAll<W32>;
                return Lowered.Next;
            case Mnemonic.Leave:
                op.Handler = instruction.Code switch
                {
                    Code.Leavew => &Stack.Leave<W16>,
                    Code.Leaved => &Stack.Leave<W32>,
                    _ => &Stack.Leave<W64>,
                };
                return Lowered.Next;
            case Mnemonic.Enter:
                op.Imm = instruction.Immediate16;
                op.Aux = instruction.Immediate8_2nd;
                op.Handler = instruction.Code switch
                {
                    Code.Enterw_imm16_imm8 => &Stack.Enter<W16>,
                    Code.Enterd_imm16_imm8 => &Stack.Enter<W32>,
                    _ => &Stack.Enter<W64>,
                };
                return Lowered.Next;
            case Mnemonic.Loop:
                op.Aux = 0;
                return Loop(in instruction, ref op, in context);
            case Mnemonic.Loope:
                op.Aux = 1;
                return Loop(in instruction, ref op, in context);
            case Mnemonic.Loopne:
                op.Aux = 2;
                return Loop(in instruction, ref op, in context);
            case Mnemonic.Jcxz:
                SetTarget(in instruction, ref op, in context);
                op.Handler = &Branches.JumpIfCounterZero<W16>;
                return Lowered.Next;
            case Mnemonic.Jecxz:
                SetTarget(in instruction, ref op, in context);
                op.Handler = &Branches.JumpIfCounterZero<W32>;
                return Lowered.Next;
            case Mnemonic.Jrcxz:
                SetTarget(in instruction, ref op, in context);
                op.Handler = &Branches.JumpIfCounterZero<W64>;
                return Lowered.Next;
            default:
                return Lowered.No;
        }
    }

    /// <summary>Sets a direct branch's target relative to the block and the width that it is cut to.</summary>
    internal static void SetTarget(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int size = instruction.Op0Kind switch
        {
            OpKind.NearBranch16 => 2,
            OpKind.NearBranch32 => 4,
            _ => 8,
        };
        op.Flags |= (ushort)(size << OpFlags.SizeShift);
        op.Imm = (long)(instruction.NearBranchTarget - context.BlockRip);
    }

    private static int ReturnBytes(Code code) => code switch
    {
        Code.Retnw or Code.Retnw_imm16 => 2,
        Code.Retnd or Code.Retnd_imm16 => 4,
        _ => 8,
    };

    private static Lowered Jump(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Op0Kind)
        {
            case OpKind.NearBranch16 or OpKind.NearBranch32 or OpKind.NearBranch64:
                SetTarget(in instruction, ref op, in context);
                op.Handler = &Branches.JumpRelative;
                return Lowered.End;
            case OpKind.Register:
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = IntegerLowering.Pick(instruction.Op0Register.GetSize(), null, &Branches.JumpRegister<W16>, &Branches.JumpRegister<W32>, &Branches.JumpRegister<W64>);
                return Lowered.End;
            case OpKind.Memory when instruction.Code is Code.Jmp_rm16 or Code.Jmp_rm32 or Code.Jmp_rm64:
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = IntegerLowering.Pick(instruction.MemorySize.GetSize(), null, &Branches.JumpMemory<W16>, &Branches.JumpMemory<W32>, &Branches.JumpMemory<W64>);
                return Lowered.End;
            default:
                return Lowered.No;
        }
    }

    private static Lowered Call(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Op0Kind)
        {
            case OpKind.NearBranch16 or OpKind.NearBranch32 or OpKind.NearBranch64:
                SetTarget(in instruction, ref op, in context);
                int size = op.Flags >> OpFlags.SizeShift & 15;
                op.Handler = IntegerLowering.Pick(size, null, &Branches.CallRelative<W16>, &Branches.CallRelative<W32>, &Branches.CallRelative<W64>);
                return Lowered.End;
            case OpKind.Register:
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = IntegerLowering.Pick(instruction.Op0Register.GetSize(), null, &Branches.CallRegister<W16>, &Branches.CallRegister<W32>, &Branches.CallRegister<W64>);
                return Lowered.End;
            case OpKind.Memory when instruction.Code is Code.Call_rm16 or Code.Call_rm32 or Code.Call_rm64:
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = IntegerLowering.Pick(instruction.MemorySize.GetSize(), null, &Branches.CallMemory<W16>, &Branches.CallMemory<W32>, &Branches.CallMemory<W64>);
                return Lowered.End;
            default:
                return Lowered.No;
        }
    }

    private static Lowered Loop(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        SetTarget(in instruction, ref op, in context);
        op.Handler = instruction.Code switch
        {
            Code.Loop_rel8_16_RCX or Code.Loop_rel8_64_RCX or Code.Loope_rel8_16_RCX or Code.Loope_rel8_64_RCX
                or Code.Loopne_rel8_16_RCX or Code.Loopne_rel8_64_RCX => &Branches.Loop<W64>,
            Code.Loop_rel8_16_CX or Code.Loop_rel8_32_CX or Code.Loope_rel8_16_CX or Code.Loope_rel8_32_CX
                or Code.Loopne_rel8_16_CX or Code.Loopne_rel8_32_CX => &Branches.Loop<W16>,
            _ => &Branches.Loop<W32>,
        };
        return Lowered.Next;
    }

    private static Lowered Push(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        // StackPointerIncrement tells the operand size: 16-bit pushes in any mode, 64-bit ones by default in 64-bit mode.
        int size = -instruction.StackPointerIncrement;
        switch (instruction.Op0Kind)
        {
            case OpKind.Register when instruction.Op0Register.IsSegmentRegister():
                return Lowered.No;
            case OpKind.Register:
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = IntegerLowering.Pick(size, null, &Stack.PushRegister<W16>, &Stack.PushRegister<W32>, &Stack.PushRegister<W64>);
                return Lowered.Next;
            case OpKind.Memory:
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = IntegerLowering.Pick(size, null, &Stack.PushMemory<W16>, &Stack.PushMemory<W32>, &Stack.PushMemory<W64>);
                return Lowered.Next;
            default:
                op.Imm = (long)instruction.GetImmediate(0);
                op.Handler = IntegerLowering.Pick(size, null, &Stack.PushImmediate<W16>, &Stack.PushImmediate<W32>, &Stack.PushImmediate<W64>);
                return Lowered.Next;
        }
    }

    private static Lowered Pop(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int size = instruction.StackPointerIncrement;
        switch (instruction.Op0Kind)
        {
            case OpKind.Register when instruction.Op0Register.IsSegmentRegister():
                return Lowered.No;
            case OpKind.Register:
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = IntegerLowering.Pick(size, null, &Stack.PopRegister<W16>, &Stack.PopRegister<W32>, &Stack.PopRegister<W64>);
                return Lowered.Next;
            default:
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = IntegerLowering.Pick(size, null, &Stack.PopMemory<W16>, &Stack.PopMemory<W32>, &Stack.PopMemory<W64>);
                return Lowered.Next;
        }
    }
}
