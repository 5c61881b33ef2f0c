using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>Waiting on a word of memory with nanosecond deadlines (futex(2)); .NET's own waits count in milliseconds.</summary>
public static unsafe partial class Futex
{
    private const long SysFutex = 202;
    private const int WaitBitsetPrivate = 9 | 128;
    private const int WakePrivate = 1 | 128;
    private const uint MatchAny = 0xffff_ffff;

    /// <summary>
    /// Sleeps while <paramref name="word"/> holds <paramref name="expected"/>, until woken or until CLOCK_MONOTONIC reaches
    /// <paramref name="deadlineNanoseconds"/> (<see cref="long.MaxValue"/>: no deadline). May return early; callers look again.
    /// </summary>
    public static void Wait(int* word, int expected, long deadlineNanoseconds)
    {
        if (deadlineNanoseconds == long.MaxValue)
        {
            _ = syscall(SysFutex, word, WaitBitsetPrivate, expected, null, null, MatchAny);
            return;
        }
        TimeSpec deadline = new() { Seconds = deadlineNanoseconds / 1_000_000_000, Nanoseconds = deadlineNanoseconds % 1_000_000_000 };
        _ = syscall(SysFutex, word, WaitBitsetPrivate, expected, &deadline, null, MatchAny);
    }

    /// <summary>Wakes up to <paramref name="count"/> threads that sleep on <paramref name="word"/>.</summary>
    public static void Wake(int* word, int count = int.MaxValue) => _ = syscall(SysFutex, word, WakePrivate, count, null, null, 0);

    private struct TimeSpec
    {
        public long Seconds;
        public long Nanoseconds;
    }

    [LibraryImport("libc")]
    private static partial long syscall(long number, int* word, int operation, int value, TimeSpec* timeout, int* word2, uint value3);
}
