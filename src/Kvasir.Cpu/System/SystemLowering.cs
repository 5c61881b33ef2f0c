using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers system instructions: segments, far transfers, control registers, I/O, and all that only a kernel uses.</summary>
public static class SystemLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context) => Lowered.No;
}
