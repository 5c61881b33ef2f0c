using Iced.Intel;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// SIMD floating-point exceptions (Intel SDM vol. 1, "SSE and SSE2 SIMD Floating-Point Exceptions"). The host always computes with every exception masked; where
/// the guest has unmasked one, its flags tell afterwards and the instruction is undone.
/// </summary>
internal static unsafe class FloatingPoint
{
    /// <summary>MXCSR with every exception masked, round to nearest, no flag: what .NET runs with.</summary>
    public const uint DefaultMxcsr = 0x1f80;
    private const uint FlagMask = 0x3f;
    private const uint MaskBits = 0x1f80;
    private const int MaskShift = 7;

    /// <summary>Invalid, denormal operand, division by zero: found before the result is computed.</summary>
    private const uint PreComputation = 0x07;
    private const uint Underflow = 0x10;
    private const uint FlushToZero = 0x8000;

    private static readonly delegate* unmanaged[SuppressGCTransition]<uint*, void> LoadMxcsr =
        (delegate* unmanaged[SuppressGCTransition]<uint*, void>)ThunkCache.Make(compiler => compiler.CompileLoadMxcsr());

    /// <summary>The guest's MXCSR can be used as it is, and left in the host: only its sticky flags differ from the default.</summary>
    public static bool IsDefault(VcpuBlock* s) => (s->Mxcsr & ~FlagMask) == DefaultMxcsr;

    /// <summary>Calls a thunk whose instruction uses MXCSR while that is not the default one. False: #XM (or #UD) was recorded and nothing changed but flags in MXCSR.</summary>
    [System.Runtime.CompilerServices.MethodImpl(System.Runtime.CompilerServices.MethodImplOptions.NoInlining)]
    public static bool CallSlow(VcpuBlock* s, Op* op, byte* memory, out uint flags)
    {
        uint guest = s->Mxcsr;
        uint unmasked = ~(guest >> MaskShift) & FlagMask;
        bool watchTiny = (unmasked & Underflow) != 0;
        Undo undo = default;
        if (unmasked != 0)
            undo.Save(s);
        uint control = (guest & ~FlagMask) | MaskBits;
        // With underflow unmasked, flush-to-zero has no effect.
        if (watchTiny)
            control &= ~FlushToZero;
        s->Mxcsr = control;
        flags = Thunks.Call(s, memory, op);
        uint raised = s->Mxcsr & FlagMask;
        uint host = DefaultMxcsr;
        LoadMxcsr(&host);
        if (watchTiny && (op->Flags & TinyResults.Mask) != 0 && TinyResults.Any(s, op, memory))
            raised |= Underflow;
        s->Mxcsr = guest | raised;
        if ((raised & unmasked) == 0)
            return true;
        // An exception found before computation keeps those of the computation from happening.
        if ((raised & unmasked & PreComputation) != 0)
            s->Mxcsr = guest | (raised & PreComputation);
        undo.Restore(s);
        ExceptionVector vector = (s->Cr4 & (ulong)Cr4.OSXMMEXCPT) != 0 ? ExceptionVector.SimdFloatingPoint : ExceptionVector.InvalidOpcode;
        return Access.Record(s, vector);
    }

    /// <summary>Whether an instruction reads MXCSR's controls or sets its flags.</summary>
    public static bool UsesMxcsr(Mnemonic mnemonic) => mnemonic is
        Mnemonic.Addps or Mnemonic.Addpd or Mnemonic.Addss or Mnemonic.Addsd or Mnemonic.Subps or Mnemonic.Subpd or Mnemonic.Subss
            or Mnemonic.Subsd or Mnemonic.Mulps or Mnemonic.Mulpd or Mnemonic.Mulss or Mnemonic.Mulsd or Mnemonic.Divps or Mnemonic.Divpd
            or Mnemonic.Divss or Mnemonic.Divsd or Mnemonic.Minps or Mnemonic.Minpd or Mnemonic.Minss or Mnemonic.Minsd or Mnemonic.Maxps
            or Mnemonic.Maxpd or Mnemonic.Maxss or Mnemonic.Maxsd or Mnemonic.Sqrtps or Mnemonic.Sqrtpd or Mnemonic.Sqrtss
            or Mnemonic.Sqrtsd or Mnemonic.Cmpps or Mnemonic.Cmppd or Mnemonic.Cmpss or Mnemonic.Cmpsd or Mnemonic.Comiss
            or Mnemonic.Comisd or Mnemonic.Ucomiss or Mnemonic.Ucomisd or Mnemonic.Addsubps or Mnemonic.Addsubpd or Mnemonic.Haddps
            or Mnemonic.Haddpd or Mnemonic.Hsubps or Mnemonic.Hsubpd or Mnemonic.Dpps or Mnemonic.Dppd or Mnemonic.Roundps
            or Mnemonic.Roundpd or Mnemonic.Roundss or Mnemonic.Roundsd or Mnemonic.Cvtps2pd or Mnemonic.Cvtpd2ps or Mnemonic.Cvtss2sd
            or Mnemonic.Cvtsd2ss or Mnemonic.Cvtdq2ps or Mnemonic.Cvtps2dq or Mnemonic.Cvttps2dq or Mnemonic.Cvttpd2dq or Mnemonic.Cvtpd2dq
            or Mnemonic.Cvtsi2ss or Mnemonic.Cvtsi2sd or Mnemonic.Cvtss2si or Mnemonic.Cvtsd2si or Mnemonic.Cvttss2si or Mnemonic.Cvttsd2si
            or Mnemonic.Cvtpi2ps or Mnemonic.Cvtps2pi or Mnemonic.Cvttps2pi or Mnemonic.Cvtpd2pi or Mnemonic.Cvttpd2pi
            || UsesMxcsrVex(mnemonic);

    private static bool UsesMxcsrVex(Mnemonic mnemonic) => mnemonic is
        Mnemonic.Vaddps or Mnemonic.Vaddpd or Mnemonic.Vaddss or Mnemonic.Vaddsd or Mnemonic.Vsubps or Mnemonic.Vsubpd or Mnemonic.Vsubss
            or Mnemonic.Vsubsd or Mnemonic.Vmulps or Mnemonic.Vmulpd or Mnemonic.Vmulss or Mnemonic.Vmulsd or Mnemonic.Vdivps
            or Mnemonic.Vdivpd or Mnemonic.Vdivss or Mnemonic.Vdivsd or Mnemonic.Vminps or Mnemonic.Vminpd or Mnemonic.Vminss
            or Mnemonic.Vminsd or Mnemonic.Vmaxps or Mnemonic.Vmaxpd or Mnemonic.Vmaxss or Mnemonic.Vmaxsd or Mnemonic.Vsqrtps
            or Mnemonic.Vsqrtpd or Mnemonic.Vsqrtss or Mnemonic.Vsqrtsd or Mnemonic.Vcmpps or Mnemonic.Vcmppd or Mnemonic.Vcmpss
            or Mnemonic.Vcmpsd or Mnemonic.Vcomiss or Mnemonic.Vcomisd or Mnemonic.Vucomiss or Mnemonic.Vucomisd or Mnemonic.Vaddsubps
            or Mnemonic.Vaddsubpd or Mnemonic.Vhaddps or Mnemonic.Vhaddpd or Mnemonic.Vhsubps or Mnemonic.Vhsubpd or Mnemonic.Vdpps
            or Mnemonic.Vdppd or Mnemonic.Vroundps or Mnemonic.Vroundpd or Mnemonic.Vroundss or Mnemonic.Vroundsd or Mnemonic.Vcvtps2pd
            or Mnemonic.Vcvtpd2ps or Mnemonic.Vcvtss2sd or Mnemonic.Vcvtsd2ss or Mnemonic.Vcvtdq2ps or Mnemonic.Vcvtps2dq
            or Mnemonic.Vcvttps2dq or Mnemonic.Vcvttpd2dq or Mnemonic.Vcvtpd2dq or Mnemonic.Vcvtsi2ss or Mnemonic.Vcvtsi2sd
            or Mnemonic.Vcvtss2si or Mnemonic.Vcvtsd2si or Mnemonic.Vcvttss2si or Mnemonic.Vcvttsd2si or Mnemonic.Vcvtph2ps
            or Mnemonic.Vcvtps2ph or Mnemonic.Vfmadd132ps or Mnemonic.Vfmadd132pd or Mnemonic.Vfmadd132ss or Mnemonic.Vfmadd132sd
            or Mnemonic.Vfmadd213ps or Mnemonic.Vfmadd213pd or Mnemonic.Vfmadd213ss or Mnemonic.Vfmadd213sd or Mnemonic.Vfmadd231ps
            or Mnemonic.Vfmadd231pd or Mnemonic.Vfmadd231ss or Mnemonic.Vfmadd231sd or Mnemonic.Vfmsub132ps or Mnemonic.Vfmsub132pd
            or Mnemonic.Vfmsub132ss or Mnemonic.Vfmsub132sd or Mnemonic.Vfmsub213ps or Mnemonic.Vfmsub213pd or Mnemonic.Vfmsub213ss
            or Mnemonic.Vfmsub213sd or Mnemonic.Vfmsub231ps or Mnemonic.Vfmsub231pd or Mnemonic.Vfmsub231ss or Mnemonic.Vfmsub231sd
            or Mnemonic.Vfnmadd132ps or Mnemonic.Vfnmadd132pd or Mnemonic.Vfnmadd132ss or Mnemonic.Vfnmadd132sd or Mnemonic.Vfnmadd213ps
            or Mnemonic.Vfnmadd213pd or Mnemonic.Vfnmadd213ss or Mnemonic.Vfnmadd213sd or Mnemonic.Vfnmadd231ps or Mnemonic.Vfnmadd231pd
            or Mnemonic.Vfnmadd231ss or Mnemonic.Vfnmadd231sd or Mnemonic.Vfnmsub132ps or Mnemonic.Vfnmsub132pd or Mnemonic.Vfnmsub132ss
            or Mnemonic.Vfnmsub132sd or Mnemonic.Vfnmsub213ps or Mnemonic.Vfnmsub213pd or Mnemonic.Vfnmsub213ss or Mnemonic.Vfnmsub213sd
            or Mnemonic.Vfnmsub231ps or Mnemonic.Vfnmsub231pd or Mnemonic.Vfnmsub231ss or Mnemonic.Vfnmsub231sd or Mnemonic.Vfmaddsub132ps
            or Mnemonic.Vfmaddsub132pd or Mnemonic.Vfmaddsub213ps or Mnemonic.Vfmaddsub213pd or Mnemonic.Vfmaddsub231ps
            or Mnemonic.Vfmaddsub231pd or Mnemonic.Vfmsubadd132ps or Mnemonic.Vfmsubadd132pd or Mnemonic.Vfmsubadd213ps
            or Mnemonic.Vfmsubadd213pd or Mnemonic.Vfmsubadd231ps or Mnemonic.Vfmsubadd231pd;

    /// <summary>What an instruction that faults must not have changed.</summary>
    private struct Undo
    {
        private fixed ulong _general[16];
        private fixed byte _vector[16 * VcpuBlock.VectorStride];
        private fixed byte _x87[576];

        public void Save(VcpuBlock* s)
        {
            fixed (Undo* u = &this)
            {
                new System.ReadOnlySpan<byte>(s->Gpr, 128).CopyTo(new System.Span<byte>(u->_general, 128));
                new System.ReadOnlySpan<byte>(s->Vector, 512).CopyTo(new System.Span<byte>(u->_vector, 512));
                new System.ReadOnlySpan<byte>(s->X87, 576).CopyTo(new System.Span<byte>(u->_x87, 576));
            }
        }

        public void Restore(VcpuBlock* s)
        {
            fixed (Undo* u = &this)
            {
                new System.ReadOnlySpan<byte>(u->_general, 128).CopyTo(new System.Span<byte>(s->Gpr, 128));
                new System.ReadOnlySpan<byte>(u->_vector, 512).CopyTo(new System.Span<byte>(s->Vector, 512));
                new System.ReadOnlySpan<byte>(u->_x87, 576).CopyTo(new System.Span<byte>(s->X87, 576));
            }
        }
    }
}
