using System;
using System.IO;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Small guests without an operating system, which report through the debug console and leave with an exit code of their own.</summary>
public sealed class BareMetalTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(2);

    private readonly TemporaryFolder _folder = new();

    public static TheoryData<string> Each() => [.. EachAccelerator.Names];

    public static MatrixTheoryData<string, string> EachMachine() => new(EachAccelerator.Names, ["q35", "microvm"]);

    public static MatrixTheoryData<string, (string, int)> EachCode() => new(EachAccelerator.Names, [("0", 1), ("0x10", 33), ("0x7f", 255), ("0xff", 255)]);

    public void Dispose() => _folder.Dispose();

    [Theory]
    [MemberData(nameof(Each))]
    public void A_multiboot_kernel_reads_its_command_line(string accelerator)
    {
        string image = Nasm.Assemble(_folder, "multiboot");
        Assert.Equal((0x21 << 1 | 1, $"{image} one two=3\n"), Run(accelerator, "--kernel", image, "--append", "one two=3"));
    }

    [Theory]
    [MemberData(nameof(Each))]
    public void An_elf_kernel_enters_by_its_pvh_note(string accelerator)
    {
        string image = Nasm.Assemble(_folder, "pvh");
        Assert.Equal((0x22 << 1 | 1, "from the note\n"), Run(accelerator, "--kernel", image, "--append", "from the note"));
    }

    [Theory]
    [MemberData(nameof(EachMachine))]
    public void A_rom_walks_through_the_processors_modes(string accelerator, string machine)
    {
        Assert.SkipWhen(EachAccelerator.Emulates(accelerator), "this host's KVM emulates kernels and does not deliver interrupts out of virtual-8086 mode as a processor does");
        Assert.Equal((0x2a << 1 | 1, "RPidugpvLr\n"), Run(accelerator, "--machine", machine, "--firmware", Nasm.Assemble(_folder, "modes")));
    }

    [Theory]
    [MemberData(nameof(EachMachine))]
    public void A_second_processor_starts_again_and_again(string accelerator, string machine) =>
        Assert.Equal((0x24 << 1 | 1, "................\n"), Run(accelerator, "--machine", machine, "--cpus", "2", "--kernel", Nasm.Assemble(_folder, "starts")));

    [Theory]
    [MemberData(nameof(Each))]
    public void The_test_device_raises_interrupts(string accelerator) =>
        Assert.Equal((0x23 << 1 | 1, "rmih\n"), RunWith(accelerator, "0x402", "--kernel", Nasm.Assemble(_folder, "testdev"), "--device", "pc-testdev"));

    [Theory]
    [MemberData(nameof(EachCode))]
    public void A_rom_leaves_with_its_code(string accelerator, (string Code, int Expected) row)
    {
        EachAccelerator.Require(accelerator);
        (string code, int expected) = row;
        string rom = Nasm.Assemble(_folder, "exit", $"-DCODE={code}");
        (int exitCode, string output, string error) = KvasirProgram.Run(
            Limit, "run", "--accel", accelerator, "--machine", "microvm", "--firmware", rom, "--device", "isa-debug-exit,iobase=0xf4,iosize=0x04");
        Assert.Equal((expected, "", ""), (exitCode, output, error));
    }

    [Theory]
    [MemberData(nameof(Each))]
    public void A_triple_fault_is_reported(string accelerator)
    {
        EachAccelerator.Require(accelerator);
        (int code, string output, string error) = KvasirProgram.Run(Limit, "run", "--accel", accelerator, "--firmware", Nasm.Assemble(_folder, "triple"));
        Assert.Equal((3, ""), (code, output));
        Assert.StartsWith("kvasir: the guest crashed (triple fault)\n", error);
        if (error.Contains("keeps no registers of it", StringComparison.Ordinal))
        {
            Assert.False(accelerator == "soft" || EachAccelerator.Emulates(accelerator), error);
            return;
        }
        Assert.Contains("rax 00000000deadbeef", error);
        Assert.Contains("rip 0000000000000026", error);
        Assert.Contains("div ecx", error);
    }

    private (int ExitCode, string Printed) Run(string accelerator, params string[] arguments) => RunWith(accelerator, "0xe9", arguments);

    private (int ExitCode, string Printed) RunWith(string accelerator, string consolePort, params string[] arguments)
    {
        EachAccelerator.Require(accelerator);
        string console = _folder["console"];
        (int code, _, string error) = KvasirProgram.Run(
            Limit, ["run", "--accel", accelerator, "--serial", "none", "--device", "isa-debug-exit", "--device", $"debugcon,iobase={consolePort},file={console}", .. arguments]);
        Assert.Equal("", error);
        return (code, File.ReadAllText(console));
    }
}
