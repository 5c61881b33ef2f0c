namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>
/// The 64 KiB of guest memory that code under test may touch: at the same linear address in the helper process and on the software CPU. oracle.c has the
/// same table.
/// </summary>
internal static class Window
{
    public const uint Start = 0x1000_0000;
    public const uint Pages = 16;
    public const uint Size = Pages * 4096;
    public const uint End = Start + Size;

    /// <summary>Code lies in [Start, CodeEnd); the page after it is absent.</summary>
    public const uint CodeEnd = Start + 0x2000;

    // Pages by what they are for.
    public const uint Data = Start + 0x3000;
    public const uint DataEnd = Start + 0x5000;
    public const uint ReadOnly = Start + 0x6000;
    public const uint AfterReadOnly = Start + 0x7000;
    public const uint Stack = Start + 0x9000;
    public const uint StackEnd = Start + 0xb000;

    private const string Rights = "XX-WW-RW-WW-----";

    public static bool IsMapped(uint page) => Rights[(int)page] != '-';

    public static bool IsWritable(uint page) => Rights[(int)page] == 'W';

    public static bool IsCode(uint page) => Rights[(int)page] == 'X';

    /// <summary>Mapped and no code: compared after a run.</summary>
    public static bool IsData(uint page) => IsMapped(page) && !IsCode(page);

    public static bool Contains(ulong linear) => linear - Start < Size;

    /// <summary>Bytes from an address on that are data in one run of pages; 0 where it is not data.</summary>
    public static int DataRun(ulong linear)
    {
        ulong at = linear;
        while (Contains(at) && IsData((uint)(at - Start) >> 12))
            at = (at | 0xfff) + 1;
        return (int)(at - linear);
    }
}
