using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>A terminal's settings (termios(3)), to be kept and put back.</summary>
public readonly unsafe partial struct TerminalMode
{
    private const int ApplyNow = 0;

    private readonly Settings _settings;

    private TerminalMode(in Settings settings) => _settings = settings;

    /// <summary>struct termios of the C library on x86-64: four flag words, the line discipline, 32 control characters, two speeds.</summary>
    [StructLayout(LayoutKind.Sequential)]
    private struct Settings
    {
        public uint Input;
        public uint Output;
        public uint Control;
        public uint Local;
        public byte Line;
        public ControlCharacters Characters;
        public uint InputSpeed;
        public uint OutputSpeed;
    }

    [InlineArray(32)]
    private struct ControlCharacters
    {
        private byte _first;
    }

    public static bool IsTerminal(int fd) => isatty(fd) == 1;

    /// <summary>Reads the settings in force.</summary>
    /// <exception cref="LinuxException">The descriptor is no terminal.</exception>
    public static TerminalMode Get(int fd)
    {
        Settings settings;
        // SAFETY: the structure has the C library's layout.
        if (tcgetattr(fd, &settings) != 0)
            throw new LinuxException("read the terminal's settings", Marshal.GetLastPInvokeError());
        return new TerminalMode(settings);
    }

    /// <summary>The same terminal in raw mode: every byte goes through as it is, in both directions (cfmakeraw(3)).</summary>
    public TerminalMode Raw()
    {
        Settings settings = _settings;
        // SAFETY: the structure has the C library's layout.
        cfmakeraw(&settings);
        return new TerminalMode(settings);
    }

    /// <summary>Puts the settings in force.</summary>
    /// <returns>False where the terminal is gone.</returns>
    public bool Apply(int fd)
    {
        Settings settings = _settings;
        // SAFETY: the structure has the C library's layout.
        return tcsetattr(fd, ApplyNow, &settings) == 0;
    }

    [LibraryImport("libc")]
    private static partial int isatty(int fd);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int tcgetattr(int fd, Settings* settings);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int tcsetattr(int fd, int when, Settings* settings);

    [LibraryImport("libc")]
    private static partial void cfmakeraw(Settings* settings);
}
