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
    public ulong Generation { get; set; }

    /// <summary>When it was last switched to, for replacement.</summary>
    public ulong LastUse { get; set; }

    /// <summary>Linear 2 MiB units (hashed to 64 bits) that hold entries made from large pages.</summary>
    public ulong LargeFilter { get; private set; }

    public TlbEntry* Read(AccessRights rights) => _entries + (int)rights * Entries;

    public TlbEntry* Write(AccessRights rights) => _entries + (3 + (int)rights) * Entries;

    public TlbEntry* Fetch(AccessRights rights) => _entries + (6 + (int)rights) * Entries;

    /// <summary>Adds a translation to one table.</summary>
    public void Fill(TlbEntry* table, ulong linear, byte* host, bool global, bool large)
    {
        uint index = (uint)(linear >> 12 & IndexMask);
        ulong page = linear & ~0xffful;
        if (large)
            LargeFilter |= FilterBit(linear);
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
        table[index].Addend = (nint)((ulong)host - page);
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
        LargeFilter = 0;
    }

    /// <summary>Drops every entry that allows writing.</summary>
    public void FlushWrites()
    {
        for (int i = 0; i < _count; i++)
            ClearIfWrite(_log[i], _logTable[i]);
        for (int i = 0; i < _globalCount; i++)
            ClearIfWrite(_globalLog[i], _globalLogTable[i]);
    }

    /// <summary>Drops the entries of one page at every kind of rights; all of its 2 MiB unit, or all, where a large page may have covered it.</summary>
    public void FlushPage(ulong linear)
    {
        if ((LargeFilter & FilterBit(linear)) != 0)
        {
            uint first = (uint)(linear >> 12 & IndexMask & ~511ul);
            ulong unit = linear >> 21;
            for (int table = 0; table < Tables; table++)
            {
                TlbEntry* entry = _entries + table * Entries + first;
                for (uint i = 0; i < 512; i++, entry++)
                {
                    if (entry->Tag >> 21 == unit)
                        entry->Tag = TlbEntry.InvalidTag(first + i);
                }
            }
        }
        uint index = (uint)(linear >> 12 & IndexMask);
        ulong page = linear & ~0xffful;
        for (int table = 0; table < Tables; table++)
        {
            TlbEntry* entry = _entries + table * Entries + index;
            if (entry->Tag == page)
                entry->Tag = TlbEntry.InvalidTag(index);
        }
    }

    public void Dispose() => MemoryMap.Unmap(_memory, TotalBytes);

    private static ulong FilterBit(ulong linear) => 1ul << (int)((linear >> 21) * 0x9e3779b97f4a7c15 >> 58);

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
