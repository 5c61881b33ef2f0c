using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>A system call failed: what was tried, the error's number and the kernel's text for it.</summary>
public sealed class LinuxException : Exception
{
    public LinuxException()
    {
    }

    public LinuxException(string message)
        : base(message)
    {
    }

    public LinuxException(string message, Exception inner)
        : base(message, inner)
    {
    }

    /// <param name="action">What was tried, for a person: "map 512 MiB of guest memory".</param>
    /// <param name="errno">The error's number (errno(3)).</param>
    public LinuxException(string action, int errno)
        : base($"cannot {action}: {Marshal.GetPInvokeErrorMessage(errno)}")
    {
        Errno = errno;
    }

    /// <summary>The error's number (errno(3)); 0 where none applies.</summary>
    public int Errno { get; }
}
