using System;
using Kvasir.Linux;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Block;

/// <summary>What an opener does with an image, and what it lets others do meanwhile (QEMU's block permissions).</summary>
[Flags]
public enum BlockPermission
{
    None = 0,
    ConsistentRead = 1 << 0,
    Write = 1 << 1,
    WriteUnchanged = 1 << 2,
    Resize = 1 << 3,
    All = ConsistentRead | Write | WriteUnchanged | Resize,
}

/// <summary>
/// Image locks that QEMU understands: for each permission held, a shared lock on byte 100 + n of the file, for each one not shared
/// with others on byte 200 + n; a conflict is a lock of another opener on the opposite byte (QEMU documentation, "Disk image file
/// locking"). Open-file-description locks, so they vanish with the process however it ends.
/// </summary>
internal static class ImageLock
{
    private const long HeldBase = 100;
    private const long UnsharedBase = 200;
    private const int Permissions = 4;

    private static readonly string[] Names = ["consistent read", "write", "write unchanged", "resize"];

    /// <summary>Takes the locks.</summary>
    /// <exception cref="BlockException">Another program's use of the image conflicts.</exception>
    public static void Take(SafeFileHandle file, string path, BlockPermission held, BlockPermission shared)
    {
        for (int i = 0; i < Permissions; i++)
        {
            BlockPermission bit = (BlockPermission)(1 << i);
            if ((held & bit) != 0)
                Lock(file, HeldBase + i, path);
            if ((shared & bit) == 0)
                Lock(file, UnsharedBase + i, path);
        }
        for (int i = 0; i < Permissions; i++)
        {
            BlockPermission bit = (BlockPermission)(1 << i);
            if ((held & bit) != 0 && NativeFile.IsByteLocked(file, UnsharedBase + i) == 1)
                throw Conflict(file, path, $"Failed to get \"{Names[i]}\" lock");
            if ((shared & bit) == 0 && NativeFile.IsByteLocked(file, HeldBase + i) == 1)
                throw Conflict(file, path, $"Failed to get shared \"{Names[i]}\" lock");
        }
    }

    /// <summary>
    /// Gives the locks back. Closing alone is not enough: a child process between its fork and its exec holds the open file too.
    /// </summary>
    public static void Release(SafeFileHandle file)
    {
        for (int i = 0; i < Permissions; i++)
        {
            _ = NativeFile.UnlockByte(file, HeldBase + i);
            _ = NativeFile.UnlockByte(file, UnsharedBase + i);
        }
    }

    private static void Lock(SafeFileHandle file, long offset, string path)
    {
        int result = NativeFile.LockByteShared(file, offset);
        // A file system without locks (some network ones) gives ENOLCK or EINVAL: there QEMU goes on without, and so do we.
        if (result is -NativeFile.ErrorAgain or -NativeFile.ErrorAccess)
            throw Conflict(file, path, $"Failed to lock byte {offset}");
    }

    private static BlockException Conflict(SafeFileHandle file, string path, string what)
    {
        Release(file);
        return new BlockException($"{what}\nIs another process using the image [{path}]?", BlockErrno.Again);
    }
}
