using System;
using Kvasir.Core;

namespace Kvasir.Boot.Firmware;

/// <summary>
/// A firmware image in ROM: it ends at 4 GiB, where the reset vector is. Its last 128 KiB show below 1 MiB, too, where real-mode code runs from: there as a copy in RAM,
/// as the chipset's shadowing (PAM) leaves it, which firmware changes as it likes and each reset makes anew.
/// </summary>
public static class FirmwareImage
{
    /// <summary>Smallest and largest image, in bytes. Above the largest, it would reach the local APIC.</summary>
    public const int MinimumSize = 64 << 10;
    public const int MaximumSize = 16 << 20;
    private const int ShadowSize = 128 << 10;

    /// <summary>
    /// Maps an image below 4 GiB. Once in a VM's life, before it runs: ROM keeps its contents over resets. Afterwards <see cref="CpuState.AtReset"/> starts it.
    /// </summary>
    /// <exception cref="BootException">The image has a size that no firmware has.</exception>
    public static void Map(GuestMemory memory, ReadOnlySpan<byte> image)
    {
        if (image.Length is < MinimumSize or > MaximumSize)
        {
            throw new BootException(
                $"the firmware has {BootMemory.Size((ulong)image.Length)}, it must have 64 KiB to 16 MiB");
        }
        if (image.Length % GuestMemory.PageSize != 0)
            throw new BootException($"the firmware has {image.Length} bytes, which is no multiple of 4 KiB: it must end at the reset vector");
        memory.AddRom(new Gpa(ChipsetAddresses.FourGiB - (ulong)image.Length), image);
    }

    /// <summary>Copies the image's end to below 1 MiB, at each reset.</summary>
    public static void Shadow(GuestMemory memory, ReadOnlySpan<byte> image)
    {
        ReadOnlySpan<byte> shadow = image[^Math.Min(image.Length, ShadowSize)..];
        if (!memory.TryWrite(new Gpa(ChipsetAddresses.OneMiB - (ulong)shadow.Length), shadow))
            throw new BootException("there is no RAM below 1 MiB for the firmware");
    }
}
