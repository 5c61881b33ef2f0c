using System;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Memory operands: addresses, the software TLB, and the way out to the handler.</content>
internal sealed unsafe partial class BlockCompiler
{
    private const int PageSize = 4096;

    /// <summary>Makes T0 the host address of an item's memory operand. What fails leads to the item's cold path, see <see cref="AddCold"/>. Changes T1 and the host's flags.</summary>
    /// <param name="i">Number of the item.</param>
    /// <param name="size">Bytes of the operand.</param>
    /// <param name="write">It is written.</param>
    /// <param name="alignment">What the address must be a multiple of: 1 or 16 or 32.</param>
    private void EmitAddress(int i, int size, bool write, int alignment = 1)
    {
        Op* op = _items[i].Op;
        if (TryEmitMember(i))
        {
            EmitAlignment(i, alignment);
            return;
        }
        BeforeClobber(_need[i]);
        EmitOffset(op, LeaderDistance(i));
        if (op->Address is AddressKind.Legacy16 or AddressKind.Legacy32)
            EmitSegment(op->Seg, size, write);
        else if (op->Seg != 6)
            _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.State, Layout.SegBase + (op->Seg * 8));
        EmitTranslationOf(i, size, write, op->Base == GuestStackPointer * 8 && op->Index == VcpuBlock.ZeroOffset);
        EmitAlignment(i, alignment);
    }

    /// <summary>An operand that is not aligned as it must be is the handler's. Pages are aligned: the host's address tells as well as the guest's.</summary>
    private void EmitAlignment(int i, int alignment)
    {
        if (alignment <= 1)
            return;
        BeforeClobber(_need[i]);
        int register = Layout.T0;
        if (_operand % alignment != 0)
        {
            _a.Lea(Layout.T1, Layout.T0, _operand);
            register = Layout.T1;
        }
        _a.TestImmediateByte(register, alignment - 1);
        AddField(_a.JumpIf(Condition.NotEqual));
    }

    /// <summary>T0 = the effective address and a distance, cut to the address size.</summary>
    private void EmitOffset(Op* op, int distance = 0)
    {
        int size = op->Address == AddressKind.Long ? 8 : 4;
        if (op->Base == VcpuBlock.BlockRipOffset)
        {
            _a.Load(Layout.T0, Layout.State, Layout.CodeBase);
            AddConstant(Layout.T0, op->Disp + _place + distance);
            if (size == 4)
                _a.Move(Layout.T0, Layout.T0, 4);
            return;
        }
        int @base = op->Base == VcpuBlock.ZeroOffset ? -1 : op->Base >> 3;
        int index = op->Index == VcpuBlock.ZeroOffset ? -1 : op->Index >> 3;
        if (size == 8 && op->Disp != (int)op->Disp)
        {
            // Only an absolute address has 64 bits.
            if (@base >= 0 || index >= 0)
                throw new InvalidOperationException("a displacement of 64 bits beside a register");
            _a.MoveImmediate(Layout.T0, (ulong)op->Disp);
        }
        else
        {
            EmitLea(Layout.T0, @base, index, op->Scale, (int)op->Disp + distance, size);
        }
        if (op->Address == AddressKind.Legacy16)
            _a.ZeroExtend(Layout.T0, Layout.T0, 2);
    }

    /// <summary>LEA of guest registers; -1: none. Changes T0 and T1.</summary>
    private void EmitLea(int to, int @base, int index, int scale, int displacement, int size)
    {
        int hostBase = @base < 0 ? -1 : Layout.Host(@base);
        int hostIndex = index < 0 ? -1 : Layout.Host(index);
        if (@base >= 0 && hostBase < 0)
        {
            _a.Load(Layout.T0, Layout.State, Layout.Slot(@base));
            hostBase = Layout.T0;
        }
        if (index >= 0 && hostIndex < 0)
        {
            _a.Load(Layout.T1, Layout.State, Layout.Slot(index));
            hostIndex = Layout.T1;
        }
        if (hostIndex >= 0)
            _a.Lea(to, hostBase, hostIndex, scale, displacement, size);
        else if (hostBase < 0)
            _a.MoveImmediate(to, size == 8 ? (ulong)(long)displacement : (uint)displacement);
        else if (displacement == 0)
            MoveUnlessSame(to, hostBase, size);
        else
            _a.Lea(to, hostBase, displacement, size);
    }

    private void MoveUnlessSame(int to, int from, int size)
    {
        if (to != from || size != 8)
            _a.Move(to, from, size);
    }

    private void AddConstant(int to, long value)
    {
        if (value == (int)value)
        {
            if (value != 0)
                _a.Lea(to, to, (int)value);
            return;
        }
        _a.MoveImmediate(Layout.T1, (ulong)value);
        _a.Lea(to, to, Layout.T1, 0, 0);
    }

    /// <summary>Legacy segmentation: T0 is an offset of 32 bits and becomes a linear address.</summary>
    private void EmitSegment(int segment, int size, bool write)
    {
        _a.Lea(Layout.T1, Layout.T0, size);
        _a.ArithmeticLoad(Alu.Cmp, Layout.T1, Layout.State, (write ? Layout.SegWriteEnd : Layout.SegReadEnd) + (segment * 8));
        AddField(_a.JumpIf(Condition.Above));
        _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.State, Layout.SegBase + (segment * 8), 4);
    }

    /// <summary>From the linear address in T0 to a host address: one compare covers the tag and the page's end.</summary>
    /// <param name="size">Bytes of the operand.</param>
    /// <param name="write">It is written.</param>
    /// <param name="stack">It lies on the stack: the page that was used there last is tried.</param>
    private void EmitTranslation(int size, bool write, bool stack)
    {
        int retry = _a.Length;
        if (stack)
        {
            int entry = write ? Layout.StackWrite : Layout.StackRead;
            _a.ArithmeticLoad(Alu.Xor, Layout.T0, Layout.State, entry);
            _a.ArithmeticImmediate(Alu.Cmp, Layout.T0, PageSize - size);
            _walks.Add(new Walk(_a.JumpIf(Condition.Above), retry, write, Stack: true));
            _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.State, entry + StackCache.Host);
            return;
        }
        _a.RotateRight(Layout.T1, Layout.T0, 8);
        _a.ArithmeticImmediate(Alu.And, Layout.T1, (int)Tlb.IndexMask << 4, 4);
        _a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, write ? Layout.WriteTlb : Layout.ReadTlb);
        _a.ArithmeticLoad(Alu.Xor, Layout.T0, Layout.T1, 0);
        _a.ArithmeticImmediate(Alu.Cmp, Layout.T0, PageSize - size);
        _walks.Add(new Walk(_a.JumpIf(Condition.Above), retry, write, Stack: false));
        _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.T1, 8);
    }

    /// <summary>A jump to the cold path that is made next.</summary>
    private void AddField(int position) => _field[_fields++] = position;

    /// <summary>The cold path of the jumps since the last one: the handler does the operation, and execution goes on here.</summary>
    /// <param name="i">Number of the item.</param>
    /// <param name="flags">Where the flags were before the instruction.</param>
    /// <param name="reload">The instruction set flags that the host's are to hold.</param>
    private void AddCold(int i, in FlagTracker flags, bool reload)
    {
        // The address of a group's further members was checked.
        if (_fields == 0 && _walks.Count == _firstWalk)
            return;
        _cold.Add(new Cold
        {
            Field0 = _field[0],
            Field1 = _field[1],
            Field2 = _field[2],
            Field3 = _field[3],
            Fields = _fields,
            Op = _items[i].Op,
            Group = _accessOf[i] >= 0 && IsLeader(i) ? _accesses[_accessOf[i]].Group : -1,
            FirstWalk = _firstWalk,
            Walks = _walks.Count - _firstWalk,
            Resume = _a.Length,
            Mirrored = _a.Mirrored,
            Flags = flags,
            NeedFlags = _need[i],
            ReloadFlags = reload,
        });
        // Who comes back from a handler finds T0 changed; nobody comes back from a group's first access.
        if (_cold[^1].Group < 0)
            _pointed = -1;
        _fields = 0;
        _firstWalk = _walks.Count;
    }

    private void EmitColds()
    {
        foreach (Cold cold in _cold)
        {
            if (cold.Group >= 0)
            {
                EmitRest(in cold);
                continue;
            }
            for (int n = 0; n < cold.Walks; n++)
            {
                Walk walk = _walks[cold.FirstWalk + n];
                _a.Fix(walk.Field);
                _a.CallTo(_stubs.Walk(walk.Write, walk.Stack, orExecute: true));
                AddSite(in cold);
                _a.Fix(_a.Jump(), walk.Retry);
            }
            if (cold.Fields == 0)
                continue;
            FixFields(in cold);
            _a.CallTo(_stubs.ExecuteSite);
            AddSite(in cold);
        }
        EmitVectorLoads();
        EmitEdges();
        EmitFarExits();
        EmitFullReturnStack();
        EmitLinkCalls();
    }

    private void FixFields(in Cold cold)
    {
        if (cold.Fields > 0)
            _a.Fix(cold.Field0);
        if (cold.Fields > 1)
            _a.Fix(cold.Field1);
        if (cold.Fields > 2)
            _a.Fix(cold.Field2);
        if (cold.Fields > 3)
            _a.Fix(cold.Field3);
    }
}
