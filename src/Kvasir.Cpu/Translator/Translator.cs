using System;
using System.Threading;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>A direct branch out of translated code: where it is, and where it shall lead.</summary>
internal unsafe struct TranslatedExit
{
    /// <summary>Offset in the code memory of the branch's 32-bit field.</summary>
    public uint Field;

    /// <summary>Offset in the code memory of what follows the call that finds the target.</summary>
    public uint After;

    /// <summary>The next exit that leads to the same block; 0: none.</summary>
    public uint NextIncoming;

    /// <summary>Where in its page the target starts.</summary>
    public int Target;

    /// <summary>Flags that are to be stored on the way, by code that is made when there is a target: its offset in the code memory (0: none yet), and its jump's field.</summary>
    public FlagRecipe Flags;
    public uint Edge;
    public uint EdgeField;

    /// <summary>For the way out of a group of accesses: distance in the operations of its first.</summary>
    public uint Leader;

    /// <summary>For a branch to another page: distance in the operations of its own.</summary>
    public uint FarOp;

    /// <summary>It leads to a block, whose list it is in, or for good to code that looks its target up.</summary>
    public bool Linked;

    /// <summary>The call is the branch itself: see <see cref="HostAssembler.CallReplaceable"/>.</summary>
    public bool Inline;
}

/// <summary>Code that was made of a block.</summary>
internal delegate void TranslationListener(ulong place, ReadOnlySpan<byte> code);

/// <summary>
/// Tier 1 of the software CPU: makes host code of warm blocks and links it. The code lies in memory that is mapped twice, to write and to execute. One for all vCPUs of a
/// VM; whatever changes code happens under <see cref="CodeCache.Gate"/>.
/// </summary>
public sealed unsafe class Translator : IDisposable
{
    private const int ExitCapacity = 1 << 21;

    private const int CallLength = 5;
    private const byte CallOpcode = 0xe8;
    private const byte JumpOpcode = 0xe9;
    private const int MaxInstruction = 15;
    private const ulong PageSize = 4096;

    /// <summary>After so many failures of the checks of a block's groups the rest of the block is translated once more, without groups, to go on there.</summary>
    private const int GroupFailures = 16;

    /// <summary>The longest code of one block, with room to spare.</summary>
    private const ulong Reserve = 1 << 16;
    private const ulong EdgeReserve = 128;

    // Configuration
    private readonly CodeCache _cache;
    private readonly ExecutableMemory _memory;
    private readonly Stubs _stubs;
    private readonly TranslatedExit* _exits;
    private readonly CodeSites _sites = new();
    private readonly BlockCompiler _compiler;
    private readonly ulong _start;

    // State
    private ulong _used;
    private uint _exitCount = 1;
    private ulong _goneWalks;
    private ulong _goneHostWalks;
    private ulong _goneSlow;

    /// <param name="cache">The blocks.</param>
    /// <param name="capacity">Bytes of code at most, a multiple of 4 KiB.</param>
    /// <exception cref="LinuxException">The kernel refuses memory for code.</exception>
    internal Translator(CodeCache cache, ulong capacity)
    {
        _cache = cache;
        _memory = new ExecutableMemory("kvasir-translations", capacity);
        _exits = (TranslatedExit*)MemoryMap.MapAnonymousMemory((ulong)(ExitCapacity * sizeof(TranslatedExit)), Protection.Read | Protection.Write);
        HostAssembler assembler = new();
        assembler.Begin((ulong)_memory.Executable);
        _stubs = new Stubs(assembler, HostFeatures.Avx);
        _memory.Write(0, assembler.Code);
        _used = (ulong)assembler.Length;
        _start = _used;
        _compiler = new BlockCompiler(assembler, _stubs, cache.Operations);
    }

    /// <summary>How often a block is entered before it is translated.</summary>
    public int Threshold { get; init; } = 40;

    /// <summary>Compares each translated block with the interpreter; null: does not.</summary>
    internal LockStep? LockStep { get; init; }

    /// <summary>Bytes of code in use, and the most there can be.</summary>
    public ulong BytesUsed => _used;

    public ulong Capacity => _memory.Size;

    public ulong BlocksTranslated { get; private set; }

    public ulong InstructionsTranslated { get; private set; }

    /// <summary>Blocks that are in the translation of another, which leads to them.</summary>
    public ulong BlocksJoined { get; private set; }

    /// <summary>Bytes of guest code that was translated.</summary>
    public ulong GuestBytes { get; private set; }

    /// <summary>Bytes of code that were made of it.</summary>
    public ulong HostBytes { get; private set; }

    public ulong Links { get; private set; }

    public ulong Unlinks { get; private set; }

    /// <summary>Times that everything was thrown away for want of space.</summary>
    public ulong Resets { get; private set; }

    /// <summary>Host time spent translating, in <see cref="System.Diagnostics.Stopwatch"/> ticks.</summary>
    public long Ticks { get; private set; }

    /// <summary>Is shown the code of each block that was translated, with its distance from the start of the code memory. For listings.</summary>
    internal TranslationListener? Listener { get; set; }

    /// <summary>Hears the counts each time everything is thrown away; null: nobody.</summary>
    public Action<string>? Log { get; set; }

    /// <summary>The counts in a line.</summary>
    public string Report()
    {
        double seconds = Ticks / (double)System.Diagnostics.Stopwatch.Frequency;
        ulong walks = _goneWalks;
        ulong slow = _goneSlow;
        ulong hostWalks = _goneHostWalks;
        foreach (SoftVcpu vcpu in _cache.Barrier.Vcpus)
        {
            walks += vcpu.Mmu.Walks;
            hostWalks += vcpu.Block->Walk.Count;
            slow += vcpu.Block->SlowOperations;
        }
        return string.Create(
            System.Globalization.CultureInfo.InvariantCulture,
            $"{BytesUsed >> 10} of {Capacity >> 10} KiB in use, emptied {Resets} times; {BlocksTranslated} of {_cache.BlocksMade} blocks translated, {BlocksJoined} times one more in the same trace, {_cache.BlocksInvalidated} invalidated, {Links} links, {Unlinks} undone; "
            + $"{InstructionsTranslated} instructions in {seconds:0.000} s ({InstructionsTranslated / Math.Max(seconds, 1e-9) / 1e6:0.0} M/s), {HostBytes / (double)Math.Max(GuestBytes, 1):0.00} bytes for a guest byte; "
            + $"{slow} operations by their handlers, {LinkExits} exits for a link, {FindExits} to find a block, {walks} page walks, {hostWalks} of them in host code{LockStep?.Report()}");
    }

    /// <summary>Keeps the counts of a vCPU that goes.</summary>
    internal void Remember(SoftVcpu vcpu)
    {
        _goneWalks += vcpu.Mmu.Walks;
        _goneHostWalks += vcpu.Block->Walk.Count;
        _goneSlow += vcpu.Block->SlowOperations;
    }

    /// <summary>Direct branches that left to be linked, and returns and indirect ones that the jump cache did not know. (Several vCPUs may lose counts to each other.)</summary>
    public ulong LinkExits { get; private set; }

    public ulong FindExits { get; private set; }

    /// <summary>Whether the next block may not fit.</summary>
    internal bool IsFull => _used + Reserve > _memory.Size || _exitCount + 256 > ExitCapacity || _sites.IsFull;

    /// <summary>Runs translated code: the function that <see cref="Stubs.Enter"/> is.</summary>
    internal delegate* unmanaged<VcpuBlock*, byte*, Op*> Enter => (delegate* unmanaged<VcpuBlock*, byte*, Op*>)_stubs.Enter;

    /// <summary>What a jump-cache entry's <see cref="JumpEntry.Code"/> is for a block.</summary>
    internal byte* CodeOf(Op* first)
    {
        Block* block = BlockOf(first);
        return block != null && block->Code != null && LockStep is null ? block->Code : (byte*)_stubs.Interpret;
    }

    /// <summary>The block whose entry operation this is, or null where it is none.</summary>
    internal static Block* BlockOf(Op* first) => (first->Flags & OpFlags.Entry) != 0 ? (Block*)first - 1 : null;

    private static bool IsTranslated(Op* first)
    {
        Block* block = BlockOf(first);
        return block != null && block->Code != null && !block->Invalid;
    }

    /// <summary>Translates a block. False: it cannot be, or there is no room.</summary>
    internal bool Translate(SoftVcpu vcpu, Block* block, uint mode)
    {
        lock (_cache.Gate)
        {
            if (block->Invalid || block->Code != null)
                return block->Code != null && !block->Invalid;
            if (IsFull)
            {
                vcpu.CodeCacheFull = true;
                vcpu.Post(PendingWork.Resynchronize);
                return false;
            }
            long start = System.Diagnostics.Stopwatch.GetTimestamp();
            ulong at = ((_used + BlockCompiler.EntryDistance + 15) & ~15ul) - BlockCompiler.EntryDistance;
            ulong place = block->Key >> 8;
            byte* bytes = vcpu.Memory.Host + place;
            byte* joined = stackalloc byte[MaxInstruction];
            if (block->SecondPage != Block.NoPage)
            {
                int first = (int)(PageSize - (place & (PageSize - 1)));
                for (int i = 0; i < MaxInstruction; i++)
                    joined[i] = i < first ? bytes[i] : vcpu.Memory.Host[block->SecondPage + (ulong)(i - first)];
                bytes = joined;
            }
            bool done = _compiler.Compile(vcpu, block, bytes, mode, (ulong)_memory.Executable + at);
            Ticks += System.Diagnostics.Stopwatch.GetTimestamp() - start;
            if (!done)
                return false;
            _memory.Write(at, _compiler.Code);
            foreach (BlockCompiler.PendingExit exit in _compiler.Exits)
            {
                _exits[_exitCount] = new TranslatedExit
                {
                    Field = (uint)at + (uint)exit.Field,
                    After = (uint)at + (uint)exit.After,
                    Target = exit.Target,
                    Leader = exit.Leader,
                    Inline = exit.Inline,
                    Flags = exit.Flags,
                    FarOp = exit.FarOp,
                };
                // Others search the exits meanwhile.
                Volatile.Write(ref _exitCount, _exitCount + 1);
            }
            AddSites((uint)at);
            block->Rounds = _compiler.Rounds;
            block->Bytes = _compiler.Covered;
            LockStep?.Learn(block, _compiler);
            block->Checkable = _compiler.IsNative;
            block->UndefinedFlags = _compiler.UndefinedFlags;
            block->LinkEntry = _memory.Executable + at + _compiler.LinkEntry;
            block->StaleEntry = _memory.Executable + at;
            block->CodeBytes = _compiler.Code.Length;
            Volatile.Write(ref *(ulong*)&block->Code, (ulong)(_memory.Executable + at + _compiler.Entry));
            Listener?.Invoke(at, _compiler.Code);
            BlocksTranslated++;
            InstructionsTranslated += (ulong)_compiler.Instructions;
            BlocksJoined += (ulong)_compiler.Joined - 1;
            GuestBytes += (ulong)_compiler.GuestBytes;
            HostBytes += (ulong)_compiler.Code.Length;
            _used = at + (ulong)_compiler.Code.Length;
            return true;
        }
    }

    /// <summary>Notes the sites of what was compiled last.</summary>
    private void AddSites(uint at)
    {
        foreach (CodeSite site in _compiler.Sites)
        {
            CodeSite placed = site;
            placed.After += at;
            if (site.Resume != 0)
                placed.Resume += at;
            _sites.Add(in placed);
        }
    }

    /// <summary>The site whose call returns to an address.</summary>
    internal CodeSite* SiteOf(ulong after) => _sites.Find((uint)(after - (ulong)_memory.Executable));

    internal byte* CodeAt(uint offset) => _memory.Executable + offset;

    /// <summary>Number of the exit whose call returns to an address.</summary>
    private uint ExitOf(ulong address)
    {
        uint after = (uint)(address - (ulong)_memory.Executable);
        uint low = 1;
        uint high = Volatile.Read(ref _exitCount);
        while (low < high)
        {
            uint middle = (low + high) >> 1;
            if (_exits[middle].After < after)
                low = middle + 1;
            else
                high = middle;
        }
        return _exits[low].After == after ? low : throw new InvalidOperationException("an exit of translated code that nobody knows");
    }

    /// <summary>A direct branch whose target is not known yet, or not translated. See <see cref="CallBacks.Link"/>.</summary>
    internal byte* Link(VcpuBlock* s, ulong after)
    {
        LinkExits++;
        uint number = ExitOf(after);
        s->ExitOp = null;
        TranslatedExit* exit = &_exits[number];
        exit->Flags.Store(s);
        ulong target = s->CodeBase + (ulong)exit->Target;
        ulong cut = (s->Mode & CodeMode.SizeMask) switch
        {
            CodeMode.Code64 => target,
            CodeMode.Code32 => (uint)target,
            _ => (ushort)target,
        };
        DeferredFlags.ToLazy(s);
        if (exit->FarOp != 0)
        {
            // There may be no page, and the fault is the branch's to raise.
            MakeFarEdge(exit, s->Mode);
            Op* branch = (Op*)(_cache.Operations + exit->FarOp);
            s->BlockRip = s->CodeBase + (ulong)CallBacks.EntryOf(branch)->Disp;
            s->ExitOp = branch->Handler(s, branch);
            return null;
        }
        if (s->Pending != 0)
        {
            s->Rip = cut;
            return null;
        }
        int epoch = _cache.Epoch;
        Op* first = Branches.Jump(s, cut);
        if (first == null)
            return null;
        s->ExitOp = first;
        if (!IsTranslated(first) || cut != target || epoch != _cache.Epoch || LockStep is not null)
            return null;
        lock (_cache.Gate)
        {
            Block* block = BlockOf(first);
            if (block == null || block->Invalid || block->Code == null)
                return null;
            Connect(number, block);
            return block->LinkEntry;
        }
    }

    private void Connect(uint number, Block* block)
    {
        TranslatedExit* exit = &_exits[number];
        if (exit->Linked || !MakeEdge(exit, block))
            return;
        exit->Linked = true;
        exit->NextIncoming = block->Incoming;
        block->Incoming = number;
        Links++;
        Point(exit, exit->Edge != 0 ? CodeAt(exit->Edge) : block->LinkEntry, JumpOpcode);
    }

    /// <summary>The code of a branch to another page, which leads there from now on.</summary>
    private void MakeFarEdge(TranslatedExit* exit, uint mode)
    {
        lock (_cache.Gate)
        {
            if (exit->Linked || _used + EdgeReserve > _memory.Size || _sites.IsFull)
                return;
            _compiler.CompileFarEdge(exit->Flags, (Op*)(_cache.Operations + exit->FarOp), exit->Target, mode, (ulong)CodeAt((uint)_used));
            _memory.Write(_used, _compiler.Code);
            AddSites((uint)_used);
            exit->Linked = true;
            Point(exit, CodeAt((uint)_used), JumpOpcode);
            _used += (ulong)_compiler.Code.Length;
            HostBytes += (ulong)_compiler.Code.Length;
        }
    }

    /// <summary>The code that stores flags on the way to a block. False: there is no room.</summary>
    private bool MakeEdge(TranslatedExit* exit, Block* block)
    {
        if (exit->Flags.IsNone)
            return true;
        if (exit->Edge != 0)
        {
            Patch(exit->EdgeField, sizeof(int), (uint)(block->LinkEntry - CodeAt(exit->EdgeField + sizeof(int))));
            return true;
        }
        if (_used + EdgeReserve > _memory.Size)
            return false;
        int field = _compiler.CompileEdge(exit->Flags, (ulong)CodeAt((uint)_used), (ulong)block->LinkEntry);
        _memory.Write(_used, _compiler.Code);
        exit->Edge = (uint)_used;
        exit->EdgeField = (uint)_used + (uint)field;
        _used += (ulong)_compiler.Code.Length;
        HostBytes += (ulong)_compiler.Code.Length;
        return true;
    }

    /// <summary>The block at <see cref="VcpuBlock.Rip"/>. See <see cref="CallBacks.Find"/>.</summary>
    internal byte* Find(VcpuBlock* s)
    {
        FindExits++;
        DeferredFlags.ToLazy(s);
        s->ExitOp = Branches.Jump(s, s->Rip);
        if (s->ExitOp == null || !IsTranslated(s->ExitOp) || LockStep is not null)
            return null;
        lock (_cache.Gate)
        {
            Block* block = BlockOf(s->ExitOp);
            if (block == null || block->Invalid)
                return null;
            s->CodeBase = s->Rip - (block->Key >> 8 & (PageSize - 1));
            return block->Code;
        }
    }

    /// <summary>A block's bytes changed: no branch leads to its translation any more, and what still comes there leaves. Under the gate.</summary>
    internal void Invalidate(Block* block)
    {
        if (block->Code == null)
            return;
        uint number = block->Incoming;
        block->Incoming = 0;
        while (number != 0)
        {
            TranslatedExit* exit = &_exits[number];
            number = exit->NextIncoming;
            exit->NextIncoming = 0;
            exit->Linked = false;
            if (exit->Inline)
                Point(exit, (byte*)(exit->Leader != 0 ? _stubs.Rest : _stubs.Link), CallOpcode);
            else
                Point(exit, _memory.Executable + exit->After - CallLength, JumpOpcode);
            Unlinks++;
        }
        // Whoever is behind the first two bytes goes on with the rest of that instruction behind him.
        const int jumpShort = 0xeb;
        int distance = (int)(block->StaleEntry - (block->LinkEntry + 2));
        Patch((uint)(block->LinkEntry - _memory.Executable), 2, (uint)(byte)distance << 8 | jumpShort);
    }

    /// <summary>
    /// The check of a group of accesses failed, and not for want of a translation alone: it lies across two pages. The interpreter goes on; when that comes again, a translation
    /// of the rest of the block without groups is made, and the way out leads there. See <see cref="CallBacks.Rest"/>.
    /// </summary>
    internal byte* Rest(VcpuBlock* s, ulong after)
    {
        uint number = ExitOf(after);
        DeferredFlags.ToLazy(s);
        Op* leader = (Op*)(_cache.Operations + _exits[number].Leader);
        Op* entry = CallBacks.EntryOf(leader);
        s->BlockRip = s->CodeBase + (ulong)entry->Disp;
        s->ExitOp = leader;
        Block* block = BlockOf(entry);
        if (block == null || ++block->GroupFailures < GroupFailures || _cache.IsFull || LockStep is not null)
            return null;
        block->GroupFailures = 0;
        SoftVcpu vcpu = SoftVcpu.From(s);
        ulong offset = (block->Key >> 8) + leader->Offset;
        s->Rip = s->BlockRip + leader->Offset;
        int epoch = _cache.Epoch;
        Block* rest = vcpu.Decoder.Build(s->Rip, offset, offset << 8 | s->Mode | CodeMode.Ungrouped);
        if (rest == null || !Translate(vcpu, rest, s->Mode))
            return null;
        lock (_cache.Gate)
        {
            if (rest->Invalid || block->Invalid || rest->Code == null || epoch != _cache.Epoch)
                return null;
            Connect(number, rest);
            return rest->LinkEntry;
        }
    }

    /// <summary>Forgets every translation. The caller holds the barrier between instructions.</summary>
    internal void Reset()
    {
        Resets++;
        Log?.Invoke(Report());
        _used = _start;
        _exitCount = 1;
        _sites.Clear();
    }

    /// <inheritdoc/>
    public void Dispose()
    {
        MemoryMap.Unmap((byte*)_exits, (ulong)(ExitCapacity * sizeof(TranslatedExit)));
        _sites.Dispose();
        _memory.Dispose();
    }

    /// <summary>Makes a branch lead to a target; one that is in its call's place becomes that instruction. Under the gate.</summary>
    private void Point(TranslatedExit* exit, byte* target, byte opcode)
    {
        int distance = (int)(target - (_memory.Executable + exit->Field + sizeof(int)));
        if (!exit->Inline)
        {
            Patch(exit->Field, sizeof(int), (uint)distance);
            return;
        }
        Patch(exit->Field - 1, CallLength, (ulong)(uint)distance << 8 | opcode);
    }

    /// <summary>Changes some bytes of code, which lie in one unit, in one write. Under the gate.</summary>
    private void Patch(uint offset, int length, ulong value)
    {
        uint unit = offset & ~(HostAssembler.PatchUnit - 1u);
        int shift = (int)(offset - unit) * 8;
        ulong mask = ((1ul << (length * 8)) - 1) << shift;
        _memory.Patch(unit, (*(ulong*)(_memory.Executable + unit) & ~mask) | value << shift);
    }
}

/// <summary>Handlers of the operation before a block's first: it counts how warm the block is, and later enters its translation.</summary>
internal static unsafe class Entry
{
    /// <summary><see cref="Op.Imm"/> counts. (Several vCPUs may lose counts to each other.)</summary>
    public static Op* Count(VcpuBlock* s, Op* op)
    {
        SoftVcpu vcpu;
        if (++op->Imm < op->Aux)
            return op + 1;
        vcpu = SoftVcpu.From(s);
        Translator translator = vcpu.Code.Translator!;
        Block* block = (Block*)op - 1;
        bool translated = translator.Translate(vcpu, block, s->Mode);
        lock (vcpu.Code.Gate)
        {
            if (block->Invalid)
                return op;
            if (translated)
                op->Handler = translator.LockStep is null ? &Run : &LockStep.Enter;
            else if (!vcpu.CodeCacheFull)
                op->Handler = &Pass;
            else
                return op + 1;
        }
        return op;
    }

    /// <summary>The block cannot be translated.</summary>
    public static Op* Pass(VcpuBlock* s, Op* op) => op + 1;

    /// <summary>Enters the translation. <see cref="Op.Disp"/> is where in its page the block starts.</summary>
    public static Op* Run(VcpuBlock* s, Op* op)
    {
        if (s->Pending != 0)
        {
            s->Rip = s->BlockRip;
            return null;
        }
        Block* block = (Block*)op - 1;
        byte* code = block->Code;
        // Another vCPU may just have taken the translation away.
        if (code == null)
            return op + 1;
        SoftVcpu vcpu = SoftVcpu.From(s);
        JumpEntry* entry = s->JumpCache + Mmu.JumpIndex(s->BlockRip);
        if (entry->Rip == s->BlockRip && entry->Key == s->JumpKey && vcpu.Code.Translator!.LockStep is null)
            entry->Code = code;
        s->CodeBase = s->BlockRip - (ulong)op->Disp;
        Op* next = vcpu.Code.Translator!.Enter(s, block->LinkEntry);
        DeferredFlags.ToLazy(s);
        if (vcpu.TranslationFailure != null)
            Throw(vcpu);
        return next;
    }

    private static void Throw(SoftVcpu vcpu)
    {
        Exception failure = vcpu.TranslationFailure!;
        vcpu.TranslationFailure = null;
        System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(failure);
    }
}
