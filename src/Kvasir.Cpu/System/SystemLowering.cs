using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers system instructions: segments, far transfers, control registers, I/O, and all that only a kernel uses.</summary>
public static unsafe class SystemLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        Lowered result = TransferLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = SegmentLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = PortLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = ProcessorLowering.Lower(in instruction, ref op, in context);
        return result;
    }

    /// <summary>The operand size where a handler wants it at run time.</summary>
    internal static void SetSize(ref Op op, int bytes) => op.Flags |= (ushort)(bytes << OpFlags.SizeShift);

    /// <summary>A 16-bit operand that is a register (R1) or memory (Aux).</summary>
    internal static void Selector(in Instruction instruction, int operand, ref Op op, in LoweringContext context)
    {
        if (instruction.GetOpKind(operand) == OpKind.Register)
        {
            op.R1 = Operands.Register(instruction.GetOpRegister(operand));
            return;
        }
        op.Aux = SelectorHandlers.Memory;
        Operands.Memory(in instruction, ref op, in context);
    }

    internal static int RegisterBytes(Register register) => register.GetSize();
}
