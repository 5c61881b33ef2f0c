using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>Making names last: a file that was created or renamed survives a crash only once its folder was synced (fsync(2)).</summary>
public static partial class Durability
{
    private const int OpenFolder = 0x10000 | 0x80000;

    /// <summary>Waits until the names in a folder are on the disk.</summary>
    /// <exception cref="LinuxException">The folder cannot be opened or the disk failed.</exception>
    public static void SyncFolder(string path)
    {
        int fd = open(path, OpenFolder);
        if (fd < 0)
            throw new LinuxException($"open the folder {path}", Marshal.GetLastPInvokeError());
        int result = fsync(fd);
        int errno = Marshal.GetLastPInvokeError();
        _ = close(fd);
        if (result != 0)
            throw new LinuxException($"sync the folder {path}", errno);
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fsync(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int close(int fd);
}
