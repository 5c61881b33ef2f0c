using System;
using System.Diagnostics;
using System.IO;
using System.Linq;
using Xunit;

namespace Kvasir.Network.Tests;

/// <summary>Runs a program of the distribution; the test is skipped where it is not installed.</summary>
internal static class HostTool
{
    public static string Run(string package, string program, params string[] arguments)
    {
        if (!(Environment.GetEnvironmentVariable("PATH") + ":/usr/sbin:/sbin").Split(':').Any(folder => File.Exists(Path.Combine(folder, program))))
            Assert.Skip($"'{program}' is not installed (package {package})");
        ProcessStartInfo start = new(program, arguments) { RedirectStandardOutput = true, RedirectStandardError = true };
        using Process process = Process.Start(start)!;
        System.Threading.Tasks.Task<string> error = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, $"{program} ended with {process.ExitCode}: {error.Result}");
        return output;
    }
}
