using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers port I/O.</summary>
internal static unsafe class PortLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Code)
        {
            case Code.In_AL_imm8 or Code.In_AL_DX:
                op.Handler = &PortHandlers.In<W8>;
                return Port(in instruction, 1, ref op);
            case Code.In_AX_imm8 or Code.In_AX_DX:
                op.Handler = &PortHandlers.In<W16>;
                return Port(in instruction, 1, ref op);
            case Code.In_EAX_imm8 or Code.In_EAX_DX:
                op.Handler = &PortHandlers.In<W32>;
                return Port(in instruction, 1, ref op);
            case Code.Out_imm8_AL or Code.Out_DX_AL:
                op.Handler = &PortHandlers.Out<W8>;
                return Port(in instruction, 0, ref op);
            case Code.Out_imm8_AX or Code.Out_DX_AX:
                op.Handler = &PortHandlers.Out<W16>;
                return Port(in instruction, 0, ref op);
            case Code.Out_imm8_EAX or Code.Out_DX_EAX:
                op.Handler = &PortHandlers.Out<W32>;
                return Port(in instruction, 0, ref op);
            case Code.Insb_m8_DX:
                op.Handler = &PortHandlers.InString<W8>;
                return String(in instruction, instruction.Op0Kind, Register.ES, ref op, in context);
            case Code.Insw_m16_DX:
                op.Handler = &PortHandlers.InString<W16>;
                return String(in instruction, instruction.Op0Kind, Register.ES, ref op, in context);
            case Code.Insd_m32_DX:
                op.Handler = &PortHandlers.InString<W32>;
                return String(in instruction, instruction.Op0Kind, Register.ES, ref op, in context);
            case Code.Outsb_DX_m8:
                op.Handler = &PortHandlers.OutString<W8>;
                return String(in instruction, instruction.Op1Kind, instruction.MemorySegment, ref op, in context);
            case Code.Outsw_DX_m16:
                op.Handler = &PortHandlers.OutString<W16>;
                return String(in instruction, instruction.Op1Kind, instruction.MemorySegment, ref op, in context);
            case Code.Outsd_DX_m32:
                op.Handler = &PortHandlers.OutString<W32>;
                return String(in instruction, instruction.Op1Kind, instruction.MemorySegment, ref op, in context);
            default:
                return Lowered.No;
        }
    }

    private static Lowered Port(in Instruction instruction, int operand, ref Op op)
    {
        if (instruction.GetOpKind(operand) == OpKind.Register)
            op.Aux = PortHandlers.PortInDx;
        else
            op.Imm = instruction.Immediate8;
        return Lowered.Next;
    }

    private static Lowered String(in Instruction instruction, OpKind memory, Register segment, ref Op op, in LoweringContext context)
    {
        int addressBytes = memory switch
        {
            OpKind.MemorySegSI or OpKind.MemoryESDI => 2,
            OpKind.MemorySegESI or OpKind.MemoryESEDI => 4,
            _ => 8,
        };
        op.Address = Operands.Kind(addressBytes, context.Is64);
        Operands.SetSegment(segment, ref op, context.Is64);
        // REPNE repeats as REP does.
        if (instruction.HasRepPrefix || instruction.HasRepnePrefix)
            op.Flags |= OpFlags.Rep;
        return Lowered.Next;
    }
}
