using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Instructions that save, restore and control floating-point and vector state.</summary>
internal static unsafe class StateLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Fxsave or Mnemonic.Fxsave64:
                op.Handler = &XsaveHandlers.Fxsave;
                break;
            case Mnemonic.Fxrstor or Mnemonic.Fxrstor64:
                op.Handler = &XsaveHandlers.Fxrstor;
                break;
            case Mnemonic.Xsave or Mnemonic.Xsave64:
                op.Handler = &XsaveHandlers.Xsave;
                break;
            case Mnemonic.Xsaveopt or Mnemonic.Xsaveopt64:
                op.Handler = &XsaveHandlers.Xsaveopt;
                break;
            case Mnemonic.Xsavec or Mnemonic.Xsavec64:
                op.Handler = &XsaveHandlers.Xsavec;
                break;
            case Mnemonic.Xsaves or Mnemonic.Xsaves64:
                op.Handler = &XsaveHandlers.Xsaves;
                break;
            case Mnemonic.Xrstor or Mnemonic.Xrstor64:
                op.Handler = &XsaveHandlers.Xrstor;
                break;
            case Mnemonic.Xrstors or Mnemonic.Xrstors64:
                op.Handler = &XsaveHandlers.Xrstors;
                break;
            case Mnemonic.Xgetbv:
                op.Handler = &XsaveHandlers.Xgetbv;
                return Lowered.Next;
            case Mnemonic.Xsetbv:
                op.Handler = &XsaveHandlers.Xsetbv;
                return Lowered.Next;
            case Mnemonic.Ldmxcsr:
                op.Handler = &XsaveHandlers.Ldmxcsr<SseGate>;
                break;
            case Mnemonic.Vldmxcsr:
                op.Handler = &XsaveHandlers.Ldmxcsr<AvxGate>;
                break;
            case Mnemonic.Stmxcsr:
                op.Handler = &XsaveHandlers.Stmxcsr<SseGate>;
                break;
            case Mnemonic.Vstmxcsr:
                op.Handler = &XsaveHandlers.Stmxcsr<AvxGate>;
                break;
            case Mnemonic.Vzeroupper:
                op.Handler = &XsaveHandlers.Vzeroupper;
                return Lowered.Next;
            case Mnemonic.Vzeroall:
                op.Handler = &XsaveHandlers.Vzeroall;
                return Lowered.Next;
            case Mnemonic.Emms:
                op.Handler = &X87Control.Emms;
                return Lowered.Next;
            default:
                return Lowered.No;
        }
        Operands.Memory(in instruction, ref op, in context);
        op.Aux = Has64BitPointers(instruction.Mnemonic) ? (ushort)1 : (ushort)0;
        return Lowered.Next;
    }

    private static bool Has64BitPointers(Mnemonic mnemonic) => mnemonic is Mnemonic.Fxsave64 or Mnemonic.Fxrstor64 or Mnemonic.Xsave64 or Mnemonic.Xsaveopt64
        or Mnemonic.Xsavec64 or Mnemonic.Xsaves64 or Mnemonic.Xrstor64 or Mnemonic.Xrstors64;
}
