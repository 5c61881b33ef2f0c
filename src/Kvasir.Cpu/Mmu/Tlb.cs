using System;
using Kvasir.Linux;

namespace Kvasir.Cpu;

/// <summary>Whose rights an access has: an index of a TLB's tables.</summary>
public enum AccessRights
{
    /// <summary>CPL 3.</summary>
    User = 0,

    /// <summary>CPL 0-2 with SMAP in force, and implicit accesses to system tables from any CPL.</summary>
    Supervisor = 1,

    /// <summary>CPL 0-2 with EFLAGS.AC set or without CR4.SMAP: user pages may be touched.</summary>
    SupervisorAc = 2,
}

/// <summary>
/// The translations of one address space (one PCID): direct-mapped tables for reads, writes and fetches at each kind of rights. A flush undoes the
/// fills since the last one, which costs no more than they did; global and other entries are logged apart.
/// </summary>
public sealed unsafe class Tlb : IDisposable
{
    public const int Entries = 4096;
    public const ulong IndexMask = Entries - 1;
    private const int Tables = 9;
    internal const int LogCapacity = 16384;

    /// <summary>Bits of a log's word below the table's number: the index.</summary>
    internal const int LogTableShift = 16;

    // State
    private readonly byte* _memory;
    private readonly TlbEntry* _entries;

    // Fills since the last flush: a count, a word of nothing, then an index and a table's number each.
    private readonly int* _log;
    private readonly int* _globalLog;
    private const ulong EntryBytes = (ulong)Entries * Tables * 16;
    private const ulong LogBytes = 2 * (8 + (LogCapacity * 4));
    private const ulong JumpBytes = (Mmu.JumpMask + 1) * 32;
    internal const int UnitBits = 16;
    internal const ulong UnitHash = 0x9e3779b97f4a7c15;
    internal const uint HugeUnitSalt = 0x5555_5555;
    private const ulong UnitBytes = (1 << UnitBits) / 8;
    private const int MostUnits = 1 << (UnitBits - 3);
    private const ulong TotalBytes = EntryBytes + LogBytes + JumpBytes + UnitBytes;

    public Tlb()
    {
        _memory = MemoryMap.MapAnonymousMemory(TotalBytes, Protection.Read | Protection.Write);
        _entries = (TlbEntry*)_memory;
        _log = (int*)(_memory + EntryBytes);
        _globalLog = _log + LogCapacity + 2;
        Jumps = (JumpEntry*)(_memory + EntryBytes + LogBytes);
        _largeUnits = (ulong*)(_memory + EntryBytes + LogBytes + JumpBytes);
        for (int table = 0; table < Tables; table++)
            _entries[table * Entries].Tag = TlbEntry.InvalidTag(0);
    }

    /// <summary>Jump cache of the address space's user code.</summary>
    public JumpEntry* Jumps { get; }

    /// <summary>Which address space it holds: CR3's base, PCID and what else the owner puts in.</summary>
    public ulong Owner { get; set; }

    /// <summary>Unique for each content: part of the jump cache's key.</summary>
    public ulong Generation
    {
        get;
        set
        {
            field = value;
            FetchReplaced = false;
        }
    }

    /// <summary>When it was last switched to, for replacement.</summary>
    public ulong LastUse { get; set; }

    /// <summary>A fetch translation was replaced by another page's since <see cref="Generation"/> was set: remembered blocks may outlive their entry.</summary>
    public bool FetchReplaced { get; private set; }

    // Linear 4 MiB units, and 1 GiB units, that hold entries made from large pages: bits by hash, few enough for a hit to mean something.
    private readonly ulong* _largeUnits;
    private int _largeCount;

    /// <summary>A translation of an address in the lower half is global: other address spaces' flushes of a page concern it.</summary>
    public bool HasLowGlobals { get; private set; }

    public TlbEntry* Read(AccessRights rights) => _entries + (int)rights * Entries;

    public TlbEntry* Write(AccessRights rights) => _entries + (3 + (int)rights) * Entries;

    public TlbEntry* Fetch(AccessRights rights) => _entries + (6 + (int)rights) * Entries;

    /// <summary>Adds a translation to one table.</summary>
    /// <param name="span">Log2 of the bytes that the guest's page has.</param>
    public void Fill(TlbEntry* table, ulong linear, byte* host, bool global, int span)
    {
        uint index = (uint)(linear >> 12 & IndexMask);
        ulong page = linear & ~0xffful;
        if (span > 12)
            NoteLarge(span > 22 ? HugeUnit(linear) : LargeUnit(linear));
        byte number = (byte)((table - _entries) / Entries);
        if (global)
        {
            if (*_globalLog == LogCapacity)
                FlushAll();
            HasLowGlobals |= (long)linear >= 0;
            Append(_globalLog, index, number);
        }
        else
        {
            if (*_log == LogCapacity)
                Flush();
            Append(_log, index, number);
        }
        ulong old = table[index].Tag;
        if (number >= 6 && old != page && old != TlbEntry.InvalidTag(index))
            FetchReplaced = true;
        table[index].Host = host;
        table[index].Tag = page;
    }

    /// <summary>Drops all but global entries. (A global entry that replaced another, or was replaced, may go too.)</summary>
    public void Flush()
    {
        Undo(_log);
    }

    /// <summary>Drops everything.</summary>
    public void FlushAll()
    {
        Flush();
        Undo(_globalLog);
        HasLowGlobals = false;
        if (_largeCount == 0)
            return;
        new Span<byte>(_largeUnits, (int)UnitBytes).Clear();
        _largeCount = 0;
    }

    /// <summary>Drops every entry that allows writing.</summary>
    public void FlushWrites()
    {
        ClearWrites(_log);
        ClearWrites(_globalLog);
    }

    /// <summary>Drops the entries of one page at every kind of rights, and all of its 4 MiB unit, or everything, where a large page may have covered it.</summary>
    /// <returns>Whether code may have been fetched through one of them: remembered blocks must be forgotten then.</returns>
    public bool FlushPage(ulong linear)
    {
        if (MayBeLarge(HugeUnit(linear)))
        {
            FlushAll();
            return true;
        }
        bool fetched = FetchReplaced;
        if (MayBeLarge(LargeUnit(linear)))
        {
            // 2 MiB and 4 MiB pages alike: a unit of 4 MiB holds them whole.
            uint first = (uint)(linear >> 12 & IndexMask & ~1023ul);
            ulong unit = linear >> 22;
            for (int table = 0; table < Tables; table++)
            {
                TlbEntry* entry = _entries + table * Entries + first;
                for (uint i = 0; i < 1024; i++, entry++)
                {
                    if (entry->Tag >> 22 != unit || entry->Tag == TlbEntry.InvalidTag(first + i))
                        continue;
                    entry->Tag = TlbEntry.InvalidTag(first + i);
                    fetched |= table >= 6;
                }
            }
        }
        uint index = (uint)(linear >> 12 & IndexMask);
        ulong page = linear & ~0xffful;
        for (int table = 0; table < Tables; table++)
        {
            TlbEntry* entry = _entries + table * Entries + index;
            if (entry->Tag != page)
                continue;
            entry->Tag = TlbEntry.InvalidTag(index);
            fetched |= table >= 6;
        }
        return fetched;
    }

    // For the page walks of translated code.
    internal int* Log => _log;

    internal int* GlobalLog => _globalLog;

    internal byte* LargeUnits => (byte*)_largeUnits;

    /// <summary>Forgets every remembered block.</summary>
    public void FlushJumps() => new Span<byte>(Jumps, (int)JumpBytes).Clear();

    public void Dispose() => MemoryMap.Unmap(_memory, TotalBytes);

    private static uint LargeUnit(ulong linear) => (uint)((linear >> 22) * UnitHash >> (64 - UnitBits));

    private static uint HugeUnit(ulong linear) => (uint)(((linear >> 30) ^ HugeUnitSalt) * UnitHash >> (64 - UnitBits));

    private bool MayBeLarge(uint unit) => _largeCount != 0 && (_largeUnits[unit >> 6] >> (int)(unit & 63) & 1) != 0;

    private void NoteLarge(uint unit)
    {
        if ((_largeUnits[unit >> 6] >> (int)(unit & 63) & 1) != 0)
            return;
        // Units whose entries are gone keep their bits: with too many, everything starts anew.
        if (_largeCount == MostUnits)
            FlushAll();
        _largeUnits[unit >> 6] |= 1ul << (int)(unit & 63);
        _largeCount++;
    }

    private static void Append(int* log, uint index, int table) => log[2 + (*log)++] = (int)index | table << LogTableShift;

    private TlbEntry* EntryOf(int word, out uint index)
    {
        index = (uint)word & (uint)IndexMask;
        return _entries + (word >> LogTableShift) * Entries + index;
    }

    private void Undo(int* log)
    {
        for (int i = 0; i < *log; i++)
            EntryOf(log[2 + i], out uint index)->Tag = TlbEntry.InvalidTag(index);
        *log = 0;
    }

    private void ClearWrites(int* log)
    {
        for (int i = 0; i < *log; i++)
        {
            if (log[2 + i] >> LogTableShift is >= 3 and < 6)
                EntryOf(log[2 + i], out uint index)->Tag = TlbEntry.InvalidTag(index);
        }
    }
}
