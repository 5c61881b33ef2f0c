using System;
using System.Globalization;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// Several processors under load: lost wake-ups show as hangs, lost stores as wrong sums, clocks that disagree in the kernel's log. Some seconds in the
/// suite; KVASIR_GUEST_STRESS gives a number of seconds.
/// </summary>
public sealed class StressTests
{
    private const int DefaultSeconds = 10;

    [Theory]
    [InlineData(2)]
    [InlineData(4)]
    public void Pipelines_and_fork_storms_come_to_the_right_results(int cpus)
    {
        int seconds = int.TryParse(Environment.GetEnvironmentVariable("KVASIR_GUEST_STRESS"), NumberStyles.None, CultureInfo.InvariantCulture, out int given)
            ? given
            : DefaultSeconds;
        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        using TemporaryFolder folder = new();
        GuestImages.Extend(folder["initrd"], initialRamdisk, [("stress", GuestImages.Script("stress.sh"))]);
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", folder["initrd"], "--append", GuestImages.CommandLine,
            "--cpus", cpus.ToString(CultureInfo.InvariantCulture), "--memory", "1G");
        guest.Expect(GuestSession.Prompt);
        guest.Send(string.Create(CultureInfo.InvariantCulture, $"sh /stress {seconds} {cpus + 1}"));
        string complaints = guest.Expect("STRESS ", TimeSpan.FromSeconds(seconds) + TimeSpan.FromMinutes(12));
        string result = guest.Expect("\n");
        TestContext.Current.SendDiagnosticMessage($"{cpus} processors, {seconds} s: {result}");
        Assert.DoesNotContain("WRONG", complaints);
        Assert.EndsWith(string.Create(CultureInfo.InvariantCulture, $", wrong 0, workers {cpus + 1}"), result);
        Assert.DoesNotContain("rounds 0,", result);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }
}
