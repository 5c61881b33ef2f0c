using System.Collections.Generic;
using Kvasir.Boot.Acpi;
using Kvasir.Boot.Firmware;
using Kvasir.Core;

namespace Kvasir.Boot;

/// <summary>
/// What firmware leaves in memory for an operating system, put there for a start without firmware: BIOS data area, ACPI, MP and SMBIOS tables, and
/// the memory map that goes with them.
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

    // The BIOS segment: anchors on 16-byte boundaries, then the tables that have an upper bound. An MP table has at most 255 processors of 20
    // bytes and 150 other entries of 8; the SMBIOS structures at most 64 memory modules of about 70 bytes.
    private const ulong RsdpAddress = 0xf_0000;
    private const ulong MpPointerAddress = 0xf_0030;
    private const ulong Smbios2Address = 0xf_0040;
    private const ulong Smbios3Address = 0xf_0060;
    private const ulong MpTableAddress = 0xf_1000;
    private const ulong SmbiosAddress = 0xf_4000;

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
        ulong segment = ChipsetAddresses.BiosSegment;
        if (guest.TryFindRegion(ChipsetAddresses.FourGiB - 1, out _))
            throw new BootException("a kernel that is started directly takes the firmware's place: give a kernel or firmware, not both");
        memory.Reserve("BIOS segment", segment, ChipsetAddresses.OneMiB - segment);
        memory.Clear(segment, ChipsetAddresses.OneMiB - segment);
        ulong rsdp = board.HasAcpi ? PlaceAcpi(memory, board, taken) : 0;
        PlaceMpTable(memory, board);
        PlaceSmbios(guest, memory, board);
        return new FirmwareTables(rsdp, AddressMap.Build(guest, board, taken));
    }

    private static ulong PlaceAcpi(BootMemory memory, BoardDescription board, List<AddressRange> taken)
    {
        AcpiTables acpi = AcpiTables.Build(board);
        ulong size = BootMemory.Align((ulong)acpi.Tables.Length, GuestMemory.PageSize);
        ulong address = memory.ReserveHighest("ACPI tables", size, GuestMemory.PageSize, ChipsetAddresses.OneMiB, memory.LowEnd);
        (byte[] tables, byte[] rsdp) = acpi.Link(address);
        memory.Write(address, tables);
        memory.Write(RsdpAddress, rsdp);
        // The first page holds the FACS, which a sleeping system writes to.
        taken.Add(new AddressRange(address, GuestMemory.PageSize, AddressRangeKind.AcpiNvs));
        if (size > GuestMemory.PageSize)
            taken.Add(new AddressRange(address + GuestMemory.PageSize, size - GuestMemory.PageSize, AddressRangeKind.AcpiReclaimable));
        return RsdpAddress;
    }

    private static void PlaceMpTable(BootMemory memory, BoardDescription board)
    {
        memory.Write(MpPointerAddress, MpTable.Pointer((uint)MpTableAddress));
        memory.Write(MpTableAddress, MpTable.Build(board));
    }

    private static void PlaceSmbios(GuestMemory guest, BootMemory memory, BoardDescription board)
    {
        SmbiosTables smbios = SmbiosTables.Build(board, guest.LowSize, guest.HighSize);
        memory.Write(Smbios2Address, smbios.EntryPoint2((uint)SmbiosAddress));
        memory.Write(Smbios3Address, smbios.EntryPoint3(SmbiosAddress));
        memory.Write(SmbiosAddress, smbios.Structures);
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
