using System;
using System.IO;
using Kvasir.Kvm;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// Linux on /dev/kvm, with interrupt controllers in user space and in the kernel. Where KVM emulates kernels that takes many minutes: KVASIR_GUEST_KVM=1 has
/// the one with the controllers in user space run there, too.
/// </summary>
public sealed class KvmTests
{
    private static readonly TimeSpan s_patience = TimeSpan.FromHours(2);
    private static readonly KvmProbe s_probe = KvmProbe.Run();

    [Theory]
    [InlineData("off")]
    [InlineData("split")]
    [InlineData("on")]
    public void Linux_boots_to_its_shell_and_powers_off(string irqChip)
    {
        Assert.SkipWhen(s_probe.Problem is not null, $"{s_probe.Problem}");
        Assert.SkipUnless(
            s_probe.IsHardware || (irqChip == "off" && Environment.GetEnvironmentVariable("KVASIR_GUEST_KVM") == "1"),
            $"this host's KVM emulates kernels (ring-0 code at {s_probe.SpeedText} instructions/s): a boot takes many minutes (KVASIR_GUEST_KVM=1 has one of them run)");
        using TemporaryFolder folder = new();
        string disk = folder["disk.img"];
        byte[] content = new byte[1 << 20];
        new Random(11).NextBytes(content);
        File.WriteAllBytes(disk, content);
        using GuestSession guest = GuestSession.Start("run", "--accel", $"kvm,kernel-irqchip={irqChip}", "--log", "kvm", "--disk", disk);
        guest.Expect(GuestSession.Prompt, s_patience);
        Assert.Contains("KVM", guest.Run("dmesg | grep -i hypervisor", s_patience), StringComparison.Ordinal);
        Assert.Equal("3", guest.Run("sleep 1; echo $((1 + 2))", s_patience));
        Assert.Equal(
            Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(content)),
            guest.Run("dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1", s_patience));
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit(s_patience));
        if (!s_probe.IsHardware)
            Assert.Contains("were executed by the software CPU", guest.Error, StringComparison.Ordinal);
    }
}
