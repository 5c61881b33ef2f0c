using System;
using System.Globalization;
using System.IO;
using System.Reflection;

namespace Kvasir.Boot.Firmware;

/// <summary>
/// The option ROM by which a BIOS tries one more hard disk. SeaBIOS tries the first one alone, whatever order it is given; of a ROM with a bootstrap entry it takes any
/// number into its order. The code is <c>Roms/disk.asm</c>.
/// </summary>
public static class DiskRom
{
    /// <summary>Disks that a BIOS counts, the first one included.</summary>
    public const int MaximumDisks = 16;

    private const int FirstDrive = 0x80;
    private const int ExpansionHeader = 0x1c;
    private const int ExpansionLength = 32;
    private const int ExpansionChecksum = 9;
    private const int Number = 0x41;
    private const int Drive = 0x47;

    /// <summary>The ROM's file in fw_cfg. No name is the beginning of another, which SeaBIOS would take for the same.</summary>
    /// <param name="disk">1 for the second disk, and so on.</param>
    public static string FileName(int disk) => string.Create(CultureInfo.InvariantCulture, $"genroms/disk-{FirstDrive + disk:x2}.bin");

    /// <summary>How the boot order names it.</summary>
    public static string BootPath(int disk) => $"/rom@{FileName(disk)}";

    /// <summary>The ROM that starts a disk.</summary>
    /// <param name="disk">1 for the second disk, and so on.</param>
    public static byte[] Build(int disk)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(disk, 1);
        ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(disk, MaximumDisks);
        using Stream source = Assembly.GetExecutingAssembly().GetManifestResourceStream("rom/disk") ?? throw new InvalidOperationException("the program was built without its ROM");
        byte[] rom = new byte[source.Length];
        source.ReadExactly(rom);
        // As a disk's number, in one letter: 2 to 9, then a to g.
        rom[Number] = (byte)"123456789abcdefg"[disk];
        rom[Drive] = (byte)(FirstDrive + disk);
        rom[ExpansionHeader + ExpansionChecksum] = Negated(rom.AsSpan(ExpansionHeader, ExpansionLength));
        rom[^1] = Negated(rom);
        return rom;
    }

    /// <summary>What makes the bytes add up to zero.</summary>
    private static byte Negated(ReadOnlySpan<byte> bytes)
    {
        byte sum = 0;
        foreach (byte value in bytes)
            sum += value;
        return (byte)-sum;
    }
}
