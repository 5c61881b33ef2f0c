using System.Collections.Generic;
using Kvasir.Boot.Acpi;
using Kvasir.Core;

namespace Kvasir.Boot;

/// <summary>
/// What firmware leaves in memory for an operating system, put there for a start without firmware: BIOS data area, ACPI tables, and the memory map
/// that goes with them.
/// </summary>
/// <remarks>
/// Anchors stand in the BIOS segment, where every system looks; the ACPI tables stand at the top of low RAM, where there is room for any
/// number of processors.
/// </remarks>
internal sealed class FirmwareTables
{
    private const ulong BiosDataArea = 0x400;
    private const ulong BiosDataAreaEnd = 0x500;

    // BIOS data area, by address.
    private const ulong SerialPorts = 0x400;
    private const ulong EbdaSegment = 0x40e;
    private const ulong ConventionalKb = 0x413;
    private const int BiosSerialPorts = 4;

    private FirmwareTables(ulong rsdp, IReadOnlyList<AddressRange> map)
    {
        Rsdp = rsdp;
        Map = map;
    }

    /// <summary>Where the RSDP stands, or 0 without ACPI.</summary>
    public ulong Rsdp { get; }

    public IReadOnlyList<AddressRange> Map { get; }

    /// <summary>Builds and places everything.</summary>
    /// <exception cref="BootException">The VM has too little memory.</exception>
    public static FirmwareTables Place(GuestMemory guest, BootMemory memory, BoardDescription board)
    {
        WriteBiosData(memory, board);
        List<AddressRange> taken = [];
        ulong rsdp = 0;
        ulong anchor = ChipsetAddresses.BiosSegment;
        memory.Reserve("BIOS segment", anchor, ChipsetAddresses.OneMiB - anchor);
        memory.Clear(anchor, ChipsetAddresses.OneMiB - anchor);
        if (board.HasAcpi)
        {
            AcpiTables acpi = AcpiTables.Build(board);
            ulong size = BootMemory.Align((ulong)acpi.Tables.Length, GuestMemory.PageSize);
            ulong address = memory.ReserveHighest("ACPI tables", size, GuestMemory.PageSize, ChipsetAddresses.OneMiB, memory.LowEnd);
            (byte[] tables, byte[] root) = acpi.Link(address);
            memory.Write(address, tables);
            rsdp = anchor;
            memory.Write(rsdp, root);
            // The first page holds the FACS, which a sleeping system writes to.
            taken.Add(new AddressRange(address, GuestMemory.PageSize, AddressRangeKind.AcpiNvs));
            taken.Add(new AddressRange(address + GuestMemory.PageSize, size - GuestMemory.PageSize, AddressRangeKind.AcpiReclaimable));
        }
        return new FirmwareTables(rsdp, AddressMap.Build(guest, board, taken));
    }

    private static void WriteBiosData(BootMemory memory, BoardDescription board)
    {
        memory.Reserve("BIOS data area", 0, BiosDataAreaEnd);
        memory.Clear(BiosDataArea, BiosDataAreaEnd - BiosDataArea);
        memory.Reserve("extended BIOS data area", ChipsetAddresses.Ebda, ChipsetAddresses.VideoMemory - ChipsetAddresses.Ebda);
        // Its first byte is its size in KiB.
        memory.Clear(ChipsetAddresses.Ebda, ChipsetAddresses.VideoMemory - ChipsetAddresses.Ebda);
        memory.Write(ChipsetAddresses.Ebda, [1]);
        memory.Write(EbdaSegment, new TableWriter().U16((ushort)(ChipsetAddresses.Ebda >> 4)).Written);
        memory.Write(ConventionalKb, new TableWriter().U16((ushort)(ChipsetAddresses.Ebda >> 10)).Written);
        foreach (SerialPortDescription serial in board.SerialPorts)
        {
            if (serial.Number is >= 1 and <= BiosSerialPorts)
                memory.Write(SerialPorts + (ulong)(serial.Number - 1) * 2, new TableWriter().U16(serial.Port).Written);
        }
    }
}
