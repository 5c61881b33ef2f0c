using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers Jcc, SETcc and CMOVcc.</summary>
public static unsafe class ConditionLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context) => instruction.Mnemonic switch
    {
        Mnemonic.Jo => Jump<Overflow>(in instruction, ref op, in context),
        Mnemonic.Seto => Set<Overflow>(in instruction, ref op, in context),
        Mnemonic.Cmovo => Move<Overflow>(in instruction, ref op, in context),
        Mnemonic.Jno => Jump<NotOverflow>(in instruction, ref op, in context),
        Mnemonic.Setno => Set<NotOverflow>(in instruction, ref op, in context),
        Mnemonic.Cmovno => Move<NotOverflow>(in instruction, ref op, in context),
        Mnemonic.Jb => Jump<Below>(in instruction, ref op, in context),
        Mnemonic.Setb => Set<Below>(in instruction, ref op, in context),
        Mnemonic.Cmovb => Move<Below>(in instruction, ref op, in context),
        Mnemonic.Jae => Jump<AboveOrEqual>(in instruction, ref op, in context),
        Mnemonic.Setae => Set<AboveOrEqual>(in instruction, ref op, in context),
        Mnemonic.Cmovae => Move<AboveOrEqual>(in instruction, ref op, in context),
        Mnemonic.Je => Jump<Equal>(in instruction, ref op, in context),
        Mnemonic.Sete => Set<Equal>(in instruction, ref op, in context),
        Mnemonic.Cmove => Move<Equal>(in instruction, ref op, in context),
        Mnemonic.Jne => Jump<NotEqual>(in instruction, ref op, in context),
        Mnemonic.Setne => Set<NotEqual>(in instruction, ref op, in context),
        Mnemonic.Cmovne => Move<NotEqual>(in instruction, ref op, in context),
        Mnemonic.Jbe => Jump<BelowOrEqual>(in instruction, ref op, in context),
        Mnemonic.Setbe => Set<BelowOrEqual>(in instruction, ref op, in context),
        Mnemonic.Cmovbe => Move<BelowOrEqual>(in instruction, ref op, in context),
        Mnemonic.Ja => Jump<Above>(in instruction, ref op, in context),
        Mnemonic.Seta => Set<Above>(in instruction, ref op, in context),
        Mnemonic.Cmova => Move<Above>(in instruction, ref op, in context),
        Mnemonic.Js => Jump<Negative>(in instruction, ref op, in context),
        Mnemonic.Sets => Set<Negative>(in instruction, ref op, in context),
        Mnemonic.Cmovs => Move<Negative>(in instruction, ref op, in context),
        Mnemonic.Jns => Jump<NotNegative>(in instruction, ref op, in context),
        Mnemonic.Setns => Set<NotNegative>(in instruction, ref op, in context),
        Mnemonic.Cmovns => Move<NotNegative>(in instruction, ref op, in context),
        Mnemonic.Jp => Jump<ParityEven>(in instruction, ref op, in context),
        Mnemonic.Setp => Set<ParityEven>(in instruction, ref op, in context),
        Mnemonic.Cmovp => Move<ParityEven>(in instruction, ref op, in context),
        Mnemonic.Jnp => Jump<ParityOdd>(in instruction, ref op, in context),
        Mnemonic.Setnp => Set<ParityOdd>(in instruction, ref op, in context),
        Mnemonic.Cmovnp => Move<ParityOdd>(in instruction, ref op, in context),
        Mnemonic.Jl => Jump<Less>(in instruction, ref op, in context),
        Mnemonic.Setl => Set<Less>(in instruction, ref op, in context),
        Mnemonic.Cmovl => Move<Less>(in instruction, ref op, in context),
        Mnemonic.Jge => Jump<GreaterOrEqual>(in instruction, ref op, in context),
        Mnemonic.Setge => Set<GreaterOrEqual>(in instruction, ref op, in context),
        Mnemonic.Cmovge => Move<GreaterOrEqual>(in instruction, ref op, in context),
        Mnemonic.Jle => Jump<LessOrEqual>(in instruction, ref op, in context),
        Mnemonic.Setle => Set<LessOrEqual>(in instruction, ref op, in context),
        Mnemonic.Cmovle => Move<LessOrEqual>(in instruction, ref op, in context),
        Mnemonic.Jg => Jump<Greater>(in instruction, ref op, in context),
        Mnemonic.Setg => Set<Greater>(in instruction, ref op, in context),
        Mnemonic.Cmovg => Move<Greater>(in instruction, ref op, in context),
        _ => Lowered.No,
    };

    private static Lowered Jump<TCondition>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TCondition : struct, ICondition
    {
        ControlFlowLowering.SetTarget(in instruction, ref op, in context);
        op.Handler = &Branches.JumpIf<TCondition>;
        return Lowered.Next;
    }

    private static Lowered Set<TCondition>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TCondition : struct, ICondition
    {
        if (IntegerLowering.OneOperand(in instruction, ref op, in context))
            op.Handler = &Moves.SetMemory<TCondition>;
        else
            op.Handler = &Moves.SetRegister<TCondition>;
        return Lowered.Next;
    }

    private static Lowered Move<TCondition>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TCondition : struct, ICondition
    {
        int size = IntegerLowering.Size(in instruction);
        if (IntegerLowering.FromRegisterOrMemory(in instruction, ref op, in context))
            op.Handler = IntegerLowering.Pick(size, null, &Moves.ConditionalMemory<TCondition, W16>, &Moves.ConditionalMemory<TCondition, W32>, &Moves.ConditionalMemory<TCondition, W64>);
        else
            op.Handler = IntegerLowering.Pick(size, null, &Moves.ConditionalRegister<TCondition, W16>, &Moves.ConditionalRegister<TCondition, W32>, &Moves.ConditionalRegister<TCondition, W64>);
        return Lowered.Next;
    }
}
