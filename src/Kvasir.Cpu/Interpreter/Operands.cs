using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Turns Iced's operands into an operation's fields.</summary>
public static class Operands
{
    /// <summary>No base, no index, the flat segment.</summary>
    public static void Defaults(ref Op op)
    {
        op.Base = VcpuBlock.ZeroOffset;
        op.Index = VcpuBlock.ZeroOffset;
        op.Seg = 6;
    }

    /// <summary>Byte offset of a general register in <see cref="VcpuBlock"/>; AH, CH, DH and BH are one byte on.</summary>
    public static byte Register(Register register) => register switch
    {
        >= Iced.Intel.Register.AL and <= Iced.Intel.Register.BL => (byte)((register - Iced.Intel.Register.AL) * 8),
        >= Iced.Intel.Register.AH and <= Iced.Intel.Register.BH => (byte)((register - Iced.Intel.Register.AH) * 8 + 1),
        >= Iced.Intel.Register.SPL and <= Iced.Intel.Register.R15L => (byte)((register - Iced.Intel.Register.SPL + 4) * 8),
        >= Iced.Intel.Register.AX and <= Iced.Intel.Register.R15W => (byte)((register - Iced.Intel.Register.AX) * 8),
        >= Iced.Intel.Register.EAX and <= Iced.Intel.Register.R15D => (byte)((register - Iced.Intel.Register.EAX) * 8),
        >= Iced.Intel.Register.RAX and <= Iced.Intel.Register.R15 => (byte)((register - Iced.Intel.Register.RAX) * 8),
        _ => throw new ArgumentOutOfRangeException(nameof(register), register, "not a general register"),
    };

    /// <summary>Segment number in encoding order (ES 0, CS 1, SS 2, DS 3, FS 4, GS 5).</summary>
    public static byte Segment(Register register) => register switch
    {
        Iced.Intel.Register.ES => 0,
        Iced.Intel.Register.CS => 1,
        Iced.Intel.Register.SS => 2,
        Iced.Intel.Register.DS => 3,
        Iced.Intel.Register.FS => 4,
        Iced.Intel.Register.GS => 5,
        _ => throw new ArgumentOutOfRangeException(nameof(register), register, "not a segment register"),
    };

    /// <summary>Sets segment, base, index, scale, displacement and address kind from the instruction's memory operand.</summary>
    public static void Memory(in Instruction instruction, ref Op op, in LoweringContext context)
    {
        Register baseRegister = instruction.MemoryBase;
        Register index = instruction.MemoryIndex;
        ulong displacement = instruction.MemoryDisplacement64;
        int addressBytes = AddressBytes(in instruction, context.Is64);
        if (baseRegister is Iced.Intel.Register.RIP or Iced.Intel.Register.EIP)
        {
            // Iced has made it absolute from the RIP it decoded at.
            op.Base = VcpuBlock.BlockRipOffset;
            op.Disp = (long)(displacement - context.BlockRip);
        }
        else
        {
            op.Base = baseRegister == Iced.Intel.Register.None ? VcpuBlock.ZeroOffset : Register(baseRegister);
            op.Disp = (long)displacement;
        }
        op.Index = index == Iced.Intel.Register.None || IsVector(index) ? VcpuBlock.ZeroOffset : Register(index);
        op.Scale = (byte)System.Numerics.BitOperations.Log2((uint)instruction.MemoryIndexScale);
        SetSegment(SegmentOf(in instruction, context.Is64), ref op, context.Is64);
        op.Address = Kind(addressBytes, context.Is64);
        op.Flags |= (ushort)(System.Numerics.BitOperations.Log2((uint)addressBytes) << OpFlags.AddressShift);
    }

    /// <summary>The memory operand's segment. In 64-bit mode only the prefixes of FS and GS count (Intel SDM vol. 1, "Segmentation in 64-Bit Mode").</summary>
    public static Register SegmentOf(in Instruction instruction, bool is64)
    {
        if (!is64)
            return instruction.MemorySegment;
        if (instruction.SegmentPrefix is Iced.Intel.Register.FS or Iced.Intel.Register.GS)
            return instruction.SegmentPrefix;
        return instruction.MemoryBase is Iced.Intel.Register.RSP or Iced.Intel.Register.ESP or Iced.Intel.Register.RBP or Iced.Intel.Register.EBP
            ? Iced.Intel.Register.SS
            : Iced.Intel.Register.DS;
    }

    /// <summary>Sets the segment of a memory operand: in 64-bit mode only FS and GS have a base.</summary>
    public static void SetSegment(Register segment, ref Op op, bool is64)
    {
        byte number = Segment(segment);
        if (number == 2)
            op.Flags |= OpFlags.StackSegment;
        op.Seg = is64 && number < 4 ? (byte)6 : number;
    }

    /// <summary>Address size of the memory operand in bytes: 2, 4 or 8.</summary>
    public static int AddressBytes(in Instruction instruction, bool is64)
    {
        Register any = instruction.MemoryBase != Iced.Intel.Register.None ? instruction.MemoryBase : instruction.MemoryIndex;
        if (IsVector(any))
            any = Iced.Intel.Register.None;
        int size = any switch
        {
            Iced.Intel.Register.RIP => 8,
            Iced.Intel.Register.EIP => 4,
            Iced.Intel.Register.None => instruction.MemoryDisplSize switch
            {
                2 => 2,
                8 => 8,
                _ => 4,
            },
            >= Iced.Intel.Register.AX and <= Iced.Intel.Register.R15W => 2,
            >= Iced.Intel.Register.EAX and <= Iced.Intel.Register.R15D => 4,
            _ => 8,
        };
        return size;
    }

    /// <summary>The address kind of a given address size.</summary>
    public static AddressKind Kind(int addressBytes, bool is64) => addressBytes switch
    {
        8 => AddressKind.Long,
        4 => is64 ? AddressKind.Long32 : AddressKind.Legacy32,
        _ => AddressKind.Legacy16,
    };

    private static bool IsVector(Register register) => register is >= Iced.Intel.Register.XMM0 and <= Iced.Intel.Register.ZMM31;
}
