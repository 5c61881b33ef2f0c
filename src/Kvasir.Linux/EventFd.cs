using System;
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>A flag that poll(2) can wait for (eventfd(2)).</summary>
public sealed unsafe partial class EventFd : IDisposable
{
    private const int CloseOnExec = 0x80000;
    private const int NonBlocking = 0x800;

    private readonly SafeFileHandle _handle;

    /// <exception cref="LinuxException">The kernel refused.</exception>
    public EventFd()
    {
        int fd = eventfd(0, CloseOnExec | NonBlocking);
        if (fd < 0)
            throw new LinuxException("make an event descriptor", Marshal.GetLastPInvokeError());
        _handle = new SafeFileHandle(fd, ownsHandle: true);
    }

    public int Fd => (int)_handle.DangerousGetHandle();

    /// <summary>Sets the flag. Any thread; never blocks.</summary>
    public void Signal()
    {
        ulong one = 1;
        // SAFETY: eight bytes, as the kernel asks for.
        _ = write(Fd, &one, sizeof(ulong));
    }

    /// <summary>Clears the flag.</summary>
    public void Clear()
    {
        ulong count;
        // SAFETY: eight bytes, as the kernel asks for.
        _ = read(Fd, &count, sizeof(ulong));
    }

    public void Dispose() => _handle.Dispose();

    [LibraryImport("libc", SetLastError = true)]
    private static partial int eventfd(uint initial, int flags);

    [LibraryImport("libc")]
    private static partial nint read(int fd, void* buffer, nuint length);

    [LibraryImport("libc")]
    private static partial nint write(int fd, void* buffer, nuint length);
}
