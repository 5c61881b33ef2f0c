using System;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Threading;
using Xunit;

namespace Kvasir.Boot.Tests;

/// <summary>Runs a program of the distribution; the test is skipped where it is not installed.</summary>
internal static class ExternalTool
{
    private const int TimeoutMilliseconds = 120_000;

    /// <returns>Exit code, and standard output and error together.</returns>
    public static (int ExitCode, string Output) Run(string package, string workingDirectory, string program, params string[] arguments)
    {
        if (!IsInstalled(program))
            Assert.Skip($"'{program}' is not installed (package {package})");
        ProcessStartInfo start = new(program, arguments)
        {
            WorkingDirectory = workingDirectory,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        using Process process = Process.Start(start)!;
        string error = "";
        Thread reader = new(() => error = process.StandardError.ReadToEnd());
        reader.Start();
        string output = process.StandardOutput.ReadToEnd();
        reader.Join();
        if (!process.WaitForExit(TimeoutMilliseconds))
        {
            process.Kill(entireProcessTree: true);
            Assert.Fail($"'{program}' did not end");
        }
        return (process.ExitCode, output + error);
    }

    public static bool IsInstalled(string program) =>
        (Environment.GetEnvironmentVariable("PATH") + ":/usr/sbin:/sbin").Split(':').Any(folder => File.Exists(Path.Combine(folder, program)));
}

/// <summary>A folder that goes away with the test.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("kvasir-boot-").FullName;

    public string Write(string name, ReadOnlySpan<byte> content)
    {
        string path = System.IO.Path.Combine(Path, name);
        File.WriteAllBytes(path, content.ToArray());
        return path;
    }

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
