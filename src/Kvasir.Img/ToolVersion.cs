using System.Globalization;
using System.IO;

namespace Kvasir.Img;

/// <summary>What the tools say of their version, and of the program whose command line they take.</summary>
internal static class ToolVersion
{
    private const string CommandLineVersion = "7.2.0";

    /// <summary>The line for -V.</summary>
    public static string Line(string program, string like) => string.Create(
        CultureInfo.InvariantCulture, $"{program} version {typeof(ToolVersion).Assembly.GetName().Version?.ToString(3)} (command line of {like} version {CommandLineVersion})");

    /// <summary>Takes a --trace option as a build without trace events does: nothing is traced, and each event asked for is named.</summary>
    public static void Trace(string program, string? pattern, TextWriter error)
    {
        if (pattern is null or "help" or "?")
            return;
        foreach (string part in pattern.Split(','))
        {
            string name = part.StartsWith("enable=", System.StringComparison.Ordinal) ? part[7..] : part;
            if (name.Length > 0 && !name.Contains('=', System.StringComparison.Ordinal))
                error.WriteLine($"{program}: warning: trace event '{name}' does not exist");
        }
    }
}
