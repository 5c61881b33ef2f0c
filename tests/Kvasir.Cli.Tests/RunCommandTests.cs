using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Cli.Tests;

/// <summary>The whole command, as a process, with guests of a few instructions in ROM.</summary>
public sealed class RunCommandTests : IDisposable
{
    private const string ExitDevice = "isa-debug-exit,iobase=0xf4,iosize=0x04";

    /// <summary>mov al, 15h; out 0f4h, al; hlt; jmp back: leaves with (15h shl 1) | 1.</summary>
    private static readonly byte[] Leave = [0xb0, 0x15, 0xe6, 0xf4, 0xf4, 0xeb, 0xfd];

    /// <summary>cli; hlt; jmp back.</summary>
    private static readonly byte[] Sleep = [0xfa, 0xf4, 0xeb, 0xfd];

    /// <summary>Waits for a byte at COM1, sends it back, and leaves after 'q'.</summary>
    private static readonly byte[] Echo =
        [0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb, 0xba, 0xf8, 0x03, 0xec, 0xee, 0x3c, 0x71, 0x75, 0xef, .. Leave];

    private static readonly TimeSpan Patience = TimeSpan.FromSeconds(120);

    private readonly string _folder = Directory.CreateTempSubdirectory("kvasir-test-").FullName;

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Theory]
    [InlineData("q35")]
    [InlineData("microvm")]
    public async Task AGuestLeavesWithItsOwnExitCode(string machine)
    {
        (int code, string output, string errors) = await RunAsync("", "--machine", machine, "--firmware", Rom(Leave), "--device", ExitDevice);
        Assert.Equal((43, "", ""), (code, output, errors));
    }

    [Fact]
    public async Task WhatTheGuestSendsGoesToStandardOutput()
    {
        List<byte> code = [0xba, 0xf8, 0x03];
        foreach (byte character in "Hello, guest\n"u8)
            code.AddRange([0xb0, character, 0xee]);
        code.AddRange(Leave);
        (int exit, string output, _) = await RunAsync("", "--firmware", Rom([.. code]), "--device", ExitDevice);
        Assert.Equal((43, "Hello, guest\n"), (exit, output));
    }

    [Fact]
    public async Task PipedInputReachesTheGuestWhole()
    {
        string text = string.Concat(System.Linq.Enumerable.Repeat("The end of the input is no end. \u0001x ", 100)) + "q";
        (int exit, string output, _) = await RunAsync(text, "--firmware", Rom(Echo), "--device", ExitDevice);
        Assert.Equal(43, exit);
        Assert.Equal(text, output);
    }

    [Fact]
    public async Task ATripleFaultIsACrash()
    {
        // lidt [100h], where there are zeros; int3.
        (int exit, _, string errors) = await RunAsync("", "--firmware", Rom([0x0f, 0x01, 0x1e, 0x00, 0x01, 0xcc]));
        Assert.Equal(3, exit);
        Assert.StartsWith("kvasir: the guest crashed (triple fault)\n", errors, StringComparison.Ordinal);
    }

    [Fact]
    public async Task ANameIsTakenOnceAndSigtermEndsAGuestThatDoesNotListen()
    {
        string name = $"test-{Environment.ProcessId}-name";
        using Process first = Start("--name", name, "--firmware", Rom(Sleep), "--log", "vm");
        string? line = await first.StandardError.ReadLineAsync(Token).AsTask().WaitAsync(Patience, Token);
        Assert.Equal("vm: start", line);
        Assert.Equal($"kvasir:{name}"[..15], (await File.ReadAllTextAsync($"/proc/{first.Id}/comm", Token)).Trim());
        (int exit, _, string errors) = await RunAsync("", "--name", name, "--firmware", Rom(Sleep));
        Assert.Equal(1, exit);
        Assert.Contains($"'{name}' runs already (process {first.Id})", errors, StringComparison.Ordinal);
        using Process kill = Process.Start("/bin/sh", ["-c", $"kill -TERM {first.Id}"]);
        await first.WaitForExitAsync(Token).WaitAsync(Patience, Token);
        Assert.Equal(0, first.ExitCode);
    }

    [Fact]
    public async Task AFileThatIsNoKernelIsOneLine()
    {
        string path = Path.Combine(_folder, "kernel");
        await File.WriteAllTextAsync(path, "not a kernel", Token);
        (int exit, _, string errors) = await RunAsync("", "--kernel", path);
        Assert.Equal(2, exit);
        Assert.StartsWith($"kvasir: {path}: ", errors, StringComparison.Ordinal);
        Assert.Equal(errors.Length - 1, errors.IndexOf('\n', StringComparison.Ordinal));
    }

    [Theory]
    [InlineData("", ":")]
    [InlineData("TERM", ":")]
    [InlineData("INT", ":")]
    [InlineData("KILL", "sleep 1")]
    public async Task TheTerminalIsAsItWas(string signal, string settle)
    {
        Assert.SkipUnless(File.Exists("/usr/bin/script"), "script (package bsdutils) makes the terminal");
        string name = $"test-{Environment.ProcessId}-tty{signal}";
        string rom = Rom(signal.Length == 0 ? Leave : Sleep);
        // The signal comes when the terminal has become raw, which shows in its settings.
        string watch = signal.Length == 0
            ? ""
            : $"(for i in $(seq 600); do stty -a <&3 | grep -q -e '-icanon' && break; sleep 0.1; done; stty -a <&3 >raw; kill -{signal} $(cat kvasir/{name}/pid)) & ";
        string commands = $"cd {_folder}; export XDG_RUNTIME_DIR={_folder}; stty -g >before; exec 3<&0; {watch}"
            + $"{Command} run --name {name} --firmware {rom} --device {ExitDevice}; {settle}; stty -g >after";
        using Process terminal = Process.Start(new ProcessStartInfo("/usr/bin/script", ["-qec", commands, "/dev/null"])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!;
        await terminal.WaitForExitAsync(Token).WaitAsync(Patience, Token);
        string before = await File.ReadAllTextAsync(Path.Combine(_folder, "before"), Token);
        Assert.NotEmpty(before);
        if (signal.Length > 0)
            Assert.Contains("-icanon", await File.ReadAllTextAsync(Path.Combine(_folder, "raw"), Token), StringComparison.Ordinal);
        Assert.Equal(before, await File.ReadAllTextAsync(Path.Combine(_folder, "after"), Token));
    }

    private static string Command => Path.Combine(AppContext.BaseDirectory, "kvasir");

    private static Process Start(params string[] arguments) => Process.Start(new ProcessStartInfo(Command, ["run", .. arguments])
    {
        RedirectStandardInput = true,
        RedirectStandardOutput = true,
        RedirectStandardError = true,
        StandardOutputEncoding = Encoding.Latin1,
    })!;

    private static async Task<(int Code, string Output, string Errors)> RunAsync(string input, params string[] arguments)
    {
        using Process process = Start(arguments);
        Task<string> output = process.StandardOutput.ReadToEndAsync(Token);
        Task<string> errors = process.StandardError.ReadToEndAsync(Token);
        await process.StandardInput.WriteAsync(input.AsMemory(), Token);
        process.StandardInput.Close();
        await process.WaitForExitAsync(Token).WaitAsync(Patience, Token);
        return (process.ExitCode, await output, await errors);
    }

    /// <summary>A 64 KiB image with code at its start, which the reset vector jumps to.</summary>
    private string Rom(byte[] code)
    {
        byte[] image = new byte[64 << 10];
        Array.Fill(image, (byte)0xf4);
        code.CopyTo(image, 0);
        ReadOnlySpan<byte> jump = [0xea, 0x00, 0x00, 0x00, 0xf0];
        jump.CopyTo(image.AsSpan(0xfff0));
        string path = Path.Combine(_folder, $"{Guid.NewGuid():N}.rom");
        File.WriteAllBytes(path, image);
        return path;
    }
}
