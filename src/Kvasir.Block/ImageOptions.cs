using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using System.Text.Json;

namespace Kvasir.Block;

/// <summary>
/// Options of a block graph in the dotted form that QEMU's command lines use: "driver=qcow2,file.filename=x". Keys keep the order in
/// which they came; a later value replaces an earlier one.
/// </summary>
public sealed class ImageOptions
{
    private const int DeepestNesting = 64;

    private readonly Dictionary<string, string> _values = new(StringComparer.Ordinal);

    public IReadOnlyDictionary<string, string> Values => _values;

    public string? this[string key]
    {
        get => _values.TryGetValue(key, out string? value) ? value : null;
        set
        {
            if (value is null)
                _values.Remove(key);
            else
                _values[key] = value;
        }
    }

    /// <summary>Parses "key=value,key=value"; a doubled comma stands for one, a key without value means "on".</summary>
    /// <param name="text">The list.</param>
    /// <param name="implied">The key of a first value that comes without one; null: none may.</param>
    public static ImageOptions ParseList(string text, string? implied = null)
    {
        ImageOptions options = new();
        bool first = true;
        foreach (string item in SplitList(text))
        {
            int equals = item.IndexOf('=', StringComparison.Ordinal);
            if (equals > 0)
                options[item[..equals]] = item[(equals + 1)..];
            else if (first && implied is not null)
                options[implied] = item;
            else if (item.StartsWith("no", StringComparison.Ordinal) && item.Length > 2)
                options[item[2..]] = "off";
            else if (item.Length > 0)
                options[item] = "on";
            first = false;
        }
        return options;
    }

    /// <summary>Parses a "json:{...}" name's object, nested objects and arrays as dotted keys.</summary>
    public static ImageOptions ParseJson(string json)
    {
        ImageOptions options = new();
        try
        {
            using JsonDocument document = JsonDocument.Parse(json, new JsonDocumentOptions { MaxDepth = DeepestNesting });
            if (document.RootElement.ValueKind != JsonValueKind.Object)
                throw new BlockException("Could not parse the JSON options: not an object");
            options.Flatten(string.Empty, document.RootElement);
        }
        catch (JsonException error)
        {
            throw new BlockException("Could not parse the JSON options: " + error.Message, error);
        }
        return options;
    }

    /// <summary>The options below a prefix, without it.</summary>
    public ImageOptions Below(string prefix)
    {
        ImageOptions options = new();
        string start = prefix + ".";
        foreach ((string key, string value) in _values)
        {
            if (key.StartsWith(start, StringComparison.Ordinal))
                options[key[start.Length..]] = value;
        }
        return options;
    }

    public bool Flag(string key, bool fallback) => this[key] is string value ? ParseFlag(key, value) : fallback;

    public long? Size(string key) => this[key] is string value ? ParseSize(value, key) : null;

    public static bool ParseFlag(string key, string value) => value switch
    {
        "on" or "yes" or "true" or "y" => true,
        "off" or "no" or "false" or "n" => false,
        _ => throw new BlockException($"Parameter '{key}' expects 'on' or 'off'"),
    };

    /// <summary>A size with QEMU's suffixes (b, k, M, G, T, P, E, powers of 1024), fractions allowed before one.</summary>
    public static long ParseSize(string text, string what)
    {
        int end = text.Length;
        int shift = 0;
        if (end > 0 && !char.IsAsciiDigit(text[end - 1]) && !text.StartsWith("0x", StringComparison.OrdinalIgnoreCase))
        {
            shift = char.ToUpperInvariant(text[--end]) switch
            {
                'B' => 0,
                'K' => 10,
                'M' => 20,
                'G' => 30,
                'T' => 40,
                'P' => 50,
                'E' => 60,
                _ => -1,
            };
        }
        string number = text[..end];
        if (shift >= 0)
        {
            if (number.StartsWith("0x", StringComparison.OrdinalIgnoreCase) && long.TryParse(number.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out long hex) && hex >= 0)
                return hex;
            if (ulong.TryParse(number, NumberStyles.None, CultureInfo.InvariantCulture, out ulong whole) && whole <= ulong.MaxValue >> shift && whole << shift <= long.MaxValue)
                return (long)(whole << shift);
            if (shift > 0 && decimal.TryParse(number, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out decimal fraction) && fraction * (1L << Math.Min(shift, 62)) < long.MaxValue)
                return (long)(fraction * (1L << shift));
        }
        throw new BlockException($"Parameter '{what}' expects a non-negative number below 2^64: '{text}' is none");
    }

    internal static List<string> SplitList(string text)
    {
        List<string> items = [];
        StringBuilder item = new();
        for (int i = 0; i < text.Length; i++)
        {
            if (text[i] != ',')
            {
                item.Append(text[i]);
            }
            else if (i + 1 < text.Length && text[i + 1] == ',')
            {
                item.Append(',');
                i++;
            }
            else
            {
                items.Add(item.ToString());
                item.Clear();
            }
        }
        items.Add(item.ToString());
        return items;
    }

    private void Flatten(string prefix, JsonElement element)
    {
        switch (element.ValueKind)
        {
            case JsonValueKind.Object:
                foreach (JsonProperty property in element.EnumerateObject())
                    Flatten(prefix.Length == 0 ? property.Name : prefix + "." + property.Name, property.Value);
                break;
            case JsonValueKind.Array:
                int index = 0;
                foreach (JsonElement item in element.EnumerateArray())
                    Flatten(prefix + "." + (index++).ToString(CultureInfo.InvariantCulture), item);
                break;
            case JsonValueKind.True:
                this[prefix] = "on";
                break;
            case JsonValueKind.False:
                this[prefix] = "off";
                break;
            case JsonValueKind.Null:
                this[prefix] = string.Empty;
                break;
            case JsonValueKind.String:
                this[prefix] = element.GetString();
                break;
            default:
                this[prefix] = element.GetRawText();
                break;
        }
    }
}
