using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// Reads and writes that never wait, for sockets and devices that carry packets: recv(2), send(2), readv(2), writev(2). Results are byte counts or -errno.
/// </summary>
public static unsafe partial class FrameIo
{
    public const int TryAgain = 11;
    public const int NoBuffers = 105;

    private const int DontWait = 0x40;
    private const int NoSignal = 0x4000;
    private const int Interrupted = 4;

    /// <summary>Receives from a socket; 0 at the end of a stream.</summary>
    public static int Receive(int socket, Span<byte> destination)
    {
        // SAFETY: the span stays pinned during the call, and the kernel writes at most its length.
        fixed (byte* start = destination)
        {
            int outcome;
            while (!TryEnd(recv(socket, start, (nuint)destination.Length, DontWait), out outcome))
            {
            }
            return outcome;
        }
    }

    /// <summary>Sends on a connected socket; a peer that has left is an error, not a signal.</summary>
    public static int Send(int socket, ReadOnlySpan<byte> source)
    {
        // SAFETY: the span stays pinned during the call.
        fixed (byte* start = source)
        {
            int outcome;
            while (!TryEnd(send(socket, start, (nuint)source.Length, DontWait | NoSignal), out outcome))
            {
            }
            return outcome;
        }
    }

    /// <summary>Sends two pieces as one, on a connected socket.</summary>
    public static int Send(int socket, ReadOnlySpan<byte> first, ReadOnlySpan<byte> second)
    {
        // SAFETY: both spans stay pinned during the call; the message header and its vectors are locals that outlive it.
        fixed (byte* a = first)
        fixed (byte* b = second)
        {
            NativeFile.IoVector* vectors = stackalloc NativeFile.IoVector[2];
            Fill(vectors, a, first.Length, b, second.Length);
            MessageHeader message = new() { Vectors = vectors, VectorCount = 2 };
            int outcome;
            while (!TryEnd(sendmsg(socket, &message, DontWait | NoSignal), out outcome))
            {
            }
            return outcome;
        }
    }

    /// <summary>Reads one packet from a device in non-blocking mode, its first bytes into one place and the rest into another.</summary>
    public static int Read(int fd, Span<byte> first, Span<byte> second)
    {
        // SAFETY: both spans stay pinned during the call, and the kernel writes at most their lengths.
        fixed (byte* a = first)
        fixed (byte* b = second)
        {
            NativeFile.IoVector* vectors = stackalloc NativeFile.IoVector[2];
            Fill(vectors, a, first.Length, b, second.Length);
            int outcome;
            while (!TryEnd(readv(fd, vectors, 2), out outcome))
            {
            }
            return outcome;
        }
    }

    /// <summary>Writes one packet from two places to a device in non-blocking mode.</summary>
    public static int Write(int fd, ReadOnlySpan<byte> first, ReadOnlySpan<byte> second)
    {
        // SAFETY: both spans stay pinned during the call.
        fixed (byte* a = first)
        fixed (byte* b = second)
        {
            NativeFile.IoVector* vectors = stackalloc NativeFile.IoVector[2];
            Fill(vectors, a, first.Length, b, second.Length);
            int outcome;
            while (!TryEnd(writev(fd, vectors, 2), out outcome))
            {
            }
            return outcome;
        }
    }

    private static void Fill(NativeFile.IoVector* vectors, byte* first, int firstLength, byte* second, int secondLength)
    {
        vectors[0] = new NativeFile.IoVector { Base = first, Length = (nuint)firstLength };
        vectors[1] = new NativeFile.IoVector { Base = second, Length = (nuint)secondLength };
    }

    /// <summary>Makes the outcome of a call's result.</summary>
    /// <returns>False where a signal interrupted it, and it is to be made again.</returns>
    private static bool TryEnd(nint result, out int outcome)
    {
        outcome = (int)result;
        if (result >= 0)
            return true;
        int errno = Marshal.GetLastPInvokeError();
        outcome = -errno;
        return errno != Interrupted;
    }

    /// <summary>struct msghdr of x86-64.</summary>
    private struct MessageHeader
    {
        public void* Name;
        public uint NameLength;
        public NativeFile.IoVector* Vectors;
        public nuint VectorCount;
        public void* Control;
        public nuint ControlLength;
        public int Flags;
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint recv(int fd, byte* buffer, nuint length, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint send(int fd, byte* buffer, nuint length, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint sendmsg(int fd, MessageHeader* message, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint readv(int fd, NativeFile.IoVector* vectors, int count);

    [LibraryImport("libc", SetLastError = true)]
    private static partial nint writev(int fd, NativeFile.IoVector* vectors, int count);
}
