using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using Kvasir.Devices.Virtio;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary><c>--share DIR[,tag=T][,readonly]</c>.</summary>
internal static class ShareOption
{
    /// <summary>Reads all that were given.</summary>
    /// <exception cref="CommandException">A folder is not there, a key not known, or a tag given twice.</exception>
    public static IReadOnlyList<ShareConfiguration> Parse(IReadOnlyList<string> texts)
    {
        List<ShareConfiguration> shares = [];
        foreach (string text in texts)
        {
            ShareConfiguration share = Parse(text, shares.Count);
            if (shares.Any(other => other.Tag == share.Tag))
                throw Bad($"the tag '{share.Tag}' is given twice");
            shares.Add(share);
        }
        return shares;
    }

    private static ShareConfiguration Parse(string text, int number)
    {
        string[] parts = text.Split(',');
        if (!Directory.Exists(parts[0]))
            throw Bad($"'{parts[0]}' is no folder");
        ShareConfiguration share = new(Path.GetFullPath(parts[0]), number == 0 ? "share" : $"share{number}", false);
        foreach (string part in parts.Skip(1))
        {
            share = part.Split('=', 2) switch
            {
                ["tag", { Length: > 0 } tag] when Encoding.UTF8.GetByteCount(tag) <= VirtioFs.LongestTag && tag.All(c => c > ' ') => share with { Tag = tag },
                ["tag", ..] => throw Bad($"a tag has 1 to {VirtioFs.LongestTag} characters and no spaces"),
                ["readonly"] or ["readonly", "on"] => share with { ReadOnly = true },
                ["readonly", "off"] => share,
                _ => throw Bad($"'{part}' is not known; there are tag=T and readonly"),
            };
        }
        return share;
    }

    private static CommandException Bad(string message) => new(ExitCode.Usage, $"--share: {message}");
}
