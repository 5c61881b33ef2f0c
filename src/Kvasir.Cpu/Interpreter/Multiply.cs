using System;
using System.Runtime.CompilerServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Handlers of MUL, IMUL, DIV and IDIV.</summary>
public static unsafe class Multiply
{
    private const int Rdx = 16;

    public static Op* UnsignedRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        Unsigned<TWidth>(s, TWidth.Get((byte*)s + op->R0));
        return op + 1;
    }

    public static Op* UnsignedMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        Unsigned<TWidth>(s, TWidth.Get(p));
        return op + 1;
    }

    public static Op* SignedRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        Signed<TWidth>(s, TWidth.Get((byte*)s + op->R0));
        return op + 1;
    }

    public static Op* SignedMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        Signed<TWidth>(s, TWidth.Get(p));
        return op + 1;
    }

    /// <summary>IMUL r, r.</summary>
    public static Op* TruncatedRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, Truncated<TWidth>(s, TWidth.Get(to), TWidth.Get((byte*)s + op->R1)));
        return op + 1;
    }

    /// <summary>IMUL r, m.</summary>
    public static Op* TruncatedMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        byte* to = (byte*)s + op->R0;
        TWidth.SetRegister(to, Truncated<TWidth>(s, TWidth.Get(to), TWidth.Get(p)));
        return op + 1;
    }

    /// <summary>IMUL r, r, imm.</summary>
    public static Op* TruncatedRegisterImmediate<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        TWidth.SetRegister((byte*)s + op->R0, Truncated<TWidth>(s, TWidth.Get((byte*)s + op->R1), TWidth.Truncate((ulong)op->Imm)));
        return op + 1;
    }

    /// <summary>IMUL r, m, imm.</summary>
    public static Op* TruncatedMemoryImmediate<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        if (p == null)
            return Access.Fault(s, op);
        TWidth.SetRegister((byte*)s + op->R0, Truncated<TWidth>(s, TWidth.Get(p), TWidth.Truncate((ulong)op->Imm)));
        return op + 1;
    }

    public static Op* DivideRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => Divide<TWidth>(s, TWidth.Get((byte*)s + op->R0)) ? op + 1 : Access.Fault(s, op);

    public static Op* DivideMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        return p != null && Divide<TWidth>(s, TWidth.Get(p)) ? op + 1 : Access.Fault(s, op);
    }

    public static Op* DivideSignedRegister<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth => DivideSigned<TWidth>(s, TWidth.Get((byte*)s + op->R0)) ? op + 1 : Access.Fault(s, op);

    public static Op* DivideSignedMemory<TWidth>(VcpuBlock* s, Op* op)
        where TWidth : struct, IWidth
    {
        byte* p = Access.Read(s, Access.Linear(s, op, TWidth.Bytes, write: false), TWidth.Bytes);
        return p != null && DivideSigned<TWidth>(s, TWidth.Get(p)) ? op + 1 : Access.Fault(s, op);
    }

    private static void Unsigned<TWidth>(VcpuBlock* s, ulong operand)
        where TWidth : struct, IWidth
    {
        ulong a = TWidth.Get((byte*)s);
        ulong low;
        ulong high;
        if (TWidth.Bytes == 8)
        {
            high = Math.BigMul(a, operand, out low);
        }
        else
        {
            ulong product = a * operand;
            low = TWidth.Truncate(product);
            high = product >> TWidth.Bits;
        }
        SetDouble<TWidth>(s, low, high);
        LazyFlags.SetResult(s, TWidth.SignExtend(low), high != 0, high != 0);
    }

    private static void Signed<TWidth>(VcpuBlock* s, ulong operand)
        where TWidth : struct, IWidth
    {
        long a = (long)TWidth.SignExtend(TWidth.Get((byte*)s));
        long b = (long)TWidth.SignExtend(operand);
        ulong low;
        ulong high;
        bool overflow;
        if (TWidth.Bytes == 8)
        {
            high = (ulong)Math.BigMul(a, b, out long signedLow);
            low = (ulong)signedLow;
            overflow = (long)high != signedLow >> 63;
        }
        else
        {
            long product = a * b;
            low = TWidth.Truncate((ulong)product);
            high = TWidth.Truncate((ulong)(product >> TWidth.Bits));
            overflow = (long)TWidth.SignExtend(low) != product;
        }
        SetDouble<TWidth>(s, low, high);
        LazyFlags.SetResult(s, TWidth.SignExtend(low), overflow, overflow);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static ulong Truncated<TWidth>(VcpuBlock* s, ulong x, ulong y)
        where TWidth : struct, IWidth
    {
        long a = (long)TWidth.SignExtend(x);
        long b = (long)TWidth.SignExtend(y);
        ulong low;
        bool overflow;
        if (TWidth.Bytes == 8)
        {
            long high = Math.BigMul(a, b, out long signedLow);
            low = (ulong)signedLow;
            overflow = high != signedLow >> 63;
        }
        else
        {
            long product = a * b;
            low = TWidth.Truncate((ulong)product);
            overflow = (long)TWidth.SignExtend(low) != product;
        }
        LazyFlags.SetResult(s, TWidth.SignExtend(low), overflow, overflow);
        return low;
    }

    /// <summary>Writes AX, DX:AX, EDX:EAX or RDX:RAX.</summary>
    private static void SetDouble<TWidth>(VcpuBlock* s, ulong low, ulong high)
        where TWidth : struct, IWidth
    {
        if (TWidth.Bytes == 1)
        {
            *(ushort*)s = (ushort)(low | high << 8);
            return;
        }
        TWidth.SetRegister((byte*)s, low);
        TWidth.SetRegister((byte*)s + Rdx, high);
    }

    private static bool Divide<TWidth>(VcpuBlock* s, ulong divisor)
        where TWidth : struct, IWidth
    {
        if (divisor == 0)
            return Access.Record(s, ExceptionVector.DivideError);
        ulong quotient;
        ulong remainder;
        if (TWidth.Bytes == 8)
        {
            ulong high = s->Gpr[2];
            if (high >= divisor)
                return Access.Record(s, ExceptionVector.DivideError);
            if (high == 0)
            {
                (quotient, remainder) = Math.DivRem(s->Gpr[0], divisor);
            }
            else
            {
                UInt128 dividend = new(high, s->Gpr[0]);
                quotient = (ulong)(dividend / divisor);
                remainder = s->Gpr[0] - quotient * divisor;
            }
        }
        else
        {
            ulong dividend = Dividend<TWidth>(s);
            (quotient, remainder) = Math.DivRem(dividend, divisor);
            if (quotient != TWidth.Truncate(quotient))
                return Access.Record(s, ExceptionVector.DivideError);
        }
        SetDouble<TWidth>(s, quotient, remainder);
        return true;
    }

    private static bool DivideSigned<TWidth>(VcpuBlock* s, ulong operand)
        where TWidth : struct, IWidth
    {
        long divisor = (long)TWidth.SignExtend(operand);
        if (divisor == 0)
            return Access.Record(s, ExceptionVector.DivideError);
        ulong quotient;
        ulong remainder;
        if (TWidth.Bytes == 8)
        {
            Int128 dividend = new(s->Gpr[2], s->Gpr[0]);
            // The one quotient that Int128 itself cannot hold: its minimum divided by -1.
            if (dividend == Int128.MinValue && divisor == -1)
                return Access.Record(s, ExceptionVector.DivideError);
            Int128 q = dividend / divisor;
            if (q != (long)q)
                return Access.Record(s, ExceptionVector.DivideError);
            quotient = (ulong)(long)q;
            remainder = s->Gpr[0] - quotient * (ulong)divisor;
        }
        else
        {
            long dividend = TWidth.Bytes switch
            {
                1 => (short)*(ushort*)s,
                2 => (int)Dividend<TWidth>(s),
                _ => (long)Dividend<TWidth>(s),
            };
            if (dividend == long.MinValue && divisor == -1)
                return Access.Record(s, ExceptionVector.DivideError);
            (long q, long r) = Math.DivRem(dividend, divisor);
            if (q != (long)TWidth.SignExtend((ulong)q))
                return Access.Record(s, ExceptionVector.DivideError);
            quotient = TWidth.Truncate((ulong)q);
            remainder = TWidth.Truncate((ulong)r);
        }
        SetDouble<TWidth>(s, quotient, remainder);
        return true;
    }

    private static ulong Dividend<TWidth>(VcpuBlock* s)
        where TWidth : struct, IWidth =>
        TWidth.Bytes == 1 ? *(ushort*)s : TWidth.Get((byte*)s) | TWidth.Get((byte*)s + Rdx) << TWidth.Bits;
}
