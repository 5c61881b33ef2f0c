using Kvasir.Cli.Options;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class MemorySizeTests
{
    [Theory]
    [InlineData("512M", 512ul << 20)]
    [InlineData("512", 512ul << 20)]
    [InlineData("4G", 4ul << 30)]
    [InlineData("1.5g", 1536ul << 20)]
    [InlineData("64KiB", 64ul << 10)]
    [InlineData("2T", 2ul << 40)]
    [InlineData("100B", 100ul)]
    [InlineData(" 1 GB", 0ul)]
    [InlineData("", 0ul)]
    [InlineData("M", 0ul)]
    [InlineData("-1M", 0ul)]
    [InlineData("1.0001B", 0ul)]
    [InlineData("99999999999999T", 0ul)]
    [InlineData("1X", 0ul)]
    [InlineData("1..2G", 0ul)]
    [InlineData("0x10M", 0ul)]
    public void SizesAreReadAsPeopleWriteThem(string text, ulong expected)
    {
        bool valid = MemorySize.TryParse(text, out ulong bytes);
        Assert.Equal(expected != 0, valid);
        if (valid)
            Assert.Equal(expected, bytes);
    }

    [Theory]
    [InlineData(512ul << 20, "512M")]
    [InlineData(1ul << 30, "1G")]
    [InlineData(1536ul << 20, "1536M")]
    [InlineData(4096ul, "4K")]
    [InlineData(4097ul, "4097B")]
    [InlineData(3ul << 40, "3T")]
    public void ASizeIsShownInTheLargestWholeUnit(ulong bytes, string expected) => Assert.Equal(expected, MemorySize.Format(bytes));
}
