using System;
using System.Diagnostics;
using System.IO;
using System.Threading;

namespace Kvasir.Guest.Tests;

/// <summary>
/// The command under test: what the environment variable KVASIR names, or else the checkout's own, which its wrapper builds when it is missing or
/// older than its sources. That happens once in a test run, outside the tests' time limits.
/// </summary>
internal static class KvasirProgram
{
    private static readonly Lazy<string> Found = new(Find, LazyThreadSafetyMode.ExecutionAndPublication);

    /// <summary>The program's path.</summary>
    public static string Path => Found.Value;

    /// <summary>Runs the command to its end without input.</summary>
    /// <returns>Exit code, standard output, standard error.</returns>
    public static (int ExitCode, string Output, string Error) Run(TimeSpan limit, params string[] arguments)
    {
        using GuestSession session = GuestSession.Start(arguments);
        session.CloseInput();
        int code = session.WaitForExit(limit);
        return (code, session.Output, session.Error);
    }

    private static string Find()
    {
        string? named = Environment.GetEnvironmentVariable("KVASIR");
        if (!string.IsNullOrEmpty(named))
            return File.Exists(named) ? System.IO.Path.GetFullPath(named) : throw new FileNotFoundException($"KVASIR names '{named}', and there is no such file");
        string root = Root();
        string wrapper = System.IO.Path.Combine(root, "kvasir");
        using Process build = Process.Start(new ProcessStartInfo(wrapper, ["--version"]) { RedirectStandardOutput = true })!;
        build.StandardOutput.ReadToEnd();
        build.WaitForExit();
        if (build.ExitCode != 0)
            throw new InvalidOperationException($"{wrapper} --version ended with code {build.ExitCode}");
        // Past the wrapper, and past its link to the newest build: a source that is edited while tests run starts no build in one of them.
        string current = System.IO.Path.Combine(root, "out", "current");
        FileSystemInfo? target = Directory.ResolveLinkTarget(current, returnFinalTarget: true);
        return target is null ? wrapper : System.IO.Path.Combine(target.FullName, "kvasir");
    }

    /// <summary>The checkout's folder: the nearest above the test program that holds the solution.</summary>
    public static string Root()
    {
        for (DirectoryInfo? folder = new(AppContext.BaseDirectory); folder is not null; folder = folder.Parent)
        {
            if (File.Exists(System.IO.Path.Combine(folder.FullName, "Kvasir.slnx")))
                return folder.FullName;
        }
        throw new DirectoryNotFoundException($"{AppContext.BaseDirectory} is in no checkout; set KVASIR to the command's path");
    }
}
