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
    private const int LogCapacity = 16384;

    // State
    private readonly byte* _memory;
    private readonly TlbEntry* _entries;
    private readonly ushort* _log;
    private readonly byte* _logTable;
    private int _count;
    private readonly ushort* _globalLog;
    private readonly byte* _globalLogTable;
    private int _globalCount;
    private const ulong EntryBytes = (ulong)Entries * Tables * 16;
    private const ulong TotalBytes = EntryBytes + (LogCapacity * 6);

    public Tlb()
    {
        _memory = MemoryMap.MapAnonymousMemory(TotalBytes, Protection.Read | Protection.Write);
        _entries = (TlbEntry*)_memory;
        _log = (ushort*)(_memory + EntryBytes);
        _globalLog = _log + LogCapacity;
        _logTable = (byte*)(_globalLog + LogCapacity);
        _globalLogTable = _logTable + LogCapacity;
        for (int table = 0; table < Tables; table++)
            _entries[table * Entries].Tag = TlbEntry.InvalidTag(0);
    }

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

    // Linear 4 MiB units, and 1 GiB units, hashed to 64 bits, that hold entries made from large pages.
    private ulong _largeFilter;
    private ulong _hugeFilter;

    public TlbEntry* Read(AccessRights rights) => _entries + (int)rights * Entries;

    public TlbEntry* Write(AccessRights rights) => _entries + (3 + (int)rights) * Entries;

    public TlbEntry* Fetch(AccessRights rights) => _entries + (6 + (int)rights) * Entries;

    /// <summary>Adds a translation to one table.</summary>
    /// <param name="span">Log2 of the bytes that the guest's page has.</param>
    public void Fill(TlbEntry* table, ulong linear, byte* host, bool global, int span)
    {
        uint index = (uint)(linear >> 12 & IndexMask);
        ulong page = linear & ~0xffful;
        if (span > 22)
            _hugeFilter |= FilterBit(linear >> 30);
        else if (span > 12)
            _largeFilter |= FilterBit(linear >> 22);
        byte number = (byte)((table - _entries) / Entries);
        if (global)
        {
            if (_globalCount == LogCapacity)
                FlushAll();
            _globalLog[_globalCount] = (ushort)index;
            _globalLogTable[_globalCount++] = number;
        }
        else
        {
            if (_count == LogCapacity)
                Flush();
            _log[_count] = (ushort)index;
            _logTable[_count++] = number;
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
        Undo(_log, _logTable, _count);
        _count = 0;
    }

    /// <summary>Drops everything.</summary>
    public void FlushAll()
    {
        Flush();
        Undo(_globalLog, _globalLogTable, _globalCount);
        _globalCount = 0;
        _largeFilter = 0;
        _hugeFilter = 0;
    }

    /// <summary>Drops every entry that allows writing.</summary>
    public void FlushWrites()
    {
        for (int i = 0; i < _count; i++)
            ClearIfWrite(_log[i], _logTable[i]);
        for (int i = 0; i < _globalCount; i++)
            ClearIfWrite(_globalLog[i], _globalLogTable[i]);
    }

    /// <summary>Drops the entries of one page at every kind of rights, and all of its 4 MiB unit, or everything, where a large page may have covered it.</summary>
    /// <returns>Whether code may have been fetched through one of them: remembered blocks must be forgotten then.</returns>
    public bool FlushPage(ulong linear)
    {
        if ((_hugeFilter & FilterBit(linear >> 30)) != 0)
        {
            FlushAll();
            return true;
        }
        bool fetched = FetchReplaced;
        if ((_largeFilter & FilterBit(linear >> 22)) != 0)
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

    public void Dispose() => MemoryMap.Unmap(_memory, TotalBytes);

    private static ulong FilterBit(ulong unit) => 1ul << (int)(unit * 0x9e3779b97f4a7c15 >> 58);

    private void Undo(ushort* log, byte* tables, int count)
    {
        for (int i = 0; i < count; i++)
            _entries[tables[i] * Entries + log[i]].Tag = TlbEntry.InvalidTag(log[i]);
    }

    private void ClearIfWrite(ushort index, byte table)
    {
        if (table is >= 3 and < 6)
            _entries[table * Entries + index].Tag = TlbEntry.InvalidTag(index);
    }
}
