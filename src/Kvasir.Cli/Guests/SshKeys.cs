using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.IO;
using System.Linq;
using Kvasir.Linux;

namespace Kvasir.Cli.Guests;

/// <summary>The keys that open the guests of this user.</summary>
internal static class SshKeys
{
    /// <summary>A key made for Kvasir alone, on first use.</summary>
    /// <returns>Null where this host has no ssh-keygen.</returns>
    /// <exception cref="CommandException">It cannot be made.</exception>
    public static (string Path, string PublicKey)? Own()
    {
        string folder = Path.Combine(UserFolders.Data, "ssh");
        string path = Path.Combine(folder, "id_ed25519");
        string publicPath = path + ".pub";
        if (HostPrograms.Find("ssh-keygen") is not { } program)
            return null;
        UserFolders.MakePrivate(UserFolders.Data);
        UserFolders.MakePrivate(folder);
        try
        {
            using FileLock held = FileLock.Wait(Path.Combine(folder, ".lock"));
            if (!File.Exists(publicPath))
            {
                File.Delete(path);
                using Process process = Process.Start(new ProcessStartInfo(program, ["-q", "-t", "ed25519", "-N", "", "-C", "kvasir", "-f", path]) { RedirectStandardInput = true })!;
                process.StandardInput.Close();
                process.WaitForExit();
                if (process.ExitCode != 0)
                    throw new CommandException(ExitCode.HostTrouble, $"ssh-keygen cannot make a key in {folder} (code {process.ExitCode})");
            }
            return (path, File.ReadAllText(publicPath).Trim());
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or Win32Exception or LinuxException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot make an SSH key in {folder}: {e.Message}", e);
        }
    }

    /// <summary>The user's own public keys.</summary>
    public static IEnumerable<string> OfUser()
    {
        string folder = Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".ssh");
        if (!Directory.Exists(folder))
            return [];
        try
        {
            return [.. Directory.EnumerateFiles(folder, "*.pub").Order(StringComparer.Ordinal).SelectMany(SeedDisk.ReadKeys)];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or CommandException)
        {
            // A key that cannot be read is not one to log in with: the guest has Kvasir's own all the same.
            return [];
        }
    }
}
