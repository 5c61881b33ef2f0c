using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// One running <c>kvasir</c> process, with pipes for its input and output, driven as a person at the console would: wait for a text, type a line. All
/// that it printed is kept, and shown when a wait fails. Disposing it kills the process if it still runs, and no other.
/// </summary>
internal sealed class GuestSession : IDisposable
{
    /// <summary>What the default guest's shell prompts with.</summary>
    public const string Prompt = "kvasir:/root# ";

    /// <summary>How much of the output a failure shows.</summary>
    private const int ShownOnFailure = 6000;

    /// <summary>The machine may be loaded many times over: a limit only has to tell a hang from a slow guest.</summary>
    public static readonly TimeSpan DefaultLimit = TimeSpan.FromMinutes(10);

    private static readonly string s_accelerator = Environment.GetEnvironmentVariable("KVASIR_GUEST_ACCEL") ?? "";

    // Wiring
    private readonly Process _process;
    private readonly Thread _outputReader;
    private readonly Thread _errorReader;
    private readonly string _commandLine;

    // State, guarded by the lock
    private readonly object _lock = new();
    private readonly StringBuilder _output = new();
    private readonly StringBuilder _error = new();
    private bool _outputEnded;

    // State of the test's thread
    private int _seen;
    private int _commands;

    private GuestSession(ProcessStartInfo start)
    {
        _commandLine = $"{start.FileName} {string.Join(' ', start.ArgumentList)}";
        _process = Process.Start(start)!;
        _outputReader = new Thread(() => Collect(_process.StandardOutput, _output, isOutput: true)) { IsBackground = true, Name = "guest-out" };
        _errorReader = new Thread(() => Collect(_process.StandardError, _error, isOutput: false)) { IsBackground = true, Name = "guest-err" };
        _outputReader.Start();
        _errorReader.Start();
    }

    public int ProcessId => _process.Id;

    public bool HasExited => _process.HasExited;

    /// <summary>Everything printed so far, without carriage returns.</summary>
    public string Output
    {
        get
        {
            lock (_lock)
                return _output.ToString();
        }
    }

    /// <summary>Everything printed as an error so far, without the line that says which accelerator was taken.</summary>
    public string Error
    {
        get
        {
            lock (_lock)
            {
                string text = _error.ToString();
                int end = text.IndexOf('\n', StringComparison.Ordinal);
                return end >= 0 && text.StartsWith("accel: ", StringComparison.Ordinal) ? text[(end + 1)..] : text;
            }
        }
    }

    /// <summary>
    /// Starts <c>kvasir</c> with these arguments. A VM whose accelerator they do not say gets the one that KVASIR_GUEST_ACCEL names, so that all of these tests run on any.
    /// </summary>
    public static GuestSession Start(params string[] arguments)
    {
        bool open = s_accelerator.Length > 0 && arguments is ["run", ..] && !arguments.Contains("--accel");
        return StartProgram(KvasirProgram.Path, open ? ["run", "--accel", s_accelerator, .. arguments[1..]] : arguments);
    }

    /// <summary>Starts the default guest and waits for its prompt.</summary>
    public static GuestSession Boot(params string[] arguments)
    {
        GuestSession session = Start(["run", .. arguments]);
        try
        {
            session.Expect(Prompt);
            return session;
        }
        catch
        {
            session.Dispose();
            throw;
        }
    }

    /// <summary>Starts a program that runs <c>kvasir</c> in its turn, as a shell may.</summary>
    public static GuestSession StartProgram(string program, params string[] arguments) => new(new ProcessStartInfo(program, arguments)
    {
        RedirectStandardInput = true,
        RedirectStandardOutput = true,
        RedirectStandardError = true,
        StandardInputEncoding = new UTF8Encoding(encoderShouldEmitUTF8Identifier: false),
        StandardOutputEncoding = Encoding.Latin1,
        StandardErrorEncoding = Encoding.UTF8,
    });

    /// <summary>Waits until the output, after what an earlier wait found, holds a text.</summary>
    /// <returns>What came before it.</returns>
    public string Expect(string text, TimeSpan? limit = null)
    {
        Stopwatch waited = Stopwatch.StartNew();
        TimeSpan patience = limit ?? DefaultLimit;
        lock (_lock)
        {
            while (true)
            {
                string all = _output.ToString();
                int at = all.IndexOf(text, _seen, StringComparison.Ordinal);
                if (at >= 0)
                {
                    string before = all[_seen..at];
                    _seen = at + text.Length;
                    return before;
                }
                TimeSpan left = patience - waited.Elapsed;
                if (_outputEnded || left <= TimeSpan.Zero)
                    Fail(_outputEnded ? $"ended without printing '{text}'" : $"did not print '{text}' within {patience.TotalSeconds:0} s");
                Monitor.Wait(_lock, left < TimeSpan.FromSeconds(1) ? left : TimeSpan.FromSeconds(1));
            }
        }
    }

    /// <summary>Waits for the end of a line that is awaited as in <see cref="Expect"/>.</summary>
    /// <returns>The rest of the line.</returns>
    public string ExpectLine(string start, TimeSpan? limit = null)
    {
        Expect(start, limit);
        return Expect("\n", limit);
    }

    /// <summary>Types a line.</summary>
    public void Send(string line) => Type($"{line}\n");

    /// <summary>Types keys. A process that has ended meanwhile is not a fault here: what the test waits for next will tell.</summary>
    public void Type(string keys)
    {
        try
        {
            _process.StandardInput.Write(keys);
            _process.StandardInput.Flush();
        }
        catch (IOException)
        {
            // Its input is closed: it ends, or has ended.
        }
    }

    public void CloseInput() => _process.StandardInput.Close();

    /// <summary>
    /// Runs commands in a subshell of the guest's shell, which ends at the first one that fails, in a pipeline too. One after <c>!</c> is no failure to it,
    /// whatever comes of it: it has to be joined to the next by <c>&amp;&amp;</c>, or to stand last.
    /// </summary>
    /// <returns>What they printed. The exit code must be 0.</returns>
    public string Run(string command, TimeSpan? limit = null)
    {
        _commands++;
        string end = string.Create(CultureInfo.InvariantCulture, $"end-{_commands}");
        // The quotes keep the marks from being found in the echo of the line itself.
        Send($"echo 'beg'in-{_commands}; (set -eo pipefail; {command}); echo \"=$?=\" 'en'd-{_commands}");
        Expect($"begin-{_commands}\n", limit);
        string text = Expect(end, limit);
        int mark = text.LastIndexOf('=', Math.Max(0, text.LastIndexOf('=') - 1));
        Assert.True(mark >= 0, $"no exit code after '{command}': {text}");
        string code = text[(mark + 1)..].TrimEnd().TrimEnd('=');
        Assert.True(code == "0", $"'{command}' ended with code {code}: {text[..mark]}");
        return text[..mark].Trim('\n');
    }

    /// <summary>Waits for the process's end.</summary>
    /// <returns>Its exit code.</returns>
    public int WaitForExit(TimeSpan? limit = null)
    {
        TimeSpan patience = limit ?? DefaultLimit;
        if (!_process.WaitForExit(patience))
            Fail($"did not end within {patience.TotalSeconds:0} s");
        _outputReader.Join(TimeSpan.FromSeconds(10));
        _errorReader.Join(TimeSpan.FromSeconds(10));
        return _process.ExitCode;
    }

    /// <summary>Sends the process, and no other, a signal.</summary>
    /// <param name="signal">Its name: TERM, INT.</param>
    public void Signal(string signal)
    {
        using Process kill = Process.Start("/bin/sh", ["-c", string.Create(CultureInfo.InvariantCulture, $"kill -s {signal} {_process.Id}")])!;
        kill.WaitForExit();
        Assert.Equal(0, kill.ExitCode);
    }

    /// <summary>Fails the test unless the guest's kernel found nothing to complain of.</summary>
    public void CheckKernelLog() => KernelLog.Check(Run("dmesg"));

    public void Dispose()
    {
        if (!_process.HasExited)
        {
            _process.Kill();
            _process.WaitForExit(10_000);
        }
        _process.Dispose();
    }

    private void Collect(StreamReader reader, StringBuilder into, bool isOutput)
    {
        char[] buffer = new char[4096];
        try
        {
            int length;
            while ((length = reader.Read(buffer, 0, buffer.Length)) > 0)
            {
                lock (_lock)
                {
                    for (int i = 0; i < length; i++)
                    {
                        if (buffer[i] != '\r')
                            into.Append(buffer[i]);
                    }
                    Monitor.PulseAll(_lock);
                }
            }
        }
        catch (Exception e) when (e is IOException or ObjectDisposedException)
        {
            // The session was disposed under the reader.
        }
        if (!isOutput)
            return;
        lock (_lock)
        {
            _outputEnded = true;
            Monitor.PulseAll(_lock);
        }
    }

    private void Fail(string what)
    {
        string output = Output;
        string shown = output.Length > ShownOnFailure ? $"...{output[^ShownOnFailure..]}" : output;
        Assert.Fail($"{_commandLine}\n{what}\nstandard output:\n{shown}\nstandard error:\n{Error}");
    }
}
