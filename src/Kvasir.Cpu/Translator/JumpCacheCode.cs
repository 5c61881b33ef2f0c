namespace Kvasir.Cpu;

/// <summary>Host code that looks addresses up in the jump cache: see <see cref="JumpEntry"/>.</summary>
internal static class JumpCacheCode
{
    /// <summary>Displacements in an entry.</summary>
    public const int Key = 8;
    public const int Code = 24;
    private const int EntryShift = 5;

    private const int PageSize = 4096;

    /// <summary>T1 = the entry of the address in T0, which becomes <see cref="VcpuBlock.Rip"/>. Gives the fields of the jumps that are taken where it is another's. Changes T0.</summary>
    public static (int First, int Second) EmitLookup(HostAssembler a)
    {
        a.Store(Layout.State, Layout.Rip, Layout.T0);
        a.RotateRight(Layout.T1, Layout.T0, 12);
        a.Arithmetic(Alu.Xor, Layout.T1, Layout.T0, 4);
        a.ArithmeticImmediate(Alu.And, Layout.T1, Mmu.JumpMask, 4);
        a.Shift(4, Layout.T1, EntryShift, 4);
        a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, Layout.JumpCache);
        a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.T1, 0);
        int first = a.JumpIf(Condition.NotEqual);
        a.Load(Layout.T0, Layout.State, Layout.JumpKey);
        a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.T1, Key);
        return (first, a.JumpIf(Condition.NotEqual));
    }

    /// <summary><see cref="VcpuBlock.CodeBase"/> = the page of <see cref="VcpuBlock.Rip"/>, as it is in 64-bit mode (in other modes the block's entry finds it). Changes T0.</summary>
    public static void EmitCodeBase(HostAssembler a)
    {
        a.Load(Layout.T0, Layout.State, Layout.Rip);
        a.ArithmeticImmediate(Alu.And, Layout.T0, -PageSize);
        a.Store(Layout.State, Layout.CodeBase, Layout.T0);
    }
}
