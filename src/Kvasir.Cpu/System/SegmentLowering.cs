using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers loads and stores of segment registers and descriptor tables.</summary>
internal static unsafe class SegmentLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Mov:
                return Move(in instruction, ref op, in context);
            case Mnemonic.Push when instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsSegmentRegister():
                op.Aux = Operands.Segment(instruction.Op0Register);
                op.Handler = instruction.StackPointerIncrement switch
                {
                    -2 => &SegmentHandlers.Push<W16>,
                    -4 => &SegmentHandlers.Push<W32>,
                    _ => &SegmentHandlers.Push<W64>,
                };
                return Lowered.Next;
            case Mnemonic.Pop when instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsSegmentRegister():
                op.Aux = Operands.Segment(instruction.Op0Register);
                op.Handler = instruction.StackPointerIncrement switch
                {
                    2 => &SegmentHandlers.Pop<W16>,
                    4 => &SegmentHandlers.Pop<W32>,
                    _ => &SegmentHandlers.Pop<W64>,
                };
                return EndIfStack(op.Aux);
            case Mnemonic.Les:
                return FarPointer(in instruction, ref op, in context, SegmentLoads.Es);
            case Mnemonic.Lss:
                return FarPointer(in instruction, ref op, in context, SegmentLoads.Ss);
            case Mnemonic.Lds:
                return FarPointer(in instruction, ref op, in context, SegmentLoads.Ds);
            case Mnemonic.Lfs:
                return FarPointer(in instruction, ref op, in context, SegmentLoads.Fs);
            case Mnemonic.Lgs:
                return FarPointer(in instruction, ref op, in context, SegmentLoads.Gs);
            case Mnemonic.Lar:
                return Examine(in instruction, ref op, in context, &SelectorHandlers.LoadAccessRights<W16>, &SelectorHandlers.LoadAccessRights<W32>, &SelectorHandlers.LoadAccessRights<W64>);
            case Mnemonic.Lsl:
                return Examine(in instruction, ref op, in context, &SelectorHandlers.LoadSegmentLimit<W16>, &SelectorHandlers.LoadSegmentLimit<W32>, &SelectorHandlers.LoadSegmentLimit<W64>);
            case Mnemonic.Verr:
                return SelectorOperand(in instruction, ref op, in context, &SelectorHandlers.VerifyRead, Lowered.Next);
            case Mnemonic.Verw:
                return SelectorOperand(in instruction, ref op, in context, &SelectorHandlers.VerifyWrite, Lowered.Next);
            case Mnemonic.Arpl:
                return Arpl(in instruction, ref op, in context);
            case Mnemonic.Lldt:
                return SelectorOperand(in instruction, ref op, in context, &TableHandlers.LoadLdt, Lowered.Next);
            case Mnemonic.Ltr:
                return SelectorOperand(in instruction, ref op, in context, &TableHandlers.LoadTask, Lowered.Next);
            case Mnemonic.Lmsw:
                return SelectorOperand(in instruction, ref op, in context, &TableHandlers.LoadStatus, Lowered.End);
            case Mnemonic.Sldt:
                return Store(in instruction, ref op, in context, &TableHandlers.StoreLdtMemory,
                    &TableHandlers.StoreLdtRegister<W16>, &TableHandlers.StoreLdtRegister<W32>, &TableHandlers.StoreLdtRegister<W64>);
            case Mnemonic.Str:
                return Store(in instruction, ref op, in context, &TableHandlers.StoreTaskMemory,
                    &TableHandlers.StoreTaskRegister<W16>, &TableHandlers.StoreTaskRegister<W32>, &TableHandlers.StoreTaskRegister<W64>);
            case Mnemonic.Smsw:
                return Store(in instruction, ref op, in context, &TableHandlers.StoreStatusMemory,
                    &TableHandlers.StoreStatusRegister<W16>, &TableHandlers.StoreStatusRegister<W32>, &TableHandlers.StoreStatusRegister<W64>);
            case Mnemonic.Sgdt:
                return Table(in instruction, ref op, in context, &TableHandlers.StoreGdt);
            case Mnemonic.Sidt:
                return Table(in instruction, ref op, in context, &TableHandlers.StoreIdt);
            case Mnemonic.Lgdt:
                return Table(in instruction, ref op, in context, &TableHandlers.LoadGdt);
            case Mnemonic.Lidt:
                return Table(in instruction, ref op, in context, &TableHandlers.LoadIdt);
            case Mnemonic.Swapgs:
                op.Handler = &SegmentHandlers.SwapGs;
                return Lowered.Next;
            case Mnemonic.Rdfsbase:
                return Base(in instruction, ref op, SegmentLoads.Fs, &SegmentHandlers.ReadBase<W32>, &SegmentHandlers.ReadBase<W64>);
            case Mnemonic.Rdgsbase:
                return Base(in instruction, ref op, SegmentLoads.Gs, &SegmentHandlers.ReadBase<W32>, &SegmentHandlers.ReadBase<W64>);
            case Mnemonic.Wrfsbase:
                return Base(in instruction, ref op, SegmentLoads.Fs, &SegmentHandlers.WriteBase<W32>, &SegmentHandlers.WriteBase<W64>);
            case Mnemonic.Wrgsbase:
                return Base(in instruction, ref op, SegmentLoads.Gs, &SegmentHandlers.WriteBase<W32>, &SegmentHandlers.WriteBase<W64>);
            default:
                return Lowered.No;
        }
    }

    private static Lowered EndIfStack(int segment) => segment == SegmentLoads.Ss ? Lowered.End : Lowered.Next;

    private static Lowered Move(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (instruction.Op1Kind == OpKind.Register && instruction.Op1Register.IsSegmentRegister())
        {
            op.Aux = Operands.Segment(instruction.Op1Register);
            if (instruction.Op0Kind != OpKind.Register)
            {
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = &SegmentHandlers.MoveToMemory;
                return Lowered.Next;
            }
            op.R0 = Operands.Register(instruction.Op0Register);
            op.Handler = SystemLowering.RegisterBytes(instruction.Op0Register) switch
            {
                2 => &SegmentHandlers.MoveToRegister<W16>,
                4 => &SegmentHandlers.MoveToRegister<W32>,
                _ => &SegmentHandlers.MoveToRegister<W64>,
            };
            return Lowered.Next;
        }
        if (instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsSegmentRegister())
        {
            op.Aux = Operands.Segment(instruction.Op0Register);
            if (instruction.Op1Kind == OpKind.Register)
            {
                op.R0 = Operands.Register(instruction.Op1Register);
                op.Handler = &SegmentHandlers.LoadFromRegister;
            }
            else
            {
                Operands.Memory(in instruction, ref op, in context);
                op.Handler = &SegmentHandlers.LoadFromMemory;
            }
            return EndIfStack(op.Aux);
        }
        return ProcessorLowering.MoveControl(in instruction, ref op);
    }

    private static Lowered FarPointer(in Instruction instruction, ref Op op, in LoweringContext context, int segment)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        op.Aux = (ushort)segment;
        Operands.Memory(in instruction, ref op, in context);
        op.Handler = SystemLowering.RegisterBytes(instruction.Op0Register) switch
        {
            2 => &SegmentHandlers.LoadFarPointer<W16>,
            4 => &SegmentHandlers.LoadFarPointer<W32>,
            _ => &SegmentHandlers.LoadFarPointer<W64>,
        };
        return EndIfStack(segment);
    }

    private static Lowered Examine(
        in Instruction instruction, ref Op op, in LoweringContext context,
        delegate*<VcpuBlock*, Op*, Op*> w16, delegate*<VcpuBlock*, Op*, Op*> w32, delegate*<VcpuBlock*, Op*, Op*> w64)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        SystemLowering.Selector(in instruction, 1, ref op, in context);
        op.Handler = SystemLowering.RegisterBytes(instruction.Op0Register) switch
        {
            2 => w16,
            4 => w32,
            _ => w64,
        };
        return Lowered.Next;
    }

    private static Lowered SelectorOperand(
        in Instruction instruction, ref Op op, in LoweringContext context, delegate*<VcpuBlock*, Op*, Op*> handler, Lowered result)
    {
        SystemLowering.Selector(in instruction, 0, ref op, in context);
        op.Handler = handler;
        return result;
    }

    private static Lowered Arpl(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        op.R1 = Operands.Register(instruction.Op1Register);
        if (instruction.Op0Kind == OpKind.Register)
        {
            op.R0 = Operands.Register(instruction.Op0Register);
        }
        else
        {
            op.Aux = SelectorHandlers.Memory;
            Operands.Memory(in instruction, ref op, in context);
        }
        op.Handler = &SelectorHandlers.AdjustRpl;
        return Lowered.Next;
    }

    private static Lowered Store(
        in Instruction instruction, ref Op op, in LoweringContext context, delegate*<VcpuBlock*, Op*, Op*> memory,
        delegate*<VcpuBlock*, Op*, Op*> w16, delegate*<VcpuBlock*, Op*, Op*> w32, delegate*<VcpuBlock*, Op*, Op*> w64)
    {
        if (instruction.Op0Kind != OpKind.Register)
        {
            Operands.Memory(in instruction, ref op, in context);
            op.Handler = memory;
            return Lowered.Next;
        }
        op.R0 = Operands.Register(instruction.Op0Register);
        op.Handler = SystemLowering.RegisterBytes(instruction.Op0Register) switch
        {
            2 => w16,
            4 => w32,
            _ => w64,
        };
        return Lowered.Next;
    }

    private static Lowered Table(in Instruction instruction, ref Op op, in LoweringContext context, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        Operands.Memory(in instruction, ref op, in context);
        bool narrow = instruction.Code is Code.Lgdt_m1632_16 or Code.Lidt_m1632_16;
        SystemLowering.SetSize(ref op, narrow ? 2 : 4);
        op.Handler = handler;
        return Lowered.Next;
    }

    private static Lowered Base(
        in Instruction instruction, ref Op op, int segment, delegate*<VcpuBlock*, Op*, Op*> w32, delegate*<VcpuBlock*, Op*, Op*> w64)
    {
        op.R0 = Operands.Register(instruction.Op0Register);
        op.Aux = (ushort)segment;
        op.Handler = SystemLowering.RegisterBytes(instruction.Op0Register) == 4 ? w32 : w64;
        return Lowered.Next;
    }
}
