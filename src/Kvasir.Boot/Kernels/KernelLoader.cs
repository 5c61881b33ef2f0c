using System;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>Starts an operating system without firmware.</summary>
public static class KernelLoader
{
    /// <summary>
    /// Recognises a kernel file, loads it with its modules, its command line and the firmware tables of the board. What a file is, is tried in
    /// this order: an ELF file with a PVH note; any file with a multiboot header in its first 8 KiB; a Linux bzImage. PVH comes first because it
    /// hands over the whole memory map and the RSDP, which multiboot cannot.
    /// </summary>
    /// <param name="memory">The VM's memory; on a restart the loader writes all that it needs anew.</param>
    /// <returns>The boot processor's state at the kernel's entry, and what lies where.</returns>
    /// <exception cref="BootException">The file is not one this loader knows, is damaged, or does not fit. Memory is then undefined.</exception>
    public static LoadedKernel Load(GuestMemory memory, BoardDescription board, BootRequest request)
    {
        ReadOnlySpan<byte> file = request.Kernel.Span;
        BootMemory layout = new(memory);
        FirmwareTables tables = FirmwareTables.Place(memory, layout, board);
        ElfImage? elf = ElfImage.IsElf(file) ? ElfImage.Read(file) : null;
        if (elf is not null && PvhLoader.TryFindEntry(elf, file, out uint entry))
            return PvhLoader.Load(layout, board, request, tables, elf, entry);
        int header = MultibootLoader.FindHeader(file);
        if (header >= 0)
            return MultibootLoader.Load(layout, board, request, tables, header);
        if (elf is not null)
            throw new BootException("the kernel is an ELF file with neither a PVH note nor a multiboot header: if it is Linux, use its bzImage");
        if (LinuxSetupHeader.IsPresent(file))
            return LinuxLoader.Load(layout, board, request, tables);
        throw new BootException(Unknown(file));
    }

    /// <summary>Names what a file that is no kernel may be instead.</summary>
    private static string Unknown(ReadOnlySpan<byte> file)
    {
        const string known = "this loader knows bzImage, ELF with a PVH note, and multiboot";
        if (file.IsEmpty)
            return "the kernel file is empty";
        if (file.StartsWith((ReadOnlySpan<byte>)[0x1f, 0x8b]))
            return "the kernel file is compressed with gzip: unpack it first; " + known;
        if (file.StartsWith("MZ"u8))
            return "the kernel file is an EFI or DOS program without a Linux header; " + known;
        if (file.StartsWith((ReadOnlySpan<byte>)[0xd6, 0x50, 0x52, 0xe8]))
            return "the kernel has a multiboot 2 header only; " + known;
        if (file.Length < 1024)
            return $"the kernel file has only {file.Length} bytes and no known header; {known}";
        return "the file is no kernel that can be started without firmware; " + known;
    }
}
