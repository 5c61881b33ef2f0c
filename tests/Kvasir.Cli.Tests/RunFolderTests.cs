using System;
using System.Globalization;
using System.IO;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Cli.Tests;

/// <summary>These change the environment of the process: one at a time, and beside no other that reads it.</summary>
[Collection(nameof(RunFolderTests))]
[CollectionDefinition(nameof(RunFolderTests), DisableParallelization = true)]
public sealed class RunFolderTests : IDisposable
{
    private readonly string? _before = Environment.GetEnvironmentVariable("XDG_RUNTIME_DIR");
    private readonly string _runtime = Path.Combine(Path.GetTempPath(), $"kvasir-test-{Guid.NewGuid():N}");

    public RunFolderTests()
    {
        Directory.CreateDirectory(_runtime, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        Environment.SetEnvironmentVariable("XDG_RUNTIME_DIR", _runtime);
    }

    public void Dispose()
    {
        Environment.SetEnvironmentVariable("XDG_RUNTIME_DIR", _before);
        Directory.Delete(_runtime, recursive: true);
    }

    [Fact]
    public void ANameIsHeldByOneVmUntilItEnds()
    {
        string path = Path.Combine(_runtime, "kvasir", "web");
        using (RunFolder first = RunFolder.Take("web"))
        {
            Assert.Equal(path, first.Path);
            Assert.Equal($"{Environment.ProcessId}\n", File.ReadAllText(Path.Combine(path, "pid")));
            Assert.Equal(UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute, File.GetUnixFileMode(path));
            CommandException fault = Assert.Throws<CommandException>(() => RunFolder.Take("web"));
            Assert.Equal(ExitCode.HostTrouble, fault.ExitCode);
            Assert.Contains(Environment.ProcessId.ToString(CultureInfo.InvariantCulture), fault.Message, StringComparison.Ordinal);
            using RunFolder other = RunFolder.Take("db");
        }
        Assert.False(Directory.Exists(path));
        using RunFolder again = RunFolder.Take("web");
    }

    [Fact]
    public void WhatAKilledVmLeftIsTakenOver()
    {
        string path = Path.Combine(_runtime, "kvasir", "web");
        Directory.CreateDirectory(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
        File.WriteAllText(Path.Combine(path, "pid"), "1\n");
        File.WriteAllText(Path.Combine(path, "lock"), "");
        using RunFolder taken = RunFolder.Take("web");
        Assert.Equal($"{Environment.ProcessId}\n", File.ReadAllText(Path.Combine(path, "pid")));
    }

    [Fact]
    public void AFolderThatOthersMayWriteIsRefused()
    {
        string path = Path.Combine(_runtime, "kvasir");
        Directory.CreateDirectory(path);
        File.SetUnixFileMode(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute | UnixFileMode.OtherWrite);
        CommandException fault = Assert.Throws<CommandException>(() => RunFolder.Take("web"));
        Assert.Contains(path, fault.Message, StringComparison.Ordinal);
    }

    [Fact]
    public async Task OfManyWhoWantOneNameExactlyOneHoldsItAtATime()
    {
        int holding = 0;
        int most = 0;
        int taken = 0;
        object gate = new();
        Task[] tasks = new Task[4];
        for (int i = 0; i < tasks.Length; i++)
        {
            tasks[i] = Task.Run(() =>
            {
                for (int n = 0; n < 50; n++)
                {
                    try
                    {
                        RunFolder folder = RunFolder.Take("race");
                        lock (gate)
                        {
                            holding++;
                            taken++;
                            most = Math.Max(most, holding);
                        }
                        lock (gate)
                            holding--;
                        folder.Dispose();
                    }
                    catch (CommandException)
                    {
                        // Another one holds it.
                    }
                }
            }, TestContext.Current.CancellationToken);
        }
        await Task.WhenAll(tasks).WaitAsync(TimeSpan.FromSeconds(120), TestContext.Current.CancellationToken);
        Assert.Equal(1, most);
        Assert.True(taken > 0);
    }
}
