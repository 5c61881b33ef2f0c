using System;
using System.Collections.Generic;
using System.Globalization;
using System.Linq;
using Kvasir.Machine;

namespace Kvasir.Cli.Options;

/// <summary><c>--device NAME[,key=value...]</c>: which devices there are to add, and what each can be told.</summary>
internal static class DeviceOption
{
    private delegate bool Check(string value);

    private static readonly Dictionary<string, Dictionary<string, Check>> Known = new(StringComparer.Ordinal)
    {
        ["isa-debug-exit"] = new(StringComparer.Ordinal) { ["iobase"] = IsPort, ["iosize"] = value => value is "1" or "2" or "4" or "0x1" or "0x2" or "0x4" or "0x01" or "0x02" or "0x04" },
        ["debugcon"] = new(StringComparer.Ordinal) { ["iobase"] = IsPort, ["file"] = IsText },
        ["virtio-rng"] = new(StringComparer.Ordinal),
        ["virtio-balloon"] = new(StringComparer.Ordinal),
        ["virtio-scsi"] = new(StringComparer.Ordinal),
        ["virtio-vsock"] = new(StringComparer.Ordinal) { ["guest-cid"] = IsCid, ["socket"] = IsText },
        ["virtio-console"] = new(StringComparer.Ordinal) { ["file"] = IsText, ["unix"] = IsText },
        ["virtio-port"] = new(StringComparer.Ordinal) { ["name"] = IsPortName, ["file"] = IsText, ["unix"] = IsText },
        ["pc-testdev"] = new(StringComparer.Ordinal),
    };

    /// <exception cref="CommandException">The device or a setting is not known, or a value is bad.</exception>
    public static DeviceSetting Parse(string text)
    {
        string[] parts = text.Split(',');
        if (!Known.TryGetValue(parts[0], out Dictionary<string, Check>? settings))
            throw Bad($"'{parts[0]}' is not known; there are {string.Join(", ", Known.Keys)}");
        Dictionary<string, string> values = new(StringComparer.Ordinal);
        foreach (string part in parts.Skip(1))
        {
            int equals = part.IndexOf('=', StringComparison.Ordinal);
            string key = equals < 0 ? part : part[..equals];
            if (!settings.TryGetValue(key, out Check? check))
                throw Bad(settings.Count == 0 ? $"{parts[0]} takes no settings, not '{key}'" : $"{parts[0]} has no setting '{key}'; it has {string.Join(", ", settings.Keys)}");
            string value = equals < 0 ? "" : part[(equals + 1)..];
            if (!check(value))
                throw Bad($"{parts[0]}: '{value}' is no value for {key}");
            if (!values.TryAdd(key, value))
                throw Bad($"{parts[0]}: {key} is given twice");
        }
        if (parts[0] is "virtio-console" or "virtio-port" && values.ContainsKey("file") == values.ContainsKey("unix"))
            throw Bad($"{parts[0]} needs its other side: file=PATH or unix=PATH");
        if (parts[0] == "virtio-port" && !values.ContainsKey("name"))
            throw Bad("virtio-port needs name=NAME");
        return new DeviceSetting(parts[0], values);
    }

    /// <summary>Reads a number, decimal or with 0x.</summary>
    public static bool TryParseNumber(string text, out uint number) => text.StartsWith("0x", StringComparison.OrdinalIgnoreCase)
        ? uint.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out number)
        : uint.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out number);

    private static bool IsText(string value) => value.Length > 0;

    private static bool IsPortName(string value) => value.Length is > 0 and <= 64 && value.All(c => c is > ' ' and < '\x7f');

    private static bool IsCid(string value) => TryParseNumber(value, out uint cid) && cid is >= 3 and < uint.MaxValue;

    private static bool IsPort(string value) => TryParseNumber(value, out uint port) && port <= ushort.MaxValue;

    private static CommandException Bad(string message) => new(ExitCode.Usage, $"--device: {message}");
}
