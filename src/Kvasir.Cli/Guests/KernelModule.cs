using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text;

namespace Kvasir.Cli.Guests;

/// <summary>What a kernel module says of itself in its <c>.modinfo</c> section: strings of the form <c>key=value</c>, each ended by a zero byte.</summary>
/// <param name="Name">As depmod(8) writes it, with underscores.</param>
internal sealed record KernelModule(string Name, string File, IReadOnlyList<string> Depends, IReadOnlyList<string> Aliases)
{
    /// <summary>Reads a module that is not compressed.</summary>
    /// <param name="file">Its file name.</param>
    public static KernelModule Read(string file, ReadOnlySpan<byte> content)
    {
        string[] depends = Values(content, "depends=").FirstOrDefault("").Split(',', StringSplitOptions.RemoveEmptyEntries);
        return new KernelModule(Path(file), file, [.. depends.Select(Path)], Values(content, "alias="));
    }

    /// <summary>The text of modules.dep: each module, and all it needs, those that are needed first at the end of the line.</summary>
    public static string Dependencies(IReadOnlyList<KernelModule> modules)
    {
        Dictionary<string, KernelModule> byName = modules.ToDictionary(module => module.Name);
        StringBuilder text = new();
        foreach (KernelModule module in modules)
        {
            List<string> needed = [];
            Collect(module, byName, needed);
            text.Append(CultureInfo.InvariantCulture, $"{module.File}:");
            foreach (string name in Enumerable.Reverse(needed))
                text.Append(CultureInfo.InvariantCulture, $" {byName[name].File}");
            text.Append('\n');
        }
        return text.ToString();
    }

    /// <summary>The text of modules.alias.</summary>
    public static string AliasTable(IEnumerable<KernelModule> modules)
    {
        StringBuilder text = new();
        foreach (KernelModule module in modules)
        {
            foreach (string alias in module.Aliases)
                text.Append(CultureInfo.InvariantCulture, $"alias {alias} {module.Name}\n");
        }
        return text.ToString();
    }

    /// <summary>Modules that are not there are built into the kernel, or the guest does without.</summary>
    private static void Collect(KernelModule module, Dictionary<string, KernelModule> byName, List<string> needed)
    {
        foreach (string name in module.Depends)
        {
            if (!byName.TryGetValue(name, out KernelModule? other) || needed.Contains(name))
                continue;
            Collect(other, byName, needed);
            needed.Add(name);
        }
    }

    private static string Path(string name) => name.Split('.')[0].Replace('-', '_');

    private static List<string> Values(ReadOnlySpan<byte> content, string key)
    {
        List<string> values = [];
        byte[] wanted = [0, .. Encoding.ASCII.GetBytes(key)];
        while (true)
        {
            int at = content.IndexOf(wanted);
            if (at < 0)
                return values;
            content = content[(at + wanted.Length)..];
            int end = content.IndexOf((byte)0);
            if (end < 0)
                return values;
            values.Add(Encoding.ASCII.GetString(content[..end]));
            // The zero byte that ends one string may be the one that the next begins after.
            content = content[end..];
        }
    }
}
