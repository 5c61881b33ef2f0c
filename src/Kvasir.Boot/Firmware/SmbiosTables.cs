using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;

namespace Kvasir.Boot.Firmware;

/// <summary>
/// System Management BIOS structures (DMTF DSP0134, 3.0; all fit 2.8 readers): what the machine is, for inventory tools. Not tied to an address.
/// </summary>
public sealed class SmbiosTables
{
    /// <summary>Names of the parts in fw_cfg.</summary>
    public const string TablesFile = "etc/smbios/smbios-tables";
    public const string AnchorFile = "etc/smbios/smbios-anchor";

    private const ushort BoardHandle = 0x200;
    private const ushort ChassisHandle = 0x300;
    private const ushort ProcessorHandle = 0x400;
    private const ushort MemoryArrayHandle = 0x1000;
    private const ushort MemoryDeviceHandle = 0x1100;
    private const ushort MemoryMapHandle = 0x1300;
    private const ushort NoHandle = 0xffff;
    private const ushort NoErrorHandle = 0xfffe;
    private const ulong MiB = 1ul << 20;
    private const ulong GiB = 1ul << 30;
    private const ulong ModuleSize = 16 * GiB;
    private const int MaximumModules = 64;

    private readonly TableWriter _bytes = new();
    private int _count;
    private int _largest;

    private SmbiosTables()
    {
    }

    /// <summary>All structures, one after the other.</summary>
    public ReadOnlySpan<byte> Structures => _bytes.Written;

    /// <summary>Whether they fit what a 2.x entry point can say.</summary>
    public bool FitsVersion2 => _bytes.Length <= ushort.MaxValue;

    /// <param name="board">Gives the identity and the processors.</param>
    /// <param name="lowMemory">Bytes of RAM below 4 GiB.</param>
    /// <param name="highMemory">Bytes of RAM from 4 GiB on.</param>
    public static SmbiosTables Build(BoardDescription board, ulong lowMemory, ulong highMemory)
    {
        SmbiosTables tables = new();
        tables.AddFirmware();
        tables.AddSystem(board);
        tables.AddProcessor(board);
        tables.AddMemory(lowMemory, highMemory);
        const byte noError = 0;
        tables.Add(32, 0x2000, (w, text) => w.Zero(6).U8(noError));
        tables.Add(127, 0x7f00, (w, text) => { });
        return tables;
    }

    /// <summary>The 2.8 entry point (31 bytes).</summary>
    /// <param name="address">Where the structures stand; firmware that places them itself takes 0 and fills it in.</param>
    public byte[] EntryPoint2(uint address)
    {
        TableWriter w = new();
        w.Text("_SM_", 4).U8(0).U8(0x1f).U8(2).U8(8).U16((ushort)_largest).U8(0).Zero(5);
        w.Text("_DMI_", 5).U8(0).U16((ushort)_bytes.Length).U32(address).U16((ushort)_count).U8(0x28);
        w.PatchU8(0x15, TableWriter.Checksum(w.Written[0x10..]));
        w.PatchU8(4, TableWriter.Checksum(w.Written));
        return w.ToArray();
    }

    /// <summary>The 3.0 entry point (24 bytes).</summary>
    public byte[] EntryPoint3(ulong address)
    {
        TableWriter w = new();
        w.Text("_SM3_", 5).U8(0).U8(0x18).U8(3).U8(0).U8(0).U8(1).U8(0).U32((uint)_bytes.Length).U64(address);
        w.PatchU8(5, TableWriter.Checksum(w.Written));
        return w.ToArray();
    }

    private void AddFirmware()
    {
        const ulong characteristicsNotSupported = 1 << 3;
        const byte acpi = 1 << 0;
        const byte virtualMachine = 1 << 4;
        const byte none = 0xff;
        Add(0, 0, (w, text) => w
            .U8(text("Kvasir")).U8(text("1.0")).U16((ushort)(ChipsetAddresses.BiosSegment >> 4)).U8(text("01/01/2026")).U8(0)
            .U64(characteristicsNotSupported).U8(acpi).U8(virtualMachine).U8(1).U8(0).U8(none).U8(none));
    }

    private void AddSystem(BoardDescription board)
    {
        SystemIdentity identity = board.Identity;
        string product = identity.Product.Length > 0 ? identity.Product : $"Virtual Machine ({board.Kind})";
        const byte powerSwitch = 6;
        // The first three fields of a UUID are little endian, as Guid lays them out.
        Add(1, 0x100, (w, text) => w
            .U8(text(identity.Manufacturer)).U8(text(product)).U8(text(identity.Version)).U8(text(identity.SerialNumber))
            .Bytes(identity.Uuid.ToByteArray()).U8(powerSwitch).U8(text(identity.Sku)).U8(text(identity.Family)));
        const byte hostingBoard = 1;
        const byte motherboard = 0x0a;
        Add(2, BoardHandle, (w, text) => w
            .U8(text(identity.Manufacturer)).U8(text(product)).U8(text(identity.Version)).U8(text(identity.SerialNumber)).U8(text(identity.AssetTag))
            .U8(hostingBoard).U8(0).U16(ChassisHandle).U8(motherboard).U8(0));
        const byte other = 1;
        const byte unknown = 2;
        const byte safe = 3;
        Add(3, ChassisHandle, (w, text) => w
            .U8(text(identity.Manufacturer)).U8(other).U8(text(identity.Version)).U8(text(identity.SerialNumber)).U8(text(identity.AssetTag))
            .U8(safe).U8(safe).U8(safe).U8(unknown).U32(0).U8(0).U8(0).U8(0).U8(0).U8(text(identity.Sku)));
    }

    private void AddProcessor(BoardDescription board)
    {
        const byte centralProcessor = 3;
        const byte other = 1;
        const byte enabled = 0x41;
        const ushort capable64AndMultiCore = 0x0c;
        int count = board.ApicIds.Count;
        byte shortCount = (byte)Math.Min(count, byte.MaxValue);
        Add(4, ProcessorHandle, (w, text) => w
            .U8(text("CPU 0")).U8(centralProcessor).U8(other).U8(text(board.Identity.Manufacturer))
            .U32(board.ProcessorSignature).U32(board.ProcessorFeatures).U8(text(board.Identity.ProcessorName))
            .U8(0).U16(0).U16(0).U16(0).U8(enabled).U8(other).U16(NoHandle).U16(NoHandle).U16(NoHandle).U8(0).U8(0).U8(0)
            .U8(shortCount).U8(shortCount).U8(shortCount).U16(capable64AndMultiCore).U16(other)
            .U16((ushort)count).U16((ushort)count).U16((ushort)count));
    }

    private void AddMemory(ulong lowMemory, ulong highMemory)
    {
        ulong total = lowMemory + highMemory;
        ulong module = ModuleSize;
        if (total > module * MaximumModules)
            module = BootMemory.Align((total + MaximumModules - 1) / MaximumModules, GiB);
        int modules = (int)((total + module - 1) / module);

        const byte other = 1;
        const byte systemMemory = 3;
        const byte noCorrection = 3;
        const uint extended = 0x8000_0000;
        ulong kibibytes = total >> 10;
        Add(16, MemoryArrayHandle, (w, text) => w
            .U8(other).U8(systemMemory).U8(noCorrection).U32(kibibytes < extended ? (uint)kibibytes : extended).U16(NoErrorHandle)
            .U16((ushort)modules).U64(kibibytes < extended ? 0 : total));
        for (int i = 0; i < modules; i++)
            AddModule(i, Math.Min(module, total - (ulong)i * module));
        AddMapping(0, 0, lowMemory);
        if (highMemory > 0)
            AddMapping(1, ChipsetAddresses.FourGiB, highMemory);
    }

    private void AddModule(int number, ulong size)
    {
        const ushort unknownWidth = 0xffff;
        const byte dimm = 9;
        const byte ram = 7;
        const ushort otherDetail = 2;
        const ushort inKibibytes = 0x8000;
        const ushort seeExtended = 0x7fff;
        ushort shortSize = size switch
        {
            < 32 * MiB when size % MiB != 0 => (ushort)(inKibibytes | (size >> 10)),
            < seeExtended * MiB => (ushort)(size / MiB),
            _ => seeExtended,
        };
        uint extendedSize = shortSize == seeExtended ? (uint)(size / MiB) : 0;
        Add(17, (ushort)(MemoryDeviceHandle + number), (w, text) => w
            .U16(MemoryArrayHandle).U16(NoErrorHandle).U16(unknownWidth).U16(unknownWidth).U16(shortSize).U8(dimm).U8(0)
            .U8(text(string.Create(CultureInfo.InvariantCulture, $"DIMM {number}"))).U8(0)
            .U8(ram).U16(otherDetail).U16(0).U8(text("Kvasir")).U8(0).U8(0).U8(0).U8(0).U32(extendedSize).U16(0).U16(0).U16(0).U16(0));
    }

    private void AddMapping(int number, ulong start, ulong length)
    {
        ulong end = start + length;
        ulong lastKb = (end >> 10) - 1;
        bool wide = lastKb >= uint.MaxValue;
        Add(19, (ushort)(MemoryMapHandle + number), (w, text) => w
            .U32(wide ? uint.MaxValue : (uint)(start >> 10)).U32(wide ? uint.MaxValue : (uint)lastKb).U16(MemoryArrayHandle).U8(1)
            .U64(wide ? start : 0).U64(wide ? end - 1 : 0));
    }

    /// <summary>Adds a structure: its fields, then the strings that they name. The function given to <paramref name="fields"/> makes a string's number.</summary>
    private void Add(byte type, ushort handle, Action<TableWriter, Func<string, byte>> fields)
    {
        int start = _bytes.Length;
        TableWriter body = new();
        List<string> strings = [];
        fields(body, text =>
        {
            string clean = Clean(text);
            if (clean.Length == 0)
                return 0;
            strings.Add(clean);
            return (byte)strings.Count;
        });
        _bytes.U8(type).U8((byte)(4 + body.Length)).U16(handle).Bytes(body.Written);
        foreach (string text in strings)
            _bytes.Bytes(Encoding.ASCII.GetBytes(text)).U8(0);
        // A structure ends with an empty string; one without strings has nothing but its final zero before that.
        if (strings.Count == 0)
            _bytes.U8(0);
        _bytes.U8(0);
        _count++;
        _largest = Math.Max(_largest, _bytes.Length - start);
    }

    /// <summary>Printable ASCII of at most 64 characters: what every reader takes.</summary>
    private static string Clean(string text)
    {
        const int longest = 64;
        StringBuilder clean = new();
        foreach (char c in text)
        {
            if (clean.Length < longest && c is >= ' ' and <= '~')
                clean.Append(c);
        }
        return clean.ToString().Trim();
    }
}
