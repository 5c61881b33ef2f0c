using System;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Firmware;

/// <summary>
/// What CMOS memory says of the machine (Phoenix "BIOS CMOS Memory Map"; bytes 34h to 5Dh as SeaBIOS reads them): memory sizes, equipment, floppy drives.
/// </summary>
public static class CmosContent
{
    // CMOS registers, by index.
    private const byte FloppyTypes = 0x10;
    private const byte Equipment = 0x14;
    private const byte BaseMemory = 0x15;
    private const byte ExtendedMemory = 0x17;
    private const byte ChecksumHigh = 0x2e;
    private const byte ChecksumLow = 0x2f;
    private const byte ExtendedMemoryFound = 0x30;
    private const byte MemoryAbove16MiB = 0x34;
    private const byte MemoryAbove4GiB = 0x5b;
    private const byte FirstSummed = 0x10;

    private const ulong KiB = 1ul << 10;
    private const ulong MiB = 1ul << 20;
    private const ulong Unit = 64 * KiB;

    /// <summary>Bytes to put into CMOS memory, by index.</summary>
    /// <param name="floppyDrives">Floppy drives: 1.44 MB each, 2 at most.</param>
    public static IReadOnlyDictionary<byte, byte> Build(GuestMemory memory, BoardDescription board, int floppyDrives = 0)
    {
        ArgumentOutOfRangeException.ThrowIfGreaterThan((uint)floppyDrives, 2u);
        const byte floppy144 = 4;
        const byte coprocessor = 0x02;
        const byte ps2Mouse = 0x04;
        const byte floppyPresent = 0x01;
        SortedDictionary<byte, byte> content = [];
        content[FloppyTypes] = (byte)((floppyDrives > 0 ? floppy144 << 4 : 0) | (floppyDrives > 1 ? floppy144 : 0));
        content[Equipment] = (byte)(coprocessor
            | (board.HasKeyboardController ? ps2Mouse : 0)
            | (floppyDrives > 0 ? floppyPresent | ((floppyDrives - 1) << 6) : 0));
        Word(content, BaseMemory, 640);
        ushort extended = (ushort)Math.Min((memory.LowSize - MiB) / KiB, 63 * 1024);
        Word(content, ExtendedMemory, extended);
        Word(content, ExtendedMemoryFound, extended);
        Word(content, MemoryAbove16MiB, memory.LowSize > 16 * MiB ? (ushort)((memory.LowSize - 16 * MiB) / Unit) : (ushort)0);
        ulong high = Math.Min(memory.HighSize / Unit, 0xff_ffff);
        Word(content, MemoryAbove4GiB, (ushort)high);
        content[MemoryAbove4GiB + 2] = (byte)(high >> 16);
        ushort sum = 0;
        foreach ((byte index, byte value) in content)
        {
            if (index is >= FirstSummed and < ChecksumHigh)
                sum += value;
        }
        content[ChecksumHigh] = (byte)(sum >> 8);
        content[ChecksumLow] = (byte)sum;
        return content;
    }

    private static void Word(SortedDictionary<byte, byte> content, byte index, ushort value)
    {
        content[index] = (byte)value;
        content[(byte)(index + 1)] = (byte)(value >> 8);
    }
}
