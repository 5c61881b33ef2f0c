using System;
using System.IO;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Small guests without an operating system, which report through the debug console and leave with an exit code of their own.</summary>
public sealed class BareMetalTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(10);

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_multiboot_kernel_reads_its_command_line()
    {
        string image = Nasm.Assemble(_folder, "multiboot");
        Assert.Equal((0x21 << 1 | 1, $"{image} one two=3\n"), Run("--kernel", image, "--append", "one two=3"));
    }

    [Fact]
    public void An_elf_kernel_enters_by_its_pvh_note()
    {
        string image = Nasm.Assemble(_folder, "pvh");
        Assert.Equal((0x22 << 1 | 1, "from the note\n"), Run("--kernel", image, "--append", "from the note"));
    }

    [Theory]
    [InlineData("q35")]
    [InlineData("microvm")]
    public void A_rom_walks_through_the_processors_modes(string machine) =>
        Assert.Equal((0x2a << 1 | 1, "RPidugpvLr\n"), Run("--machine", machine, "--firmware", Nasm.Assemble(_folder, "modes")));

    [Fact]
    public void The_test_device_raises_interrupts() =>
        Assert.Equal((0x23 << 1 | 1, "rmih\n"), RunWith("0x402", "--kernel", Nasm.Assemble(_folder, "testdev"), "--device", "pc-testdev"));

    [Theory]
    [InlineData("0", 1)]
    [InlineData("0x10", 33)]
    [InlineData("0x7f", 255)]
    [InlineData("0xff", 255)]
    public void A_rom_leaves_with_its_code(string code, int expected)
    {
        string rom = Nasm.Assemble(_folder, "exit", $"-DCODE={code}");
        (int exitCode, string output, string error) = KvasirProgram.Run(
            Limit, "run", "--machine", "microvm", "--firmware", rom, "--device", "isa-debug-exit,iobase=0xf4,iosize=0x04");
        Assert.Equal((expected, "", ""), (exitCode, output, error));
    }

    [Fact]
    public void A_triple_fault_is_reported()
    {
        (int code, string output, string error) = KvasirProgram.Run(Limit, "run", "--firmware", Nasm.Assemble(_folder, "triple"));
        Assert.Equal((3, ""), (code, output));
        Assert.StartsWith("kvasir: the guest crashed (triple fault)\n", error);
        Assert.Contains("rax 00000000deadbeef", error);
        Assert.Contains("rip 0000000000000026", error);
        Assert.Contains("div ecx", error);
    }

    private (int ExitCode, string Printed) Run(params string[] arguments) => RunWith("0xe9", arguments);

    private (int ExitCode, string Printed) RunWith(string consolePort, params string[] arguments)
    {
        string console = _folder["console"];
        (int code, _, string error) = KvasirProgram.Run(
            Limit, ["run", "--serial", "none", "--device", "isa-debug-exit", "--device", $"debugcon,iobase={consolePort},file={console}", .. arguments]);
        Assert.Equal("", error);
        return (code, File.ReadAllText(console));
    }
}
