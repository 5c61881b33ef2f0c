using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.IO;
using System.IO.Compression;
using System.Linq;
using System.Reflection;
using System.Security.Cryptography;
using System.Text;
using Kvasir.Block;
using Kvasir.Block.Jobs;
using Kvasir.Linux;

namespace Kvasir.Cli.Guests;

/// <summary>The files of a named guest that all its VMs share.</summary>
/// <param name="Disk">A qcow2 image that VMs put overlays over; never written again.</param>
internal sealed record BaseImage(string Folder, string Kernel, string InitialRamdisk, string Disk)
{
    public const string IdentityName = "identity";

    /// <summary>Tells one build from every other: two builds of the same recipe differ in what the archive had, and no overlay fits both.</summary>
    public string Identity => $"{Path.GetFileName(Folder)} {File.ReadAllText(Path.Combine(Folder, IdentityName)).Trim()}";
}

/// <summary>
/// Debian 12 for servers, made once from its packages by mmdebstrap: systemd, networkd, an SSH server, the cloud kernel. Needs no root where user namespaces
/// and subordinate ids are there.
/// </summary>
internal static class DebianGuest
{
    /// <summary>What the user calls it.</summary>
    public const string Name = "debian";

    /// <summary>The account that the seed's keys open.</summary>
    public const string User = "debian";

    /// <summary>What the kernel is told.</summary>
    public const string KernelCommandLine = "root=/dev/vda rw console=ttyS0 quiet";

    /// <summary>The disk's size before it is grown, in bytes.</summary>
    public const long BaseSize = 10L << 30;

    public const ulong DefaultMemory = 1ul << 30;

    /// <summary>What a build takes while it runs, in bytes.</summary>
    public const long RoomToBuild = 2500L << 20;

    private const string Suite = "bookworm";
    private const string KernelName = "vmlinuz";
    private const string InitialRamdiskName = "initrd";
    private const string DiskName = "disk.qcow2";
    private const byte RecipeVersion = 1;

    private static readonly string[] Packages =
    [
        "systemd-sysv", "udev", "dbus", "systemd-resolved", "openssh-server", "linux-image-cloud-amd64", "initramfs-tools", "sudo", "iproute2", "iputils-ping",
        "ca-certificates", "kmod", "less", "nano", "e2fsprogs",
    ];

    /// <summary>The folder's name in the cache, which changes with the recipe.</summary>
    public static string FolderName
    {
        get
        {
            byte[] recipe = [.. Text("debian-setup"), .. Text("debian-disk"), .. Encoding.UTF8.GetBytes(string.Join(' ', Packages)), RecipeVersion];
            return $"{Name}-12-{Convert.ToHexStringLower(SHA256.HashData(recipe))[..8]}";
        }
    }

    public static bool IsBuilt => Directory.Exists(GuestFolder.PathOf(FolderName));

    /// <summary>Finds the guest, or builds it.</summary>
    /// <exception cref="CommandException">It is not there and cannot be built.</exception>
    public static BaseImage Get(Action<string> report)
    {
        string folder = GuestFolder.Get(FolderName, "the guest debian", RoomToBuild, temporary => Fill(temporary, report), report);
        return new BaseImage(folder, Path.Combine(folder, KernelName), Path.Combine(folder, InitialRamdiskName), Path.Combine(folder, DiskName));
    }

    private static void Fill(string folder, Action<string> report)
    {
        foreach ((string program, string package) in ((string, string)[])[("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs"), ("tar", "tar"), ("unshare", "util-linux")])
        {
            if (HostPrograms.Find(program) is null)
                throw new CommandException(ExitCode.HostTrouble, $"the guest debian is made by {program}, which this host has not: install the package {package}");
        }
        File.WriteAllBytes(Path.Combine(folder, "setup.sh"), Text("debian-setup"));
        File.WriteAllBytes(Path.Combine(folder, "disk.sh"), Text("debian-disk"));
        report("fetching and installing Debian's packages (a few minutes)");
        Run(folder, "mmdebstrap",
        [
            "--mode=auto", "--variant=minbase", "--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
            $"--include={string.Join(',', Packages)}", "--customize-hook=upload setup.sh /root/setup.sh", "--customize-hook=chroot \"$1\" sh /root/setup.sh",
            "--customize-hook=rm \"$1/root/setup.sh\"", "--format=tar", Suite, "root.tar",
        ], "user namespaces and subordinate ids are needed where it does not run as root: see the package uidmap and the file /etc/subuid");
        report("making the disk");
        string size = BaseSize.ToString(System.Globalization.CultureInfo.InvariantCulture);
        if (Environment.IsPrivilegedProcess)
            Run(folder, "sh", ["disk.sh", "root.tar", "disk.raw", size], null);
        else
            Run(folder, "unshare", ["--map-auto", "--map-root-user", "--", "sh", "disk.sh", "root.tar", "disk.raw", size], "subordinate ids are needed: see the package uidmap and the file /etc/subuid");
        File.Delete(Path.Combine(folder, "root.tar"));
        report("writing the image");
        // The kernel need not unpack what is not packed.
        using (FileStream packed = File.OpenRead(Path.Combine(folder, "initrd.gz")))
        using (GZipStream content = new(packed, CompressionMode.Decompress))
        using (FileStream plain = new(Path.Combine(folder, InitialRamdiskName), FileMode.CreateNew, FileAccess.Write))
        {
            content.CopyTo(plain);
            plain.Flush(flushToDisk: true);
        }
        MakeImage(folder).GetAwaiter().GetResult();
        File.WriteAllText(Path.Combine(folder, BaseImage.IdentityName), $"{Guid.NewGuid():N}\n");
        foreach (string leftover in (string[])["disk.raw", "initrd.gz", "setup.sh", "disk.sh"])
            File.Delete(Path.Combine(folder, leftover));
        Durability.SyncFolder(folder);
    }

    private static async System.Threading.Tasks.Task MakeImage(string folder)
    {
        try
        {
            await using BlockNode source = await Image.OpenAsync(Path.Combine(folder, "disk.raw"), new OpenOptions { Format = "raw" }).ConfigureAwait(false);
            await using BlockNode target = await ImageCreator.CreateAsync(
                "qcow2", Path.Combine(folder, DiskName), source.Length, new ImageOptions(), new Dictionary<string, ReadOnlyMemory<byte>>()).ConfigureAwait(false);
            await ImageCopy.RunAsync(source, target, new CopyOptions { TargetIsZero = true }).ConfigureAwait(false);
            await target.FlushAsync().ConfigureAwait(false);
        }
        catch (BlockException e)
        {
            throw new IOException(e.Message, e);
        }
    }

    private static void Run(string folder, string program, string[] arguments, string? advice)
    {
        ProcessStartInfo start = new(program, arguments) { WorkingDirectory = folder, RedirectStandardError = true, RedirectStandardOutput = true, RedirectStandardInput = true };
        start.Environment["PATH"] = $"{Environment.GetEnvironmentVariable("PATH")}:/usr/sbin:/sbin";
        try
        {
            using Process process = Process.Start(start)!;
            process.StandardInput.Close();
            System.Threading.Tasks.Task<string> output = process.StandardOutput.ReadToEndAsync();
            string said = process.StandardError.ReadToEnd();
            _ = output.Result;
            process.WaitForExit();
            if (process.ExitCode == 0)
                return;
            string[] lines = [.. said.Split('\n').Where(line => line.Length > 0)];
            string reason = lines.LastOrDefault(line => line.StartsWith("E:", StringComparison.Ordinal)) ?? lines.LastOrDefault() ?? $"code {process.ExitCode}";
            throw new CommandException(ExitCode.HostTrouble, $"{program} cannot make the guest debian: {reason.Trim()}{(advice is null || Environment.IsPrivilegedProcess ? "" : $" ({advice})")}");
        }
        catch (Win32Exception e)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot run {program}: {e.Message}", e);
        }
    }

    private static byte[] Text(string name)
    {
        using Stream source = Assembly.GetExecutingAssembly().GetManifestResourceStream($"guest/{name}")
            ?? throw new InvalidOperationException($"the program was built without the guest's file '{name}'");
        MemoryStream content = new();
        source.CopyTo(content);
        return content.ToArray();
    }
}
