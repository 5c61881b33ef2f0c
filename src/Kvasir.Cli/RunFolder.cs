using System;
using System.Globalization;
using System.IO;
using Kvasir.Linux;

namespace Kvasir.Cli;

/// <summary>
/// A running VM's folder, <c>$XDG_RUNTIME_DIR/kvasir/NAME/</c>: its pid file, and a lock that tells a VM that runs from files that one left behind.
/// </summary>
internal sealed class RunFolder : IDisposable
{
    private const int NoSuchFile = 2;

    private readonly FileLock _held;

    private RunFolder(string path, FileLock held)
    {
        Path = path;
        _held = held;
    }

    public string Path { get; }

    /// <summary>Makes the folder this process's own.</summary>
    /// <exception cref="CommandException">A VM of this name runs, or the folder cannot be made.</exception>
    public static RunFolder Take(string name)
    {
        UserFolders.MakePrivate(UserFolders.Runtime);
        string path = System.IO.Path.Combine(UserFolders.Runtime, name);
        string pidFile = System.IO.Path.Combine(path, "pid");
        try
        {
            FileLock held = TakeLock(path, System.IO.Path.Combine(path, "lock"))
                ?? throw new CommandException(ExitCode.HostTrouble, $"a VM named '{name}' runs already ({Owner(pidFile)}); choose another --name");
            // A pid file that is here now is from a VM that was killed: the lock was free.
            File.WriteAllText(pidFile, string.Create(CultureInfo.InvariantCulture, $"{Environment.ProcessId}\n"));
            return new RunFolder(path, held);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or LinuxException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot use the run folder {path}: {e.Message}", e);
        }
    }

    /// <summary>Removes the folder.</summary>
    public void Dispose()
    {
        try
        {
            Directory.Delete(Path, recursive: true);
        }
        catch (IOException)
        {
            // Somebody put something there in this moment, or removed it: nothing depends on its absence, the lock decides.
        }
        _held.Dispose();
    }

    /// <summary>
    /// Takes the lock of the file that has the name now: a VM that ends removes its folder, and a lock on a file without a name keeps nobody out.
    /// </summary>
    private static FileLock? TakeLock(string folder, string path)
    {
        while (true)
        {
            UserFolders.MakePrivate(folder);
            try
            {
                FileLock? held = FileLock.TryTake(path);
                if (held is null)
                    return null;
                FileLock? other = FileLock.TryTake(path);
                if (other is null)
                    return held;
                other.Dispose();
                held.Dispose();
            }
            catch (LinuxException e) when (e.Errno == NoSuchFile)
            {
                // The folder went between making it and opening the file.
            }
        }
    }

    private static string Owner(string pidFile)
    {
        try
        {
            return $"process {File.ReadAllText(pidFile).Trim()}";
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return "it is just starting";
        }
    }
}
