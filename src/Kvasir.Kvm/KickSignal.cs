using System.Runtime.InteropServices;
using Kvasir.Linux;

namespace Kvasir.Kvm;

/// <summary>
/// The signal that makes a blocking KVM_RUN return. Its handler does nothing: that there is one is enough for the kernel to interrupt the call.
/// </summary>
internal static unsafe partial class KickSignal
{
    /// <summary>A real-time signal that neither .NET (34) nor the C library (32, 33) uses.</summary>
    private const int Number = 40;
    private const int Restart = 0x1000_0000;

    private static readonly int s_process = getpid();
    private static readonly int s_error = Install();

    /// <summary>As the C library lays out struct sigaction on x86-64.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 152)]
    private struct SignalAction
    {
        [FieldOffset(0)] public nint Handler;
        [FieldOffset(136)] public int Flags;
    }

    /// <summary>The calling thread's number, for <see cref="Send"/>.</summary>
    public static int CurrentThread => gettid();

    /// <exception cref="LinuxException">The handler could not be installed.</exception>
    public static void EnsureInstalled()
    {
        if (s_error != 0)
            throw new LinuxException("install the signal handler that interrupts vCPUs", s_error);
    }

    /// <summary>Interrupts a thread's system call. A thread that has ended is left alone.</summary>
    public static void Send(int thread) => _ = tgkill(s_process, thread, Number);

    private static int Install()
    {
        // A handler in managed code could be entered in the middle of managed code. abs() takes one integer, touches nothing, and is in every C library.
        nint library = NativeLibrary.Load("libc.so.6");
        SignalAction action = new() { Handler = NativeLibrary.GetExport(library, "abs"), Flags = Restart };
        return sigaction(Number, &action, null) == 0 ? 0 : Marshal.GetLastPInvokeError();
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial int sigaction(int signal, SignalAction* action, SignalAction* old);

    [LibraryImport("libc")]
    private static partial int tgkill(int process, int thread, int signal);

    [LibraryImport("libc")]
    private static partial int getpid();

    [LibraryImport("libc")]
    private static partial int gettid();
}
