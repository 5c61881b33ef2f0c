using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Threading;
using Xunit;

namespace Kvasir.Boot.Tests;

/// <summary>Kernels of the distribution, fetched once into the user's cache folder. Tests are skipped where that is not possible.</summary>
internal static class RealKernel
{
    private static readonly Lock Fetching = new();
    private static readonly Dictionary<string, string?> Found = [];

    /// <summary>The distribution's 64-bit kernel for clouds: a relocatable bzImage with a 64-bit entry.</summary>
    public static byte[] Cloud64() => Fetch("cloud-amd64", "linux-image-cloud-amd64", metapackage: true, "./boot/vmlinuz-*");

    /// <summary>The installer's 32-bit kernel.</summary>
    public static byte[] Installer32() => Fetch(
        "installer-i386", "debian-installer-12-netboot-i386", metapackage: false, "./usr/lib/debian-installer/images/12/i386/text/debian-installer/i386/linux");

    private static byte[] Fetch(string name, string package, bool metapackage, string member)
    {
        lock (Fetching)
        {
            if (!Found.TryGetValue(name, out string? path))
                Found.Add(name, path = FetchInto(Cache(), name, package, metapackage, member));
            if (path is null)
                Assert.Skip($"package '{package}' cannot be fetched here");
            return File.ReadAllBytes(path);
        }
    }

    private static string? FetchInto(string cache, string name, string package, bool metapackage, string member)
    {
        string kept = Path.Combine(cache, "vmlinuz-" + name);
        if (File.Exists(kept))
            return kept;
        using TemporaryFolder folder = new();
        if (metapackage)
        {
            (int listed, string depends) = ExternalTool.Run("apt", folder.Path, "apt-cache", "depends", package);
            string? real = depends.Split('\n').Select(l => l.Trim()).FirstOrDefault(l => l.StartsWith("Depends: linux-image-", StringComparison.Ordinal));
            if (listed != 0 || real is null)
                return null;
            package = real["Depends: ".Length..];
        }
        if (ExternalTool.Run("apt", folder.Path, "apt-get", "download", package).ExitCode != 0)
            return null;
        string archive = Directory.GetFiles(folder.Path, "*.deb").Single();
        string unpack = $"dpkg-deb --fsys-tarfile '{archive}' | tar -xO --wildcards '{member}' > kernel";
        if (ExternalTool.Run("dpkg", folder.Path, "sh", "-c", unpack).ExitCode != 0)
            return null;
        Directory.CreateDirectory(cache);
        string partial = kept + "." + Environment.ProcessId;
        File.Copy(Path.Combine(folder.Path, "kernel"), partial, overwrite: true);
        File.Move(partial, kept, overwrite: true);
        return kept;
    }

    private static string Cache()
    {
        string? root = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        if (string.IsNullOrEmpty(root))
            root = Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache");
        return Path.Combine(root, "kvasir", "kernels");
    }
}
