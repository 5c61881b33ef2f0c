using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Threading;
using Kvasir.Cli;
using Kvasir.Cli.Guests;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Debian's 32-bit kernels: two-level paging without NX, and PAE.</summary>
public sealed class KernelTests
{
    /// <summary>Only emergencies: the file system's modules are for another kernel, and it says so.</summary>
    private const string CommandLine = "console=ttyS0 quiet loglevel=1";

    private static readonly Lock Fetching = new();

    [Theory]
    [InlineData("linux-image-686", false)]
    [InlineData("linux-image-686-pae", true)]
    public void A_32_bit_kernel_boots_to_its_shell(string package, bool pae)
    {
        string kernel = Fetch(package);
        (_, string initialRamdisk) = GuestImages.Default("i386");
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", initialRamdisk, "--append", CommandLine, "--cpus", pae ? "2" : "1", "--memory", pae ? "5G" : "512M");
        guest.Expect(GuestSession.Prompt, TimeSpan.FromMinutes(4));
        Assert.Equal("i686", guest.Run("uname -m"));
        Assert.Equal(pae ? "2" : "1", guest.Run("nproc"));
        Assert.Equal("ee9762749fc5338b6c9b0948d14219c7", guest.Run("seq 1 3000 | gzip -c | gunzip -c | md5sum | cut -d ' ' -f 1"));
        if (pae)
            Assert.Equal("high", guest.Run("awk '/^MemTotal/ { print ($2 > 4500000) ? \"high\" : $2 }' /proc/meminfo"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    /// <summary>A kernel from the distribution's archive, fetched once into the user's cache.</summary>
    private static string Fetch(string metapackage)
    {
        lock (Fetching)
        {
            string folder = Path.Combine(UserFolders.Cache, "kernels");
            string kept = Path.Combine(folder, $"vmlinuz-{metapackage["linux-image-".Length..]}");
            if (File.Exists(kept))
                return kept;
            if (!AptArchive.IsAvailable)
                Assert.Skip("this host has no apt-get");
            using TemporaryFolder download = new();
            try
            {
                AptArchive archive = new("i386", Path.Combine(UserFolders.Cache, "apt", "i386"), _ => { });
                string file = archive.Download(archive.Resolve([metapackage], "linux-image-"), download["package"]);
                Dictionary<string, byte[]> files = PackageFile.Read(file, path => path.StartsWith("boot/vmlinuz-", StringComparison.Ordinal));
                Directory.CreateDirectory(folder);
                File.WriteAllBytes(download["kernel"], files.Values.Single());
                File.Copy(download["kernel"], $"{kept}.{Environment.ProcessId}", overwrite: true);
                File.Move($"{kept}.{Environment.ProcessId}", kept, overwrite: true);
                return kept;
            }
            catch (CommandException e)
            {
                Assert.Skip($"the package '{metapackage}' cannot be had here: {e.Message}");
                throw;
            }
        }
    }
}
