using System;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <content>Instructions on general registers that execute as the host's own.</content>
internal sealed unsafe partial class BlockCompiler
{
    private void EmitNative(int i)
    {
        ref Item item = ref _items[i];
        // What the instruction leaves alone must survive the registers it writes.
        if (_need[i + 1] && !item.WritesAllFlags)
            BeforeWrite(item.Written);
        switch (item.Instruction.Mnemonic)
        {
            case Mnemonic.Mov when TryEmitMove(i):
                return;
            case Mnemonic.Lea:
                EmitLoadAddress(ref item);
                return;
            case Mnemonic.Add or Mnemonic.Or or Mnemonic.Adc or Mnemonic.Sbb or Mnemonic.And or Mnemonic.Sub or Mnemonic.Xor or Mnemonic.Cmp or Mnemonic.Test
                when !HasHighByte(in item.Instruction):
                EmitArithmetic(i);
                return;
            case Mnemonic.Inc or Mnemonic.Dec when item.Memory < 0 && !HasHighByte(in item.Instruction):
                EmitIncrement(i);
                return;
            case Mnemonic.Neg when item.Memory < 0 && !HasHighByte(in item.Instruction):
                EmitGuest(in item.Instruction, item.Written);
                SetRecipe(FlagKind.Negate, item.Instruction.Op0Register.GetSize(), NumberOf(item.Instruction.Op0Register), -1);
                return;
            case Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar when item.Memory < 0 && !HasHighByte(in item.Instruction):
                EmitShift(i);
                return;
            default:
                EmitOther(i);
                return;
        }
    }

    private static bool HasHighByte(in Instruction instruction) =>
        (instruction.Op0Kind == OpKind.Register && instruction.Op0Register is >= Register.AH and <= Register.BH)
        || (instruction.OpCount > 1 && instruction.Op1Kind == OpKind.Register && instruction.Op1Register is >= Register.AH and <= Register.BH);

    /// <summary>Any instruction: flags in and out are the host's.</summary>
    private void EmitOther(int i)
    {
        ref Item item = ref _items[i];
        bool needAfter = _need[i + 1];
        bool flagsIn = item.ReadsFlags || (item.WritesFlags && !item.WritesAllFlags && needAfter);
        if (item.Memory >= 0)
            EmitAddress(i, MemorySize(in item.Instruction), item.MemoryWritten, item.Instruction.Mnemonic == Mnemonic.Cmpxchg16b ? 16 : 1);
        FlagTracker before = _flags;
        if (flagsIn)
            EnsureHost();
        EmitGuest(in item.Instruction, item.Written);
        bool reload = false;
        if (item.WritesFlags)
        {
            HostHoldsFlags();
            reload = needAfter;
        }
        if (item.Memory >= 0)
        {
            before.Host = false;
            // What the handler leaves is in memory, in its own form; the host's flags are wanted only where something still reads them.
            AddCold(i, in before, reload || _flags.Host);
        }
    }

    private static int MemorySize(in Instruction instruction) => instruction.MemorySize.GetSize();

    // MOV

    /// <returns>False: a form for <see cref="EmitOther"/>.</returns>
    private bool TryEmitMove(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        if (HasHighByte(in instruction))
            return false;
        if (item.Memory == 0)
        {
            EmitStore(i);
            return true;
        }
        int size = instruction.Op0Register.GetSize();
        int to = NumberOf(instruction.Op0Register);
        if (item.Memory == 1)
        {
            if (size < 4)
                return false;
            EmitAddress(i, size, write: false);
            FlagTracker before = _flags;
            int host = Layout.Host(to) < 0 ? Layout.T1 : Layout.Host(to);
            _a.Load(host, Layout.T0, _operand, size);
            if (Layout.Host(to) < 0)
                _a.Store(Layout.State, Layout.Slot(to), Layout.T1);
            AddCold(i, in before, reload: false);
            return true;
        }
        if (instruction.Op1Kind == OpKind.Register)
        {
            if (size < 4)
                return false;
            EmitMoveRegister(to, NumberOf(instruction.Op1Register), size);
            return true;
        }
        if (size < 4)
            return false;
        ulong value = instruction.GetImmediate(1);
        if (size == 4)
            value = (uint)value;
        if (Layout.Host(to) >= 0)
        {
            _a.MoveImmediate(Layout.Host(to), value);
        }
        else if ((long)value == (int)value)
        {
            _a.StoreImmediate(Layout.State, Layout.Slot(to), (int)value, 8);
        }
        else
        {
            _a.MoveImmediate(Layout.T1, value);
            _a.Store(Layout.State, Layout.Slot(to), Layout.T1);
        }
        return true;
    }

    private void EmitMoveRegister(int to, int from, int size)
    {
        int hostTo = Layout.Host(to);
        int hostFrom = Layout.Host(from);
        if (hostTo >= 0)
        {
            LoadGuest(hostTo, from, size);
            return;
        }
        if (hostFrom < 0 || size == 4)
        {
            LoadGuest(Layout.T1, from, size);
            hostFrom = Layout.T1;
        }
        _a.Store(Layout.State, Layout.Slot(to), hostFrom);
    }

    private void EmitStore(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        int size = MemorySize(in instruction);
        EmitAddress(i, size, write: true);
        FlagTracker before = _flags;
        if (instruction.Op1Kind == OpKind.Register)
            _a.Store(Layout.T0, _operand, HostOrT1(NumberOf(instruction.Op1Register)), size);
        else
            _a.StoreImmediate(Layout.T0, _operand, (int)instruction.GetImmediate(1), size);
        AddCold(i, in before, reload: false);
    }

    /// <summary>The register that holds a guest register: its own, or T1 loaded with it.</summary>
    private int HostOrT1(int guest)
    {
        if (Layout.Host(guest) >= 0)
            return Layout.Host(guest);
        _a.Load(Layout.T1, Layout.State, Layout.Slot(guest));
        return Layout.T1;
    }

    private void EmitLoadAddress(ref Item item)
    {
        Op* op = item.Op;
        int to = NumberOf(item.Instruction.Op0Register);
        int size = item.Instruction.Op0Register.GetSize();
        int host = Layout.Host(to) < 0 ? Layout.T0 : Layout.Host(to);
        bool simple = op->Base != VcpuBlock.BlockRipOffset && (op->Disp == (int)op->Disp || op->Address != AddressKind.Long);
        if (simple)
        {
            int @base = op->Base == VcpuBlock.ZeroOffset ? -1 : op->Base >> 3;
            int index = op->Index == VcpuBlock.ZeroOffset ? -1 : op->Index >> 3;
            EmitLea(host, @base, index, op->Scale, (int)op->Disp, op->Address == AddressKind.Long ? size : 4);
        }
        else
        {
            EmitOffset(op);
            if (host != Layout.T0 || size == 4)
                _a.Move(host, Layout.T0, size);
        }
        if (Layout.Host(to) < 0)
            _a.Store(Layout.State, Layout.Slot(to), Layout.T0);
    }

    // Two operands

    private static Alu AluOf(Mnemonic mnemonic) => mnemonic switch
    {
        Mnemonic.Add => Alu.Add,
        Mnemonic.Or => Alu.Or,
        Mnemonic.Adc => Alu.Adc,
        Mnemonic.Sbb => Alu.Sbb,
        Mnemonic.And => Alu.And,
        Mnemonic.Sub => Alu.Sub,
        Mnemonic.Xor => Alu.Xor,
        _ => Alu.Cmp,
    };

    private static FlagKind KindOf(Mnemonic mnemonic) => mnemonic switch
    {
        Mnemonic.Add => FlagKind.Add,
        Mnemonic.Sub => FlagKind.Subtract,
        Mnemonic.Cmp => FlagKind.Compare,
        Mnemonic.Adc or Mnemonic.Sbb => FlagKind.Packed,
        _ => FlagKind.Logic,
    };

    private void EmitArithmetic(int i)
    {
        ref Item item = ref _items[i];
        if (item.Memory == 0)
            EmitOnMemory(i);
        else if (item.Memory == 1)
            EmitFromMemory(i);
        else
            EmitOnRegister(i);
    }

    private void EmitOnRegister(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        Mnemonic mnemonic = instruction.Mnemonic;
        int width = instruction.Op0Register.GetSize();
        int to = NumberOf(instruction.Op0Register);
        bool hasRegister = instruction.Op1Kind == OpKind.Register;
        int from = hasRegister ? NumberOf(instruction.Op1Register) : -1;
        int immediate = hasRegister ? 0 : (int)instruction.GetImmediate(1);
        if (item.ReadsFlags)
            EnsureHost();
        int host = Layout.Host(to);
        if (mnemonic == Mnemonic.Test)
            EmitTest(to, from, immediate, width);
        else if (host >= 0)
            Operate(AluOf(mnemonic), host, from, immediate, width);
        else
            OperateSpilled(AluOf(mnemonic), to, from, immediate, width);
        switch (KindOf(mnemonic))
        {
            case FlagKind.Packed:
                HostHoldsFlags();
                break;
            case FlagKind.Logic when mnemonic == Mnemonic.Test:
                SetRecipe(FlagKind.Logic, width, to, from, immediate, test: from != to);
                break;
            case FlagKind.Logic:
                SetRecipe(FlagKind.Logic, width, to, -1);
                break;
            case FlagKind.Subtract when from == to:
                SetRecipe(FlagKind.Logic, width, to, -1);
                break;
            case FlagKind.Add when from == to:
                HostHoldsFlags();
                break;
            default:
                SetRecipe(KindOf(mnemonic), width, to, from, immediate);
                break;
        }
    }

    /// <summary>An operation on a host register; the second operand is a guest register, or the immediate where that is -1.</summary>
    private void Operate(Alu operation, int host, int from, int immediate, int width)
    {
        if (from < 0)
            _a.ArithmeticImmediate(operation, host, immediate, width);
        else if (Layout.Host(from) >= 0)
            _a.Arithmetic(operation, host, Layout.Host(from), width);
        else
            _a.ArithmeticLoad(operation, host, Layout.State, Layout.Slot(from), width);
    }

    private void OperateSpilled(Alu operation, int to, int from, int immediate, int width)
    {
        int slot = Layout.Slot(to);
        if (operation == Alu.Cmp && _a.Mirrored != slot && from < 0)
        {
            _a.ArithmeticImmediateMemory(operation, Layout.State, slot, immediate, width);
            return;
        }
        _a.Load(Layout.T1, Layout.State, slot);
        Operate(operation, Layout.T1, from, immediate, width);
        if (operation != Alu.Cmp)
            _a.Store(Layout.State, slot, Layout.T1);
    }

    private void EmitTest(int a, int b, int immediate, int width)
    {
        if (b >= 0)
        {
            int host = Layout.Host(a);
            if (host < 0 && a == b)
                _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.Slot(a), 0, width);
            else if (host >= 0 && Layout.Host(b) >= 0)
                _a.Test(host, Layout.Host(b), width);
            else if (host >= 0)
                _a.Test(host, HostOrT1(b), width);
            else
                TestWithT1(a, b, 0, width);
            return;
        }
        TestWithT1(a, -1, immediate, width);
    }

    private void TestWithT1(int a, int b, int immediate, int width)
    {
        if (b < 0 && Layout.Host(a) >= 0)
        {
            _a.TestImmediate(Layout.Host(a), immediate, width);
            return;
        }
        LoadGuest(Layout.T1, a);
        Operate(Alu.And, Layout.T1, b, immediate, width);
    }

    private void EmitFromMemory(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        Mnemonic mnemonic = instruction.Mnemonic;
        int width = MemorySize(in instruction);
        int to = NumberOf(instruction.Op0Register);
        bool needAfter = _need[i + 1];
        EmitAddress(i, width, write: false);
        FlagTracker before = _flags;
        if (item.ReadsFlags)
            EnsureHost();
        int host = Layout.Host(to);
        FlagKind kind = KindOf(mnemonic);
        bool isTest = mnemonic == Mnemonic.Test;
        if (kind == FlagKind.Logic && !isTest)
        {
            OperateFromMemory(AluOf(mnemonic), to, width);
            SetRecipe(FlagKind.Logic, width, to, -1);
        }
        else if (kind == FlagKind.Packed || !needAfter)
        {
            if (isTest)
                _a.TestMemory(Layout.T0, _operand, HostOrT1(to), width);
            else
                OperateFromMemory(AluOf(mnemonic), to, width);
            HostHoldsFlags();
        }
        else
        {
            _a.Load(Layout.T1, Layout.T0, _operand, width);
            if (isTest)
            {
                Operate(Alu.And, Layout.T1, to, 0, width);
                _a.Store(Layout.State, Layout.FlagA, Layout.T1);
            }
            else
            {
                if (host < 0)
                {
                    _a.Load(Layout.T0, Layout.State, Layout.Slot(to));
                    host = Layout.T0;
                }
                _a.Arithmetic(AluOf(mnemonic), host, Layout.T1, width);
                if (host == Layout.T0 && mnemonic != Mnemonic.Cmp)
                    _a.Store(Layout.State, Layout.Slot(to), Layout.T0);
                _a.Store(Layout.State, Layout.FlagA, host);
                _a.Store(Layout.State, Layout.FlagB, Layout.T1);
            }
            StoreKind(kind, width);
            HostHoldsFlags();
            _flags.Memory = true;
        }
        before.Host = false;
        AddCold(i, in before, reload: needAfter);
    }

    /// <summary>An operation on a guest register with the operand T0 points at.</summary>
    private void OperateFromMemory(Alu operation, int to, int width)
    {
        if (Layout.Host(to) >= 0)
        {
            _a.ArithmeticLoad(operation, Layout.Host(to), Layout.T0, _operand, width);
            return;
        }
        _a.Load(Layout.T1, Layout.State, Layout.Slot(to));
        _a.ArithmeticLoad(operation, Layout.T1, Layout.T0, _operand, width);
        if (operation != Alu.Cmp)
            _a.Store(Layout.State, Layout.Slot(to), Layout.T1);
    }

    private void EmitOnMemory(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        Mnemonic mnemonic = instruction.Mnemonic;
        int width = MemorySize(in instruction);
        bool hasRegister = instruction.Op1Kind == OpKind.Register;
        int from = hasRegister ? NumberOf(instruction.Op1Register) : -1;
        int immediate = hasRegister ? 0 : (int)instruction.GetImmediate(1);
        bool needAfter = _need[i + 1];
        bool locked = instruction.HasLockPrefix;
        FlagKind kind = KindOf(mnemonic);
        bool isTest = mnemonic == Mnemonic.Test;
        EmitAddress(i, width, item.MemoryWritten);
        FlagTracker before = _flags;
        if (item.ReadsFlags)
            EnsureHost();
        if (locked || !needAfter || kind == FlagKind.Packed)
        {
            int register = hasRegister ? HostOrT1(from) : 0;
            if (locked)
                _a.Byte(0xf0);
            if (isTest)
            {
                if (hasRegister)
                    _a.TestMemory(Layout.T0, _operand, register, width);
                else
                    _a.TestImmediateMemory(Layout.T0, _operand, immediate, width);
            }
            else if (hasRegister)
            {
                _a.ArithmeticStore(AluOf(mnemonic), Layout.T0, _operand, register, width);
            }
            else
            {
                _a.ArithmeticImmediateMemory(AluOf(mnemonic), Layout.T0, _operand, immediate, width);
            }
            HostHoldsFlags();
        }
        else
        {
            _a.Load(Layout.T1, Layout.T0, _operand, width);
            if (mnemonic == Mnemonic.Cmp)
                _a.Store(Layout.State, Layout.FlagA, Layout.T1);
            Operate(isTest ? Alu.And : AluOf(mnemonic), Layout.T1, from, immediate, width);
            if (mnemonic is not (Mnemonic.Cmp or Mnemonic.Test))
                _a.Store(Layout.T0, _operand, Layout.T1, width);
            if (mnemonic != Mnemonic.Cmp)
                _a.Store(Layout.State, Layout.FlagA, Layout.T1);
            if (kind != FlagKind.Logic)
            {
                if (from < 0)
                    _a.StoreImmediate(Layout.State, Layout.FlagB, immediate, width == 8 ? 8 : 4);
                else
                    StoreGuest(Layout.FlagB, from);
            }
            StoreKind(kind, width);
            HostHoldsFlags();
            _flags.Memory = true;
        }
        before.Host = false;
        AddCold(i, in before, reload: needAfter);
    }

    // INC, DEC

    private void EmitIncrement(int i)
    {
        ref Item item = ref _items[i];
        bool increment = item.Instruction.Mnemonic == Mnemonic.Inc;
        int width = item.Instruction.Op0Register.GetSize();
        int guest = NumberOf(item.Instruction.Op0Register);
        bool needAfter = _need[i + 1];
        if (needAfter)
        {
            if (!_flags.Host && !_flags.HasRecipe)
            {
                // Memory knows CF, perhaps in a form that must be computed first.
                _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.FlagKind, DeferredFlags.FirstWithCarry, 1);
                int known = _a.JumpIfShort(Condition.AboveOrEqual);
                _a.CallTo(_stubs.FindCarry);
                _a.FixShort(known);
                _a.BitTestMemory(Layout.State, Layout.FlagCarry, 0);
            }
            else
            {
                EnsureHost();
                _a.SetMemory(Condition.Below, Layout.State, Layout.FlagCarry);
            }
        }
        if (Layout.Host(guest) >= 0)
        {
            _a.Unary(4, increment ? 0 : 1, Layout.Host(guest), width);
        }
        else
        {
            _a.Load(Layout.T1, Layout.State, Layout.Slot(guest));
            _a.Unary(4, increment ? 0 : 1, Layout.T1, width);
            _a.Store(Layout.State, Layout.Slot(guest), Layout.T1);
        }
        SetRecipe(increment ? FlagKind.Increment : FlagKind.Decrement, width, guest, -1);
    }

    // Shifts of registers

    private void EmitShift(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        int width = instruction.Op0Register.GetSize();
        int guest = NumberOf(instruction.Op0Register);
        bool needAfter = _need[i + 1];
        FlagKind kind = instruction.Mnemonic switch
        {
            Mnemonic.Shr => FlagKind.ShiftRight,
            Mnemonic.Sar => FlagKind.ShiftArithmetic,
            _ => FlagKind.ShiftLeft,
        };
        int mask = width == 8 ? 63 : 31;
        if (!needAfter)
        {
            EmitGuest(in instruction, item.Written);
            if (item.WritesFlags)
                HostHoldsFlags();
            return;
        }
        if (instruction.Op1Kind != OpKind.Register)
        {
            int count = (int)instruction.GetImmediate(1) & mask;
            if (count == 0)
            {
                EmitGuest(in instruction, item.Written);
                return;
            }
            StoreGuest(Layout.FlagA, guest);
            _a.StoreImmediate(Layout.State, Layout.FlagB, count, 4);
            StoreKind(kind, width);
            EmitGuest(in instruction, item.Written);
            HostHoldsFlags();
            _flags.Memory = true;
            return;
        }
        // By CL: a count of zero leaves the flags as they were.
        FlushFlags();
        _a.TestImmediateByte(1, mask);
        int zero = _a.JumpIfShort(Condition.Equal);
        StoreGuest(Layout.FlagA, guest);
        _a.ZeroExtend(Layout.T1, 1, 1);
        _a.ArithmeticImmediate(Alu.And, Layout.T1, mask, 4);
        _a.Store(Layout.State, Layout.FlagB, Layout.T1);
        StoreKind(kind, width);
        _a.FixShort(zero);
        EmitGuest(in instruction, item.Written);
        _flags.Forget();
        _flags.Memory = true;
    }

    // DIV, IDIV: what would raise #DE on the host goes to the handler.

    private void EmitDivide(int i)
    {
        ref Item item = ref _items[i];
        ref Instruction instruction = ref item.Instruction;
        int width = DivisorSize(in instruction);
        if (_need[i + 1])
            BeforeWrite(item.Written);
        int divisor;
        if (item.Memory >= 0)
        {
            EmitAddress(i, width, write: false);
            BeforeClobber(_need[i]);
            _a.Load(Layout.T0, Layout.T0, _operand, width);
            divisor = Layout.T0;
        }
        else
        {
            BeforeClobber(_need[i]);
            divisor = Layout.Host(NumberOf(instruction.Op0Register));
            if (divisor < 0)
            {
                _a.Load(Layout.T0, Layout.State, Layout.Slot(NumberOf(instruction.Op0Register)));
                divisor = Layout.T0;
            }
        }
        FlagTracker before = _flags;
        if (instruction.Mnemonic == Mnemonic.Div)
        {
            // The quotient fits where the upper half is less than the divisor; zero never is more.
            _a.Arithmetic(Alu.Cmp, 2, divisor, width);
            AddField(_a.JumpIf(Condition.AboveOrEqual));
        }
        else
        {
            // A dividend that is one sign-extended word, and a divisor that is neither 0 nor -1: nothing overflows.
            _a.Move(Layout.T1, Rax, width);
            _a.Shift(7, Layout.T1, (width * 8) - 1, width);
            _a.Arithmetic(Alu.Cmp, Layout.T1, 2, width);
            AddField(_a.JumpIf(Condition.NotEqual));
            _a.Lea(Layout.T1, divisor, 1, width);
            _a.ArithmeticImmediate(Alu.Cmp, Layout.T1, 1, width);
            AddField(_a.JumpIf(Condition.BelowOrEqual));
        }
        _a.Unary(3, instruction.Mnemonic == Mnemonic.Div ? 6 : 7, divisor, width);
        _flags.Host = false;
        AddCold(i, in before, reload: false);
    }

    // Anything Iced encodes

    /// <summary>The instruction itself, on the registers that hold the guest's. Its memory operand is where T0 points; T1, and T0 where it is free, stand for registers in memory.</summary>
    /// <param name="guest">The instruction.</param>
    /// <param name="written">Guest registers that it writes.</param>
    private void EmitGuest(in Instruction guest, uint written)
    {
        Instruction host = guest;
        host.CodeSize = CodeSize.Code64;
        host.SegmentPrefix = Register.None;
        host.Code = Encodable(guest.Code);
        int first = -1;
        int second = -1;
        bool memory = false;
        for (int n = 0; n < guest.OpCount; n++)
        {
            OpKind kind = guest.GetOpKind(n);
            if (kind is OpKind.Memory)
            {
                memory = true;
                host.MemoryBase = Register.R14;
                host.MemoryIndex = Register.None;
                host.MemoryIndexScale = 1;
                host.MemoryDisplacement64 = (ulong)_operand;
                host.MemoryDisplSize = _operand == 0 ? 0 : _operand == (sbyte)_operand ? 1 : 8;
            }
        }
        for (int n = 0; n < guest.OpCount; n++)
        {
            if (guest.GetOpKind(n) != OpKind.Register)
                continue;
            Register register = guest.GetOpRegister(n);
            if (!register.IsGPR() || register is >= Register.AH and <= Register.BH)
                continue;
            int number = NumberOf(register);
            int to = Layout.Host(number);
            if (to < 0)
            {
                if (first < 0 || first == number)
                {
                    first = number;
                    to = Layout.T1;
                }
                else
                {
                    if (memory)
                        throw new InvalidOperationException("no register left for an operand");
                    second = number;
                    to = Layout.T0;
                }
            }
            host.SetOpRegister(n, Sized(to, register.GetSize()));
        }
        if (first >= 0)
            _a.Load(Layout.T1, Layout.State, Layout.Slot(first));
        if (second >= 0)
            _a.Load(Layout.T0, Layout.State, Layout.Slot(second));
        _encoder.Encode(in host, 0);
        if (first >= 0 && (written >> first & 1) != 0)
        {
            // T1 is not what it was.
            _a.ForgetMirror();
            _a.Store(Layout.State, Layout.Slot(first), Layout.T1);
        }
        if (second >= 0 && (written >> second & 1) != 0)
            _a.Store(Layout.State, Layout.Slot(second), Layout.T0);
    }

    private static Register Sized(int number, int bytes) => bytes switch
    {
        1 => number < 4 ? Register.AL + number : Register.SPL + (number - 4),
        2 => Register.AX + number,
        4 => Register.EAX + number,
        _ => Register.RAX + number,
    };

    /// <summary>A form of the same instruction that 64-bit code has and that takes any operand.</summary>
    private static Code Encodable(Code code) => code switch
    {
        Iced.Intel.Code.Inc_r16 => Iced.Intel.Code.Inc_rm16,
        Iced.Intel.Code.Inc_r32 => Iced.Intel.Code.Inc_rm32,
        Iced.Intel.Code.Dec_r16 => Iced.Intel.Code.Dec_rm16,
        Iced.Intel.Code.Dec_r32 => Iced.Intel.Code.Dec_rm32,
        Iced.Intel.Code.Add_rm8_imm8_82 => Iced.Intel.Code.Add_rm8_imm8,
        Iced.Intel.Code.Or_rm8_imm8_82 => Iced.Intel.Code.Or_rm8_imm8,
        Iced.Intel.Code.Adc_rm8_imm8_82 => Iced.Intel.Code.Adc_rm8_imm8,
        Iced.Intel.Code.Sbb_rm8_imm8_82 => Iced.Intel.Code.Sbb_rm8_imm8,
        Iced.Intel.Code.And_rm8_imm8_82 => Iced.Intel.Code.And_rm8_imm8,
        Iced.Intel.Code.Sub_rm8_imm8_82 => Iced.Intel.Code.Sub_rm8_imm8,
        Iced.Intel.Code.Xor_rm8_imm8_82 => Iced.Intel.Code.Xor_rm8_imm8,
        Iced.Intel.Code.Cmp_rm8_imm8_82 => Iced.Intel.Code.Cmp_rm8_imm8,
        Iced.Intel.Code.Mov_AL_moffs8 => Iced.Intel.Code.Mov_r8_rm8,
        Iced.Intel.Code.Mov_AX_moffs16 => Iced.Intel.Code.Mov_r16_rm16,
        Iced.Intel.Code.Mov_EAX_moffs32 => Iced.Intel.Code.Mov_r32_rm32,
        Iced.Intel.Code.Mov_RAX_moffs64 => Iced.Intel.Code.Mov_r64_rm64,
        Iced.Intel.Code.Mov_moffs8_AL => Iced.Intel.Code.Mov_rm8_r8,
        Iced.Intel.Code.Mov_moffs16_AX => Iced.Intel.Code.Mov_rm16_r16,
        Iced.Intel.Code.Mov_moffs32_EAX => Iced.Intel.Code.Mov_rm32_r32,
        Iced.Intel.Code.Mov_moffs64_RAX => Iced.Intel.Code.Mov_rm64_r64,
        Iced.Intel.Code.Xchg_r16_AX => Iced.Intel.Code.Xchg_rm16_r16,
        Iced.Intel.Code.Xchg_r32_EAX => Iced.Intel.Code.Xchg_rm32_r32,
        Iced.Intel.Code.Xchg_r64_RAX => Iced.Intel.Code.Xchg_rm64_r64,
        _ => code,
    };
}
