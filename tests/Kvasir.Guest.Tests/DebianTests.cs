using System;
using System.Globalization;
using Kvasir.Cli.Guests;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>The guest <c>debian</c>, with systemd, as its user meets it. Its image is not built here, which takes minutes: <c>kvasir image build debian</c> does it.</summary>
public sealed class DebianTests
{
    private static readonly TimeSpan Patience = TimeSpan.FromMinutes(12);

    [Fact]
    public void A_named_debian_boots_and_is_reached_by_ssh()
    {
        Assert.SkipUnless(DebianGuest.IsBuilt, "the guest debian is not built: kvasir image build debian");
        Assert.SkipUnless(Network.User.UserNetwork.LibraryVersion is not null, "libslirp is not installed (package libslirp0)");
        string name = string.Create(CultureInfo.InvariantCulture, $"test-{Environment.ProcessId}");
        try
        {
            using GuestSession guest = GuestSession.Start("run", "debian", "--name", name, "--hostname", "proof", "--size", "11G", "--cpus", "2");
            guest.Expect("proof login: ", Patience);
            string Ssh(string command)
            {
                (int code, string output, string error) = KvasirProgram.Run(Patience, "ssh", name, command);
                Assert.True(code == 0, $"{command} ended with code {code}: {output}{error}");
                return output.Trim();
            }

            Assert.Equal("proof", Ssh("hostname"));
            Assert.Equal("debian 2", Ssh("echo $(id -un) $(nproc)"));
            Assert.Equal("big", Ssh("[ $(df --output=size -k / | tail -n 1) -gt 10500000 ] && echo big"));
            Assert.Equal("0", Ssh("sudo -n id -u"));
            Assert.StartsWith("2 packets transmitted, 2 received", Ssh("ping -c 2 10.0.2.2 | grep transmitted"));
            Assert.Equal("running", Ssh("systemctl is-system-running --wait"));
            Assert.Equal("", Ssh("sudo dmesg --level=err,crit,alert,emerg"));
            (int _, string _, string _) = KvasirProgram.Run(Patience, "ssh", name, "sudo systemctl poweroff");
            Assert.Equal(0, guest.WaitForExit(Patience));
        }
        finally
        {
            KvasirProgram.Run(Patience, "image", "rm", "--vm", name);
        }
    }
}
