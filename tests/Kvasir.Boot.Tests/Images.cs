using System;
using System.Buffers.Binary;
using System.Collections.Generic;

namespace Kvasir.Boot.Tests;

/// <summary>Small kernel images made in the test, valid unless a test spoils them.</summary>
internal static class Images
{
    public const int SetupSectors = 4;
    public const int KernelOffset = (SetupSectors + 1) * 512;

    /// <summary>A bzImage of the given boot protocol whose code is a recognisable pattern.</summary>
    public static byte[] BzImage(
        ushort version = 0x20f, bool kernel64 = true, bool relocatable = true, ulong preferred = 0x100_0000, uint initSize = 0x80_0000, int codeSize = 0x8000)
    {
        byte[] image = new byte[KernelOffset + codeSize];
        image[0x1f1] = SetupSectors;
        Put32(image, 0x1f4, (uint)((codeSize + 15) / 16));
        Put16(image, 0x1fe, 0xaa55);
        image[0x200] = 0xeb;
        image[0x201] = version switch { >= 0x20a => 0x6a, >= 0x206 => 0x46, >= 0x203 => 0x2e, _ => 0x2a };
        Put32(image, 0x202, 0x5372_6448);
        Put16(image, 0x206, version);
        image[0x211] = 1;
        Put32(image, 0x214, 0x10_0000);
        Put32(image, 0x22c, 0x7fff_ffff);
        Put32(image, 0x230, 0x20_0000);
        image[0x234] = (byte)(relocatable ? 1 : 0);
        image[0x235] = 21;
        Put16(image, 0x236, (ushort)(kernel64 ? 0x7f : 0));
        Put32(image, 0x238, 2047);
        Put64(image, 0x258, preferred);
        Put32(image, 0x260, initSize);
        for (int i = KernelOffset; i < image.Length; i++)
            image[i] = (byte)(i * 7 + 3);
        return image;
    }

    public readonly record struct Segment(ulong Address, byte[] Content, ulong MemorySize, ulong VirtualAddress);

    /// <summary>An ELF executable with PT_LOAD segments and, where given, a PVH note.</summary>
    public static byte[] Elf(bool wide, ulong entry, IReadOnlyList<Segment> segments, ulong? pvhEntry = null)
    {
        int headerSize = wide ? 64 : 52;
        int programSize = wide ? 56 : 32;
        int count = segments.Count + (pvhEntry is null ? 0 : 1);
        List<byte> image = [.. new byte[headerSize + programSize * count]];
        byte[] head = new byte[headerSize];
        ((ReadOnlySpan<byte>)[0x7f, (byte)'E', (byte)'L', (byte)'F', (byte)(wide ? 2 : 1), 1, 1]).CopyTo(head);
        Put16(head, 16, 2);
        Put16(head, 18, (ushort)(wide ? 62 : 3));
        Put32(head, 20, 1);
        if (wide)
        {
            Put64(head, 24, entry);
            Put64(head, 32, 64);
            Put16(head, 52, 64);
            Put16(head, 54, 56);
            Put16(head, 56, (ushort)count);
        }
        else
        {
            Put32(head, 24, (uint)entry);
            Put32(head, 28, 52);
            Put16(head, 40, 52);
            Put16(head, 42, 32);
            Put16(head, 44, (ushort)count);
        }
        List<byte> programs = [];
        foreach (Segment segment in segments)
        {
            programs.AddRange(Program(wide, 1, (ulong)image.Count, segment.VirtualAddress, segment.Address, (ulong)segment.Content.Length, segment.MemorySize));
            image.AddRange(segment.Content);
        }
        if (pvhEntry is ulong start)
        {
            while (image.Count % 4 != 0)
                image.Add(0);
            byte[] note = new byte[wide ? 24 : 20];
            Put32(note, 0, 4);
            Put32(note, 4, (uint)(wide ? 8 : 4));
            Put32(note, 8, 18);
            "Xen\0"u8.CopyTo(note.AsSpan(12));
            Put32(note, 16, (uint)start);
            programs.AddRange(Program(wide, 4, (ulong)image.Count, 0, 0, (ulong)note.Length, (ulong)note.Length));
            image.AddRange(note);
        }
        byte[] result = [.. image];
        head.CopyTo(result, 0);
        programs.CopyTo(result, headerSize);
        return result;
    }

    /// <summary>A multiboot header with its checksum; the address fields follow when there are any.</summary>
    public static byte[] MultibootHeader(uint flags, params uint[] addresses)
    {
        byte[] header = new byte[12 + addresses.Length * 4];
        Put32(header, 0, 0x1bad_b002);
        Put32(header, 4, flags);
        Put32(header, 8, (uint)-(0x1bad_b002 + flags));
        for (int i = 0; i < addresses.Length; i++)
            Put32(header, 12 + i * 4, addresses[i]);
        return header;
    }

    public static void Put16(byte[] image, int offset, ushort value) => BinaryPrimitives.WriteUInt16LittleEndian(image.AsSpan(offset), value);

    public static void Put32(byte[] image, int offset, uint value) => BinaryPrimitives.WriteUInt32LittleEndian(image.AsSpan(offset), value);

    public static void Put64(byte[] image, int offset, ulong value) => BinaryPrimitives.WriteUInt64LittleEndian(image.AsSpan(offset), value);

    private static byte[] Program(bool wide, uint type, ulong offset, ulong virtualAddress, ulong address, ulong size, ulong memorySize)
    {
        byte[] header = new byte[wide ? 56 : 32];
        Put32(header, 0, type);
        if (wide)
        {
            Put32(header, 4, 7);
            Put64(header, 8, offset);
            Put64(header, 16, virtualAddress);
            Put64(header, 24, address);
            Put64(header, 32, size);
            Put64(header, 40, memorySize);
            Put64(header, 48, 4);
        }
        else
        {
            Put32(header, 4, (uint)offset);
            Put32(header, 8, (uint)virtualAddress);
            Put32(header, 12, (uint)address);
            Put32(header, 16, (uint)size);
            Put32(header, 20, (uint)memorySize);
            Put32(header, 24, 7);
            Put32(header, 28, 4);
        }
        return header;
    }
}
