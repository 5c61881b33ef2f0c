using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>The VM as a process among others: its names, its signals, its pipes, and what it costs when it has nothing to do.</summary>
public sealed class ProcessTests : IDisposable
{
    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(10);

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void An_idle_guest_sleeps_and_SIGTERM_shuts_it_down()
    {
        string name = $"idle{Environment.ProcessId}";
        using GuestSession guest = GuestSession.Boot("--name", name, "--cpus", "2");
        guest.Run("until pidof acpid; do sleep 0.2; done");

        Assert.Equal($"kvasir:{name}"[..Math.Min(15, name.Length + 7)], HostProcess.Name(guest.ProcessId));
        int first = HostProcess.Thread(guest.ProcessId, "vcpu0");
        int second = HostProcess.Thread(guest.ProcessId, "vcpu1");
        Assert.NotEqual(first, second);
        HostTool("renice", "-n", "19", "-p", first.ToString(CultureInfo.InvariantCulture));
        HostTool("taskset", "-p", "-c", "0", second.ToString(CultureInfo.InvariantCulture));
        Assert.Equal(19, HostProcess.Nice(guest.ProcessId, first));
        Assert.Equal(HostProcess.Nice(Environment.ProcessId, Environment.ProcessId), HostProcess.Nice(guest.ProcessId, second));
        Assert.Equal("0", HostProcess.AllowedProcessors(guest.ProcessId, second));

        // The kernel's start leaves work for a while, on a slow host for longer.
        Stopwatch waited = Stopwatch.StartNew();
        double share;
        do
        {
            TimeSpan before = HostProcess.ProcessorTime(guest.ProcessId);
            Stopwatch clock = Stopwatch.StartNew();
            Thread.Sleep(TimeSpan.FromSeconds(8));
            share = (HostProcess.ProcessorTime(guest.ProcessId) - before) / clock.Elapsed;
            TestContext.Current.SendDiagnosticMessage($"idle: {share * 100:0.0} % of a processor");
        } while (share > 0.06 && waited.Elapsed < Limit);
        Assert.InRange(share, 0, 0.06);

        guest.Signal("TERM");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Contains("reboot: Power down", guest.Output);
        Assert.Contains("asking the guest to shut down", guest.Error);
    }

    [Fact]
    public void A_second_SIGTERM_pulls_the_plug()
    {
        using GuestSession guest = GuestSession.Boot();
        guest.Run("until pidof acpid; do sleep 0.2; done; killall acpid; while pidof acpid; do sleep 0.2; done");
        guest.Signal("TERM");
        Assert.True(SpinWait.SpinUntil(() => guest.Error.Contains("asking the guest to shut down", StringComparison.Ordinal), Limit));
        Assert.Equal("alive", guest.Run("echo alive"));
        // Two in quick succession are one: timeout(1) sends them so.
        Thread.Sleep(TimeSpan.FromSeconds(2));
        guest.Signal("TERM");
        Assert.Equal(0, guest.WaitForExit());
        Assert.DoesNotContain("Power down", guest.Output);
    }

    [Theory]
    [InlineData("TERM")]
    [InlineData("INT")]
    [InlineData("HUP")]
    public void A_guest_that_prints_and_hears_nothing_can_be_ended(string signal)
    {
        // A loop that never stops, with interrupts off.
        File.WriteAllBytes(_folder["loop"], Spinning());
        using GuestSession guest = GuestSession.Start("run", "--firmware", _folder["loop"]);
        // Handlers are there once the machine is.
        Assert.True(SpinWait.SpinUntil(() => Directory.Exists($"/proc/{guest.ProcessId}") && HasVcpu(guest.ProcessId), Limit));
        guest.Signal(signal);
        Assert.Equal(0, guest.WaitForExit());
        Assert.Equal("", guest.Output);
    }

    [Fact]
    public void The_end_of_the_input_leaves_the_guest_running()
    {
        using GuestSession guest = GuestSession.Start("run", "--append", "loglevel=7");
        guest.CloseInput();
        guest.Expect(GuestSession.Prompt);
        Thread.Sleep(500);
        Assert.False(guest.HasExited);
        guest.Signal("INT");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Theory]
    [InlineData(">&-")]
    [InlineData("<&- >&-")]
    [InlineData("<&- >&- 2>&-")]
    public void Closed_descriptors_are_not_mistaken_for_others(string redirection)
    {
        string image = Nasm.Assemble(_folder, "multiboot");
        string console = _folder["console"];
        using GuestSession guest = GuestSession.StartProgram(
            "/bin/sh", "-c", $"exec \"$0\" \"$@\" {redirection}", KvasirProgram.Path, "run", "--kernel", image, "--append", "no terminal", "--device", "isa-debug-exit",
            "--device", $"debugcon,file={console}");
        Assert.Equal(0x21 << 1 | 1, guest.WaitForExit(Limit));
        Assert.Equal($"{image} no terminal\n", File.ReadAllText(console));
    }

    [Fact]
    public void A_guest_goes_on_when_nobody_reads_its_output()
    {
        // The reader leaves after one line; the guest's output has nowhere to go from then on.
        using GuestSession guest = GuestSession.StartProgram(
            "/bin/bash", "-c", "\"$0\" \"$@\" | head -n 1; exit ${PIPESTATUS[0]}", KvasirProgram.Path, "run", "--append", "loglevel=7");
        guest.Expect("\n");
        // Nothing tells when its shell is there: only what it does. The end by its own power-off does.
        Stopwatch clock = Stopwatch.StartNew();
        while (!guest.HasExited)
        {
            Assert.True(clock.Elapsed < Limit, "the guest does not listen any more");
            guest.Send("poweroff");
            Thread.Sleep(1000);
        }
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void Output_that_is_read_late_is_whole()
    {
        using GuestSession guest = GuestSession.StartProgram("/bin/bash", "-c", "\"$0\" \"$@\" | (sleep 20; cat)", KvasirProgram.Path, "run", "--append", "loglevel=7");
        // More than a pipe and the queue before it hold.
        guest.Expect(GuestSession.Prompt);
        guest.Send("seq 1 30000; echo all-'of'-it; poweroff");
        string lines = guest.Expect("all-of-it", Limit);
        int first = lines.IndexOf("\n1\n2\n", StringComparison.Ordinal);
        Assert.Equal(string.Join('\n', System.Linq.Enumerable.Range(1, 30000)), lines[(first + 1)..].TrimEnd('\n'));
        Assert.Equal(0, guest.WaitForExit());
    }

    private static bool HasVcpu(int id)
    {
        foreach (string task in Directory.EnumerateDirectories($"/proc/{id}/task"))
        {
            try
            {
                if (File.ReadAllText($"{task}/comm") == "vcpu0\n")
                    return true;
            }
            catch (IOException)
            {
                // A thread that ended meanwhile.
            }
        }
        return false;
    }

    /// <summary>A ROM of 64 KiB whose first instruction jumps to itself.</summary>
    private static byte[] Spinning()
    {
        byte[] rom = new byte[0x10000];
        rom[0xfff0] = 0xeb;
        rom[0xfff1] = 0xfe;
        return rom;
    }

    private static void HostTool(string program, params string[] arguments)
    {
        using Process process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true })!;
        process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.Equal(0, process.ExitCode);
    }
}
