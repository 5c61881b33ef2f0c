using System;
using System.Collections.Generic;

namespace Kvasir.Boot.Acpi;

/// <summary>
/// The ACPI tables of a board, not yet placed: one run of tables, the RSDP, and the links between them. Who knows the addresses links them
/// (<see cref="Link"/>); firmware does so itself from <see cref="LoaderScript"/>.
/// </summary>
public sealed class AcpiTables
{
    /// <summary>Names of the parts in fw_cfg.</summary>
    public const string TablesFile = "etc/acpi/tables";
    public const string RsdpFile = "etc/acpi/rsdp";

    /// <summary>What <see cref="Tables"/> must be aligned to: the FACS stands first.</summary>
    public const int Alignment = 64;

    private const int RsdpSize = 36;
    private const int Rsdp1Size = 20;

    private readonly byte[] _tables;
    private readonly byte[] _rsdp;
    private readonly TableLink[] _links;

    private AcpiTables(byte[] tables, byte[] rsdp, TableLink[] links)
    {
        _tables = tables;
        _rsdp = rsdp;
        _links = links;
    }

    /// <summary>All tables but the RSDP; pointers hold offsets, checksums are zero.</summary>
    public ReadOnlyMemory<byte> Tables => _tables;

    /// <summary>The RSDP, unlinked likewise.</summary>
    public ReadOnlyMemory<byte> Rsdp => _rsdp;

    /// <summary>Builds the tables of a board.</summary>
    public static AcpiTables Build(BoardDescription board)
    {
        AcpiTableWriter tables = new(TablesFile);
        AcpiFixedTables.WriteFacs(tables);
        int facs = 0;
        int dsdt = tables.Table("DSDT", 2, body =>
        {
            foreach (AmlTerm term in Dsdt.Build(board))
                body.Bytes(term.Bytes);
        });
        List<int> listed = [AcpiFixedTables.WriteFadt(tables, board, facs, dsdt), AcpiFixedTables.WriteMadt(tables, board)];
        if (board.HasHpet)
            listed.Add(AcpiFixedTables.WriteHpet(tables, board));
        if (board.Pci?.Ecam is ulong ecam)
            listed.Add(AcpiFixedTables.WriteMcfg(tables, ecam, board.Pci.BusCount));
        int rsdt = tables.Root("RSDT", 4, listed);
        int xsdt = tables.Root("XSDT", 8, listed);

        TableWriter rsdp = new();
        List<TableLink> links = [.. tables.Links];
        rsdp.Text("RSD PTR ", 8).U8(0).Text(AcpiTableWriter.OemId, 6).U8(2);
        links.Add(TableLink.Pointer(RsdpFile, rsdp.Length, 4, TablesFile));
        rsdp.U32((uint)rsdt).U32(RsdpSize);
        links.Add(TableLink.Pointer(RsdpFile, rsdp.Length, 8, TablesFile));
        rsdp.U64((ulong)xsdt).U8(0).Zero(3);
        links.Add(TableLink.Checksum(RsdpFile, 8, 0, Rsdp1Size));
        links.Add(TableLink.Checksum(RsdpFile, 32, 0, RsdpSize));
        return new AcpiTables(tables.ToArray(), rsdp.ToArray(), [.. links]);
    }

    /// <summary>The tables and the RSDP as they must stand in memory.</summary>
    /// <param name="address">Where the tables will stand, a multiple of <see cref="Alignment"/>.</param>
    public (byte[] Tables, byte[] Rsdp) Link(ulong address)
    {
        if (address % Alignment != 0)
            throw new ArgumentException("the tables are not aligned", nameof(address));
        byte[] tables = [.. _tables];
        byte[] rsdp = [.. _rsdp];
        foreach (TableLink link in _links)
            link.Apply(link.File == TablesFile ? tables : rsdp, address);
        return (tables, rsdp);
    }

    /// <summary>The script that has firmware place and link the tables (fw_cfg file etc/table-loader).</summary>
    public byte[] LoaderScript()
    {
        TableWriter script = new();
        TableLink.WriteAllocate(script, TablesFile, Alignment, nearBios: false);
        TableLink.WriteAllocate(script, RsdpFile, 16, nearBios: true);
        foreach (TableLink link in _links)
            link.Write(script);
        return script.ToArray();
    }
}
