using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Instructions of opcodes D8h-DFh, and WAIT.</summary>
internal static unsafe class X87Lowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Wait:
                op.Handler = &X87Control.Wait;
                return Lowered.Next;
            case Mnemonic.Fnop:
                op.Handler = &X87Control.Nothing;
                return Lowered.Next;
            case Mnemonic.Fneni or Mnemonic.Fndisi or Mnemonic.Fnsetpm:
                op.Handler = &X87Control.Ignored;
                return Lowered.Next;
            case Mnemonic.Fninit:
                op.Handler = &X87Control.Initialize;
                return Lowered.Next;
            case Mnemonic.Fnclex:
                op.Handler = &X87Control.ClearExceptions;
                return Lowered.Next;
            case Mnemonic.Fnstsw when instruction.Op0Kind == OpKind.Register:
                op.Handler = &X87Control.StoreStatusToAx;
                return Lowered.Next;
            case Mnemonic.Fnstsw:
                op.Handler = &X87Control.StoreStatus;
                break;
            case Mnemonic.Fnstcw:
                op.Handler = &X87Control.StoreControl;
                break;
            case Mnemonic.Fldcw:
                op.Handler = &X87Control.LoadControl;
                break;
            case Mnemonic.Fnstenv:
                op.Handler = &X87Control.StoreEnvironment;
                break;
            case Mnemonic.Fldenv:
                op.Handler = &X87Control.LoadEnvironment;
                break;
            case Mnemonic.Fnsave:
                op.Handler = &X87Control.Save;
                break;
            case Mnemonic.Frstor:
                op.Handler = &X87Control.Restore;
                break;
            default:
                return LowerThunk(in instruction, ref op, in context);
        }
        Operands.Memory(in instruction, ref op, in context);
        op.R0 = (byte)instruction.MemorySize.GetSize();
        return Lowered.Next;
    }

    /// <summary>Whether an instruction may run on the host's x87 state as it is: it computes, or only reads the control word.</summary>
    public static bool IsPlain(in Instruction instruction) => instruction.Mnemonic switch
    {
        Mnemonic.Wait or Mnemonic.Fnop or Mnemonic.Fnstcw => true,
        Mnemonic.Fneni or Mnemonic.Fndisi or Mnemonic.Fnsetpm or Mnemonic.Fninit or Mnemonic.Fnclex or Mnemonic.Fnstsw or Mnemonic.Fldcw or Mnemonic.Fnstenv
            or Mnemonic.Fldenv or Mnemonic.Fnsave or Mnemonic.Frstor => false,
        _ => IsX87(in instruction),
    };

    private static Lowered LowerThunk(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (!IsX87(in instruction))
            return Lowered.No;
        bool memory = instruction.Op0Kind == OpKind.Memory;
        Instruction host = HostForm.Of(in instruction);
        if (!ThunkCache.TryGet(in host, out nint thunk))
            return Lowered.No;
        op.Imm = thunk;
        ushort opcode = ThunkCache.X87Opcode(in instruction);
        if (!memory)
        {
            Traits traits = ThunkTraits.Of(in instruction);
            op.Aux = X87Handlers.Aux(opcode, 0);
            if ((traits & Traits.FlagsOut) != 0)
                op.Handler = &X87Handlers.Registers<ChangesFlags>;
            else if ((traits & Traits.FlagsIn) != 0)
                op.Handler = &X87Handlers.Registers<UsesFlags>;
            else
                op.Handler = &X87Handlers.Registers<Plain>;
            return Lowered.Next;
        }
        Operands.Memory(in instruction, ref op, in context);
        op.R0 = (byte)instruction.MemorySize.GetSize();
        op.Aux = X87Handlers.Aux(opcode, Operands.Segment(instruction.MemorySegment));
        if (IsStore(instruction.Mnemonic))
            op.Handler = &X87Handlers.Store;
        else
            op.Handler = &X87Handlers.Load;
        return Lowered.Next;
    }

    private static bool IsX87(in Instruction instruction)
    {
        ReadOnlySpan<CpuidFeature> features = instruction.CpuidFeatures;
        return features.Length > 0 && features[0] is CpuidFeature.FPU or CpuidFeature.FPU287 or CpuidFeature.FPU387;
    }

    private static bool IsStore(Mnemonic mnemonic) =>
        mnemonic is Mnemonic.Fst or Mnemonic.Fstp or Mnemonic.Fist or Mnemonic.Fistp or Mnemonic.Fisttp or Mnemonic.Fbstp;
}
