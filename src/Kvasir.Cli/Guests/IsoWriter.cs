using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;

namespace Kvasir.Cli.Guests;

/// <summary>
/// A small ISO 9660 disc (ECMA-119) with a Joliet tree beside it, for long names: a few files in one folder, all in memory. Its content depends on nothing but
/// its arguments.
/// </summary>
internal static class IsoWriter
{
    private const int Sector = 2048;
    private const int PrimaryDescriptor = 16;
    private const int JolietDescriptor = 17;
    private const int Terminator = 18;
    private const int PrimaryTables = 19;
    private const int JolietTables = 21;
    private const int PrimaryRoot = 23;
    private const int JolietRoot = 24;
    private const int FirstFile = 25;

    /// <param name="label">The volume's name, up to 16 ASCII characters.</param>
    /// <param name="files">Names of up to 30 ASCII characters, in ascending order.</param>
    public static byte[] Write(string label, IReadOnlyList<(string Name, byte[] Content)> files)
    {
        int sectors = FirstFile;
        List<(string Name, int Start, int Length)> placed = [];
        foreach ((string name, byte[] content) in files)
        {
            placed.Add((name, sectors, content.Length));
            sectors += Math.Max(1, (content.Length + Sector - 1) / Sector);
        }
        byte[] disc = new byte[sectors * Sector];
        WriteDescriptor(At(disc, PrimaryDescriptor), joliet: false, label, sectors);
        WriteDescriptor(At(disc, JolietDescriptor), joliet: true, label, sectors);
        Span<byte> end = At(disc, Terminator);
        end[0] = 255;
        "CD001"u8.CopyTo(end[1..]);
        end[6] = 1;
        foreach ((int table, int root) in ((int, int)[])[(PrimaryTables, PrimaryRoot), (JolietTables, JolietRoot)])
        {
            // One entry, the root; the second table is the first in the other byte order.
            Span<byte> little = At(disc, table);
            Span<byte> big = At(disc, table + 1);
            (little[0], big[0]) = (1, 1);
            BinaryPrimitives.WriteInt32LittleEndian(little[2..], root);
            BinaryPrimitives.WriteInt32BigEndian(big[2..], root);
            BinaryPrimitives.WriteInt16LittleEndian(little[6..], 1);
            BinaryPrimitives.WriteInt16BigEndian(big[6..], 1);
        }
        WriteFolder(At(disc, PrimaryRoot), PrimaryRoot, placed, Encoding.ASCII, "");
        WriteFolder(At(disc, JolietRoot), JolietRoot, placed, Encoding.BigEndianUnicode, ";1");
        for (int index = 0; index < files.Count; index++)
            files[index].Content.CopyTo(disc, placed[index].Start * Sector);
        return disc;
    }

    private static Span<byte> At(byte[] disc, int sector) => disc.AsSpan(sector * Sector, Sector);

    /// <summary>A volume descriptor (ECMA-119, 8.4 and 8.5).</summary>
    private static void WriteDescriptor(Span<byte> target, bool joliet, string label, int sectors)
    {
        target[0] = joliet ? (byte)2 : (byte)1;
        "CD001"u8.CopyTo(target[1..]);
        target[6] = 1;
        Encoding encoding = joliet ? Encoding.BigEndianUnicode : Encoding.ASCII;
        Fill(target.Slice(8, 32), "", encoding);
        Fill(target.Slice(40, 32), label, encoding);
        Both32(target[80..], sectors);
        // UCS-2 level 3.
        if (joliet)
            "%/E"u8.CopyTo(target[88..]);
        Both16(target[120..], 1);
        Both16(target[124..], 1);
        Both16(target[128..], Sector);
        Both32(target[132..], 10);
        int tables = joliet ? JolietTables : PrimaryTables;
        BinaryPrimitives.WriteInt32LittleEndian(target[140..], tables);
        BinaryPrimitives.WriteInt32BigEndian(target[148..], tables + 1);
        WriteRecord(target.Slice(156, 34), joliet ? JolietRoot : PrimaryRoot, Sector, folder: true, [0]);
        Fill(target.Slice(190, 623), "", encoding);
        // Four times that were never set: sixteen digits and a zone.
        for (int at = 813; at < 881; at += 17)
            target.Slice(at, 16).Fill((byte)'0');
        target[881] = 1;
    }

    private static void WriteFolder(Span<byte> target, int sector, List<(string Name, int Start, int Length)> files, Encoding encoding, string version)
    {
        int at = WriteRecord(target, sector, Sector, folder: true, [0]);
        at += WriteRecord(target[at..], sector, Sector, folder: true, [1]);
        foreach ((string name, int start, int length) in files)
            at += WriteRecord(target[at..], start, length, folder: false, encoding.GetBytes(name + version));
    }

    /// <summary>A directory record (ECMA-119, 9.1).</summary>
    private static int WriteRecord(Span<byte> target, int start, int length, bool folder, byte[] name)
    {
        int size = 33 + name.Length + (1 - name.Length % 2);
        target[0] = (byte)size;
        Both32(target[2..], start);
        Both32(target[10..], length);
        // 1 January 2000.
        (target[18], target[19], target[20]) = (100, 1, 1);
        target[25] = folder ? (byte)2 : (byte)0;
        Both16(target[28..], 1);
        target[32] = (byte)name.Length;
        name.CopyTo(target[33..]);
        return size;
    }

    private static void Fill(Span<byte> target, string text, Encoding encoding)
    {
        int width = encoding.GetByteCount(" ");
        encoding.GetBytes(text.PadRight(target.Length / width), target);
    }

    private static void Both16(Span<byte> target, short value)
    {
        BinaryPrimitives.WriteInt16LittleEndian(target, value);
        BinaryPrimitives.WriteInt16BigEndian(target[2..], value);
    }

    private static void Both32(Span<byte> target, int value)
    {
        BinaryPrimitives.WriteInt32LittleEndian(target, value);
        BinaryPrimitives.WriteInt32BigEndian(target[4..], value);
    }
}
