using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of the BCD instructions of 16- and 32-bit modes (Intel SDM vol. 2, AAA to DAS), and BOUND's cousins that live there.</summary>
public static unsafe class Decimal
{
    public static Op* AdjustAfterAddition(VcpuBlock* s, Op* op)
    {
        ushort ax = *(ushort*)s;
        bool adjust = (ax & 0xf) > 9 || LazyFlags.Adjust(s);
        ulong flags = LazyFlags.Arithmetic(s) & ~(ulong)(Rflags.AF | Rflags.CF);
        if (adjust)
        {
            ax += 0x106;
            flags |= (ulong)(Rflags.AF | Rflags.CF);
        }
        *(ushort*)s = (ushort)(ax & 0xff0f);
        LazyFlags.SetArithmetic(s, flags);
        return op + 1;
    }

    public static Op* AdjustAfterSubtraction(VcpuBlock* s, Op* op)
    {
        ushort ax = *(ushort*)s;
        bool adjust = (ax & 0xf) > 9 || LazyFlags.Adjust(s);
        ulong flags = LazyFlags.Arithmetic(s) & ~(ulong)(Rflags.AF | Rflags.CF);
        if (adjust)
        {
            ax -= 0x106;
            flags |= (ulong)(Rflags.AF | Rflags.CF);
        }
        *(ushort*)s = (ushort)(ax & 0xff0f);
        LazyFlags.SetArithmetic(s, flags);
        return op + 1;
    }

    /// <summary>AAM: <see cref="Op.Imm"/> is the base; zero divides.</summary>
    public static Op* AdjustAfterMultiplication(VcpuBlock* s, Op* op)
    {
        byte radix = (byte)op->Imm;
        if (radix == 0)
            return Access.Raise(s, op, ExceptionVector.DivideError);
        byte al = *(byte*)s;
        *(ushort*)s = (ushort)(al / radix << 8 | al % radix);
        Logic.Result<W8>(s, *(byte*)s);
        return op + 1;
    }

    /// <summary>AAD: <see cref="Op.Imm"/> is the base.</summary>
    public static Op* AdjustBeforeDivision(VcpuBlock* s, Op* op)
    {
        byte al = (byte)(*(byte*)s + (*((byte*)s + 1) * (byte)op->Imm));
        *(ushort*)s = al;
        Logic.Result<W8>(s, al);
        return op + 1;
    }

    public static Op* DecimalAfterAddition(VcpuBlock* s, Op* op)
    {
        byte old = *(byte*)s;
        bool oldCarry = LazyFlags.Carry(s);
        bool adjust = (old & 0xf) > 9 || LazyFlags.Adjust(s);
        bool carry = old > 0x99 || oldCarry;
        byte al = old;
        if (adjust)
            al += 6;
        if (carry)
            al += 0x60;
        Finish(s, al, carry, adjust);
        return op + 1;
    }

    public static Op* DecimalAfterSubtraction(VcpuBlock* s, Op* op)
    {
        byte old = *(byte*)s;
        bool oldCarry = LazyFlags.Carry(s);
        bool adjust = (old & 0xf) > 9 || LazyFlags.Adjust(s);
        bool carry = old > 0x99 || oldCarry;
        byte al = old;
        bool borrow = oldCarry;
        if (adjust)
        {
            borrow |= al < 6;
            al -= 6;
        }
        if (carry)
            al -= 0x60;
        Finish(s, al, carry || borrow, adjust);
        return op + 1;
    }

    private static void Finish(VcpuBlock* s, byte al, bool carry, bool adjust)
    {
        *(byte*)s = al;
        LazyFlags.SetResult(s, W8.SignExtend(al), carry, overflow: false);
        if (adjust)
            s->LazyAux |= 8;
    }
}
