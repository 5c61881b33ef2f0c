using System.Numerics;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Chooses the handler of an instruction on vector, MMX or general registers that runs as the host's own.</summary>
internal static unsafe class SimdLowering
{
    private enum Form
    {
        Registers,
        Load,
        LoadAligned,
        Store,
        StoreAligned,
    }

    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        if (ElementLowering.Lower(in instruction, ref op, in context))
            return Lowered.Next;
        Traits traits = ThunkTraits.Of(in instruction);
        if ((traits & (Traits.Vector | Traits.Mmx)) == 0 && !GeneralMnemonic(instruction.Mnemonic))
            return Lowered.No;
        Instruction host = HostForm.Of(in instruction);
        if (!ThunkCache.TryGet(in host, out nint thunk))
            return Lowered.No;
        op.Imm = thunk;
        Form form = PlaceOperands(in instruction, ref op, in context);
        op.Handler = (traits & Traits.Mmx) != 0 ? MmxHandler(traits, form)
            : (traits & Traits.Vector) == 0 ? GeneralHandler(traits, form)
            : instruction.Encoding == EncodingKind.VEX ? AvxHandler(traits, form)
            : SseHandler(traits, form);
        return op.Handler == null ? Lowered.No : Lowered.Next;
    }

    /// <summary>Sets registers and memory operand, and tells where the operands lie.</summary>
    private static Form PlaceOperands(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int memory = -1;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            switch (instruction.GetOpKind(i))
            {
                case OpKind.Register:
                    SetPlace(ref op, i, HostForm.Place(instruction.GetOpRegister(i)));
                    break;
                case OpKind.Memory:
                    memory = i;
                    break;
                default:
                    break;
            }
        }
        if (memory >= 0)
            Operands.Memory(in instruction, ref op, in context);
        int size = memory >= 0 ? instruction.MemorySize.GetSize() : 1;
        op.Flags &= OpFlags.StackSegment;
        op.Flags |= (ushort)(BitOperations.Log2((uint)size) << OpFlags.SizeShift);
        op.Flags |= TinyResults.KindOf(instruction.Mnemonic);
        if (instruction.Encoding == EncodingKind.VEX)
            op.Flags |= Thunks.Vex;
        if (memory < 0)
            return Form.Registers;
        bool aligned = MustAlign(in instruction, size, out bool strict);
        if (strict)
            op.Flags |= Thunks.Strict;
        // The first operand is the destination of everything but comparisons, whose first operand is no memory.
        if (memory == 0)
            return aligned ? Form.StoreAligned : Form.Store;
        return aligned ? Form.LoadAligned : Form.Load;
    }

    private static void SetPlace(ref Op op, int operand, byte place)
    {
        switch (operand)
        {
            case 0:
                op.R0 = place;
                break;
            case 1:
                op.R1 = place;
                break;
            case 2:
                op.Aux |= place;
                break;
            default:
                op.Aux |= (ushort)(place << 8);
                break;
        }
    }

    /// <summary>Whether a misaligned memory operand raises #GP (Intel SDM vol. 2, exception types 1, 2 and 4).</summary>
    /// <param name="strict">A move: it does so even in AMD's misaligned SSE mode.</param>
    internal static bool MustAlign(in Instruction instruction, int size, out bool strict)
    {
        strict = instruction.Mnemonic is Mnemonic.Movaps or Mnemonic.Movapd or Mnemonic.Movdqa or Mnemonic.Movntps or Mnemonic.Movntpd or Mnemonic.Movntdq
            or Mnemonic.Movntdqa or Mnemonic.Vmovaps or Mnemonic.Vmovapd or Mnemonic.Vmovdqa or Mnemonic.Vmovntps or Mnemonic.Vmovntpd or Mnemonic.Vmovntdq
            or Mnemonic.Vmovntdqa;
        if (strict)
            return true;
        if (size < 16 || instruction.Encoding == EncodingKind.VEX)
            return false;
        // Seen on AMD processors: the SHA extensions take misaligned operands, unlike other legacy instructions.
        if (HostFeatures.IsAmd && instruction.CpuidFeatures[0] == CpuidFeature.SHA)
            return false;
        return instruction.Mnemonic is not (Mnemonic.Movups or Mnemonic.Movupd or Mnemonic.Movdqu or Mnemonic.Lddqu or Mnemonic.Pcmpestri or Mnemonic.Pcmpestri64
            or Mnemonic.Pcmpestrm or Mnemonic.Pcmpestrm64 or Mnemonic.Pcmpistri or Mnemonic.Pcmpistrm);
    }

    private static delegate*<VcpuBlock*, Op*, Op*> SseHandler(Traits traits, Form form)
    {
        bool flags = (traits & Traits.FlagsOut) != 0;
        if ((traits & Traits.Mxcsr) != 0)
        {
            if (flags)
                return form == Form.Registers ? &SimdHandlers.Registers<SseGate, FloatComparison> : &SimdHandlers.Load<SseGate, FloatComparison>;
            return form switch
            {
                Form.Registers => &SimdHandlers.Registers<SseGate, FloatArithmetic>,
                Form.Load => &SimdHandlers.Load<SseGate, FloatArithmetic>,
                Form.LoadAligned => &SimdHandlers.LoadAligned<SseGate, FloatArithmetic>,
                _ => null,
            };
        }
        if (flags)
        {
            return form switch
            {
                Form.Registers => &SimdHandlers.Registers<SseGate, SetsFlags>,
                Form.Load => &SimdHandlers.Load<SseGate, SetsFlags>,
                _ => &SimdHandlers.LoadAligned<SseGate, SetsFlags>,
            };
        }
        return form switch
        {
            Form.Registers => &SimdHandlers.Registers<SseGate, Plain>,
            Form.Load => &SimdHandlers.Load<SseGate, Plain>,
            Form.LoadAligned => &SimdHandlers.LoadAligned<SseGate, Plain>,
            Form.Store => &SimdHandlers.Store<SseGate, Plain>,
            _ => &SimdHandlers.StoreAligned<SseGate, Plain>,
        };
    }

    private static delegate*<VcpuBlock*, Op*, Op*> AvxHandler(Traits traits, Form form)
    {
        bool flags = (traits & Traits.FlagsOut) != 0;
        if ((traits & Traits.Mxcsr) != 0)
        {
            if (flags)
                return form == Form.Registers ? &SimdHandlers.Registers<AvxGate, FloatComparison> : &SimdHandlers.Load<AvxGate, FloatComparison>;
            return form switch
            {
                Form.Registers => &SimdHandlers.Registers<AvxGate, FloatArithmetic>,
                Form.Load => &SimdHandlers.Load<AvxGate, FloatArithmetic>,
                Form.Store => &SimdHandlers.StoreComputed<AvxGate, FloatArithmetic>,
                _ => null,
            };
        }
        if (flags)
            return form == Form.Registers ? &SimdHandlers.Registers<AvxGate, SetsFlags> : &SimdHandlers.Load<AvxGate, SetsFlags>;
        return form switch
        {
            Form.Registers => &SimdHandlers.Registers<AvxGate, Plain>,
            Form.Load => &SimdHandlers.Load<AvxGate, Plain>,
            Form.LoadAligned => &SimdHandlers.LoadAligned<AvxGate, Plain>,
            Form.Store => &SimdHandlers.Store<AvxGate, Plain>,
            _ => &SimdHandlers.StoreAligned<AvxGate, Plain>,
        };
    }

    private static delegate*<VcpuBlock*, Op*, Op*> MmxHandler(Traits traits, Form form)
    {
        bool vector = (traits & Traits.Vector) != 0;
        if ((traits & Traits.Mxcsr) != 0)
        {
            return form switch
            {
                Form.Registers => &SimdHandlers.Registers<MmxSseGate, MmxFloatArithmetic>,
                Form.LoadAligned => &SimdHandlers.LoadAligned<MmxSseGate, MmxFloatArithmetic>,
                _ => &SimdHandlers.Load<MmxSseGate, MmxFloatArithmetic>,
            };
        }
        if (vector)
            return form == Form.Registers ? &SimdHandlers.Registers<MmxSseGate, MmxPlain> : &SimdHandlers.Load<MmxSseGate, MmxPlain>;
        return form switch
        {
            Form.Registers => &SimdHandlers.Registers<MmxGate, MmxPlain>,
            Form.Load => &SimdHandlers.Load<MmxGate, MmxPlain>,
            _ => &SimdHandlers.Store<MmxGate, MmxPlain>,
        };
    }

    private static delegate*<VcpuBlock*, Op*, Op*> GeneralHandler(Traits traits, Form form)
    {
        if (form == Form.Store)
            return &SimdHandlers.Store<NoGate, Plain>;
        if ((traits & Traits.FlagsIn) != 0)
            return form == Form.Registers ? &SimdHandlers.Registers<NoGate, ChangesFlags> : &SimdHandlers.Load<NoGate, ChangesFlags>;
        if ((traits & Traits.FlagsOut) != 0)
            return form == Form.Registers ? &SimdHandlers.Registers<NoGate, SetsFlags> : &SimdHandlers.Load<NoGate, SetsFlags>;
        return form == Form.Registers ? &SimdHandlers.Registers<NoGate, Plain> : &SimdHandlers.Load<NoGate, Plain>;
    }

    private static bool GeneralMnemonic(Mnemonic mnemonic) => mnemonic is Mnemonic.Andn or Mnemonic.Bextr or Mnemonic.Blsi or Mnemonic.Blsr or Mnemonic.Blsmsk
        or Mnemonic.Bzhi or Mnemonic.Mulx or Mnemonic.Pdep or Mnemonic.Pext or Mnemonic.Rorx or Mnemonic.Sarx or Mnemonic.Shlx or Mnemonic.Shrx or Mnemonic.Tzcnt
        or Mnemonic.Lzcnt or Mnemonic.Popcnt or Mnemonic.Crc32 or Mnemonic.Movbe;
}
