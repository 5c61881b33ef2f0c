using System;
using System.Collections.Generic;

namespace Kvasir.Img;

/// <summary>The command line is wrong; the text says how. Where the words are right and only their values are not, a <see cref="Block.BlockException"/> is thrown instead.</summary>
public sealed class UsageException : Exception
{
    public UsageException()
    {
    }

    public UsageException(string message)
        : base(message)
    {
    }

    public UsageException(string message, Exception inner)
        : base(message, inner)
    {
    }
}

/// <summary>
/// Options as getopt_long(3) reads them: "-fqcow2", "-f qcow2", "-pq", "--output=json", "--output json", long names cut short, options
/// after operands, "--" ends them.
/// </summary>
internal sealed class CommandLine
{
    private readonly List<(string Name, string? Value)> _options = [];

    /// <param name="args">The words after the command.</param>
    /// <param name="shorts">Letters as for getopt: a colon follows those that take a value.</param>
    /// <param name="longs">Long names; "=" follows those that take a value.</param>
    public CommandLine(ReadOnlySpan<string> args, string shorts, params string[] longs)
    {
        List<string> operands = [];
        for (int i = 0; i < args.Length; i++)
        {
            string word = args[i];
            if (word == "--")
            {
                operands.AddRange(args[(i + 1)..]);
                break;
            }
            if (word.StartsWith("--", StringComparison.Ordinal))
            {
                string name = word[2..];
                string? value = null;
                int equals = name.IndexOf('=', StringComparison.Ordinal);
                if (equals >= 0)
                    (name, value) = (name[..equals], name[(equals + 1)..]);
                string spec = Match(longs, name);
                bool takes = spec.EndsWith('=');
                if (takes && value is null)
                    value = ++i < args.Length ? args[i] : throw new UsageException($"option '--{name}' requires an argument");
                if (!takes && value is not null)
                    throw new UsageException($"option '--{name}' doesn't allow an argument");
                _options.Add((spec.TrimEnd('='), value));
            }
            else if (word.Length > 1 && word[0] == '-')
            {
                for (int at = 1; at < word.Length; at++)
                {
                    int letter = word[at] == ':' ? -1 : shorts.IndexOf(word[at], StringComparison.Ordinal);
                    if (letter < 0)
                        throw new UsageException($"unrecognized option '-{word[at]}'");
                    if (letter + 1 >= shorts.Length || shorts[letter + 1] != ':')
                    {
                        _options.Add((word[at].ToString(), null));
                        continue;
                    }
                    string value = at + 1 < word.Length ? word[(at + 1)..] : ++i < args.Length ? args[i] : throw new UsageException($"missing argument for option '-{word[at]}'");
                    _options.Add((word[at].ToString(), value));
                    break;
                }
            }
            else
            {
                operands.Add(word);
            }
        }
        Operands = operands;
    }

    public IReadOnlyList<string> Operands { get; }

    public IReadOnlyList<(string Name, string? Value)> Options => _options;

    public bool Has(string name) => _options.Exists(o => o.Name == name);

    /// <summary>The last value given for an option.</summary>
    public string? Value(string name) => _options.FindLast(o => o.Name == name).Value;

    public IEnumerable<string> Values(string name)
    {
        foreach ((string option, string? value) in _options)
        {
            if (option == name && value is not null)
                yield return value;
        }
    }

    private static string Match(string[] longs, string name)
    {
        string? found = null;
        foreach (string candidate in longs)
        {
            string plain = candidate.TrimEnd('=');
            if (plain == name)
                return candidate;
            if (plain.StartsWith(name, StringComparison.Ordinal))
                found = found is null ? candidate : throw new UsageException($"option '--{name}' is ambiguous");
        }
        return found ?? throw new UsageException($"unrecognized option '--{name}'");
    }
}
