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
        guest.Expect(GuestSession.Prompt);
        Assert.Equal("i686", guest.Run("uname -m"));
        Assert.Equal(pae ? "2" : "1", guest.Run("nproc"));
        Assert.Equal("ee9762749fc5338b6c9b0948d14219c7", guest.Run("seq 1 3000 | gzip -c | gunzip -c | md5sum | cut -d ' ' -f 1"));
        if (pae)
            Assert.Equal("high", guest.Run("awk '/^MemTotal/ { print ($2 > 4500000) ? \"high\" : $2 }' /proc/meminfo"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    /// <summary>
    /// 32-bit virtio drivers; with <paramref name="append"/> the legacy interface and interrupt pins, which the 64-bit kernel uses no more.
    /// </summary>
    [Theory]
    [InlineData("linux-image-686-pae", "")]
    [InlineData("linux-image-686", "virtio_pci.force_legacy=1 pci=nomsi")]
    public void A_32_bit_kernel_drives_virtio_disks(string package, string append)
    {
        string kernel = Fetch(package);
        (_, string initialRamdisk) = GuestImages.Default("i386");
        using TemporaryFolder folder = new();
        List<(string, byte[])> files = [];
        foreach (string module in Directory.EnumerateFiles($"{kernel}.modules"))
            files.Add(($"virtio/{Path.GetFileName(module)}", File.ReadAllBytes(module)));
        GuestImages.Extend(folder["initrd"], initialRamdisk, files);
        byte[] content = new byte[2 << 20];
        new Random(8).NextBytes(content);
        File.WriteAllBytes(folder["disk"], content);
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", folder["initrd"], "--append", $"{CommandLine} {append}", "--disk", $"{folder["disk"]},format=raw");
        guest.Expect(GuestSession.Prompt);
        string legacy = append.Length > 0 ? "force_legacy=1" : "";
        guest.Run($"cd /virtio; for m in virtio virtio_ring virtio_pci_modern_dev virtio_pci_legacy_dev; do [ ! -f $m.ko ] || insmod $m.ko; done; insmod virtio_pci.ko {legacy}; insmod virtio_blk.ko; cd; [ -b /dev/vda ]");
        Assert.Equal(Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(content)), guest.Run("sha256sum </dev/vda | cut -d ' ' -f 1"));
        guest.Run("dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null; dd if=/tmp/data of=/dev/vda bs=4k oflag=direct 2>/dev/null; sync");
        string written = guest.Run("sha256sum </tmp/data | cut -d ' ' -f 1");
        if (append.Length > 0)
            Assert.NotEqual("0", guest.Run("awk '/virtio/ { n += $2 } END { print n + 0 }' /proc/interrupts"));
        Assert.Equal(append.Length > 0 ? "IO-APIC" : "PCI-MSI", guest.Run("grep virtio /proc/interrupts | tail -n 1 | grep -o 'IO-APIC\\|PCI-MSI'"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Equal(written, Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(File.ReadAllBytes(folder["disk"]).AsSpan(0, 8 * 65536))));
    }

    /// <summary>A kernel from the distribution's archive, fetched once into the user's cache, with its virtio modules in a folder beside it.</summary>
    private static string Fetch(string metapackage)
    {
        lock (Fetching)
        {
            string folder = Path.Combine(UserFolders.Cache, "kernels");
            string kept = Path.Combine(folder, $"vmlinuz-{metapackage["linux-image-".Length..]}");
            if (File.Exists(kept) && Directory.Exists($"{kept}.modules"))
                return kept;
            if (!AptArchive.IsAvailable)
                Assert.Skip("this host has no apt-get");
            using TemporaryFolder download = new();
            try
            {
                AptArchive archive = new("i386", Path.Combine(UserFolders.Cache, "apt", "i386"), _ => { });
                string file = archive.Download(archive.Resolve([metapackage], "linux-image-"), download["package"]);
                Dictionary<string, byte[]> files = PackageFile.Read(file, path =>
                    path.StartsWith("boot/vmlinuz-", StringComparison.Ordinal) || (Path.GetFileName(path).StartsWith("virtio", StringComparison.Ordinal) && path.EndsWith(".ko", StringComparison.Ordinal)));
                Directory.CreateDirectory(folder);
                File.WriteAllBytes(download["kernel"], files.Single(entry => entry.Key.StartsWith("boot/", StringComparison.Ordinal)).Value);
                Directory.CreateDirectory($"{kept}.modules");
                foreach ((string path, byte[] content) in files.Where(entry => entry.Key.EndsWith(".ko", StringComparison.Ordinal)))
                    File.WriteAllBytes(Path.Combine($"{kept}.modules", Path.GetFileName(path)), content);
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
