using System;
using System.IO;
using Xunit;

namespace Kvasir.Machine.Tests;

/// <summary>What is kept of the look at KVM from one start to the next.</summary>
public sealed class ProbeMemoryTests : IDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("kvasir-probe-").FullName;

    private string File => Path.Combine(_folder, "cache", "kvm-speed");

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public void A_speed_is_recalled_on_the_same_boot()
    {
        Assert.Null(new ProbeMemory(File).Recall());
        new ProbeMemory(File).Keep(1_300_000.5);
        Assert.Equal(1_300_000.5, new ProbeMemory(File).Recall());
        Assert.Single(Directory.GetFiles(Path.GetDirectoryName(File)!));
    }

    [Theory]
    [InlineData("")]
    [InlineData("not-this-boot\n1300000\n")]
    [InlineData("THIS\n")]
    [InlineData("THIS\nfast\n")]
    [InlineData("THIS\n-1\n")]
    public void Anything_else_is_as_nothing(string content)
    {
        ArgumentNullException.ThrowIfNull(content);
        new ProbeMemory(File).Keep(1);
        string boot = System.IO.File.ReadAllLines(File)[0];
        System.IO.File.WriteAllText(File, content.Replace("THIS", boot, StringComparison.Ordinal));
        Assert.Null(new ProbeMemory(File).Recall());
    }

    [Fact]
    public void A_folder_that_cannot_be_written_is_no_error()
    {
        System.IO.File.WriteAllText(Path.Combine(_folder, "cache"), "a file where the folder should be");
        new ProbeMemory(File).Keep(1);
        Assert.Null(new ProbeMemory(File).Recall());
    }
}
