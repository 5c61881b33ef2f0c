using System;
using System.Threading;
using Kvasir.Core;
using Kvasir.Linux;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// A vCPU's memory management: which software TLB is current, what a miss does, and every access that is not plain RAM (MMIO, ROM, page
/// crossings, pages that hold decoded code, alignment checks, watchpoints).
/// </summary>
public sealed unsafe class Mmu : IDisposable
{
    /// <summary>Address spaces whose translations are kept at once (PCIDs).</summary>
    private const int AddressSpaces = 8;
    private const ulong JumpEntries = 16384;
    private const ulong JumpBytes = JumpEntries * 32;

    /// <summary>Bits 0-11 of a jump key are the mode and the rights, 12-31 the generation, 32-63 the base of CS outside 64-bit mode.</summary>
    private const int GenerationShift = 12;
    private const int CodeBaseShift = 32;
    private static readonly ulong s_noStack = 0x5a5a_0000_0000_0000 | (ulong)System.Security.Cryptography.RandomNumberGenerator.GetInt32(int.MaxValue) << 12;
    private const ulong LastGeneration = (1ul << (CodeBaseShift - GenerationShift)) - 1;

    // Wiring
    private readonly VcpuBlock* _s;
    private readonly SoftVcpu _vcpu;
    private readonly GuestMemory _memory;
    private readonly MmioBus _mmio;
    private readonly CodeCache _code;
    private readonly PageWalker _walker;

    // State
    private readonly Tlb?[] _spaces = new Tlb?[AddressSpaces];
    private readonly TlbEntry* _missTable;
    private readonly byte* _nowhere;

    /// <summary>Jump cache of supervisor code, which is the same in all address spaces as long as its pages are global.</summary>
    private readonly JumpEntry* _supervisorJumps;
    private ulong _supervisorGeneration = 1;

    /// <summary>Supervisor code was fetched from pages that are not global since the last <see cref="FlushAll"/>.</summary>
    private bool _supervisorLocal;
    private Tlb _current;
    private AccessRights _rights;
    private bool _slowAccess;
    private ulong _generation = 1;
    private ulong _uses;
    private ulong _walks;
    private int _layout = -1;

    internal Mmu(SoftVcpu vcpu, VcpuBlock* block, GuestMemory memory, MmioBus mmio, CodeCache code)
    {
        _vcpu = vcpu;
        _s = block;
        _memory = memory;
        _mmio = mmio;
        _code = code;
        _walker = new PageWalker(block, memory);
        _current = new Tlb { Generation = _generation };
        _spaces[0] = _current;
        _missTable = (TlbEntry*)MemoryMap.MapAnonymousMemory(Tlb.Entries * 16, Protection.Read | Protection.Write);
        _missTable[0].Tag = TlbEntry.InvalidTag(0);
        _nowhere = MemoryMap.MapAnonymousMemory(2 * GuestMemory.PageSize, Protection.Read | Protection.Write);
        _supervisorJumps = (JumpEntry*)MemoryMap.MapAnonymousMemory(JumpBytes, Protection.Read | Protection.Write);
        _s->JumpCache = _supervisorJumps;
        PrepareWalk();
    }

    /// <summary>Page walks since the vCPU was made.</summary>
    public ulong Walks => _walks + _s->Walk.Count;

    /// <summary>Which bits of the folded RIP index the jump cache.</summary>
    internal const int JumpMask = (int)JumpEntries - 1;

    /// <summary>Index into the jump cache for a RIP.</summary>
    public static uint JumpIndex(ulong rip) => (uint)(rip ^ rip >> 12) & (uint)(JumpEntries - 1);

    // What handlers call when the fast path fails.

    public static byte* ReadSlow(VcpuBlock* s, ulong linear, int size)
    {
        Mmu mmu = SoftVcpu.From(s).Mmu;
        if (!mmu.Check(linear, size, AccessKind.Read))
            return null;
        if (mmu._code.Translator?.LockStep is { IsRecording: true } check && mmu.ReachesDevice(linear, size))
            return check.Refuse(s);
        return mmu.ReadAs(mmu._rights, linear, size);
    }

    public static byte* ModifySlow(VcpuBlock* s, ulong linear, int size, bool locked)
    {
        Mmu mmu = SoftVcpu.From(s).Mmu;
        if (!mmu.Check(linear, size, AccessKind.Write))
            return null;
        return mmu.Modify(linear, size, locked, load: true);
    }

    public static byte* OverwriteSlow(VcpuBlock* s, ulong linear, int size)
    {
        Mmu mmu = SoftVcpu.From(s).Mmu;
        if (!mmu.Check(linear, size, AccessKind.Write))
            return null;
        return mmu.Modify(linear, size, locked: false, load: false);
    }

    public static void CommitStore(VcpuBlock* s) => SoftVcpu.From(s).Mmu.Commit();

    private byte* Modify(ulong linear, int size, bool locked, bool load)
    {
        if (_code.Translator?.LockStep is not { IsRecording: true } check)
            return ModifyAs(_rights, linear, size, locked, load);
        return ReachesDevice(linear, size) ? check.Refuse(_s) : check.Note(_vcpu, _s, ModifyAs(_rights, linear, size, locked, load), size);
    }

    /// <summary>Whether an access would reach something else than memory. One that would fault does not.</summary>
    private bool ReachesDevice(ulong linear, int size)
    {
        ulong last = linear + (ulong)size - 1;
        return IsDevice(linear) || ((linear ^ last) >> 12 != 0 && IsDevice(last));

        bool IsDevice(ulong address) =>
            _walker.TryWalk(address, AccessKind.Read, _rights, out Translation translation, out _) && !_memory.TryFindRegion(translation.Physical, out _);
    }

    /// <summary>Sends every store to <see cref="OverwriteSlow"/> and <see cref="ModifySlow"/> until <see cref="UpdateRights"/>.</summary>
    internal void WriteSlowly() => _s->WriteTlb = _missTable;

    // Accesses by system instructions, with rights of their own.

    /// <summary>Reads 1, 2, 4 or 8 bytes with supervisor rights whatever the CPL: descriptor tables, task state segments.</summary>
    public bool TryReadSystem(ulong linear, int size, out ulong value) => TryReadAs(AccessRights.Supervisor, linear, size, out value);

    /// <summary>Writes 1, 2, 4 or 8 bytes with supervisor rights whatever the CPL.</summary>
    public bool TryWriteSystem(ulong linear, int size, ulong value) => TryWriteAs(AccessRights.Supervisor, linear, size, value);

    /// <summary>Reads 1, 2, 4 or 8 bytes with the given rights. False: a fault was recorded (#PF, or #GP for a non-canonical address).</summary>
    public bool TryReadAs(AccessRights rights, ulong linear, int size, out ulong value)
    {
        value = 0;
        if (!CheckCanonical(linear, size))
            return false;
        byte* p = ReadAs(rights, linear, size);
        if (p == null)
            return false;
        value = Load(p, size);
        return true;
    }

    /// <summary>Writes 1, 2, 4 or 8 bytes with the given rights. False: a fault was recorded and nothing was written.</summary>
    public bool TryWriteAs(AccessRights rights, ulong linear, int size, ulong value)
    {
        if (!CheckCanonical(linear, size))
            return false;
        byte* p = ModifyAs(rights, linear, size, locked: false, load: false);
        if (p == null)
            return false;
        Save(p, size, value);
        if (_s->StorePending)
            Commit();
        return true;
    }

    /// <summary>Whether a write of <paramref name="size"/> bytes (at most 4096) would fault; marks the pages as a write would, writes nothing.</summary>
    public bool TryProbeWrite(AccessRights rights, ulong linear, int size)
    {
        if (!CheckCanonical(linear, size))
            return false;
        return TryTranslate(rights, linear, AccessKind.Write, out _)
            && (((linear ^ (linear + (ulong)size - 1)) & ~0xffful) == 0 || TryTranslate(rights, NextPage(linear), AccessKind.Write, out _));
    }

    /// <summary>Translates without side effects on the fault state other than recording a fault.</summary>
    public bool TryTranslate(AccessRights rights, ulong linear, AccessKind kind, out Translation translation)
    {
        _walks++;
        if (_walker.TryWalk(linear, kind, rights, out translation, out PageFaultCode error))
            return true;
        return RecordPageFault(linear, error);
    }

    /// <summary>The rights of the current CPL, SMAP and EFLAGS.AC considered.</summary>
    public AccessRights CurrentRights => _rights;

    // Instruction fetch.

    /// <summary>The host address of the code byte at a linear address, or null: a fault was recorded, or (<paramref name="device"/>) no memory is there.</summary>
    public byte* Fetch(ulong linear, out bool device)
    {
        device = false;
        AccessRights rights = _s->Cpl == 3 ? AccessRights.User : AccessRights.Supervisor;
        TlbEntry* table = _current.Fetch(rights);
        TlbEntry* entry = table + (linear >> 12 & Tlb.IndexMask);
        if ((linear ^ entry->Tag) <= 4095)
            return entry->Host + (linear & 0xfff);
        if (!CheckCanonical(linear, 1) || !TryTranslate(rights, linear, AccessKind.Fetch, out Translation translation))
            return null;
        if (!_memory.TryFindRegion(translation.Physical, out MemoryRegion region))
        {
            device = true;
            return null;
        }
        byte* host = _memory.Host + region.Offset + (translation.Physical - region.Start);
        _current.Fill(table, linear, (byte*)((ulong)host & ~0xffful), translation.Global, translation.Span);
        _supervisorLocal |= !translation.Global && rights != AccessRights.User;
        return host;
    }

    /// <summary>Reads one code byte from a device's memory.</summary>
    public byte FetchDeviceByte(ulong linear)
    {
        AccessRights rights = _s->Cpl == 3 ? AccessRights.User : AccessRights.Supervisor;
        return _walker.TryWalk(linear, AccessKind.Fetch, rights, out Translation t, out _) ? (byte)ReadPhysicalDevice(t.Physical, 1) : (byte)0xff;
    }

    // Address spaces and modes.

    /// <summary>After a change of CPL, EFLAGS.AC, CR0.AM, CR4.SMAP, DR7 or the code mode: selects the tables that now apply.</summary>
    public void UpdateRights()
    {
        bool ac = (_s->SystemFlags & (ulong)Rflags.AC) != 0;
        _rights = _s->Cpl == 3 ? AccessRights.User
            : (_s->Cr4 & (ulong)Cr4.SMAP) == 0 || ac ? AccessRights.SupervisorAc
            : AccessRights.Supervisor;
        bool alignment = _s->Cpl == 3 && ac && (_s->Cr0 & (ulong)Cr0.AM) != 0;
        _slowAccess = alignment || _vcpu.Debug.HasDataBreakpoints;
        if (_slowAccess)
        {
            _s->ReadTlb = _missTable;
            _s->WriteTlb = _missTable;
        }
        else
        {
            _s->ReadTlb = _current.Read(_rights);
            _s->WriteTlb = _current.Write(_rights);
        }
        DropStack();
        UpdateWalk();
        _s->FetchTlb = _current.Fetch(_s->Cpl == 3 ? AccessRights.User : AccessRights.Supervisor);
        ulong codeBase = (_s->Mode & CodeMode.SizeMask) == CodeMode.Code64 ? 0 : _s->SegBase[1];
        ulong generation;
        if (_s->Cpl == 3)
        {
            generation = _current.Generation;
            _s->JumpCache = _current.Jumps;
        }
        else
        {
            generation = _supervisorGeneration;
            _s->JumpCache = _supervisorJumps;
        }
        _s->JumpKey = codeBase << CodeBaseShift | generation << GenerationShift | (_s->Cpl == 3 ? 64u : 0u) | _s->Mode;
    }

    /// <summary>Forgets the stack's translations: see <see cref="StackCache"/>.</summary>
    private void DropStack()
    {
        // No address that a guest would come upon; one that were guessed leads to a page of nothing.
        _s->StackRead.Tag = _s->StackWrite.Tag = s_noStack;
        _s->StackRead.Host = _s->StackWrite.Host = _nowhere;
    }

    /// <summary>After CR3 was loaded: switches to the address space's TLB.</summary>
    /// <param name="keep">The load asked to keep the PCID's translations (bit 63 of the source, with CR4.PCIDE).</param>
    public void SwitchAddressSpace(bool keep)
    {
        if ((_s->Cr4 & (ulong)Cr4.PCIDE) == 0)
        {
            Renew(_current);
            RenewLocalSupervisor();
            _current.Flush();
            _current.Owner = _s->Cr3;
            UpdateRights();
            return;
        }
        // A PCID's translations belong to the PCID, whatever CR3's base is: bits 0-11 alone name it.
        ulong owner = (_s->Cr3 & 0xfff) | 1ul << 63;
        Tlb? found = null;
        int victim = 0;
        for (int i = 0; i < AddressSpaces; i++)
        {
            Tlb? space = _spaces[i];
            if (space is null)
            {
                victim = i;
                break;
            }
            if (space.Owner == owner)
            {
                found = space;
                break;
            }
            if (space.LastUse < _spaces[victim]!.LastUse)
                victim = i;
        }
        if (found is null)
        {
            found = _spaces[victim] ??= new Tlb();
            found.FlushAll();
            found.Owner = owner;
            Renew(found);
        }
        else if (!keep)
        {
            found.Flush();
            Renew(found);
        }
        if (found != _current || !keep)
            RenewLocalSupervisor();
        found.LastUse = ++_uses;
        _current = found;
        UpdateRights();
    }

    /// <summary>Drops the non-global translations of the current address space.</summary>
    public void FlushCurrent()
    {
        _current.Flush();
        Renew(_current);
        RenewLocalSupervisor();
        UpdateRights();
    }

    /// <summary>Drops every translation of every address space, global ones too (CR0, CR4, EFER, MTRR changes, memory layout).</summary>
    public void FlushAll()
    {
        foreach (Tlb? space in _spaces)
        {
            if (space is null)
                continue;
            space.FlushAll();
            Renew(space);
        }
        RenewSupervisor();
        _supervisorLocal = false;
        UpdateRights();
    }

    /// <summary>Drops the non-global translations of every address space (INVPCID type 3).</summary>
    public void FlushAllButGlobal()
    {
        foreach (Tlb? space in _spaces)
        {
            if (space is null)
                continue;
            space.Flush();
            Renew(space);
        }
        RenewLocalSupervisor();
        UpdateRights();
    }

    /// <summary>Drops one PCID's non-global translations (INVPCID type 1).</summary>
    public void FlushPcid(ulong pcid)
    {
        ulong owner = (pcid & 0xfff) | 1ul << 63;
        foreach (Tlb? space in _spaces)
        {
            if (space is null || space.Owner != owner)
                continue;
            space.Flush();
            Renew(space);
        }
        RenewLocalSupervisor();
        UpdateRights();
    }

    /// <summary>Drops a page's translations in every address space: INVLPG drops global ones everywhere and others in the current PCID; more is allowed.</summary>
    public void FlushPage(ulong linear)
    {
        foreach (Tlb? space in _spaces)
        {
            // Other address spaces lose global translations only.
            if (space is null || (space != _current && (long)linear >= 0 && !space.HasLowGlobals))
                continue;
            if (!space.FlushPage(linear))
                continue;
            Renew(space);
            RenewSupervisor();
        }
        UpdateRights();
    }

    /// <summary>Drops every translation that allows writing: a page became code. Called while this vCPU executes no guest code.</summary>
    public void FlushWrites()
    {
        _s->TlbChanged = true;
        DropStack();
        foreach (Tlb? space in _spaces)
            space?.FlushWrites();
    }

    /// <summary>Forgets every remembered block. Called while this vCPU executes no guest code.</summary>
    public void FlushJumpCache()
    {
        new Span<byte>(_supervisorJumps, (int)JumpBytes).Clear();
        foreach (Tlb? space in _spaces)
            space?.FlushJumps();
    }

    public void Dispose()
    {
        foreach (Tlb? space in _spaces)
            space?.Dispose();
        MemoryMap.Unmap((byte*)_missTable, Tlb.Entries * 16);
        MemoryMap.Unmap(_nowhere, 2 * GuestMemory.PageSize);
        MemoryMap.Unmap((byte*)_supervisorJumps, JumpBytes);
    }

    private void Renew(Tlb space) => space.Generation = NextGeneration();

    private void RenewSupervisor() => _supervisorGeneration = NextGeneration();

    private void RenewLocalSupervisor()
    {
        if (_supervisorLocal)
            RenewSupervisor();
    }

    private ulong NextGeneration()
    {
        if (_generation < LastGeneration)
            return ++_generation;
        // The numbers begin anew, with nothing remembered under any of them.
        FlushJumpCache();
        _generation = 1;
        foreach (Tlb? space in _spaces)
        {
            if (space is not null)
                space.Generation = ++_generation;
        }
        _supervisorGeneration = ++_generation;
        return ++_generation;
    }

    // Page walks by translated code.

    private void PrepareWalk()
    {
        ref WalkContext walk = ref _s->Walk;
        walk.UnitHash = Tlb.UnitHash;
        walk.Memory = _memory.Host;
        walk.PageFlags = _memory.Flags;
        walk.Writers = _code.Writers;
        walk.Writer = CodeCache.WriterNumber(_vcpu.Index);
        walk.AddressMask = PageWalker.AddressMask;
    }

    /// <summary>The largest runs of RAM below and above 4 GiB.</summary>
    private void UpdateRuns()
    {
        _layout = _memory.LayoutVersion;
        ref WalkContext walk = ref _s->Walk;
        walk.Size0 = walk.Size1 = 0;
        foreach (MemoryRegion region in _memory.Regions)
        {
            if (region.Kind != MemoryKind.Ram)
                continue;
            ulong host = (ulong)_memory.Host + region.Offset - region.Start;
            if (region.Start >> 32 == 0 && region.Length > walk.Size0)
                (walk.Start0, walk.Size0, walk.Host0) = (region.Start, region.Length, host);
            else if (region.Start >> 32 != 0 && region.Length > walk.Size1)
                (walk.Start1, walk.Size1, walk.Host1) = (region.Start, region.Length, host);
        }
    }

    private void UpdateWalk()
    {
        ref WalkContext walk = ref _s->Walk;
        walk.Root = 0;
        if (_code.Translator is null || _slowAccess || (_s->Efer & (ulong)Efer.LMA) == 0)
            return;
        if (_layout != _memory.LayoutVersion)
            UpdateRuns();
        ulong top = _s->Cr3 & PageWalker.AddressMask;
        ulong apic = _vcpu.Apic.Base & PageWalker.AddressMask;
        bool apicInRam = apic - walk.Start0 < walk.Size0 || apic - walk.Start1 < walk.Size1;
        if (top - walk.Start0 >= walk.Size0 || apicInRam)
            return;
        const ulong needed = (ulong)(PageEntry.Present | PageEntry.Accessed);
        bool user = _rights == AccessRights.User;
        walk.ReadNeeds = user ? needed | (ulong)PageEntry.User : needed;
        walk.WriteNeeds = walk.ReadNeeds | (ulong)PageEntry.Writable;
        walk.Forbidden = _rights == AccessRights.Supervisor ? (ulong)PageEntry.User : 0;
        walk.Reserved = PageWalker.ReservedAddressBits | ((_s->Efer & (ulong)Efer.NXE) != 0 ? 0 : (ulong)PageEntry.NoExecute);
        walk.GlobalMask = (_s->Cr4 & (ulong)Cr4.PGE) != 0 ? (ulong)PageEntry.Global : 0;
        walk.Log = _current.Log;
        walk.GlobalLog = _current.GlobalLog;
        walk.LargeUnits = _current.LargeUnits;
        walk.ReadTable = (uint)_rights << Tlb.LogTableShift;
        walk.WriteTable = (uint)(3 + (int)_rights) << Tlb.LogTableShift;
        walk.Root = top + walk.Host0;
    }

    // Checks before a slow access.

    private bool Check(ulong linear, int size, AccessKind kind)
    {
        if (_s->SegmentFault != 0)
        {
            ExceptionVector vector = (ExceptionVector)_s->SegmentFault;
            _s->SegmentFault = 0;
            return Access.Record(_s, vector, 0);
        }
        if (!CheckCanonical(linear, size))
            return false;
        if (!_slowAccess)
            return true;
        // Wider operands than 8 bytes have alignment rules of their own, which their handlers check.
        bool alignment = _s->Cpl == 3 && (_s->SystemFlags & (ulong)Rflags.AC) != 0 && (_s->Cr0 & (ulong)Cr0.AM) != 0;
        if (alignment && size <= 8 && (linear & (ulong)(size - 1)) != 0)
            return Access.Record(_s, ExceptionVector.AlignmentCheck, 0);
        _vcpu.Debug.CheckData(linear, size, kind == AccessKind.Write);
        return true;
    }

    private bool CheckCanonical(ulong linear, int size)
    {
        if ((_s->Efer & (ulong)Efer.LMA) == 0)
            return true;
        if (IsCanonical(linear) && IsCanonical(linear + (ulong)size - 1))
            return true;
        Access.Record(_s, ExceptionVector.GeneralProtection, 0);
        _s->FaultNonCanonical = true;
        return false;
    }

    /// <summary>Whether bits 63-47 are all the same.</summary>
    public static bool IsCanonical(ulong linear) => (ulong)((long)(linear << 16) >> 16) == linear;

    private bool RecordPageFault(ulong linear, PageFaultCode error)
    {
        _s->FaultAddress = linear;
        return Access.Record(_s, ExceptionVector.PageFault, (uint)error);
    }

    private ulong NextPage(ulong linear)
    {
        ulong next = (linear | 0xfff) + 1;
        return (_s->Efer & (ulong)Efer.LMA) != 0 ? next : (uint)next;
    }

    // Slow accesses.

    private byte* ReadAs(AccessRights rights, ulong linear, int size)
    {
        if ((linear & 0xfff) + (ulong)size > 4096)
            return ReadAcross(rights, linear, size);
        TlbEntry* table = _current.Read(rights);
        TlbEntry* entry = table + (linear >> 12 & Tlb.IndexMask);
        if ((linear ^ entry->Tag) <= (ulong)(4096 - size))
            return entry->Host + (linear & 0xfff);
        if (!TryTranslate(rights, linear, AccessKind.Read, out Translation translation))
            return null;
        if (!TryFindHost(translation.Physical, out byte* host, out _))
        {
            ReadDevice(translation.Physical, _s->Scratch, size);
            return _s->Scratch;
        }
        _current.Fill(table, linear, (byte*)((ulong)host & ~0xffful), translation.Global, translation.Span);
        return host;
    }

    private byte* ReadAcross(AccessRights rights, ulong linear, int size)
    {
        int first = (int)(4096 - (linear & 0xfff));
        if (!TryTranslate(rights, linear, AccessKind.Read, out Translation low))
            return null;
        if (!TryTranslate(rights, NextPage(linear), AccessKind.Read, out Translation high))
            return null;
        ReadPhysical(low.Physical, _s->Scratch, first);
        ReadPhysical(high.Physical, _s->Scratch + first, size - first);
        return _s->Scratch;
    }

    private byte* ModifyAs(AccessRights rights, ulong linear, int size, bool locked, bool load)
    {
        _s->StoreDirect = false;
        _s->StoreAddress = linear;
        _s->StoreSize = size;
        _storeRights = rights;
        if ((linear & 0xfff) + (ulong)size > 4096)
        {
            if (!TryTranslate(rights, linear, AccessKind.Write, out _storeLow) || !TryTranslate(rights, NextPage(linear), AccessKind.Write, out _storeHigh))
                return null;
            if (locked)
            {
                _vcpu.Barrier.BeginExclusive(_vcpu);
                _s->StoreExclusive = true;
            }
            int first = (int)(4096 - (linear & 0xfff));
            if (load)
            {
                ReadPhysical(_storeLow.Physical, _s->Scratch, first);
                ReadPhysical(_storeHigh.Physical, _s->Scratch + first, size - first);
            }
            _s->StorePending = true;
            return _s->Scratch;
        }
        TlbEntry* table = _current.Write(rights);
        TlbEntry* entry = table + (linear >> 12 & Tlb.IndexMask);
        if ((linear ^ entry->Tag) <= (ulong)(4096 - size))
            return entry->Host + (linear & 0xfff);
        if (!TryTranslate(rights, linear, AccessKind.Write, out _storeLow))
            return null;
        if (!TryFindHost(_storeLow.Physical, out byte* host, out MemoryKind kind) || kind == MemoryKind.Rom)
        {
            if (load)
                ReadPhysical(_storeLow.Physical, _s->Scratch, size);
            _s->StorePending = true;
            return _s->Scratch;
        }
        ulong page = (ulong)(host - _memory.Host) / GuestMemory.PageSize;
        if (!_code.TryAllowWrites(page, _vcpu.Index))
        {
            _s->StorePending = true;
            _s->StoreDirect = true;
            return host;
        }
        if ((_memory.Flags[page] & (byte)PageFlags.Dirty) == 0)
            _memory.SetFlag(page, PageFlags.Dirty);
        _current.Fill(table, linear, (byte*)((ulong)host & ~0xffful), _storeLow.Global, _storeLow.Span);
        return host;
    }

    private AccessRights _storeRights;
    private Translation _storeLow;
    private Translation _storeHigh;

    private void Commit()
    {
        _s->StorePending = false;
        int size = _s->StoreSize;
        int first = (int)Math.Min((ulong)size, 4096 - (_s->StoreAddress & 0xfff));
        if (_s->StoreDirect)
        {
            TryFindHost(_storeLow.Physical, out byte* host, out _);
            _memory.NoteWrite((ulong)(host - _memory.Host), size);
            return;
        }
        WritePhysical(_storeLow.Physical, _s->Scratch, first);
        if (first < size)
            WritePhysical(_storeHigh.Physical, _s->Scratch + first, size - first);
        if (_s->StoreExclusive)
        {
            _s->StoreExclusive = false;
            _vcpu.Barrier.EndExclusive(_vcpu);
        }
    }

    private bool TryFindHost(ulong physical, out byte* host, out MemoryKind kind)
    {
        if (_memory.TryFindRegion(physical, out MemoryRegion region) && !_vcpu.IsApicPage(physical))
        {
            host = _memory.Host + region.Offset + (physical - region.Start);
            kind = region.Kind;
            return true;
        }
        host = null;
        kind = default;
        return false;
    }

    private void ReadPhysical(ulong physical, byte* to, int size)
    {
        if (TryFindHost(physical, out byte* host, out _))
            Buffer.MemoryCopy(host, to, size, size);
        else
            ReadDevice(physical, to, size);
    }

    private void WritePhysical(ulong physical, byte* from, int size)
    {
        if (!TryFindHost(physical, out byte* host, out MemoryKind kind))
        {
            WriteDevice(physical, from, size);
            return;
        }
        if (kind == MemoryKind.Rom)
            return;
        Buffer.MemoryCopy(from, host, size, size);
        _memory.NoteWrite((ulong)(host - _memory.Host), size);
    }

    private void ReadDevice(ulong physical, byte* to, int size)
    {
        while (size > 0)
        {
            int unit = Unit(physical, size);
            Save(to, unit, ReadPhysicalDevice(physical, unit));
            to += unit;
            physical += (ulong)unit;
            size -= unit;
        }
    }

    private void WriteDevice(ulong physical, byte* from, int size)
    {
        while (size > 0)
        {
            int unit = Unit(physical, size);
            ulong value = Load(from, unit);
            if (_vcpu.IsApicPage(physical))
                _vcpu.Apic.Registers.Write(physical & 0xfff, (AccessSize)unit, value);
            else
                _mmio.Write(new Gpa(physical), (AccessSize)unit, value);
            from += unit;
            physical += (ulong)unit;
            size -= unit;
        }
    }

    private ulong ReadPhysicalDevice(ulong physical, int unit) => _vcpu.IsApicPage(physical)
        ? _vcpu.Apic.Registers.Read(physical & 0xfff, (AccessSize)unit)
        : _mmio.Read(new Gpa(physical), (AccessSize)unit);

    /// <summary>The next bus access of a run: a power of two up to 8. An access of such a size goes out whole, aligned or not.</summary>
    private static int Unit(ulong physical, int size) => size >= 8 ? 8 : size >= 4 ? 4 : size >= 2 ? 2 : 1;

    private static ulong Load(byte* p, int size) => size switch
    {
        1 => *p,
        2 => *(ushort*)p,
        4 => *(uint*)p,
        _ => *(ulong*)p,
    };

    private static void Save(byte* p, int size, ulong value)
    {
        switch (size)
        {
            case 1:
                *p = (byte)value;
                break;
            case 2:
                *(ushort*)p = (ushort)value;
                break;
            case 4:
                *(uint*)p = (uint)value;
                break;
            default:
                *(ulong*)p = value;
                break;
        }
    }
}
