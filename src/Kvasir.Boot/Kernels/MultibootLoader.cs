using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>
/// Starts a kernel with a multiboot header (Multiboot Specification 0.6.96): 32-bit ELF files, ELF64 files with such a header (entered in 32-bit
/// mode), and any file whose header gives its addresses (the "a.out kludge").
/// </summary>
internal static class MultibootLoader
{
    private const uint HeaderMagic = 0x1bad_b002;
    private const uint LoaderMagic = 0x2bad_b002;

    /// <summary>The header lies wholly within this many bytes, on a multiple of four.</summary>
    private const int SearchLength = 8192;
    private const int MinimumHeader = 12;
    private const int AddressHeader = 32;
    private const int InfoSize = 88;
    private const ulong DataFrom = 0x9000;
    private const string LoaderName = "Kvasir";

    [Flags]
    private enum HeaderFlags : uint
    {
        None = 0,
        AlignModules = 1 << 0,
        MemoryInfo = 1 << 1,

        /// <summary>A wish, as boot loaders take it: a kernel must cope with the mode it gets.</summary>
        VideoMode = 1 << 2,
        Known = AlignModules | MemoryInfo | VideoMode,
        Required = 0xffff,
        Addresses = 1 << 16,
    }

    [Flags]
    private enum InfoFlags : uint
    {
        None = 0,
        Memory = 1 << 0,
        CommandLine = 1 << 2,
        Modules = 1 << 3,
        MemoryMap = 1 << 6,
        LoaderName = 1 << 9,
    }

    /// <summary>Looks for a header.</summary>
    /// <returns>Its offset in the file, or -1.</returns>
    public static int FindHeader(ReadOnlySpan<byte> file)
    {
        int end = Math.Min(file.Length, SearchLength);
        for (int at = 0; at + MinimumHeader <= end; at += 4)
        {
            if (U32(file, at) == HeaderMagic && U32(file, at) + U32(file, at + 4) + U32(file, at + 8) == 0)
                return at;
        }
        return -1;
    }

    public static LoadedKernel Load(BootMemory memory, BoardDescription board, BootRequest request, FirmwareTables tables, int headerOffset)
    {
        ReadOnlySpan<byte> file = request.Kernel.Span;
        HeaderFlags flags = (HeaderFlags)U32(file, headerOffset + 4);
        HeaderFlags unknown = flags & HeaderFlags.Required & ~HeaderFlags.Known;
        if (unknown != 0)
            throw new BootException($"the kernel's multiboot header requires features that do not exist (flags 0x{(uint)unknown:x})");
        ulong entry;
        ulong end;
        string format;
        if ((flags & HeaderFlags.Addresses) != 0)
        {
            entry = LoadByAddresses(memory, file, headerOffset, out end);
            format = "by its address fields";
        }
        else if (ElfImage.IsElf(file))
        {
            ElfImage elf = ElfImage.Read(file);
            end = elf.Load(memory, file);
            entry = elf.PhysicalEntry;
            format = elf.Is64Bit ? "ELF64" : "ELF32";
        }
        else
        {
            throw new BootException("the kernel has a multiboot header, but is neither ELF nor gives its addresses in the header");
        }
        if (entry > uint.MaxValue || !memory.IsRam(entry, 1))
            throw new BootException($"the kernel's entry 0x{entry:x} does not lie in the VM's memory below 4 GiB");

        ulong info = PlaceInfo(memory, request, tables, end);
        ulong gdt = Place(memory, "GDT", EntryState.WriteGdt(long64: false));
        CpuState cpu = EntryState.Protected32((uint)entry, gdt, board);
        cpu.Gpr[0] = LoaderMagic;
        cpu.Gpr[3] = info;
        return new LoadedKernel(KernelKind.Multiboot, $"multiboot, {format}", cpu, [.. memory.Placed], tables.Map);
    }

    /// <summary>Loads one run of bytes to where the header says.</summary>
    private static ulong LoadByAddresses(BootMemory memory, ReadOnlySpan<byte> file, int headerOffset, out ulong end)
    {
        if (headerOffset + AddressHeader > file.Length)
            throw new BootException("the kernel is truncated: its multiboot header ends before its address fields");
        ulong headerAddress = U32(file, headerOffset + 12);
        ulong load = U32(file, headerOffset + 16);
        ulong loadEnd = U32(file, headerOffset + 20);
        ulong bssEnd = U32(file, headerOffset + 24);
        ulong entry = U32(file, headerOffset + 28);
        if (load > headerAddress || headerAddress - load > (ulong)headerOffset)
            throw new BootException($"the multiboot header contradicts itself: it stands at 0x{headerAddress:x}, loading starts at 0x{load:x}");
        int start = headerOffset - (int)(headerAddress - load);
        ulong available = (ulong)(file.Length - start);
        ulong length = loadEnd == 0 ? available : loadEnd - load;
        if (loadEnd != 0 && loadEnd < load)
            throw new BootException($"the multiboot header's load end 0x{loadEnd:x} lies before its start 0x{load:x}");
        if (length > available)
            throw new BootException($"the kernel is truncated: its multiboot header gives {length} bytes to load, the file has {available}");
        ulong kept = length;
        if (bssEnd != 0)
        {
            if (bssEnd < load + length)
                throw new BootException($"the multiboot header's bss end 0x{bssEnd:x} lies inside what is loaded");
            kept = bssEnd - load;
        }
        memory.Reserve("kernel", load, kept);
        memory.Write(load, file.Slice(start, (int)length));
        memory.Clear(load + length, kept - length);
        end = Math.Max(load + kept, ChipsetAddresses.OneMiB);
        return entry;
    }

    /// <summary>Writes modules, strings, memory map and the information structure (3.3, "Boot information format").</summary>
    private static ulong PlaceInfo(BootMemory memory, BootRequest request, FirmwareTables tables, ulong kernelEnd)
    {
        IReadOnlyList<PlacedModule> modules = PlacedModule.PlaceAll(memory, request.Modules, kernelEnd, DataFrom);
        TableWriter list = new();
        foreach (PlacedModule module in modules)
            list.U32((uint)module.Start).U32((uint)(module.Start + module.Length)).U32((uint)module.Arguments).U32(0);
        // The kernel's own name comes first, as after any multiboot loader.
        string line = request.CommandLine.Length == 0 ? request.KernelName : request.KernelName + " " + request.CommandLine;
        TableWriter map = new();
        ulong upperKb = 0;
        foreach (AddressRange range in tables.Map)
        {
            // The size field does not count itself.
            map.U32(AddressMap.EntrySize).U64(range.Start).U64(range.Length).U32((uint)range.Kind);
            if (range is { Start: ChipsetAddresses.OneMiB, Kind: AddressRangeKind.Ram })
                upperKb = range.Length >> 10;
        }
        InfoFlags flags = InfoFlags.Memory | InfoFlags.CommandLine | InfoFlags.MemoryMap | InfoFlags.LoaderName;
        if (modules.Count > 0)
            flags |= InfoFlags.Modules;
        uint commandLine = (uint)Place(memory, "command line", BootText.ToBytes(line, "command line"));
        uint moduleList = modules.Count > 0 ? (uint)Place(memory, "module list", list.Written) : 0;
        uint memoryMap = (uint)Place(memory, "memory map", map.Written);
        uint name = (uint)Place(memory, "boot loader name", BootText.ToBytes(LoaderName, "boot loader name"));

        TableWriter info = new();
        info.U32((uint)flags).U32((uint)(ChipsetAddresses.Ebda >> 10)).U32((uint)upperKb).U32(0).U32(commandLine);
        info.U32((uint)modules.Count).U32(moduleList).Zero(16);
        info.U32((uint)map.Length).U32(memoryMap).Zero(12).U32(name);
        info.Zero(InfoSize - info.Length);
        return Place(memory, "multiboot information", info.Written);
    }

    private static ulong Place(BootMemory memory, string what, ReadOnlySpan<byte> content)
    {
        ulong address = memory.ReserveLowest(what, (ulong)content.Length, 16, DataFrom, ChipsetAddresses.Ebda);
        memory.Write(address, content);
        return address;
    }

    private static uint U32(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(file[offset..]);
}
