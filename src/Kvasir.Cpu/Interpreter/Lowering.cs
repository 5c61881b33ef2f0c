using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>From a decoded instruction to its handler and operands. The integer set is here and in its parts; system and vector instructions have lowerings of their own.</summary>
public static unsafe class Lowering
{
    /// <summary>Fills an operation. An instruction that nobody knows becomes #UD.</summary>
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        Lowered result = IntegerLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = SystemLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = VectorLowering.Lower(in instruction, ref op, in context);
        if (result != Lowered.No)
            return result;
        op.Handler = &Faulting.InvalidOpcode;
        op.Flags |= OpFlags.Undefined;
        return Lowered.End;
    }
}
