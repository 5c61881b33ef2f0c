using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>How a file is opened (open(2)).</summary>
[Flags]
public enum OpenFlags
{
    ReadOnly = 0,
    WriteOnly = 1,
    ReadWrite = 2,
    Create = 0x40,
    Exclusive = 0x80,
    Truncate = 0x200,
    DataSync = 0x1000,
    Direct = 0x4000,
    CloseOnExec = 0x80000,

    /// <summary>Only the name's place, to ask what it is: nothing is opened, no driver is told (O_PATH).</summary>
    PathOnly = 0x200000,
}

/// <summary>What a name stands for, as far as the block layer cares (stat(2)).</summary>
public enum FileKind
{
    Regular,
    BlockDevice,
    CharacterDevice,
    Socket,
    Other,
}

/// <summary>fallocate(2) modes.</summary>
[Flags]
public enum AllocateMode
{
    Allocate = 0,
    KeepSize = 1,
    PunchHole = 2,
    ZeroRange = 0x10,
}

/// <summary>
/// File calls that .NET lacks: O_DIRECT opens, hole punching, data and hole search, open-file-description locks, block device
/// sizes. Results are non-negative; failures come back as a negative errno, for the caller to judge.
/// </summary>
public static unsafe partial class NativeFile
{
    public const int ErrorPerm = 1;
    public const int ErrorNoEntry = 2;
    public const int ErrorIo = 5;
    public const int ErrorNoDevice = 6;
    public const int ErrorAgain = 11;
    public const int ErrorAccess = 13;
    public const int ErrorBusy = 16;
    public const int ErrorInvalid = 22;
    public const int ErrorNoSpace = 28;
    public const int ErrorNoSystemCall = 38;
    public const int ErrorNotSupported = 95;

    private const int SeekSet = 0;
    private const int SeekEnd = 2;
    private const int SeekData = 3;
    private const int SeekHole = 4;
    private const int OfdGetLock = 36;
    private const int OfdSetLock = 37;
    private const short ReadLock = 0;
    private const short WriteLock = 1;
    private const short Unlocked = 2;
    private const nuint BlkGetSize64 = 0x80081272;
    private const nuint BlkSectorSizeGet = 0x1268;
    private const nuint BlkDiscard = 0x1277;
    private const nuint BlkZeroOut = 0x127f;
    private const long SysPwrite64 = 18;
    private const long SysPreadv2 = 327;
    private const int NoWait = 8;
    private const int SyncData = 2;

    /// <summary>Opens a file; -errno through <paramref name="error"/> and null when the kernel refuses.</summary>
    public static SafeFileHandle? Open(string path, OpenFlags flags, int mode, out int error)
    {
        int fd;
        do
        {
            fd = open(path, (int)(flags | OpenFlags.CloseOnExec), mode);
            error = fd < 0 ? Marshal.GetLastPInvokeError() : 0;
        }
        while (error == 4);
        return fd < 0 ? null : new SafeFileHandle(fd, ownsHandle: true);
    }

    public static FileKind Kind(SafeFileHandle file)
    {
        // struct stat of x86-64: st_mode is the 32-bit word at offset 24.
        byte* stat = stackalloc byte[144];
        // SAFETY: the buffer is as large as the kernel's struct stat.
        if (fstat(file, stat) != 0)
            return FileKind.Other;
        return (*(uint*)(stat + 24) & 0xf000) switch
        {
            0x8000 => FileKind.Regular,
            0x6000 => FileKind.BlockDevice,
            0x2000 => FileKind.CharacterDevice,
            0xc000 => FileKind.Socket,
            _ => FileKind.Other,
        };
    }

    /// <summary>Bytes the file occupies on its medium (st_blocks); -1 where unknown.</summary>
    public static long AllocatedBytes(SafeFileHandle file)
    {
        byte* stat = stackalloc byte[144];
        // SAFETY: the buffer is as large as the kernel's struct stat; st_blocks is the 64-bit word at offset 64.
        return fstat(file, stat) != 0 ? -1 : *(long*)(stat + 64) * 512;
    }

    /// <summary>Device and inode, which name a file whatever its path.</summary>
    public static (ulong Device, ulong Inode) Identity(SafeFileHandle file)
    {
        byte* stat = stackalloc byte[144];
        // SAFETY: the buffer is as large as the kernel's struct stat.
        return fstat(file, stat) != 0 ? (0, 0) : (*(ulong*)stat, *(ulong*)(stat + 8));
    }

    /// <summary>Whether a file lies on ext2, ext3 or ext4, which share a magic number (statfs(2)).</summary>
    public static bool IsExt4(SafeFileHandle file)
    {
        long* statfs = stackalloc long[15];
        // SAFETY: the buffer is as large as the kernel's struct statfs of x86-64 (120 bytes); f_type is its first word.
        return fstatfs(file, statfs) == 0 && *statfs == 0xef53;
    }

    /// <summary>Size in bytes of a file or block device.</summary>
    public static long Size(SafeFileHandle file) => Result(lseek(file, 0, SeekEnd));

    public static long BlockDeviceSize(SafeFileHandle file)
    {
        ulong size = 0;
        // SAFETY: the ioctl stores one u64.
        return ioctl(file, BlkGetSize64, &size) != 0 ? -Marshal.GetLastPInvokeError() : (long)size;
    }

    /// <summary>Logical sector size of a block device; 512 where it does not say.</summary>
    public static int SectorSize(SafeFileHandle file)
    {
        int size = 512;
        // SAFETY: the ioctl stores one int.
        return ioctl(file, BlkSectorSizeGet, &size) != 0 ? 512 : size;
    }

    public static int DiscardDevice(SafeFileHandle file, long offset, long length) => DeviceRange(file, BlkDiscard, offset, length);

    public static int ZeroDevice(SafeFileHandle file, long offset, long length) => DeviceRange(file, BlkZeroOut, offset, length);

    /// <summary>Start of the next data at or after <paramref name="offset"/>; -ENXIO: none up to the end.</summary>
    public static long FindData(SafeFileHandle file, long offset) => Result(lseek(file, offset, SeekData));

    /// <summary>Start of the next hole at or after <paramref name="offset"/> (the end of the file is one).</summary>
    public static long FindHole(SafeFileHandle file, long offset) => Result(lseek(file, offset, SeekHole));

    public static long Rewind(SafeFileHandle file) => Result(lseek(file, 0, SeekSet));

    public static int Truncate(SafeFileHandle file, long length) => (int)Result(ftruncate(file, length));

    public static int Allocate(SafeFileHandle file, AllocateMode mode, long offset, long length)
    {
        int error;
        do
            error = (int)Result(fallocate(file, (int)mode, offset, length));
        while (error == -4);
        return error;
    }

    public static int SyncFileData(SafeFileHandle file) => (int)Result(fdatasync(file));

    /// <summary>Reads what is there: bytes read (0 at the end), or -errno.</summary>
    public static int Read(SafeFileHandle file, long offset, Span<byte> buffer)
    {
        // SAFETY: the span stays pinned for the call.
        fixed (byte* data = buffer)
        {
            nint done;
            do
                done = (nint)Result(pread(file, data, (nuint)buffer.Length, offset));
            while (done == -4);
            return (int)done;
        }
    }

    /// <summary>Reads only what the page cache holds: bytes read, or -EAGAIN when the medium would have to be asked.</summary>
    public static int ReadCached(SafeFileHandle file, long offset, Span<byte> buffer)
    {
        // SAFETY: the span stays pinned for the call.
        fixed (byte* data = buffer)
        {
            IoVector vector = new() { Base = data, Length = (nuint)buffer.Length };
            return (int)Result(preadv2(file, &vector, 1, offset, NoWait));
        }
    }

    /// <summary>
    /// <see cref="ReadCached"/> for those who keep the file open by other means than its handle's count, and who need no reason: bytes read, or -1. The call is
    /// made without the C library's cancellation points and error number, which for a page in the cache are a tenth of its time.
    /// </summary>
    public static int ReadCachedNow(int fd, long offset, Span<byte> buffer)
    {
        // SAFETY: the span stays pinned for the call.
        fixed (byte* data = buffer)
        {
            IoVector vector = new() { Base = data, Length = (nuint)buffer.Length };
            return (int)syscall(SysPreadv2, fd, &vector, 1, offset, 0, NoWait);
        }
    }

    /// <summary>Writes as <see cref="ReadCachedNow"/> reads: bytes written, or -1.</summary>
    public static int WriteNow(int fd, long offset, ReadOnlySpan<byte> buffer)
    {
        // SAFETY: the span stays pinned for the call.
        fixed (byte* data = buffer)
            return (int)syscall(SysPwrite64, fd, data, (nuint)buffer.Length, offset, 0, 0);
    }

    /// <summary>Writes: bytes written, or -errno.</summary>
    public static int Write(SafeFileHandle file, long offset, ReadOnlySpan<byte> buffer, bool throughCache)
    {
        // SAFETY: the span stays pinned for the call.
        fixed (byte* data = buffer)
        {
            nint done;
            IoVector vector = new() { Base = data, Length = (nuint)buffer.Length };
            do
                done = throughCache ? (nint)Result(pwritev2(file, &vector, 1, offset, SyncData)) : (nint)Result(pwrite(file, data, (nuint)buffer.Length, offset));
            while (done == -4);
            return (int)done;
        }
    }

    /// <summary>Copies between files inside the kernel: bytes copied, or -errno.</summary>
    public static long CopyRange(SafeFileHandle source, long sourceOffset, SafeFileHandle target, long targetOffset, long length)
    {
        long from = sourceOffset;
        long to = targetOffset;
        // SAFETY: both offsets are locals that outlive the call.
        return Result(copy_file_range(source, &from, target, &to, (nuint)length, 0));
    }

    /// <summary>Takes a shared open-file-description lock on one byte; 0 or -errno.</summary>
    public static int LockByteShared(SafeFileHandle file, long offset) => LockByte(file, OfdSetLock, ReadLock, offset);

    public static int UnlockByte(SafeFileHandle file, long offset) => LockByte(file, OfdSetLock, Unlocked, offset);

    /// <summary>Whether any other opener holds a lock on the byte: 1, 0, or -errno.</summary>
    public static int IsByteLocked(SafeFileHandle file, long offset)
    {
        FileLock query = new() { Type = WriteLock, Whence = SeekSet, Start = offset, Length = 1 };
        // SAFETY: struct flock is a local that outlives the call.
        if (fcntl(file, OfdGetLock, &query) != 0)
            return -Marshal.GetLastPInvokeError();
        return query.Type == Unlocked ? 0 : 1;
    }

    private static int LockByte(SafeFileHandle file, int command, short type, long offset)
    {
        FileLock request = new() { Type = type, Whence = SeekSet, Start = offset, Length = 1 };
        // SAFETY: struct flock is a local that outlives the call.
        return (int)Result(fcntl(file, command, &request));
    }

    private static int DeviceRange(SafeFileHandle file, nuint request, long offset, long length)
    {
        ulong* range = stackalloc ulong[2] { (ulong)offset, (ulong)length };
        // SAFETY: the ioctl reads two u64.
        return ioctl(file, request, range) != 0 ? -Marshal.GetLastPInvokeError() : 0;
    }

    private static long Result(long value) => value < 0 ? -Marshal.GetLastPInvokeError() : value;

    internal struct IoVector
    {
        public byte* Base;
        public nuint Length;
    }

    private struct FileLock
    {
        public short Type;
        public short Whence;
        public long Start;
        public long Length;
        public int Pid;
    }

    [LibraryImport("libc")]
    private static partial nint syscall(long number, long fd, void* memory, nuint count, long offset, long offsetHigh, long flags);

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int open(string path, int flags, int mode);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fstat(SafeFileHandle file, byte* stat);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fstatfs(SafeFileHandle file, long* statfs);

    [LibraryImport("libc", SetLastError = true)]
    private static partial long lseek(SafeFileHandle file, long offset, int whence);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ftruncate(SafeFileHandle file, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fallocate(SafeFileHandle file, int mode, long offset, long length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fdatasync(SafeFileHandle file);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pread(SafeFileHandle file, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pwrite(SafeFileHandle file, byte* buffer, nuint length, long offset);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint preadv2(SafeFileHandle file, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint pwritev2(SafeFileHandle file, IoVector* vectors, int count, long offset, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint copy_file_range(SafeFileHandle source, long* from, SafeFileHandle target, long* to, nuint length, uint flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fcntl(SafeFileHandle file, int command, FileLock* request);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int ioctl(SafeFileHandle file, nuint request, void* argument);
}
