using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers x87, MMX, SSE, AVX and the integer instructions that run as the host's own.</summary>
public static class VectorLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context) => Lowered.No;
}
