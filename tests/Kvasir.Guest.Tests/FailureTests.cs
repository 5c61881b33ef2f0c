using System;
using System.IO;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>What goes wrong before the guest runs: one line that says what and why, and the exit code for it.</summary>
public sealed class FailureTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(10);

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void A_kernel_of_garbage_is_refused()
    {
        byte[] garbage = new byte[300_000];
        new Random(1).NextBytes(garbage);
        File.WriteAllBytes(_folder["garbage"], garbage);
        Refuses(_folder["garbage"], "--kernel", _folder["garbage"]);
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(0x1f0)]
    [InlineData(0x210)]
    [InlineData(600)]
    [InlineData(20_000)]
    [InlineData(3_000_000)]
    public void A_kernel_cut_short_is_refused(int length)
    {
        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        File.WriteAllBytes(_folder["short"], File.ReadAllBytes(kernel)[..length]);
        Refuses(_folder["short"], "--kernel", _folder["short"], "--initrd", initialRamdisk, "--append", "console=ttyS0");
    }

    [Theory]
    [InlineData("--kernel")]
    [InlineData("--firmware")]
    public void A_missing_file_is_named(string option) => Refuses("/no/such/file", option, "/no/such/file");

    [Fact]
    public void A_missing_initial_file_system_is_named()
    {
        (string kernel, _) = GuestImages.Default("amd64");
        Refuses("/no/such/initrd", "--kernel", kernel, "--initrd", "/no/such/initrd");
    }

    [Fact]
    public void A_folder_is_no_kernel() => Refuses(_folder.Path, "--kernel", _folder.Path);

    [Fact]
    public void Firmware_of_a_wrong_size_is_refused()
    {
        File.WriteAllBytes(_folder["rom"], new byte[1000]);
        Refuses(_folder["rom"], "--firmware", _folder["rom"]);
    }

    [Fact]
    public void A_name_is_taken_while_its_VM_runs()
    {
        string image = Nasm.Assemble(_folder, "multiboot");
        string name = $"twice-{Environment.ProcessId}";
        string[] arguments = ["run", "--name", name, "--serial", "none", "--kernel", image, "--append", "up", "--device", "debugcon"];
        using GuestSession first = GuestSession.Start(arguments);
        Assert.True(SpinWait.SpinUntil(() => first.Error.Contains("up\n", StringComparison.Ordinal), Limit), first.Error);
        (int code, string output, string error) = KvasirProgram.Run(Limit, arguments);
        Assert.Equal((1, ""), (code, output));
        Assert.Equal($"kvasir: a VM named '{name}' runs already (process {first.ProcessId}); choose another --name\n", error);
        first.Signal("TERM");
        Assert.Equal(0, first.WaitForExit());
        // The name is free again.
        (code, _, error) = KvasirProgram.Run(Limit, [.. arguments, "--device", "isa-debug-exit"]);
        Assert.Equal((0x21 << 1 | 1, $"{image} up\n"), (code, error));
    }

    private static void Refuses(string named, params string[] arguments)
    {
        (int code, string output, string error) = KvasirProgram.Run(Limit, ["run", .. arguments]);
        Assert.Equal((2, ""), (code, output));
        Assert.Matches(@"^kvasir: [^\n]+\n$", error);
        Assert.Contains(named, error);
    }
}
