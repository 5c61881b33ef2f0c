using System;
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
        Reading first = ReadClock(guest);
        // The guest took the time of day from its RTC, which counts whole seconds, when it started.
        Assert.InRange(first.Date, first.Before.ToUnixTimeSeconds() - 5, first.After.ToUnixTimeSeconds() + 5);

        guest.Send("sh /check");
        string results = guest.Expect("CHECKED ", TimeSpan.FromMinutes(15));
        string summary = guest.Expect(" failed");
        string[] failed = [.. results.Split('\n').Where(line => line.StartsWith("FAIL ", StringComparison.Ordinal))];
        Assert.True(failed.Length == 0, string.Join('\n', failed));
        Assert.Equal($"{Regex.Count(results, "^PASS ", RegexOptions.Multiline)}, 0", summary);

        // The guest's clocks went on as the host's did, but for the time between a reading and its printing.
        Reading last = ReadClock(guest);
        long least = (long)(last.Before - first.After).TotalSeconds - 15;
        long most = (long)(last.After - first.Before).TotalSeconds + 15;
        Assert.InRange(last.Uptime - first.Uptime, least, most);
        Assert.InRange(last.Date - first.Date, least, most);
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

    /// <summary>The guest's clocks, and the host's before and after they were asked for.</summary>
    private readonly record struct Reading(DateTimeOffset Before, long Uptime, long Date, DateTimeOffset After);

    private static Reading ReadClock(GuestSession guest)
    {
        DateTimeOffset before = DateTimeOffset.UtcNow;
        string[] words = guest.Run("echo $(cut -d . -f 1 /proc/uptime) $(date +%s)").Split(' ');
        return new Reading(before, long.Parse(words[0], CultureInfo.InvariantCulture), long.Parse(words[1], CultureInfo.InvariantCulture), DateTimeOffset.UtcNow);
    }
}
