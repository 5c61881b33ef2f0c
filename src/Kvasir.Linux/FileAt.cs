using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>What a file is, in the kernel's words (stat(2)).</summary>
public struct FileAttributes64
{
    public ulong Device;
    public ulong Inode;
    public uint Mode;
    public uint Links;
    public uint User;
    public uint Group;
    public ulong SpecialDevice;
    public long Size;
    public long BlockSize;
    public long Blocks;
    public long AccessSeconds;
    public uint AccessNanoseconds;
    public long ModifySeconds;
    public uint ModifyNanoseconds;
    public long ChangeSeconds;
    public uint ChangeNanoseconds;

    public const uint KindMask = 0xf000;
    public const uint Folder = 0x4000;
    public const uint Regular = 0x8000;
    public const uint SymbolicLink = 0xa000;
    public const uint Fifo = 0x1000;
    public const uint Socket = 0xc000;

    public readonly uint Kind => Mode & KindMask;
}

/// <summary>What a file system has (statfs(2)).</summary>
public readonly record struct FileSystemSpace(ulong Blocks, ulong Free, ulong Available, ulong Files, ulong FreeFiles, uint BlockSize, uint NameLength, uint FragmentSize);

/// <summary>
/// File calls relative to a folder's descriptor, one path component at a time and never through a symbolic link: what sharing a folder with
/// somebody untrusted takes. Names are bytes with a final zero. Results are non-negative, or -errno.
/// </summary>
public static unsafe partial class FileAt
{
    public const int OpenPath = 0x200000;
    public const int OpenNoFollow = 0x20000;
    public const int OpenDirectory = 0x10000;
    public const int OpenCloseOnExec = 0x80000;
    public const int OpenNonBlocking = 0x800;
    public const int OpenCreate = 0x40;
    public const int OpenExclusive = 0x80;
    public const int OpenTruncate = 0x200;
    public const int OpenAppend = 0x400;
    public const int AccessModeMask = 3;
    public const int RemoveDirectory = 0x200;

    private const int EmptyPath = 0x1000;
    private const int NoFollow = 0x100;
    private const int Interrupted = 4;
    private const long TimeNow = 0x3fffffff;
    private const long TimeOmit = 0x3ffffffe;

    /// <summary>Opens one component below a folder.</summary>
    public static int Open(int folder, ReadOnlySpan<byte> name, int flags, uint mode = 0)
    {
        // SAFETY: the name ends with a zero (Checked), and stays pinned during the call.
        fixed (byte* path = Checked(name))
            return (int)Result(openat(folder, path, flags | OpenCloseOnExec, mode));
    }

    /// <summary>Opens what an O_PATH descriptor stands for: a regular file or folder, as the caller has seen to.</summary>
    public static int Reopen(int fd, int flags)
    {
        Span<byte> path = stackalloc byte[32];
        return Open(0, SelfPath(fd, path), flags & ~OpenNoFollow);
    }

    public static int Close(int fd) => (int)Result(close(fd));

    /// <summary>What a descriptor stands for.</summary>
    public static int Stat(int fd, out FileAttributes64 attributes)
    {
        byte* stat = stackalloc byte[144];
        byte empty = 0;
        // SAFETY: the buffer is as large as the kernel's struct stat of x86-64, and the offsets are its.
        int result = (int)Result(newfstatat(fd, &empty, stat, EmptyPath | NoFollow));
        attributes = result < 0 ? default : new FileAttributes64
        {
            Device = *(ulong*)stat,
            Inode = *(ulong*)(stat + 8),
            Links = (uint)*(ulong*)(stat + 16),
            Mode = *(uint*)(stat + 24),
            User = *(uint*)(stat + 28),
            Group = *(uint*)(stat + 32),
            SpecialDevice = *(ulong*)(stat + 40),
            Size = *(long*)(stat + 48),
            BlockSize = *(long*)(stat + 56),
            Blocks = *(long*)(stat + 64),
            AccessSeconds = *(long*)(stat + 72),
            AccessNanoseconds = (uint)*(long*)(stat + 80),
            ModifySeconds = *(long*)(stat + 88),
            ModifyNanoseconds = (uint)*(long*)(stat + 96),
            ChangeSeconds = *(long*)(stat + 104),
            ChangeNanoseconds = (uint)*(long*)(stat + 112),
        };
        return result;
    }

    /// <summary>
    /// What tells a file from another one that has its number later: when it was made, or, where the file system does not say (statx(2)), when it was changed
    /// last, which a new file's time is never before.
    /// </summary>
    /// <param name="made">It is the time of its making, which stays.</param>
    public static int Age(int fd, out (long Seconds, uint Nanoseconds) time, out bool made)
    {
        const uint changeTime = 0x80;
        const uint birthTime = 0x800;
        byte* status = stackalloc byte[256];
        byte empty = 0;
        // SAFETY: the buffer has the 256 bytes of struct statx, and the offsets are its.
        int result = (int)Result(statx(fd, &empty, EmptyPath | NoFollow, changeTime | birthTime, status));
        made = result >= 0 && (*(uint*)status & birthTime) != 0;
        byte* at = status + (made ? 0x50 : 0x60);
        time = result < 0 ? default : (*(long*)at, *(uint*)(at + 8));
        return result;
    }

    /// <summary>Reads the link that an O_PATH descriptor stands for.</summary>
    public static int ReadLink(int fd, Span<byte> target)
    {
        byte empty = 0;
        fixed (byte* buffer = target)
            return (int)Result(readlinkat(fd, &empty, buffer, (nuint)target.Length));
    }

    public static int MakeLink(ReadOnlySpan<byte> target, int folder, ReadOnlySpan<byte> name)
    {
        fixed (byte* to = Checked(target))
        fixed (byte* path = Checked(name))
            return (int)Result(symlinkat(to, folder, path));
    }

    public static int MakeFolder(int folder, ReadOnlySpan<byte> name, uint mode)
    {
        fixed (byte* path = Checked(name))
            return (int)Result(mkdirat(folder, path, mode));
    }

    /// <summary>Makes a regular file, a pipe or a socket; devices are the caller's to refuse.</summary>
    public static int MakeNode(int folder, ReadOnlySpan<byte> name, uint mode)
    {
        fixed (byte* path = Checked(name))
            return (int)Result(mknodat(folder, path, mode, 0));
    }

    public static int Remove(int folder, ReadOnlySpan<byte> name, bool isFolder)
    {
        fixed (byte* path = Checked(name))
            return (int)Result(unlinkat(folder, path, isFolder ? RemoveDirectory : 0));
    }

    public static int Rename(int fromFolder, ReadOnlySpan<byte> from, int toFolder, ReadOnlySpan<byte> to, uint flags)
    {
        fixed (byte* old = Checked(from))
        fixed (byte* made = Checked(to))
            return (int)Result(renameat2(fromFolder, old, toFolder, made, flags));
    }

    /// <summary>Gives what an O_PATH descriptor stands for a further name.</summary>
    public static int HardLink(int fd, int folder, ReadOnlySpan<byte> name)
    {
        Span<byte> self = stackalloc byte[32];
        const int follow = 0x400;
        const int currentFolder = -100;
        fixed (byte* from = SelfPath(fd, self))
        fixed (byte* path = Checked(name))
            return (int)Result(linkat(currentFolder, from, folder, path, follow));
    }

    /// <summary>Sets the permission bits of what an O_PATH descriptor stands for; never those of a symbolic link.</summary>
    public static int SetMode(int fd, uint mode)
    {
        Span<byte> self = stackalloc byte[32];
        fixed (byte* path = SelfPath(fd, self))
            return (int)Result(chmod(path, mode));
    }

    /// <summary>Sets the owner; uint.MaxValue leaves one as it is.</summary>
    public static int SetOwner(int fd, uint user, uint group)
    {
        byte empty = 0;
        return (int)Result(fchownat(fd, &empty, user, group, EmptyPath | NoFollow));
    }

    public static int Truncate(int fd, long length) => (int)Result(ftruncate(fd, length));

    /// <summary>Sets times; null leaves one as it is, a number of nanoseconds below zero means now.</summary>
    public static int SetTimes(int fd, (long Seconds, long Nanoseconds)? access, (long Seconds, long Nanoseconds)? modify)
    {
        Span<byte> self = stackalloc byte[32];
        long* times = stackalloc long[4];
        Put(times, access);
        Put(times + 2, modify);
        fixed (byte* path = SelfPath(fd, self))
            return (int)Result(utimensat(-100, path, times, 0));
    }

    public static int Read(int fd, long offset, Span<byte> target)
    {
        fixed (byte* buffer = target)
        {
            long done;
            do
                done = Result(pread(fd, buffer, (nuint)target.Length, offset));
            while (done == -Interrupted);
            return (int)done;
        }
    }

    public static int Write(int fd, long offset, ReadOnlySpan<byte> source)
    {
        fixed (byte* buffer = source)
        {
            long done;
            do
                done = Result(pwrite(fd, buffer, (nuint)source.Length, offset));
            while (done == -Interrupted);
            return (int)done;
        }
    }

    public static int Sync(int fd, bool dataOnly) => (int)Result(dataOnly ? fdatasync(fd) : fsync(fd));

    public static int Allocate(int fd, int mode, long offset, long length) => (int)Result(fallocate(fd, mode, offset, length));

    public static long Seek(int fd, long offset, int whence) => Result(lseek(fd, offset, whence));

    /// <summary>Reads entries of a folder from its position on, as struct linux_dirent64.</summary>
    public static int ReadEntries(int fd, Span<byte> target)
    {
        const long getdents64 = 217;
        fixed (byte* buffer = target)
            return (int)Result(syscall(getdents64, fd, buffer, (nuint)target.Length));
    }

    public static int Space(int fd, out FileSystemSpace space)
    {
        // struct statfs of x86-64: 120 bytes, all words of eight.
        long* buffer = stackalloc long[15];
        int result = (int)Result(fstatfs(fd, buffer));
        space = result < 0 ? default : new FileSystemSpace(
            (ulong)buffer[2], (ulong)buffer[3], (ulong)buffer[4], (ulong)buffer[5], (ulong)buffer[6], (uint)buffer[1], (uint)buffer[8], (uint)buffer[9]);
        return result;
    }

    public static int GetAttribute(int fd, ReadOnlySpan<byte> name, Span<byte> value)
    {
        Span<byte> self = stackalloc byte[32];
        fixed (byte* path = SelfPath(fd, self))
        fixed (byte* key = Checked(name))
        fixed (byte* buffer = value)
            return (int)Result(getxattr(path, key, buffer, (nuint)value.Length));
    }

    public static int SetAttribute(int fd, ReadOnlySpan<byte> name, ReadOnlySpan<byte> value, int flags)
    {
        Span<byte> self = stackalloc byte[32];
        fixed (byte* path = SelfPath(fd, self))
        fixed (byte* key = Checked(name))
        fixed (byte* buffer = value)
            return (int)Result(setxattr(path, key, buffer, (nuint)value.Length, flags));
    }

    public static int ListAttributes(int fd, Span<byte> names)
    {
        Span<byte> self = stackalloc byte[32];
        fixed (byte* path = SelfPath(fd, self))
        fixed (byte* buffer = names)
            return (int)Result(listxattr(path, buffer, (nuint)names.Length));
    }

    public static int RemoveAttribute(int fd, ReadOnlySpan<byte> name)
    {
        Span<byte> self = stackalloc byte[32];
        fixed (byte* path = SelfPath(fd, self))
        fixed (byte* key = Checked(name))
            return (int)Result(removexattr(path, key));
    }

    private static void Put(long* time, (long Seconds, long Nanoseconds)? value)
    {
        time[0] = value is { Nanoseconds: >= 0 } given ? given.Seconds : 0;
        time[1] = value is not { } set ? TimeOmit : set.Nanoseconds < 0 ? TimeNow : set.Nanoseconds;
    }

    /// <summary>The kernel's own link to a descriptor's file: it leads to that file and nowhere else.</summary>
    private static Span<byte> SelfPath(int fd, Span<byte> target)
    {
        "/proc/self/fd/"u8.CopyTo(target);
        System.Buffers.Text.Utf8Formatter.TryFormat(fd, target[14..], out int digits);
        target[14 + digits] = 0;
        return target[..(15 + digits)];
    }

    private static ReadOnlySpan<byte> Checked(ReadOnlySpan<byte> name) => name.Length > 0 && name[^1] == 0 ? name : throw new ArgumentException("a name without its final zero", nameof(name));

    private static long Result(long value) => value < 0 ? -Marshal.GetLastPInvokeError() : value;

    [LibraryImport("libc", SetLastError = true)]
    private static partial int openat(int folder, byte* path, int flags, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int close(int fd);

    [LibraryImport("libc", EntryPoint = "fstatat", SetLastError = true)]
    private static partial int newfstatat(int folder, byte* path, byte* stat, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int statx(int folder, byte* path, int flags, uint mask, byte* status);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint readlinkat(int folder, byte* path, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int symlinkat(byte* target, int folder, byte* path);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int mkdirat(int folder, byte* path, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int mknodat(int folder, byte* path, uint mode, ulong device);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int unlinkat(int folder, byte* path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int renameat2(int fromFolder, byte* from, int toFolder, byte* to, uint flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int linkat(int fromFolder, byte* from, int toFolder, byte* to, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int chmod(byte* path, uint mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fchownat(int folder, byte* path, uint user, uint group, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ftruncate(int fd, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int utimensat(int folder, byte* path, long* times, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pread(int fd, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pwrite(int fd, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fsync(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fdatasync(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fallocate(int fd, int mode, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial long lseek(int fd, long offset, int whence);

    [LibraryImport("libc", SetLastError = true)]
    private static partial long syscall(long number, int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fstatfs(int fd, long* buffer);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint getxattr(byte* path, byte* name, byte* value, nuint size);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int setxattr(byte* path, byte* name, byte* value, nuint size, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint listxattr(byte* path, byte* names, nuint size);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int removexattr(byte* path, byte* name);
}
