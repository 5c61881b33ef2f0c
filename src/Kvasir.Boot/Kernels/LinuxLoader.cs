using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>
/// Starts a Linux bzImage without firmware (The Linux/x86 Boot Protocol 2.00 to 2.15): through its 64-bit entry where it has one, else the 32-bit one.
/// The 16-bit setup code is not run: what it would ask a BIOS for is filled in here.
/// </summary>
internal static class LinuxLoader
{
    // Where loader data goes when the place is free: inside conventional memory, clear of what the kernel's own early code uses near its top.
    private const ulong TablesFrom = 0x1000;
    private const ulong CommandLineFrom = 0x2_0000;

    /// <summary>Also where boot sectors put it: kernels before protocol 2.02 count command line offsets from here.</summary>
    private const ulong ZeroPage = 0x9_0000;
    private const ulong OldCommandLine = 0x9_9000;
    private const ulong ConventionalEnd = ChipsetAddresses.Ebda;

    /// <summary>Where a kernel that is not relocatable is loaded.</summary>
    private const ulong HighLoad = 0x10_0000;
    private const ulong Entry64Offset = 0x200;

    // The zero page (struct boot_params), by offset.
    private const int ExtendedMemoryKb = 0x002;
    private const int OldCommandLineMagic = 0x020;
    private const int OldCommandLineOffset = 0x022;
    private const int AcpiRsdpAddress = 0x070;
    private const int AlternateMemoryKb = 0x1e0;
    private const int E820Entries = 0x1e8;
    private const int VideoMode = 0x1fa;
    private const int TypeOfLoader = 0x210;
    private const int Code32Start = 0x214;
    private const int RamdiskImage = 0x218;
    private const int RamdiskSize = 0x21c;
    private const int CommandLinePointer = 0x228;
    private const int E820Table = 0x2d0;
    private const int E820Maximum = 128;

    private const ushort OldCommandLineSignature = 0xa33f;
    private const ushort NormalVideo = 0xffff;
    private const byte UndefinedLoader = 0xff;

    public static LoadedKernel Load(BootMemory memory, BoardDescription board, BootRequest request, FirmwareTables tables)
    {
        ReadOnlySpan<byte> file = request.Kernel.Span;
        LinuxSetupHeader header = LinuxSetupHeader.Read(file);
        if (request.Modules.Count > 1)
            throw new BootException($"Linux takes one initial RAM disk, {request.Modules.Count} were given");

        ulong kernelEnd = PlaceKernel(memory, header, file[header.KernelOffset..], out ulong kernel);
        ulong commandLine = PlaceCommandLine(memory, header, request.CommandLine);
        ulong gdt = memory.ReserveLowest("GDT", EntryState.GdtSize, 16, TablesFrom, ConventionalEnd);
        ulong zeroPage = memory.ReserveLowest("Linux zero page", GuestMemory.PageSize, GuestMemory.PageSize, ZeroPage, ConventionalEnd);
        ulong initrd = 0;
        int initrdSize = 0;
        if (request.Modules.Count == 1)
        {
            ReadOnlySpan<byte> content = request.Modules[0].Content.Span;
            initrdSize = content.Length;
            ulong end = Math.Min(memory.LowEnd, header.InitrdAddressMax + 1ul);
            initrd = memory.ReserveHighest("initial RAM disk", (ulong)initrdSize, GuestMemory.PageSize, kernelEnd, end);
            memory.Write(initrd, content);
        }

        byte[] page = new byte[GuestMemory.PageSize];
        file[LinuxSetupHeader.Start..header.End].CopyTo(page.AsSpan(LinuxSetupHeader.Start));
        WriteMemoryMap(page, tables.Map);
        BinaryPrimitives.WriteUInt64LittleEndian(page.AsSpan(AcpiRsdpAddress), tables.Rsdp);
        BinaryPrimitives.WriteUInt16LittleEndian(page.AsSpan(VideoMode), NormalVideo);
        page[TypeOfLoader] = UndefinedLoader;
        BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(Code32Start), (uint)kernel);
        BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(RamdiskImage), (uint)initrd);
        BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(RamdiskSize), (uint)initrdSize);
        if (header.Version >= 0x202)
        {
            BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(CommandLinePointer), (uint)commandLine);
        }
        else
        {
            BinaryPrimitives.WriteUInt16LittleEndian(page.AsSpan(OldCommandLineMagic), OldCommandLineSignature);
            BinaryPrimitives.WriteUInt16LittleEndian(page.AsSpan(OldCommandLineOffset), (ushort)(commandLine - zeroPage));
        }
        memory.Write(zeroPage, page);
        memory.Write(gdt, EntryState.WriteGdt(header.Has64BitEntry));

        CpuState cpu;
        if (header.Has64BitEntry)
        {
            ulong pageTables = memory.ReserveLowest("page tables", EntryState.IdentityTablesSize, GuestMemory.PageSize, TablesFrom, ConventionalEnd);
            memory.Write(pageTables, EntryState.WriteIdentityTables(pageTables));
            cpu = EntryState.Long64(kernel + Entry64Offset, gdt, pageTables, board);
        }
        else
        {
            cpu = EntryState.Protected32((uint)kernel, gdt, board);
        }
        cpu.Gpr[6] = zeroPage;
        string entry = $"{(header.Has64BitEntry ? "64" : "32")}-bit Linux boot protocol {header.VersionText}";
        return new LoadedKernel(KernelKind.Linux, entry, cpu, [.. memory.Placed], tables.Map);
    }

    /// <summary>Loads the protected-mode kernel and keeps all memory that it uses before it knows the memory map.</summary>
    /// <returns>Where that memory ends.</returns>
    private static ulong PlaceKernel(BootMemory memory, in LinuxSetupHeader header, ReadOnlySpan<byte> code, out ulong load)
    {
        if (header.KernelSize > 0 && header.KernelSize < (ulong)code.Length)
            code = code[..(int)header.KernelSize];
        ulong length = (ulong)code.Length;
        if (header.Has64BitEntry && length <= Entry64Offset)
            throw new BootException("the kernel is truncated: its 64-bit entry is not in the file");
        ulong run;
        if (header.Relocatable)
        {
            // The kernel moves itself up to its preferred address when it is loaded below, so that no lower place would need less memory.
            ulong wanted = Math.Max(header.PreferredAddress, HighLoad);
            run = load = wanted > uint.MaxValue ? wanted : BootMemory.Align(wanted, header.Alignment);
        }
        else
        {
            load = HighLoad;
            run = header.PreferredAddress == 0 ? HighLoad : header.PreferredAddress;
            if (header.Code32Start != HighLoad)
                throw new BootException($"the kernel is not relocatable and wants to be entered at 0x{header.Code32Start:x}, not at 1 MiB");
        }
        if (run > uint.MaxValue)
            throw new BootException($"the kernel wants to run at 0x{run:x}, above 4 GiB");
        if (run == load)
        {
            length = Math.Max(length, header.InitSize);
            memory.Reserve("kernel", load, length);
        }
        else
        {
            // Loaded at 1 MiB, it unpacks itself to where it runs; the two may touch.
            ulong runEnd = run + header.InitSize;
            if (load + length > run)
                length = Math.Max(length, runEnd - load);
            else
                memory.Reserve("kernel's running place", run, header.InitSize);
            memory.Reserve("kernel", load, length);
        }
        memory.Write(load, code);
        return Math.Max(load + length, run + header.InitSize);
    }

    private static ulong PlaceCommandLine(BootMemory memory, in LinuxSetupHeader header, string text)
    {
        byte[] bytes = BootText.ToBytes(text, "command line");
        if (bytes.Length - 1 > header.CommandLineSize)
            throw new BootException($"the command line has {bytes.Length - 1} bytes, the kernel takes {header.CommandLineSize}");
        bool old = header.Version < 0x202;
        ulong address = memory.ReserveLowest("command line", (ulong)bytes.Length, 16, old ? OldCommandLine : CommandLineFrom, ConventionalEnd);
        memory.Write(address, bytes);
        return address;
    }

    private static void WriteMemoryMap(byte[] page, IReadOnlyList<AddressRange> map)
    {
        if (map.Count > E820Maximum)
            throw new BootException($"the memory map has {map.Count} entries, the Linux zero page takes {E820Maximum}");
        page[E820Entries] = (byte)map.Count;
        ulong extendedKb = 0;
        for (int i = 0; i < map.Count; i++)
        {
            AddressRange range = map[i];
            Span<byte> entry = page.AsSpan(E820Table + i * AddressMap.EntrySize);
            BinaryPrimitives.WriteUInt64LittleEndian(entry, range.Start);
            BinaryPrimitives.WriteUInt64LittleEndian(entry[8..], range.Length);
            BinaryPrimitives.WriteUInt32LittleEndian(entry[16..], (uint)range.Kind);
            if (range.Start == ChipsetAddresses.OneMiB && range.Kind == AddressRangeKind.Ram)
                extendedKb = range.Length >> 10;
        }
        // INT 15h AH=88h and E801h: kernels that cannot read the map take these.
        BinaryPrimitives.WriteUInt16LittleEndian(page.AsSpan(ExtendedMemoryKb), (ushort)Math.Min(extendedKb, 0xfc00));
        BinaryPrimitives.WriteUInt32LittleEndian(page.AsSpan(AlternateMemoryKb), (uint)extendedKb);
    }
}
