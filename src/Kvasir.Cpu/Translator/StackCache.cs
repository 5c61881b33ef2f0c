namespace Kvasir.Cpu;

/// <summary>
/// The page that the guest's stack accesses used last, one for reads and one for writes: nearly all stay in it, and need no look at the TLB then. What drops the TLB's
/// translations drops these, too (<see cref="Mmu.DropStack"/>); what only evicts them does not.
/// </summary>
internal static class StackCache
{
    /// <summary>Displacement of the host's address in an entry.</summary>
    public const int Host = 8;
    private const int Rax = 0;
    private const int PageSize = 4096;

    /// <summary>
    /// Emits the function: T0 is the linear address XOR the entry's tag. T0 becomes the linear address; CF=0: try again. The entry takes the TLB's translation, or the TLB that of a
    /// page walk. Changes the flags.
    /// </summary>
    /// <param name="a">Takes the code.</param>
    /// <param name="walk">The function that walks the tables (<see cref="WalkStub"/>) and gives CF=1 where it fails.</param>
    /// <param name="write">For writing.</param>
    /// <param name="failed">Where to jump instead of returning CF=1; 0: nowhere.</param>
    public static void Emit(HostAssembler a, ulong walk, bool write, ulong failed)
    {
        int entry = write ? Layout.StackWrite : Layout.StackRead;
        // A page that the entry holds already: the access reaches beyond its end.
        a.ArithmeticImmediate(Alu.Cmp, Layout.T0, PageSize);
        int crosses = a.JumpIf(Condition.Below);
        a.ArithmeticLoad(Alu.Xor, Layout.T0, Layout.State, entry);
        a.Push(Layout.T1);
        a.RotateRight(Layout.T1, Layout.T0, 8);
        a.ArithmeticImmediate(Alu.And, Layout.T1, (int)Tlb.IndexMask << 4, 4);
        a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, write ? Layout.WriteTlb : Layout.ReadTlb);
        a.ArithmeticLoad(Alu.Xor, Layout.T0, Layout.T1, 0);
        a.ArithmeticImmediate(Alu.Cmp, Layout.T0, PageSize);
        int missed = a.JumpIf(Condition.AboveOrEqual);
        a.Push(Rax);
        a.Load(Rax, Layout.T1, 0);
        a.Arithmetic(Alu.Xor, Layout.T0, Rax);
        a.Store(Layout.State, entry, Rax);
        // Where writing is allowed reading is, too.
        if (write)
            a.Store(Layout.State, Layout.StackRead, Rax);
        a.Load(Rax, Layout.T1, Host);
        a.Store(Layout.State, entry + Host, Rax);
        if (write)
            a.Store(Layout.State, Layout.StackRead + Host, Rax);
        a.Pop(Rax);
        a.Pop(Layout.T1);
        a.ClearCarry();
        a.Return();
        a.Fix(missed);
        a.CallTo(walk);
        a.Pop(Layout.T1);
        int refused = a.JumpIf(Condition.Below);
        a.Return();
        a.Fix(refused);
        a.Fix(crosses);
        WalkStub.Fail(a, failed);
    }
}
