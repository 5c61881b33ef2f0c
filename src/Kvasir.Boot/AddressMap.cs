using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot;

/// <summary>Address range types of INT 15h E820h (ACPI specification, "System Address Map Interfaces").</summary>
public enum AddressRangeKind : uint
{
    Ram = 1,
    Reserved = 2,

    /// <summary>ACPI tables; free once they were read.</summary>
    AcpiReclaimable = 3,

    /// <summary>ACPI non-volatile storage: must survive a sleep.</summary>
    AcpiNvs = 4,
}

/// <summary>One line of the memory map that a guest is given.</summary>
public readonly record struct AddressRange(ulong Start, ulong Length, AddressRangeKind Kind)
{
    public ulong End => Start + Length;
}

/// <summary>The memory map (e820) of a board.</summary>
public static class AddressMap
{
    /// <summary>Bytes of one entry as INT 15h E820h, the Linux zero page and fw_cfg give it: base, length, type.</summary>
    public const int EntrySize = 20;

    /// <summary>What a guest that starts without firmware is told.</summary>
    /// <param name="memory">Gives the RAM and firmware images.</param>
    /// <param name="board">Gives the chipset's own ranges.</param>
    /// <param name="taken">What the loader put into RAM that must stay: tables, above all.</param>
    /// <returns>Ascending ranges that do not overlap; neighbours of one kind are joined.</returns>
    public static IReadOnlyList<AddressRange> Build(GuestMemory memory, BoardDescription board, IEnumerable<AddressRange> taken)
    {
        List<AddressRange> map = [];
        foreach (MemoryRegion region in memory.Regions)
            Cover(map, new AddressRange(region.Start, region.Length, region.Kind == MemoryKind.Ram ? AddressRangeKind.Ram : AddressRangeKind.Reserved));
        // The video hole and option ROM space are no part of a PC's map at all; the BIOS segment is, as reserved.
        Remove(map, ChipsetAddresses.VideoMemory, ChipsetAddresses.OneMiB);
        CoverWith(map, ChipsetAddresses.Ebda, ChipsetAddresses.VideoMemory - ChipsetAddresses.Ebda);
        CoverWith(map, ChipsetAddresses.BiosSegment, ChipsetAddresses.OneMiB - ChipsetAddresses.BiosSegment);
        foreach (AddressRange range in ChipsetRanges(board))
            Cover(map, range);
        foreach (AddressRange range in taken)
            Cover(map, range);
        return Join(map);
    }

    /// <summary>Ranges that the chipset decodes and an operating system must not give to a device.</summary>
    public static IReadOnlyList<AddressRange> ChipsetRanges(BoardDescription board)
    {
        const ulong page = GuestMemory.PageSize;
        List<AddressRange> ranges = [];
        if (board.Pci?.Ecam is ulong ecam)
            ranges.Add(new AddressRange(ecam, (ulong)board.Pci.BusCount << 20, AddressRangeKind.Reserved));
        ranges.Add(new AddressRange(board.IoApicAddress, page, AddressRangeKind.Reserved));
        if (board.HasHpet)
            ranges.Add(new AddressRange(ChipsetAddresses.Hpet, page, AddressRangeKind.Reserved));
        ranges.Add(new AddressRange(ChipsetAddresses.LocalApic, page, AddressRangeKind.Reserved));
        return ranges;
    }

    private static void CoverWith(List<AddressRange> map, ulong start, ulong length) =>
        Cover(map, new AddressRange(start, length, AddressRangeKind.Reserved));

    private static void Cover(List<AddressRange> map, AddressRange range)
    {
        Remove(map, range.Start, range.End);
        map.Add(range);
        map.Sort((a, b) => a.Start.CompareTo(b.Start));
    }

    private static void Remove(List<AddressRange> map, ulong start, ulong end)
    {
        for (int i = map.Count - 1; i >= 0; i--)
        {
            AddressRange old = map[i];
            if (old.End <= start || old.Start >= end)
                continue;
            map.RemoveAt(i);
            if (old.End > end)
                map.Insert(i, old with { Start = end, Length = old.End - end });
            if (old.Start < start)
                map.Insert(i, old with { Length = start - old.Start });
        }
    }

    private static List<AddressRange> Join(List<AddressRange> map)
    {
        List<AddressRange> joined = [];
        foreach (AddressRange range in map)
        {
            if (joined.Count > 0 && joined[^1].End == range.Start && joined[^1].Kind == range.Kind)
                joined[^1] = joined[^1] with { Length = joined[^1].Length + range.Length };
            else if (range.Length > 0)
                joined.Add(range);
        }
        return joined;
    }
}
