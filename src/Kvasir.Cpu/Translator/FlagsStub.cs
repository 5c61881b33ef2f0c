namespace Kvasir.Cpu;

/// <summary>The usual forms of flags in memory become the host's, without a call into C#.</summary>
internal static class FlagsStub
{
    private const int Rax = 0;
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rbx = 3;
    private const int Doubleword = 4;

    /// <summary>Emits code that returns with the flags loaded, or falls through where it does not know their form. Changes T1.</summary>
    public static void Emit(HostAssembler a)
    {
        Form(a, DeferredFlags.Code(FlagKind.Packed, 1), () =>
        {
            a.Move(Layout.T1, Rax);
            a.Load(Rax, Layout.State, Layout.FlagA, Doubleword);
            Stubs.AccumulatorToFlags(a);
            a.Move(Rax, Layout.T1);
        });
        foreach (int width in (int[])[8, Doubleword])
        {
            Form(a, DeferredFlags.Code(FlagKind.Compare, width), () =>
            {
                a.Load(Layout.T1, Layout.State, Layout.FlagA, width);
                a.ArithmeticLoad(Alu.Cmp, Layout.T1, Layout.State, Layout.FlagB, width);
            });
            Form(a, DeferredFlags.Code(FlagKind.Logic, width), () =>
            {
                a.Load(Layout.T1, Layout.State, Layout.FlagA, width);
                a.Test(Layout.T1, Layout.T1, width);
            });
        }
        Form(a, 0, () => EmitLazy(a));
        foreach (int width in (int[])[8, Doubleword])
        {
            Form(a, DeferredFlags.Code(FlagKind.Subtract, width), () =>
            {
                a.Load(Layout.T1, Layout.State, Layout.FlagA, width);
                a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, Layout.FlagB, width);
                a.ArithmeticLoad(Alu.Cmp, Layout.T1, Layout.State, Layout.FlagB, width);
            });
            Form(a, DeferredFlags.Code(FlagKind.Add, width), () =>
            {
                a.Load(Layout.T1, Layout.State, Layout.FlagA, width);
                a.ArithmeticLoad(Alu.Sub, Layout.T1, Layout.State, Layout.FlagB, width);
                a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, Layout.FlagB, width);
            });
            foreach (FlagKind kind in (FlagKind[])[FlagKind.Decrement, FlagKind.Increment])
            {
                Form(a, DeferredFlags.Code(kind, width), () =>
                {
                    bool increment = kind == FlagKind.Increment;
                    a.Load(Layout.T1, Layout.State, Layout.FlagA, width);
                    a.Lea(Layout.T1, Layout.T1, increment ? -1 : 1, width);
                    a.BitTestMemory(Layout.State, Layout.FlagCarry, 0);
                    a.Unary(4, increment ? 0 : 1, Layout.T1, width);
                });
            }
        }
    }

    private static void Form(HostAssembler a, int code, System.Action load)
    {
        a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.FlagKind, code, 1);
        int other = a.JumpIf(Condition.NotEqual);
        load();
        a.Return();
        a.Fix(other);
    }

    /// <summary>From the form of <see cref="LazyFlags"/>: EDX gathers what LAHF would give in bits 8-15, and OF in bit 0.</summary>
    private static void EmitLazy(HostAssembler a)
    {
        a.Push(Rbx);
        a.Push(Rcx);
        a.Push(Rdx);
        a.Move(Layout.T1, Rax);
        a.Load(Rcx, Layout.State, Layout.LazyResult);
        a.Load(Rax, Layout.State, Layout.LazyAux, Doubleword);
        // PF: of the result's low byte and bits 8-15 of the other word.
        a.Move(Rdx, Rax, Doubleword);
        a.Shift(5, Rdx, 8, Doubleword);
        a.Arithmetic(Alu.Xor, Rdx, Rcx, 1);
        a.SetRegister(Condition.Parity, Rdx);
        a.ZeroExtend(Rdx, Rdx, 1);
        a.Shift(4, Rdx, 2, Doubleword);
        // ZF
        a.Test(Rcx, Rcx);
        a.SetRegister(Condition.Equal, Rbx);
        a.ZeroExtend(Rbx, Rbx, 1);
        a.Shift(4, Rbx, 6, Doubleword);
        a.Arithmetic(Alu.Or, Rdx, Rbx, Doubleword);
        // SF: the result's sign, inverted by bit 16.
        a.Shift(5, Rcx, 63);
        a.Move(Rbx, Rax, Doubleword);
        a.Shift(5, Rbx, 16, Doubleword);
        a.Arithmetic(Alu.Xor, Rcx, Rbx, Doubleword);
        a.ArithmeticImmediate(Alu.And, Rcx, 1, Doubleword);
        a.Shift(4, Rcx, 7, Doubleword);
        a.Arithmetic(Alu.Or, Rdx, Rcx, Doubleword);
        // AF: bit 3.
        a.Move(Rcx, Rax, Doubleword);
        a.ArithmeticImmediate(Alu.And, Rcx, 8, Doubleword);
        a.Shift(4, Rcx, 1, Doubleword);
        a.Arithmetic(Alu.Or, Rdx, Rcx, Doubleword);
        // CF: bit 31.
        a.Move(Rcx, Rax, Doubleword);
        a.Shift(5, Rcx, 31, Doubleword);
        a.Arithmetic(Alu.Or, Rdx, Rcx, Doubleword);
        a.Shift(4, Rdx, 8, Doubleword);
        // OF: bits 31 and 30 differ.
        a.Move(Rcx, Rax, Doubleword);
        a.Shift(4, Rcx, 1, Doubleword);
        a.Arithmetic(Alu.Xor, Rcx, Rax, Doubleword);
        a.Shift(5, Rcx, 31, Doubleword);
        a.Arithmetic(Alu.Or, Rdx, Rcx, Doubleword);
        a.Move(Rax, Rdx, Doubleword);
        Stubs.AccumulatorToFlags(a);
        a.Move(Rax, Layout.T1);
        a.Pop(Rdx);
        a.Pop(Rcx);
        a.Pop(Rbx);
    }
}
