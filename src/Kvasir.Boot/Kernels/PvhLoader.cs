using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>
/// Starts an ELF kernel through its PVH entry (Xen, "x86/HVM direct boot ABI"): 32-bit protected mode without paging, EBX at the start info.
/// Linux, FreeBSD, NetBSD and many unikernels have one.
/// </summary>
internal static class PvhLoader
{
    private const uint Physical32Entry = 18;
    private const uint Magic = 0x336e_c578;
    private const uint Version = 1;
    private const int ModuleEntrySize = 32;
    private const int MemoryEntrySize = 24;

    /// <summary>Loader data goes into conventional memory: nothing may lie at address 0.</summary>
    private const ulong DataFrom = 0x9000;

    private static ReadOnlySpan<byte> XenName => "Xen\0"u8;

    /// <summary>Whether an ELF file has a PVH entry.</summary>
    public static bool TryFindEntry(ElfImage elf, ReadOnlySpan<byte> file, out uint entry)
    {
        ReadOnlySpan<byte> note = elf.FindNote(file, XenName, Physical32Entry);
        entry = 0;
        if (note.Length is not 4 and not 8)
            return false;
        ulong value = note.Length == 8 ? BinaryPrimitives.ReadUInt64LittleEndian(note) : BinaryPrimitives.ReadUInt32LittleEndian(note);
        if (value > uint.MaxValue)
            throw new BootException($"the kernel's PVH entry 0x{value:x} lies above 4 GiB");
        entry = (uint)value;
        return true;
    }

    public static LoadedKernel Load(BootMemory memory, BoardDescription board, BootRequest request, FirmwareTables tables, ElfImage elf, uint entry)
    {
        ulong end = elf.Load(memory, request.Kernel.Span);
        if (!memory.IsRam(entry, 1))
            throw new BootException($"the kernel's PVH entry 0x{entry:x} does not lie in the VM's memory");
        IReadOnlyList<PlacedModule> modules = PlacedModule.PlaceAll(memory, request.Modules, end, DataFrom);
        ulong commandLine = PlaceText(memory, "command line", request.CommandLine);

        TableWriter list = new();
        foreach (PlacedModule module in modules)
            list.U64(module.Start).U64(module.Length).U64(module.Arguments).U64(0);
        ulong moduleList = PlaceTable(memory, "module list", list);
        TableWriter map = new();
        foreach (AddressRange range in tables.Map)
            map.U64(range.Start).U64(range.Length).U32((uint)range.Kind).U32(0);
        ulong memoryMap = PlaceTable(memory, "memory map", map);

        TableWriter info = new();
        info.U32(Magic).U32(Version).U32(0).U32((uint)modules.Count);
        info.U64(moduleList).U64(commandLine).U64(tables.Rsdp).U64(memoryMap).U32((uint)tables.Map.Count).U32(0);
        ulong startInfo = PlaceTable(memory, "PVH start info", info);
        ulong gdt = PlaceTable(memory, "GDT", new TableWriter().Bytes(EntryState.WriteGdt(long64: false)));

        CpuState cpu = EntryState.Protected32(entry, gdt, board);
        cpu.Gpr[3] = startInfo;
        return new LoadedKernel(KernelKind.Pvh, $"{(elf.Is64Bit ? "ELF64" : "ELF32")} with a PVH entry", cpu, [.. memory.Placed], tables.Map);
    }

    private static ulong PlaceText(BootMemory memory, string what, string text)
    {
        byte[] bytes = BootText.ToBytes(text, what);
        ulong address = memory.ReserveLowest(what, (ulong)bytes.Length, 16, DataFrom, ChipsetAddresses.Ebda);
        memory.Write(address, bytes);
        return address;
    }

    /// <returns>Where it stands, or 0 for an empty table.</returns>
    private static ulong PlaceTable(BootMemory memory, string what, TableWriter table)
    {
        if (table.Length == 0)
            return 0;
        ulong address = memory.ReserveLowest(what, (ulong)table.Length, 16, DataFrom, ChipsetAddresses.Ebda);
        memory.Write(address, table.Written);
        return address;
    }
}
