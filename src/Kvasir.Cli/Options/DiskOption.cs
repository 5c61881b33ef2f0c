using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using System.Text;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Devices.Storage;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary><c>--disk PATH[,key=value...]</c>. A comma in the path is doubled.</summary>
internal static class DiskOption
{
    private const int LongestSerial = 20;

    private static readonly string[] Keys =
    [
        "format", "bus", "readonly", "snapshot", "cache", "discard", "serial", "queues", "werror", "rerror",
        "bps", "bps-rd", "bps-wr", "iops", "iops-rd", "iops-wr", "logical-block", "physical-block",
    ];

    /// <exception cref="CommandException">A key is not known, or a value is bad.</exception>
    public static DiskConfiguration Parse(string text, int number)
    {
        List<string> parts = Split(text);
        if (parts[0].Length == 0)
            throw Bad("the path is missing; write --disk PATH[,key=value]");
        DiskConfiguration disk = new() { Path = parts[0], Name = string.Create(CultureInfo.InvariantCulture, $"disk{number}") };
        ThrottleLimits limits = new();
        HashSet<string> seen = new(StringComparer.Ordinal);
        foreach (string part in parts.Skip(1))
        {
            int equals = part.IndexOf('=', StringComparison.Ordinal);
            string key = equals < 0 ? part : part[..equals];
            string value = equals < 0 ? "" : part[(equals + 1)..];
            if (!Keys.Contains(key))
                throw Bad($"'{key}' is not known; there are {string.Join(", ", Keys)}");
            if (!seen.Add(key))
                throw Bad($"{key} is given twice");
            (disk, limits) = Apply(disk, limits, key, value);
        }
        return limits == new ThrottleLimits() ? disk : disk with { Limits = limits };
    }

    private static (DiskConfiguration Disk, ThrottleLimits Limits) Apply(DiskConfiguration disk, ThrottleLimits limits, string key, string value) => key switch
    {
        "format" => (disk with { Format = value.Length > 0 ? value : throw BadValue(key, value) }, limits),
        "bus" => (disk with { Bus = Choice(key, value, ("virtio", DiskBus.Virtio)) }, limits),
        "readonly" => (disk with { ReadOnly = Flag(key, value) }, limits),
        "snapshot" => (disk with { Snapshot = Flag(key, value) }, limits),
        "cache" => (disk with
        {
            Cache = Choice(
                key,
                value,
                ("writeback", CacheMode.Writeback),
                ("none", CacheMode.None),
                ("writethrough", CacheMode.Writethrough),
                ("directsync", CacheMode.DirectSync),
                ("unsafe", CacheMode.Unsafe)),
        }, limits),
        "discard" => (disk with { Discard = Choice(key, value, ("unmap", true), ("on", true), ("ignore", false), ("off", false)) }, limits),
        "serial" => (disk with { Serial = IsSerial(value) ? value : throw Bad($"serial: '{value}' is not 1 to {LongestSerial} printable characters") }, limits),
        "queues" => (disk with { Queues = int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int queues) && queues is >= 1 and <= 64 ? queues : throw BadValue(key, value) }, limits),
        "werror" => (disk with { WriteError = Policy(key, value) }, limits),
        "rerror" => (disk with { ReadError = Policy(key, value) }, limits),
        "logical-block" => (disk with { LogicalBlock = BlockSize(key, value) }, limits),
        "physical-block" => (disk with { PhysicalBlock = BlockSize(key, value) }, limits),
        "bps" => (disk, limits with { BytesPerSecond = Rate(key, value) }),
        "bps-rd" => (disk, limits with { ReadBytesPerSecond = Rate(key, value) }),
        "bps-wr" => (disk, limits with { WriteBytesPerSecond = Rate(key, value) }),
        "iops" => (disk, limits with { RequestsPerSecond = Rate(key, value) }),
        "iops-rd" => (disk, limits with { ReadRequestsPerSecond = Rate(key, value) }),
        _ => (disk, limits with { WriteRequestsPerSecond = Rate(key, value) }),
    };

    private static bool IsSerial(string value) => value.Length is > 0 and <= LongestSerial && value.All(c => c is > ' ' and < '\x7f');

    private static bool Flag(string key, string value) => value switch
    {
        "" or "on" => true,
        "off" => false,
        _ => throw Bad($"{key}: '{value}' is neither on nor off"),
    };

    private static T Choice<T>(string key, string value, params (string Name, T Value)[] choices)
    {
        foreach ((string name, T choice) in choices)
        {
            if (name == value)
                return choice;
        }
        throw Bad($"{key}: '{value}' is none of {string.Join(", ", choices.Select(choice => choice.Name))}");
    }

    private static ErrorPolicy Policy(string key, string value) => Choice(
        key,
        value,
        ("report", ErrorPolicy.Report),
        ("ignore", ErrorPolicy.Ignore),
        ("stop", ErrorPolicy.Stop),
        ("enospc", ErrorPolicy.StopOnNoSpace));

    private static int BlockSize(string key, string value) =>
        int.TryParse(value, NumberStyles.None, CultureInfo.InvariantCulture, out int size) && size is >= 512 and <= 65536 && (size & (size - 1)) == 0
            ? size
            : throw BadValue(key, value);

    /// <summary>Bytes or requests a second, with K, M or G.</summary>
    private static double Rate(string key, string value)
    {
        try
        {
            long rate = ImageOptions.ParseSize(value, key);
            return rate > 0 ? rate : throw BadValue(key, value);
        }
        catch (BlockException)
        {
            throw BadValue(key, value);
        }
    }

    private static List<string> Split(string text)
    {
        List<string> parts = [];
        StringBuilder part = new();
        for (int i = 0; i < text.Length; i++)
        {
            if (text[i] != ',')
            {
                part.Append(text[i]);
            }
            else if (i + 1 < text.Length && text[i + 1] == ',')
            {
                part.Append(',');
                i++;
            }
            else
            {
                parts.Add(part.ToString());
                part.Clear();
            }
        }
        parts.Add(part.ToString());
        return parts;
    }

    private static CommandException BadValue(string key, string value) => Bad($"'{value}' is no value for {key}");

    private static CommandException Bad(string message) => new(ExitCode.Usage, $"--disk: {message}");
}
