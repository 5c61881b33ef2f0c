using System.Runtime.CompilerServices;
using System.Threading;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>What an access wants to do.</summary>
public enum AccessKind
{
    Read,
    Write,
    Fetch,
}

/// <summary>The outcome of a page walk.</summary>
/// <param name="Physical">Guest-physical address of the byte.</param>
/// <param name="Global">The leaf's G bit, with CR4.PGE.</param>
/// <param name="Span">Log2 of the bytes that the leaf maps: 12, 21, 22 or 30.</param>
public record struct Translation(ulong Physical, bool Global, int Span);

/// <summary>
/// Page walks: 2-level, PAE and 4-level paging with all access rights, accessed and dirty bits set atomically (Intel SDM vol. 3, ch. "Paging").
/// </summary>
public sealed unsafe class PageWalker(VcpuBlock* block, GuestMemory memory)
{
    /// <summary>Physical address bits that CPUID reports.</summary>
    public const int PhysicalBits = 46;

    private const ulong PhysicalMask = (1ul << PhysicalBits) - 1;
    internal const ulong AddressMask = PhysicalMask & ~0xffful;
    internal const ulong ReservedAddressBits = ~PhysicalMask & 0x000f_ffff_ffff_ffff;

    private readonly VcpuBlock* _s = block;
    private readonly GuestMemory _memory = memory;

    /// <summary>Translates a linear address. On failure <paramref name="error"/> is the page fault's error code.</summary>
    public bool TryWalk(ulong linear, AccessKind kind, AccessRights rights, out Translation translation, out PageFaultCode error)
    {
        if ((_s->Cr0 & (ulong)Cr0.PG) == 0)
        {
            translation = new Translation((uint)linear, false, 12);
            error = PageFaultCode.None;
            return true;
        }
        while (true)
        {
            int outcome = (_s->Efer & (ulong)Efer.LMA) != 0
                ? WalkLong(linear, 4, _s->Cr3 & AddressMask, kind, rights, out translation, out error)
                : (_s->Cr4 & (ulong)Cr4.PAE) != 0
                    ? WalkPae(linear, kind, rights, out translation, out error)
                    : WalkLegacy((uint)linear, kind, rights, out translation, out error);
            if (outcome >= 0)
                return outcome == 1;
        }
    }

    /// <summary>A present entry's effect on the rights gathered so far, and the checks at the leaf.</summary>
    private bool Permits(bool user, bool writable, bool noExecute, AccessKind kind, AccessRights rights)
    {
        if (rights == AccessRights.User)
        {
            if (!user)
                return false;
            return kind switch
            {
                AccessKind.Write => writable,
                AccessKind.Fetch => !noExecute,
                _ => true,
            };
        }
        switch (kind)
        {
            case AccessKind.Fetch:
                return !noExecute && !(user && (_s->Cr4 & (ulong)Cr4.SMEP) != 0);
            case AccessKind.Write:
                if (!writable && (_s->Cr0 & (ulong)Cr0.WP) != 0)
                    return false;
                break;
        }
        return !(user && rights == AccessRights.Supervisor && (_s->Cr4 & (ulong)Cr4.SMAP) != 0);
    }

    private PageFaultCode Code(AccessKind kind, AccessRights rights, PageFaultCode more)
    {
        PageFaultCode code = more;
        if (rights == AccessRights.User)
            code |= PageFaultCode.User;
        if (kind == AccessKind.Write)
            code |= PageFaultCode.Write;
        bool fetchReported = (_s->Cr4 & (ulong)Cr4.SMEP) != 0
            || ((_s->Cr4 & (ulong)Cr4.PAE) != 0 && (_s->Efer & (ulong)Efer.NXE) != 0);
        if (kind == AccessKind.Fetch && fetchReported)
            code |= PageFaultCode.Fetch;
        return code;
    }

    /// <returns>1 translated, 0 fault, -1 an entry changed meanwhile: walk again.</returns>
    private int WalkPae(ulong linear, AccessKind kind, AccessRights rights, out Translation translation, out PageFaultCode error)
    {
        // The four PDPTEs have neither rights nor accessed bits; only P and the address count.
        translation = default;
        ulong* entry = Entry((_s->Cr3 & 0xffff_ffe0) + (linear >> 30 & 3) * 8);
        ulong value = entry == null ? 0 : Volatile.Read(ref *entry);
        if ((value & (ulong)PageEntry.Present) == 0)
        {
            error = Code(kind, rights, PageFaultCode.None);
            return 0;
        }
        if ((value & (ReservedAddressBits | 0xfff0_0000_0000_01e6)) != 0)
        {
            error = Code(kind, rights, PageFaultCode.Present | PageFaultCode.Reserved);
            return 0;
        }
        return WalkLong((uint)linear, 2, value & AddressMask, kind, rights, out translation, out error);
    }

    /// <summary>Walks 8-byte entries from a level (4 PML4, 3 PDPT, 2 PD, 1 PT) down.</summary>
    private int WalkLong(ulong linear, int level, ulong table, AccessKind kind, AccessRights rights, out Translation translation, out PageFaultCode error)
    {
        translation = default;
        bool user = true;
        bool writable = true;
        bool noExecute = false;
        bool nxe = (_s->Efer & (ulong)Efer.NXE) != 0;
        bool pae = level == 2;
        while (true)
        {
            int shift = 12 + (level - 1) * 9;
            ulong* entry = Entry(table + (linear >> shift & 511) * 8);
            ulong value = entry == null ? 0 : Volatile.Read(ref *entry);
            if ((value & (ulong)PageEntry.Present) == 0)
            {
                error = Code(kind, rights, PageFaultCode.None);
                return 0;
            }
            bool leaf = level == 1 || (level <= 3 && (value & (ulong)PageEntry.Large) != 0);
            ulong reserved = ReservedAddressBits;
            if (!nxe)
                reserved |= (ulong)PageEntry.NoExecute;
            if (pae)
                reserved |= 0x7ff0_0000_0000_0000;
            if (level == 4)
                reserved |= (ulong)PageEntry.Large;
            if (leaf && level > 1)
                reserved |= (1ul << shift) - 1 & ~0x1ffful;
            if ((value & reserved) != 0)
            {
                error = Code(kind, rights, PageFaultCode.Present | PageFaultCode.Reserved);
                return 0;
            }
            user &= (value & (ulong)PageEntry.User) != 0;
            writable &= (value & (ulong)PageEntry.Writable) != 0;
            noExecute |= (value & (ulong)PageEntry.NoExecute) != 0;
            if (!leaf)
            {
                if ((value & (ulong)PageEntry.Accessed) == 0 && !Replace(entry, value, value | (ulong)PageEntry.Accessed))
                {
                    error = default;
                    return -1;
                }
                table = value & AddressMask;
                level--;
                continue;
            }
            if (!Permits(user, writable, noExecute, kind, rights))
            {
                error = Code(kind, rights, PageFaultCode.Present);
                return 0;
            }
            ulong marked = value | (ulong)PageEntry.Accessed;
            if (kind == AccessKind.Write)
                marked |= (ulong)PageEntry.Dirty;
            if (marked != value && !Replace(entry, value, marked))
            {
                error = default;
                return -1;
            }
            ulong inPage = (1ul << shift) - 1;
            bool global = (value & (ulong)PageEntry.Global) != 0 && (_s->Cr4 & (ulong)Cr4.PGE) != 0;
            translation = new Translation((value & AddressMask & ~inPage) | (linear & inPage), global, shift);
            error = PageFaultCode.None;
            return 1;
        }
    }

    private int WalkLegacy(uint linear, AccessKind kind, AccessRights rights, out Translation translation, out PageFaultCode error)
    {
        translation = default;
        uint* directory = (uint*)Entry((_s->Cr3 & 0xffff_f000) + (linear >> 22) * 4);
        uint pde = directory == null ? 0 : Volatile.Read(ref *directory);
        if ((pde & (uint)PageEntry.Present) == 0)
        {
            error = Code(kind, rights, PageFaultCode.None);
            return 0;
        }
        bool user = (pde & (uint)PageEntry.User) != 0;
        bool writable = (pde & (uint)PageEntry.Writable) != 0;
        bool large = (pde & (uint)PageEntry.Large) != 0 && (_s->Cr4 & (ulong)Cr4.PSE) != 0;
        uint* leaf = directory;
        uint value = pde;
        if (!large)
        {
            if ((pde & (uint)PageEntry.Accessed) == 0 && !Replace(directory, pde, pde | (uint)PageEntry.Accessed))
            {
                error = default;
                return -1;
            }
            leaf = (uint*)Entry((pde & 0xffff_f000) + (linear >> 12 & 1023) * 4);
            value = leaf == null ? 0 : Volatile.Read(ref *leaf);
            if ((value & (uint)PageEntry.Present) == 0)
            {
                error = Code(kind, rights, PageFaultCode.None);
                return 0;
            }
            user &= (value & (uint)PageEntry.User) != 0;
            writable &= (value & (uint)PageEntry.Writable) != 0;
        }
        else if ((value & 1u << 21) != 0)
        {
            // PSE-36: bits 13-20 carry address bits 32-39; bit 21 is reserved.
            error = Code(kind, rights, PageFaultCode.Present | PageFaultCode.Reserved);
            return 0;
        }
        if (!Permits(user, writable, false, kind, rights))
        {
            error = Code(kind, rights, PageFaultCode.Present);
            return 0;
        }
        uint marked = value | (uint)PageEntry.Accessed;
        if (kind == AccessKind.Write)
            marked |= (uint)PageEntry.Dirty;
        if (marked != value && !Replace(leaf, value, marked))
        {
            error = default;
            return -1;
        }
        bool global = (value & (uint)PageEntry.Global) != 0 && (_s->Cr4 & (ulong)Cr4.PGE) != 0;
        ulong physical = large
            ? (value & 0xffc0_0000) | (ulong)(value >> 13 & 0xff) << 32 | (linear & 0x3f_ffff)
            : (value & 0xffff_f000) | (linear & 0xfff);
        translation = new Translation(physical, global, large ? 22 : 12);
        error = PageFaultCode.None;
        return 1;
    }

    /// <summary>The host address of a table entry, or null where no memory is: such an entry reads as not present.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private ulong* Entry(ulong physical)
    {
        // Tables are aligned, so an entry never crosses a page, and regions are whole pages.
        if (!_memory.TryFindRegion(physical, out MemoryRegion region))
            return null;
        return (ulong*)(_memory.Host + region.Offset + (physical - region.Start));
    }

    private bool Replace(ulong* entry, ulong old, ulong value)
    {
        if (Interlocked.CompareExchange(ref *entry, value, old) != old)
            return false;
        MarkDirty((byte*)entry);
        return true;
    }

    private bool Replace(uint* entry, uint old, uint value)
    {
        if (Interlocked.CompareExchange(ref *entry, value, old) != old)
            return false;
        MarkDirty((byte*)entry);
        return true;
    }

    private void MarkDirty(byte* host)
    {
        ulong page = (ulong)(host - _memory.Host) / GuestMemory.PageSize;
        if ((_memory.Flags[page] & (byte)PageFlags.Dirty) == 0)
            _memory.SetFlag(page, PageFlags.Dirty);
    }
}
