using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using Kvasir.Boot.Acpi;
using Xunit;

namespace Kvasir.Boot.Tests;

public sealed class AcpiTests
{
    private const ulong Address = 0x7fff_0000;

    public static TheoryData<string> Boards => ["q35", "pc", "microvm", "q35-many", "microvm-bare"];

    private static BoardDescription Board(string name) => name switch
    {
        "q35" => BoardDescription.Q35(4, 8ul << 30) with { HasS3 = true },
        "pc" => BoardDescription.Pc(1) with { HasVga = true },
        "microvm" => BoardDescription.Microvm(2) with
        {
            VirtioMmio = [new(0xfeb0_0000, 0x200, 16), new(0xfeb0_0200, 0x200, 17)],
            SerialPorts = [new(1, ChipsetAddresses.Com1, 4), new(2, ChipsetAddresses.Com2, 3)],
        },
        "q35-many" => BoardDescription.Q35(300, 1ul << 40),
        "microvm-bare" => BoardDescription.Microvm(1) with
        {
            HasHpet = false, HasKeyboardController = false, HasRtc = false, HasDma = false, HasFwCfg = false, SerialPorts = [], PmTimer32Bit = true,
        },
        _ => throw new ArgumentOutOfRangeException(nameof(name)),
    };

    /// <summary>Walks from the RSDP through XSDT and FADT, checking every length and sum.</summary>
    private static Dictionary<string, byte[]> Walk(byte[] tables, byte[] rsdp)
    {
        Assert.Equal("RSD PTR ", Encoding.ASCII.GetString(rsdp, 0, 8));
        Assert.Equal(0, Sum(rsdp.AsSpan(0, 20)));
        Assert.Equal(0, Sum(rsdp));
        Dictionary<string, byte[]> found = [];
        byte[] rsdt = Table(tables, BinaryPrimitives.ReadUInt32LittleEndian(rsdp.AsSpan(16)));
        byte[] xsdt = Table(tables, BinaryPrimitives.ReadUInt64LittleEndian(rsdp.AsSpan(24)));
        ulong[] listed = [.. Enumerable.Range(0, (rsdt.Length - 36) / 4).Select(i => (ulong)BinaryPrimitives.ReadUInt32LittleEndian(rsdt.AsSpan(36 + i * 4)))];
        Assert.Equal(listed, Enumerable.Range(0, (xsdt.Length - 36) / 8).Select(i => BinaryPrimitives.ReadUInt64LittleEndian(xsdt.AsSpan(36 + i * 8))));
        foreach (byte[] table in listed.Select(a => Table(tables, a)).Concat([rsdt, xsdt]))
            found.Add(Encoding.ASCII.GetString(table, 0, 4), table);
        byte[] fadt = found["FACP"];
        Assert.Equal(BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(40)), BinaryPrimitives.ReadUInt64LittleEndian(fadt.AsSpan(140)));
        found.Add("DSDT", Table(tables, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(40))));
        uint facs = BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(36));
        Assert.Equal(0u, facs % 64);
        byte[] facsBytes = tables.AsSpan((int)(facs - Address), 64).ToArray();
        Assert.Equal("FACS", Encoding.ASCII.GetString(facsBytes, 0, 4));
        Assert.Equal(64u, BinaryPrimitives.ReadUInt32LittleEndian(facsBytes.AsSpan(4)));
        found.Add("FACS", facsBytes);
        return found;
    }

    private static byte[] Table(byte[] tables, ulong address)
    {
        int offset = checked((int)(address - Address));
        int length = checked((int)BinaryPrimitives.ReadUInt32LittleEndian(tables.AsSpan(offset + 4)));
        byte[] table = tables.AsSpan(offset, length).ToArray();
        Assert.Equal(0, Sum(table));
        return table;
    }

    private static byte Sum(ReadOnlySpan<byte> range)
    {
        byte sum = 0;
        foreach (byte b in range)
            sum += b;
        return sum;
    }

    private static Dictionary<string, byte[]> Linked(BoardDescription board)
    {
        (byte[] tables, byte[] rsdp) = AcpiTables.Build(board).Link(Address);
        return Walk(tables, rsdp);
    }

    [Theory]
    [MemberData(nameof(Boards))]
    public void TablesAreLinkedAndSummed(string name)
    {
        BoardDescription board = Board(name);
        Dictionary<string, byte[]> tables = Linked(board);
        Assert.Equal(board.HasHpet, tables.ContainsKey("HPET"));
        Assert.Equal(name.StartsWith("q35", StringComparison.Ordinal), tables.ContainsKey("MCFG"));
        Assert.Equal(268, tables["FACP"].Length);
    }

    [Theory]
    [MemberData(nameof(Boards))]
    public void IaslDisassemblesEveryTableAndRecompilesTheDsdt(string name)
    {
        using TemporaryFolder folder = new();
        foreach ((string signature, byte[] table) in Linked(Board(name)))
        {
            folder.Write(signature + ".aml", table);
            (int code, string output) = ExternalTool.Run("acpica-tools", folder.Path, "iasl", "-d", signature + ".aml");
            Assert.True(code == 0, output);
            Assert.DoesNotContain("rror", output.Replace("0 Errors", "", StringComparison.Ordinal), StringComparison.Ordinal);
            string text = File.ReadAllText(Path.Combine(folder.Path, signature + ".dsl"));
            Assert.DoesNotContain("Invalid", text, StringComparison.Ordinal);
            Assert.DoesNotContain("Unknown", text, StringComparison.Ordinal);
        }
        string original = File.ReadAllText(Path.Combine(folder.Path, "DSDT.dsl"));
        Assert.DoesNotContain("External (", original, StringComparison.Ordinal);
        (int recompiled, string report) = ExternalTool.Run("acpica-tools", folder.Path, "iasl", "-p", "again", "DSDT.dsl");
        Assert.True(recompiled == 0, report);
        Assert.Contains("0 Errors", report, StringComparison.Ordinal);
    }

    [Fact]
    public void FadtTellsWhereTheHardwareIs()
    {
        byte[] fadt = Linked(BoardDescription.Q35(1, 1ul << 30))["FACP"];
        Assert.Equal(5, fadt[8]);
        Assert.Equal(9, BinaryPrimitives.ReadUInt16LittleEndian(fadt.AsSpan(46)));
        Assert.Equal(0xb2u, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(48)));
        Assert.Equal(0x600u, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(56)));
        Assert.Equal(0x604u, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(64)));
        Assert.Equal(0x608u, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(76)));
        Assert.Equal(0x620u, BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(80)));
        Assert.Equal(new byte[] { 4, 2, 0, 4, 16, 0 }, fadt[88..94]);
        uint flags = BinaryPrimitives.ReadUInt32LittleEndian(fadt.AsSpan(112));
        Assert.Equal(0u, flags & (1u << 20 | 1u << 4 | 1u << 8));
        Assert.NotEqual(0u, flags & (1u << 10));
        Assert.Equal(0b111, BinaryPrimitives.ReadUInt16LittleEndian(fadt.AsSpan(109)));
        Assert.Equal(new byte[] { 1, 8, 0, 1, 0xf9, 0x0c }, fadt[116..122]);
        Assert.Equal(6, fadt[128]);
        Assert.Equal(0x600ul, BinaryPrimitives.ReadUInt64LittleEndian(fadt.AsSpan(152)));
        Assert.Equal(0x608ul, BinaryPrimitives.ReadUInt64LittleEndian(fadt.AsSpan(212)));
        Assert.Equal(0x620ul, BinaryPrimitives.ReadUInt64LittleEndian(fadt.AsSpan(224)));
    }

    [Fact]
    public void MadtListsEveryProcessorOnce()
    {
        byte[] madt = Linked(Board("q35-many"))["APIC"];
        List<uint> ids = [];
        List<int> kinds = [];
        for (int at = 44; at < madt.Length; at += madt[at + 1])
        {
            kinds.Add(madt[at]);
            if (madt[at] == 0)
                ids.Add(madt[at + 3]);
            else if (madt[at] == 9)
                ids.Add(BinaryPrimitives.ReadUInt32LittleEndian(madt.AsSpan(at + 4)));
        }
        Assert.Equal(Enumerable.Range(0, 300).Select(i => (uint)i), ids);
        Assert.Equal(255, kinds.Count(k => k == 0));
        Assert.Equal(1, kinds.Count(k => k == 1));
        Assert.Equal(2, kinds.Count(k => k == 2));
        Assert.Contains(4, kinds);
        Assert.Contains(10, kinds);
    }

    /// <summary>The loader script, followed as firmware follows it, gives the same bytes as linking here.</summary>
    [Theory]
    [MemberData(nameof(Boards))]
    public void LoaderScriptLinksLikeDirectBoot(string name)
    {
        AcpiTables acpi = AcpiTables.Build(Board(name));
        (byte[] tables, byte[] rsdp) = acpi.Link(Address);
        byte[] script = acpi.LoaderScript();
        Assert.Equal(0, script.Length % 128);
        Dictionary<string, (byte[] Bytes, ulong Address)> files = [];
        for (int at = 0; at < script.Length; at += 128)
        {
            ReadOnlySpan<byte> entry = script.AsSpan(at, 128);
            string file = Encoding.ASCII.GetString(entry.Slice(4, 56)).TrimEnd('\0');
            switch (BinaryPrimitives.ReadUInt32LittleEndian(entry))
            {
                case 1:
                    bool root = file == AcpiTables.RsdpFile;
                    Assert.Equal(root ? 16u : 64u, BinaryPrimitives.ReadUInt32LittleEndian(entry[60..]));
                    Assert.Equal(root ? 2 : 1, entry[64]);
                    files.Add(file, root ? (acpi.Rsdp.ToArray(), 0xf0000) : (acpi.Tables.ToArray(), Address));
                    break;
                case 2:
                    string target = Encoding.ASCII.GetString(entry.Slice(60, 56)).TrimEnd('\0');
                    int offset = (int)BinaryPrimitives.ReadUInt32LittleEndian(entry[116..]);
                    int width = entry[120];
                    ulong value = 0;
                    for (int i = width - 1; i >= 0; i--)
                        value = (value << 8) | files[file].Bytes[offset + i];
                    value += files[target].Address;
                    for (int i = 0; i < width; i++)
                        files[file].Bytes[offset + i] = (byte)(value >> (i * 8));
                    break;
                case 3:
                    int sumAt = (int)BinaryPrimitives.ReadUInt32LittleEndian(entry[60..]);
                    int start = (int)BinaryPrimitives.ReadUInt32LittleEndian(entry[64..]);
                    int length = (int)BinaryPrimitives.ReadUInt32LittleEndian(entry[68..]);
                    files[file].Bytes[sumAt] -= Sum(files[file].Bytes.AsSpan(start, length));
                    break;
                default:
                    Assert.Fail("unknown command");
                    break;
            }
        }
        Assert.Equal(tables, files[AcpiTables.TablesFile].Bytes);
        Assert.Equal(rsdp, files[AcpiTables.RsdpFile].Bytes);
    }
}
