using System.Numerics;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Instructions that access memory element by element: masked moves and gathers.</summary>
internal static unsafe class ElementLowering
{
    public static bool Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Vmaskmovps or Mnemonic.Vpmaskmovd:
                return LowerMasked<W32>(in instruction, ref op, in context);
            case Mnemonic.Vmaskmovpd or Mnemonic.Vpmaskmovq:
                return LowerMasked<W64>(in instruction, ref op, in context);
            case Mnemonic.Maskmovq or Mnemonic.Maskmovdqu or Mnemonic.Vmaskmovdqu:
                return LowerBytes(in instruction, ref op, in context);
            case Mnemonic.Vpgatherdd or Mnemonic.Vgatherdps:
                return LowerGather(in instruction, ref op, in context, 4, 4, &Gathers.Gather<W32, W32>);
            case Mnemonic.Vpgatherdq or Mnemonic.Vgatherdpd:
                return LowerGather(in instruction, ref op, in context, 8, 4, &Gathers.Gather<W64, W32>);
            case Mnemonic.Vpgatherqd or Mnemonic.Vgatherqps:
                return LowerGather(in instruction, ref op, in context, 4, 8, &Gathers.Gather<W32, W64>);
            case Mnemonic.Vpgatherqq or Mnemonic.Vgatherqpd:
                return LowerGather(in instruction, ref op, in context, 8, 8, &Gathers.Gather<W64, W64>);
            default:
                return false;
        }
    }

    private static bool LowerMasked<TElement>(in Instruction instruction, ref Op op, in LoweringContext context)
        where TElement : struct, IWidth
    {
        Operands.Memory(in instruction, ref op, in context);
        op.R1 = HostForm.Place(instruction.Op1Register);
        bool load = instruction.Op0Kind == OpKind.Register;
        int size = instruction.Op1Register.GetSize();
        if (load)
        {
            op.R0 = HostForm.Place(instruction.Op0Register);
            op.Handler = &MaskedMoves.Load<TElement>;
        }
        else
        {
            op.Aux = HostForm.Place(instruction.Op2Register);
            op.Handler = &MaskedMoves.Store<TElement>;
        }
        op.Flags &= OpFlags.StackSegment;
        op.Flags |= (ushort)(BitOperations.Log2((uint)size) << OpFlags.SizeShift);
        return true;
    }

    /// <summary>The memory operand is implicit: DS (or another segment) and the address-size part of RDI.</summary>
    private static bool LowerBytes(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        const byte rdi = 7 * 8;
        op.R1 = HostForm.Place(instruction.Op1Register);
        op.Aux = HostForm.Place(instruction.Op2Register);
        op.Base = rdi;
        int addressBytes = instruction.Op0Kind switch
        {
            OpKind.MemorySegDI => 2,
            OpKind.MemorySegEDI => 4,
            _ => 8,
        };
        op.Address = Operands.Kind(addressBytes, context.Is64);
        Operands.SetSegment(Operands.SegmentOf(in instruction, context.Is64), ref op, context.Is64);
        if (instruction.Mnemonic == Mnemonic.Maskmovq)
            op.Handler = &MaskedMoves.StoreMmxBytes;
        else if (instruction.Mnemonic == Mnemonic.Maskmovdqu)
            op.Handler = &MaskedMoves.StoreBytes<SseGate>;
        else
            op.Handler = &MaskedMoves.StoreBytes<AvxGate>;
        return true;
    }

    private static bool LowerGather(
        in Instruction instruction, ref Op op, in LoweringContext context, int elementBytes, int indexBytes, delegate*<VcpuBlock*, Op*, Op*> handler)
    {
        Operands.Memory(in instruction, ref op, in context);
        int destinationBytes = instruction.Op0Register.GetSize();
        int indexRegisterBytes = instruction.MemoryIndex.GetSize();
        op.R0 = HostForm.Place(instruction.Op0Register);
        op.R1 = (byte)destinationBytes;
        op.Aux = (ushort)(HostForm.Place(instruction.MemoryIndex) | HostForm.Place(instruction.Op2Register) << 8);
        op.Imm = System.Math.Min(destinationBytes / elementBytes, indexRegisterBytes / indexBytes);
        op.Flags &= OpFlags.StackSegment;
        op.Handler = handler;
        return true;
    }
}
