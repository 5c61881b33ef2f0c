using System;
using System.Collections.Generic;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>
/// Makes host code of one block. Guest registers lie in host registers (<see cref="Layout"/>), RSP is the host's stack, arithmetic flags are where <see cref="FlagTracker"/> says.
/// At a block's entry flags are in memory. What is rare or slow goes to the operation's handler, with registers and flags in memory, so that a fault is always the handler's.
/// Not thread-safe.
/// </summary>
internal sealed unsafe partial class BlockCompiler
{
    private const int MaxInstructions = 64;
    private const RflagsBits ArithmeticFlags = RflagsBits.CF | RflagsBits.PF | RflagsBits.AF | RflagsBits.ZF | RflagsBits.SF | RflagsBits.OF;

    // Wiring
    private readonly HostAssembler _a;
    private readonly Stubs _stubs;
    private readonly byte* _operations;
    private readonly Encoder _encoder;
    private readonly InstructionInfoFactory _info = new();
    private readonly BytesReader _reader = new();
    private readonly Decoder[] _decoders;

    // State of one compilation
    private readonly Item[] _items = new Item[MaxInstructions];
    private readonly bool[] _need = new bool[MaxInstructions + 2];
    private readonly List<Cold> _cold = [];
    private readonly List<Walk> _walks = [];
    private readonly List<FarExit> _far = [];
    private readonly List<Edge> _edges = [];
    private readonly List<VectorLoad> _vectorLoads = [];
    private FlagTracker _flags;
    private Block* _block;
    private int _place;
    private uint _mode;
    private int _vectorLevel;
    private int _fields;
    private int _firstWalk;
    private readonly int[] _field = new int[4];

    public BlockCompiler(HostAssembler assembler, Stubs stubs, byte* operations)
    {
        _a = assembler;
        _stubs = stubs;
        _operations = operations;
        _encoder = Encoder.Create(64, new Sink(assembler));
        DecoderOptions options = HostFeatures.IsAmd ? DecoderOptions.AMD : DecoderOptions.None;
        _decoders = [Decoder.Create(16, _reader, options), Decoder.Create(32, _reader, options), Decoder.Create(64, _reader, options)];
    }

    /// <summary>The code made last.</summary>
    public ReadOnlySpan<byte> Code => _a.Code;

    /// <summary>Where execution begins with <see cref="VcpuBlock.Rip"/> set, and <see cref="VcpuBlock.CodeBase"/> as well in 64-bit mode.</summary>
    public int Entry { get; private set; }

    /// <summary>Where it begins with <see cref="VcpuBlock.CodeBase"/> set.</summary>
    public int LinkEntry { get; private set; }

    /// <summary>How far <see cref="LinkEntry"/> is from the code's start in 64-bit mode: that address is to be a multiple of 16.</summary>
    public const int EntryDistance = 5;

    /// <summary>Bytes of guest code that were translated, each once.</summary>
    public int GuestBytes { get; private set; }

    /// <summary>How many rounds of a loop it does at once; 1 for other blocks.</summary>
    public int Rounds { get; private set; }

    /// <summary>The operation of an instruction that was translated, in the order of the translation.</summary>
    public Op* OperationOf(int instruction) => _items[instruction].Op;

    /// <summary>No instruction of the block, translated or not, is always its handler's, and none waits for events.</summary>
    public bool IsNative { get; private set; }

    /// <summary>RFLAGS that some instruction leaves undefined.</summary>
    public ulong UndefinedFlags { get; private set; }

    private static ulong FlagBits(RflagsBits flags)
    {
        X86.Rflags bits = X86.Rflags.None;
        bits |= (flags & RflagsBits.CF) != 0 ? X86.Rflags.CF : 0;
        bits |= (flags & RflagsBits.PF) != 0 ? X86.Rflags.PF : 0;
        bits |= (flags & RflagsBits.AF) != 0 ? X86.Rflags.AF : 0;
        bits |= (flags & RflagsBits.ZF) != 0 ? X86.Rflags.ZF : 0;
        bits |= (flags & RflagsBits.SF) != 0 ? X86.Rflags.SF : 0;
        bits |= (flags & RflagsBits.OF) != 0 ? X86.Rflags.OF : 0;
        return (ulong)bits;
    }

    private bool Is64 => (_mode & CodeMode.SizeMask) == CodeMode.Code64;

    private bool Is32 => (_mode & CodeMode.SizeMask) == CodeMode.Code32;

    /// <summary>One instruction and what the compiler wants to know of it.</summary>
    private struct Item
    {
        public Instruction Instruction;
        public Op* Op;
        public InstructionKind Kind;
        public bool ReadsFlags;
        public bool WritesFlags;

        /// <summary>Writes all six arithmetic flags whatever its operands are.</summary>
        public bool WritesAllFlags;
        public bool MayFault;

        /// <summary>Operand number of the memory operand that is accessed, or -1.</summary>
        public int Memory;
        public bool MemoryWritten;

        /// <summary>Guest registers written, one bit each.</summary>
        public uint Written;

        /// <summary>Where in the page its block starts.</summary>
        public int Place;

        /// <summary>A branch whose target comes next, as in a trace or the next round of a loop: the other way is the exit.</summary>
        public bool Inverted;
    }

    /// <summary>An operation done by its handler out of line; afterwards execution goes on at <see cref="Resume"/>.</summary>
    private struct Cold
    {
        public int Field0;
        public int Field1;
        public int Field2;
        public int Field3;
        public int Fields;

        /// <summary>The misses of the TLB among the ways here: a run of the compilation's.</summary>
        public int FirstWalk;

        /// <summary>The group whose first access it is, or -1.</summary>
        public int Group;
        public int Walks;
        public Op* Op;
        public int Resume;

        /// <summary>What T1 mirrors there.</summary>
        public int? Mirrored;
        public FlagTracker Flags;
        public bool NeedFlags;

        /// <summary>The host's flags are wanted after it.</summary>
        public bool ReloadFlags;
    }

    /// <summary>A miss of the TLB: its jump's field, where to try again after a page walk, and for which access.</summary>
    private readonly record struct Walk(int Field, int Retry, bool Write, bool Stack);

    /// <summary>A taken branch to another page, out of line.</summary>
    private readonly record struct FarExit(int Field, nint Op, int InPage, FlagTracker Flags);

    /// <summary>A taken branch inside the page that stores the flags first, out of line.</summary>
    private readonly record struct Edge(int Field, int Target, FlagTracker Flags);

    private struct VectorLoad
    {
        public int Field;
        public int Resume;
        public int Level;
        public Op* Op;
        public FlagTracker Flags;
    }

    /// <summary>Compiles a block for an address. False: it is not one that can be.</summary>
    /// <param name="vcpu">Whose block it is.</param>
    /// <param name="block">The decoded block.</param>
    /// <param name="bytes">Its guest code.</param>
    /// <param name="mode">The <see cref="CodeMode"/> it was decoded in.</param>
    /// <param name="origin">Where the code will be executed: <see cref="EntryDistance"/> below a multiple of 16.</param>
    public bool Compile(SoftVcpu vcpu, Block* block, byte* bytes, uint mode, ulong origin)
    {
        _block = block;
        _mode = mode;
        _place = (int)(block->Key >> 8) & 0xfff;
        _cold.Clear();
        _exits.Clear();
        _branches.Clear();
        _sites.Clear();
        _far.Clear();
        _edges.Clear();
        _vectorLoads.Clear();
        _vectorLevel = 0;
        _x87Checked = false;
        _fields = 0;
        _returnFull = 0;
        _walks.Clear();
        _firstWalk = 0;
        int operations = Gather(vcpu, block, bytes);
        int count = Unroll(operations);
        Instructions = count / Rounds;
        GuestBytes = 0;
        IsNative = true;
        UndefinedFlags = 0;
        for (int i = 0; i < Instructions; i++)
        {
            IsNative &= _items[i].Kind is not (InstructionKind.Handler or InstructionKind.InterruptFlag);
            UndefinedFlags |= FlagBits(_items[i].Instruction.RflagsUndefined);
            GuestBytes += _items[i].Op->Length;
        }
        FindGroups(count);
        FindNeeds(count);

        _a.Begin(origin);
        _a.CallTo(_stubs.Leave);
        AddSite(block->First);
        Entry = _a.Length;
        if (!Is64)
        {
            // Where RIP alone is known: CodeBase follows from it.
            _a.Load(Layout.T0, Layout.State, Layout.Rip);
            if (_place != 0)
                _a.ArithmeticImmediate(Alu.Sub, Layout.T0, _place);
            _a.Store(Layout.State, Layout.CodeBase, Layout.T0);
            _a.Align(16);
        }
        LinkEntry = _a.Length;
        // Two bytes of the first instruction are replaced by a jump where the block is not to be entered any more.
        _a.ArithmeticImmediateMemory(Alu.Cmp, Layout.State, Layout.Pending, 0, Doubleword);
        _a.JumpIfShort(Condition.NotEqual, 0);
        if (block->SecondPage != Block.NoPage)
            EmitSecondPageCheck((ulong)vcpu.Memory.Host + block->SecondPage);

        _flags.Forget();
        _flags.Memory = true;
        bool open = true;
        for (int i = 0; i < count; i++)
        {
            _place = _items[i].Place;
            open = EmitInstruction(i);
        }
        Op* last = _items[count - 1].Op;
        if (open)
            EmitExit(-1, last + 1, last->Offset + last->Length);
        _place = (int)(block->Key >> 8) & (PageSize - 1);

        RemoveUnusedStores();
        EmitColds();
        if (block->SecondPage != Block.NoPage)
        {
            // Whoever comes by a link finds another page behind: the block there is looked up.
            _a.Fix(_secondPageFields[0]);
            _a.Fix(_secondPageFields[1]);
            _a.Load(Layout.T0, Layout.State, Layout.CodeBase);
            AddConstant(Layout.T0, _place);
            _a.Store(Layout.State, Layout.Rip, Layout.T0);
            _a.JumpTo(_stubs.LeaveAtRip);
        }
        return true;
    }

    /// <summary>The page after the block's is still the one that its instruction was decoded from; fails to the fields.</summary>
    private void EmitSecondPageCheck(ulong host)
    {
        _a.Load(Layout.T0, Layout.State, Layout.CodeBase);
        _a.Lea(Layout.T0, Layout.T0, PageSize);
        _a.RotateRight(Layout.T1, Layout.T0, 8);
        _a.ArithmeticImmediate(Alu.And, Layout.T1, (int)Tlb.IndexMask << 4, 4);
        _a.ArithmeticLoad(Alu.Add, Layout.T1, Layout.State, Layout.FetchTlb);
        _a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.T1, 0);
        _secondPageFields[0] = _a.JumpIf(Condition.NotEqual);
        _a.MoveImmediate(Layout.T0, host);
        _a.ArithmeticLoad(Alu.Cmp, Layout.T0, Layout.T1, 8);
        _secondPageFields[1] = _a.JumpIf(Condition.NotEqual);
    }

    private readonly int[] _secondPageFields = new int[2];

    private ulong OpOffset(Op* op) => (ulong)((byte*)op - _operations);

    private void Analyse(ref Item item, Op* op, byte* bytes)
    {
        item = default;
        item.Op = op;
        item.Memory = -1;
        item.Kind = InstructionKind.Handler;
        if (op->Length == 0)
            return;
        if (TryRecall(ref item, op, bytes))
            return;
        _reader.Set(bytes + op->Offset, op->Length);
        Decoder decoder = _decoders[_mode & CodeMode.SizeMask];
        decoder.IP = (ulong)(_place + op->Offset);
        decoder.Decode(out item.Instruction);
        ref Instruction instruction = ref item.Instruction;
        if (instruction.IsInvalid || (op->Flags & OpFlags.Undefined) != 0)
            return;
        RflagsBits modified = instruction.RflagsModified & ArithmeticFlags;
        item.WritesFlags = modified != 0;
        item.WritesAllFlags = modified == ArithmeticFlags && !HasVariableCount(in instruction);
        item.ReadsFlags = (instruction.RflagsRead & ArithmeticFlags) != 0;
        InstructionInfo info = _info.GetInfo(in instruction, InstructionInfoOptions.NoMemoryUsage);
        foreach (UsedRegister used in info.GetUsedRegisters())
        {
            if (used.Access is OpAccess.Write or OpAccess.ReadWrite or OpAccess.CondWrite or OpAccess.ReadCondWrite && used.Register.IsGPR())
                item.Written |= 1u << NumberOf(used.Register);
        }
        item.Kind = InstructionKinds.Of(in instruction);
        if (item.Kind == InstructionKind.Handler && IsVector(in instruction))
            item.Kind = InstructionKind.Vector;
        if (item.Kind == InstructionKind.Handler && X87Lowering.IsPlain(in instruction))
            item.Kind = InstructionKind.X87;
        FindMemory(ref item, ref info);
        if (item.Memory >= 0 && instruction.Mnemonic is Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc && instruction.Op1Kind == OpKind.Register)
            item.Kind = InstructionKind.BitString;
        if (item.Kind != InstructionKind.Handler && !IsPossible(ref item))
            item.Kind = InstructionKind.Handler;
        // A division leaves flags undefined: they stay as they were.
        item.WritesAllFlags &= item.Kind != InstructionKind.Divide;
        item.MayFault = item.Memory >= 0 || item.Kind is not (InstructionKind.Native or InstructionKind.NoOperation);
        Remember(in item, bytes);
    }

    private static void FindMemory(ref Item item, ref InstructionInfo info)
    {
        ref Instruction instruction = ref item.Instruction;
        if (item.Kind == InstructionKind.NoOperation || instruction.Mnemonic == Mnemonic.Lea)
            return;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) != OpKind.Memory)
                continue;
            item.Memory = i;
            item.MemoryWritten = info.GetOpAccess(i) is OpAccess.Write or OpAccess.ReadWrite or OpAccess.CondWrite or OpAccess.ReadCondWrite;
        }
    }

    /// <summary>Shifts and rotations by CL leave the flags alone where the count is zero.</summary>
    private static bool HasVariableCount(in Instruction instruction)
    {
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Shl or Mnemonic.Sal or Mnemonic.Shr or Mnemonic.Sar or Mnemonic.Rol or Mnemonic.Ror or Mnemonic.Rcl or Mnemonic.Rcr:
                return instruction.Op1Kind == OpKind.Register;
            case Mnemonic.Shld or Mnemonic.Shrd:
                return instruction.Op2Kind == OpKind.Register;
            default:
                return false;
        }
    }

    /// <summary>Whether the compiler can do this form: registers to spare, no high byte register beside one that needs a REX prefix, operand sizes of the mode.</summary>
    private bool IsPossible(ref Item item)
    {
        ref Instruction instruction = ref item.Instruction;
        if (instruction.HasXacquirePrefix || instruction.HasXreleasePrefix)
            return false;
        bool high = false;
        bool extended = item.Memory >= 0;
        uint spilled = 0;
        for (int i = 0; i < instruction.OpCount; i++)
        {
            if (instruction.GetOpKind(i) != OpKind.Register)
                continue;
            Register register = instruction.GetOpRegister(i);
            if (!register.IsGPR())
            {
                if (register.IsXMM() || register.IsYMM() || item.Kind == InstructionKind.X87)
                    continue;
                return false;
            }
            high |= register is >= Register.AH and <= Register.BH;
            int number = NumberOf(register);
            extended |= Layout.Host(number) is < 0 or >= 8 || register.IsGPR64() || register is >= Register.SPL and <= Register.DIL;
            if (Layout.Host(number) < 0)
                spilled |= 1u << number;
        }
        if (high && extended)
            return false;
        if (item.Kind == InstructionKind.MultiplyNoFlags)
            return true;
        if (System.Numerics.BitOperations.PopCount(spilled) > (item.Memory >= 0 ? 1 : 2))
            return false;
        switch (item.Kind)
        {
            case InstructionKind.Native:
                return IsPossibleNative(ref item, high);
            case InstructionKind.Divide:
                return DivisorSize(in instruction) >= 4;
            case InstructionKind.Push:
                return HasNativeStack && -instruction.StackPointerIncrement == StackBytes
                    && (instruction.Op0Kind != OpKind.Register || instruction.Op0Register.IsGPR()) && instruction.Op0Kind != OpKind.Memory;
            case InstructionKind.Pop:
                return HasNativeStack && instruction.StackPointerIncrement == StackBytes && instruction.Op0Kind == OpKind.Register && instruction.Op0Register.IsGPR();
            case InstructionKind.CounterJump:
                long target = _place + item.Op->Imm;
                return Is64 && item.Op->Imm != 0 && target is >= 0 and < PageSize && instruction.Code is Iced.Intel.Code.Jrcxz_rel8_64 or Iced.Intel.Code.Loop_rel8_64_RCX;
            case InstructionKind.BitString:
                return item.Op->Address == AddressKind.Long && instruction.Op1Register.GetSize() >= 4;
            case InstructionKind.PushMemory:
                return Is64 && -instruction.StackPointerIncrement == 8;
            case InstructionKind.PushFlags:
                return Is64;
            case InstructionKind.InterruptFlag:
                return Is64 && (instruction.Mnemonic == Mnemonic.Cli || item.Op != _block->First + _block->Operations - 2);
            case InstructionKind.LeaveFrame:
                return HasNativeStack && instruction.Code == (Is64 ? Iced.Intel.Code.Leaveq : Iced.Intel.Code.Leaved);
            case InstructionKind.Call:
                return HasNativeStack && BranchBytes(in instruction) == StackBytes;
            case InstructionKind.CallIndirect:
                return HasNativeStack && -instruction.StackPointerIncrement == StackBytes;
            case InstructionKind.Return:
                return HasNativeStack && instruction.Code is Iced.Intel.Code.Retnq or Iced.Intel.Code.Retnq_imm16 or Iced.Intel.Code.Retnd or Iced.Intel.Code.Retnd_imm16
                    && (instruction.Code is Iced.Intel.Code.Retnq or Iced.Intel.Code.Retnq_imm16) == Is64;
            case InstructionKind.JumpIndirect:
                return instruction.Code == (Is64 ? Iced.Intel.Code.Jmp_rm64 : Is32 ? Iced.Intel.Code.Jmp_rm32 : Iced.Intel.Code.Jmp_rm16);
            case InstructionKind.Jump or InstructionKind.JumpIf:
                return BranchBytes(in instruction) == (Is64 ? 8 : Is32 ? 4 : 2);
            default:
                return true;
        }
    }

    private static bool IsPossibleNative(ref Item item, bool high)
    {
        ref Instruction instruction = ref item.Instruction;
        switch (instruction.Mnemonic)
        {
            case Mnemonic.Lea:
                return instruction.Op0Register.GetSize() >= 4 && item.Op->Address != AddressKind.Legacy16;
            case Mnemonic.Bt or Mnemonic.Bts or Mnemonic.Btr or Mnemonic.Btc:
                return true;
            case Mnemonic.Bswap:
                return instruction.Op0Register.GetSize() >= 4;
            case Mnemonic.Lahf or Mnemonic.Sahf:
                return true;
            default:
                return !high || item.Memory < 0;
        }
    }

    private static int BranchBytes(in Instruction instruction) => instruction.Op0Kind switch
    {
        OpKind.NearBranch16 => 2,
        OpKind.NearBranch32 => 4,
        _ => 8,
    };

    /// <summary>Whether pushes and pops are compiled: the stack is as wide as the code.</summary>
    private bool HasNativeStack => Is64 || (Is32 && (_mode & CodeMode.Stack32) != 0);

    private int StackBytes => Is64 ? 8 : 4;

    private static int DivisorSize(in Instruction instruction) =>
        instruction.Op0Kind == OpKind.Register ? instruction.Op0Register.GetSize() : instruction.MemorySize.GetSize();

    /// <summary>Finds before which instructions the flags matter: for a reader, a fault, an exit.</summary>
    private void FindNeeds(int count)
    {
        _need[count] = true;
        for (int i = count - 1; i >= 0; i--)
        {
            ref Item item = ref _items[i];
            _need[i] = item.ReadsFlags || item.MayFault || (!item.WritesAllFlags && _need[i + 1]);
        }
    }

    /// <returns>False: nothing comes after this instruction.</returns>
    private bool EmitInstruction(int i)
    {
        ref Item item = ref _items[i];
        switch (item.Kind)
        {
            case InstructionKind.NoOperation:
                return true;
            case InstructionKind.Native:
                EmitNative(i);
                return true;
            case InstructionKind.Divide:
                EmitDivide(i);
                return true;
            case InstructionKind.Push:
                EmitPush(i);
                return true;
            case InstructionKind.Pop:
                EmitPop(i);
                return true;
            case InstructionKind.LeaveFrame:
                EmitLeaveFrame(i);
                return true;
            case InstructionKind.JumpIf:
                int condition = InstructionKinds.ConditionOf(in item.Instruction);
                if (item.Inverted)
                    EmitExit(condition ^ 1, item.Op, item.Op->Offset + item.Op->Length);
                else
                    EmitExit(condition, item.Op, item.Op->Imm);
                return true;
            case InstructionKind.Jump:
                if (item.Inverted)
                    return true;
                EmitExit(-1, item.Op, item.Op->Imm);
                return false;
            case InstructionKind.Call:
                EmitCall(i);
                return false;
            case InstructionKind.JumpIndirect:
                EmitJumpIndirect(i);
                return false;
            case InstructionKind.CallIndirect:
                EmitCallIndirect(i);
                return false;
            case InstructionKind.Return:
                EmitReturn(i);
                return false;
            case InstructionKind.Vector:
                EmitVector(i);
                return true;
            case InstructionKind.X87:
                EmitX87(i);
                return true;
            case InstructionKind.CounterJump:
                EmitCounterJump(i);
                return true;
            case InstructionKind.MultiplyNoFlags:
                EmitMultiplyNoFlags(i);
                return true;
            case InstructionKind.BitString:
                EmitBitString(i);
                return true;
            case InstructionKind.PushMemory:
                EmitPushMemory(i);
                return true;
            case InstructionKind.PushFlags:
                EmitPushFlags(i);
                return true;
            case InstructionKind.InterruptFlag:
                EmitInterruptFlag(i);
                return true;
            default:
                EmitHandler(item.Op);
                return true;
        }
    }

    /// <summary>Calls the operation's handler. Flags are in memory before and after.</summary>
    private void EmitHandler(Op* op)
    {
        FlushFlags();
        _a.MoveImmediate(Layout.T0, OpOffset(op));
        _a.CallTo(_stubs.Execute);
        _flags.Forget();
        _flags.Memory = true;
        // It may have forbidden vector instructions, or unmasked their exceptions.
        _vectorLevel = 0;
        _x87Checked = false;
    }

    /// <summary>Number 0-15 of a general register of any size.</summary>
    private static int NumberOf(Register register) => Operands.Register(register) >> 3;

    private sealed class Sink(HostAssembler assembler) : CodeWriter
    {
        public override void WriteByte(byte value) => assembler.Byte(value);
    }

    private sealed class BytesReader : CodeReader
    {
        private byte* _at;
        private byte* _end;

        public void Set(byte* at, int length)
        {
            _at = at;
            _end = at + length;
        }

        public override int ReadByte() => _at < _end ? *_at++ : -1;
    }
}
