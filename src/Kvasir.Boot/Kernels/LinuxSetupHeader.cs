using System;
using System.Buffers.Binary;
using System.Globalization;

namespace Kvasir.Boot.Kernels;

/// <summary>
/// The setup header of a Linux kernel image (The Linux/x86 Boot Protocol, "The Real-Mode Kernel Header"). Fields that a protocol version lacks
/// have the value that the document gives for it.
/// </summary>
internal readonly record struct LinuxSetupHeader
{
    /// <summary>Where the header starts in the file and in the zero page.</summary>
    public const int Start = 0x1f1;

    /// <summary>The byte here, added to 202h, is the end of the header.</summary>
    private const int JumpLength = 0x201;
    private const int HeaderEndBase = 0x202;

    /// <summary>The header ends here at most: the next field of the zero page follows.</summary>
    private const int MaximumEnd = 0x290;
    private const uint Signature = 0x5372_6448;
    private const ushort BootFlag = 0xaa55;
    private const int SectorSize = 512;

    [Flags]
    private enum LoadFlags : byte
    {
        None = 0,
        LoadedHigh = 1 << 0,
    }

    [Flags]
    private enum ExtendedLoadFlags : ushort
    {
        None = 0,
        Kernel64 = 1 << 0,
    }

    /// <summary>Protocol version: major in the high byte.</summary>
    public ushort Version { get; private init; }

    /// <summary>Where the header ends in the file.</summary>
    public int End { get; private init; }

    /// <summary>Where the protected-mode kernel starts in the file.</summary>
    public int KernelOffset { get; private init; }

    /// <summary>Bytes of the protected-mode kernel, as the header has it; 0 where the field does not say.</summary>
    public ulong KernelSize { get; private init; }
    public uint Code32Start { get; private init; }

    /// <summary>The last address that an initial RAM disk may take.</summary>
    public uint InitrdAddressMax { get; private init; }
    public uint Alignment { get; private init; }
    public bool Relocatable { get; private init; }

    /// <summary>There is a 64-bit entry at offset 200h of the protected-mode kernel.</summary>
    public bool Has64BitEntry { get; private init; }

    /// <summary>Longest command line in bytes, without the final zero.</summary>
    public uint CommandLineSize { get; private init; }

    /// <summary>Where the kernel wants to run, or 0.</summary>
    public ulong PreferredAddress { get; private init; }

    /// <summary>Memory from its running address that the kernel uses before it reads the memory map, or 0.</summary>
    public uint InitSize { get; private init; }

    public string VersionText => string.Create(CultureInfo.InvariantCulture, $"{Version >> 8}.{Version & 0xff:d2}");

    /// <summary>Whether a file carries a setup header at all.</summary>
    public static bool IsPresent(ReadOnlySpan<byte> file) =>
        file.Length >= HeaderEndBase + 4 && U32(file, 0x202) == Signature && U16(file, 0x1fe) == BootFlag;

    /// <summary>Reads and checks a header.</summary>
    /// <exception cref="BootException">Not a kernel this loader can start.</exception>
    public static LinuxSetupHeader Read(ReadOnlySpan<byte> file)
    {
        if (!IsPresent(file))
            throw new BootException("the kernel is no Linux bzImage");
        int end = HeaderEndBase + file[JumpLength];
        if (file.Length < end || file.Length < 0x218)
            throw new BootException($"the kernel is truncated: {file.Length} bytes end inside its setup header");
        ushort version = U16(file, 0x206);
        if (version is < 0x200 or >= 0x300)
            throw new BootException($"the kernel speaks boot protocol {version >> 8}.{version & 0xff:d2}; this loader knows 2.00 to 2.15");
        if (end > MaximumEnd)
            throw new BootException($"the kernel's setup header ends at 0x{end:x}, past its place in the zero page");
        if (end < Required(version))
            throw new BootException($"the kernel's setup header is too short for boot protocol {version >> 8}.{version & 0xff:d2}");
        if (((LoadFlags)file[0x211] & LoadFlags.LoadedHigh) == 0)
            throw new BootException("the kernel is a zImage, which has no entry without a BIOS: build a bzImage");
        int setupSectors = file[Start] == 0 ? 4 : file[Start];
        LinuxSetupHeader header = new()
        {
            Version = version,
            End = end,
            KernelOffset = (setupSectors + 1) * SectorSize,
            KernelSize = version >= 0x204 ? (ulong)U32(file, 0x1f4) * 16 : 0,
            Code32Start = U32(file, 0x214),
            InitrdAddressMax = version >= 0x203 ? U32(file, 0x22c) : 0x37ff_ffff,
            Alignment = version >= 0x205 ? U32(file, 0x230) : 0,
            Relocatable = version >= 0x205 && file[0x234] != 0,
            Has64BitEntry = version >= 0x20c && ((ExtendedLoadFlags)U16(file, 0x236) & ExtendedLoadFlags.Kernel64) != 0,
            CommandLineSize = version >= 0x206 ? U32(file, 0x238) : 255,
            PreferredAddress = version >= 0x20a ? U64(file, 0x258) : 0,
            InitSize = version >= 0x20a ? U32(file, 0x260) : 0,
        };
        header.Check(file.Length);
        return header;
    }

    private void Check(int fileLength)
    {
        if (fileLength <= KernelOffset)
            throw new BootException($"the kernel is truncated: its code should start at byte {KernelOffset} of {fileLength}");
        // The size is in paragraphs, rounded up, and older build tools did not pad the file.
        ulong present = (ulong)(fileLength - KernelOffset);
        if (KernelSize > present + 15)
            throw new BootException($"the kernel is truncated: {KernelOffset + (long)KernelSize} bytes expected, {fileLength} are there");
        if (Relocatable && (Alignment == 0 || (Alignment & (Alignment - 1)) != 0))
            throw new BootException($"the kernel's alignment 0x{Alignment:x} is no power of two");
        if (PreferredAddress is > 0 and < ChipsetAddresses.OneMiB)
            throw new BootException($"the kernel wants to run at 0x{PreferredAddress:x}, below 1 MiB");
    }

    /// <summary>Where the fields of a protocol version end.</summary>
    private static int Required(ushort version) => version switch
    {
        >= 0x20a => 0x264,
        >= 0x209 => 0x258,
        >= 0x208 => 0x250,
        >= 0x207 => 0x248,
        >= 0x206 => 0x23c,
        >= 0x205 => 0x238,
        >= 0x203 => 0x230,
        >= 0x202 => 0x22c,
        >= 0x201 => 0x226,
        _ => 0x224,
    };

    private static ushort U16(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt16LittleEndian(file[offset..]);

    private static uint U32(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt32LittleEndian(file[offset..]);

    private static ulong U64(ReadOnlySpan<byte> file, int offset) => BinaryPrimitives.ReadUInt64LittleEndian(file[offset..]);
}
