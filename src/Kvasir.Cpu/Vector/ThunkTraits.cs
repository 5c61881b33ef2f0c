using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>What an instruction uses besides its named operands; it decides how its thunk is made and which handler calls it.</summary>
[Flags]
internal enum Traits
{
    None = 0,

    /// <summary>Floating-point arithmetic: reads MXCSR's controls and sets its flags.</summary>
    Mxcsr = 1 << 0,
    FlagsIn = 1 << 1,
    FlagsOut = 1 << 2,

    /// <summary>Names an MMX register.</summary>
    Mmx = 1 << 3,

    /// <summary>Names an XMM or YMM register.</summary>
    Vector = 1 << 4,
    ReadsXmm0 = 1 << 5,
    WritesXmm0 = 1 << 6,
    ReadsRaxRdx = 1 << 7,
    ReadsRdx = 1 << 8,
    WritesRcx = 1 << 9,
}

/// <summary>Finds an instruction's <see cref="Traits"/>.</summary>
internal static class ThunkTraits
{
    private const RflagsBits Arithmetic = RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF;

    public static Traits Of(in Instruction instruction)
    {
        Traits traits = Implicit(instruction.Mnemonic);
        if (FloatingPoint.UsesMxcsr(instruction.Mnemonic))
            traits |= Traits.Mxcsr;
        if ((instruction.RflagsModified & Arithmetic) != 0)
        {
            traits |= Traits.FlagsOut;
            // What is undefined may be what it was: the host decides, so it must be given what was.
            if (((instruction.RflagsUndefined | instruction.RflagsRead) & Arithmetic) != 0 || (instruction.RflagsModified & Arithmetic) != Arithmetic)
                traits |= Traits.FlagsIn;
        }
        else if ((instruction.RflagsRead & Arithmetic) != 0)
        {
            traits |= Traits.FlagsIn;
        }
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) != OpKind.Register)
                continue;
            Register register = instruction.GetOpRegister(i);
            if (register.IsMM())
                traits |= Traits.Mmx;
            else if (register.IsXMM() || register.IsYMM())
                traits |= Traits.Vector;
        }
        // A conversion from memory to a general register names no vector register and is one of them all the same.
        if ((traits & (Traits.Mxcsr | Traits.Mmx)) == Traits.Mxcsr)
            traits |= Traits.Vector;
        return traits;
    }

    private static Traits Implicit(Mnemonic mnemonic) => mnemonic switch
    {
        Mnemonic.Pblendvb or Mnemonic.Blendvps or Mnemonic.Blendvpd or Mnemonic.Sha256rnds2 => Traits.ReadsXmm0,
        Mnemonic.Pcmpestrm or Mnemonic.Pcmpestrm64 or Mnemonic.Vpcmpestrm or Mnemonic.Vpcmpestrm64 => Traits.ReadsRaxRdx | Traits.WritesXmm0,
        Mnemonic.Pcmpestri or Mnemonic.Pcmpestri64 or Mnemonic.Vpcmpestri or Mnemonic.Vpcmpestri64 => Traits.ReadsRaxRdx | Traits.WritesRcx,
        Mnemonic.Pcmpistrm or Mnemonic.Vpcmpistrm => Traits.WritesXmm0,
        Mnemonic.Pcmpistri or Mnemonic.Vpcmpistri => Traits.WritesRcx,
        Mnemonic.Mulx => Traits.ReadsRdx,
        _ => Traits.None,
    };
}
