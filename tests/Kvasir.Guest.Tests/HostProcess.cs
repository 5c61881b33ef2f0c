using System;
using System.Globalization;
using System.IO;
using System.Linq;

namespace Kvasir.Guest.Tests;

/// <summary>What proc(5) says of a process that runs.</summary>
internal static class HostProcess
{
    private const int ClockTicksPerSecond = 100;

    /// <summary>Its resident memory, shared memory included, in bytes.</summary>
    public static long ResidentBytes(int id)
    {
        string line = File.ReadLines($"/proc/{id}/status").First(text => text.StartsWith("VmRSS:", StringComparison.Ordinal));
        return long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[^2], CultureInfo.InvariantCulture) * 1024;
    }

    /// <summary>Processor time, user and system, of all its threads.</summary>
    public static TimeSpan ProcessorTime(int id)
    {
        string[] fields = AfterName(File.ReadAllText($"/proc/{id}/stat"));
        // Fields 14 and 15, counted from 1; the name is the second.
        long ticks = long.Parse(fields[11], CultureInfo.InvariantCulture) + long.Parse(fields[12], CultureInfo.InvariantCulture);
        return TimeSpan.FromSeconds((double)ticks / ClockTicksPerSecond);
    }

    /// <summary>The one process that another one has started.</summary>
    public static int ChildOf(int id) =>
        int.Parse(File.ReadAllText($"/proc/{id}/task/{id}/children").Split(' ', StringSplitOptions.RemoveEmptyEntries).Single(), CultureInfo.InvariantCulture);

    public static string Name(int id) => File.ReadAllText($"/proc/{id}/comm").TrimEnd('\n');

    /// <summary>The thread of that name.</summary>
    public static int Thread(int id, string name) => int.Parse(
        Path.GetFileName(Directory.EnumerateDirectories($"/proc/{id}/task").Single(task => File.ReadAllText($"{task}/comm").TrimEnd('\n') == name)),
        CultureInfo.InvariantCulture);

    /// <summary>A thread's nice value.</summary>
    public static int Nice(int id, int thread) => int.Parse(AfterName(File.ReadAllText($"/proc/{id}/task/{thread}/stat"))[16], CultureInfo.InvariantCulture);

    /// <summary>The host's processors that a thread may use, as a list of ranges.</summary>
    public static string AllowedProcessors(int id, int thread) =>
        File.ReadLines($"/proc/{id}/task/{thread}/status").First(text => text.StartsWith("Cpus_allowed_list:", StringComparison.Ordinal)).Split('\t')[1];

    private static string[] AfterName(string stat) => stat[(stat.LastIndexOf(')') + 2)..].Split(' ');
}
