using Iced.Intel;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>Instructions with ways of their own: counters, bit strings, MULX, and the system flags of kernel code.</content>
internal sealed unsafe partial class BlockCompiler
{
    private const int GuestCounter = 1;
    private const int Doubleword = 4;

    /// <summary>JRCXZ and JECXZ; LOOP, which counts first. None of them changes flags, and the host's JRCXZ does not either.</summary>
    private void EmitCounterJump(int i)
    {
        ref Item item = ref _items[i];
        int counter = Layout.Host(GuestCounter);
        long inPage = _place + item.Op->Imm;
        bool loop = item.Instruction.Mnemonic == Mnemonic.Loop;
        FlushFlags();
        if (loop)
        {
            BeforeWrite(1u << GuestCounter);
            _a.Lea(counter, counter, -1);
        }
        // JRCXZ reaches 127 bytes: over a jump, or to one.
        int zero = _a.JumpIfCounterZero();
        if (loop)
        {
            EmitJumpExit((int)inPage);
            _a.FixShort(zero);
            return;
        }
        int over = _a.Jump();
        _a.FixShort(zero);
        EmitJumpExit((int)inPage);
        _a.Fix(over);
    }

    /// <summary>MULX: both destinations and the source may lie in memory.</summary>
    private void EmitMultiplyNoFlags(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        int size = instruction.Op0Register.GetSize();
        int high = NumberOf(instruction.Op0Register);
        int low = NumberOf(instruction.Op1Register);
        if (_need[i + 1])
            BeforeWrite(item.Written);
        int @base = Layout.T0;
        int displacement = 0;
        int source = -1;
        bool checkedHere = false;
        FlagTracker before = _flags;
        if (item.Memory >= 0)
        {
            EmitAddress(i, size, write: false);
            before = _flags;
            displacement = _operand;
            checkedHere = true;
        }
        else
        {
            source = Layout.Host(NumberOf(instruction.Op2Register));
            @base = Layout.State;
            displacement = Layout.Slot(NumberOf(instruction.Op2Register));
        }
        int hostHigh = Layout.Host(high) >= 0 ? Layout.Host(high) : Layout.T1;
        // The address is read before the results are written.
        int hostLow = Layout.Host(low) >= 0 ? Layout.Host(low) : high == low ? hostHigh : Layout.T0;
        _a.MultiplyNoFlags(hostHigh, hostLow, source, @base, displacement, size);
        // Where both are the same register, it holds the high half.
        if (Layout.Host(low) < 0 && high != low)
            _a.Store(Layout.State, Layout.Slot(low), hostLow);
        if (Layout.Host(high) < 0)
            _a.Store(Layout.State, Layout.Slot(high), hostHigh);
        if (checkedHere)
        {
            before.Host = false;
            AddCold(i, in before, reload: _flags.Host);
        }
    }

    /// <summary>BT, BTS, BTR, BTC of memory by a register: the bit's offset may lead anywhere. The host's instruction adds it again, so T0 is moved back.</summary>
    private void EmitBitString(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        int size = instruction.Op1Register.GetSize();
        int guest = NumberOf(instruction.Op1Register);
        int log = System.Numerics.BitOperations.Log2((uint)size);
        bool needAfter = _need[i + 1];
        BeforeClobber(_need[i]);
        EmitOffset(item.Op);
        LoadWord();
        _a.Lea(Layout.T0, Layout.T0, Layout.T1, log, 0);
        if (item.Op->Seg != 6)
            _a.ArithmeticLoad(Alu.Add, Layout.T0, Layout.State, Layout.SegBase + (item.Op->Seg * 8));
        EmitTranslation(size, item.MemoryWritten, stack: false);
        LoadWord();
        _a.Shift(4, Layout.T1, log);
        _a.Arithmetic(Alu.Sub, Layout.T0, Layout.T1);
        FlagTracker before = _flags;
        if (needAfter)
            EnsureHost();
        int bit = HostOrT1(guest);
        if (instruction.HasLockPrefix)
            _a.Byte(0xf0);
        int number = instruction.Mnemonic switch
        {
            Mnemonic.Bt => 4,
            Mnemonic.Bts => 5,
            Mnemonic.Btr => 6,
            _ => 7,
        };
        _a.BitTestString(number, Layout.T0, bit, size);
        HostHoldsFlags();
        before.Host = false;
        AddCold(i, in before, reload: needAfter);

        void LoadWord()
        {
            // Number of the operand-sized word that holds the bit, signed.
            LoadGuest(Layout.T1, guest, size);
            if (size == Doubleword)
                _a.SignExtend(Layout.T1, Layout.T1);
            _a.Shift(7, Layout.T1, log + 3);
        }
    }

    /// <summary>PUSH of a memory operand.</summary>
    private void EmitPushMemory(int i)
    {
        BeforeWrite(1u << GuestStackPointer);
        FlagTracker before = _flags;
        EmitAddress(i, StackBytes, write: false);
        _a.Load(Layout.T0, Layout.T0, _operand);
        _a.Store(Layout.State, Layout.Spare, Layout.T0);
        _a.Lea(Layout.T0, StackPointer, -StackBytes);
        EmitTranslation(StackBytes, write: true, stack: true);
        _a.Load(Layout.T1, Layout.State, Layout.Spare);
        _a.Store(Layout.T0, 0, Layout.T1);
        MoveStackPointer(-StackBytes);
        before.Host = false;
        before.Memory = _flags.Memory;
        AddCold(i, in before, reload: false);
    }

    /// <summary>PUSHF in 64-bit mode, where no privilege matters (Intel SDM vol. 2): RF and VM are pushed as 0.</summary>
    private void EmitPushFlags(int i)
    {
        FlushFlags();
        EmitPushAddress(i);
        EnsureHost();
        _a.PushFlags();
        _a.Pop(Layout.T1);
        _a.ArithmeticImmediate(Alu.And, Layout.T1, (int)Rflags.Arithmetic, Doubleword);
        _a.ArithmeticLoad(Alu.Or, Layout.T1, Layout.State, Layout.SystemFlags);
        _a.ArithmeticImmediate(Alu.And, Layout.T1, ~(int)(Rflags.VM | Rflags.RF));
        _a.Store(Layout.T0, _operand, Layout.T1);
        MoveStackPointer(-StackBytes);
        _flags.Host = false;
        AddCold(i, in _flags, reload: false);
    }

    /// <summary>CLI and STI of the kernel. STI is left to its handler where an interrupt waits, or where it ends the block: the next instruction comes before any interrupt.</summary>
    private void EmitInterruptFlag(int i)
    {
        ref Item item = ref _items[i];
        BeforeClobber(_need[i]);
        FlagTracker before = _flags;
        _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.Cpl, 0, Doubleword);
        AddField(_a.JumpIf(Condition.NotEqual));
        if (item.Instruction.Mnemonic == Mnemonic.Cli)
        {
            _a.ArithmeticImmediateMemory(Alu.And, Layout.State, Layout.SystemFlags, ~(int)Rflags.IF, Doubleword);
        }
        else
        {
            _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.InterruptWaiting, 0, 1);
            AddField(_a.JumpIf(Condition.NotEqual));
            _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.Pending, 0, Doubleword);
            AddField(_a.JumpIf(Condition.NotEqual));
            _a.ArithmeticImmediateMemory(Alu.Or, Layout.State, Layout.SystemFlags, (int)Rflags.IF, Doubleword);
        }
        AddCold(i, in before, reload: false);
    }
}
