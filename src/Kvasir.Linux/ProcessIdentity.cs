using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>Who this process is: user, and the name that ps(1) and top(1) show.</summary>
public static partial class ProcessIdentity
{
    /// <summary>The kernel's limit for a name, without the final zero (prctl(2), PR_SET_NAME).</summary>
    public const int NameLimit = 15;

    private const int StopSignal = 19;

    public static uint EffectiveUser => geteuid();

    public static bool IsRoot => geteuid() == 0;

    /// <summary>Names the process: what the kernel keeps of it is its first <see cref="NameLimit"/> bytes. Call from any thread.</summary>
    public static void SetName(string name)
    {
        // The main thread's name is the process's, and any thread of the process may write it.
        try
        {
            System.IO.File.WriteAllText($"/proc/self/task/{System.Environment.ProcessId}/comm", name);
        }
        catch (System.IO.IOException)
        {
            // Without /proc the name stays: it is for people, nothing depends on it.
        }
    }

    /// <summary>Stops the process as Ctrl-Z does, until it is continued.</summary>
    public static void StopSelf() => _ = kill(System.Environment.ProcessId, StopSignal);

    /// <summary>Sends the process a signal.</summary>
    public static void Raise(int signal) => _ = kill(System.Environment.ProcessId, signal);

    /// <summary>Makes this process the leader of a session of its own, which has no terminal. For a process that leads no group yet.</summary>
    public static void NewSession() => _ = setsid();

    /// <summary>Puts /dev/null in the place of standard input, output and error: whoever reads them sees their end.</summary>
    /// <exception cref="LinuxException">/dev/null cannot be opened.</exception>
    public static void DetachStreams()
    {
        using Microsoft.Win32.SafeHandles.SafeFileHandle none = NativeFile.Open("/dev/null", OpenFlags.ReadWrite, 0, out int errno) ?? throw new LinuxException("open /dev/null", errno);
        for (int stream = 0; stream <= 2; stream++)
            _ = dup2((int)none.DangerousGetHandle(), stream);
    }

    [LibraryImport("libc")]
    private static partial int setsid();

    [LibraryImport("libc")]
    private static partial int dup2(int from, int to);

    [LibraryImport("libc")]
    private static partial uint geteuid();

    [LibraryImport("libc")]
    private static partial int kill(int process, int signal);
}
