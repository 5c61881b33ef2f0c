using System;
using System.Collections.Generic;
using System.IO;
using System.IO.Compression;
using System.Linq;
using System.Reflection;
using System.Security.Cryptography;
using System.Text;
using Kvasir.Linux;

namespace Kvasir.Cli.Guests;

/// <summary>A kernel and its initial file system, ready to boot.</summary>
internal sealed record GuestFiles(string Kernel, string InitialRamdisk);

/// <summary>Which programs the default guest carries.</summary>
internal enum Userland
{
    Amd64,
    I386,
}

/// <summary>
/// The guest of a bare <c>kvasir run</c>: the distribution's cloud kernel and a busybox, made once into the user's cache. A guest's folder
/// appears under its name only when it is complete and on the disk; its name changes with the recipe.
/// </summary>
internal static class DefaultGuest
{
    /// <summary>
    /// What the kernel is told: its console, to print only what is wrong before the shell comes, not to panic where a busy host makes the first ticks of its timer
    /// late, and not to test its ciphers, which takes a sixth of its start.
    /// </summary>
    public const string KernelCommandLine = "console=ttyS0 quiet no_timer_check cryptomgr.notests";

    private const string KernelName = "vmlinuz";
    private const string InitialRamdiskName = "initrd.gz";
    private const int NoSpace = 28;

    /// <summary>Counts changes of the guest's content that its text files do not show.</summary>
    private const byte RecipeVersion = 2;

    /// <summary>What a build takes while it runs: the packages, the kernel and the archive, in bytes.</summary>
    public const long RoomToBuild = 60L << 20;
    private const int QuotaExceeded = 122;

    /// <summary>Debian's kernel for virtual machines, then what there is on Debian and its relatives otherwise.</summary>
    private static readonly string[] Kernels = ["linux-image-cloud-amd64", "linux-image-amd64", "linux-image-virtual"];

    /// <summary>Kernel modules that the guest carries: what the power button needs, and virtio's drivers with all that they stand on.</summary>
    private static readonly string[] Modules =
    [
        "button", "evdev",
        "virtio", "virtio_ring", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_mmio",
        "virtio_blk", "virtio_scsi", "scsi_mod", "scsi_common", "sd_mod", "sr_mod", "cdrom", "t10-pi", "crc64-rocksoft", "crc64",
        "virtio_net", "net_failover", "failover", "fuse", "virtiofs", "vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common", "virtio_console", "virtio_balloon", "virtio-rng",
    ];

    /// <summary>Finds the guest, or builds it.</summary>
    /// <param name="report">Told what takes time; not called where the guest is there already.</param>
    /// <exception cref="CommandException">It is not there and cannot be built.</exception>
    public static GuestFiles Get(Userland userland, Action<string> report)
    {
        string name = NameOf(userland);
        string final = Path.Combine(Guests, name);
        if (!Directory.Exists(final))
            Build(Guests, name, ArchitectureOf(userland), report);
        return new GuestFiles(Path.Combine(final, KernelName), Path.Combine(final, InitialRamdiskName));
    }

    /// <summary>Whether the guest is there, complete.</summary>
    public static bool IsBuilt(Userland userland) => Directory.Exists(Path.Combine(Guests, NameOf(userland)));

    private static string Guests => Path.Combine(UserFolders.Cache, "guests");

    private static string ArchitectureOf(Userland userland) => userland == Userland.I386 ? "i386" : "amd64";

    /// <summary>The name of the guest's folder, which changes with its recipe.</summary>
    private static string NameOf(Userland userland)
    {
        byte[] recipe = [.. Text("init"), .. Text("session"), .. Text("button"), .. Text("profile"), .. Text("inittab"), .. Text("drivers"), .. Text("hotplug"), .. Text("network"), .. Text("lease"), RecipeVersion];
        return $"linux-{ArchitectureOf(userland)}-{Convert.ToHexStringLower(SHA256.HashData(recipe))[..8]}";
    }

    private static void Build(string guests, string name, string architecture, Action<string> report)
    {
        if (!AptArchive.IsAvailable)
        {
            throw new CommandException(
                ExitCode.HostTrouble,
                "the default guest is made from Debian packages, and this host has no apt-get: pass --kernel FILE and --initrd FILE (a bzImage and an initramfs)");
        }
        string final = Path.Combine(guests, name);
        try
        {
            Directory.CreateDirectory(guests);
            using FileLock held = TakeLock(Path.Combine(guests, $".{name}.lock"), report);
            if (Directory.Exists(final))
                return;
            if (new DriveInfo(guests).AvailableFreeSpace < RoomToBuild)
                throw new CommandException(ExitCode.HostTrouble, NoRoom(guests));
            // Whoever holds the lock is alone: what is left here is from a build that was cut off.
            foreach (string leftover in Directory.EnumerateDirectories(guests, $".{name}.tmp*"))
                Directory.Delete(leftover, recursive: true);
            string temporary = Path.Combine(guests, $".{name}.tmp");
            try
            {
                Directory.CreateDirectory(temporary);
                Fill(temporary, architecture, report);
                Directory.Move(temporary, final);
                Durability.SyncFolder(guests);
            }
            finally
            {
                if (Directory.Exists(temporary))
                    Directory.Delete(temporary, recursive: true);
            }
        }
        catch (IOException e) when ((e.HResult & 0xffff) is NoSpace or QuotaExceeded)
        {
            throw new CommandException(ExitCode.HostTrouble, NoRoom(guests), e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or LinuxException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot build the default guest in {guests}: {e.Message}", e);
        }
    }

    private static string NoRoom(string folder) =>
        $"no room in {folder}: building the default guest takes {RoomToBuild >> 20} MB there; free some, or set XDG_CACHE_HOME to a folder on another disk";

    private static FileLock TakeLock(string path, Action<string> report)
    {
        FileLock? held = FileLock.TryTake(path);
        if (held is not null)
            return held;
        report("waiting for another kvasir that builds the guest");
        return FileLock.Wait(path);
    }

    private static void Fill(string folder, string architecture, Action<string> report)
    {
        string downloads = Path.Combine(folder, "packages");
        string lists = Path.Combine(UserFolders.Cache, "apt");
        AptArchive kernels = new("amd64", Path.Combine(lists, "amd64"), report);
        AptArchive programs = architecture == "amd64" ? kernels : new AptArchive(architecture, Path.Combine(lists, architecture), report);

        report("looking up packages");
        string kernelPackage = kernels.Resolve(Kernels, "linux-image-");
        report($"fetching {kernelPackage}");
        string kernelFile = kernels.Download(kernelPackage, Path.Combine(downloads, "kernel"));
        report("fetching busybox-static");
        string busyboxFile = programs.Download("busybox-static", Path.Combine(downloads, "busybox"));

        report("unpacking");
        Dictionary<string, byte[]> kernelFiles = PackageFile.Read(kernelFile, path =>
            path.StartsWith("boot/vmlinuz-", StringComparison.Ordinal) || ModuleName(path) is not null);
        byte[] kernel = Only(kernelFiles, path => path.StartsWith("boot/vmlinuz-", StringComparison.Ordinal), kernelPackage);
        byte[] busybox = Only(
            PackageFile.Read(busyboxFile, path => path.EndsWith("bin/busybox", StringComparison.Ordinal)), _ => true, "busybox-static");

        report("writing the initial file system");
        WriteDurably(Path.Combine(folder, KernelName), output => output.Write(kernel));
        WriteDurably(Path.Combine(folder, InitialRamdiskName), output =>
        {
            using GZipStream compressed = new(output, CompressionLevel.Optimal, leaveOpen: true);
            WriteInitialRamdisk(compressed, busybox, kernelFiles);
        });
        string origin = $"{Path.GetFileName(kernelFile)}\n{Path.GetFileName(busyboxFile)}\n".Replace("%3a", ":", StringComparison.Ordinal);
        WriteDurably(Path.Combine(folder, "packages.txt"), output => output.Write(Encoding.UTF8.GetBytes(origin)));
        Directory.Delete(downloads, recursive: true);
        Durability.SyncFolder(folder);
    }

    private static void WriteInitialRamdisk(Stream output, byte[] busybox, Dictionary<string, byte[]> kernelFiles)
    {
        CpioWriter archive = new(output);
        foreach (string folder in (string[])["bin", "sbin", "usr", "usr/bin", "usr/sbin", "dev", "proc", "sys", "run", "mnt", "root", "etc", "etc/acpi", "etc/acpi/PWRF", "lib", "lib/modules", "var"])
            archive.AddFolder(folder);
        archive.AddFolder("tmp", 0x3ff);
        archive.AddCharacterDevice("dev/console", 5, 1);
        archive.AddCharacterDevice("dev/null", 1, 3, 0x1b6);
        archive.AddFile("bin/busybox", busybox, 0x1ed);
        archive.AddFile("init", Text("init"), 0x1ed);
        archive.AddFile("etc/inittab", Text("inittab"));
        archive.AddFile("etc/session", Text("session"), 0x1ed);
        archive.AddFile("etc/button", Text("button"), 0x1ed);
        archive.AddFile("etc/passwd", "root::0:0:root:/root:/bin/sh\n"u8);
        archive.AddFile("etc/group", "root:x:0:\ntty:x:5:\n"u8);
        archive.AddFile("etc/hostname", "kvasir\n"u8);
        archive.AddFile("etc/hosts", "127.0.0.1 localhost kvasir\n"u8);
        archive.AddFile("etc/profile", Text("profile"));
        // The name under which busybox's acpid looks for what a press of the power button runs.
        archive.AddFile("etc/acpi/PWRF/00000080", "#!/bin/sh\nsync\nexec poweroff -f\n"u8, 0x1ed);
        archive.AddFile("etc/drivers", Text("drivers"), 0x1ed);
        archive.AddFile("etc/hotplug", Text("hotplug"), 0x1ed);
        archive.AddFile("etc/network", Text("network"), 0x1ed);
        archive.AddFile("etc/lease", Text("lease"), 0x1ed);
        AddModules(archive, kernelFiles);
        archive.Finish();
    }

    /// <summary>The modules in the folder that the running kernel's are looked for in, with the tables by which modprobe(8) finds them.</summary>
    private static void AddModules(CpioWriter archive, Dictionary<string, byte[]> kernelFiles)
    {
        const string above = "lib/modules/";
        List<KernelModule> modules = [];
        string? folder = null;
        foreach ((string path, byte[] content) in kernelFiles.OrderBy(file => file.Key, StringComparer.Ordinal))
        {
            if (ModuleName(path) is not { } file)
                continue;
            if (folder is null)
            {
                string release = path[(path.IndexOf(above, StringComparison.Ordinal) + above.Length)..].Split('/')[0];
                folder = $"{above}{release}";
                archive.AddFolder(folder);
            }
            archive.AddFile($"{folder}/{file}", content);
            // Compressed ones are unpacked, and the tables made, at the guest's start.
            if (file.EndsWith(".ko", StringComparison.Ordinal))
                modules.Add(KernelModule.Read(file, content));
        }
        if (folder is null)
            return;
        archive.AddFile($"{folder}/modules.dep", Encoding.ASCII.GetBytes(KernelModule.Dependencies(modules)));
        archive.AddFile($"{folder}/modules.alias", Encoding.ASCII.GetBytes(KernelModule.AliasTable(modules)));
    }

    /// <summary>The file name of one of the <see cref="Modules"/>, plain or compressed with xz; null for any other path.</summary>
    private static string? ModuleName(string path)
    {
        if (!path.Contains("lib/modules/", StringComparison.Ordinal))
            return null;
        string file = Path.GetFileName(path);
        return Modules.Any(module => file == $"{module}.ko" || file == $"{module}.ko.xz") ? file : null;
    }

    private static byte[] Only(Dictionary<string, byte[]> files, Func<string, bool> wanted, string package) =>
        files.Where(file => wanted(file.Key)).Select(file => file.Value).FirstOrDefault()
            ?? throw new CommandException(ExitCode.HostTrouble, $"the package {package} has not the file that the default guest needs from it");

    private static void WriteDurably(string path, Action<Stream> write)
    {
        using FileStream file = new(path, FileMode.CreateNew, FileAccess.Write);
        write(file);
        file.Flush(flushToDisk: true);
    }

    /// <summary>One of the guest's own text files, which lie beside this source and in the program.</summary>
    private static byte[] Text(string name)
    {
        using Stream source = Assembly.GetExecutingAssembly().GetManifestResourceStream($"guest/{name}")
            ?? throw new InvalidOperationException($"the program was built without the guest's file '{name}'");
        MemoryStream content = new();
        source.CopyTo(content);
        return content.ToArray();
    }
}
