using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Text;
using Kvasir.Boot.Acpi;
using Kvasir.Boot.Kernels;
using Kvasir.Core;

namespace Kvasir.Boot.Firmware;

/// <summary>Selector keys of items that are no files (the fw_cfg interface, as SeaBIOS and OVMF read it).</summary>
public enum FwCfgKey : ushort
{
    Uuid = 0x02,
    RamSize = 0x03,
    NoGraphic = 0x04,
    ProcessorCount = 0x05,
    KernelAddress = 0x07,
    KernelSize = 0x08,
    InitrdAddress = 0x0a,
    InitrdSize = 0x0b,
    Numa = 0x0d,
    BootMenu = 0x0e,
    MaximumProcessors = 0x0f,
    KernelEntry = 0x10,
    KernelData = 0x11,
    InitrdData = 0x12,
    CommandLineAddress = 0x13,
    CommandLineSize = 0x14,
    CommandLineData = 0x15,
    SetupAddress = 0x16,
    SetupSize = 0x17,
    SetupData = 0x18,
    Irq0Override = 0x8002,
}

/// <summary>One item for the fw_cfg device: under a key, or a file under a name.</summary>
public readonly record struct FwCfgItem
{
    /// <summary>Longest file name in bytes.</summary>
    public const int MaximumName = 55;

    private FwCfgItem(FwCfgKey? key, string? name, ReadOnlyMemory<byte> content)
    {
        Key = key;
        Name = name;
        Content = content;
    }

    /// <summary>Null for a file.</summary>
    public FwCfgKey? Key { get; }

    /// <summary>Null for an item with a key.</summary>
    public string? Name { get; }
    public ReadOnlyMemory<byte> Content { get; }

    public static FwCfgItem Keyed(FwCfgKey key, ReadOnlyMemory<byte> content) => new(key, null, content);

    public static FwCfgItem File(string name, ReadOnlyMemory<byte> content)
    {
        if (name.Length is 0 or > MaximumName)
            throw new ArgumentException($"'{name}' is no fw_cfg file name", nameof(name));
        return new FwCfgItem(null, name, content);
    }

    internal static FwCfgItem U16(FwCfgKey key, ushort value) => Keyed(key, new TableWriter().U16(value).ToArray());

    internal static FwCfgItem U32(FwCfgKey key, uint value) => Keyed(key, new TableWriter().U32(value).ToArray());
}

/// <summary>A device that firmware may boot from.</summary>
/// <param name="Path">Its firmware device path (IEEE 1275).</param>
/// <param name="IsHardDisk">A hard disk, of which a BIOS by itself tries the first alone.</param>
public readonly record struct BootChoice(string Path, bool IsHardDisk);

/// <summary>What firmware asks the VM for through fw_cfg.</summary>
public static class FwCfgContent
{
    /// <summary>Where the 16-bit setup code of a Linux kernel goes when firmware starts it, and its command line.</summary>
    private const uint SetupAddress = 0x1_0000;
    private const uint CommandLineAddress = 0x2_0000;
    private const uint KernelAddress = 0x10_0000;

    // Fields of the Linux setup header that a boot loader fills in.
    private const int VideoMode = 0x1fa;
    private const int TypeOfLoader = 0x210;
    private const int LoadFlags = 0x211;
    private const int RamdiskImage = 0x218;
    private const int RamdiskSize = 0x21c;
    private const int HeapEnd = 0x224;
    private const int CommandLinePointer = 0x228;
    private const byte CanUseHeap = 0x80;

    /// <summary>Items that describe the board: sizes, memory map, ACPI and SMBIOS tables.</summary>
    /// <param name="bootOrder">What is tried first to last; none leaves the order to the firmware.</param>
    /// <param name="bootMenu">Firmware offers a boot menu.</param>
    public static IReadOnlyList<FwCfgItem> Board(GuestMemory memory, BoardDescription board, IReadOnlyList<BootChoice> bootOrder, bool bootMenu = false)
    {
        int processors = board.ApicIds.Count;
        List<FwCfgItem> items =
        [
            FwCfgItem.Keyed(FwCfgKey.Uuid, board.Identity.Uuid.ToByteArray(bigEndian: true)),
            FwCfgItem.Keyed(FwCfgKey.RamSize, new TableWriter().U64(memory.Size).ToArray()),
            FwCfgItem.U16(FwCfgKey.NoGraphic, (ushort)(board.HasVga ? 0 : 1)),
            FwCfgItem.U16(FwCfgKey.ProcessorCount, (ushort)processors),
            FwCfgItem.U16(FwCfgKey.MaximumProcessors, (ushort)processors),
            FwCfgItem.U16(FwCfgKey.BootMenu, (ushort)(bootMenu ? 1 : 0)),
            // No NUMA nodes: their number, then a node for each processor.
            FwCfgItem.Keyed(FwCfgKey.Numa, new byte[8 * (1 + processors)]),
            FwCfgItem.U32(FwCfgKey.Irq0Override, 1),
            FwCfgItem.File("etc/e820", RamMap(memory)),
            FwCfgItem.File("etc/system-states", SystemStates(board)),
        ];
        if (bootMenu)
            items.Add(FwCfgItem.File("etc/boot-menu-wait", new TableWriter().U16(5000).ToArray()));
        if (bootOrder.Count > 0)
            AddBootOrder(items, bootOrder);
        SmbiosTables smbios = SmbiosTables.Build(board, memory.LowSize, memory.HighSize);
        items.Add(FwCfgItem.File(SmbiosTables.TablesFile, smbios.Structures.ToArray()));
        items.Add(FwCfgItem.File(SmbiosTables.AnchorFile, smbios.FitsVersion2 ? smbios.EntryPoint2(0) : smbios.EntryPoint3(0)));
        if (board.HasAcpi)
        {
            AcpiTables acpi = AcpiTables.Build(board);
            items.Add(FwCfgItem.File(AcpiTables.TablesFile, acpi.Tables));
            items.Add(FwCfgItem.File(AcpiTables.RsdpFile, acpi.Rsdp));
            items.Add(FwCfgItem.File("etc/table-loader", acpi.LoaderScript()));
        }
        return items;
    }

    /// <summary>Items that have firmware start a Linux bzImage: its setup code with the fields filled in, its code, command line, RAM disk.</summary>
    /// <exception cref="BootException">No bzImage, or something does not fit.</exception>
    public static IReadOnlyList<FwCfgItem> LinuxBoot(GuestMemory memory, BootRequest request)
    {
        LinuxSetupHeader header = LinuxSetupHeader.Read(request.Kernel.Span);
        if (header.Version < 0x202)
            throw new BootException($"firmware cannot start a kernel of boot protocol {header.VersionText}, which is older than 2.02");
        if (request.Modules.Count > 1)
            throw new BootException($"Linux takes one initial RAM disk, {request.Modules.Count} were given");
        byte[] commandLine = BootText.ToBytes(request.CommandLine, "command line");
        if (commandLine.Length - 1 > header.CommandLineSize)
            throw new BootException($"the command line has {commandLine.Length - 1} bytes, the kernel takes {header.CommandLineSize}");
        if (header.KernelOffset > CommandLineAddress - SetupAddress)
            throw new BootException("the kernel's setup code is larger than 64 KiB");

        ReadOnlyMemory<byte> initrd = request.Modules.Count == 1 ? request.Modules[0].Content : default;
        uint initrdAddress = initrd.IsEmpty ? 0 : InitrdAddress(memory, header, initrd.Length);
        byte[] setup = request.Kernel.Span[..header.KernelOffset].ToArray();
        BinaryPrimitives.WriteUInt16LittleEndian(setup.AsSpan(VideoMode), 0xffff);
        setup[TypeOfLoader] = 0xff;
        setup[LoadFlags] |= CanUseHeap;
        BinaryPrimitives.WriteUInt16LittleEndian(setup.AsSpan(HeapEnd), (ushort)(CommandLineAddress - SetupAddress - 0x200));
        BinaryPrimitives.WriteUInt32LittleEndian(setup.AsSpan(RamdiskImage), initrdAddress);
        BinaryPrimitives.WriteUInt32LittleEndian(setup.AsSpan(RamdiskSize), (uint)initrd.Length);
        BinaryPrimitives.WriteUInt32LittleEndian(setup.AsSpan(CommandLinePointer), CommandLineAddress);
        ReadOnlyMemory<byte> code = request.Kernel[header.KernelOffset..];
        return
        [
            FwCfgItem.U32(FwCfgKey.KernelAddress, KernelAddress),
            FwCfgItem.U32(FwCfgKey.KernelSize, (uint)code.Length),
            FwCfgItem.U32(FwCfgKey.KernelEntry, KernelAddress),
            FwCfgItem.Keyed(FwCfgKey.KernelData, code),
            FwCfgItem.U32(FwCfgKey.InitrdAddress, initrdAddress),
            FwCfgItem.U32(FwCfgKey.InitrdSize, (uint)initrd.Length),
            FwCfgItem.Keyed(FwCfgKey.InitrdData, initrd),
            FwCfgItem.U32(FwCfgKey.CommandLineAddress, CommandLineAddress),
            FwCfgItem.U32(FwCfgKey.CommandLineSize, (uint)commandLine.Length),
            FwCfgItem.Keyed(FwCfgKey.CommandLineData, commandLine),
            FwCfgItem.U32(FwCfgKey.SetupAddress, SetupAddress),
            FwCfgItem.U32(FwCfgKey.SetupSize, (uint)setup.Length),
            FwCfgItem.Keyed(FwCfgKey.SetupData, setup),
        ];
    }

    /// <summary>The order, with a ROM after each hard disk but the first that starts that disk.</summary>
    private static void AddBootOrder(List<FwCfgItem> items, IReadOnlyList<BootChoice> order)
    {
        StringBuilder lines = new();
        int disks = 0;
        foreach (BootChoice choice in order)
        {
            lines.Append(choice.Path).Append('\n');
            if (!choice.IsHardDisk)
                continue;
            if (disks is > 0 and < DiskRom.MaximumDisks)
            {
                lines.Append(DiskRom.BootPath(disks)).Append('\n');
                items.Add(FwCfgItem.File(DiskRom.FileName(disks), DiskRom.Build(disks)));
            }
            disks++;
        }
        lines[^1] = '\0';
        items.Add(FwCfgItem.File("bootorder", Encoding.ASCII.GetBytes(lines.ToString())));
    }

    /// <summary>RAM as it lies, without the holes that firmware makes itself.</summary>
    private static byte[] RamMap(GuestMemory memory)
    {
        TableWriter map = new();
        map.U64(0).U64(memory.LowSize).U32((uint)AddressRangeKind.Ram);
        if (memory.HighSize > 0)
            map.U64(ChipsetAddresses.FourGiB).U64(memory.HighSize).U32((uint)AddressRangeKind.Ram);
        return map.ToArray();
    }

    /// <summary>For S0 to S5: bit 7, the state can be entered; the rest, its SLP_TYP.</summary>
    private static byte[] SystemStates(BoardDescription board)
    {
        const byte supported = 0x80;
        return
        [
            supported, 0, 0,
            (byte)(ChipsetAddresses.SleepTypeS3 | (board.HasS3 ? supported : 0)),
            0,
            supported | ChipsetAddresses.SleepTypeS5,
        ];
    }

    private static uint InitrdAddress(GuestMemory memory, in LinuxSetupHeader header, int size)
    {
        // Firmware keeps its own tables at the top of low RAM.
        const ulong firmwareRoom = 256 << 10;
        ulong top = Math.Min(memory.LowSize - firmwareRoom, header.InitrdAddressMax + 1ul);
        ulong kernelEnd = Math.Max(header.PreferredAddress, KernelAddress) + header.InitSize;
        if ((ulong)size > top || ((top - (ulong)size) & ~0xffful) < kernelEnd)
        {
            throw new BootException(
                $"the initial RAM disk of {BootMemory.Size((ulong)size)} does not fit into the VM's memory beside the kernel: give the VM more memory");
        }
        return (uint)((top - (ulong)size) & ~0xffful);
    }
}
