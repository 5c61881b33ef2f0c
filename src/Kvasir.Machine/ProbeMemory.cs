using System;
using System.Globalization;
using System.IO;

namespace Kvasir.Machine;

/// <summary>
/// What the look at KVM found on this boot of the host, kept in a file that can be made again: trying costs tens of milliseconds, and a host whose KVM emulates kernel code
/// does so until it is booted anew. Only that outcome is kept; everything else is cheap to find or worth trying each time.
/// </summary>
/// <param name="path">The file; its folder need not be there.</param>
public sealed class ProbeMemory(string path)
{
    private const string BootIdPath = "/proc/sys/kernel/random/boot_id";

    /// <summary>The speed of kernel code in instructions a second that was found on this boot, or null.</summary>
    public double? Recall()
    {
        try
        {
            string[] lines = File.ReadAllLines(path);
            return lines.Length >= 2 && lines[0] == BootId()
                && double.TryParse(lines[1], NumberStyles.Float, CultureInfo.InvariantCulture, out double speed) && speed > 0
                ? speed
                : null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Nothing remembered: KVM is tried.
            return null;
        }
    }

    /// <summary>Keeps a speed for this boot of the host. Where the file cannot be written, the next start tries KVM again.</summary>
    public void Keep(double instructionsPerSecond)
    {
        string temporary = $"{path}.{Environment.ProcessId}";
        try
        {
            Directory.CreateDirectory(Path.GetDirectoryName(path)!);
            File.WriteAllLines(temporary, [BootId(), instructionsPerSecond.ToString("R", CultureInfo.InvariantCulture)]);
            File.Move(temporary, path, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            if (File.Exists(temporary))
                File.Delete(temporary);
        }
    }

    private static string BootId() => File.ReadAllText(BootIdPath).Trim();
}
