using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Text;

namespace Kvasir.Block.Tests;

/// <summary>
/// Writes differencing disks, which qemu-img cannot: a VHD from nothing ("Virtual Hard Disk Image Format Specification"), a VHDX by changing an empty dynamic one
/// ([MS-VHDX]). A disk is given as its bytes and which of its sectors of 512 bytes the overlay holds.
/// </summary>
internal static class DifferencingWriter
{
    private const int VhdBlock = 1 << 16;
    private const int Mega = 1 << 20;

    /// <summary>A VHD over another one.</summary>
    /// <param name="path">The file to write.</param>
    /// <param name="parent">The parent's file, for its id.</param>
    /// <param name="content">The disk.</param>
    /// <param name="own">Whether a sector is the overlay's.</param>
    /// <param name="locators">Names of the parent, by platform code.</param>
    public static void Vhd(string path, string parent, byte[] content, Func<int, bool> own, params (string Platform, string Name)[] locators)
    {
        byte[] footer = File.ReadAllBytes(parent)[..512];
        byte[] header = new byte[1024];
        footer.AsSpan(68, 16).CopyTo(header.AsSpan(40));
        BinaryPrimitives.WriteInt64BigEndian(footer.AsSpan(16), 512);
        BinaryPrimitives.WriteUInt32BigEndian(footer.AsSpan(60), 4);
        Guid.NewGuid().TryWriteBytes(footer.AsSpan(68, 16));
        Sum(footer, 64);
        int blocks = (content.Length + VhdBlock - 1) / VhdBlock;
        int locatorsAt = 1536 + (((blocks * 4) + 511) & ~511);
        "cxsparse"u8.CopyTo(header);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(8), -1);
        BinaryPrimitives.WriteInt64BigEndian(header.AsSpan(16), 1536);
        BinaryPrimitives.WriteUInt32BigEndian(header.AsSpan(24), 0x0001_0000);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(28), blocks);
        BinaryPrimitives.WriteInt32BigEndian(header.AsSpan(32), VhdBlock);
        using MemoryStream file = new();
        file.SetLength(locatorsAt);
        file.Position = locatorsAt;
        for (int i = 0; i < locators.Length; i++)
        {
            (string platform, string name) = locators[i];
            if (platform.Length == 0)
            {
                Encoding.BigEndianUnicode.GetBytes(name, header.AsSpan(64));
                continue;
            }
            byte[] text = (platform == "MacX" ? Encoding.UTF8 : Encoding.Unicode).GetBytes(name);
            Span<byte> entry = header.AsSpan(576 + (i * 24), 24);
            Encoding.ASCII.GetBytes(platform, entry);
            BinaryPrimitives.WriteInt32BigEndian(entry[4..], (text.Length + 511) / 512);
            BinaryPrimitives.WriteInt32BigEndian(entry[8..], text.Length);
            BinaryPrimitives.WriteInt64BigEndian(entry[16..], file.Position);
            file.Write(text);
            file.SetLength((file.Length + 511) & ~511);
            file.Position = file.Length;
        }
        byte[] table = new byte[blocks * 4];
        for (int block = 0; block < blocks; block++)
        {
            byte[] bitmap = new byte[512];
            byte[] data = new byte[VhdBlock];
            // What lies where the parent shows is nobody's.
            Array.Fill(data, (byte)0xdd);
            for (int i = 0; i < VhdBlock / 512; i++)
            {
                int sector = (block * VhdBlock / 512) + i;
                if (sector * 512 >= content.Length || !own(sector))
                    continue;
                bitmap[i / 8] |= (byte)(0x80 >> (i % 8));
                content.AsSpan(sector * 512, 512).CopyTo(data.AsSpan(i * 512));
            }
            bool any = bitmap.AsSpan().ContainsAnyExcept((byte)0);
            BinaryPrimitives.WriteUInt32BigEndian(table.AsSpan(block * 4), any ? (uint)(file.Position / 512) : uint.MaxValue);
            if (!any)
                continue;
            file.Write(bitmap);
            file.Write(data);
        }
        Sum(header, 36);
        file.Write(footer);
        file.Position = 0;
        file.Write(footer);
        file.Write(header);
        file.Write(table);
        File.WriteAllBytes(path, file.ToArray());
    }

    /// <summary>Makes a dynamic VHDX of 1 MiB blocks without any of them a differencing one.</summary>
    /// <param name="path">The file to change; it has the disk's size.</param>
    /// <param name="parent">The parent's id.</param>
    /// <param name="content">The disk.</param>
    /// <param name="own">Whether a sector is the overlay's.</param>
    /// <param name="names">Names of the parent, by key.</param>
    public static void Vhdx(string path, Guid parent, byte[] content, Func<int, bool> own, params (string Key, string Value)[] names)
    {
        byte[] empty = File.ReadAllBytes(path);
        (int batAt, int metadataAt) = (0, 0);
        for (int i = 0; i < 2; i++)
        {
            ReadOnlySpan<byte> entry = empty.AsSpan(0x3_0010 + (i * 32), 32);
            int at = (int)BinaryPrimitives.ReadInt64LittleEndian(entry[16..]);
            if (new Guid(entry[..16]) == new Guid("2DC27766-F623-4200-9D64-115E9BFD4A08"))
                batAt = at;
            else
                metadataAt = at;
        }
        int blocks = (content.Length + Mega - 1) / Mega;
        using MemoryStream file = new();
        file.Write(empty);
        file.SetLength((file.Length + Mega - 1) & ~(Mega - 1L));
        long bitmapAt = file.Length;
        byte[] bitmap = new byte[Mega];
        file.Position = bitmapAt + Mega;
        byte[] bat = new byte[4097 * 8];
        BinaryPrimitives.WriteInt64LittleEndian(bat.AsSpan(4096 * 8), bitmapAt | 6);
        for (int block = 0; block < blocks; block++)
        {
            byte[] data = new byte[Mega];
            Array.Fill(data, (byte)0xdd);
            int held = 0;
            int there = Math.Min(2048, (content.Length - (block * Mega)) / 512);
            for (int i = 0; i < there; i++)
            {
                int sector = (block * 2048) + i;
                if (!own(sector))
                    continue;
                held++;
                bitmap[sector / 8] |= (byte)(1 << (sector % 8));
                content.AsSpan(sector * 512, 512).CopyTo(data.AsSpan(i * 512));
            }
            if (held == 0)
                continue;
            bool zero = held == there && !data.AsSpan(0, there * 512).ContainsAnyExcept((byte)0);
            BinaryPrimitives.WriteInt64LittleEndian(bat.AsSpan(block * 8), zero ? 2 : file.Position | (held == there ? 6L : 7L));
            if (!zero)
                file.Write(data);
        }
        file.Position = bitmapAt;
        file.Write(bitmap);
        file.Position = batAt;
        file.Write(bat);
        byte[] result = file.ToArray();
        Span<byte> metadata = result.AsSpan(metadataAt, Mega);
        int items = BinaryPrimitives.ReadUInt16LittleEndian(metadata[10..]);
        for (int i = 0; i < items; i++)
        {
            ReadOnlySpan<byte> entry = metadata.Slice(32 + (i * 32), 32);
            if (new Guid(entry[..16]) == new Guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B"))
                metadata[BinaryPrimitives.ReadInt32LittleEndian(entry[16..]) + 4] = 2;
        }
        byte[] locator = Locator([("parent_linkage", $"{{{parent}}}"), .. names]);
        const int LocatorAt = 0x2_0000;
        locator.CopyTo(metadata[LocatorAt..]);
        BinaryPrimitives.WriteInt16LittleEndian(metadata[10..], (short)(items + 1));
        Span<byte> item = metadata.Slice(32 + (items * 32), 32);
        new Guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C").TryWriteBytes(item);
        BinaryPrimitives.WriteInt32LittleEndian(item[16..], LocatorAt);
        BinaryPrimitives.WriteInt32LittleEndian(item[20..], locator.Length);
        BinaryPrimitives.WriteInt32LittleEndian(item[24..], 4);
        File.WriteAllBytes(path, result);
    }

    /// <summary>The id that overlays of a VHDX remember, from the header in force.</summary>
    public static Guid VhdxId(string path)
    {
        byte[] bytes = File.ReadAllBytes(path);
        ReadOnlySpan<byte> first = bytes.AsSpan(0x1_0000, 4096);
        ReadOnlySpan<byte> second = bytes.AsSpan(0x2_0000, 4096);
        bool firstWins = BinaryPrimitives.ReadUInt64LittleEndian(first[8..]) >= BinaryPrimitives.ReadUInt64LittleEndian(second[8..]);
        return new Guid((firstWins ? first : second).Slice(32, 16));
    }

    private static byte[] Locator((string Key, string Value)[] entries)
    {
        byte[] bytes = new byte[20 + (entries.Length * 12)];
        new Guid("B04AEFB7-D19E-4A81-B789-25B8E9445913").TryWriteBytes(bytes);
        BinaryPrimitives.WriteInt16LittleEndian(bytes.AsSpan(18), (short)entries.Length);
        List<byte> all = [];
        for (int i = 0; i < entries.Length; i++)
        {
            byte[] key = Encoding.Unicode.GetBytes(entries[i].Key);
            byte[] value = Encoding.Unicode.GetBytes(entries[i].Value);
            Span<byte> entry = bytes.AsSpan(20 + (i * 12), 12);
            BinaryPrimitives.WriteInt32LittleEndian(entry, bytes.Length + all.Count);
            all.AddRange(key);
            BinaryPrimitives.WriteInt32LittleEndian(entry[4..], bytes.Length + all.Count);
            all.AddRange(value);
            BinaryPrimitives.WriteInt16LittleEndian(entry[8..], (short)key.Length);
            BinaryPrimitives.WriteInt16LittleEndian(entry[10..], (short)value.Length);
        }
        return [.. bytes, .. all];
    }

    private static void Sum(Span<byte> data, int at)
    {
        data.Slice(at, 4).Clear();
        uint sum = 0;
        foreach (byte value in data)
            sum += value;
        BinaryPrimitives.WriteUInt32BigEndian(data[at..], ~sum);
    }
}
