using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Lowers MOVS, STOS, LODS, CMPS and SCAS.</summary>
public static unsafe class StringLowering
{
    public static Lowered Lower(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        int size = instruction.Code switch
        {
            Code.Movsb_m8_m8 or Code.Stosb_m8_AL or Code.Lodsb_AL_m8 or Code.Cmpsb_m8_m8 or Code.Scasb_AL_m8 => 1,
            Code.Movsw_m16_m16 or Code.Stosw_m16_AX or Code.Lodsw_AX_m16 or Code.Cmpsw_m16_m16 or Code.Scasw_AX_m16 => 2,
            Code.Movsd_m32_m32 or Code.Stosd_m32_EAX or Code.Lodsd_EAX_m32 or Code.Cmpsd_m32_m32 or Code.Scasd_EAX_m32 => 4,
            Code.Movsq_m64_m64 or Code.Stosq_m64_RAX or Code.Lodsq_RAX_m64 or Code.Cmpsq_m64_m64 or Code.Scasq_RAX_m64 => 8,
            _ => 0,
        };
        if (size == 0)
            return Lowered.No;
        if (instruction.HasRepePrefix)
            op.Flags |= OpFlags.Rep;
        if (instruction.HasRepnePrefix)
            op.Flags |= instruction.Mnemonic is Mnemonic.Cmpsb or Mnemonic.Cmpsw or Mnemonic.Cmpsd or Mnemonic.Cmpsq or Mnemonic.Scasb or Mnemonic.Scasw or Mnemonic.Scasd or Mnemonic.Scasq ? OpFlags.Repne : OpFlags.Rep;
        int addressBytes = 8;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            switch (instruction.GetOpKind(i))
            {
                case OpKind.MemorySegSI or OpKind.MemoryESDI:
                    addressBytes = 2;
                    break;
                case OpKind.MemorySegESI or OpKind.MemoryESEDI:
                    addressBytes = 4;
                    break;
                default:
                    break;
            }
            if (instruction.GetOpKind(i) is OpKind.MemorySegSI or OpKind.MemorySegESI or OpKind.MemorySegRSI)
                Operands.SetSegment(Operands.SegmentOf(in instruction, context.Is64), ref op, context.Is64);
        }
        op.Address = Operands.Kind(addressBytes, context.Is64);
        op.Handler = instruction.Mnemonic switch
        {
            Mnemonic.Movsb or Mnemonic.Movsw or Mnemonic.Movsd or Mnemonic.Movsq => addressBytes switch
            {
                2 => IntegerLowering.Pick(size, &Strings.Move<W8, W16>, &Strings.Move<W16, W16>, &Strings.Move<W32, W16>, &Strings.Move<W64, W16>),
                4 => IntegerLowering.Pick(size, &Strings.Move<W8, W32>, &Strings.Move<W16, W32>, &Strings.Move<W32, W32>, &Strings.Move<W64, W32>),
                _ => IntegerLowering.Pick(size, &Strings.Move<W8, W64>, &Strings.Move<W16, W64>, &Strings.Move<W32, W64>, &Strings.Move<W64, W64>),
            },
            Mnemonic.Stosb or Mnemonic.Stosw or Mnemonic.Stosd or Mnemonic.Stosq => addressBytes switch
            {
                2 => IntegerLowering.Pick(size, &Strings.Store<W8, W16>, &Strings.Store<W16, W16>, &Strings.Store<W32, W16>, &Strings.Store<W64, W16>),
                4 => IntegerLowering.Pick(size, &Strings.Store<W8, W32>, &Strings.Store<W16, W32>, &Strings.Store<W32, W32>, &Strings.Store<W64, W32>),
                _ => IntegerLowering.Pick(size, &Strings.Store<W8, W64>, &Strings.Store<W16, W64>, &Strings.Store<W32, W64>, &Strings.Store<W64, W64>),
            },
            Mnemonic.Lodsb or Mnemonic.Lodsw or Mnemonic.Lodsd or Mnemonic.Lodsq => addressBytes switch
            {
                2 => IntegerLowering.Pick(size, &Strings.Load<W8, W16>, &Strings.Load<W16, W16>, &Strings.Load<W32, W16>, &Strings.Load<W64, W16>),
                4 => IntegerLowering.Pick(size, &Strings.Load<W8, W32>, &Strings.Load<W16, W32>, &Strings.Load<W32, W32>, &Strings.Load<W64, W32>),
                _ => IntegerLowering.Pick(size, &Strings.Load<W8, W64>, &Strings.Load<W16, W64>, &Strings.Load<W32, W64>, &Strings.Load<W64, W64>),
            },
            Mnemonic.Cmpsb or Mnemonic.Cmpsw or Mnemonic.Cmpsd or Mnemonic.Cmpsq => addressBytes switch
            {
                2 => IntegerLowering.Pick(size, &Strings.Compare<W8, W16>, &Strings.Compare<W16, W16>, &Strings.Compare<W32, W16>, &Strings.Compare<W64, W16>),
                4 => IntegerLowering.Pick(size, &Strings.Compare<W8, W32>, &Strings.Compare<W16, W32>, &Strings.Compare<W32, W32>, &Strings.Compare<W64, W32>),
                _ => IntegerLowering.Pick(size, &Strings.Compare<W8, W64>, &Strings.Compare<W16, W64>, &Strings.Compare<W32, W64>, &Strings.Compare<W64, W64>),
            },
            Mnemonic.Scasb or Mnemonic.Scasw or Mnemonic.Scasd or Mnemonic.Scasq => addressBytes switch
            {
                2 => IntegerLowering.Pick(size, &Strings.Scan<W8, W16>, &Strings.Scan<W16, W16>, &Strings.Scan<W32, W16>, &Strings.Scan<W64, W16>),
                4 => IntegerLowering.Pick(size, &Strings.Scan<W8, W32>, &Strings.Scan<W16, W32>, &Strings.Scan<W32, W32>, &Strings.Scan<W64, W32>),
                _ => IntegerLowering.Pick(size, &Strings.Scan<W8, W64>, &Strings.Scan<W16, W64>, &Strings.Scan<W32, W64>, &Strings.Scan<W64, W64>),
            },
            _ => &Faulting.InvalidOpcode,
        };
        return Lowered.Next;
    }
}
