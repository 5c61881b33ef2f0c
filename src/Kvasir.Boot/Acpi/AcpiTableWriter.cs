using System;
using System.Collections.Generic;

namespace Kvasir.Boot.Acpi;

/// <summary>Appends system description tables one after the other and notes the links that each needs.</summary>
internal sealed class AcpiTableWriter(string file)
{
    public const string OemId = "KVASIR";

    /// <summary>Offset of a table's checksum and of its body.</summary>
    private const int ChecksumOffset = 9;
    private const int LengthOffset = 4;
    private const string OemTableId = "KVASIRVM";
    private const string CreatorId = "KVSR";
    private const uint Revision = 1;

    private readonly TableWriter _bytes = new();
    private readonly List<TableLink> _links = [];

    public IReadOnlyList<TableLink> Links => _links;

    public TableWriter Bytes => _bytes;

    /// <summary>Writes a table: header, body, then length and checksum.</summary>
    /// <returns>Its offset.</returns>
    public int Table(string signature, byte revision, Action<TableWriter> body)
    {
        _bytes.AlignTo(8);
        int start = _bytes.Length;
        _bytes.Text(signature, 4).U32(0).U8(revision).U8(0).Text(OemId, 6).Text(OemTableId, 8).U32(Revision).Text(CreatorId, 4).U32(Revision);
        body(_bytes);
        int length = _bytes.Length - start;
        _bytes.PatchU32(start + LengthOffset, (uint)length);
        _links.Add(TableLink.Checksum(file, start + ChecksumOffset, start, length));
        return start;
    }

    /// <summary>Writes an RSDT or XSDT.</summary>
    public int Root(string signature, int width, IReadOnlyList<int> tables) => Table(signature, 1, body =>
    {
        foreach (int table in tables)
            Pointer(table, width);
    });

    /// <summary>Writes a pointer to the table at an offset.</summary>
    public void Pointer(int table, int width)
    {
        // A pointer must be linked before the checksum over it is taken: Table adds the checksum after its body.
        _links.Add(TableLink.Pointer(file, _bytes.Length, width, file));
        if (width == 8)
            _bytes.U64((ulong)table);
        else
            _bytes.U32((uint)table);
    }

    public byte[] ToArray() => _bytes.ToArray();
}
