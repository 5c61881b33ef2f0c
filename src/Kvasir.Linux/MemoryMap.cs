using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

[Flags]
public enum Protection
{
    None = 0,
    Read = 1,
    Write = 2,
    Execute = 4,
}

/// <summary>Memory mappings and memory files: mmap(2), memfd_create(2), madvise(2).</summary>
public static unsafe partial class MemoryMap
{
    private const int MapShared = 0x01;
    private const int MapPrivate = 0x02;
    private const int MapAnonymous = 0x20;
    private const int MapNoReserve = 0x4000;
    private const uint MfdCloexec = 0x0001;
    private const int PunchHoleKeepSize = 0x02 | 0x01;

    /// <summary>Creates a memory file of <paramref name="size"/> bytes, all zero and none of them allocated yet.</summary>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public static int CreateFile(string name, ulong size)
    {
        int fd = memfd_create(name, MfdCloexec);
        if (fd < 0)
            throw new LinuxException($"create the memory file '{name}'", Marshal.GetLastPInvokeError());
        if (ftruncate(fd, (long)size) != 0)
        {
            int errno = Marshal.GetLastPInvokeError();
            _ = close(fd);
            throw new LinuxException($"size the memory file '{name}' to {size} bytes", errno);
        }
        return fd;
    }

    /// <summary>Maps a file's bytes, shared with every other mapping of it.</summary>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public static byte* MapFile(int fd, ulong offset, ulong length, Protection protection)
    {
        nint address = mmap(0, (nuint)length, (int)protection, MapShared | MapNoReserve, fd, (long)offset);
        if (address == -1)
            throw new LinuxException($"map {length} bytes of memory", Marshal.GetLastPInvokeError());
        return (byte*)address;
    }

    /// <summary>Maps anonymous private memory, zero and not yet allocated.</summary>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public static byte* MapAnonymousMemory(ulong length, Protection protection)
    {
        nint address = mmap(0, (nuint)length, (int)protection, MapPrivate | MapAnonymous | MapNoReserve, -1, 0);
        if (address == -1)
            throw new LinuxException($"map {length} bytes of memory", Marshal.GetLastPInvokeError());
        return (byte*)address;
    }

    public static void Unmap(byte* address, ulong length) => _ = munmap((nint)address, (nuint)length);

    public static void CloseFile(int fd) => _ = close(fd);

    /// <summary>Gives a part of a memory file back to the host: it takes no memory and reads as zeros until it is written again (fallocate(2)).</summary>
    /// <returns>Whether the kernel did it.</returns>
    public static bool PunchHole(int fd, ulong offset, ulong length) => fallocate(fd, PunchHoleKeepSize, (long)offset, (long)length) == 0;

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int memfd_create(string name, uint flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ftruncate(int fd, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int close(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint mmap(nint address, nuint length, int protection, int flags, int fd, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fallocate(int fd, int mode, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int munmap(nint address, nuint length);
}
