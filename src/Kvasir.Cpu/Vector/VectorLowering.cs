using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers x87, MMX, SSE, AVX and the integer instructions that run as the host's own.</summary>
public static unsafe class VectorLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (instruction.Encoding is not (EncodingKind.Legacy or EncodingKind.VEX) || !HostFeatures.Supports(in instruction))
            return Lowered.No;
        // VEX prefixes are #UD in real and virtual-8086 mode (Intel SDM vol. 2, "VEX Encoding and x86 Modes").
        if (instruction.Encoding == EncodingKind.VEX && (context.Mode & CodeMode.RealOrV86) != 0)
            return Lowered.No;
        Lowered result = StateLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = GeneralLowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = X87Lowering.Lower(in instruction, ref op, in context);
        if (result == Lowered.No)
            result = SimdLowering.Lower(in instruction, ref op, in context);
        return result;
    }
}
