using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers control and debug registers, flags, MSRs, counters, caches and what this processor does not have.</summary>
internal static unsafe class ProcessorLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Cli:
                return Next(ref op, &FlagHandlers.ClearInterrupts);
            case Mnemonic.Sti:
                return Next(ref op, &FlagHandlers.SetInterrupts);
            case Mnemonic.Hlt:
                return End(ref op, &FlagHandlers.Halt);
            case Mnemonic.Clac:
                return Next(ref op, &FlagHandlers.ClearAccessControl);
            case Mnemonic.Stac:
                return Next(ref op, &FlagHandlers.SetAccessControl);
            case Mnemonic.Pushf:
                return Next(ref op, &FlagHandlers.Push<W16>);
            case Mnemonic.Pushfd:
                return Next(ref op, &FlagHandlers.Push<W32>);
            case Mnemonic.Pushfq:
                return Next(ref op, &FlagHandlers.Push<W64>);
            case Mnemonic.Popf:
                return Next(ref op, &FlagHandlers.Pop<W16>);
            case Mnemonic.Popfd:
                return Next(ref op, &FlagHandlers.Pop<W32>);
            case Mnemonic.Popfq:
                return Next(ref op, &FlagHandlers.Pop<W64>);
            case Mnemonic.Clts:
                return Next(ref op, &ControlHandlers.ClearTaskSwitched);
            case Mnemonic.Invlpg:
                Operands.Memory(in instruction, ref op, in context);
                return End(ref op, &ControlHandlers.InvalidatePage);
            case Mnemonic.Invpcid:
                op.R0 = Operands.Register(instruction.Op0Register);
                Operands.Memory(in instruction, ref op, in context);
                return End(ref op, &ControlHandlers.InvalidatePcid);
            case Mnemonic.Wbinvd or Mnemonic.Invd or Mnemonic.Wbnoinvd:
                return Next(ref op, &ProcessorHandlers.NothingPrivileged);
            case Mnemonic.Cpuid:
                return Next(ref op, &ProcessorHandlers.Cpuid);
            case Mnemonic.Rdmsr:
                return Next(ref op, &ProcessorHandlers.ReadMsr);
            case Mnemonic.Wrmsr:
                return Next(ref op, &ProcessorHandlers.WriteMsr);
            case Mnemonic.Rdtsc:
                return Next(ref op, &ProcessorHandlers.ReadTimeStamp);
            case Mnemonic.Rdtscp:
                return Next(ref op, &ProcessorHandlers.ReadTimeStampAndProcessor);
            case Mnemonic.Rdpid:
                op.R0 = Operands.Register(instruction.Op0Register);
                return Next(ref op, &ProcessorHandlers.ReadProcessorId);
            case Mnemonic.Rdpmc:
                return End(ref op, &ProcessorHandlers.ReadPerformanceCounter);
            case Mnemonic.Rdrand:
                return Random(in instruction, ref op, &ProcessorHandlers.Random<W16>, &ProcessorHandlers.Random<W32>, &ProcessorHandlers.Random<W64>);
            case Mnemonic.Rdseed:
                return Random(in instruction, ref op, &ProcessorHandlers.Seed<W16>, &ProcessorHandlers.Seed<W32>, &ProcessorHandlers.Seed<W64>);
            case Mnemonic.Ud0 or Mnemonic.Ud1 or Mnemonic.Ud2 or Mnemonic.Rsm or Mnemonic.Monitor or Mnemonic.Mwait or Mnemonic.Monitorx or Mnemonic.Mwaitx:
                return End(ref op, &ProcessorHandlers.InvalidOpcode);
            default:
                // Virtualization extensions and all else that is not offered end up as #UD, like bytes that are no instruction.
                return Lowered.No;
        }
    }

    /// <summary>MOV with a control or debug register.</summary>
    public static Lowered MoveControl(in Instruction instruction, ref Op op)
    {
        if (instruction.Op0Kind != OpKind.Register || instruction.Op1Kind != OpKind.Register)
            return Lowered.No;
        Register destination = instruction.Op0Register;
        Register source = instruction.Op1Register;
        if (destination.IsCR() && TryControl(destination, ref op, source))
            return Next(ref op, &ControlHandlers.WriteControl);
        if (source.IsCR() && TryControl(source, ref op, destination))
            return Next(ref op, &ControlHandlers.ReadControl);
        if (destination is >= Register.DR0 and <= Register.DR7)
        {
            op.Aux = (ushort)(destination - Register.DR0);
            op.R0 = Operands.Register(source);
            return End(ref op, &ControlHandlers.WriteDebug);
        }
        if (source is >= Register.DR0 and <= Register.DR7)
        {
            op.Aux = (ushort)(source - Register.DR0);
            op.R0 = Operands.Register(destination);
            return Next(ref op, &ControlHandlers.ReadDebug);
        }
        return Lowered.No;
    }

    private static bool TryControl(Register control, ref Op op, Register general)
    {
        int number = control - Register.CR0;
        if (number is not (0 or 2 or 3 or 4 or 8))
            return false;
        op.Aux = (ushort)number;
        op.R0 = Operands.Register(general);
        return true;
    }

    private static Lowered Next(ref Op op, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        op.Handler = handler;
        return Lowered.Next;
    }

    private static Lowered End(ref Op op, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        op.Handler = handler;
        return Lowered.End;
    }

    private static Lowered Random(
        in Instruction instruction, ref Op op,
        delegate*<VcpuBlock*, Op*, Op*> w16, delegate*<VcpuBlock*, Op*, Op*> w32, delegate*<VcpuBlock*, Op*, Op*> w64)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        return Next(ref op, SystemLowering.RegisterBytes(instruction.Op0Register) switch
        {
            2 => w16,
            4 => w32,
            _ => w64,
        });
    }
}
