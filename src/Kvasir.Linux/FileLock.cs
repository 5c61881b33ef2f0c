using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>
/// An exclusive lock on a file (flock(2)). The kernel drops it when the process ends however it ends, so a lock that is held belongs to
/// a process that lives.
/// </summary>
public sealed partial class FileLock : IDisposable
{
    private const int LockExclusive = 2;
    private const int LockNonBlocking = 4;
    private const int OpenReadWrite = 0x2;
    private const int OpenCreate = 0x40;
    private const int OpenNoFollow = 0x20000;
    private const int OpenCloseOnExec = 0x80000;
    private const int Interrupted = 4;
    private const int WouldBlock = 11;

    private readonly SafeFileHandle _file;

    private FileLock(SafeFileHandle file) => _file = file;

    /// <summary>Takes the lock, making the file where it is missing; null where another process holds it.</summary>
    /// <exception cref="LinuxException">The file cannot be opened or locked.</exception>
    public static FileLock? TryTake(string path) => Take(path, LockExclusive | LockNonBlocking);

    /// <summary>Takes the lock, waiting for whoever holds it.</summary>
    /// <exception cref="LinuxException">The file cannot be opened or locked.</exception>
    public static FileLock Wait(string path) => Take(path, LockExclusive)!;

    public void Dispose() => _file.Dispose();

    private static FileLock? Take(string path, int operation)
    {
        int fd = open(path, OpenReadWrite | OpenCreate | OpenNoFollow | OpenCloseOnExec, 0x180);
        if (fd < 0)
            throw new LinuxException($"open the lock file {path}", Marshal.GetLastPInvokeError());
        SafeFileHandle file = new(fd, ownsHandle: true);
        while (flock(fd, operation) != 0)
        {
            int errno = Marshal.GetLastPInvokeError();
            if (errno == Interrupted)
                continue;
            file.Dispose();
            return errno == WouldBlock ? null : throw new LinuxException($"lock {path}", errno);
        }
        return new FileLock(file);
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags, int mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int flock(int fd, int operation);
}
