using System;
using System.Collections.Concurrent;
using System.Globalization;
using System.Runtime.CompilerServices;
using System.Text;
using Iced.Intel;

namespace Kvasir.Cpu;

/// <summary>
/// Runs every translated block of one vCPU twice: first by the interpreter, whose stores are noted and undone, then by its translation, which leaves after each block. Registers,
/// flags, vectors, faults, where execution goes on, and the memory that was written must be the same. Blocks with instructions that handlers execute in both engines are
/// executed once, as are those that reach a device or a page with code. A tool to look for defects; slow.
/// </summary>
internal sealed unsafe class LockStep
{
    private const int MaxStores = 4096;
    private const int MaxStoreSize = 64;
    private const int X87Registers = 32;
    private const int X87Bytes = 128;

    private readonly ConcurrentDictionary<nint, Path> _paths = [];
    private readonly Store[] _stores = new Store[MaxStores];
    private VcpuBlock _before;
    private VcpuBlock _expected;
    private Op* _expectedNext;
    private int _count;
    private bool _refused;

    /// <summary>The operations that a block's translation executes where it is not left, in one round.</summary>
    private readonly record struct Path(nint[] Operations, bool Joined);

    private struct Store
    {
        public nint Place;
        public int Size;
        public Bytes Old;
        public Bytes New;
    }

    [InlineArray(MaxStoreSize)]
    private struct Bytes
    {
        private byte _first;
    }

    /// <summary>Blocks that were compared, and blocks that were executed once.</summary>
    public ulong Compared { get; private set; }

    public ulong Skipped { get; private set; }

    /// <summary>Differences that a second interpretation showed as well: something else wrote the memory in between.</summary>
    public ulong Races { get; private set; }

    /// <summary>Whether the interpreter is being recorded.</summary>
    public bool IsRecording { get; private set; }

    /// <summary>The counts, as the end of a line.</summary>
    public string Report() => string.Create(CultureInfo.InvariantCulture, $"; {Compared} runs of blocks compared with the interpreter, {Skipped} not, {Races} races");

    /// <summary>The handler of entry operations.</summary>
    public static Op* Enter(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        return vcpu.Code.Translator!.LockStep!.Run(vcpu, s, op);
    }

    /// <summary>A store of the interpreter: notes what was there. Null: it cannot be undone, and the block is given up.</summary>
    public byte* Note(SoftVcpu vcpu, VcpuBlock* s, byte* place, int size)
    {
        if (place == null)
            return null;
        if (s->StorePending || size > MaxStoreSize || _count == MaxStores)
        {
            s->StorePending = false;
            if (s->StoreExclusive)
                vcpu.Barrier.EndExclusive(vcpu);
            s->StoreExclusive = false;
            return Refuse(s);
        }
        ref Store store = ref _stores[_count++];
        store.Place = (nint)place;
        store.Size = size;
        new ReadOnlySpan<byte>(place, size).CopyTo(store.Old);
        return place;
    }

    /// <summary>Gives the block up: the handler takes it for a fault.</summary>
    public byte* Refuse(VcpuBlock* s)
    {
        _refused = true;
        s->FaultVector = (byte)X86.ExceptionVector.MachineCheck;
        return null;
    }

    private Op* Run(SoftVcpu vcpu, VcpuBlock* s, Op* op)
    {
        Block* block = Translator.BlockOf(op);
        if (!block->Checkable || s->Pending != 0)
        {
            Skipped++;
            return Entry.Run(s, op);
        }
        Copy(ref _before, ref *s);
        bool comparable = Interpret(vcpu, s, op, block);
        Undo();
        Restore(vcpu, s);
        Op* next = Entry.Run(s, op);
        // Left in the middle: the interpreter does the rest of it.
        bool partly = false;
        while (next != null && (next->Flags & OpFlags.Entry) == 0)
        {
            partly = true;
            next = next->Handler(s, next);
        }
        // In which of several rounds it was left nobody knows, and the rest of a trace is another block's.
        if (!comparable || s->Pending != 0 || (partly && (block->Rounds > 1 || _paths[(nint)block].Joined)))
        {
            Skipped++;
            return next;
        }
        Compared++;
        string? difference = Difference(s, block, next);
        if (difference is not null)
            Examine(vcpu, s, op, block, next, difference);
        return next;
    }

    private bool Interpret(SoftVcpu vcpu, VcpuBlock* s, Op* op, Block* block)
    {
        _count = 0;
        _refused = false;
        IsRecording = true;
        vcpu.Mmu.WriteSlowly();
        Op* next = Follow(s, op, block);
        IsRecording = false;
        if (_refused)
            return false;
        Copy(ref _expected, ref *s);
        _expectedNext = next;
        for (int i = 0; i < _count; i++)
            new ReadOnlySpan<byte>((byte*)_stores[i].Place, _stores[i].Size).CopyTo(_stores[i].New);
        return true;
    }

    /// <summary>Interprets what the translation does.</summary>
    private Op* Follow(VcpuBlock* s, Op* op, Block* block)
    {
        nint[] path = _paths[(nint)block].Operations;
        int rounds = 0;
        int k = 0;
        while (true)
        {
            Op* at = (Op*)path[k];
            Op* next = at->Handler(s, at);
            if (next == null)
                return null;
            // A link may lead to a block that is no more, in whose place there is another.
            Block* target = Translator.BlockOf(next);
            if (target != null && target->Invalid && SoftVcpu.From(s).Code.Find(target->Key) is var anew && anew != null)
                next = anew->First;
            Op* follower = (next->Flags & OpFlags.Entry) != 0 ? next + 1 : next;
            if (k + 1 < path.Length && follower == (Op*)path[k + 1])
            {
                k++;
            }
            else if (next == op && k + 1 == path.Length && ++rounds < block->Rounds)
            {
                k = 0;
            }
            else
            {
                // Out of the trace or loop: the translation leaves the block there.
                if (next != at + 1)
                    return next;
                Op* entry = CallBacks.EntryOf(at);
                if (next == entry + Translator.BlockOf(entry)->Operations - 1)
                    return next->Handler(s, next);
                s->BlockRip += next->Offset;
                return next;
            }
        }
    }

    /// <summary>Notes what a translation is made of. Under the gate.</summary>
    public void Learn(Block* block, BlockCompiler compiler)
    {
        nint[] path = new nint[compiler.Instructions];
        for (int i = 0; i < path.Length; i++)
            path[i] = (nint)compiler.OperationOf(i);
        _paths[(nint)block] = new Path(path, compiler.Joined > 1);
    }

    private void Undo()
    {
        for (int i = _count - 1; i >= 0; i--)
            ((ReadOnlySpan<byte>)_stores[i].Old)[.._stores[i].Size].CopyTo(new Span<byte>((byte*)_stores[i].Place, _stores[i].Size));
    }

    private void Restore(SoftVcpu vcpu, VcpuBlock* s)
    {
        Copy(ref *s, ref _before);
        vcpu.Mmu.UpdateRights();
    }

    /// <summary>All of the state but what other threads write.</summary>
    private static void Copy(ref VcpuBlock to, ref VcpuBlock from)
    {
        byte* target = (byte*)Unsafe.AsPointer(ref to);
        byte* source = (byte*)Unsafe.AsPointer(ref from);
        long pending = (byte*)Unsafe.AsPointer(ref from.Pending) - source;
        Buffer.MemoryCopy(source, target, pending, pending);
        long rest = pending + sizeof(int);
        Buffer.MemoryCopy(source + rest, target + rest, sizeof(VcpuBlock) - rest, sizeof(VcpuBlock) - rest);
    }

    /// <summary>What differs from the interpreter's state, or null.</summary>
    private string? Difference(VcpuBlock* s, Block* block, Op* next)
    {
        fixed (VcpuBlock* e = &_expected)
        {
            for (int i = 0; i < 16; i++)
            {
                if (e->Gpr[i] != s->Gpr[i])
                    return $"register {i}";
            }
            if (((LazyFlags.Read(e) ^ LazyFlags.Read(s)) & ~block->UndefinedFlags) != 0)
                return string.Create(CultureInfo.InvariantCulture, $"flags ({LazyFlags.Read(e):x} by the interpreter, {LazyFlags.Read(s):x} by the translation)");
            if ((_expectedNext == null) != (next == null) || (next == null ? e->Rip != s->Rip : e->BlockRip != s->BlockRip))
                return "where execution goes on";
            if (e->FaultVector != s->FaultVector || (e->FaultVector != Fault.None && (e->FaultError != s->FaultError || e->FaultAddress != s->FaultAddress)))
                return "the fault";
            if (e->Mxcsr != s->Mxcsr || !new ReadOnlySpan<byte>(e->Vector, 16 * VcpuBlock.VectorStride).SequenceEqual(new ReadOnlySpan<byte>(s->Vector, 16 * VcpuBlock.VectorStride)))
                return "vector registers or MXCSR";
            if (*(uint*)e->X87 != *(uint*)s->X87 || e->X87[4] != s->X87[4]
                || !new ReadOnlySpan<byte>(e->X87 + X87Registers, X87Bytes).SequenceEqual(new ReadOnlySpan<byte>(s->X87 + X87Registers, X87Bytes)))
                return "the x87 state";
        }
        for (int i = 0; i < _count; i++)
        {
            // Of several stores to a place the contents at the end count, which each of them noted.
            if (!((ReadOnlySpan<byte>)_stores[i].New)[.._stores[i].Size].SequenceEqual(new ReadOnlySpan<byte>((byte*)_stores[i].Place, _stores[i].Size)))
                return "memory that was written";
        }
        return null;
    }

    /// <summary>Interprets once more: if that gives what the translation gave, memory changed in between.</summary>
    private void Examine(SoftVcpu vcpu, VcpuBlock* s, Op* op, Block* block, Op* next, string difference)
    {
        VcpuBlock translated = default;
        Copy(ref translated, ref *s);
        VcpuBlock first = default;
        Copy(ref first, ref _expected);
        Op* firstNext = _expectedNext;
        Undo();
        Restore(vcpu, s);
        bool again = Interpret(vcpu, s, op, block);
        Copy(ref *s, ref translated);
        vcpu.Mmu.UpdateRights();
        if (again && Difference(s, block, next) is null)
        {
            Races++;
            return;
        }
        throw new InvalidOperationException(Describe(&first, firstNext, s, next, block, difference));
    }

    private string Describe(VcpuBlock* expected, Op* expectedNext, VcpuBlock* s, Op* next, Block* block, string difference)
    {
        StringBuilder text = new();
        CultureInfo c = CultureInfo.InvariantCulture;
        text.Append(c, $"interpreter and translation differ: {difference}\nblock at {_before.BlockRip:x}, mode {s->Mode}, {block->Operations - 2} instructions, {block->Rounds} rounds\n");
        for (int i = 0; i < 16; i++)
            text.Append(c, $"register {i,2}: before {_before.Gpr[i]:x16}, interpreter {expected->Gpr[i]:x16}, translation {s->Gpr[i]:x16}{(expected->Gpr[i] == s->Gpr[i] ? "" : " <")}\n");
        text.Append(c, $"flags: interpreter {LazyFlags.Read(expected):x}, translation {LazyFlags.Read(s):x}\n");
        text.Append(c, $"goes on: interpreter {(expectedNext == null ? expected->Rip : expected->BlockRip):x}, translation {(next == null ? s->Rip : s->BlockRip):x}\n");
        text.Append(c, $"fault: interpreter {expected->FaultVector:x} {expected->FaultError:x} {expected->FaultAddress:x}, translation {s->FaultVector:x} {s->FaultError:x} {s->FaultAddress:x}\n");
        byte[] guest = new ReadOnlySpan<byte>(SoftVcpu.From(s).Memory.Host + (block->Key >> 8), Math.Min(block->Bytes, 4096 - (int)(block->Key >> 8 & 0xfff))).ToArray();
        text.Append("guest code:\n");
        Disassemble(text, guest, (s->Mode & CodeMode.SizeMask) switch { CodeMode.Code64 => 64, CodeMode.Code32 => 32, _ => 16 }, _before.BlockRip);
        text.Append("translation:\n");
        Disassemble(text, new ReadOnlySpan<byte>(block->StaleEntry, block->CodeBytes).ToArray(), 64, (ulong)block->StaleEntry);
        return text.ToString();
    }

    private static void Disassemble(StringBuilder text, byte[] code, int bits, ulong address)
    {
        Iced.Intel.Decoder decoder = Iced.Intel.Decoder.Create(bits, code, address);
        IntelFormatter formatter = new();
        StringOutput output = new();
        while (decoder.IP < address + (ulong)code.Length)
        {
            decoder.Decode(out Instruction instruction);
            formatter.Format(in instruction, output);
            text.Append(CultureInfo.InvariantCulture, $"  {instruction.IP:x}  {output.ToStringAndReset()}\n");
        }
    }
}
