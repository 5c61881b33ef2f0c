using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>The flags that the manual leaves open after an instruction.</summary>
internal static class UndefinedFlags
{
    private const ulong Overflow = 1 << 11;
    private const ulong Adjust = 1 << 4;
    private const ulong Carry = 1;

    public static ulong Of(in Instruction instruction)
    {
        RflagsBits bits = instruction.RflagsUndefined;
        ulong mask = 0;
        if ((bits & RflagsBits.CF) != 0)
            mask |= Carry;
        if ((bits & RflagsBits.PF) != 0)
            mask |= 1 << 2;
        if ((bits & RflagsBits.AF) != 0)
            mask |= Adjust;
        if ((bits & RflagsBits.ZF) != 0)
            mask |= 1 << 6;
        if ((bits & RflagsBits.SF) != 0)
            mask |= 1 << 7;
        if ((bits & RflagsBits.OF) != 0)
            mask |= Overflow;
        // Iced cannot know the count: OF is defined for one, CF where the count is less than the operand's width (Intel SDM vol. 2, SAL/SAR/SHL/SHR, RCL/RCR, SHLD).
        return instruction.Mnemonic switch
        {
            Mnemonic.Shl or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Sal => mask | Overflow | Adjust | (Width(in instruction) < 4 ? Carry : 0),
            Mnemonic.Shld or Mnemonic.Shrd => mask | Overflow | Adjust,
            Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr => mask | Overflow,
            _ => mask,
        };
    }

    private static int Width(in Instruction instruction) =>
        instruction.Op0Kind == OpKind.Register ? instruction.Op0Register.GetSize() : instruction.MemorySize.GetSize();
}
