using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// Several processors under real programs' load: stress-ng with its own checks, threads that hand a lock over by futex, a build of many short processes.
/// A lost wake-up shows as a hang, a lost store as a wrong sum. The guest is that of <c>bench.sh cpu</c>. KVASIR_GUEST_SMP gives a number of seconds
/// instead of the few of an ordinary run, and KVASIR_GUEST_ENGINE the software CPU's engine instead of the default.
/// </summary>
public sealed class SmpTests
{
    private const int DefaultSeconds = 10;

    /// <summary>On a busy host the kernel's own 21 s pass with hundreds of threads waiting for two processors' fraction of a real one; a hang is longer.</summary>
    private const string PatientRcu = "rcupdate.rcu_cpu_stall_timeout=120";

    /// <summary>A busy machine and the interpreter may need many times the wanted seconds: this tells a hang from a slow guest.</summary>
    private static readonly TimeSpan Patience = TimeSpan.FromMinutes(12);

    [Theory]
    [InlineData(2)]
    [InlineData(4)]
    public void Programs_come_to_the_right_results(int cpus)
    {
        string? given = Environment.GetEnvironmentVariable("KVASIR_GUEST_SMP");
        int seconds = int.TryParse(given, NumberStyles.None, CultureInfo.InvariantCulture, out int wanted) ? wanted : DefaultSeconds;
        (string kernel, _) = GuestImages.Default("amd64");
        string? engine = Environment.GetEnvironmentVariable("KVASIR_GUEST_ENGINE");
        using GuestSession guest = GuestSession.Start(
            [
                "run", "--accel", "soft", .. string.IsNullOrEmpty(engine) ? (IEnumerable<string>)[] : ["--engine", engine],
                "--kernel", kernel, "--initrd", BenchGuest.InitialRamdisk(), "--append", $"{GuestImages.CommandLine} panic=-1 {PatientRcu}", "--no-reboot",
                "--cpus", cpus.ToString(CultureInfo.InvariantCulture), "--memory", "1G",
            ]);
        guest.Expect("@READY\n");
        guest.Send(string.Create(CultureInfo.InvariantCulture, $"smp {seconds}"));
        string results = guest.Expect("@SMP ", TimeSpan.FromSeconds(seconds) + Patience);
        string summary = guest.Expect("\n");
        string[] failed = [.. results.Split('\n').Where(line => line.StartsWith("@FAIL ", StringComparison.Ordinal))];
        Assert.True(failed.Length == 0, string.Join('\n', failed));
        int passes = results.Split('\n').Count(line => line.StartsWith("@PASS ", StringComparison.Ordinal));
        Assert.StartsWith(string.Create(CultureInfo.InvariantCulture, $"passed {passes}, failed 0, "), summary);
        Assert.EndsWith(string.Create(CultureInfo.InvariantCulture, $", processors {cpus}"), summary);
        Assert.True(passes >= 6, summary);
        TestContext.Current.SendDiagnosticMessage($"{seconds} s: {summary}");
        guest.Expect("@DONE smp 0\n");
        guest.Send("dmesg");
        KernelLog.Check(guest.Expect("@DONE dmesg 0\n"));
        guest.Send("quit");
        Assert.Equal(0, guest.WaitForExit());
    }
}

/// <summary>The guest of <c>bench.sh cpu</c>: programs from Debian packages as an initial file system.</summary>
internal static class BenchGuest
{
    private static readonly Lock Building = new();
    private static string? s_initialRamdisk;
    private static string? s_missing;

    /// <summary>The path of its initial file system. Skips the test where it cannot be built.</summary>
    public static string InitialRamdisk()
    {
        lock (Building)
        {
            if (s_missing is not null)
                Assert.Skip(s_missing);
            return s_initialRamdisk ??= Build();
        }
    }

    private static string Build()
    {
        string script = Path.Combine(KvasirProgram.Root(), "bench", "guest.py");
        Process? process;
        try
        {
            process = Process.Start(new ProcessStartInfo("python3", [script]) { RedirectStandardOutput = true, RedirectStandardError = true });
        }
        catch (System.ComponentModel.Win32Exception)
        {
            s_missing = "python3 is not installed";
            Assert.Skip(s_missing);
            throw;
        }
        using (process)
        {
            System.Threading.Tasks.Task<string> error = process!.StandardError.ReadToEndAsync();
            string output = process.StandardOutput.ReadToEnd();
            process.WaitForExit();
            string message = error.GetAwaiter().GetResult().Trim();
            // Its own word that it cannot be had here; anything else is a defect.
            if (process.ExitCode != 0 && message.Split('\n').Any(line => line.StartsWith("bench: ", StringComparison.Ordinal)) && !message.Contains("Traceback", StringComparison.Ordinal))
            {
                s_missing = $"the guest cannot be built here: {message.Split('\n')[^1]}";
                Assert.Skip(s_missing);
            }
            Assert.True(process.ExitCode == 0, message);
            return output.Trim().Split('\n')[^1];
        }
    }
}
