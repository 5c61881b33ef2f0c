using System;
using System.Collections.Generic;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;

namespace Kvasir.Cpu;

/// <summary>
/// Decoded blocks of all vCPUs, found by physical place and mode. Look-ups take no lock. A block whose bytes change is not taken out of memory:
/// its operations are overwritten so that whoever executes it stops at the next one and looks up anew; memory is reclaimed when the whole cache is emptied.
/// </summary>
public sealed unsafe class CodeCache : ICodeObserver, IDisposable
{
    private const int Buckets = 1 << 16;
    private const byte ManyOwners = 0xff;

    // Configuration
    private readonly ulong _capacity;
    private readonly GuestMemory _memory;

    // State
    private readonly Lock _lock = new();
    private readonly byte* _arena;
    private readonly Block** _buckets;

    /// <summary>For each page of the memory file who may hold a write translation of it: 0 nobody, n vCPU n-1, 255 several.</summary>
    private readonly byte* _writers;
    private readonly Dictionary<ulong, nint> _pages = [];
    private ulong _used;

    /// <param name="memory">Guest memory.</param>
    /// <param name="barrier">Of the vCPUs that share the cache.</param>
    /// <param name="capacity">Bytes of decoded code at most.</param>
    /// <param name="translations">Bytes of translated code at most; 0: interpret only.</param>
    /// <param name="threshold">How often a block is entered before it is translated.</param>
    /// <param name="lockStep">Compare translated blocks with the interpreter: for one vCPU.</param>
    public CodeCache(GuestMemory memory, ExecutionBarrier barrier, ulong capacity = 256ul << 20, ulong translations = 0, int threshold = 40, bool lockStep = false)
    {
        _memory = memory;
        _capacity = capacity;
        Barrier = barrier;
        _arena = MemoryMap.MapAnonymousMemory(capacity, Protection.Read | Protection.Write);
        _buckets = (Block**)MemoryMap.MapAnonymousMemory(Buckets * 8, Protection.Read | Protection.Write);
        _writers = MemoryMap.MapAnonymousMemory(memory.FileSize / GuestMemory.PageSize, Protection.Read | Protection.Write);
        memory.CodeObserver = this;
        if (translations != 0)
            Translator = new Translator(this, translations) { Threshold = threshold, LockStep = lockStep ? new LockStep() : null };
    }

    /// <summary>Translates blocks that are warm; null: all is interpreted.</summary>
    public Translator? Translator { get; }

    /// <summary>Number of a vCPU in <see cref="Writers"/>.</summary>
    internal static byte WriterNumber(int vcpu) => (byte)Math.Min(vcpu + 1, ManyOwners);

    /// <summary>For each page of the memory file who may hold a write translation of it: 0 nobody, n vCPU n-1, 255 several.</summary>
    internal byte* Writers => _writers;

    /// <summary>The memory that operations lie in.</summary>
    internal byte* Operations => _arena;

    public ExecutionBarrier Barrier { get; }

    /// <summary>Held while blocks are made, found missing or invalidated.</summary>
    public Lock Gate => _lock;

    /// <summary>Counts the times the cache was emptied; links between blocks of different epochs must not be made.</summary>
    public int Epoch { get; private set; }

    public ulong BytesUsed => _used;

    public ulong BlocksMade { get; private set; }

    public ulong BlocksInvalidated { get; private set; }

    /// <summary>Whether the next block may not fit: the caller empties the cache first, between instructions.</summary>
    public bool IsFull => _used + 65536 > _capacity || Translator is { IsFull: true };

    /// <summary>The block for a key, or null.</summary>
    public Block* Find(ulong key)
    {
        for (Block* block = _buckets[Hash(key)]; block != null; block = block->Next)
        {
            if (block->Key == key && !block->Invalid)
                return block;
        }
        return null;
    }

    /// <summary>
    /// Makes sure that a page's writers are noticed: marks it, and drops the write translations of every vCPU that may have one. Not under <see cref="Gate"/>.
    /// </summary>
    /// <param name="page">Number of the page in the memory file.</param>
    /// <param name="caller">The vCPU that asks, from the middle of a look-up.</param>
    public void MarkCode(ulong page, SoftVcpu caller)
    {
        if ((_memory.Flags[page] & (byte)PageFlags.Code) != 0)
            return;
        _memory.SetFlag(page, PageFlags.Code);
        // SetFlag is a full barrier: a writer that does not see the mark is seen here.
        byte writer = Volatile.Read(ref _writers[page]);
        if (writer == 0)
            return;
        if (writer == caller.Index + 1 && caller.Index < ManyOwners - 1)
        {
            _writers[page] = 0;
            caller.Mmu.FlushWrites();
            return;
        }
        Barrier.BeginExclusive(caller);
        _writers[page] = 0;
        foreach (SoftVcpu vcpu in Barrier.Vcpus)
            vcpu.Mmu.FlushWrites();
        Barrier.EndExclusive(caller);
    }

    /// <summary>Whether a vCPU may keep a write translation of a page; if so it is remembered as one of its writers.</summary>
    public bool TryAllowWrites(ulong page, int vcpu)
    {
        if ((_memory.Flags[page] & (byte)PageFlags.Code) != 0)
            return false;
        byte me = WriterNumber(vcpu);
        byte writer = Volatile.Read(ref _writers[page]);
        if (writer != me && writer != ManyOwners)
            Volatile.Write(ref _writers[page], writer == 0 ? me : ManyOwners);
        Interlocked.MemoryBarrier();
        // Two vCPUs that become writers of a page at the same moment must not both believe to be alone.
        if (_writers[page] != me)
            _writers[page] = ManyOwners;
        return (_memory.Flags[page] & (byte)PageFlags.Code) == 0;
    }

    /// <summary>Memory for a block and its operations; under <see cref="Gate"/>, after <see cref="IsFull"/> was false.</summary>
    public Block* Allocate(int operations)
    {
        ulong bytes = ((ulong)sizeof(Block) + (ulong)operations * (ulong)sizeof(Op) + 15) & ~15ul;
        if (_used + bytes > _capacity)
            throw new InvalidOperationException("the code cache is full: the caller did not look");
        Block* block = (Block*)(_arena + _used);
        _used += bytes;
        *block = default;
        block->First = (Op*)(block + 1);
        block->Operations = operations;
        block->SecondPage = Block.NoPage;
        return block;
    }

    /// <summary>Publishes a block; under <see cref="Gate"/>.</summary>
    public void Insert(Block* block)
    {
        BlocksMade++;
        ulong page = block->Key >> 8 >> 12;
        block->NextOnPage = (Block*)_pages.GetValueOrDefault(page);
        _pages[page] = (nint)block;
        if (block->SecondPage != Block.NoPage)
        {
            ulong second = block->SecondPage >> 12;
            block->NextOnSecondPage = (Block*)_pages.GetValueOrDefault(second);
            _pages[second] = (nint)block;
        }
        ref Block* bucket = ref _buckets[Hash(block->Key)];
        block->Next = bucket;
        Interlocked.MemoryBarrier();
        bucket = block;
    }

    /// <summary>Bytes of the memory file changed: the blocks made from them end at their next operation.</summary>
    public void CodeWritten(ulong offset, int length)
    {
        ulong end = offset + (ulong)length;
        lock (_lock)
        {
            for (ulong page = offset >> 12; page <= (end - 1) >> 12; page++)
            {
                bool kept = false;
                Block* previous = null;
                Block* block = (Block*)_pages.GetValueOrDefault(page);
                while (block != null)
                {
                    Block* next = NextOn(block, page);
                    if (!block->Invalid && Overlaps(block, offset, end))
                        Invalidate(block);
                    if (block->Invalid)
                    {
                        Unlink(page, previous, next);
                    }
                    else
                    {
                        kept = true;
                        previous = block;
                    }
                    block = next;
                }
                if (!kept)
                {
                    _pages.Remove(page);
                    _memory.ClearFlag(page, PageFlags.Code);
                }
            }
        }
    }

    /// <summary>Empties the cache. The caller holds the barrier between instructions and makes every vCPU forget its jump cache.</summary>
    public void Empty()
    {
        lock (_lock)
        {
            foreach (ulong page in _pages.Keys)
                _memory.ClearFlag(page, PageFlags.Code);
            _pages.Clear();
            new Span<byte>(_buckets, Buckets * 8).Clear();
            _used = 0;
            Translator?.Reset();
            Epoch++;
        }
    }

    public void Dispose()
    {
        if (_memory.CodeObserver == this)
            _memory.CodeObserver = null;
        Translator?.Dispose();
        MemoryMap.Unmap(_arena, _capacity);
        MemoryMap.Unmap((byte*)_buckets, Buckets * 8);
        MemoryMap.Unmap(_writers, _memory.FileSize / GuestMemory.PageSize);
    }

    private static uint Hash(ulong key) => (uint)(key * 0x9e3779b97f4a7c15 >> 48);

    private static Block* NextOn(Block* block, ulong page) => block->Key >> 20 == page ? block->NextOnPage : block->NextOnSecondPage;

    private static bool Overlaps(Block* block, ulong offset, ulong end)
    {
        ulong start = block->Key >> 8;
        if (block->SecondPage == Block.NoPage)
            return start < end && offset < start + (ulong)block->Bytes;
        ulong inFirst = 4096 - (start & 0xfff);
        ulong inSecond = (ulong)block->Bytes - inFirst;
        return (start < end && offset < start + inFirst) || (block->SecondPage < end && offset < block->SecondPage + inSecond);
    }

    private void Unlink(ulong page, Block* previous, Block* next)
    {
        if (previous == null)
            _pages[page] = (nint)next;
        else if (previous->Key >> 20 == page)
            previous->NextOnPage = next;
        else
            previous->NextOnSecondPage = next;
    }

    private void Invalidate(Block* block)
    {
        BlocksInvalidated++;
        block->Invalid = true;
        Translator?.Invalidate(block);
        for (int i = 0; i < block->Operations; i++)
        {
            block->First[i].Handler = &Branches.Stale;
            block->First[i].Flags |= OpFlags.Stale;
        }
        // Out of its bucket: invalid blocks must not make chains long.
        Block** link = &_buckets[Hash(block->Key)];
        while (*link != null && *link != block)
            link = &(*link)->Next;
        if (*link == block)
            *link = block->Next;
    }
}
