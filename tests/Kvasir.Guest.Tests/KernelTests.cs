using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Threading;
using Kvasir.Cli;
using Kvasir.Cli.Guests;
using Kvasir.Network.User;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Debian's 32-bit kernels: two-level paging without NX, and PAE.</summary>
public sealed class KernelTests
{
    /// <summary>Only emergencies: the file system's modules are for another kernel, and it says so.</summary>
    private const string CommandLine = "console=ttyS0 quiet loglevel=1";

    /// <summary>The file that holds a kernel's release, beside its modules.</summary>
    private const string ReleaseName = "release";

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
    /// 32-bit drivers of all virtio devices at once; with <paramref name="append"/> the legacy interface and interrupt pins, which the 64-bit kernel uses no more.
    /// </summary>
    [Theory]
    [InlineData("linux-image-686-pae", "")]
    [InlineData("linux-image-686", "virtio_pci.force_legacy=1 pci=nomsi")]
    public void A_32_bit_kernel_drives_every_virtio_device(string package, string append)
    {
        const int size = 2 << 20;
        Assert.SkipWhen(UserNetwork.LibraryVersion is null, "libslirp is not installed (package libslirp0)");
        string kernel = Fetch(package);
        (_, string initialRamdisk) = GuestImages.Default("i386");
        using TemporaryFolder folder = new();
        string modules = $"lib/modules/{File.ReadAllText($"{kernel}.drivers/{ReleaseName}")}";
        GuestImages.Extend(
            folder["initrd"], initialRamdisk,
            Directory.EnumerateFiles($"{kernel}.drivers", "*.ko").Select(module => ($"{modules}/{Path.GetFileName(module)}", File.ReadAllBytes(module))));
        byte[] content = new byte[size];
        new Random(8).NextBytes(content);
        string sum = Sum(content);
        File.WriteAllBytes(folder["disk"], content);
        File.WriteAllBytes(folder["unit"], content);
        Directory.CreateDirectory(folder["shared"]);
        File.WriteAllBytes(folder["shared/file"], content);
        using HostFileServer server = new(content);
        // The console and the shared folder have no legacy interface that Linux would drive there.
        bool legacy = append.Length > 0;
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", folder["initrd"], "--append", $"{CommandLine} {append}", "--net", "user,loopback", "--disk", $"{folder["disk"]},format=raw",
            "--disk", $"{folder["unit"]},format=raw,bus=scsi", "--device", "virtio-rng", "--device", "virtio-balloon", "--device", $"virtio-console,file={folder["console"]}",
            "--share", folder["shared"]);
        guest.Expect(GuestSession.Prompt);
        guest.Run($"depmod; modprobe virtio_pci{(legacy ? " force_legacy=1" : "")}; for m in virtio_blk virtio_scsi sd_mod virtio_net virtio_console virtio-rng virtio_balloon; do modprobe $m || echo $m; done");

        foreach (string disk in (string[])["vda", "sda"])
        {
            DiskTests.RunUntil(guest, $"[ -b /dev/{disk} ]");
            Assert.Equal(sum, guest.Run($"sha256sum </dev/{disk} | cut -d ' ' -f 1"));
        }
        guest.Run("dd if=/dev/urandom of=/tmp/data bs=64k count=8 2>/dev/null; for d in vda sda; do dd if=/tmp/data of=/dev/$d bs=4k oflag=direct 2>/dev/null; done; sync");
        string written = guest.Run("sha256sum </tmp/data | cut -d ' ' -f 1");

        guest.Run("ifconfig eth0 up; udhcpc -i eth0 -s /etc/lease -t 100 -T 2 -n -q >/dev/null 2>&1");
        Assert.Contains("10.0.2.15", guest.Run("ifconfig eth0"), StringComparison.Ordinal);
        Assert.Equal(sum, guest.Run($"nc 10.0.2.2 {server.Port} </dev/null | sha256sum | cut -d ' ' -f 1"));

        DiskTests.RunUntil(guest, "[ -e /sys/class/misc/hw_random/rng_current ] && grep -q virtio /sys/class/misc/hw_random/rng_current");
        Assert.Equal("64", guest.Run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c"));
        DiskTests.RunUntil(guest, "ls /sys/bus/virtio/drivers/virtio_balloon | grep -q ^virtio");
        DiskTests.RunUntil(guest, "[ -e /dev/hvc0 ]");
        guest.Run("echo on-the-console >/dev/hvc0");
        Assert.True(SpinWait.SpinUntil(() => File.ReadAllText(folder["console"]).Contains("on-the-console", StringComparison.Ordinal), GuestSession.DefaultLimit));
        if (!legacy)
        {
            guest.Run("modprobe virtiofs; mkdir /share; mount -t virtiofs share /share");
            Assert.Equal(sum, guest.Run("sha256sum </share/file | cut -d ' ' -f 1"));
            guest.Run("cp /tmp/data /share/new; umount /share");
            Assert.Equal(written, Sum(File.ReadAllBytes(folder["shared/new"])));
        }
        if (legacy)
            Assert.NotEqual("0", guest.Run("awk '/virtio/ { n += $2 } END { print n + 0 }' /proc/interrupts"));
        Assert.Equal(legacy ? "IO-APIC" : "PCI-MSI", guest.Run("grep virtio /proc/interrupts | tail -n 1 | grep -o 'IO-APIC\\|PCI-MSI'"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        foreach (string disk in (string[])["disk", "unit"])
            Assert.Equal(written, Sum(File.ReadAllBytes(folder[disk]).AsSpan(0, 8 * 65536)));
    }

    private static string Sum(ReadOnlySpan<byte> bytes) => Convert.ToHexStringLower(System.Security.Cryptography.SHA256.HashData(bytes));

    /// <summary>Modules that drive virtio devices, and those that they need.</summary>
    private static bool IsDriver(string path)
    {
        string name = Path.GetFileNameWithoutExtension(path);
        return path.EndsWith(".ko", StringComparison.Ordinal)
            && (name.StartsWith("virtio", StringComparison.Ordinal) || name.StartsWith("crc", StringComparison.Ordinal)
                || name is "failover" or "net_failover" or "scsi_mod" or "scsi_common" or "sd_mod" or "t10-pi" or "fuse");
    }

    /// <summary>A kernel from the distribution's archive, fetched once into the user's cache, with its drivers in a folder beside it.</summary>
    private static string Fetch(string metapackage)
    {
        lock (Fetching)
        {
            string folder = Path.Combine(UserFolders.Cache, "kernels");
            string kept = Path.Combine(folder, $"vmlinuz-{metapackage["linux-image-".Length..]}");
            if (File.Exists(kept) && File.Exists($"{kept}.drivers/{ReleaseName}"))
                return kept;
            if (!AptArchive.IsAvailable)
                Assert.Skip("this host has no apt-get");
            using TemporaryFolder download = new();
            try
            {
                AptArchive archive = new("i386", Path.Combine(UserFolders.Cache, "apt", "i386"), _ => { });
                string file = archive.Download(archive.Resolve([metapackage], "linux-image-"), download["package"]);
                Dictionary<string, byte[]> files = PackageFile.Read(file, path => path.StartsWith("boot/vmlinuz-", StringComparison.Ordinal) || IsDriver(path));
                Directory.CreateDirectory($"{kept}.drivers");
                (string image, byte[] code) = files.Single(entry => entry.Key.StartsWith("boot/", StringComparison.Ordinal));
                File.WriteAllBytes(download["kernel"], code);
                foreach ((string path, byte[] content) in files.Where(entry => IsDriver(entry.Key)))
                    File.WriteAllBytes(Path.Combine($"{kept}.drivers", Path.GetFileName(path)), content);
                File.WriteAllText($"{kept}.drivers/{ReleaseName}", image["boot/vmlinuz-".Length..]);
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
