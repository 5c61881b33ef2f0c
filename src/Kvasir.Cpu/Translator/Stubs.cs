using System.Runtime.CompilerServices;

namespace Kvasir.Cpu;

/// <summary>The pieces of host code that all translated blocks share: entry from C#, exit to it, call-backs. Addresses are in the executable mapping.</summary>
internal sealed unsafe class Stubs
{
    private const int Rax = 0;
    private const int Rbx = 3;
    private const int GuestStackPointer = 4;
    private const int Rsi = 6;
    private const int Rdi = 7;
    private static readonly int[] Preserved = [3, 5, 12, 13, 14, 15];

    private readonly HostAssembler _a;

    /// <summary>A guest address that no guest returns to: not canonical, and not to be guessed.</summary>
    private readonly ulong _sentinel = ((ulong)System.Security.Cryptography.RandomNumberGenerator.GetInt32(int.MaxValue) << 16 | 0x5a5a_0000_0000_0001);
    private int _sentinelAt;

    /// <param name="assembler">Has begun at the address where the stubs will lie.</param>
    /// <param name="vectors">Whether AVX state exists.</param>
    public Stubs(HostAssembler assembler, bool vectors)
    {
        _a = assembler;
        _avx = vectors;
        Enter = Here();
        EmitEnter();
        LeaveSpilled = Here();
        EmitLeaveSpilled();
        SaveVectors = Here();
        EmitSaveVectors();
        LoadVectors = Here();
        EmitLoadVectors();
        LoadX87 = Here();
        VectorCode.EmitLoadX87(_a);
        Execute = Here();
        EmitExecute();
        Link = Here();
        EmitLink((nint)(delegate* unmanaged<VcpuBlock*, ulong, byte*>)&CallBacks.Link);
        Rest = Here();
        EmitLink((nint)(delegate* unmanaged<VcpuBlock*, ulong, byte*>)&CallBacks.Rest);
        Leave = Here();
        EmitLeave();
        LeaveAtRip = Here();
        StoreGeneral();
        _a.MoveImmediate(Layout.T0, 0);
        _a.Store(Layout.State, Layout.ExitOp, Layout.T0);
        _a.JumpTo(LeaveSpilled);
        ulong sentinel = Here();
        EmitSentinel();
        _a.PutQword(_sentinelAt, sentinel);
        Interpret = Here();
        EmitInterpret();
        ulong find = Here();
        EmitFind();
        FlagsToHost = Here();
        EmitFlagsToHost();
        FindCarry = Here();
        EmitFindCarry();
        ExecuteSite = Here();
        EmitExecuteSite();
        EmitWalks();
        NeedSse = Here();
        EmitNeed(LoadVectors, VectorCode.Sse);
        NeedAvx = Here();
        EmitNeed(LoadVectors, VectorCode.Avx);
        NeedX87 = Here();
        EmitNeed(LoadX87, VectorCode.X87);
        Lookup = Here();
        EmitLookup(null);
        ulong entry = Here();
        _a.Qword(find);
        LookupOrFind = Here();
        EmitLookup(entry);
        LookupForCall = Here();
        EmitMakeRoom();
        EmitLookup(entry);
        ReturnMiss = Here();
        EmitReturnMiss(elsewhere: false);
        ReturnElsewhere = Here();
        EmitReturnMiss(elsewhere: true);
    }

    private readonly bool _avx;

    /// <summary>Function of (vCPU's state, code): runs translated code and gives <see cref="VcpuBlock.ExitOp"/>.</summary>
    public ulong Enter { get; }

    /// <summary>Jumped to with the general registers stored: returns to C#.</summary>
    public ulong LeaveSpilled { get; }

    /// <summary>Called: executes the operation T0 by its handler; does not return where that left the block.</summary>
    public ulong Execute { get; }

    /// <summary>Called at a <see cref="CodeSite"/>: executes its operation by the handler, and goes on where the site says. Never returns.</summary>
    public ulong ExecuteSite { get; }

    /// <summary>Called where a group's first access failed: goes on without groups.</summary>
    public ulong Rest { get; }

    /// <summary>Called where a direct branch has no target yet: finds it and goes on there.</summary>
    public ulong Link { get; }

    /// <summary>Called at a <see cref="CodeSite"/>: goes on at its operation in the interpreter.</summary>
    public ulong Leave { get; }

    /// <summary>Jumped to with <see cref="VcpuBlock.Rip"/> set: leaves to the execution loop.</summary>
    public ulong LeaveAtRip { get; }

    /// <summary>Jumped to with a jump-cache entry in T1 and <see cref="VcpuBlock.Rip"/> set: goes on there in the interpreter.</summary>
    public ulong Interpret { get; }

    /// <summary>
    /// Called at a <see cref="CodeSite"/> with the target of a branch in T0: T1 = the jump-cache entry, whose code is to be jumped to at once. Where there is none, the
    /// operation is executed by its handler. Changes T0.
    /// </summary>
    public ulong Lookup { get; }

    /// <summary><see cref="Lookup"/> that needs no site: where there is no entry, T1 leads to code that finds the block.</summary>
    public ulong LookupOrFind { get; }

    /// <summary><see cref="LookupOrFind"/> after a push on the return stack, which may have been the last for which there is room.</summary>
    public ulong LookupForCall { get; }

    /// <summary>
    /// Called at a <see cref="CodeSite"/> with the target of a RET in T0 that was not on top of the return stack. Gives a pointer in T1, as to a jump-cache entry, or has
    /// the operation executed by its handler.
    /// </summary>
    public ulong ReturnMiss { get; }

    /// <summary><see cref="ReturnMiss"/> of a RET in 64-bit mode that drops nothing: does the rest of it and jumps there.</summary>
    public ulong ReturnElsewhere { get; }

    /// <summary>Called: loads the arithmetic flags, of any form, into the host's. Changes T1.</summary>
    public ulong FlagsToHost { get; }

    /// <summary>Called: stores CF in <see cref="VcpuBlock.FlagCarry"/>. Changes T1.</summary>
    public ulong FindCarry { get; }

    /// <summary>Called at a <see cref="CodeSite"/>: loads the state that SSE, AVX or x87 instructions need. Where it must not be, the interpreter goes on at the operation.</summary>
    public ulong NeedSse { get; }

    public ulong NeedAvx { get; }

    public ulong NeedX87 { get; }

    /// <summary>Called: stores vector registers where they are live, and makes them not so.</summary>
    public ulong SaveVectors { get; }

    /// <summary>Called: loads the vector registers. Gives CF=1, and does nothing, where SSE instructions may not just execute.</summary>
    public ulong LoadVectors { get; }

    /// <summary>Called: loads the x87 state. Gives CF=1, and does nothing, where x87 instructions may not just execute.</summary>
    public ulong LoadX87 { get; }

    private ulong Here()
    {
        _a.Align(16);
        return _a.Origin + (ulong)_a.Length;
    }

    private void EmitEnter()
    {
        foreach (int register in Preserved)
            _a.Push(register);
        _a.ArithmeticImmediate(Alu.Sub, Layout.HostStackPointer, 8);
        _a.Lea(Layout.State, Rdi, Layout.Bias);
        _a.Store(Layout.State, Layout.HostStack, Layout.HostStackPointer);
        _a.MoveImmediate(Layout.T0, _sentinel);
        // Replaced when its place is known.
        _a.MoveImmediate(Layout.T1, ulong.MaxValue >> 1);
        _sentinelAt = _a.Length - 8;
        for (int i = 0; i < ReturnStack.Sentinels; i++)
        {
            _a.Push(Layout.T0);
            _a.Push(Layout.T1);
        }
        _a.Store(Layout.State, Layout.ReturnBottom, Layout.HostStackPointer);
        _a.Lea(Layout.T1, Layout.HostStackPointer, -ReturnStack.Capacity);
        _a.Store(Layout.State, Layout.ReturnLimit, Layout.T1);
        _a.Move(Layout.T0, Rsi);
        LoadGeneral();
        _a.JumpRegister(Layout.T0);
    }

    /// <summary>The code that a return to the stack's bottom would come to.</summary>
    private void EmitSentinel()
    {
        _a.Store(Layout.State, Layout.Rip, Layout.T0);
        _a.JumpTo(LeaveAtRip);
    }

    private void EmitReturnMiss(bool elsewhere)
    {
        _a.PopMemory(Layout.State, Layout.Spare);
        _a.ArithmeticLoad(Alu.Cmp, Layout.HostStackPointer, Layout.State, Layout.ReturnBottom);
        int empty = _a.JumpIf(Condition.Equal);
        _a.ArithmeticImmediate(Alu.Add, Layout.HostStackPointer, ReturnStack.EntrySize);
        int[] hits = new int[ReturnStack.Tries];
        for (int i = 0; i < ReturnStack.Tries; i++)
        {
            _a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.HostStackPointer, (i * ReturnStack.EntrySize) + ReturnStack.GuestAddress);
            hits[i] = _a.JumpIf(Condition.Equal);
        }
        _a.Fix(empty);
        (int first, int second) = JumpCacheCode.EmitLookup(_a);
        JumpCacheCode.EmitCodeBase(_a);
        Finish();
        _a.Fix(first);
        _a.Fix(second);
        _a.Load(Layout.T0, Layout.State, Layout.Spare);
        _a.JumpTo(_executeSiteOfT0);
        for (int i = ReturnStack.Tries - 1; i >= 0; i--)
        {
            _a.Fix(hits[i]);
            if (i > 0)
                _a.Lea(Layout.HostStackPointer, Layout.HostStackPointer, ReturnStack.EntrySize);
        }
        // As if a jump-cache entry held the host's address.
        _a.Lea(Layout.T1, Layout.HostStackPointer, -JumpCacheCode.Code);
        _a.Lea(Layout.HostStackPointer, Layout.HostStackPointer, 8);
        Finish();

        void Finish()
        {
            if (!elsewhere)
            {
                _a.JumpMemory(Layout.State, Layout.Spare);
                return;
            }
            int stack = Layout.Host(GuestStackPointer);
            _a.Lea(stack, stack, 8);
            _a.JumpMemory(Layout.T1, JumpCacheCode.Code);
        }
    }

    /// <summary>Empties the return stack where it is full, but for the entry that was begun by a push.</summary>
    private void EmitMakeRoom()
    {
        _a.ArithmeticLoad(Alu.Cmp, Layout.HostStackPointer, Layout.State, Layout.ReturnLimit);
        int room = _a.JumpIf(Condition.AboveOrEqual);
        _a.PopMemory(Layout.State, Layout.Spare);
        _a.Pop(Layout.T1);
        _a.Load(Layout.HostStackPointer, Layout.State, Layout.ReturnBottom);
        _a.Push(Layout.T1);
        _a.Load(Layout.T1, Layout.State, Layout.Spare);
        _a.Push(Layout.T1);
        _a.Fix(room);
    }

    /// <param name="otherwise">Where the code's address lies that is given when there is no entry; null: the site's operation is executed.</param>
    private void EmitLookup(ulong? otherwise)
    {
        (int first, int second) = JumpCacheCode.EmitLookup(_a);
        JumpCacheCode.EmitCodeBase(_a);
        _a.Return();
        _a.Fix(first);
        _a.Fix(second);
        if (otherwise is ulong place)
        {
            _a.MoveImmediate(Layout.T1, place - JumpCacheCode.Code);
            _a.Return();
        }
        else
        {
            _a.JumpTo(ExecuteSite);
        }
    }

    /// <summary>The function that makes an access's page walk after a miss of the TLB, or of the stack's page: see <see cref="WalkStub"/> and <see cref="StackCache"/>.</summary>
    /// <param name="write">For writing.</param>
    /// <param name="stack">For <see cref="StackCache"/>.</param>
    /// <param name="orExecute">Called at a <see cref="CodeSite"/>, whose operation is executed where the walk fails; else it returns behind the jump that follows the call then.</param>
    public ulong Walk(bool write, bool stack, bool orExecute) => _walks[(write ? 1 : 0) | (stack ? 2 : 0) | (orExecute ? 4 : 0)];

    private readonly ulong[] _walks = new ulong[8];

    private void EmitWalks()
    {
        ulong[] plain = new ulong[2];
        for (int write = 0; write < plain.Length; write++)
        {
            plain[write] = Here();
            WalkStub.Emit(_a, write != 0, failed: 0);
        }
        const int jump = 5;
        ulong behind = Here();
        _a.ArithmeticImmediateMemory(Alu.Add, Layout.HostStackPointer, 0, jump, 8);
        _a.Return();
        for (int i = 0; i < _walks.Length; i++)
        {
            _walks[i] = Here();
            bool write = (i & 1) != 0;
            ulong failed = (i & 4) != 0 ? ExecuteSite : behind;
            if ((i & 2) != 0)
                StackCache.Emit(_a, plain[i & 1], write, failed);
            else
                WalkStub.Emit(_a, write, failed);
        }
    }

    private void EmitNeed(ulong load, int level)
    {
        int refusedLive = -1;
        if (level == VectorCode.Avx)
        {
            // Live without AVX: they may not execute now.
            _a.TestImmediateByteMemory(Layout.State, Layout.VectorLive, VectorCode.Sse);
            refusedLive = _a.JumpIf(Condition.NotEqual);
        }
        _a.CallTo(load);
        int refused = _a.JumpIf(Condition.Below);
        _a.TestImmediateByteMemory(Layout.State, Layout.VectorLive, level);
        _a.JumpIfTo(Condition.Equal, Leave);
        _a.Return();
        _a.Fix(refused);
        if (refusedLive >= 0)
            _a.Fix(refusedLive);
        _a.JumpTo(Leave);
    }

    private void EmitLeaveSpilled()
    {
        _a.CallTo(_a.Origin + (ulong)_a.Length + 5 + 0);
        // The call above is replaced below: SaveVectors is not placed yet.
        _leaveCall = _a.Length - 4;
        _a.Load(Layout.HostStackPointer, Layout.State, Layout.HostStack);
        _a.Load(Rax, Layout.State, Layout.ExitOp);
        _a.ArithmeticImmediate(Alu.Add, Layout.HostStackPointer, 8);
        for (int i = Preserved.Length - 1; i >= 0; i--)
            _a.Pop(Preserved[i]);
        _a.Return();
    }

    private int _leaveCall;

    private void EmitExecute()
    {
        StoreGeneral();
        _a.Load(Rbx, Layout.State, Layout.VectorLive, 1);
        _a.CallTo(SaveVectors);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        _a.Move(Rsi, Layout.T0, 4);
        // The call into this stub left the stack 8 bytes off its alignment.
        Call((nint)(delegate* unmanaged<VcpuBlock*, uint, ulong>)&CallBacks.Execute, 8);
        _a.Test(Rax, Rax);
        _a.JumpIfTo(Condition.NotEqual, LeaveSpilled);
        LoadWhatWasLive();
        LoadGeneral();
        _a.Return();
    }

    private ulong _executeSiteOfT0;

    private void EmitExecuteSite()
    {
        _a.Pop(Layout.T0);
        _executeSiteOfT0 = _a.Origin + (ulong)_a.Length;
        StoreGeneral();
        _a.Load(Rbx, Layout.State, Layout.VectorLive, 1);
        _a.CallTo(SaveVectors);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        _a.Move(Rsi, Layout.T0);
        Call((nint)(delegate* unmanaged<VcpuBlock*, ulong, ulong>)&CallBacks.ExecuteSite, 0);
        _a.Test(Rax, Rax);
        _a.JumpIfTo(Condition.NotEqual, LeaveSpilled);
        LoadWhatWasLive();
        LoadGeneral();
        _a.TestImmediateByteMemory(Layout.State, Layout.ReloadFlags, 1);
        int over = _a.JumpIf(Condition.Equal);
        _a.CallTo(FlagsToHost);
        _a.Fix(over);
        _a.Load(Layout.T1, Layout.State, Layout.ResumeT1);
        _a.JumpMemory(Layout.State, Layout.Resume);
    }

    private void EmitLink(nint function)
    {
        _a.Pop(Layout.T0);
        StoreGeneral();
        _a.Load(Rbx, Layout.State, Layout.VectorLive, 1);
        _a.CallTo(SaveVectors);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        _a.Move(Rsi, Layout.T0);
        Call(function, 0);
        _a.Test(Rax, Rax);
        _a.JumpIfTo(Condition.Equal, LeaveSpilled);
        _a.Move(Layout.T0, Rax);
        LoadWhatWasLive();
        LoadGeneral();
        _a.JumpRegister(Layout.T0);
    }

    private void EmitLeave()
    {
        _a.Pop(Layout.T0);
        StoreGeneral();
        _a.CallTo(SaveVectors);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        _a.Move(Rsi, Layout.T0);
        Call((nint)(delegate* unmanaged<VcpuBlock*, ulong, void>)&CallBacks.Leave, 0);
        _a.JumpTo(LeaveSpilled);
    }

    private void EmitInterpret()
    {
        StoreGeneral();
        _a.Load(Layout.T0, Layout.State, Layout.Rip);
        _a.Store(Layout.State, Layout.BlockRip, Layout.T0);
        _a.Load(Layout.T0, Layout.T1, 16);
        _a.Store(Layout.State, Layout.ExitOp, Layout.T0);
        _a.JumpTo(LeaveSpilled);
    }

    private void EmitFind()
    {
        StoreGeneral();
        _a.Load(Rbx, Layout.State, Layout.VectorLive, 1);
        _a.CallTo(SaveVectors);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        Call((nint)(delegate* unmanaged<VcpuBlock*, byte*>)&CallBacks.Find, 0);
        _a.Test(Rax, Rax);
        _a.JumpIfTo(Condition.Equal, LeaveSpilled);
        _a.Move(Layout.T0, Rax);
        LoadWhatWasLive();
        LoadGeneral();
        _a.JumpRegister(Layout.T0);
    }

    private void EmitFlagsToHost()
    {
        FlagsStub.Emit(_a);
        StoreGeneral();
        _a.Load(Rbx, Layout.State, Layout.VectorLive, 1);
        _a.CallTo(SaveVectors);
        _a.Store(Layout.State, Layout.Spare, Layout.T0);
        _a.Lea(Rdi, Layout.State, -Layout.Bias);
        Call((nint)(delegate* unmanaged<VcpuBlock*, uint>)&CallBacks.PackFlags, 8);
        _a.Move(Layout.T0, Rax, 4);
        LoadWhatWasLive();
        LoadGeneral();
        _a.Move(Layout.T1, Rax);
        _a.Move(Rax, Layout.T0, 4);
        _a.Load(Layout.T0, Layout.State, Layout.Spare);
        AccumulatorToFlags(_a);
        _a.Move(Rax, Layout.T1);
        _a.Return();
    }

    private void EmitFindCarry()
    {
        // FlagsToHost takes the stack as one call leaves it.
        _a.ArithmeticImmediate(Alu.Sub, Layout.HostStackPointer, 8);
        _a.CallTo(FlagsToHost);
        _a.SetMemory(Condition.Below, Layout.State, Layout.FlagCarry);
        _a.ArithmeticImmediate(Alu.Add, Layout.HostStackPointer, 8);
        _a.Return();
    }

    /// <summary>Changes RAX and RDX: the guest's were stored before.</summary>
    private void EmitSaveVectors()
    {
        _a.FixTo(_leaveCall, SaveVectors);
        _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.VectorLive, 0, 1);
        int done = _a.JumpIf(Condition.Equal);
        _a.TestImmediateByteMemory(Layout.State, Layout.VectorLive, VectorCode.Sse);
        int noVectors = _a.JumpIf(Condition.Equal);
        VectorCode.StoreAll(_a, _avx);
        _a.Fix(noVectors);
        _a.TestImmediateByteMemory(Layout.State, Layout.VectorLive, VectorCode.X87);
        int noX87 = _a.JumpIf(Condition.Equal);
        VectorCode.StoreX87(_a);
        _a.Fix(noX87);
        _a.StoreImmediate(Layout.State, Layout.VectorLive, 0, 1);
        _a.Fix(done);
        _a.Return();
    }

    /// <summary>After a call into C#: loads again what <see cref="SaveVectors"/> stored, by the bits in RBX.</summary>
    private void LoadWhatWasLive()
    {
        _a.Test(Rbx, Rbx, 1);
        int none = _a.JumpIf(Condition.Equal);
        _a.TestImmediateByte(Rbx, VectorCode.Sse);
        int noVectors = _a.JumpIf(Condition.Equal);
        _a.CallTo(LoadVectors);
        _a.Fix(noVectors);
        _a.TestImmediateByte(Rbx, VectorCode.X87);
        int noX87 = _a.JumpIf(Condition.Equal);
        _a.CallTo(LoadX87);
        _a.Fix(noX87);
        _a.Fix(none);
    }

    private void EmitLoadVectors() => VectorCode.EmitLoad(_a, _avx);

    /// <summary>The flags from the accumulator: AH by SAHF, OF by an addition that overflows where AL is 1.</summary>
    public static void AccumulatorToFlags(HostAssembler a)
    {
        a.ArithmeticImmediate(Alu.Add, Rax, 0x7f, 1);
        a.Byte(0x9e);
    }

    /// <remarks>
    /// Never inlined: in a NativeAOT build the function's address is known to the linker only, and the compiler, seeing it as a constant, takes it to fit in 32 bits.
    /// </remarks>
    [MethodImpl(MethodImplOptions.NoInlining)]
    private void Call(nint function, int misalignment)
    {
        if (misalignment != 0)
            _a.ArithmeticImmediate(Alu.Sub, Layout.HostStackPointer, misalignment);
        _a.MoveImmediate(Rax, (ulong)function);
        _a.CallRegister(Rax);
        if (misalignment != 0)
            _a.ArithmeticImmediate(Alu.Add, Layout.HostStackPointer, misalignment);
    }

    private void StoreGeneral()
    {
        for (int guest = 0; guest < 16; guest++)
        {
            if (Layout.Host(guest) >= 0)
                _a.Store(Layout.State, Layout.Slot(guest), Layout.Host(guest));
        }
    }

    private void LoadGeneral()
    {
        for (int guest = 0; guest < 16; guest++)
        {
            if (Layout.Host(guest) >= 0)
                _a.Load(Layout.Host(guest), Layout.State, Layout.Slot(guest));
        }
    }
}
