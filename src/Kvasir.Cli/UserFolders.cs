using System;
using System.IO;
using Kvasir.Linux;

namespace Kvasir.Cli;

/// <summary>Where a user's files belong (XDG Base Directory Specification).</summary>
internal static class UserFolders
{
    /// <summary>What can be made again: <c>$XDG_CACHE_HOME/kvasir</c>.</summary>
    public static string Cache => Path.Combine(FromEnvironment("XDG_CACHE_HOME") ?? InHome(".cache"), "kvasir");

    /// <summary>What lasts: <c>$XDG_DATA_HOME/kvasir</c>.</summary>
    public static string Data => Path.Combine(FromEnvironment("XDG_DATA_HOME") ?? InHome(".local/share"), "kvasir");

    /// <summary>
    /// What lives as long as the session: <c>$XDG_RUNTIME_DIR/kvasir</c>, or a folder under the temporary folder that only its owner can enter.
    /// </summary>
    public static string Runtime
    {
        get
        {
            string? folder = FromEnvironment("XDG_RUNTIME_DIR");
            return folder is not null && Directory.Exists(folder)
                ? Path.Combine(folder, "kvasir")
                : Path.Combine(Path.GetTempPath(), $"kvasir-{ProcessIdentity.EffectiveUser}");
        }
    }

    /// <summary>Makes a folder that only its owner may enter, and refuses one that somebody else prepared under the same name.</summary>
    /// <exception cref="CommandException">The folder cannot be made, or is not the user's own.</exception>
    public static void MakePrivate(string path)
    {
        const UnixFileMode ownerOnly = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;
        try
        {
            Directory.CreateDirectory(path, ownerOnly);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot make the folder {path}: {e.Message}");
        }
        if (!FileStatus.IsOwnFolder(path))
            throw new CommandException(ExitCode.HostTrouble, $"{path} belongs to somebody else: remove it, or set XDG_RUNTIME_DIR to a folder of your own");
    }

    /// <summary>A relative path in one of the variables is invalid, says the specification, and is to be ignored.</summary>
    private static string? FromEnvironment(string variable)
    {
        string? value = Environment.GetEnvironmentVariable(variable);
        return string.IsNullOrEmpty(value) || !Path.IsPathRooted(value) ? null : value;
    }

    private static string InHome(string name)
    {
        string home = Environment.GetFolderPath(Environment.SpecialFolder.UserProfile);
        return home.Length == 0 || home == "/nonexistent"
            ? Path.Combine(Path.GetTempPath(), $"kvasir-{ProcessIdentity.EffectiveUser}", name.TrimStart('.'))
            : Path.Combine(home, name);
    }
}
