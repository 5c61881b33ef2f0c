using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text.RegularExpressions;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Programs at work in the guest, 64-bit and 32-bit, on one processor and on two, with results that the guest checks itself.</summary>
public sealed class UserlandTests64 : UserlandTests
{
    [Fact]
    public void Checks_pass_on_one_processor() => RunChecks("amd64", 1);

    [Fact]
    public void Checks_pass_on_two_processors() => RunChecks("amd64", 2);
}

/// <inheritdoc cref="UserlandTests64"/>
public sealed class UserlandTests32 : UserlandTests
{
    [Fact]
    public void Checks_pass_on_one_processor() => RunChecks("i386", 1);

    [Fact]
    public void Checks_pass_on_two_processors() => RunChecks("i386", 2);
}

/// <summary>What both have in common.</summary>
public abstract class UserlandTests
{
    /// <summary>The features of x86-64-v3 as /proc/cpuinfo calls them, and what cryptography looks for.</summary>
    private static readonly string[] Features =
    [
        "cx16", "lahf_lm", "popcnt", "sse4_1", "sse4_2", "ssse3", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave", "aes", "pclmulqdq", "sha_ni", "rdrand",
        "rdseed", "adx", "fsgsbase",
    ];

    private protected static void RunChecks(string userland, int cpus)
    {
        (string kernel, string initialRamdisk) = GuestImages.Default(userland);
        using TemporaryFolder folder = new();
        GuestImages.Extend(folder["initrd"], initialRamdisk, [("check", GuestImages.Script("check.sh"))]);
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", folder["initrd"], "--append", GuestImages.CommandLine, "--cpus", cpus.ToString(CultureInfo.InvariantCulture));
        guest.Expect(GuestSession.Prompt);
        CheckFeatures(guest);
        (long uptime, long date, Stopwatch clock) = StartClock(guest);

        guest.Send("sh /check");
        string results = guest.Expect("CHECKED ", TimeSpan.FromMinutes(10));
        string summary = guest.Expect(" failed");
        string[] failed = [.. results.Split('\n').Where(line => line.StartsWith("FAIL ", StringComparison.Ordinal))];
        Assert.True(failed.Length == 0, string.Join('\n', failed));
        Assert.Equal($"{Regex.Count(results, "^PASS ", RegexOptions.Multiline)}, 0", summary);

        CompareClocks(guest, uptime, date, clock);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    /// <summary>What the host has, the guest has.</summary>
    private static void CheckFeatures(GuestSession guest)
    {
        string[] host = Flags(File.ReadAllText("/proc/cpuinfo"));
        string[] offered = Flags(guest.Run("grep -m 1 ^flags /proc/cpuinfo"));
        string[] missing = [.. Features.Where(feature => host.Contains(feature) && !offered.Contains(feature))];
        Assert.True(missing.Length == 0, $"the guest lacks {string.Join(", ", missing)}");
    }

    private static string[] Flags(string cpuinfo) =>
        cpuinfo.Split('\n').First(line => line.StartsWith("flags", StringComparison.Ordinal)).Split(':')[1].Split(' ', StringSplitOptions.RemoveEmptyEntries);

    private static (long Uptime, long Date, Stopwatch Clock) StartClock(GuestSession guest)
    {
        Stopwatch clock = Stopwatch.StartNew();
        (long uptime, long date) = ReadClock(guest);
        long skew = date - DateTimeOffset.UtcNow.ToUnixTimeSeconds();
        Assert.InRange(skew, -30, 5);
        return (uptime, date, clock);
    }

    /// <summary>The guest's clocks went on as the host's did, but for the time between a reading and its printing.</summary>
    private static void CompareClocks(GuestSession guest, long uptime, long date, Stopwatch clock)
    {
        TimeSpan before = clock.Elapsed;
        (long uptimeNow, long dateNow) = ReadClock(guest);
        TimeSpan after = clock.Elapsed;
        long slack = (long)(after - before).TotalSeconds + 15;
        long elapsed = (long)before.TotalSeconds;
        Assert.InRange(uptimeNow - uptime, elapsed - slack, elapsed + slack);
        Assert.InRange(dateNow - date, elapsed - slack, elapsed + slack);
    }

    private static (long Uptime, long Date) ReadClock(GuestSession guest)
    {
        string[] words = guest.Run("echo $(cut -d . -f 1 /proc/uptime) $(date +%s)").Split(' ');
        return (long.Parse(words[0], CultureInfo.InvariantCulture), long.Parse(words[1], CultureInfo.InvariantCulture));
    }
}
