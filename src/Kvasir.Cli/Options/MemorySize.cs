using System;
using System.Globalization;

namespace Kvasir.Cli.Options;

/// <summary>Sizes as people write them: a number, then K, M, G or T (powers of 1024; "MiB" and "MB" mean the same). A bare number counts MiB.</summary>
internal static class MemorySize
{
    public static bool TryParse(string text, out ulong bytes)
    {
        bytes = 0;
        string trimmed = text.Trim();
        int digits = 0;
        while (digits < trimmed.Length && (char.IsAsciiDigit(trimmed[digits]) || trimmed[digits] == '.'))
            digits++;
        int? shift = trimmed[digits..].ToUpperInvariant() switch
        {
            "" or "M" or "MB" or "MIB" => 20,
            "B" => 0,
            "K" or "KB" or "KIB" => 10,
            "G" or "GB" or "GIB" => 30,
            "T" or "TB" or "TIB" => 40,
            _ => null,
        };
        if (shift is null || !decimal.TryParse(trimmed[..digits], NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture, out decimal number))
            return false;
        decimal unit = 1ul << shift.Value;
        if (number > ulong.MaxValue / unit)
            return false;
        decimal exact = number * unit;
        bytes = (ulong)exact;
        return bytes == exact;
    }

    /// <summary>The size in the largest unit that shows it without a fraction.</summary>
    public static string Format(ulong bytes)
    {
        (ulong Unit, string Name)[] units = [(1ul << 40, "T"), (1ul << 30, "G"), (1ul << 20, "M"), (1ul << 10, "K")];
        foreach ((ulong unit, string name) in units)
        {
            if (bytes >= unit && bytes % unit == 0)
                return $"{bytes / unit}{name}";
        }
        return $"{bytes}B";
    }
}
