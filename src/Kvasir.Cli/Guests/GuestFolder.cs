using System;
using System.IO;
using Kvasir.Linux;

namespace Kvasir.Cli.Guests;

/// <summary>
/// A folder of the cache that is built once: it appears under its name only when it is complete and on the disk. Builders hold a file lock, so that two of them
/// build it once.
/// </summary>
internal static class GuestFolder
{
    private const int NoSpace = 28;
    private const int QuotaExceeded = 122;

    /// <summary>Where guests are kept.</summary>
    public static string Root => Path.Combine(UserFolders.Cache, "guests");

    public static string PathOf(string name) => Path.Combine(Root, name);

    /// <summary>Finds a guest's folder, or has it filled.</summary>
    /// <param name="name">The folder's name, which changes with the recipe.</param>
    /// <param name="what">For messages: "the default guest".</param>
    /// <param name="room">Bytes that building it takes.</param>
    /// <param name="fill">Fills a temporary folder, all of it synced.</param>
    /// <param name="report">Told where another builder is waited for.</param>
    /// <exception cref="CommandException">It cannot be built.</exception>
    public static string Get(string name, string what, long room, Action<string> fill, Action<string> report)
    {
        string final = PathOf(name);
        if (Directory.Exists(final))
            return final;
        try
        {
            Directory.CreateDirectory(Root);
            using FileLock held = TakeLock(Path.Combine(Root, $".{name}.lock"), report);
            if (Directory.Exists(final))
                return final;
            if (new DriveInfo(Root).AvailableFreeSpace < room)
                throw new CommandException(ExitCode.HostTrouble, NoRoom(what, room));
            // Whoever holds the lock is alone: what is left here is from a build that was cut off.
            foreach (string leftover in Directory.EnumerateDirectories(Root, $".{name}.tmp*"))
                Directory.Delete(leftover, recursive: true);
            string temporary = Path.Combine(Root, $".{name}.tmp");
            try
            {
                Directory.CreateDirectory(temporary);
                fill(temporary);
                Directory.Move(temporary, final);
                Durability.SyncFolder(Root);
            }
            finally
            {
                if (Directory.Exists(temporary))
                    Directory.Delete(temporary, recursive: true);
            }
            return final;
        }
        catch (IOException e) when ((e.HResult & 0xffff) is NoSpace or QuotaExceeded)
        {
            throw new CommandException(ExitCode.HostTrouble, NoRoom(what, room), e);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or LinuxException)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot build {what} in {Root}: {e.Message}", e);
        }
    }

    private static string NoRoom(string what, long room) =>
        $"no room in {Root}: building {what} takes {room >> 20} MB there; free some, or set XDG_CACHE_HOME to a folder on another disk";

    private static FileLock TakeLock(string path, Action<string> report)
    {
        FileLock? held = FileLock.TryTake(path);
        if (held is not null)
            return held;
        report("waiting for another kvasir that builds the guest");
        return FileLock.Wait(path);
    }
}
