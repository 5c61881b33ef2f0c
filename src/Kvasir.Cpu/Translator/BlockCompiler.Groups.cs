using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <content>
/// Groups: accesses of a block at constant distances from each other (fields of a structure, a stack frame) whose addresses are checked once, by the first of them. That
/// keeps the host's address, and the rest need neither a check nor the host's flags. Where the check fails, the interpreter goes on there, and when that happens often a
/// translation of the rest of the block that has no groups.
/// </content>
internal sealed unsafe partial class BlockCompiler
{
    /// <summary>Bytes that a group covers at most: what crosses a page goes to the handlers.</summary>
    private const int MaxGroupSpan = 256;
    private const int RipBase = -2;
    private const int Registers = 16;

    private readonly List<GroupAccess> _accesses = [];
    private readonly List<Group> _groups = [];
    private readonly List<GroupKey> _keys = [];
    private readonly int[] _accessOf = new int[MaxInstructions + 1];
    private readonly int[] _versions = new int[Registers];
    private readonly long[] _offsets = new long[Registers];
    private int _nextVersion;

    /// <summary>Which group's start T0 points to, and when that was: <see cref="HostAssembler.Writes"/>.</summary>
    private int _pointed;
    private int _pointedAt;

    /// <summary>Displacement of the operand from T0.</summary>
    private int _operand;

    /// <summary>An address but for its constant: versions of its registers (-1: none) and its segment.</summary>
    private readonly record struct GroupKey(int Base, int Index, int Scale, int Segment);

    private struct GroupAccess
    {
        public int Item;
        public int Key;
        public long Offset;
        public int Size;
        public bool Write;

        /// <summary>Counts what ends every group, and conditional branches.</summary>
        public int Epoch;
        public int Branches;
        public int Group;
    }

    private struct Group
    {
        public int Key;
        public int Epoch;
        public long Start;
        public long End;
        public int Leader;
        public int Last;
        public int Members;

        public bool Write;
        public int Slot;

        /// <summary>Where the start's address is stored, and whether anything loads it.</summary>
        public int StoreAt;
        public int StoreEnd;
        public bool Loaded;
    }

    private void FindGroups(int count)
    {
        _accesses.Clear();
        _groups.Clear();
        _keys.Clear();
        _pointed = -1;
        _operand = 0;
        // What comes behind the last is looked at as well.
        for (int i = 0; i <= count; i++)
            _accessOf[i] = -1;
        if (!Is64 || (_block->Key & CodeMode.Ungrouped) != 0)
            return;
        CollectAccesses(count);
        for (int n = 0; n < _accesses.Count; n++)
            Assign(n);
        // One access is no group.
        for (int n = 0; n < _accesses.Count; n++)
        {
            ref readonly GroupAccess access = ref CollectionsMarshal.AsSpan(_accesses)[n];
            _accessOf[access.Item] = access.Group >= 0 && _groups[access.Group].Members > 1 ? n : -1;
        }
        AssignSlots();
        for (int i = 0; i < count; i++)
        {
            if (_accessOf[i] >= 0 && !IsLeader(i) && _items[i].Instruction.Mnemonic != Mnemonic.Cmpxchg16b)
                _items[i].MayFault = _items[i].Kind is not (InstructionKind.Native or InstructionKind.MultiplyNoFlags or InstructionKind.PushFlags or InstructionKind.Push or InstructionKind.Pop or InstructionKind.LeaveFrame);
        }
    }

    private bool IsLeader(int i) => _groups[_accesses[_accessOf[i]].Group].Leader == i;

    private void CollectAccesses(int count)
    {
        int epoch = 0;
        int branches = 0;
        ForgetRegisters();
        for (int i = 0; i < count; i++)
        {
            ref Item item = ref _items[i];
            switch (item.Kind)
            {
                case InstructionKind.Handler:
                    epoch++;
                    ForgetRegisters();
                    continue;
                case InstructionKind.X87:
                    // The state it needs may be loaded in the middle of a group's run.
                    epoch++;
                    continue;
                case InstructionKind.JumpIf or InstructionKind.Jump:
                    branches++;
                    continue;
                case InstructionKind.Push:
                    Add(i, StackKey(), _offsets[GuestStackPointer] - 8, 8, true, epoch, branches);
                    _offsets[GuestStackPointer] -= 8;
                    continue;
                case InstructionKind.Pop:
                    Add(i, StackKey(), _offsets[GuestStackPointer], 8, false, epoch, branches);
                    _offsets[GuestStackPointer] += 8;
                    Renew(NumberOf(item.Instruction.Op0Register));
                    continue;
                case InstructionKind.LeaveFrame:
                    Add(i, new GroupKey(_versions[GuestBase], -1, 0, 6), _offsets[GuestBase], 8, false, epoch, branches);
                    _versions[GuestStackPointer] = _versions[GuestBase];
                    _offsets[GuestStackPointer] = _offsets[GuestBase] + 8;
                    Renew(GuestBase);
                    continue;
                case InstructionKind.Call:
                    Add(i, StackKey(), _offsets[GuestStackPointer] - 8, 8, true, epoch, branches);
                    continue;
                case InstructionKind.Return:
                    Add(i, StackKey(), _offsets[GuestStackPointer], 8, false, epoch, branches);
                    continue;
                case InstructionKind.CallIndirect:
                    continue;
                case InstructionKind.CounterJump:
                    branches++;
                    Renew(GuestCounter);
                    continue;
                case InstructionKind.PushFlags:
                    Add(i, StackKey(), _offsets[GuestStackPointer] - 8, 8, true, epoch, branches);
                    _offsets[GuestStackPointer] -= 8;
                    continue;
                case InstructionKind.PushMemory:
                    _offsets[GuestStackPointer] -= 8;
                    continue;
                case InstructionKind.BitString:
                    continue;
                default:
                    break;
            }
            if (item.Memory >= 0)
                AddOperand(i, epoch, branches);
            Follow(ref item);
        }
    }

    private GroupKey StackKey() => new(_versions[GuestStackPointer], -1, 0, 6);

    private void AddOperand(int i, int epoch, int branches)
    {
        ref Item item = ref _items[i];
        Op* op = item.Op;
        // The group's start may lie below: that displacement must have 32 bits as well.
        if (op->Address != AddressKind.Long || op->Disp != (int)op->Disp || op->Disp < int.MinValue + MaxGroupSpan)
            return;
        int @base = -1;
        int index = -1;
        long offset = op->Disp;
        if (op->Base == VcpuBlock.BlockRipOffset)
        {
            @base = RipBase;
            offset += item.Place;
        }
        else if (op->Base != VcpuBlock.ZeroOffset)
        {
            @base = _versions[op->Base >> 3];
            offset += _offsets[op->Base >> 3];
        }
        if (op->Index != VcpuBlock.ZeroOffset)
        {
            index = _versions[op->Index >> 3];
            offset += _offsets[op->Index >> 3] << op->Scale;
        }
        int size = MemorySize(in item.Instruction);
        if (size <= 0 || offset != (int)offset)
            return;
        Add(i, new GroupKey(@base, index, index < 0 ? 0 : op->Scale, op->Seg), offset, size, item.MemoryWritten, epoch, branches);
    }

    private void Add(int i, GroupKey key, long offset, int size, bool write, int epoch, int branches)
    {
        int number = _keys.IndexOf(key);
        if (number < 0)
        {
            number = _keys.Count;
            _keys.Add(key);
        }
        _accesses.Add(new GroupAccess { Item = i, Key = number, Offset = offset, Size = size, Write = write, Epoch = epoch, Branches = branches, Group = -1 });
    }

    /// <summary>What an instruction does to the registers that addresses are made of.</summary>
    private void Follow(ref Item item)
    {
        ref Instruction instruction = ref item.Instruction;
        if (item.Written == 0)
            return;
        if (item.Kind == InstructionKind.Native && instruction.OpCount == 2 && instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsGPR64())
        {
            int to = NumberOf(instruction.Op0Register);
            switch (instruction.Mnemonic)
            {
                case Mnemonic.Add or Mnemonic.Sub when instruction.Op1Kind != OpKind.Register && instruction.Op1Kind != OpKind.Memory:
                    long distance = (long)instruction.GetImmediate(1);
                    Move(to, to, instruction.Mnemonic == Mnemonic.Add ? distance : -distance);
                    return;
                case Mnemonic.Mov when instruction.Op1Kind == OpKind.Register && instruction.Op1Register.IsGPR64():
                    Move(to, NumberOf(instruction.Op1Register), 0);
                    return;
                case Mnemonic.Lea when item.Op->Address == AddressKind.Long && item.Op->Base < VcpuBlock.ZeroOffset && item.Op->Index == VcpuBlock.ZeroOffset:
                    Move(to, item.Op->Base >> 3, item.Op->Disp);
                    return;
                default:
                    break;
            }
        }
        if (item.Kind == InstructionKind.Native && instruction.Mnemonic is Mnemonic.Inc or Mnemonic.Dec && instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsGPR64())
        {
            int counter = NumberOf(instruction.Op0Register);
            Move(counter, counter, instruction.Mnemonic == Mnemonic.Inc ? 1 : -1);
            return;
        }
        for (int register = 0; register < Registers; register++)
        {
            if ((item.Written >> register & 1) != 0)
                Renew(register);
        }
    }

    private void Move(int to, int from, long distance)
    {
        _versions[to] = _versions[from];
        _offsets[to] = _offsets[from] + distance;
    }

    private void Renew(int register)
    {
        _versions[register] = _nextVersion++;
        _offsets[register] = 0;
    }

    private void ForgetRegisters()
    {
        _nextVersion = 0;
        for (int register = 0; register < Registers; register++)
            Renew(register);
    }

    /// <summary>Puts an access into a group that is open, or opens one.</summary>
    private void Assign(int n)
    {
        ref GroupAccess access = ref CollectionsMarshal.AsSpan(_accesses)[n];
        Span<Group> groups = CollectionsMarshal.AsSpan(_groups);
        for (int g = groups.Length - 1; g >= 0; g--)
        {
            ref Group open = ref groups[g];
            if (open.Epoch != access.Epoch)
                break;
            if (open.Key != access.Key || (access.Write && !open.Write))
                continue;
            long start = Math.Min(open.Start, access.Offset);
            long end = Math.Max(open.End, access.Offset + access.Size);
            if (end - start > MaxGroupSpan)
                continue;
            open.Start = start;
            open.End = end;
            open.Last = access.Item;
            open.Members++;
            access.Group = g;
            return;
        }
        access.Group = groups.Length;
        _groups.Add(new Group
        {
            Key = access.Key,
            Epoch = access.Epoch,
            Start = access.Offset,
            End = access.Offset + access.Size,
            Leader = access.Item,
            Last = access.Item,
            Members = 1,
            Write = access.Write || IsWrittenNext(n),
            Slot = -1,
        });
    }

    /// <summary>Whether a write to the same place is certain to come: its page may be asked for writing at once.</summary>
    private bool IsWrittenNext(int n)
    {
        ReadOnlySpan<GroupAccess> accesses = CollectionsMarshal.AsSpan(_accesses);
        ref readonly GroupAccess first = ref accesses[n];
        for (int k = n + 1; k < accesses.Length; k++)
        {
            ref readonly GroupAccess next = ref accesses[k];
            if (next.Epoch != first.Epoch || next.Branches != first.Branches)
                return false;
            if (next.Key == first.Key && next.Write && Math.Abs(next.Offset - first.Offset) <= MaxGroupSpan / 2)
                return true;
        }
        return false;
    }

    private void AssignSlots()
    {
        for (int g = 0; g < _groups.Count; g++)
        {
            Group group = _groups[g];
            if (group.Members < 2)
                continue;
            int used = 0;
            for (int h = 0; h < g; h++)
            {
                if (_groups[h].Slot >= 0 && _groups[h].Last >= group.Leader)
                    used |= 1 << _groups[h].Slot;
            }
            int slot = System.Numerics.BitOperations.TrailingZeroCount(~used);
            if (slot < VcpuBlock.GroupSlots)
            {
                _groups[g] = group with { Slot = slot };
                continue;
            }
            foreach (GroupAccess access in _accesses)
            {
                if (access.Group == g)
                    _accessOf[access.Item] = -1;
            }
        }
    }

    /// <summary>The distance of a group's start from the access of its first member; 0 for an access of its own.</summary>
    private int LeaderDistance(int i)
    {
        if (_accessOf[i] < 0)
            return 0;
        GroupAccess access = _accesses[_accessOf[i]];
        return (int)(_groups[access.Group].Start - access.Offset);
    }

    /// <summary>Makes T0 point at a group whose address was checked. False: this access must do so itself.</summary>
    private bool TryEmitMember(int i)
    {
        _operand = 0;
        if (_accessOf[i] < 0 || IsLeader(i))
            return false;
        GroupAccess access = _accesses[_accessOf[i]];
        Group group = _groups[access.Group];
        if (_pointed != access.Group || _pointedAt != _a.Writes)
        {
            _a.Load(Layout.T0, Layout.State, Layout.Groups + (group.Slot * 8));
            _groups[access.Group] = group with { Loaded = true };
            _pointed = access.Group;
            _pointedAt = _a.Writes;
        }
        _operand = (int)(access.Offset - group.Start);
        return true;
    }

    /// <summary>The translation of an access: of its group's whole span where it is the first of one.</summary>
    private void EmitTranslationOf(int i, int size, bool write, bool stack)
    {
        if (_accessOf[i] < 0)
        {
            EmitTranslation(size, write, stack);
            return;
        }
        int number = _accesses[_accessOf[i]].Group;
        Group group = _groups[number];
        EmitTranslation((int)(group.End - group.Start), group.Write, stack);
        _pointed = number;
        _pointedAt = _a.Writes;
        int at = _a.Length;
        _a.Store(Layout.State, Layout.Groups + (group.Slot * 8), Layout.T0);
        _groups[number] = group with { StoreAt = at, StoreEnd = _a.Length };
        _operand = (int)(_accesses[_accessOf[i]].Offset - group.Start);
    }

    /// <summary>Stores of addresses that nothing loads become no-operations.</summary>
    private void RemoveUnusedStores()
    {
        foreach (Group group in _groups)
        {
            if (group.Slot >= 0 && !group.Loaded && group.StoreEnd > group.StoreAt)
                _a.Overwrite(group.StoreAt, group.StoreEnd);
        }
    }

    /// <summary>The way out of a group's first access.</summary>
    private void EmitRest(in Cold cold)
    {
        for (int n = 0; n < cold.Walks; n++)
        {
            Walk walk = _walks[cold.FirstWalk + n];
            _a.Fix(walk.Field);
            // Where it fails it returns behind the jump.
            _a.CallTo(_stubs.Walk(walk.Write, walk.Stack, orExecute: false));
            _a.Fix(_a.Jump(), walk.Retry);
            if (n > 0)
                throw new InvalidOperationException("a group that begins with two operands in memory");
        }
        FixFields(in cold);
        if (cold.NeedFlags && !cold.Flags.Memory)
            StoreRecipe(in cold.Flags);
        EmitJumpExit(0, (uint)OpOffset(cold.Op));
    }
}
