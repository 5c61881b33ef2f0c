using System;
using System.Globalization;
using System.Linq;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Small and large memories, and the hole for devices below 4 GiB.</summary>
public sealed class MemoryTests
{
    private const long MiB = 1L << 20;

    [Fact]
    public void Linux_fits_into_96_MiB()
    {
        using GuestSession guest = GuestSession.Boot("--memory", "96M");
        Assert.InRange(TotalMiB(guest), 30, 96);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void Memory_too_small_for_the_kernel_is_refused_or_ends_in_a_panic()
    {
        // What the kernel says and does then is its own affair; the command must neither hang nor crash.
        using GuestSession guest = GuestSession.Start("run", "--memory", "16M", "--append", "loglevel=7 panic=-1", "--no-reboot");
        int code = guest.WaitForExit();
        Assert.Contains(code, (int[])[0, 2, 3]);
        if (code == 2)
            Assert.Matches(@"^kvasir: [^\n]+\n$", guest.Error);
    }

    [Fact]
    public void Four_GiB_leave_a_hole_and_cost_what_the_guest_touches()
    {
        using GuestSession guest = GuestSession.Boot("--memory", "4G");
        Assert.InRange(TotalMiB(guest), 3800, 4096);
        string[] ranges = [.. guest.Run("grep 'System RAM' /proc/iomem | sed 's/ :.*//; s/^ *//'").Split('\n')];
        (ulong First, ulong Last)[] parsed = [.. ranges.Select(range => (Hex(range.Split('-')[0]), Hex(range.Split('-')[1])))];
        Assert.Contains(parsed, range => range.First == 0x1_0000_0000);
        Assert.DoesNotContain(parsed, range => range.First < 0x1_0000_0000 && range.Last >= 0xfec0_0000);
        // Memory on both sides of the hole works: a file system in it takes more than either side of the first gigabytes would hold alone.
        Assert.Equal("3566de3a97906edb98d004d6b947ae9b", guest.Run("dd if=/dev/zero bs=1M count=200 2>/dev/null >/tmp/zeros; md5sum </tmp/zeros | cut -d ' ' -f 1"));
        Assert.InRange(HostProcess.ResidentBytes(guest.ProcessId), 100 * MiB, 1000 * MiB);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void Sixty_four_GiB_cost_nothing_untouched()
    {
        using TemporaryFolder folder = new();
        // Without the exit device the guest stays in its HLT.
        using GuestSession guest = GuestSession.Start(
            "run", "--serial", "none", "--memory", "64G", "--kernel", Nasm.Assemble(folder, "multiboot"), "--append", "large", "--device", "debugcon");
        Assert.True(SpinWait.SpinUntil(() => guest.Error.Contains("large\n", StringComparison.Ordinal), GuestSession.DefaultLimit), guest.Error);
        Assert.InRange(HostProcess.ResidentBytes(guest.ProcessId), 1, 200 * MiB);
        guest.Signal("TERM");
        Assert.Equal(0, guest.WaitForExit());
    }

    private static int TotalMiB(GuestSession guest) =>
        int.Parse(guest.Run("awk '/^MemTotal/ { printf \"%d\", $2 / 1024 }' /proc/meminfo"), CultureInfo.InvariantCulture);

    private static ulong Hex(string text) => ulong.Parse(text, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture);
}
