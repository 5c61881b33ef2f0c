using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <content>Branches and the stack.</content>
internal sealed unsafe partial class BlockCompiler
{
    private const int GuestStackPointer = 4;
    private const int GuestBase = 5;
    private const int StackSegment = 2;
    private const int CodeSegment = 1;

    // The call of this block: the jump of a full return stack, and where the entry is pushed.
    private int _returnFull;
    private int _returnPush;

    /// <summary>How far PUSHes and POPs moved the stack pointer since it was changed.</summary>
    private int _stackDistance;

    private static int StackPointer => Layout.Host(GuestStackPointer);

    /// <summary>A direct branch.</summary>
    /// <param name="condition">Its condition's number, or -1.</param>
    /// <param name="op">Its operation, whose handler is the way out.</param>
    /// <param name="target">The target's distance from the block's first byte.</param>
    private void EmitExit(int condition, Op* op, long target)
    {
        long inPage = _place + target;
        bool near = inPage is >= 0 and < PageSize;
        if (condition >= 0)
            EnsureHost();
        else
            FlushFlags();
        if (near && condition >= 0 && !_flags.Memory && !_flags.HasRecipe)
        {
            _edges.Add(new Edge(_a.JumpIf(condition), (int)inPage, _flags));
        }
        else if (near)
        {
            if (condition < 0)
                EmitJumpExit((int)inPage);
            else
                AddExit(_a.JumpIfPatchable(condition), (int)inPage, new FlagRecipe(in _flags));
        }
        else if (condition >= 0 && (_flags.Memory || _flags.HasRecipe))
        {
            AddExit(_a.JumpIfPatchable(condition), (int)inPage, new FlagRecipe(in _flags), op);
        }
        else if (condition >= 0)
        {
            _far.Add(new FarExit(_a.JumpIf(condition), (nint)op, (int)inPage, _flags));
        }
        else
        {
            EmitFarJump(op, inPage);
        }
    }

    private void EmitFullReturnStack()
    {
        if (_returnFull == 0)
            return;
        _a.Fix(_returnFull);
        _a.Load(Layout.HostStackPointer, Layout.State, Layout.ReturnBottom);
        _a.Fix(_a.Jump(), _returnPush);
    }

    private void EmitEdges()
    {
        foreach (Edge edge in _edges)
        {
            _a.Fix(edge.Field);
            StoreFlags(edge.Flags);
            EmitJumpExit(edge.Target);
        }
    }

    private void EmitFarExits()
    {
        // Their own cold paths come after all of them.
        foreach (FarExit far in _far)
        {
            _a.Fix(far.Field);
            if (!far.Flags.Memory)
                StoreFlags(far.Flags);
            EmitFarJump((Op*)far.Op, far.InPage);
        }
    }

    /// <summary>To another page: through the jump cache, or the operation's handler where that does not know.</summary>
    private void EmitFarJump(Op* op, long inPage)
    {
        _a.Load(Layout.T0, Layout.State, Layout.CodeBase);
        AddConstant(Layout.T0, inPage);
        if (Is32)
            _a.Move(Layout.T0, Layout.T0, 4);
        else if (!Is64)
            _a.ZeroExtend(Layout.T0, Layout.T0, 2);
        EmitLookup(op);
        _a.JumpMemory(Layout.T1, JumpCacheCode.Code);
    }

    /// <summary>T1 = the jump-cache entry of the address in T0. Where that is not there, the operation is its handler's.</summary>
    private void EmitLookup(Op* op)
    {
        _a.CallTo(_stubs.Lookup);
        AddSite(op);
    }

    /// <summary>
    /// The same without a call: how a branch with many targets is predicted hangs on the branches before it, and a call and a return more for each make what the
    /// processor remembers of them shorter.
    /// </summary>
    private void EmitLookupInPlace()
    {
        (int first, int second) = JumpCacheCode.EmitLookup(_a);
        AddField(first);
        AddField(second);
    }

    /// <summary>A cold path that does not come back.</summary>
    private void AddLastCold(int i)
    {
        if (_fields == 0 && _walks.Count == _firstWalk)
            return;
        AddCold(i, in _flags, reload: false);
        Cold cold = _cold[^1];
        cold.Resume = -1;
        _cold[^1] = cold;
    }

    /// <summary>T0 = the host address of the stack's next place below; fails to the next cold path.</summary>
    private void EmitPushAddress(int i)
    {
        if (TryEmitMember(i))
            return;
        BeforeClobber(_need[i]);
        int bytes = StackBytes;
        _a.Lea(Layout.T0, StackPointer, LeaderDistance(i) - bytes, bytes);
        if (!Is64)
            EmitSegment(StackSegment, bytes, write: true);
        EmitTranslationOf(i, bytes, write: true, stack: true);
    }

    /// <summary>T0 = the host address of the stack's top, or what <paramref name="register"/> points at.</summary>
    private void EmitPopAddress(int i, int register)
    {
        if (TryEmitMember(i))
            return;
        BeforeClobber(_need[i]);
        int bytes = StackBytes;
        if (LeaderDistance(i) == 0)
            _a.Move(Layout.T0, register, bytes);
        else
            _a.Lea(Layout.T0, register, LeaderDistance(i), bytes);
        if (!Is64)
            EmitSegment(StackSegment, bytes, write: false);
        EmitTranslationOf(i, bytes, write: false, stack: true);
    }

    private void MoveStackPointer(int distance) => _a.Lea(StackPointer, StackPointer, distance, StackBytes);

    /// <summary>Moves it for a PUSH or POP: for several that follow each other and whose addresses are checked already, once.</summary>
    private void MoveStackPointerAfter(int i, int distance)
    {
        _stackDistance += distance;
        if (_accessOf[i] >= 0 && IsPlain(i) && _accessOf[i + 1] >= 0 && !IsLeader(i + 1) && IsPlain(i + 1))
            return;
        MoveStackPointer(_stackDistance);
        _stackDistance = 0;

        bool IsPlain(int n) => _items[n].Kind is InstructionKind.Push or InstructionKind.Pop
            && (_items[n].Instruction.Op0Kind != OpKind.Register || NumberOf(_items[n].Instruction.Op0Register) != GuestStackPointer);
    }

    private void EmitPush(int i)
    {
        ref Item item = ref _items[i];
        BeforeWrite(1u << GuestStackPointer);
        FlagTracker before = _flags;
        EmitPushAddress(i);
        int bytes = StackBytes;
        if (item.Instruction.Op0Kind == OpKind.Register)
        {
            int guest = NumberOf(item.Instruction.Op0Register);
            if (Layout.Host(guest) < 0)
                _a.Load(Layout.T1, Layout.State, Layout.Slot(guest));
            _a.Store(Layout.T0, _operand, Layout.Host(guest) < 0 ? Layout.T1 : Layout.Host(guest), bytes);
        }
        else
        {
            _a.StoreImmediate(Layout.T0, _operand, (int)item.Op->Imm, bytes);
        }
        MoveStackPointerAfter(i, -bytes);
        before.Host = false;
        before.Memory = _flags.Memory;
        AddCold(i, in before, reload: false);
    }

    private void EmitPop(int i)
    {
        ref Item item = ref _items[i];
        int guest = NumberOf(item.Instruction.Op0Register);
        BeforeWrite(1u << GuestStackPointer | 1u << guest);
        EmitPopAddress(i, StackPointer);
        FlagTracker before = _flags;
        int bytes = StackBytes;
        MoveStackPointerAfter(i, bytes);
        if (Layout.Host(guest) >= 0)
        {
            _a.Load(Layout.Host(guest), Layout.T0, _operand, bytes);
        }
        else
        {
            _a.Load(Layout.T1, Layout.T0, _operand, bytes);
            _a.Store(Layout.State, Layout.Slot(guest), Layout.T1);
        }
        AddCold(i, in before, reload: false);
    }

    private void EmitLeaveFrame(int i)
    {
        BeforeWrite(1u << GuestStackPointer | 1u << GuestBase);
        int frame = Layout.Host(GuestBase);
        EmitPopAddress(i, frame);
        FlagTracker before = _flags;
        _a.Lea(StackPointer, frame, StackBytes, StackBytes);
        _a.Load(frame, Layout.T0, _operand, StackBytes);
        AddCold(i, in before, reload: false);
    }

    /// <summary>Pushes the address of the next instruction, on the guest's stack where T0 points and on the return stack.</summary>
    /// <param name="i">Number of the item.</param>
    /// <param name="limit">Looks for room on the return stack.</param>
    private void EmitPushReturn(int i, bool limit = true)
    {
        Op* op = _items[i].Op;
        _a.Load(Layout.T1, Layout.State, Layout.CodeBase);
        _a.Lea(Layout.T1, Layout.T1, _place + op->Offset + op->Length);
        if (!Is64)
            _a.Move(Layout.T1, Layout.T1, 4);
        _a.Store(Layout.T0, _operand, Layout.T1, StackBytes);
        MoveStackPointer(-StackBytes);
        AddLastCold(i);
        if (limit)
        {
            _a.ArithmeticLoad(Alu.Cmp, Layout.HostStackPointer, Layout.State, Layout.ReturnLimit);
            _returnFull = _a.JumpIf(Condition.Below);
            _returnPush = _a.Length;
        }
        _a.Push(Layout.T1);
    }

    /// <summary>Where the guest's RET comes back to: from the return stack's entry to the block there.</summary>
    private void EmitReturnPoint(Op* op)
    {
        int place = _place + op->Offset + op->Length;
        if (place >= PageSize)
        {
            _a.Pop(Layout.T0);
            _a.CallTo(_stubs.LookupOrFind);
            _a.JumpMemory(Layout.T1, JumpCacheCode.Code);
            return;
        }
        _a.Pop(Layout.T1);
        AddConstant(Layout.T1, -place);
        _a.Store(Layout.State, Layout.CodeBase, Layout.T1);
        EmitJumpExit(place);
    }

    private void EmitCall(int i)
    {
        Op* op = _items[i].Op;
        FlushFlags();
        EmitPushAddress(i);
        long inPage = _place + op->Imm;
        bool near = inPage is >= 0 and < PageSize;
        EmitPushReturn(i, near);
        if (near)
        {
            AddExit(_a.CallPatchable(), (int)inPage);
            EmitReturnPoint(op);
            return;
        }
        EmitFarCall(op);
    }

    private void EmitFarCall(Op* op)
    {
        // T1 is where it comes back to.
        _a.Lea(Layout.T0, Layout.T1, (int)(op->Imm - op->Offset - op->Length), Is64 ? 8 : 4);
        _a.CallTo(_stubs.LookupForCall);
        _a.CallMemory(Layout.T1, JumpCacheCode.Code);
        EmitReturnPoint(op);
    }

    private void EmitReturn(int i)
    {
        ref Item item = ref _items[i];
        int drop = StackBytes + (int)item.Op->Imm;
        FlushFlags();
        EmitPopAddress(i, StackPointer);
        _a.Load(Layout.T0, Layout.T0, _operand, StackBytes);
        _a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.HostStackPointer, ReturnStack.GuestAddress);
        int miss = _a.JumpIf(Condition.NotEqual);
        _a.Lea(StackPointer, StackPointer, drop, StackBytes);
        _a.Return();
        _a.Fix(miss);
        if (Is64 && item.Op->Imm == 0)
        {
            _a.CallTo(_stubs.ReturnElsewhere);
            AddSite(item.Op);
        }
        else
        {
            _a.CallTo(_stubs.ReturnMiss);
            AddSite(item.Op);
            _a.Lea(StackPointer, StackPointer, drop, StackBytes);
            _a.JumpMemory(Layout.T1, JumpCacheCode.Code);
        }
        AddLastCold(i);
    }

    /// <summary>T0 = the target of an indirect branch.</summary>
    private void EmitTarget(int i)
    {
        ref Item item = ref _items[i];
        int bytes = Is64 ? 8 : Is32 ? 4 : 2;
        if (item.Memory < 0)
        {
            int guest = NumberOf(item.Instruction.Op0Register);
            LoadGuest(Layout.T0, guest, Math.Max(bytes, 4));
            if (bytes == 2)
                _a.ZeroExtend(Layout.T0, Layout.T0, 2);
            BeforeClobber(_need[i]);
            return;
        }
        EmitAddress(i, bytes, write: false);
        _a.Load(Layout.T0, Layout.T0, _operand, bytes);
    }

    private void EmitJumpIndirect(int i)
    {
        FlushFlags();
        EmitTarget(i);
        EmitLookupInPlace();
        JumpCacheCode.EmitCodeBase(_a);
        _a.JumpMemory(Layout.T1, JumpCacheCode.Code);
        AddLastCold(i);
    }

    private void EmitCallIndirect(int i)
    {
        FlushFlags();
        EmitTarget(i);
        // The push may fail, and needs to know this block's page until then.
        EmitLookupInPlace();
        _a.Store(Layout.State, Layout.Spare, Layout.T1);
        EmitPushAddress(i);
        EmitPushReturn(i);
        JumpCacheCode.EmitCodeBase(_a);
        _a.Load(Layout.T1, Layout.State, Layout.Spare);
        _a.CallMemory(Layout.T1, JumpCacheCode.Code);
        EmitReturnPoint(_items[i].Op);
    }
}
