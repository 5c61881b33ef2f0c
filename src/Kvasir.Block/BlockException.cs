using System;
using System.Runtime.InteropServices;

namespace Kvasir.Block;

/// <summary>The one exception of the block layer: what failed, why, and the errno that a device or a tool reports for it.</summary>
public sealed class BlockException : Exception
{
    public BlockException()
    {
    }

    public BlockException(string message)
        : base(message) => Errno = BlockErrno.Invalid;

    public BlockException(string message, Exception inner)
        : base(message, inner) => Errno = inner is BlockException block ? block.Errno : BlockErrno.Io;

    public BlockException(string message, int errno)
        : base(message) => Errno = errno;

    /// <summary>Positive errno(3) number.</summary>
    public int Errno { get; }

    /// <summary>A failed system call: "action: kernel's text".</summary>
    public static BlockException FromErrno(string action, int errno) =>
        new($"{action}: {Text(errno)}", errno);

    /// <summary>The C library's words for an errno.</summary>
    public static string Text(int errno) => Marshal.GetPInvokeErrorMessage(errno);

    internal static BlockException Corrupt(string message) => new(message, BlockErrno.Io);
}

/// <summary>The errno numbers that block requests end with (errno(3), x86-64 Linux).</summary>
public static class BlockErrno
{
    public const int Perm = 1;
    public const int NoEntry = 2;
    public const int Io = 5;
    public const int Again = 11;
    public const int NoMemory = 12;
    public const int Access = 13;
    public const int Busy = 16;
    public const int Exists = 17;
    public const int NoDevice = 19;
    public const int Invalid = 22;
    public const int FileTooBig = 27;
    public const int NoSpace = 28;
    public const int ReadOnly = 30;
    public const int NotSupported = 95;
    public const int Canceled = 125;
}
