using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers the general-purpose instructions.</summary>
public static unsafe class IntegerLowering
{
    /// <returns><see cref="Lowered.No"/> where the instruction belongs to another lowering.</returns>
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov:
                return Move(in instruction, ref op, in context);
            case Mnemonic.Add:
                return Binary<Add>(in instruction, ref op, in context);
            case Mnemonic.Or:
                return Binary<Or>(in instruction, ref op, in context);
            case Mnemonic.Adc:
                return Binary<AddWithCarry>(in instruction, ref op, in context);
            case Mnemonic.Sbb:
                return Binary<SubtractWithBorrow>(in instruction, ref op, in context);
            case Mnemonic.And:
                return Binary<And>(in instruction, ref op, in context);
            case Mnemonic.Sub:
                return Binary<Subtract>(in instruction, ref op, in context);
            case Mnemonic.Xor:
                return Binary<Xor>(in instruction, ref op, in context);
            case Mnemonic.Cmp:
                return Compare<Subtract>(in instruction, ref op, in context);
            case Mnemonic.Test:
                return Compare<And>(in instruction, ref op, in context);
            case Mnemonic.Inc:
                return Unary<Increment>(in instruction, ref op, in context);
            case Mnemonic.Dec:
                return Unary<Decrement>(in instruction, ref op, in context);
            case Mnemonic.Neg:
                return Unary<Negate>(in instruction, ref op, in context);
            case Mnemonic.Not:
                return Unary<Complement>(in instruction, ref op, in context);
            case Mnemonic.Lea:
                Operands.Memory(in instruction, ref op, in context);
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = Pick(Size(in instruction), null, &Moves.LoadAddress<W16>, &Moves.LoadAddress<W32>, &Moves.LoadAddress<W64>);
                return Lowered.Next;
            case Mnemonic.Nop or Mnemonic.Fnop or Mnemonic.Pause or Mnemonic.Endbr32 or Mnemonic.Endbr64 or Mnemonic.Reservednop
                or Mnemonic.Prefetchit0 or Mnemonic.Prefetchit1 or Mnemonic.Prefetchwt1 or Mnemonic.Cldemote or Mnemonic.Rdsspd or Mnemonic.Rdsspq:
                // Hints, and what is one while its feature is off.
                if (instruction.Mnemonic == Mnemonic.Fnop)
                    return Lowered.No;
                op.Handler = &Moves.Nop;
                return Lowered.Next;
            case Mnemonic.Xchg:
                return Exchange(in instruction, ref op, in context);
            case Mnemonic.Xadd:
                SetLock(in instruction, ref op);
                if (ModifiedBy(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), &Moves.ExchangeAddMemory<W8>, &Moves.ExchangeAddMemory<W16>, &Moves.ExchangeAddMemory<W32>, &Moves.ExchangeAddMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), &Moves.ExchangeAddRegisters<W8>, &Moves.ExchangeAddRegisters<W16>, &Moves.ExchangeAddRegisters<W32>, &Moves.ExchangeAddRegisters<W64>);
                return Lowered.Next;
            case Mnemonic.Cmpxchg:
                SetLock(in instruction, ref op);
                if (ModifiedBy(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), &Moves.CompareExchangeMemory<W8>, &Moves.CompareExchangeMemory<W16>, &Moves.CompareExchangeMemory<W32>, &Moves.CompareExchangeMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), &Moves.CompareExchangeRegisters<W8>, &Moves.CompareExchangeRegisters<W16>, &Moves.CompareExchangeRegisters<W32>, &Moves.CompareExchangeRegisters<W64>);
                return Lowered.Next;
            case Mnemonic.Bswap:
                op.R0 = Operands.Register(instruction.Op0Register);
                op.Handler = Pick(Size(in instruction), null, &Moves.ByteSwap16, &Moves.ByteSwap32, &Moves.ByteSwap64);
                return Lowered.Next;
            case Mnemonic.Movzx:
                return Extend(in instruction, ref op, in context, signed: false);
            case Mnemonic.Movsx or Mnemonic.Movsxd:
                return Extend(in instruction, ref op, in context, signed: true);
            case Mnemonic.Imul:
                return SignedMultiply(in instruction, ref op, in context);
            case Mnemonic.Mul:
                if (OneOperand(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), &Multiply.UnsignedMemory<W8>, &Multiply.UnsignedMemory<W16>, &Multiply.UnsignedMemory<W32>, &Multiply.UnsignedMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), &Multiply.UnsignedRegister<W8>, &Multiply.UnsignedRegister<W16>, &Multiply.UnsignedRegister<W32>, &Multiply.UnsignedRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Div:
                if (OneOperand(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), &Multiply.DivideMemory<W8>, &Multiply.DivideMemory<W16>, &Multiply.DivideMemory<W32>, &Multiply.DivideMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), &Multiply.DivideRegister<W8>, &Multiply.DivideRegister<W16>, &Multiply.DivideRegister<W32>, &Multiply.DivideRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Idiv:
                if (OneOperand(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), &Multiply.DivideSignedMemory<W8>, &Multiply.DivideSignedMemory<W16>, &Multiply.DivideSignedMemory<W32>, &Multiply.DivideSignedMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), &Multiply.DivideSignedRegister<W8>, &Multiply.DivideSignedRegister<W16>, &Multiply.DivideSignedRegister<W32>, &Multiply.DivideSignedRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Rol:
                return Shift<RotateLeft>(in instruction, ref op, in context);
            case Mnemonic.Ror:
                return Shift<RotateRight>(in instruction, ref op, in context);
            case Mnemonic.Rcl:
                return Shift<RotateCarryLeft>(in instruction, ref op, in context);
            case Mnemonic.Rcr:
                return Shift<RotateCarryRight>(in instruction, ref op, in context);
            case Mnemonic.Shl or Mnemonic.Sal:
                return Shift<ShiftLeft>(in instruction, ref op, in context);
            case Mnemonic.Shr:
                return Shift<ShiftRight>(in instruction, ref op, in context);
            case Mnemonic.Sar:
                return Shift<ShiftArithmetic>(in instruction, ref op, in context);
            case Mnemonic.Shld:
                if (DoubleShift(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), null, &Shifts.DoubleLeftMemory<W16>, &Shifts.DoubleLeftMemory<W32>, &Shifts.DoubleLeftMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), null, &Shifts.DoubleLeftRegister<W16>, &Shifts.DoubleLeftRegister<W32>, &Shifts.DoubleLeftRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Shrd:
                if (DoubleShift(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), null, &Shifts.DoubleRightMemory<W16>, &Shifts.DoubleRightMemory<W32>, &Shifts.DoubleRightMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), null, &Shifts.DoubleRightRegister<W16>, &Shifts.DoubleRightRegister<W32>, &Shifts.DoubleRightRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Bt:
                return Bit<BitTest>(in instruction, ref op, in context);
            case Mnemonic.Bts:
                return Bit<BitSet>(in instruction, ref op, in context);
            case Mnemonic.Btr:
                return Bit<BitReset>(in instruction, ref op, in context);
            case Mnemonic.Btc:
                return Bit<BitComplement>(in instruction, ref op, in context);
            case Mnemonic.Bsf:
                if (FromRegisterOrMemory(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), null, &Bits.ScanForwardMemory<W16>, &Bits.ScanForwardMemory<W32>, &Bits.ScanForwardMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), null, &Bits.ScanForwardRegister<W16>, &Bits.ScanForwardRegister<W32>, &Bits.ScanForwardRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Bsr:
                if (FromRegisterOrMemory(in instruction, ref op, in context))
                    op.Handler = Pick(Size(in instruction), null, &Bits.ScanReverseMemory<W16>, &Bits.ScanReverseMemory<W32>, &Bits.ScanReverseMemory<W64>);
                else
                    op.Handler = Pick(Size(in instruction), null, &Bits.ScanReverseRegister<W16>, &Bits.ScanReverseRegister<W32>, &Bits.ScanReverseRegister<W64>);
                return Lowered.Next;
            case Mnemonic.Cbw:
                op.Handler = &Moves.ExtendAccumulator<W8, W16>;
                return Lowered.Next;
            case Mnemonic.Cwde:
                op.Handler = &Moves.ExtendAccumulator<W16, W32>;
                return Lowered.Next;
            case Mnemonic.Cdqe:
                op.Handler = &Moves.ExtendAccumulator<W32, W64>;
                return Lowered.Next;
            case Mnemonic.Cwd:
                op.Handler = &Moves.SpreadSign<W16>;
                return Lowered.Next;
            case Mnemonic.Cdq:
                op.Handler = &Moves.SpreadSign<W32>;
                return Lowered.Next;
            case Mnemonic.Cqo:
                op.Handler = &Moves.SpreadSign<W64>;
                return Lowered.Next;
            case Mnemonic.Xlatb:
                return Translate(in instruction, ref op, in context);
            case Mnemonic.Lahf:
                op.Handler = &Moves.LoadFlagsToAh;
                return Lowered.Next;
            case Mnemonic.Sahf:
                op.Handler = &Moves.StoreAhToFlags;
                return Lowered.Next;
            case Mnemonic.Stc:
                op.Handler = &Moves.SetCarry;
                return Lowered.Next;
            case Mnemonic.Clc:
                op.Handler = &Moves.ClearCarry;
                return Lowered.Next;
            case Mnemonic.Cmc:
                op.Handler = &Moves.ComplementCarry;
                return Lowered.Next;
            case Mnemonic.Std:
                op.Handler = &Moves.SetDirection;
                return Lowered.Next;
            case Mnemonic.Cld:
                op.Handler = &Moves.ClearDirection;
                return Lowered.Next;
            case Mnemonic.Salc:
                op.Handler = &Moves.SetAlFromCarry;
                return Lowered.Next;
            case Mnemonic.Aaa:
                op.Handler = &Decimal.AdjustAfterAddition;
                return Lowered.Next;
            case Mnemonic.Aas:
                op.Handler = &Decimal.AdjustAfterSubtraction;
                return Lowered.Next;
            case Mnemonic.Aam:
                op.Imm = instruction.Immediate8;
                op.Handler = &Decimal.AdjustAfterMultiplication;
                return Lowered.Next;
            case Mnemonic.Aad:
                op.Imm = instruction.Immediate8;
                op.Handler = &Decimal.AdjustBeforeDivision;
                return Lowered.Next;
            case Mnemonic.Daa:
                op.Handler = &Decimal.DecimalAfterAddition;
                return Lowered.Next;
            case Mnemonic.Das:
                op.Handler = &Decimal.DecimalAfterSubtraction;
                return Lowered.Next;
            default:
                break;
        }
        Lowered lowered = ControlFlowLowering.Lower(in instruction, ref op, in context);
        if (lowered == Lowered.No)
            lowered = StringLowering.Lower(in instruction, ref op, in context);
        return lowered == Lowered.No ? ConditionLowering.Lower(in instruction, ref op, in context) : lowered;
    }

    /// <summary>The handler for an operand size in bytes.</summary>
    internal static delegate*<VcpuBlock*, Op*, Op*> Pick(
        int size,
        delegate*<VcpuBlock*, Op*, Op*> h8,
        delegate*<VcpuBlock*, Op*, Op*> h16,
        delegate*<VcpuBlock*, Op*, Op*> h32,
        delegate*<VcpuBlock*, Op*, Op*> h64) => size switch
        {
            1 => h8,
            2 => h16,
            4 => h32,
            _ => h64,
        };

    /// <summary>Size of the first operand in bytes.</summary>
    internal static int Size(in Instruction instruction) =>
        instruction.Op0Kind == OpKind.Register ? instruction.Op0Register.GetSize() : instruction.MemorySize.GetSize();

    internal static void SetLock(in Instruction instruction, ref Op op)
    {
        if (instruction.HasLockPrefix)
            op.Flags |= OpFlags.Lock;
    }

    /// <summary>The source operand of "reg, r/m": memory (true) or R1.</summary>
    internal static bool FromRegisterOrMemory(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        if (instruction.Op1Kind == OpKind.Register)
        {
            op.R1 = Operands.Register(instruction.Op1Register);
            return false;
        }
        Operands.Memory(in instruction, ref op, in context);
        return true;
    }

    /// <summary>The only operand: memory (true) or R0.</summary>
    internal static bool OneOperand(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (instruction.Op0Kind == OpKind.Register)
        {
            op.R0 = Operands.Register(instruction.Op0Register);
            return false;
        }
        Operands.Memory(in instruction, ref op, in context);
        return true;
    }

    /// <summary>"r/m, reg": memory with R0 the register (true), or R0 and R1.</summary>
    private static bool ModifiedBy(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (instruction.Op0Kind == OpKind.Register)
        {
            op.R0 = Operands.Register(instruction.Op0Register);
            op.R1 = Operands.Register(instruction.Op1Register);
            return false;
        }
        op.R0 = Operands.Register(instruction.Op1Register);
        Operands.Memory(in instruction, ref op, in context);
        return true;
    }

    private static bool IsImmediate(OpKind kind) => kind is >= OpKind.Immediate8 and <= OpKind.Immediate32to64;

    private static Lowered Move(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        OpKind first = instruction.Op0Kind;
        OpKind second = instruction.Op1Kind;
        // Segment, control, debug and test registers are the system lowering's.
        if ((first == OpKind.Register && !instruction.Op0Register.IsGPR()) || (second == OpKind.Register && !instruction.Op1Register.IsGPR()))
            return Lowered.No;
        int size = Size(in instruction);
        if (IsImmediate(second))
        {
            op.Imm = (long)instruction.GetImmediate(1);
            if (OneOperand(in instruction, ref op, in context))
                op.Handler = Pick(size, &Moves.MemoryImmediate<W8>, &Moves.MemoryImmediate<W16>, &Moves.MemoryImmediate<W32>, &Moves.MemoryImmediate<W64>);
            else
                op.Handler = Pick(size, &Moves.RegisterImmediate<W8>, &Moves.RegisterImmediate<W16>, &Moves.RegisterImmediate<W32>, &Moves.RegisterImmediate<W64>);
            return Lowered.Next;
        }
        if (first == OpKind.Register)
        {
            if (FromRegisterOrMemory(in instruction, ref op, in context))
                op.Handler = Pick(size, &Moves.RegisterMemory<W8>, &Moves.RegisterMemory<W16>, &Moves.RegisterMemory<W32>, &Moves.RegisterMemory<W64>);
            else
                op.Handler = Pick(size, &Moves.RegisterRegister<W8>, &Moves.RegisterRegister<W16>, &Moves.RegisterRegister<W32>, &Moves.RegisterRegister<W64>);
            return Lowered.Next;
        }
        op.R0 = Operands.Register(instruction.Op1Register);
        Operands.Memory(in instruction, ref op, in context);
        op.Handler = Pick(size, &Moves.MemoryRegister<W8>, &Moves.MemoryRegister<W16>, &Moves.MemoryRegister<W32>, &Moves.MemoryRegister<W64>);
        return Lowered.Next;
    }

    private static Lowered Binary<TOperation>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TOperation : struct, IBinaryOperation
    {
        int size = Size(in instruction);
        bool locked = instruction.HasLockPrefix;
        if (IsImmediate(instruction.Op1Kind))
        {
            op.Imm = (long)instruction.GetImmediate(1);
            if (!OneOperand(in instruction, ref op, in context))
                op.Handler = Pick(size, &Arithmetic.RegisterImmediate<TOperation, W8>, &Arithmetic.RegisterImmediate<TOperation, W16>, &Arithmetic.RegisterImmediate<TOperation, W32>, &Arithmetic.RegisterImmediate<TOperation, W64>);
            else if (locked)
                op.Handler = Pick(size, &Arithmetic.LockedImmediate<TOperation, W8>, &Arithmetic.LockedImmediate<TOperation, W16>, &Arithmetic.LockedImmediate<TOperation, W32>, &Arithmetic.LockedImmediate<TOperation, W64>);
            else
                op.Handler = Pick(size, &Arithmetic.MemoryImmediate<TOperation, W8>, &Arithmetic.MemoryImmediate<TOperation, W16>, &Arithmetic.MemoryImmediate<TOperation, W32>, &Arithmetic.MemoryImmediate<TOperation, W64>);
            return Lowered.Next;
        }
        if (instruction.Op0Kind == OpKind.Register)
        {
            if (FromRegisterOrMemory(in instruction, ref op, in context))
                op.Handler = Pick(size, &Arithmetic.RegisterMemory<TOperation, W8>, &Arithmetic.RegisterMemory<TOperation, W16>, &Arithmetic.RegisterMemory<TOperation, W32>, &Arithmetic.RegisterMemory<TOperation, W64>);
            else
                op.Handler = Pick(size, &Arithmetic.RegisterRegister<TOperation, W8>, &Arithmetic.RegisterRegister<TOperation, W16>, &Arithmetic.RegisterRegister<TOperation, W32>, &Arithmetic.RegisterRegister<TOperation, W64>);
            return Lowered.Next;
        }
        op.R0 = Operands.Register(instruction.Op1Register);
        Operands.Memory(in instruction, ref op, in context);
        if (locked)
            op.Handler = Pick(size, &Arithmetic.LockedRegister<TOperation, W8>, &Arithmetic.LockedRegister<TOperation, W16>, &Arithmetic.LockedRegister<TOperation, W32>, &Arithmetic.LockedRegister<TOperation, W64>);
        else
            op.Handler = Pick(size, &Arithmetic.MemoryRegister<TOperation, W8>, &Arithmetic.MemoryRegister<TOperation, W16>, &Arithmetic.MemoryRegister<TOperation, W32>, &Arithmetic.MemoryRegister<TOperation, W64>);
        return Lowered.Next;
    }

    private static Lowered Compare<TOperation>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TOperation : struct, IBinaryOperation
    {
        int size = Size(in instruction);
        if (IsImmediate(instruction.Op1Kind))
        {
            op.Imm = (long)instruction.GetImmediate(1);
            if (OneOperand(in instruction, ref op, in context))
                op.Handler = Pick(size, &Arithmetic.CompareMemoryImmediate<TOperation, W8>, &Arithmetic.CompareMemoryImmediate<TOperation, W16>, &Arithmetic.CompareMemoryImmediate<TOperation, W32>, &Arithmetic.CompareMemoryImmediate<TOperation, W64>);
            else
                op.Handler = Pick(size, &Arithmetic.CompareRegisterImmediate<TOperation, W8>, &Arithmetic.CompareRegisterImmediate<TOperation, W16>, &Arithmetic.CompareRegisterImmediate<TOperation, W32>, &Arithmetic.CompareRegisterImmediate<TOperation, W64>);
            return Lowered.Next;
        }
        if (instruction.Op0Kind == OpKind.Register)
        {
            if (FromRegisterOrMemory(in instruction, ref op, in context))
                op.Handler = Pick(size, &Arithmetic.CompareRegisterMemory<TOperation, W8>, &Arithmetic.CompareRegisterMemory<TOperation, W16>, &Arithmetic.CompareRegisterMemory<TOperation, W32>, &Arithmetic.CompareRegisterMemory<TOperation, W64>);
            else
                op.Handler = Pick(size, &Arithmetic.CompareRegisterRegister<TOperation, W8>, &Arithmetic.CompareRegisterRegister<TOperation, W16>, &Arithmetic.CompareRegisterRegister<TOperation, W32>, &Arithmetic.CompareRegisterRegister<TOperation, W64>);
            return Lowered.Next;
        }
        op.R0 = Operands.Register(instruction.Op1Register);
        Operands.Memory(in instruction, ref op, in context);
        op.Handler = Pick(size, &Arithmetic.CompareMemoryRegister<TOperation, W8>, &Arithmetic.CompareMemoryRegister<TOperation, W16>, &Arithmetic.CompareMemoryRegister<TOperation, W32>, &Arithmetic.CompareMemoryRegister<TOperation, W64>);
        return Lowered.Next;
    }

    private static Lowered Unary<TOperation>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TOperation : struct, IUnaryOperation
    {
        int size = Size(in instruction);
        if (!OneOperand(in instruction, ref op, in context))
            op.Handler = Pick(size, &Arithmetic.UnaryRegister<TOperation, W8>, &Arithmetic.UnaryRegister<TOperation, W16>, &Arithmetic.UnaryRegister<TOperation, W32>, &Arithmetic.UnaryRegister<TOperation, W64>);
        else if (instruction.HasLockPrefix)
            op.Handler = Pick(size, &Arithmetic.UnaryLocked<TOperation, W8>, &Arithmetic.UnaryLocked<TOperation, W16>, &Arithmetic.UnaryLocked<TOperation, W32>, &Arithmetic.UnaryLocked<TOperation, W64>);
        else
            op.Handler = Pick(size, &Arithmetic.UnaryMemory<TOperation, W8>, &Arithmetic.UnaryMemory<TOperation, W16>, &Arithmetic.UnaryMemory<TOperation, W32>, &Arithmetic.UnaryMemory<TOperation, W64>);
        return Lowered.Next;
    }

    private static Lowered Exchange(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int size = Size(in instruction);
        if (instruction.Op0Kind == OpKind.Register && instruction.Op1Kind == OpKind.Register)
        {
            op.R0 = Operands.Register(instruction.Op0Register);
            op.R1 = Operands.Register(instruction.Op1Register);
            op.Handler = Pick(size, &Moves.ExchangeRegisters<W8>, &Moves.ExchangeRegisters<W16>, &Moves.ExchangeRegisters<W32>, &Moves.ExchangeRegisters<W64>);
            return Lowered.Next;
        }
        op.R0 = Operands.Register(instruction.Op0Kind == OpKind.Register ? instruction.Op0Register : instruction.Op1Register);
        Operands.Memory(in instruction, ref op, in context);
        op.Handler = Pick(size, &Moves.ExchangeMemory<W8>, &Moves.ExchangeMemory<W16>, &Moves.ExchangeMemory<W32>, &Moves.ExchangeMemory<W64>);
        return Lowered.Next;
    }

    private static Lowered Extend(in Instruction instruction, ref Op op, in LoweringContext context, bool signed)
    {
        int to = Size(in instruction);
        bool memory = FromRegisterOrMemory(in instruction, ref op, in context);
        int from = memory ? instruction.MemorySize.GetSize() : instruction.Op1Register.GetSize();
        op.Handler = (from, memory, signed) switch
        {
            (1, false, false) => Pick(to, null, &Moves.ZeroExtendRegister<W8, W16>, &Moves.ZeroExtendRegister<W8, W32>, &Moves.ZeroExtendRegister<W8, W64>),
            (1, true, false) => Pick(to, null, &Moves.ZeroExtendMemory<W8, W16>, &Moves.ZeroExtendMemory<W8, W32>, &Moves.ZeroExtendMemory<W8, W64>),
            (2, false, false) => Pick(to, null, &Moves.ZeroExtendRegister<W16, W16>, &Moves.ZeroExtendRegister<W16, W32>, &Moves.ZeroExtendRegister<W16, W64>),
            (2, true, false) => Pick(to, null, &Moves.ZeroExtendMemory<W16, W16>, &Moves.ZeroExtendMemory<W16, W32>, &Moves.ZeroExtendMemory<W16, W64>),
            (1, false, true) => Pick(to, null, &Moves.SignExtendRegister<W8, W16>, &Moves.SignExtendRegister<W8, W32>, &Moves.SignExtendRegister<W8, W64>),
            (1, true, true) => Pick(to, null, &Moves.SignExtendMemory<W8, W16>, &Moves.SignExtendMemory<W8, W32>, &Moves.SignExtendMemory<W8, W64>),
            (2, false, true) => Pick(to, null, &Moves.SignExtendRegister<W16, W16>, &Moves.SignExtendRegister<W16, W32>, &Moves.SignExtendRegister<W16, W64>),
            (2, true, true) => Pick(to, null, &Moves.SignExtendMemory<W16, W16>, &Moves.SignExtendMemory<W16, W32>, &Moves.SignExtendMemory<W16, W64>),
            // MOVSXD; with 16- and 32-bit destinations it is a plain move of the low part.
            (_, false, _) => Pick(to, null, &Moves.SignExtendRegister<W16, W16>, &Moves.SignExtendRegister<W32, W32>, &Moves.SignExtendRegister<W32, W64>),
            (_, true, _) => Pick(to, null, &Moves.SignExtendMemory<W16, W16>, &Moves.SignExtendMemory<W32, W32>, &Moves.SignExtendMemory<W32, W64>),
        };
        return Lowered.Next;
    }

    private static Lowered SignedMultiply(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int size = Size(in instruction);
        if (instruction.OpCount == 1)
        {
            if (OneOperand(in instruction, ref op, in context))
                op.Handler = Pick(size, &Multiply.SignedMemory<W8>, &Multiply.SignedMemory<W16>, &Multiply.SignedMemory<W32>, &Multiply.SignedMemory<W64>);
            else
                op.Handler = Pick(size, &Multiply.SignedRegister<W8>, &Multiply.SignedRegister<W16>, &Multiply.SignedRegister<W32>, &Multiply.SignedRegister<W64>);
            return Lowered.Next;
        }
        bool memory = FromRegisterOrMemory(in instruction, ref op, in context);
        if (instruction.OpCount == 2)
        {
            if (memory)
                op.Handler = Pick(size, null, &Multiply.TruncatedMemory<W16>, &Multiply.TruncatedMemory<W32>, &Multiply.TruncatedMemory<W64>);
            else
                op.Handler = Pick(size, null, &Multiply.TruncatedRegister<W16>, &Multiply.TruncatedRegister<W32>, &Multiply.TruncatedRegister<W64>);
            return Lowered.Next;
        }
        op.Imm = (long)instruction.GetImmediate(2);
        if (memory)
            op.Handler = Pick(size, null, &Multiply.TruncatedMemoryImmediate<W16>, &Multiply.TruncatedMemoryImmediate<W32>, &Multiply.TruncatedMemoryImmediate<W64>);
        else
            op.Handler = Pick(size, null, &Multiply.TruncatedRegisterImmediate<W16>, &Multiply.TruncatedRegisterImmediate<W32>, &Multiply.TruncatedRegisterImmediate<W64>);
        return Lowered.Next;
    }

    private static Lowered Shift<TShift>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TShift : struct, IShift
    {
        int size = Size(in instruction);
        bool memory = OneOperand(in instruction, ref op, in context);
        if (IsImmediate(instruction.Op1Kind))
        {
            op.Imm = (long)(instruction.GetImmediate(1) & 0xff);
            if (memory)
                op.Handler = Pick(size, &Shifts.MemoryImmediate<TShift, W8>, &Shifts.MemoryImmediate<TShift, W16>, &Shifts.MemoryImmediate<TShift, W32>, &Shifts.MemoryImmediate<TShift, W64>);
            else
                op.Handler = Pick(size, &Shifts.RegisterImmediate<TShift, W8>, &Shifts.RegisterImmediate<TShift, W16>, &Shifts.RegisterImmediate<TShift, W32>, &Shifts.RegisterImmediate<TShift, W64>);
            return Lowered.Next;
        }
        if (memory)
            op.Handler = Pick(size, &Shifts.MemoryCl<TShift, W8>, &Shifts.MemoryCl<TShift, W16>, &Shifts.MemoryCl<TShift, W32>, &Shifts.MemoryCl<TShift, W64>);
        else
            op.Handler = Pick(size, &Shifts.RegisterCl<TShift, W8>, &Shifts.RegisterCl<TShift, W16>, &Shifts.RegisterCl<TShift, W32>, &Shifts.RegisterCl<TShift, W64>);
        return Lowered.Next;
    }

    /// <returns>True for a memory destination.</returns>
    private static bool DoubleShift(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        op.R1 = Operands.Register(instruction.Op1Register);
        if (IsImmediate(instruction.Op2Kind))
            op.Imm = (long)(instruction.GetImmediate(2) & 0xff);
        else
            op.Aux = 1;
        return OneOperand(in instruction, ref op, in context);
    }

    private static Lowered Bit<TChange>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TChange : struct, IBitChange
    {
        SetLock(in instruction, ref op);
        int size = Size(in instruction);
        bool memory = OneOperand(in instruction, ref op, in context);
        if (IsImmediate(instruction.Op1Kind))
        {
            op.Imm = (long)(instruction.GetImmediate(1) & 0xff);
            if (memory)
                op.Handler = Pick(size, null, &Bits.MemoryImmediate<TChange, W16>, &Bits.MemoryImmediate<TChange, W32>, &Bits.MemoryImmediate<TChange, W64>);
            else
                op.Handler = Pick(size, null, &Bits.RegisterImmediate<TChange, W16>, &Bits.RegisterImmediate<TChange, W32>, &Bits.RegisterImmediate<TChange, W64>);
            return Lowered.Next;
        }
        op.R1 = Operands.Register(instruction.Op1Register);
        if (memory)
            op.Handler = Pick(size, null, &Bits.MemoryRegister<TChange, W16>, &Bits.MemoryRegister<TChange, W32>, &Bits.MemoryRegister<TChange, W64>);
        else
            op.Handler = Pick(size, null, &Bits.RegisterRegister<TChange, W16>, &Bits.RegisterRegister<TChange, W32>, &Bits.RegisterRegister<TChange, W64>);
        return Lowered.Next;
    }

    private static Lowered Translate(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        // Base BX, EBX or RBX; AL is added by the handler.
        op.Base = 3 * 8;
        int addressBytes = instruction.Op0Kind == OpKind.Memory && instruction.MemoryBase.IsGPR64() ? 8 : instruction.MemoryBase.IsGPR16() ? 2 : 4;
        op.Address = Operands.Kind(addressBytes, context.Is64);
        Operands.SetSegment(Operands.SegmentOf(in instruction, context.Is64), ref op, context.Is64);
        op.Handler = &Moves.Translate;
        return Lowered.Next;
    }
}
