using System;
using System.Buffers.Binary;

namespace Kvasir.Boot.Acpi;

/// <summary>
/// One step that makes tables ready where they stand: add an address to a pointer, or set a checksum. The same steps serve direct boot and, written
/// out, the loader script of SeaBIOS and OVMF (its format: 128-byte commands).
/// </summary>
internal readonly record struct TableLink
{
    private const int EntrySize = 128;
    private const int NameSize = 56;
    private const uint AllocateCommand = 1;
    private const uint PointerCommand = 2;
    private const uint ChecksumCommand = 3;
    private const byte HighZone = 1;
    private const byte BiosZone = 2;

    /// <summary>The file that is changed.</summary>
    public string File { get; private init; }

    private int Offset { get; init; }

    /// <summary>Width of the pointer in bytes, or 0 for a checksum.</summary>
    private int Width { get; init; }

    /// <summary>The file that the pointer leads to.</summary>
    private string Target { get; init; }
    private int Start { get; init; }
    private int Length { get; init; }

    /// <summary>Adds the address of <paramref name="target"/> to the offset that stands in the pointer.</summary>
    public static TableLink Pointer(string file, int offset, int width, string target) =>
        new() { File = file, Offset = offset, Width = width, Target = target };

    /// <summary>Sets the byte at <paramref name="offset"/> so that the range sums to zero.</summary>
    public static TableLink Checksum(string file, int offset, int start, int length) =>
        new() { File = file, Offset = offset, Target = "", Start = start, Length = length };

    public static void WriteAllocate(TableWriter script, string file, uint alignment, bool nearBios)
    {
        int start = script.Length;
        script.U32(AllocateCommand).Text(file, NameSize, 0).U32(alignment).U8(nearBios ? BiosZone : HighZone);
        script.Zero(EntrySize - (script.Length - start));
    }

    public void Apply(Span<byte> content, ulong targetAddress)
    {
        if (Width == 4)
            BinaryPrimitives.WriteUInt32LittleEndian(content[Offset..], BinaryPrimitives.ReadUInt32LittleEndian(content[Offset..]) + (uint)targetAddress);
        else if (Width == 8)
            BinaryPrimitives.WriteUInt64LittleEndian(content[Offset..], BinaryPrimitives.ReadUInt64LittleEndian(content[Offset..]) + targetAddress);
        else
            content[Offset] += TableWriter.Checksum(content.Slice(Start, Length));
    }

    public void Write(TableWriter script)
    {
        int start = script.Length;
        if (Width != 0)
            script.U32(PointerCommand).Text(File, NameSize, 0).Text(Target, NameSize, 0).U32((uint)Offset).U8((byte)Width);
        else
            script.U32(ChecksumCommand).Text(File, NameSize, 0).U32((uint)Offset).U32((uint)Start).U32((uint)Length);
        script.Zero(EntrySize - (script.Length - start));
    }
}
