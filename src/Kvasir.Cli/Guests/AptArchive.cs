using System;
using System.Collections.Generic;
using System.ComponentModel;
using System.Diagnostics;
using System.IO;
using System.Linq;
using Kvasir.Linux;

namespace Kvasir.Cli.Guests;

/// <summary>
/// The distribution's package archive, through apt: packages are fetched and checked against the archive's signatures, never installed.
/// The system's package lists serve where they are there; else root refreshes them, and an ordinary user, or a foreign
/// architecture, gets lists of its own in the cache.
/// </summary>
/// <param name="architecture">The packages' architecture, as Debian names it: amd64, i386.</param>
/// <param name="privateFolder">Where private lists are kept.</param>
/// <param name="report">Told what takes time.</param>
internal sealed class AptArchive(string architecture, string privateFolder, Action<string> report)
{
    private const string HostArchitecture = "amd64";

    private readonly record struct Source(bool IsPrivate, bool Refresh);

    private string _lastError = "";
    private Queue<Source>? _sources;
    private Source _current;

    /// <summary>Whether this host has the distribution's tools at all.</summary>
    public static bool IsAvailable => FindProgram("apt-get") is not null && FindProgram("apt-cache") is not null && FindProgram("dpkg-deb") is not null;

    /// <summary>The first package of a list of names that the archive has, or what it stands for where it is a metapackage.</summary>
    /// <param name="names">In order of preference.</param>
    /// <param name="prefix">A metapackage is followed to its dependency whose name begins so.</param>
    /// <exception cref="CommandException">None is there.</exception>
    public string Resolve(IReadOnlyList<string> names, string prefix) => Attempt($"find {names[0]}", options =>
    {
        foreach (string name in names)
        {
            string? found = Follow(name, prefix, options);
            if (found is not null)
                return found;
        }
        return null;
    });

    /// <summary>Fetches a package into an empty folder made for it.</summary>
    /// <returns>The package file's path.</returns>
    /// <exception cref="CommandException">The archive cannot be reached or lacks it, or the disk is full.</exception>
    public string Download(string package, string folder) => Attempt($"fetch the package {package}", options =>
    {
        Directory.CreateDirectory(folder);
        string name = architecture == HostArchitecture ? package : $"{package}:{architecture}";
        bool fetched = Run("apt-get", [.. options, "-q", "download", name], folder, out _);
        string? file = Directory.EnumerateFiles(folder, "*.deb").FirstOrDefault();
        return fetched ? file : null;
    });

    private string? Follow(string name, string prefix, string[] options)
    {
        string qualified = architecture == HostArchitecture ? name : $"{name}:{architecture}";
        if (!Run("apt-cache", [.. options, "show", "--no-all-versions", qualified], null, out string record) || record.Length == 0)
            return null;
        string? depends = record.Split('\n').FirstOrDefault(line => line.StartsWith("Depends:", StringComparison.Ordinal));
        if (depends is null)
            return name;
        foreach (string dependency in depends["Depends:".Length..].Split([',', '|'], StringSplitOptions.TrimEntries))
        {
            string target = dependency.Split([' ', '(', ':'], 2)[0];
            if (target.StartsWith(prefix, StringComparison.Ordinal) && target != name)
                return target;
        }
        return name;
    }

    /// <summary>Tries an operation with the lists in use, then with each fresher source of lists.</summary>
    private string Attempt(string what, Func<string[], string?> operation)
    {
        if (_sources is null)
        {
            _sources = new Queue<Source>(Sources());
            Advance();
        }
        while (true)
        {
            string? result = operation(Options(_current));
            if (result is not null)
                return result;
            if (_sources.Count == 0)
            {
                string reason = _lastError.Length == 0 ? "the package lists do not have it" : _lastError;
                throw new CommandException(
                    ExitCode.HostTrouble,
                    $"cannot {what}: {reason} (is the network up, and does /etc/apt name an archive? or pass --kernel FILE and --initrd FILE)");
            }
            Advance();
        }
    }

    private IEnumerable<Source> Sources()
    {
        if (architecture == HostArchitecture)
        {
            yield return new Source(IsPrivate: false, Refresh: false);
            if (ProcessIdentity.IsRoot)
                yield return new Source(IsPrivate: false, Refresh: true);
        }
        yield return new Source(IsPrivate: true, Refresh: !Directory.Exists(Path.Combine(privateFolder, "lists")));
        yield return new Source(IsPrivate: true, Refresh: true);
    }

    private void Advance()
    {
        _current = _sources!.Dequeue();
        if (!_current.Refresh)
            return;
        report("refreshing package lists");
        string[] options = Options(_current);
        if (_current.IsPrivate)
        {
            Directory.CreateDirectory(Path.Combine(privateFolder, "lists", "partial"));
            Directory.CreateDirectory(Path.Combine(privateFolder, "archives", "partial"));
            File.WriteAllText(Path.Combine(privateFolder, "status"), "");
        }
        // One archive of several may be out of reach, and apt calls that a failure: whether the package is to be had shows after.
        Run("apt-get", [.. options, "-q", "update"], null, out _);
    }

    private string[] Options(Source source) => !source.IsPrivate
        ? ["-o", "APT::Sandbox::User=root"]
        : [
            "-o", "APT::Sandbox::User=root",
            "-o", $"Dir::State={privateFolder}",
            "-o", $"Dir::State::Lists={privateFolder}/lists",
            "-o", $"Dir::State::status={privateFolder}/status",
            "-o", $"Dir::Cache={privateFolder}",
            "-o", "Dir::Cache::pkgcache=",
            "-o", "Dir::Cache::srcpkgcache=",
            "-o", $"APT::Architecture={architecture}",
            "-o", $"APT::Architectures={architecture}",
            "-o", "APT::Update::Post-Invoke-Success=",
            "-o", "APT::Update::Post-Invoke=",
        ];

    private bool Run(string program, string[] arguments, string? folder, out string output)
    {
        ProcessStartInfo start = new(program, arguments)
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            WorkingDirectory = folder ?? "/",
        };
        start.Environment["LC_ALL"] = "C";
        start.Environment["DEBIAN_FRONTEND"] = "noninteractive";
        try
        {
            using Process process = Process.Start(start)!;
            process.StandardInput.Close();
            System.Threading.Tasks.Task<string> errors = process.StandardError.ReadToEndAsync();
            output = process.StandardOutput.ReadToEnd();
            string error = errors.GetAwaiter().GetResult();
            process.WaitForExit();
            if (process.ExitCode == 0)
                return true;
            string? first = error.Split('\n').FirstOrDefault(line => line.StartsWith("E: ", StringComparison.Ordinal));
            if (first is not null)
                _lastError = first["E: ".Length..].Trim();
            return false;
        }
        catch (Win32Exception e)
        {
            throw new CommandException(ExitCode.HostTrouble, $"cannot run {program}: {e.Message}", e);
        }
    }

    private static string? FindProgram(string name) =>
        (Environment.GetEnvironmentVariable("PATH") ?? "/usr/bin:/bin").Split(':')
            .Select(folder => Path.Combine(folder, name)).FirstOrDefault(File.Exists);
}
