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

    /// <param name="blocks">For a thread that waits for nothing else: it may <see cref="Wait"/>.</param>
    /// <exception cref="LinuxException">The kernel refused.</exception>
    public EventFd(bool blocks = false)
    {
        int fd = eventfd(0, CloseOnExec | (blocks ? 0 : NonBlocking));
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
    public void Clear() => Take();

    /// <summary>Waits, on one that blocks, until the flag is set, and clears it; may come back without, when a signal interrupts.</summary>
    public void Wait() => Take();

    /// <summary>Clears the flag.</summary>
    /// <returns>How often it was set since it was clear.</returns>
    public ulong Take()
    {
        ulong count;
        // SAFETY: eight bytes, as the kernel asks for.
        return read(Fd, &count, sizeof(ulong)) == sizeof(ulong) ? count : 0;
    }

    public void Dispose() => _handle.Dispose();

    [LibraryImport("libc", SetLastError = true)]
    private static partial int eventfd(uint initial, int flags);

    [LibraryImport("libc")]
    private static partial nint read(int fd, void* buffer, nuint length);

    [LibraryImport("libc")]
    private static partial nint write(int fd, void* buffer, nuint length);
}
