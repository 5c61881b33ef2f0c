using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Linq;
using System.Text;
using Kvasir.Boot.Acpi;
using Kvasir.Boot.Firmware;
using Kvasir.Boot.Kernels;
using Kvasir.Core;
using Xunit;

namespace Kvasir.Boot.Tests;

public sealed class FirmwareTablesTests
{
    private const ulong MiB = 1ul << 20;

    private static readonly SystemIdentity Identity = new()
    {
        Manufacturer = "Acme", Product = "Anvil", Version = "v2", SerialNumber = "SN-1\n2", AssetTag = "A7", Sku = "K", Family = "Tools",
        Uuid = new Guid("00112233-4455-6677-8899-aabbccddeeff"), ProcessorName = "Test CPU",
    };

    /// <summary>Starts a small kernel, for the tables that come with it.</summary>
    private static LoadedKernel Start(GuestMemory memory, BoardDescription board) =>
        KernelLoader.Load(memory, board, new BootRequest { Kernel = Images.BzImage(preferred: 0x10_0000, initSize: 0x10_0000) });

    private static byte Sum(ReadOnlySpan<byte> range)
    {
        byte sum = 0;
        foreach (byte b in range)
            sum += b;
        return sum;
    }

    [Theory]
    [InlineData(16, 0)]
    [InlineData(64, 0)]
    [InlineData(2816, 0)]
    [InlineData(3072, 1024)]
    [InlineData(65536, 63488)]
    public void TheMapGivesAllRamAndNothingElse(int mebibytes, int high)
    {
        using GuestMemory memory = new((ulong)mebibytes * MiB);
        IReadOnlyList<AddressRange> map = Start(memory, BoardDescription.Q35(2, memory.Size)).Map;
        for (int i = 1; i < map.Count; i++)
            Assert.True(map[i - 1].End <= map[i].Start, "ranges ascend");
        foreach (AddressRange range in map.Where(r => r.Kind is not AddressRangeKind.Reserved))
            Assert.True(memory.IsBacked(range.Start, range.Length));
        Assert.Equal(new AddressRange(0, 0x9_fc00, AddressRangeKind.Ram), map[0]);
        Assert.Contains(new AddressRange(0x9_fc00, 0x400, AddressRangeKind.Reserved), map);
        Assert.Contains(new AddressRange(0xf_0000, 0x1_0000, AddressRangeKind.Reserved), map);
        Assert.Contains(new AddressRange(0xb000_0000, 0x1000_0000, AddressRangeKind.Reserved), map);
        Assert.Contains(new AddressRange(0xfec0_0000, 0x1000, AddressRangeKind.Reserved), map);
        Assert.Contains(new AddressRange(0xfee0_0000, 0x1000, AddressRangeKind.Reserved), map);
        ulong low = map.Where(r => r.Start >= MiB && r.End <= memory.LowSize && r.Kind != AddressRangeKind.Reserved).Aggregate(0ul, (n, r) => n + r.Length);
        Assert.Equal(memory.LowSize - MiB, low);
        Assert.Equal((ulong)high * MiB, map.Where(r => r.Start >= 1ul << 32).Aggregate(0ul, (n, r) => n + r.Length));
        Assert.Equal(AddressRangeKind.AcpiNvs, map.Single(r => r.Start >= MiB && r.Start < memory.LowSize && r.Kind == AddressRangeKind.AcpiNvs).Kind);
    }

    [Fact]
    public void AMachineWithoutPciHasNoEcam()
    {
        using GuestMemory memory = new(64 * MiB);
        IReadOnlyList<AddressRange> map = Start(memory, BoardDescription.Microvm(1) with { HasHpet = false }).Map;
        Assert.DoesNotContain(map, r => r.Start is 0xb000_0000 or 0xfed0_0000);
    }

    [Fact]
    public void TablesInMemoryAreFoundFromTheirAnchors()
    {
        using GuestMemory memory = new(64 * MiB);
        Start(memory, BoardDescription.Q35(4, memory.Size) with { Identity = Identity });
        byte[] segment = memory.Bytes(0xf_0000, 0x1_0000);
        int Find(string anchor) => Enumerable.Range(0, 0x1000).Select(i => i * 16).First(at => segment.AsSpan(at).StartsWith(Encoding.ASCII.GetBytes(anchor)));

        int rsdp = Find("RSD PTR ");
        Assert.Equal(0, Sum(segment.AsSpan(rsdp, 36)));
        ulong xsdt = BinaryPrimitives.ReadUInt64LittleEndian(segment.AsSpan(rsdp + 24));
        Assert.Equal("XSDT", Encoding.ASCII.GetString(memory.Bytes(xsdt, 4)));
        Assert.Equal(0, Sum(memory.Bytes(xsdt, (int)memory.U32(xsdt + 4))));

        int mp = Find("_MP_");
        Assert.Equal(0, Sum(segment.AsSpan(mp, 16)));
        ulong table = BinaryPrimitives.ReadUInt32LittleEndian(segment.AsSpan(mp + 4));
        byte[] config = memory.Bytes(table, memory.U16(table + 4));
        Assert.Equal(0, Sum(config));
        CheckMpTable(config, processors: 4, pciInterrupts: 128);

        int smbios = Find("_SM_");
        Assert.Equal(0, Sum(segment.AsSpan(smbios, 31)));
        Assert.Equal(0, Sum(segment.AsSpan(smbios + 16, 15)));
        int smbios3 = Find("_SM3_");
        Assert.Equal(0, Sum(segment.AsSpan(smbios3, 24)));
        Assert.Equal(
            BinaryPrimitives.ReadUInt32LittleEndian(segment.AsSpan(smbios + 24)), (uint)BinaryPrimitives.ReadUInt64LittleEndian(segment.AsSpan(smbios3 + 16)));
    }

    private static void CheckMpTable(byte[] config, int processors, int pciInterrupts)
    {
        Assert.Equal("PCMP", Encoding.ASCII.GetString(config, 0, 4));
        Dictionary<byte, int> kinds = [];
        int at = 44;
        int entries = 0;
        for (; at < config.Length; entries++)
        {
            kinds[config[at]] = kinds.GetValueOrDefault(config[at]) + 1;
            at += config[at] == 0 ? 20 : 8;
        }
        Assert.Equal(config.Length, at);
        Assert.Equal(BinaryPrimitives.ReadUInt16LittleEndian(config.AsSpan(34)), entries);
        Assert.Equal(processors, kinds[0]);
        Assert.Equal(1, kinds[2]);
        Assert.Equal(15 + pciInterrupts, kinds[3]);
        Assert.Equal(2, kinds[4]);
    }

    [Fact]
    public void TheMpTableOfManyProcessorsStaysInItsPlace()
    {
        byte[] config = MpTable.Build(BoardDescription.Q35(1024, 1ul << 30));
        Assert.InRange(config.Length, 0, 0x3000);
        CheckMpTable(config, processors: 255, pciInterrupts: 128);
        CheckMpTable(MpTable.Build(BoardDescription.Microvm(1)), processors: 1, pciInterrupts: 0);
    }

    [Theory]
    [InlineData(16)]
    [InlineData(3072)]
    [InlineData(65536)]
    [InlineData(16 << 20)]
    public void DmidecodeReadsTheSmbiosTables(long mebibytes)
    {
        ulong size = (ulong)mebibytes * MiB;
        ulong low = size <= GuestMemory.LowRamMaximum ? size : GuestMemory.LowRamLimit;
        SmbiosTables smbios = SmbiosTables.Build(BoardDescription.Q35(6, size) with { Identity = Identity }, low, size - low);
        Assert.True(smbios.FitsVersion2);
        Assert.InRange(smbios.Structures.Length, 0, 0xc000);
        using TemporaryFolder folder = new();
        foreach (byte[] anchor in (byte[][])[smbios.EntryPoint2(32), smbios.EntryPoint3(32)])
        {
            byte[] dump = new byte[32 + smbios.Structures.Length];
            anchor.CopyTo(dump, 0);
            smbios.Structures.CopyTo(dump.AsSpan(32));
            string path = folder.Write("dump.bin", dump);
            (int code, string output) = ExternalTool.Run("dmidecode", folder.Path, "dmidecode", "--from-dump", path);
            Assert.True(code == 0, output);
            foreach (string wrong in (string[])["Wrong", "TRUNCATED", "broken", "OUT OF SPEC", "BAD INDEX", "Invalid"])
                Assert.DoesNotContain(wrong, output, StringComparison.OrdinalIgnoreCase);
            foreach (string expected in (string[])
                ["Manufacturer: Acme", "Product Name: Anvil", "Serial Number: SN-12", "UUID: 00112233-4455-6677-8899-aabbccddeeff", "SKU Number: K",
                    "Core Count: 6", "Version: Test CPU", "System is a virtual machine", "End Of Table", "Asset Tag: A7"])
                Assert.Contains(expected, output, StringComparison.Ordinal);
            Assert.Equal(Math.Clamp((mebibytes + 16383) / 16384, 1, 64), output.Split('\n').Count(l => l.Trim() == "Memory Device"));
            Assert.Equal(size > low ? 2 : 1, output.Split('\n').Count(l => l.Trim() == "Memory Array Mapped Address"));
        }
        // The sizes of the memory modules add up.
        (_, string modules) = ExternalTool.Run("dmidecode", folder.Path, "dmidecode", "--from-dump", System.IO.Path.Combine(folder.Path, "dump.bin"), "-t", "17");
        long total = 0;
        foreach (string line in modules.Split('\n').Select(l => l.Trim()).Where(l => l.StartsWith("Size: ", StringComparison.Ordinal)))
        {
            string[] words = line.Split(' ');
            total += long.Parse(words[1], System.Globalization.CultureInfo.InvariantCulture) * (words[2] switch { "MB" => 1, "GB" => 1024, "TB" => 1 << 20, _ => -1 });
        }
        Assert.Equal(mebibytes, total);
    }

    [Fact]
    public void EachFurtherHardDiskHasARomInTheBootOrder()
    {
        using GuestMemory memory = new(128 * MiB);
        BootChoice[] order = [new("/a", true), new("/cd", false), new("/b", true), new("/c", true)];
        IReadOnlyList<FwCfgItem> items = FwCfgContent.Board(memory, BoardDescription.Q35(1, memory.Size), order);
        string text = Encoding.ASCII.GetString(items.Single(i => i.Name == "bootorder").Content.Span);
        Assert.Equal("/a\n/cd\n/b\n/rom@genroms/disk-81.bin\n/c\n/rom@genroms/disk-82.bin\0", text);
        for (int disk = 1; disk <= 2; disk++)
        {
            byte[] rom = items.Single(i => i.Name == DiskRom.FileName(disk)).Content.ToArray();
            // Option ROM header and PnP expansion header: signatures, sizes, sums.
            Assert.Equal((0xaa55, 512, rom.Length), (BitConverter.ToUInt16(rom), rom[2] * 512, 512));
            Assert.Equal(0, rom.Sum(value => value) & 0xff);
            byte[] expansion = rom[BitConverter.ToUInt16(rom, 0x1a)..][..32];
            Assert.Equal("$PnP", Encoding.ASCII.GetString(expansion, 0, 4));
            Assert.Equal(0, expansion.Sum(value => value) & 0xff);
            Assert.Equal(0x80 + disk, rom[0x47]);
            Assert.StartsWith($"Disk {disk + 1}\0", Encoding.ASCII.GetString(rom, BitConverter.ToUInt16(expansion, 0x10), 8), StringComparison.Ordinal);
        }
        Assert.DoesNotContain(items, item => item.Name == DiskRom.FileName(3));
        // A BIOS counts sixteen.
        items = FwCfgContent.Board(memory, BoardDescription.Q35(1, memory.Size), [.. Enumerable.Range(0, 20).Select(i => new BootChoice($"/{i}", true))]);
        Assert.Equal(15, items.Count(item => item.Name?.StartsWith("genroms/", StringComparison.Ordinal) == true));
    }

    [Fact]
    public void FwCfgHasWhatFirmwareAsksFor()
    {
        using GuestMemory memory = new(4096 * MiB);
        BoardDescription board = BoardDescription.Q35(3, memory.Size) with { Identity = Identity, HasS3 = true };
        IReadOnlyList<FwCfgItem> items = FwCfgContent.Board(memory, board, [new BootChoice("/pci@i0cf8/scsi@3/disk@0,0", true)], bootMenu: true);
        byte[] Key(FwCfgKey key) => items.Single(i => i.Key == key).Content.ToArray();
        byte[] File(string name) => items.Single(i => i.Name == name).Content.ToArray();
        Assert.Equal(4096 * MiB, BitConverter.ToUInt64(Key(FwCfgKey.RamSize)));
        Assert.Equal(new byte[] { 3, 0 }, Key(FwCfgKey.ProcessorCount));
        Assert.Equal(new byte[] { 3, 0 }, Key(FwCfgKey.MaximumProcessors));
        Assert.Equal(32, Key(FwCfgKey.Numa).Length);
        Assert.Equal(Convert.FromHexString("00112233445566778899AABBCCDDEEFF"), Key(FwCfgKey.Uuid));
        byte[] map = File("etc/e820");
        Assert.Equal(40, map.Length);
        Assert.Equal(0x8000_0000ul, BitConverter.ToUInt64(map, 8));
        Assert.Equal(1ul << 32, BitConverter.ToUInt64(map, 20));
        Assert.Equal(0x8000_0000ul, BitConverter.ToUInt64(map, 28));
        Assert.Equal(new byte[] { 0x80, 0, 0, 0x81, 0, 0x80 }, File("etc/system-states"));
        Assert.Equal("/pci@i0cf8/scsi@3/disk@0,0\0", Encoding.ASCII.GetString(File("bootorder")));
        Assert.Equal(31, File(SmbiosTables.AnchorFile).Length);
        Assert.NotEmpty(File(SmbiosTables.TablesFile));
        Assert.Equal(36, File(AcpiTables.RsdpFile).Length);
        Assert.Equal(AcpiTables.Build(board).Tables.ToArray(), File(AcpiTables.TablesFile));
        Assert.Equal(AcpiTables.Build(board).LoaderScript(), File("etc/table-loader"));
        Assert.Equal(items.Count, items.Select(i => i.Name ?? i.Key.ToString()).Distinct().Count());
    }

    [Theory]
    [InlineData(1, 0, 0, 0)]
    [InlineData(16, 15 * 1024, 0, 0)]
    [InlineData(64, 63 * 1024, 768, 0)]
    [InlineData(3072, 63 * 1024, 0x7f00, 0x4000)]
    [InlineData(65536, 63 * 1024, 0x7f00, 0xf_8000)]
    public void CmosGivesTheMemorySizes(int mebibytes, int extendedKb, int above16MiB, int above4GiB)
    {
        using GuestMemory memory = new((ulong)mebibytes * MiB);
        IReadOnlyDictionary<byte, byte> cmos = CmosContent.Build(memory, BoardDescription.Pc(1), floppyDrives: 1);
        Assert.Equal(640, cmos[0x15] | cmos[0x16] << 8);
        Assert.Equal(extendedKb, cmos[0x17] | cmos[0x18] << 8);
        Assert.Equal(extendedKb, cmos[0x30] | cmos[0x31] << 8);
        Assert.Equal(above16MiB, cmos[0x34] | cmos[0x35] << 8);
        Assert.Equal(above4GiB, cmos[0x5b] | cmos[0x5c] << 8 | cmos[0x5d] << 16);
        Assert.Equal(0x40, cmos[0x10]);
        Assert.Equal(cmos.Where(b => b.Key is >= 0x10 and <= 0x2d).Sum(b => b.Value), cmos[0x2e] << 8 | cmos[0x2f]);
    }

    [Fact]
    public void TheHighPciWindowStaysWithinTheProcessorsReach()
    {
        Assert.Equal((1ul << 32, 64ul << 30), Window(1ul << 30, 40));
        Assert.Equal(((4ul + 62) << 30, 64ul << 30), Window(64ul << 30, 40));
        Assert.Equal(((4ul + 1016) << 30, 4ul << 30), Window(1018ul << 30, 40));
        Assert.Equal(0ul, Window(1ul << 40, 40).Size);

        static (ulong Start, ulong Size) Window(ulong memory, int bits)
        {
            PciDescription pci = BoardDescription.Q35(1, memory, bits).Pci!;
            return (pci.HighWindow, pci.HighWindowSize);
        }
    }

    [Fact]
    public void FwCfgHandsOverALinuxKernel()
    {
        using GuestMemory memory = new(512 * MiB);
        byte[] image = Images.BzImage();
        byte[] initrd = new byte[10_000];
        IReadOnlyList<FwCfgItem> items = FwCfgContent.LinuxBoot(
            memory, new BootRequest { Kernel = image, CommandLine = "quiet", Modules = [new BootModule(initrd)] });
        byte[] Key(FwCfgKey key) => items.Single(i => i.Key == key).Content.ToArray();
        Assert.Equal(image[Images.KernelOffset..], Key(FwCfgKey.KernelData));
        Assert.Equal((uint)(image.Length - Images.KernelOffset), BitConverter.ToUInt32(Key(FwCfgKey.KernelSize)));
        Assert.Equal("quiet\0", Encoding.ASCII.GetString(Key(FwCfgKey.CommandLineData)));
        byte[] setup = Key(FwCfgKey.SetupData);
        Assert.Equal(Images.KernelOffset, setup.Length);
        uint at = BitConverter.ToUInt32(Key(FwCfgKey.InitrdAddress));
        Assert.Equal(at, BitConverter.ToUInt32(setup, 0x218));
        Assert.Equal(10_000u, BitConverter.ToUInt32(setup, 0x21c));
        Assert.InRange(at, 0x180_0000u, (uint)memory.LowSize - 10_000);
        Assert.Equal(BitConverter.ToUInt32(Key(FwCfgKey.CommandLineAddress)), BitConverter.ToUInt32(setup, 0x228));
        Assert.Equal(0xff, setup[0x210]);
        Assert.Equal(0x81, setup[0x211]);
        Assert.Throws<BootException>(() => FwCfgContent.LinuxBoot(memory, new BootRequest { Kernel = image, Modules = [new BootModule(new byte[500 << 20])] }));
    }

    [Theory]
    [InlineData(64 << 10)]
    [InlineData(128 << 10)]
    [InlineData(256 << 10)]
    [InlineData(1_966_080)]
    [InlineData(16 << 20)]
    public void FirmwareEndsAt4GiBAndShowsBelow1MiB(int size)
    {
        using GuestMemory memory = new(32 * MiB);
        byte[] image = new byte[size];
        new Random(size).NextBytes(image);
        FirmwareImage.Map(memory, image);
        FirmwareImage.Shadow(memory, image);
        Assert.Equal(image, memory.Bytes((1ul << 32) - (ulong)size, size));
        int shadow = Math.Min(size, 128 << 10);
        Assert.Equal(image[^shadow..], memory.Bytes(MiB - (ulong)shadow, shadow));
        Assert.True(memory.TryWrite(new Gpa(0xffff_fff0), [1, 2, 3]));
        Assert.Equal(image[^16..], memory.Bytes(0xffff_fff0, 16));
        // The copy is the firmware's to change, until the next reset.
        Assert.True(memory.TryWrite(new Gpa(MiB - 16), [1, 2, 3]));
        Assert.Equal([1, 2, 3], memory.Bytes(MiB - 16, 3));
        FirmwareImage.Shadow(memory, image);
        Assert.Equal(image[^16..], memory.Bytes(MiB - 16, 16));
        CpuState reset = CpuState.AtReset();
        Assert.Equal(0xffff_fff0ul, reset.Cs.Base + reset.Rip);
    }

    [Theory]
    [InlineData(0, "64 KiB to 16 MiB")]
    [InlineData(4096, "64 KiB to 16 MiB")]
    [InlineData((16 << 20) + 4096, "64 KiB to 16 MiB")]
    [InlineData((64 << 10) + 1, "multiple of 4 KiB")]
    public void OddFirmwareIsRefused(int size, string expected)
    {
        using GuestMemory memory = new(32 * MiB);
        Assert.Contains(expected, Assert.Throws<BootException>(() => FirmwareImage.Map(memory, new byte[size])).Message, StringComparison.Ordinal);
        Assert.False(memory.TryFindRegion(0xffff_fff0, out _));
    }

    [Fact]
    public void AKernelBesideFirmwareIsRefused()
    {
        using GuestMemory memory = new(32 * MiB);
        FirmwareImage.Map(memory, new byte[64 << 10]);
        Assert.Contains("not both", Assert.Throws<BootException>(() => Start(memory, BoardDescription.Microvm(1))).Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("/usr/share/seabios/bios.bin")]
    [InlineData("/usr/share/seabios/bios-256k.bin")]
    [InlineData("/usr/share/OVMF/OVMF_CODE.fd")]
    [InlineData("/usr/share/OVMF/OVMF_CODE_4M.fd")]
    public void TheDistributionsFirmwareIsTaken(string path)
    {
        if (!System.IO.File.Exists(path))
            Assert.Skip($"{path} is not installed");
        using GuestMemory memory = new(32 * MiB);
        FirmwareImage.Map(memory, System.IO.File.ReadAllBytes(path));
        // A far or near jump, no operation, or a look at CR0: what reset vectors start with.
        Assert.Contains(memory.U8(0xffff_fff0), (byte[])[0xea, 0xe9, 0x90, 0x0f]);
    }
}
