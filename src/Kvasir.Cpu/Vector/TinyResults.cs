using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>
/// Finds denormal results. The host flags underflow only for inexact ones while the exception is masked; unmasked, an exact one counts too (Intel SDM vol. 1,
/// "Numeric Underflow Exception").
/// </summary>
internal static unsafe class TinyResults
{
    /// <summary>Bits of <see cref="Op.Flags"/> (12-14, free where the address size is not wanted): what kind of result to look at.</summary>
    public const ushort Mask = 7 << OpFlags.AddressShift;
    private const ushort Scalar32 = 1 << OpFlags.AddressShift;
    private const ushort Scalar64 = 2 << OpFlags.AddressShift;
    private const ushort Packed32 = 3 << OpFlags.AddressShift;
    private const ushort Packed64 = 4 << OpFlags.AddressShift;
    private const ushort Packed16 = 5 << OpFlags.AddressShift;

    /// <summary>The kind of an instruction's results; 0 for one that cannot underflow.</summary>
    public static ushort KindOf(Mnemonic mnemonic) => mnemonic switch
    {
        Mnemonic.Addss or Mnemonic.Subss or Mnemonic.Mulss or Mnemonic.Divss or Mnemonic.Cvtsd2ss or Mnemonic.Vaddss or Mnemonic.Vsubss
            or Mnemonic.Vmulss or Mnemonic.Vdivss or Mnemonic.Vcvtsd2ss or Mnemonic.Vfmadd132ss or Mnemonic.Vfmadd213ss
            or Mnemonic.Vfmadd231ss or Mnemonic.Vfmsub132ss or Mnemonic.Vfmsub213ss or Mnemonic.Vfmsub231ss or Mnemonic.Vfnmadd132ss
            or Mnemonic.Vfnmadd213ss or Mnemonic.Vfnmadd231ss or Mnemonic.Vfnmsub132ss or Mnemonic.Vfnmsub213ss or Mnemonic.Vfnmsub231ss => Scalar32,
        Mnemonic.Addsd or Mnemonic.Subsd or Mnemonic.Mulsd or Mnemonic.Divsd or Mnemonic.Vaddsd or Mnemonic.Vsubsd or Mnemonic.Vmulsd
            or Mnemonic.Vdivsd or Mnemonic.Vfmadd132sd or Mnemonic.Vfmadd213sd or Mnemonic.Vfmadd231sd or Mnemonic.Vfmsub132sd
            or Mnemonic.Vfmsub213sd or Mnemonic.Vfmsub231sd or Mnemonic.Vfnmadd132sd or Mnemonic.Vfnmadd213sd or Mnemonic.Vfnmadd231sd
            or Mnemonic.Vfnmsub132sd or Mnemonic.Vfnmsub213sd or Mnemonic.Vfnmsub231sd => Scalar64,
        Mnemonic.Addpd or Mnemonic.Subpd or Mnemonic.Mulpd or Mnemonic.Divpd or Mnemonic.Addsubpd or Mnemonic.Haddpd or Mnemonic.Hsubpd
            or Mnemonic.Dppd or Mnemonic.Vaddpd or Mnemonic.Vsubpd or Mnemonic.Vmulpd or Mnemonic.Vdivpd or Mnemonic.Vaddsubpd
            or Mnemonic.Vhaddpd or Mnemonic.Vhsubpd or Mnemonic.Vdppd or Mnemonic.Vfmadd132pd or Mnemonic.Vfmadd213pd
            or Mnemonic.Vfmadd231pd or Mnemonic.Vfmsub132pd or Mnemonic.Vfmsub213pd or Mnemonic.Vfmsub231pd or Mnemonic.Vfnmadd132pd
            or Mnemonic.Vfnmadd213pd or Mnemonic.Vfnmadd231pd or Mnemonic.Vfnmsub132pd or Mnemonic.Vfnmsub213pd or Mnemonic.Vfnmsub231pd
            or Mnemonic.Vfmaddsub132pd or Mnemonic.Vfmaddsub213pd or Mnemonic.Vfmaddsub231pd or Mnemonic.Vfmsubadd132pd
            or Mnemonic.Vfmsubadd213pd or Mnemonic.Vfmsubadd231pd => Packed64,
        Mnemonic.Addps or Mnemonic.Subps or Mnemonic.Mulps or Mnemonic.Divps or Mnemonic.Addsubps or Mnemonic.Haddps or Mnemonic.Hsubps
            or Mnemonic.Dpps or Mnemonic.Roundps or Mnemonic.Cvtpd2ps or Mnemonic.Vaddps or Mnemonic.Vsubps or Mnemonic.Vmulps
            or Mnemonic.Vdivps or Mnemonic.Vaddsubps or Mnemonic.Vhaddps or Mnemonic.Vhsubps or Mnemonic.Vdpps or Mnemonic.Vroundps
            or Mnemonic.Vcvtpd2ps or Mnemonic.Vfmadd132ps or Mnemonic.Vfmadd213ps or Mnemonic.Vfmadd231ps or Mnemonic.Vfmsub132ps
            or Mnemonic.Vfmsub213ps or Mnemonic.Vfmsub231ps or Mnemonic.Vfnmadd132ps or Mnemonic.Vfnmadd213ps or Mnemonic.Vfnmadd231ps
            or Mnemonic.Vfnmsub132ps or Mnemonic.Vfnmsub213ps or Mnemonic.Vfnmsub231ps or Mnemonic.Vfmaddsub132ps
            or Mnemonic.Vfmaddsub213ps or Mnemonic.Vfmaddsub231ps or Mnemonic.Vfmsubadd132ps or Mnemonic.Vfmsubadd213ps
            or Mnemonic.Vfmsubadd231ps => Packed32,
        Mnemonic.Vcvtps2ph => Packed16,
        _ => 0,
    };

    /// <summary>Whether the destination (operand 0) holds a denormal in a place that the instruction computed.</summary>
    public static bool Any(VcpuBlock* s, Op* op, byte* memory)
    {
        // A thunk's vector operand counts in units of 4 bytes; a wider register's upper half is zero where the instruction did not write it.
        byte* result = s->Vector + op->R0 * 8;
        switch (op->Flags & Mask)
        {
            case Scalar32:
                return IsTiny32(*(uint*)result);
            case Scalar64:
                return IsTiny64(*(ulong*)result);
            case Packed32:
                for (int i = 0; i < Bytes(op); i += 4)
                {
                    if (IsTiny32(*(uint*)(result + i)))
                        return true;
                }
                return false;
            case Packed64:
                for (int i = 0; i < Bytes(op); i += 8)
                {
                    if (IsTiny64(*(ulong*)(result + i)))
                        return true;
                }
                return false;
            default:
                byte* halves = memory != null ? memory : result;
                int bytes = memory != null ? 1 << (op->Flags >> OpFlags.SizeShift & 15) : 16;
                for (int i = 0; i < bytes; i += 2)
                {
                    uint half = *(ushort*)(halves + i);
                    if ((half & 0x7c00) == 0 && (half & 0x3ff) != 0)
                        return true;
                }
                return false;
        }
    }

    /// <summary>Bytes of the result: a VEX form has written the whole YMM register, with zeros where it computed nothing.</summary>
    private static int Bytes(Op* op) => (op->Flags & Thunks.Vex) != 0 ? 32 : 16;

    private static bool IsTiny32(uint value) => (value & 0x7f80_0000) == 0 && (value & 0x7f_ffff) != 0;

    private static bool IsTiny64(ulong value) => (value & 0x7ff0_0000_0000_0000) == 0 && (value & 0xf_ffff_ffff_ffff) != 0;
}
