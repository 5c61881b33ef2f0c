using System;
using System.Globalization;
using System.Text;

namespace Kvasir.Img;

/// <summary>How the commands say what they did.</summary>
public sealed partial class IoTool
{
    private static string Size(double bytes)
    {
        string[] units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        int unit = 0;
        while (unit < units.Length - 1 && bytes >= 1024)
        {
            bytes /= 1024;
            unit++;
        }
        string number = bytes.ToString("F3", CultureInfo.InvariantCulture);
        return (number.EndsWith(".000", StringComparison.Ordinal) ? number[..^4] : number) + " " + units[unit];
    }

    private void Report(string verb, TimeSpan time, long offset, long count, long total, bool machine)
    {
        double seconds = Math.Max(time.TotalSeconds, 1e-9);
        if (machine)
        {
            _out.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{total},1,{(int)time.TotalHours}:{time.Minutes:00}:{time.Seconds:00}.{time.Milliseconds / 10:00},{total / seconds:F3},{1 / seconds:F3}"));
            return;
        }
        _out.WriteLine($"{verb} {total}/{count} bytes at offset {offset}");
        _out.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{Size(total)}, 1 ops; {(time.TotalMinutes >= 1 ? $"{(int)time.TotalHours}:{time.Minutes:00}:" : string.Empty)}{time.Seconds:00}.{time.Milliseconds / 10:00} sec ({Size(total / seconds)}/sec and {1 / seconds:F4} ops/sec)"));
    }

    private void Dump(ReadOnlySpan<byte> data, long offset)
    {
        StringBuilder line = new();
        for (int at = 0; at < data.Length; at += DumpWidth)
        {
            line.Clear();
            line.Append(CultureInfo.InvariantCulture, $"{offset + at:x8}:  ");
            ReadOnlySpan<byte> row = data.Slice(at, Math.Min(DumpWidth, data.Length - at));
            foreach (byte value in row)
                line.Append(CultureInfo.InvariantCulture, $"{value:x2} ");
            line.Append(' ');
            foreach (byte value in row)
                line.Append(char.IsAsciiLetterOrDigit((char)value) ? (char)value : '.');
            _out.WriteLine(line.ToString());
        }
    }
}
