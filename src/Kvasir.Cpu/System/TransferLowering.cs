using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers far transfers, software interrupts and system calls.</summary>
internal static unsafe class TransferLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Code)
        {
            case Code.Jmp_ptr1616:
                return Direct(ref op, &TransferHandlers.JumpFar, instruction.FarBranchSelector, instruction.FarBranch16, 2);
            case Code.Jmp_ptr1632:
                return Direct(ref op, &TransferHandlers.JumpFar, instruction.FarBranchSelector, instruction.FarBranch32, 4);
            case Code.Call_ptr1616:
                return Direct(ref op, &TransferHandlers.CallFar, instruction.FarBranchSelector, instruction.FarBranch16, 2);
            case Code.Call_ptr1632:
                return Direct(ref op, &TransferHandlers.CallFar, instruction.FarBranchSelector, instruction.FarBranch32, 4);
            case Code.Jmp_m1616:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.JumpFarMemory, 2);
            case Code.Jmp_m1632:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.JumpFarMemory, 4);
            case Code.Jmp_m1664:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.JumpFarMemory, 8);
            case Code.Call_m1616:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.CallFarMemory, 2);
            case Code.Call_m1632:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.CallFarMemory, 4);
            case Code.Call_m1664:
                return Indirect(in instruction, ref op, in context, &TransferHandlers.CallFarMemory, 8);
            case Code.Retfw or Code.Retfw_imm16:
                return Return(in instruction, ref op, 2);
            case Code.Retfd or Code.Retfd_imm16:
                return Return(in instruction, ref op, 4);
            case Code.Retfq or Code.Retfq_imm16:
                return Return(in instruction, ref op, 8);
            case Code.Iretw:
                return Sized(ref op, &TransferHandlers.InterruptReturn, 2);
            case Code.Iretd:
                return Sized(ref op, &TransferHandlers.InterruptReturn, 4);
            case Code.Iretq:
                return Sized(ref op, &TransferHandlers.InterruptReturn, 8);
            case Code.Int_imm8:
                op.Imm = instruction.Immediate8;
                return End(ref op, &TransferHandlers.Interrupt);
            case Code.Int3:
                return End(ref op, &TransferHandlers.Int3);
            case Code.Int1:
                return End(ref op, &TransferHandlers.Int1);
            case Code.Into:
                op.Handler = &TransferHandlers.IntO;
                return Lowered.Next;
            case Code.Bound_r16_m1616:
                return Bound(in instruction, ref op, in context, &TransferHandlers.Bound<W16>);
            case Code.Bound_r32_m3232:
                return Bound(in instruction, ref op, in context, &TransferHandlers.Bound<W32>);
            case Code.Syscall:
                return End(ref op, &FastSystemCalls.Syscall);
            case Code.Sysretd:
                return End(ref op, &FastSystemCalls.Sysret32);
            case Code.Sysretq:
                return End(ref op, &FastSystemCalls.Sysret64);
            case Code.Sysenter:
                return End(ref op, &FastSystemCalls.Sysenter);
            case Code.Sysexitd:
                return End(ref op, &FastSystemCalls.Sysexit32);
            case Code.Sysexitq:
                return End(ref op, &FastSystemCalls.Sysexit64);
            default:
                return Lowered.No;
        }
    }

    private static Lowered End(ref Op op, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        op.Handler = handler;
        return Lowered.End;
    }

    private static Lowered Sized(ref Op op, delegate*<VcpuBlock*, Op*, Op*> handler, int size)
    {
        SystemLowering.SetSize(ref op, size);
        return End(ref op, handler);
    }

    private static Lowered Direct(ref Op op, delegate*<VcpuBlock*, Op*, Op*> handler, ushort selector, uint offset, int size)
    {
        op.Aux = selector;
        op.Imm = offset;
        return Sized(ref op, handler, size);
    }

    private static Lowered Indirect(in Instruction instruction, ref Op op, in LoweringContext context, delegate*<VcpuBlock*, Op*, Op*> handler, int size)
    {
        Operands.Memory(in instruction, ref op, in context);
        return Sized(ref op, handler, size);
    }

    private static Lowered Return(in Instruction instruction, ref Op op, int size)
    {
        op.Imm = instruction.OpCount > 0 ? instruction.Immediate16 : 0;
        return Sized(ref op, &TransferHandlers.ReturnFar, size);
    }

    private static Lowered Bound(in Instruction instruction, ref Op op, in LoweringContext context, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        Operands.Memory(in instruction, ref op, in context);
        op.Handler = handler;
        return Lowered.Next;
    }
}
