using System;
using System.Threading;
using Iced.Intel;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>What lowering an instruction means for the block it stands in.</summary>
public enum Lowered
{
    /// <summary>Not an instruction this lowering knows.</summary>
    No,

    /// <summary>Execution may go on with the next operation.</summary>
    Next,

    /// <summary>The handler never returns the next operation: the block ends here.</summary>
    End,
}

/// <summary>What lowering needs to know of the place an instruction stands in.</summary>
/// <param name="Mode"><see cref="CodeMode"/> bits.</param>
/// <param name="BlockRip">RIP of the block's first byte when it was decoded; only differences from it may be kept.</param>
public readonly record struct LoweringContext(uint Mode, ulong BlockRip)
{
    public bool Is64 => (Mode & CodeMode.SizeMask) == CodeMode.Code64;
}

/// <summary>
/// Makes blocks: decodes guest bytes with Iced and lowers each instruction to an operation. One per vCPU; blocks go into the shared cache.
/// </summary>
public sealed unsafe class BlockDecoder : System.IDisposable
{
    private const int MaxOperations = 64;
    private const int MaxInstruction = 15;

    private readonly SoftVcpu _vcpu;
    private readonly VcpuBlock* _s;
    private readonly PointerReader _reader = new();
    private readonly Decoder[] _decoders;
    private readonly Op[] _ops = new Op[MaxOperations + 1];
    private readonly byte[] _crossing = new byte[MaxInstruction * 2];
    private readonly Op* _private;

    internal BlockDecoder(SoftVcpu vcpu, VcpuBlock* block)
    {
        _vcpu = vcpu;
        _s = block;
        DecoderOptions options = vcpu.Model.IsAmd ? DecoderOptions.AMD : DecoderOptions.None;
        _decoders = [Decoder.Create(16, _reader, options), Decoder.Create(32, _reader, options), Decoder.Create(64, _reader, options)];
        _private = (Op*)System.Runtime.InteropServices.NativeMemory.AllocZeroed((nuint)(2 * sizeof(Op)));
    }

    /// <summary>Decodes the block at a linear address whose first byte is at an offset of the memory file. Null: a fault was recorded.</summary>
    public Block* Build(ulong linear, ulong offset, ulong key)
    {
        CodeCache code = _vcpu.Code;
        ulong page = offset >> 12;
        int available = (int)(4096 - (offset & 0xfff));
        while (true)
        {
            code.MarkCode(page, _vcpu);
            lock (code.Gate)
            {
                if ((_vcpu.Memory.Flags[page] & (byte)Core.PageFlags.Code) == 0)
                    continue;
                Block* existing = code.Find(key);
                if (existing != null && existing->SecondPage == Block.NoPage)
                    return existing;
                int count = DecodeRun(_vcpu.Memory.Host + offset, available, out int bytes, out bool crossing);
                if (!crossing)
                    return Publish(code, key, count, bytes, Block.NoPage, translatable: true);
            }
            break;
        }
        return BuildCrossing(linear, offset, key, available);
    }

    /// <summary>One instruction at <see cref="VcpuBlock.Rip"/> for single stepping: its operation is the vCPU's own and is not kept. Null: a fault was recorded.</summary>
    public Op* DecodeOne(ulong linear)
    {
        Span<byte> bytes = stackalloc byte[MaxInstruction];
        int available = 0;
        while (available < MaxInstruction)
        {
            ulong at = available == 0 ? linear : Advance(linear, available);
            int run = Math.Min(MaxInstruction - available, (int)(4096 - (at & 0xfff)));
            byte* host = _vcpu.Mmu.Fetch(at, out bool device);
            if (host == null && !device)
            {
                if (available == 0)
                    return null;
                // The next page matters only if the instruction reaches it.
                byte vector = _s->FaultVector;
                _s->FaultVector = Fault.None;
                if (TryDecodePrivate(bytes[..available], out bool more) || !more)
                    return _private;
                _s->FaultVector = vector;
                return null;
            }
            for (int i = 0; i < run; i++)
                bytes[available + i] = device ? _vcpu.Mmu.FetchDeviceByte(at + (ulong)i) : host[i];
            available += run;
        }
        TryDecodePrivate(bytes, out _);
        return _private;
    }

    /// <summary>Decodes one instruction from a device's memory (no RAM behind the address); nothing is kept.</summary>
    public Op* FromDevice(ulong linear)
    {
        Op* op = DecodeOne(linear);
        _s->BlockRip = _s->Rip;
        return op;
    }

    public void Dispose() => System.Runtime.InteropServices.NativeMemory.Free(_private);

    private static ulong Advance(ulong linear, int bytes) => linear + (ulong)bytes;

    private bool TryDecodePrivate(ReadOnlySpan<byte> bytes, out bool more)
    {
        fixed (byte* p = bytes)
        {
            int count = DecodeAt(p, bytes.Length, _ops, 0, 0, 1, out _, out more);
            if (count == 0)
            {
                // Fewer bytes than an instruction may have were there, or more than it may.
                if (more && bytes.Length < MaxInstruction)
                    return false;
                _ops[0] = TooLong(0, 1);
                more = false;
            }
        }
        _private[0] = _ops[0];
        EndOperation(ref _private[1], (ushort)(_ops[0].Offset + _ops[0].Length), 2);
        return true;
    }

    private int DecodeRun(byte* code, int available, out int bytes, out bool crossing) =>
        DecodeAt(code, available, _ops, 0, 0, MaxOperations, out bytes, out crossing);

    /// <summary>
    /// Decodes up to <paramref name="limit"/> instructions. <paramref name="crossing"/>: there were too few bytes for even the first one.
    /// </summary>
    private int DecodeAt(byte* code, int available, Op[] ops, int count, int at, int limit, out int bytes, out bool crossing)
    {
        uint mode = _s->Mode;
        ulong rip = _s->Rip;
        Decoder decoder = _decoders[mode & CodeMode.SizeMask];
        LoweringContext context = new(mode, rip);
        // A limited code segment may end inside the run: fetches past its limit fault.
        int permitted = available;
        if ((mode & CodeMode.CodeLimited) != 0)
            permitted = (int)Math.Min((ulong)available, _s->SegLimit[1] - rip + 1);
        crossing = false;
        while (count < limit && at < available)
        {
            _reader.Set(code + at, Math.Min(available - at, MaxInstruction));
            decoder.IP = rip + (ulong)at;
            decoder.Decode(out Instruction instruction);
            ref Op op = ref ops[count];
            op = default;
            op.Offset = (ushort)at;
            op.Ordinal = (ushort)(count + 1);
            if (instruction.IsInvalid)
            {
                bool shortOfBytes = decoder.LastError == DecoderError.NoMoreBytes;
                if (shortOfBytes && available - at < MaxInstruction)
                {
                    // It goes on in the next page: a block of its own.
                    crossing = count == 0;
                    break;
                }
                op.Handler = shortOfBytes ? &Faulting.TooLong : &Faulting.InvalidOpcode;
                count++;
                bytes = at + 1;
                return count;
            }
            op.Length = (byte)instruction.Length;
            if (at + instruction.Length > permitted)
            {
                op.Handler = &Faulting.BeyondLimit;
                count++;
                bytes = Math.Min(at + instruction.Length, available);
                return count;
            }
            Operands.Defaults(ref op);
            Lowered lowered = Lowering.Lower(in instruction, ref op, in context);
            count++;
            at += instruction.Length;
            if (lowered == Lowered.End)
                break;
        }
        bytes = Math.Max(at, 1);
        return count;
    }

    private static Op TooLong(ushort offset, ushort ordinal) => new() { Handler = &Faulting.TooLong, Offset = offset, Ordinal = ordinal };

    private static void EndOperation(ref Op op, ushort offset, ushort ordinal)
    {
        op = default;
        op.Handler = &Branches.EndOfBlock;
        op.Offset = offset;
        op.Ordinal = ordinal;
    }

    private static void EntryOperation(ref Op op, int place, int threshold)
    {
        op = default;
        op.Handler = &Entry.Count;
        op.Flags = OpFlags.Entry;
        op.Disp = place;
        op.Ordinal = 1;
        op.Aux = (ushort)threshold;
    }

    /// <param name="translatable">Nothing but the mode keeps it from being translated.</param>
    private Block* Publish(CodeCache code, ulong key, int count, int bytes, ulong secondPage, bool translatable)
    {
        translatable &= code.Translator != null && (_s->Mode & CodeMode.CodeLimited) == 0;
        int first = translatable ? 1 : 0;
        Block* block = code.Allocate(first + count + 1);
        if (translatable)
            EntryOperation(ref block->First[0], (int)(key >> 8) & 0xfff, code.Translator!.Threshold);
        for (int i = 0; i < count; i++)
            block->First[first + i] = _ops[i];
        ref Op last = ref _ops[count - 1];
        EndOperation(ref block->First[first + count], (ushort)(last.Offset + last.Length), (ushort)(count + 1));
        block->Key = key;
        block->Bytes = bytes;
        block->SecondPage = secondPage;
        if (secondPage != Block.NoPage)
            block->First->Flags |= OpFlags.CrossesPages;
        code.Insert(block);
        return block;
    }

    private Block* BuildCrossing(ulong linear, ulong offset, ulong key, int available)
    {
        CodeCache code = _vcpu.Code;
        byte* second = _vcpu.Mmu.Fetch(_vcpu.NextPage(linear), out bool device);
        if (second == null && !device)
            return null;
        ulong secondOffset = second == null ? Block.NoPage : (ulong)(second - _vcpu.Memory.Host);
        while (true)
        {
            code.MarkCode(offset >> 12, _vcpu);
            if (second != null)
                code.MarkCode(secondOffset >> 12, _vcpu);
            lock (code.Gate)
            {
                bool marked = (_vcpu.Memory.Flags[offset >> 12] & (byte)Core.PageFlags.Code) != 0
                    && (second == null || (_vcpu.Memory.Flags[secondOffset >> 12] & (byte)Core.PageFlags.Code) != 0);
                if (!marked)
                    continue;
                int rest = MaxInstruction - available;
                new ReadOnlySpan<byte>(_vcpu.Memory.Host + offset, available).CopyTo(_crossing);
                for (int i = 0; i < rest; i++)
                    _crossing[available + i] = second != null ? second[i] : _vcpu.Mmu.FetchDeviceByte(_vcpu.NextPage(linear) + (ulong)i);
                int count;
                int bytes;
                fixed (byte* p = _crossing)
                    count = DecodeAt(p, MaxInstruction, _ops, 0, 0, 1, out bytes, out _);
                // The translation looks for the second page by itself, in 64-bit mode.
                bool translatable = second != null && (_s->Mode & CodeMode.SizeMask) == CodeMode.Code64;
                return Publish(code, key, count, Math.Max(bytes, available + 1), second == null ? offset & ~0xffful : secondOffset, translatable);
            }
        }
    }

    /// <summary>Feeds Iced from guest memory.</summary>
    private sealed class PointerReader : CodeReader
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

/// <summary>Handlers of bytes that are no instruction.</summary>
public static unsafe class Faulting
{
    public static Op* InvalidOpcode(VcpuBlock* s, Op* op) => Access.Raise(s, op, ExceptionVector.InvalidOpcode);

    /// <summary>More than 15 bytes.</summary>
    public static Op* TooLong(VcpuBlock* s, Op* op) => Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);

    /// <summary>The instruction's last byte lies beyond the code segment's limit.</summary>
    public static Op* BeyondLimit(VcpuBlock* s, Op* op) => Access.Raise(s, op, ExceptionVector.GeneralProtection, 0);
}
