using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.Formats.Tar;
using System.IO;

namespace Kvasir.Cli.Guests;

/// <summary>A Debian package file (deb(5)): dpkg-deb opens and decompresses it, the files are read from the stream.</summary>
internal static class PackageFile
{
    /// <summary>Reads the regular files whose path <paramref name="wanted"/> accepts. Paths have no leading <c>./</c>.</summary>
    /// <exception cref="CommandException">The package is damaged.</exception>
    public static Dictionary<string, byte[]> Read(string package, Func<string, bool> wanted)
    {
        ProcessStartInfo start = new("dpkg-deb", ["--fsys-tarfile", package]) { RedirectStandardOutput = true };
        Dictionary<string, byte[]> files = new(StringComparer.Ordinal);
        try
        {
            using Process process = Process.Start(start)!;
            using (TarReader reader = new(process.StandardOutput.BaseStream, leaveOpen: true))
            {
                while (reader.GetNextEntry() is { } entry)
                {
                    string path = entry.Name.StartsWith("./", StringComparison.Ordinal) ? entry.Name[2..] : entry.Name;
                    if (entry.DataStream is null || !wanted(path))
                        continue;
                    MemoryStream content = new();
                    entry.DataStream.CopyTo(content);
                    files[path] = content.ToArray();
                }
            }
            process.StandardOutput.BaseStream.CopyTo(Stream.Null);
            process.WaitForExit();
            if (process.ExitCode != 0)
                throw new CommandException(ExitCode.HostTrouble, $"dpkg-deb cannot read {Path.GetFileName(package)}: the package is damaged");
        }
        catch (Exception e) when (e is Win32Exception or IOException or InvalidDataException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot unpack {Path.GetFileName(package)}: {e.Message}", e);
        }
        return files;
    }
}
