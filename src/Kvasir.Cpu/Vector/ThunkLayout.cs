using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>Where thunks find things: byte offsets into <see cref="VcpuBlock"/> and <see cref="Op"/>, and the roles of the host's registers.</summary>
internal static unsafe class ThunkLayout
{
    /// <summary>The vCPU's block (first argument of the C calling convention).</summary>
    public const Register State = Register.RDI;

    /// <summary>The memory operand (second argument).</summary>
    public const Register Memory = Register.RSI;

    /// <summary>The operation (third argument, moved out of the way of MULX).</summary>
    public const Register Operation = Register.R11;

    /// <summary>Scratch for a register operand's place.</summary>
    public const Register Place = Register.R10;

    /// <summary>Operand number n uses XMM, YMM or MM register n + 1: number 0 is an implicit operand of some instructions.</summary>
    public const int FirstVector = 1;

    public static readonly int Vector = VectorOffset();
    public static readonly int X87 = X87Offset();
    public static readonly int Mxcsr = MxcsrOffset();
    public static readonly int Flags = FlagsOffset();
    public static readonly int Op0 = Op0Offset();
    public static readonly int Op1 = Op1Offset();
    public static readonly int Op2 = Op2Offset();

    /// <summary>Byte offset in <see cref="Op"/> of the place of register operand <paramref name="n"/>.</summary>
    public static int PlaceOf(int n) => n switch
    {
        0 => Op0,
        1 => Op1,
        2 => Op2,
        3 => Op2 + 1,
        _ => throw new ArgumentOutOfRangeException(nameof(n), n, "no instruction has more than four register operands"),
    };

    /// <summary>The host's register for general register operand <paramref name="n"/>: none that a thunked instruction uses implicitly.</summary>
    public static Register General(int n, int bytes)
    {
        int number = n switch
        {
            0 => 8,
            1 => 9,
            2 => 1,
            _ => throw new ArgumentOutOfRangeException(nameof(n), n, "no thunked instruction has more than three general register operands"),
        };
        return bytes switch
        {
            // The legacy high-byte registers come between the first four byte registers and the rest.
            1 => number < 4 ? Register.AL + number : Register.SPL + (number - 4),
            2 => Register.AX + number,
            4 => Register.EAX + number,
            _ => Register.RAX + number,
        };
    }

    // SAFETY (all below): only the distance between two addresses inside one local is taken.

    private static int VectorOffset()
    {
        VcpuBlock block;
        return Aligned((int)(block.Vector - (byte*)&block));
    }

    private static int X87Offset()
    {
        VcpuBlock block;
        return Aligned((int)(block.X87 - (byte*)&block));
    }

    private static int MxcsrOffset()
    {
        VcpuBlock block;
        return (int)((byte*)&block.Mxcsr - (byte*)&block);
    }

    private static int FlagsOffset()
    {
        VcpuBlock block;
        return (int)((byte*)&block.ThunkFlags - (byte*)&block);
    }

    private static int Op0Offset()
    {
        Op op;
        return (int)(&op.R0 - (byte*)&op);
    }

    private static int Op1Offset()
    {
        Op op;
        return (int)(&op.R1 - (byte*)&op);
    }

    private static int Op2Offset()
    {
        Op op;
        return (int)((byte*)&op.Aux - (byte*)&op);
    }

    /// <summary>The block itself starts on such a boundary; aligned moves and XSAVE need it.</summary>
    private static int Aligned(int offset) =>
        offset % 64 == 0 ? offset : throw new InvalidOperationException($"a register file lies {offset} bytes into the vCPU's block, no multiple of 64");
}
