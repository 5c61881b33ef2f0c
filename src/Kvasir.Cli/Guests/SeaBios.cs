using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;

namespace Kvasir.Cli.Guests;

/// <summary>SeaBIOS from the distribution's package: the installed one, or else one that is fetched into the cache, once.</summary>
internal static class SeaBios
{
    private const string Package = "seabios";
    private const string FileName = "bios-256k.bin";
    private const string Installed = $"/usr/share/{Package}/{FileName}";

    /// <summary>What the package takes while it is unpacked, in bytes.</summary>
    private const long Room = 4L << 20;

    /// <returns>The image's path.</returns>
    /// <exception cref="CommandException">It is not there and cannot be fetched.</exception>
    public static string Get(Action<string> report)
    {
        if (File.Exists(Installed))
            return Installed;
        string folder = GuestFolder.Get(Package, "SeaBIOS", Room, temporary => Fill(temporary, report), report);
        return Path.Combine(folder, FileName);
    }

    private static void Fill(string folder, Action<string> report)
    {
        if (!AptArchive.IsAvailable)
            throw new CommandException(ExitCode.HostTrouble, $"SeaBIOS is not installed (package {Package}), and this host has no apt-get to fetch it: give --firmware FILE");
        report($"fetching the package {Package}");
        AptArchive archive = new("amd64", Path.Combine(UserFolders.Cache, "apt", "amd64"), report);
        string downloads = Path.Combine(folder, "packages");
        string file = archive.Download(Package, downloads);
        Dictionary<string, byte[]> files = PackageFile.Read(file, path => path.EndsWith($"/{FileName}", StringComparison.Ordinal));
        byte[] image = files.Values.FirstOrDefault() ?? throw new CommandException(ExitCode.HostTrouble, $"the package {Package} has no {FileName}");
        using (FileStream output = new(Path.Combine(folder, FileName), FileMode.CreateNew, FileAccess.Write))
        {
            output.Write(image);
            output.Flush(flushToDisk: true);
        }
        Directory.Delete(downloads, recursive: true);
    }
}
