using System;
using System.Collections.Generic;
using System.Text;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Boot.Tests;

/// <summary>Reads back what a loader left in guest memory.</summary>
internal static class GuestReader
{
    public static byte[] Bytes(this GuestMemory memory, ulong address, int length)
    {
        byte[] bytes = new byte[length];
        Assert.True(memory.TryRead(new Gpa(address), bytes), $"0x{address:x} is no memory");
        return bytes;
    }

    public static uint U32(this GuestMemory memory, ulong address) => BitConverter.ToUInt32(memory.Bytes(address, 4));

    public static ulong U64(this GuestMemory memory, ulong address) => BitConverter.ToUInt64(memory.Bytes(address, 8));

    public static ushort U16(this GuestMemory memory, ulong address) => BitConverter.ToUInt16(memory.Bytes(address, 2));

    public static byte U8(this GuestMemory memory, ulong address) => memory.Bytes(address, 1)[0];

    public static string Text(this GuestMemory memory, ulong address)
    {
        List<byte> bytes = [];
        for (byte b; (b = memory.U8(address)) != 0; address++)
            bytes.Add(b);
        return Encoding.UTF8.GetString([.. bytes]);
    }

    /// <summary>Walks 4-level page tables in guest memory.</summary>
    public static ulong? Translate(this GuestMemory memory, ulong cr3, ulong address)
    {
        ulong table = cr3;
        for (int level = 3; level >= 0; level--)
        {
            int shift = 12 + level * 9;
            ulong entry = memory.U64(table + ((address >> shift) & 0x1ff) * 8);
            if ((entry & 1) == 0)
                return null;
            ulong frame = entry & 0x000f_ffff_ffff_f000;
            if (level == 0 || (entry & 0x80) != 0)
                return frame + (address & ((1ul << shift) - 1));
            table = frame;
        }
        return null;
    }
}
