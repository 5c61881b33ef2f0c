using Kvasir.Core;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>The selectors a user program of the host has, and what is behind them: Linux's own, and the LDT entries that oracle.c makes.</summary>
internal static class Descriptors
{
    public const ushort Code32 = 0x23;
    public const ushort Data = 0x2b;
    public const ushort Code64 = 0x33;
    public const ushort WindowCode16 = 0x07;
    public const ushort WindowData16 = 0x0f;
    public const ushort ShortData = 0x17;
    public const ushort ReadOnlyData = 0x1f;
    public const ushort ExpandDown = 0x27;
    public const ushort NotPresent = 0x2f;
    public const ushort WindowExecuteOnly = 0x37;
    public const ushort WindowCode32 = 0x3f;

    /// <summary>Offsets above this are valid in <see cref="ExpandDown"/>.</summary>
    public const uint ExpandDownLimit = 0x33ff;
    public const uint ShortLimit = 0x8fff;

    /// <summary>What loads of segment registers are tried with: every descriptor, null ones, other RPLs, beyond the tables.</summary>
    public static readonly ushort[] Loadable =
    [
        Code32, Data, Code64, WindowCode16, WindowData16, ShortData, ReadOnlyData, ExpandDown, NotPresent, WindowExecuteOnly, WindowCode32,
        0, 1, 3, 0x28, 0x2a, 0x0c, 0x0e, 0x47, 0xffff, 0xfffb,
    ];

    /// <summary>The hidden part of a register loaded with one of the selectors above.</summary>
    public static SegmentState Load(ushort selector) => selector switch
    {
        Code32 => new(selector, 0, uint.MaxValue, 0xc0fb),
        Data => new(selector, 0, uint.MaxValue, 0xc0f3),
        Code64 => new(selector, 0, uint.MaxValue, 0xa0fb),
        WindowCode16 => new(selector, Window.Start, 0xffff, 0x00fb),
        WindowData16 => new(selector, Window.Start, 0xffff, 0x00f3),
        ShortData => new(selector, Window.Start, ShortLimit, 0x40f3),
        ReadOnlyData => new(selector, Window.Start, 0xffff, 0x40f1),
        ExpandDown => new(selector, Window.Start, ExpandDownLimit, 0x40f7),
        NotPresent => new(selector, Window.Start, 0xffff, 0x4073),
        WindowExecuteOnly => new(selector, Window.Start, 0xffff, 0x40f9),
        WindowCode32 => new(selector, Window.Start, 0xffff, 0x40fb),
        _ => new(selector, 0, 0, 0x10000),
    };

    /// <summary>A descriptor's eight bytes as the tables hold it.</summary>
    public static ulong Encode(SegmentState segment)
    {
        bool pages = (segment.Attributes & 0x8000) != 0;
        ulong limit = pages ? segment.Limit >> 12 : segment.Limit;
        ulong attributes = segment.Attributes & 0xf0ff;
        return (limit & 0xffff) | (segment.Base & 0xff_ffff) << 16 | attributes << 40 | (limit >> 16 & 0xf) << 48 | (segment.Base >> 24 & 0xff) << 56;
    }
}
