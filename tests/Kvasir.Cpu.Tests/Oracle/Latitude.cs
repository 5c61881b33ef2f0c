using Iced.Intel;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>What the manual leaves open of an instruction's outcome.</summary>
/// <param name="Flags">Flags with no defined value afterwards.</param>
/// <param name="SimdFlags">Exception flags of MXCSR that may differ after #XM.</param>
/// <param name="Result">The result itself is undefined: nothing can be judged.</param>
/// <param name="FaultOrder">Two operands, or two parts or checks of one, may fault and either may come first.</param>
/// <param name="FaultAddress">A page fault may name any of the bytes that the operand has in the page.</param>
/// <param name="FaultOptional">Bytes that the mask leaves out, or components that are not in use, may or may not fault.</param>
/// <param name="VectorsAfterFault">A gather that faults may leave elements of its mask as they were or spread their sign.</param>
/// <param name="RegistersAfterFault">A fault may leave some of the destination registers loaded: harmless, as the instruction starts again.</param>
internal readonly record struct Latitude(ulong Flags, uint SimdFlags, bool Result, bool FaultOrder, bool FaultAddress, bool FaultOptional, bool VectorsAfterFault, bool RegistersAfterFault)
{
    /// <summary>All exception flags of MXCSR.</summary>
    public const uint AllSimdFlags = 0x3f;
    private const uint DenormalFlag = 1 << 1;
    private const uint InexactFlag = 1 << 5;
    private const ulong Carry = 1;
    private const ulong Adjust = 1 << 4;
    private const ulong Overflow = 1 << 11;

    /// <summary>What is open after an instruction with these registers.</summary>
    public static unsafe Latitude Of(in Instruction instruction, UserState* state) => new(
        UndefinedFlags(in instruction),
        OpenSimdFlags(in instruction),
        HasUndefinedResult(in instruction, (byte)state->Gpr[1]),
        HasTwoFaults(in instruction),
        IsWide(in instruction),
        instruction.Mnemonic is Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu || instruction.IsSaveRestoreInstruction,
        instruction.IsVsib,
        instruction.Mnemonic is Mnemonic.Popa or Mnemonic.Popad or Mnemonic.Cmpsb or Mnemonic.Cmpsw or Mnemonic.Cmpsd or Mnemonic.Cmpsq);

    /// <summary>Compares two places in memory, or both pushes and branches, or takes its operand in pieces or checks its alignment beside its limit.</summary>
    private static bool HasTwoFaults(in Instruction instruction) => instruction.Mnemonic switch
    {
        Mnemonic.Bound or Mnemonic.Lds or Mnemonic.Les or Mnemonic.Lss or Mnemonic.Lfs or Mnemonic.Lgs => true,
        Mnemonic.Cmpsb or Mnemonic.Cmpsw or Mnemonic.Cmpsd or Mnemonic.Cmpsq => instruction.IsStringInstruction,
        Mnemonic.Call => true,
        Mnemonic.Maskmovq => true,
        _ => instruction.MemorySize.GetSize() > 8 || instruction.IsSaveRestoreInstruction,
    };

    /// <summary>Operands that processors take in pieces, in an order of their own.</summary>
    private static bool IsWide(in Instruction instruction) => instruction.IsSaveRestoreInstruction
        || instruction.Mnemonic is Mnemonic.Fldenv or Mnemonic.Fnstenv or Mnemonic.Fnsave or Mnemonic.Frstor
            or Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu or Mnemonic.Vmaskmovps or Mnemonic.Vmaskmovpd or Mnemonic.Vpmaskmovd or Mnemonic.Vpmaskmovq;

    /// <summary>
    /// Beside an unmasked exception: the flags that only the masked response would have raised, such as inexact with underflow. Dot products stop at the step
    /// that raised it.
    /// </summary>
    private static uint OpenSimdFlags(in Instruction instruction) =>
        instruction.Mnemonic is Mnemonic.Dpps or Mnemonic.Dppd or Mnemonic.Vdpps or Mnemonic.Vdppd ? AllSimdFlags : DenormalFlag | InexactFlag;

    private static ulong UndefinedFlags(in Instruction instruction)
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
        // Iced cannot know the count: OF is defined for one, CF where the count is at most the operand's width (Intel SDM vol. 2, SAL/SAR/SHL/SHR, RCL/RCR, SHLD).
        return instruction.Mnemonic switch
        {
            Mnemonic.Shl or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Sal => mask | Overflow | Adjust | (Width(in instruction) < 4 ? Carry : 0),
            Mnemonic.Shld or Mnemonic.Shrd => mask | Overflow | Adjust,
            Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr => mask | Overflow,
            _ => mask,
        };
    }

    /// <summary>A double shift of words by more than 16.</summary>
    private static bool HasUndefinedResult(in Instruction instruction, byte cl)
    {
        if (instruction.Mnemonic is not (Mnemonic.Shld or Mnemonic.Shrd) || Width(in instruction) != 2)
            return false;
        int count = instruction.Op2Kind == OpKind.Immediate8 ? instruction.Immediate8 : cl;
        return (count & 31) > 16;
    }

    private static int Width(in Instruction instruction) =>
        instruction.Op0Kind == OpKind.Register ? instruction.Op0Register.GetSize() : instruction.MemorySize.GetSize();
}
