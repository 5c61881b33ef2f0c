using System.Globalization;
using System.Text.RegularExpressions;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>What a bare <c>kvasir run</c> gives: a Linux to its prompt, and every way to leave it.</summary>
public sealed class DefaultGuestTests
{
    [Fact]
    public void Boots_to_its_prompt_and_powers_off()
    {
        using GuestSession guest = GuestSession.Boot("--append", "loglevel=7");
        Assert.Contains("] Linux version ", guest.Output);
        Match line = Regex.Match(guest.Output, @"\nLinux (\S+) on x86_64, 1 CPU\(s\), (\d+) MiB\. 'exit' or 'poweroff' ends it\.\n");
        Assert.True(line.Success, guest.Output);
        Assert.InRange(int.Parse(line.Groups[2].Value, CultureInfo.InvariantCulture), 440, 512);
        Assert.Equal("1", guest.Run("nproc"));
        Assert.Equal(line.Groups[1].Value, guest.Run("uname -r"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Contains("reboot: Power down", guest.Output);
        Assert.Equal("", guest.Error);
    }

    [Fact]
    public void Reboots_and_boots_again()
    {
        using GuestSession guest = GuestSession.Boot("--cpus", "2");
        Assert.Equal("2", guest.Run("nproc"));
        guest.Run("touch /tmp/before");
        guest.Send("reboot");
        guest.Expect("\nLinux ");
        guest.Expect(GuestSession.Prompt);
        Assert.Equal("2", guest.Run("nproc"));
        Assert.Equal("new", guest.Run("[ -e /tmp/before ] || echo new"));
        guest.CheckKernelLog();
        guest.Send("exit");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void Ends_at_a_reboot_when_asked_to()
    {
        using GuestSession guest = GuestSession.Boot("--no-reboot", "--append", "loglevel=7");
        guest.Send("reboot");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Single(Regex.Matches(guest.Output, @"\] Linux version "));
    }

    [Fact]
    public void Runs_on_four_processors()
    {
        using GuestSession guest = GuestSession.Boot("--cpus", "4", "--memory", "1G");
        Assert.Equal("4", guest.Run("nproc"));
        Assert.Equal("0-3", guest.Run("cat /sys/devices/system/cpu/online"));
        // The kernel measures the TSC for a second before it takes it.
        Assert.Equal("tsc", guest.Run("cd /sys/devices/system/clocksource/clocksource0; n=0; until grep -qx tsc current_clocksource || [ $n = 1000 ]; do sleep 0.1; n=$((n+1)); done; cat current_clocksource"));
        // Each of them runs what is bound to it.
        Assert.Equal("0 1 2 3", guest.Run("for cpu in 0 1 2 3; do taskset $((1 << cpu)) awk '{ print $39 }' /proc/self/stat; done | tr '\\n' ' ' | sed 's/ $//'"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void The_terminal_keys_reach_the_shell()
    {
        using GuestSession guest = GuestSession.Boot();
        // What comes before the program runs is the shell's line editor's: each key waits until the program has printed.
        guest.Send("sh -c 'echo c\"a\"t; exec cat'");
        guest.Expect("cat\n");
        guest.Send("taken by it");
        guest.Expect("taken by it\n");
        guest.Type("\u0003");
        guest.Expect(GuestSession.Prompt);
        guest.Send("sh -c 'echo $$ >/tmp/loop; while sleep 1; do echo t\"ic\"k; done'");
        guest.Expect("tick\n");
        guest.Type("\u001a");
        guest.Expect("Stopped");
        Assert.Equal("T", guest.Run("awk '/^State/ { print $2 }' /proc/$(cat /tmp/loop)/status"));
        guest.Send("fg");
        guest.Expect("tick\n");
        guest.Type("\u0003");
        guest.Expect(GuestSession.Prompt);
        DiskTests.RunUntil(guest, "! pidof sleep");
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }
}
