using System;
using System.ComponentModel;
using System.Diagnostics;
using System.IO;

namespace Kvasir.Cli.Terminal;

/// <summary>
/// A shell that sleeps on a pipe from this process and puts the terminal's settings back when the pipe closes without a word: also after
/// kill -9, which no handler of our own survives. Without a shell or stty there is none, and the VM runs all the same.
/// </summary>
internal sealed class TerminalWatcher : IDisposable
{
    private const string Script = """
        trap '' HUP INT QUIT TERM TSTP TTIN TTOU
        saved=$(stty -g <"$1") || exit 1
        echo ready
        read -r word || stty "$saved" <"$1"
        """;

    private readonly Process _process;

    private TerminalWatcher(Process process) => _process = process;

    /// <summary>Starts a watcher, with the settings in force now as what it puts back.</summary>
    public static TerminalWatcher? Start()
    {
        try
        {
            string? terminal = new FileInfo("/proc/self/fd/0").LinkTarget;
            if (terminal is null)
                return null;
            ProcessStartInfo start = new("/bin/sh", ["-c", Script, "kvasir-terminal", terminal])
            {
                RedirectStandardInput = true,
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            };
            Process process = Process.Start(start)!;
            if (process.StandardOutput.ReadLine() == "ready")
                return new TerminalWatcher(process);
            process.Dispose();
            return null;
        }
        catch (Exception e) when (e is Win32Exception or IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Sends it away: the terminal is as it was.</summary>
    public void Dispose()
    {
        try
        {
            _process.StandardInput.WriteLine("done");
            _process.StandardInput.Close();
            _process.WaitForExit(1000);
        }
        catch (IOException)
        {
            // It was ended by somebody else; the terminal is restored already.
        }
        _process.Dispose();
    }
}
