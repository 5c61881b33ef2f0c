namespace Kvasir.Cpu;

/// <summary>
/// Vector registers in translated code: the guest's lie in the host's of the same number while <see cref="VcpuBlock.VectorLive"/> is not 0, MXCSR included. Call-backs
/// and exits store them, a block's first vector instruction loads them.
/// </summary>
internal static class VectorCode
{
    /// <summary>Bit of <see cref="VcpuBlock.VectorLive"/>: SSE instructions may execute and find their registers.</summary>
    public const int Sse = 1;

    /// <summary>Bit of <see cref="VcpuBlock.VectorLive"/>: AVX instructions may, too.</summary>
    public const int Avx = 2;

    /// <summary>Bit of <see cref="VcpuBlock.VectorLive"/>: the host's x87 state is the guest's.</summary>
    public const int X87 = 4;

    private const int EmulationOrTaskSwitched = 0xc;
    private const int FxsrBit = 9;
    private const int XsaveBit = 18;
    private const int AllMasked = 0x1f80;

    /// <summary>Stores every vector register and MXCSR; the host's MXCSR is .NET's again.</summary>
    public static void StoreAll(HostAssembler a, bool avx)
    {
        Mxcsr(a, 3, Layout.Mxcsr);
        for (int i = 0; i < 16; i++)
            Move(a, i, avx ? 256 : 0, store: true);
        if (avx)
        {
            a.Byte(0xc5);
            a.Byte(0xf8);
            a.Byte(0x77);
        }
        Mxcsr(a, 2, Layout.HostMxcsr);
    }

    /// <summary>The stub that loads them: CF=1 and nothing done where SSE instructions may not execute as they are (CR0, CR4, unmasked exceptions). Changes T1.</summary>
    public static void EmitLoad(HostAssembler a, bool avx)
    {
        a.TestImmediateByteMemory(Layout.State, Layout.Cr0, EmulationOrTaskSwitched);
        int refused = a.JumpIf(Condition.NotEqual);
        a.BitTestMemory(Layout.State, Layout.Cr4, FxsrBit);
        int noFxsr = a.JumpIf(Condition.AboveOrEqual);
        // An unmasked exception would be the host's.
        a.Load(Layout.T1, Layout.State, Layout.Mxcsr, 4);
        a.Unary(3, 2, Layout.T1, 4);
        a.ArithmeticImmediate(Alu.And, Layout.T1, AllMasked, 4);
        int unmasked = a.JumpIf(Condition.NotEqual);
        a.ArithmeticImmediateMemory(Alu.Or, Layout.State, Layout.VectorLive, Sse, 1);
        if (avx)
        {
            a.BitTestMemory(Layout.State, Layout.Cr4, XsaveBit);
            int noXsave = a.JumpIf(Condition.AboveOrEqual);
            a.Load(Layout.T1, Layout.State, Layout.Xcr0, 4);
            a.ArithmeticImmediate(Alu.And, Layout.T1, 6, 4);
            a.ArithmeticImmediate(Alu.Cmp, Layout.T1, 6, 4);
            int noAvx = a.JumpIf(Condition.NotEqual);
            a.ArithmeticImmediateMemory(Alu.Or, Layout.State, Layout.VectorLive, Avx, 1);
            a.Fix(noXsave);
            a.Fix(noAvx);
        }
        if (avx)
        {
            int upper = JumpIfUpperHalves(a);
            LoadRegisters(a, 128);
            a.Fix(upper);
        }
        LoadRegisters(a, avx ? 256 : 0);
        a.Fix(refused);
        a.Fix(noFxsr);
        a.Fix(unmasked);
        a.Byte(0xf9);
        a.Return();
    }

    /// <summary>Stores the x87 state; the host's is what .NET expects then. Changes RAX and RDX.</summary>
    public static void StoreX87(HostAssembler a)
    {
        Components(a);
        Extended(a, 4);
        // FNINIT
        a.Byte(0xdb);
        a.Byte(0xe3);
    }

    /// <summary>The stub that loads the x87 state: CF=1 and nothing done where it may not be used as it is (CR0, a pending or an unmasked exception). Changes T1.</summary>
    public static void EmitLoadX87(HostAssembler a)
    {
        a.TestImmediateByteMemory(Layout.State, Layout.Cr0, EmulationOrTaskSwitched);
        int refused = a.JumpIf(Condition.NotEqual);
        a.TestImmediateByteMemory(Layout.State, Layout.X87 + 2, X87State.ErrorSummary);
        int pending = a.JumpIf(Condition.NotEqual);
        a.Load(Layout.T1, Layout.State, Layout.X87, 1);
        a.Unary(3, 2, Layout.T1, 4);
        a.ArithmeticImmediate(Alu.And, Layout.T1, X87State.Exceptions, 4);
        int unmasked = a.JumpIf(Condition.NotEqual);
        a.Push(Rax);
        a.Push(Rdx);
        Components(a);
        Extended(a, 5);
        a.Pop(Rdx);
        a.Pop(Rax);
        a.ArithmeticImmediateMemory(Alu.Or, Layout.State, Layout.VectorLive, X87, 1);
        a.ClearCarry();
        a.Return();
        a.Fix(refused);
        a.Fix(pending);
        a.Fix(unmasked);
        a.SetCarry();
        a.Return();
    }

    private const int Rax = 0;
    private const int Rdx = 2;

    /// <summary>EDX:EAX names the x87 state.</summary>
    private static void Components(HostAssembler a)
    {
        a.MoveImmediate(Rax, 1);
        a.Arithmetic(Alu.Xor, Rdx, Rdx, 4);
    }

    /// <summary>XSAVE64 (4) or XRSTOR64 (5).</summary>
    private static void Extended(HostAssembler a, int number)
    {
        a.Byte(0x48);
        a.Byte(0x0f);
        a.Byte(0xae);
        a.Byte(0x80 | number << 3 | Layout.State);
        a.Dword(Layout.X87);
    }

    /// <summary>LDMXCSR (2) or STMXCSR (3).</summary>
    private static void Mxcsr(HostAssembler a, int number, int displacement)
    {
        a.Byte(0x0f);
        a.Byte(0xae);
        a.Byte(0x80 | number << 3 | Layout.State);
        a.Dword(displacement);
    }

    /// <summary>Loads all registers and MXCSR, and returns with CF=0.</summary>
    private static void LoadRegisters(HostAssembler a, int bits)
    {
        for (int i = 0; i < 16; i++)
            Move(a, i, bits, store: false);
        Mxcsr(a, 2, Layout.Mxcsr);
        a.ClearCarry();
        a.Return();
    }

    /// <summary>
    /// A jump that is taken where an upper half of a YMM register is not zero. Where all are, they are not loaded: an SSE instruction would have to merge with what it leaves of its
    /// destination, and wait for the instruction that wrote that last. Changes XMM0.
    /// </summary>
    private static int JumpIfUpperHalves(HostAssembler a)
    {
        const int half = 16;
        for (int i = 0; i < 16; i++)
        {
            // VMOVAPS, then VORPS of XMM0.
            a.Byte(0xc5);
            a.Byte(0xf8);
            a.Byte(i == 0 ? 0x28 : 0x56);
            a.Byte(0x80 | Layout.State);
            a.Dword(Layout.Vector + half + (i * VcpuBlock.VectorStride));
        }
        // VPTEST XMM0, XMM0
        foreach (byte b in (System.ReadOnlySpan<byte>)[0xc4, 0xe2, 0x79, 0x17, 0xc0])
            a.Byte(b);
        return a.JumpIf(Condition.NotEqual);
    }

    /// <summary>(V)MOVAPS between a register and its place: 128 or 256 bits, or without VEX where <paramref name="bits"/> is 0.</summary>
    private static void Move(HostAssembler a, int register, int bits, bool store)
    {
        if (bits != 0)
        {
            a.Byte(0xc5);
            a.Byte((register < 8 ? 0x80 : 0) | 0x78 | (bits == 256 ? 4 : 0));
        }
        else
        {
            if (register >= 8)
                a.Byte(0x44);
            a.Byte(0x0f);
        }
        a.Byte(store ? 0x29 : 0x28);
        a.Byte(0x80 | (register & 7) << 3 | Layout.State);
        a.Dword(Layout.Vector + (register * VcpuBlock.VectorStride));
    }
}
