using System;
using System.IO;
using System.Linq;

namespace Kvasir.Cli.Guests;

/// <summary>Programs of the host.</summary>
internal static class HostPrograms
{
    /// <summary>A program's path; null where the host has it not. Ordinary users' search path leaves out where administrators' programs are.</summary>
    public static string? Find(string name) =>
        $"{Environment.GetEnvironmentVariable("PATH") ?? "/usr/bin:/bin"}:/usr/sbin:/sbin".Split(':')
            .Select(folder => Path.Combine(folder, name)).FirstOrDefault(File.Exists);
}
