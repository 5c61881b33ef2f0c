using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Instructions on general registers and memory that have handlers of their own: wide compare-and-exchange, carry chains, cache control.</summary>
internal static unsafe class GeneralLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Cmpxchg8b:
                op.Handler = &WideCompareExchange.Eight;
                break;
            case Mnemonic.Cmpxchg16b:
                op.Handler = &WideCompareExchange.Sixteen;
                break;
            case Mnemonic.Adcx or Mnemonic.Adox:
                return LowerCarryChain(in instruction, ref op, in context);
            case Mnemonic.Movnti:
                bool wide = instruction.Op1Register.IsGPR64();
                op.R0 = Operands.Register(instruction.Op1Register);
                op.Handler = wide ? &GeneralHandlers.Store<W64> : &GeneralHandlers.Store<W32>;
                break;
            case Mnemonic.Clflush or Mnemonic.Clflushopt or Mnemonic.Clwb:
                op.Handler = &GeneralHandlers.CacheLine;
                break;
            case Mnemonic.Lfence or Mnemonic.Mfence or Mnemonic.Sfence:
                op.Handler = &GeneralHandlers.Fence;
                return Lowered.Next;
            case Mnemonic.Prefetch or Mnemonic.Prefetchw or Mnemonic.Prefetchnta or Mnemonic.Prefetcht0 or Mnemonic.Prefetcht1 or Mnemonic.Prefetcht2
                or Mnemonic.Cldemote:
                op.Handler = &GeneralHandlers.Nothing;
                return Lowered.Next;
            default:
                return Lowered.No;
        }
        if (instruction.HasLockPrefix)
            op.Flags |= OpFlags.Lock;
        Operands.Memory(in instruction, ref op, in context);
        return Lowered.Next;
    }

    private static Lowered LowerCarryChain(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        bool wide = instruction.Op0Register.IsGPR64();
        bool carry = instruction.Mnemonic == Mnemonic.Adcx;
        op.R0 = Operands.Register(instruction.Op0Register);
        if (instruction.Op1Kind == OpKind.Register)
        {
            op.R1 = Operands.Register(instruction.Op1Register);
            if (carry)
                op.Handler = wide ? &GeneralHandlers.Adcx<W64> : &GeneralHandlers.Adcx<W32>;
            else
                op.Handler = wide ? &GeneralHandlers.Adox<W64> : &GeneralHandlers.Adox<W32>;
            return Lowered.Next;
        }
        Operands.Memory(in instruction, ref op, in context);
        if (carry)
            op.Handler = wide ? &GeneralHandlers.AdcxMemory<W64> : &GeneralHandlers.AdcxMemory<W32>;
        else
            op.Handler = wide ? &GeneralHandlers.AdoxMemory<W64> : &GeneralHandlers.AdoxMemory<W32>;
        return Lowered.Next;
    }
}
