using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Linq;
using Kvasir.Cli.Guests;
using Kvasir.Cli.Options;
using Kvasir.Linux;
using Kvasir.Machine;

namespace Kvasir.Cli;

/// <summary><c>kvasir doctor</c>: looks at the host and says what works, what is missing, and the exact fix.</summary>
internal sealed class DoctorCommand(TextWriter output)
{
    private enum Finding
    {
        Good,

        /// <summary>Worth knowing; VMs run without it.</summary>
        Note,

        /// <summary>VMs do not run.</summary>
        Bad,
    }

    private int _bad;

    /// <returns>The exit code: <see cref="ExitCode.HostTrouble"/> where VMs cannot run.</returns>
    public int Execute()
    {
        Processor();
        Kvm();
        Memory();
        RunFolder();
        Guest();
        output.WriteLine(_bad == 0 ? "VMs can run here." : $"{_bad} problem(s) keep VMs from running.");
        return (int)(_bad == 0 ? ExitCode.Success : ExitCode.HostTrouble);
    }

    private void Processor()
    {
        Dictionary<string, string> facts = Table("/proc/cpuinfo");
        string model = facts.GetValueOrDefault("model name", "unknown processor");
        Report(Finding.Good, "processor", $"{model}, {Environment.ProcessorCount} usable");
        string[] flags = facts.GetValueOrDefault("flags", "").Split(' ');
        string[] wanted = ["avx", "avx2", "avx512f", "aes", "sha_ni", "bmi2", "fsgsbase"];
        string present = string.Join(' ', wanted.Where(flags.Contains));
        string absent = string.Join(' ', wanted.Where(flag => !flags.Contains(flag)));
        Report(Finding.Good, "software CPU", "ready; guests get this processor's vector and floating-point instructions");
        Report(Finding.Note, "extensions", absent.Length == 0 ? present : $"{present}; not there: {absent}");
    }

    private void Kvm()
    {
        KvmDiagnosis diagnosis = KvmDiagnosis.Run();
        Report(diagnosis.Usable ? Finding.Good : Finding.Note, "/dev/kvm", diagnosis.State, diagnosis.Fix);
        foreach (string detail in diagnosis.Details)
            Report(Finding.Note, "", detail);
        Report(Finding.Good, "--accel auto", diagnosis.Choice);
    }

    private void Memory()
    {
        string text = Table("/proc/meminfo").GetValueOrDefault("MemAvailable", "");
        if (!ulong.TryParse(text.Split(' ')[0], NumberStyles.None, CultureInfo.InvariantCulture, out ulong kibibytes))
        {
            Report(Finding.Note, "memory", "/proc/meminfo does not say how much is available");
            return;
        }
        ulong mebibytes = kibibytes >> 10;
        string needed = MemorySize.Format(VmConfiguration.DefaultMemory);
        if (mebibytes << 20 < VmConfiguration.DefaultMemory)
            Report(Finding.Note, "memory", $"{mebibytes}M available, less than a VM's default {needed}", "kvasir run --memory 128M, or end other programs");
        else
            Report(Finding.Good, "memory", $"{mebibytes}M available; a VM takes {needed} unless told otherwise, and only what it touches");
    }

    private void RunFolder()
    {
        try
        {
            UserFolders.MakePrivate(UserFolders.Runtime);
            Report(Finding.Good, "run folder", UserFolders.Runtime);
        }
        catch (CommandException e)
        {
            Report(Finding.Bad, "run folder", e.Message, "export XDG_RUNTIME_DIR to a folder of your own");
        }
    }

    private void Guest()
    {
        if (DefaultGuest.IsBuilt(Userland.Amd64))
        {
            Report(Finding.Good, "default guest", "built");
            return;
        }
        if (!AptArchive.IsAvailable)
        {
            Report(
                Finding.Note, "default guest", "cannot be built: apt-get and dpkg-deb are not there",
                "on Debian and its relatives: install the packages apt and dpkg; elsewhere: kvasir run --kernel FILE --initrd FILE");
            return;
        }
        try
        {
            Directory.CreateDirectory(UserFolders.Cache);
            long free = new DriveInfo(UserFolders.Cache).AvailableFreeSpace;
            if (free < DefaultGuest.RoomToBuild)
                Report(Finding.Note, "default guest", $"no room to build it in {UserFolders.Cache}", "free 60 MB there, or set XDG_CACHE_HOME");
            else
                Report(Finding.Good, "default guest", "will be built by the first kvasir run, from packages (30 MB, needs the network)");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            Report(Finding.Note, "default guest", $"cannot be built: {e.Message}", "set XDG_CACHE_HOME to a folder that can be written");
        }
    }

    private void Report(Finding finding, string what, string state, string? fix = null)
    {
        string mark = finding switch
        {
            Finding.Good => "ok  ",
            Finding.Note => "note",
            _ => "BAD ",
        };
        if (finding == Finding.Bad)
            _bad++;
        output.WriteLine($"{mark}  {what,-13}  {state}");
        if (fix is not null)
            output.WriteLine($"      {"",-13}  fix: {fix}");
    }

    /// <summary>The first value of each name in a file of "name : value" lines.</summary>
    private static Dictionary<string, string> Table(string path)
    {
        Dictionary<string, string> table = new(StringComparer.Ordinal);
        try
        {
            foreach (string line in File.ReadLines(path))
            {
                int colon = line.IndexOf(':', StringComparison.Ordinal);
                if (colon > 0)
                    table.TryAdd(line[..colon].Trim(), line[(colon + 1)..].Trim());
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // Without /proc the lines that come from it say that they do not know.
        }
        return table;
    }
}
