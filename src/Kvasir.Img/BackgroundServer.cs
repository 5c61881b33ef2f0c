using System;
using System.Diagnostics;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>
/// `--fork`: this program is started a second time, which serves. A process with threads cannot go on after fork(2), so the second one is a new program: it
/// is told by its environment what it is, and says over its output that it listens.
/// </summary>
internal static class BackgroundServer
{
    private const string Mark = "KVASIR_NBD_BACKGROUND";
    private const string Ready = "kvasir nbd: ready";

    private static bool s_isOne = Environment.GetEnvironmentVariable(Mark) is not null;

    /// <summary>Whether this process is the one that serves.</summary>
    public static bool IsOne => s_isOne;

    /// <summary>Starts the server, waits until it listens or has failed, and gives this process's exit code.</summary>
    /// <param name="args">The command line, after "nbd".</param>
    /// <param name="output">Gets what the server says before it listens.</param>
    /// <param name="error">Gets its complaints.</param>
    public static async Task<int> LaunchAsync(string[] args, TextWriter output, TextWriter error)
    {
        string program = Environment.ProcessPath ?? throw new BlockException("--fork: this program cannot find itself (/proc is not mounted)");
        ProcessStartInfo start = new(program) { RedirectStandardInput = true, RedirectStandardOutput = true, RedirectStandardError = true };
        if (Path.GetFileNameWithoutExtension(program) == "dotnet")
            start.ArgumentList.Add(Environment.GetCommandLineArgs()[0]);
        start.ArgumentList.Add("nbd");
        foreach (string word in args)
            start.ArgumentList.Add(word);
        start.Environment[Mark] = "1";
        using Process server = Process.Start(start) ?? throw new BlockException($"--fork: {program} cannot be started");
        server.StandardInput.Close();
        Task<bool> complained = PassOnAsync(server.StandardError, error);
        bool ready = await PassOnAsync(server.StandardOutput, output).ConfigureAwait(false);
        if (await complained.ConfigureAwait(false) && ready)
            return 0;
        await server.WaitForExitAsync().ConfigureAwait(false);
        // One that was killed has said nothing.
        if (server.ExitCode > 128)
            await error.WriteLineAsync($"kvasir nbd: the server was ended by signal {server.ExitCode - 128} before it listened").ConfigureAwait(false);
        return 1;
    }

    /// <summary>In the server, first of all: no terminal's signals reach it from here on.</summary>
    public static void Enter()
    {
        if (!s_isOne)
            return;
        Environment.SetEnvironmentVariable(Mark, null);
        ProcessIdentity.NewSession();
    }

    /// <summary>In the server, once it listens: lets the process that waits for it end.</summary>
    public static async Task ReadyAsync(TextWriter output, TextWriter error)
    {
        if (!s_isOne)
            return;
        s_isOne = false;
        foreach (TextWriter writer in (TextWriter[])[output, error])
        {
            await writer.WriteLineAsync(Ready).ConfigureAwait(false);
            await writer.FlushAsync().ConfigureAwait(false);
        }
        Directory.SetCurrentDirectory("/");
        ProcessIdentity.DetachStreams();
    }

    /// <summary>Passes lines on until the server says that it listens (true), or ends. Its streams may stay open: the runtime keeps copies of them.</summary>
    private static async Task<bool> PassOnAsync(StreamReader from, TextWriter to)
    {
        while (await from.ReadLineAsync().ConfigureAwait(false) is string line)
        {
            if (line == Ready)
                return true;
            await to.WriteLineAsync(line).ConfigureAwait(false);
        }
        return false;
    }
}
