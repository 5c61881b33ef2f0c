using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// Plain reads and writes on descriptors that may be terminals or pipes: read(2), write(2), poll(2). .NET's streams look at a descriptor's kind
/// and change its mode; these do not.
/// </summary>
public static unsafe partial class FileDescriptor
{
    public const int StandardInput = 0;
    public const int StandardOutput = 1;
    public const int StandardError = 2;

    private const int Interrupted = 4;
    private const int TryAgain = 11;
    private const short PollIn = 1;
    private const short PollOut = 4;

    private struct PollEntry
    {
        public int Fd;
        public short Events;
        public short Returned;
    }

    /// <summary>Reads what is there, waiting for the first byte.</summary>
    /// <returns>How many bytes; 0 at the end of the input or where it cannot be read any more.</returns>
    public static int Read(int fd, Span<byte> destination)
    {
        while (true)
        {
            nint result;
            fixed (byte* start = destination)
            {
                // SAFETY: the kernel writes at most the length it is given.
                result = read(fd, start, (nuint)destination.Length);
            }
            if (result >= 0)
                return (int)result;
            switch (Marshal.GetLastPInvokeError())
            {
                case Interrupted:
                    break;
                case TryAgain:
                    Wait(fd, PollIn, -1);
                    break;
                default:
                    return 0;
            }
        }
    }

    /// <summary>Writes all bytes, waiting for room.</summary>
    /// <returns>0, or the error's number (errno(3)) where nobody takes the rest.</returns>
    public static int Write(int fd, ReadOnlySpan<byte> source)
    {
        while (source.Length > 0)
        {
            nint result;
            fixed (byte* start = source)
            {
                // SAFETY: the kernel reads at most the length it is given.
                result = write(fd, start, (nuint)source.Length);
            }
            if (result >= 0)
            {
                source = source[(int)result..];
                continue;
            }
            int errno = Marshal.GetLastPInvokeError();
            if (errno == TryAgain)
                Wait(fd, PollOut, -1);
            else if (errno != Interrupted)
                return errno;
        }
        return 0;
    }

    /// <summary>Waits until one of two descriptors has something to read (or its end).</summary>
    /// <returns>Which of them have.</returns>
    public static (bool First, bool Second) WaitForInput(int first, int second)
    {
        PollEntry* entries = stackalloc PollEntry[2];
        entries[0] = new PollEntry { Fd = first, Events = PollIn };
        entries[1] = new PollEntry { Fd = second, Events = PollIn };
        while (poll(entries, 2, -1) < 0 && Marshal.GetLastPInvokeError() == Interrupted)
        {
        }
        return (entries[0].Returned != 0, entries[1].Returned != 0);
    }

    private static void Wait(int fd, short events, int milliseconds)
    {
        PollEntry entry = new() { Fd = fd, Events = events };
        _ = poll(&entry, 1, milliseconds);
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint read(int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint write(int fd, byte* buffer, nuint length);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int poll(PollEntry* entries, ulong count, int milliseconds);
}
