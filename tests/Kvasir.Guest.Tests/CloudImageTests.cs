using System;
using System.IO;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// A distribution's own disk image with GRUB and cloud-init, which boots by firmware and configures itself from the seed disk. Such an image is large: the environment variable
/// KVASIR_CLOUD_IMAGE names one, and <c>tests/images/cloud-debian.sh</c> makes one of Debian's packages.
/// </summary>
public sealed class CloudImageTests
{
    private const string Variable = "KVASIR_CLOUD_IMAGE";
    private const string Key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHVuaXQtdGVzdC1rZXktb2Yta3Zhc2lyLTAxMjM0NTY3 test@host";

    private static readonly TimeSpan Patience = TimeSpan.FromMinutes(12);

    [Theory]
    [InlineData("virtio")]
    [InlineData("scsi")]
    public void A_cloud_image_boots_by_firmware_and_takes_name_key_and_user_data_from_the_seed(string bus)
    {
        string? image = Environment.GetEnvironmentVariable(Variable);
        Assert.SkipWhen(string.IsNullOrEmpty(image), $"{Variable} names no cloud image");
        using TemporaryFolder folder = new();
        File.WriteAllText(folder["key.pub"], $"{Key}\n");
        File.WriteAllText(
            folder["user-data"],
            "#cloud-config\nruncmd:\n  - [sh, -c, 'echo \"seeded: $(hostname) $(grep test@host /home/*/.ssh/authorized_keys)\" >/dev/ttyS0']\n"
            + "  - [sh, -c, 'while ! systemctl --quiet is-active getty.target; do sleep 1; done; echo \"all is up\" >/dev/ttyS0']\n");
        string name = $"cloud-{bus}-{Environment.ProcessId}";
        try
        {
            using GuestSession guest = GuestSession.Start(
                "run", "--name", name, "--firmware", "bios", "--memory", "1G", "--disk", $"{image},snapshot,bus={bus}", "--hostname", "proof",
                "--ssh-key", folder["key.pub"], "--user-data", folder["user-data"]);
            Assert.Equal($"proof {Key}", guest.ExpectLine("seeded: ", Patience));
            guest.Expect("all is up", Patience);
            // Before or after.
            Assert.True(SpinWait.SpinUntil(() => guest.Output.Contains("proof login: ", StringComparison.Ordinal), Patience));
            guest.Signal("TERM");
            Assert.Equal(0, guest.WaitForExit(Patience));
        }
        finally
        {
            KvasirProgram.Run(Patience, "image", "rm", "--vm", name);
        }
    }
}
