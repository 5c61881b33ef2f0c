using System.Collections.Generic;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// Page walks in host code (Intel SDM vol. 3, "4-Level Paging"), for TLB misses of plain accesses: no call into C#, no register of the guest stored. What is not plain
/// (a fault, accessed or dirty bits to set, no RAM, a page with code, a first write) is left to <see cref="Mmu"/>. Needs: <see cref="WalkContext"/>.
/// </summary>
internal static unsafe class WalkStub
{
    private const int Rax = 0;
    private const int Rcx = 1;
    private const int Rdx = 2;
    private const int Rbx = 3;
    private const int Rsi = 6;
    private const int PageShift = 12;
    private const int PresentBit = 1;
    private const int DirtyBit = 1 << 6;
    private const int LargeBit = 1 << 7;
    private static readonly int[] Saved = [Rax, Rcx, Rdx, Rbx, Rsi];

    private static readonly int Root = Of(w => (byte*)&w->Root);
    private static readonly int ReadNeeds = Of(w => (byte*)&w->ReadNeeds);
    private static readonly int WriteNeeds = Of(w => (byte*)&w->WriteNeeds);
    private static readonly int Forbidden = Of(w => (byte*)&w->Forbidden);
    private static readonly int Reserved = Of(w => (byte*)&w->Reserved);
    private static readonly int AddressMask = Of(w => (byte*)&w->AddressMask);
    private static readonly int GlobalMask = Of(w => (byte*)&w->GlobalMask);
    private static readonly int Start0 = Of(w => (byte*)&w->Start0);
    private static readonly int Size0 = Of(w => (byte*)&w->Size0);
    private static readonly int Host0 = Of(w => (byte*)&w->Host0);
    private static readonly int Start1 = Of(w => (byte*)&w->Start1);
    private static readonly int Size1 = Of(w => (byte*)&w->Size1);
    private static readonly int Host1 = Of(w => (byte*)&w->Host1);
    private static readonly int UnitHash = Of(w => (byte*)&w->UnitHash);
    private static readonly int LargeUnits = Of(w => (byte*)&w->LargeUnits);
    private static readonly int Log = Of(w => (byte*)&w->Log);
    private static readonly int GlobalLog = Of(w => (byte*)&w->GlobalLog);
    private static readonly int ReadTable = Of(w => (byte*)&w->ReadTable);
    private static readonly int WriteTable = Of(w => (byte*)&w->WriteTable);
    private static readonly int Memory = Of(w => (byte*)&w->Memory);
    private static readonly int PageFlagsOf = Of(w => (byte*)&w->PageFlags);
    private static readonly int Writers = Of(w => (byte*)&w->Writers);
    private static readonly int Writer = Of(w => (byte*)&w->Writer);
    private static readonly int Count = Of(w => (byte*)&w->Count);

    private delegate byte* Field(WalkContext* walk);

    /// <summary>
    /// Emits the function: T0 is the linear address XOR the tag of the entry that T1 points to. T0 becomes the linear address; CF=0: the entry holds its page now. Keeps all
    /// other registers but the flags.
    /// </summary>
    /// <param name="a">Takes the code.</param>
    /// <param name="write">For writing.</param>
    /// <param name="failed">Where to jump instead of returning CF=1; 0: nowhere.</param>
    public static void Emit(HostAssembler a, bool write, ulong failed)
    {
        List<int> slow = [];
        foreach (int register in Saved)
            a.Push(register);
        // A page that the entry holds already: the access reaches beyond its end.
        a.Move(Rax, Layout.T0);
        a.ArithmeticLoad(Alu.Xor, Layout.T0, Layout.T1, 0);
        a.Move(Rsi, Layout.T0);
        a.Shift(5, Rax, PageShift);
        slow.Add(a.JumpIf(Condition.Equal));
        a.Load(Rax, Layout.State, Root);
        a.Test(Rax, Rax);
        slow.Add(a.JumpIf(Condition.Equal));
        a.Move(Rbx, Rsi);
        a.Shift(4, Rbx, 16);
        a.Shift(7, Rbx, 16);
        a.Arithmetic(Alu.Cmp, Rbx, Rsi);
        slow.Add(a.JumpIf(Condition.NotEqual));

        LoadEntry(a, 39);
        a.Move(Rcx, Rax);
        a.Move(Rdx, Rax);
        a.TestImmediateByte(Rax, LargeBit);
        slow.Add(a.JumpIf(Condition.NotEqual));
        NextTable(a, slow);
        LoadEntry(a, 30);
        Gather(a);
        a.TestImmediateByte(Rax, LargeBit);
        int huge = a.JumpIf(Condition.NotEqual);
        NextTable(a, slow);
        LoadEntry(a, 21);
        Gather(a);
        a.TestImmediateByte(Rax, LargeBit);
        int large = a.JumpIf(Condition.NotEqual);
        NextTable(a, slow);
        LoadEntry(a, PageShift);
        Gather(a);
        Permissions(a, write, slow);
        a.ArithmeticLoad(Alu.And, Rax, Layout.State, AddressMask);
        int fill = a.Length;
        ToHost(a, slow);
        if (write)
            CheckWrite(a, slow);
        Fill(a, write, slow);
        a.IncrementMemory(Layout.State, Count, 8);
        Leave(a);
        a.ClearCarry();
        a.Return();

        a.Fix(large);
        LargeLeaf(a, write, 21, slow);
        a.Fix(a.Jump(), fill);
        a.Fix(huge);
        LargeLeaf(a, write, 30, slow);
        a.Fix(a.Jump(), fill);

        foreach (int field in slow)
            a.Fix(field);
        Leave(a);
        Fail(a, failed);
    }

    /// <summary>Returns CF=1, or jumps.</summary>
    public static void Fail(HostAssembler a, ulong failed)
    {
        if (failed != 0)
        {
            a.JumpTo(failed);
            return;
        }
        a.SetCarry();
        a.Return();
    }

    private static void Leave(HostAssembler a)
    {
        for (int i = Saved.Length - 1; i >= 0; i--)
            a.Pop(Saved[i]);
    }

    /// <summary>RAX = the entry of the linear address in the table at RAX.</summary>
    private static void LoadEntry(HostAssembler a, int shift)
    {
        a.Move(Rbx, Rsi);
        a.Shift(5, Rbx, shift);
        a.ArithmeticImmediate(Alu.And, Rbx, 511, 4);
        a.LoadIndexed(Rax, Rax, Rbx, 3, 0);
    }

    /// <summary>RCX: bits that all entries have; RDX: bits that one has.</summary>
    private static void Gather(HostAssembler a)
    {
        a.Arithmetic(Alu.And, Rcx, Rax);
        a.Arithmetic(Alu.Or, Rdx, Rax);
    }

    private static void NextTable(HostAssembler a, List<int> slow)
    {
        a.TestImmediateByte(Rax, PresentBit);
        slow.Add(a.JumpIf(Condition.Equal));
        a.ArithmeticLoad(Alu.And, Rax, Layout.State, AddressMask);
        ToHost(a, slow);
    }

    /// <summary>RAX, an address in RAM, becomes the host's. Changes RBX.</summary>
    private static void ToHost(HostAssembler a, List<int> slow)
    {
        a.Move(Rbx, Rax);
        a.ArithmeticLoad(Alu.Sub, Rbx, Layout.State, Start0);
        a.ArithmeticLoad(Alu.Cmp, Rbx, Layout.State, Size0);
        int other = a.JumpIfShort(Condition.AboveOrEqual);
        a.ArithmeticLoad(Alu.Add, Rax, Layout.State, Host0);
        int done = a.Jump();
        a.FixShort(other);
        a.Move(Rbx, Rax);
        a.ArithmeticLoad(Alu.Sub, Rbx, Layout.State, Start1);
        a.ArithmeticLoad(Alu.Cmp, Rbx, Layout.State, Size1);
        slow.Add(a.JumpIf(Condition.AboveOrEqual));
        a.ArithmeticLoad(Alu.Add, Rax, Layout.State, Host1);
        a.Fix(done);
    }

    /// <summary>Checks what the entries allow, and makes RCX the log for the leaf in RAX.</summary>
    private static void Permissions(HostAssembler a, bool write, List<int> slow)
    {
        a.Move(Rbx, Rcx);
        a.ArithmeticLoad(Alu.And, Rbx, Layout.State, write ? WriteNeeds : ReadNeeds);
        a.ArithmeticLoad(Alu.Cmp, Rbx, Layout.State, write ? WriteNeeds : ReadNeeds);
        slow.Add(a.JumpIf(Condition.NotEqual));
        a.ArithmeticLoad(Alu.And, Rcx, Layout.State, Forbidden);
        slow.Add(a.JumpIf(Condition.NotEqual));
        a.ArithmeticLoad(Alu.And, Rdx, Layout.State, Reserved);
        slow.Add(a.JumpIf(Condition.NotEqual));
        if (write)
        {
            a.TestImmediateByte(Rax, DirtyBit);
            slow.Add(a.JumpIf(Condition.Equal));
        }
        a.Load(Rcx, Layout.State, Log);
        a.Move(Rbx, Rax);
        a.ArithmeticLoad(Alu.And, Rbx, Layout.State, GlobalMask);
        int local = a.JumpIf(Condition.Equal);
        a.Load(Rcx, Layout.State, GlobalLog);
        // Global pages in the lower half are noted by the TLB itself.
        a.Test(Rsi, Rsi);
        slow.Add(a.JumpIf(Condition.NotSign));
        a.Fix(local);
    }

    /// <summary>A leaf of 2 MiB or 1 GiB: RAX becomes the address of the 4 KiB page inside.</summary>
    private static void LargeLeaf(HostAssembler a, bool write, int shift, List<int> slow)
    {
        Permissions(a, write, slow);
        // Bits between the flags and the address are reserved.
        a.TestImmediate(Rax, (int)((1u << shift) - 1 & ~0x1fffu), 4);
        slow.Add(a.JumpIf(Condition.NotEqual));
        a.Move(Rdx, Rax);
        a.Move(Rbx, Rsi);
        a.Shift(5, Rbx, shift == 30 ? 30 : 22);
        if (shift == 30)
            a.ArithmeticImmediate(Alu.Xor, Rbx, (int)Tlb.HugeUnitSalt);
        a.MultiplyLoad(Rbx, Layout.State, UnitHash);
        a.Shift(5, Rbx, 64 - Tlb.UnitBits);
        a.Move(Rax, Rbx, 4);
        a.Shift(5, Rax, 3, 4);
        a.ArithmeticLoad(Alu.Add, Rax, Layout.State, LargeUnits);
        a.Load(Rax, Rax, 0, 1);
        a.ArithmeticImmediate(Alu.And, Rbx, 7, 4);
        a.BitTest(Rax, Rbx);
        slow.Add(a.JumpIf(Condition.AboveOrEqual));
        a.Move(Rax, Rdx);
        a.ArithmeticLoad(Alu.And, Rax, Layout.State, AddressMask);
        a.Shift(5, Rax, shift);
        a.Shift(4, Rax, shift);
        a.Move(Rbx, Rsi, 4);
        a.ArithmeticImmediate(Alu.And, Rbx, (int)((1u << shift) - 1 & ~0xfffu), 4);
        a.Arithmetic(Alu.Or, Rax, Rbx);
    }

    /// <summary>The page at RAX has no code, is dirty already, and this vCPU is known to write it. Changes RBX and RDX.</summary>
    private static void CheckWrite(HostAssembler a, List<int> slow)
    {
        a.Move(Rbx, Rax);
        a.ArithmeticLoad(Alu.Sub, Rbx, Layout.State, Memory);
        a.Shift(5, Rbx, PageShift);
        a.Load(Rdx, Layout.State, PageFlagsOf);
        a.LoadIndexed(Rdx, Rdx, Rbx, 0, 0, 1);
        a.ArithmeticImmediate(Alu.And, Rdx, (int)(Core.PageFlags.Code | Core.PageFlags.Dirty), 4);
        a.ArithmeticImmediate(Alu.Cmp, Rdx, (int)Core.PageFlags.Dirty, 4);
        slow.Add(a.JumpIf(Condition.NotEqual));
        a.Load(Rdx, Layout.State, Writers);
        a.LoadIndexed(Rdx, Rdx, Rbx, 0, 0, 1);
        a.ArithmeticImmediate(Alu.Cmp, Rdx, byte.MaxValue, 4);
        int several = a.JumpIf(Condition.Equal);
        a.ArithmeticLoad(Alu.Cmp, Rdx, Layout.State, Writer, 4);
        slow.Add(a.JumpIf(Condition.NotEqual));
        a.Fix(several);
    }

    private static void Fill(HostAssembler a, bool write, List<int> slow)
    {
        a.Load(Rbx, Rcx, 0, 4);
        a.ArithmeticImmediate(Alu.Cmp, Rbx, Tlb.LogCapacity, 4);
        slow.Add(a.JumpIf(Condition.AboveOrEqual));
        a.Move(Rdx, Rsi);
        a.Shift(5, Rdx, PageShift);
        a.ArithmeticImmediate(Alu.And, Rdx, (int)Tlb.IndexMask, 4);
        a.ArithmeticLoad(Alu.Or, Rdx, Layout.State, write ? WriteTable : ReadTable, 4);
        a.StoreIndexed(Rcx, Rbx, 2, 8, Rdx, 4);
        a.IncrementMemory(Rcx, 0, 4);
        a.ArithmeticImmediate(Alu.And, Rsi, -1 << PageShift);
        a.Store(Layout.T1, 8, Rax);
        a.Store(Layout.T1, 0, Rsi);
    }

    private static int Of(Field field)
    {
        WalkContext walk;
        // SAFETY: only the distance between two addresses inside one local is taken.
        return Layout.Walk + (int)(field(&walk) - (byte*)&walk);
    }
}
