using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers the general-purpose instructions.</summary>
public static class IntegerLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context) => Lowered.No;
}
