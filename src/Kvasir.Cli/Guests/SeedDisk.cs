using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Security.Cryptography;
using System.Text;

namespace Kvasir.Cli.Guests;

/// <summary>
/// The disk from which a cloud image takes its identity (cloud-init's NoCloud data source): label <c>cidata</c>, files <c>meta-data</c> and <c>user-data</c>.
/// A guest applies it once for each <c>instance-id</c>, which changes with its content.
/// </summary>
internal sealed record SeedDisk
{
    private const string Label = "cidata";
    private const int LargestUserData = 1 << 20;

    public required string HostName { get; init; }

    /// <summary>Lines as in authorized_keys(5).</summary>
    public IReadOnlyList<string> SshKeys { get; init; } = [];

    /// <summary>A script or a cloud-config, as the guest's software takes it.</summary>
    public byte[] UserData { get; init; } = [];

    /// <summary>Reads public keys: one file may hold several, and comments.</summary>
    /// <exception cref="CommandException">The file cannot be read or holds no key.</exception>
    public static IReadOnlyList<string> ReadKeys(string path)
    {
        string[] lines = [.. Encoding.UTF8.GetString(Read("--ssh-key", path)).Split('\n').Select(line => line.Trim()).Where(line => line.Length > 0 && line[0] != '#')];
        foreach (string line in lines)
        {
            if (line.Contains("PRIVATE KEY", StringComparison.Ordinal))
                throw new CommandException(ExitCode.Usage, $"--ssh-key: '{path}' is a private key; give its public half, '{path}.pub'");
            if (!IsKey(line))
                throw new CommandException(ExitCode.Usage, $"--ssh-key: '{path}' holds a line that is no public key");
        }
        return lines.Length > 0 ? lines : throw new CommandException(ExitCode.Usage, $"--ssh-key: '{path}' holds no public key");
    }

    /// <exception cref="CommandException">The file cannot be read, or is too large.</exception>
    public static byte[] ReadUserData(string path)
    {
        byte[] content = Read("--user-data", path);
        return content.Length <= LargestUserData ? content : throw new CommandException(ExitCode.Usage, $"--user-data: '{path}' is larger than 1 MiB");
    }

    /// <summary>Whether a text can be a machine's name (RFC 1123).</summary>
    public static bool IsHostName(string text) => text.Length is > 0 and <= 63 && text[0] != '-' && text[^1] != '-' && text.All(c => char.IsAsciiLetterOrDigit(c) || c == '-');

    /// <summary>The disk's bytes.</summary>
    public byte[] Build()
    {
        StringBuilder data = new();
        data.Append("local-hostname: ").Append(HostName).Append('\n');
        if (SshKeys.Count > 0)
        {
            data.Append("public-keys:\n");
            foreach (string key in SshKeys)
                data.Append("  - ").Append(key).Append('\n');
        }
        byte[] identity = SHA256.HashData([.. Encoding.UTF8.GetBytes(data.ToString()), 0, .. UserData]);
        byte[] metaData = Encoding.UTF8.GetBytes($"instance-id: iid-{Convert.ToHexStringLower(identity)[..16]}\n{data}");
        return IsoWriter.Write(Label, [("meta-data", metaData), ("user-data", UserData)]);
    }

    private static bool IsKey(string line)
    {
        string[] words = line.Split(' ', StringSplitOptions.RemoveEmptyEntries);
        return words.Length >= 2 && (words[0].StartsWith("ssh-", StringComparison.Ordinal) || words[0].StartsWith("ecdsa-", StringComparison.Ordinal) || words[0].StartsWith("sk-", StringComparison.Ordinal))
            && line.All(c => c >= ' ');
    }

    private static byte[] Read(string option, string path)
    {
        try
        {
            return File.ReadAllBytes(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw new CommandException(ExitCode.Usage, $"{option}: cannot read '{path}': {FileFault.Reason(e)}");
        }
    }
}
