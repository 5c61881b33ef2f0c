using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// Holds back signals that come from outside while a thread is in a library that takes an interrupted system call (EINTR of poll(2), which SA_RESTART does not restart) for
/// a failure: the end of a child process is enough for that. They wait, or go to another thread.
/// </summary>
internal readonly unsafe ref partial struct SignalGuard
{
    private const int Block = 0;
    private const int SetMask = 2;

    // Those that the thread itself causes are not held back: SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS.
    private const ulong OwnFaults = 1ul << 3 | 1ul << 4 | 1ul << 5 | 1ul << 6 | 1ul << 7 | 1ul << 10 | 1ul << 30;

    private readonly Signals _before;

    /// <summary>Begins; disposing ends it.</summary>
    public SignalGuard()
    {
        Signals held = new() { First = ~OwnFaults };
        Signals before = default;
        _ = pthread_sigmask(Block, &held, &before);
        _before = before;
    }

    public void Dispose()
    {
        Signals before = _before;
        _ = pthread_sigmask(SetMask, &before, null);
    }

    /// <summary>sigset_t of glibc and musl: 128 bytes, of which the kernel knows the first eight.</summary>
    private unsafe struct Signals
    {
        public ulong First;
        public fixed ulong Rest[15];
    }

    [LibraryImport("libc")]
    private static partial int pthread_sigmask(int how, Signals* set, Signals* old);
}
