using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;

namespace Kvasir.Block.Formats;

/// <summary>One line of a descriptor's extent list.</summary>
/// <param name="Access">RW, RDONLY or NOACCESS.</param>
/// <param name="Sectors">Size in sectors of 512 bytes.</param>
/// <param name="Kind">FLAT, SPARSE, ZERO, VMFS...</param>
/// <param name="FileName">The file that holds it, beside the descriptor; empty for ZERO.</param>
/// <param name="Offset">First sector in that file, for flat ones.</param>
internal sealed record VmdkExtentLine(string Access, long Sectors, string Kind, string FileName, long Offset);

/// <summary>The text part of a VMDK ("Virtual Disk Format 5.0", the descriptor file).</summary>
internal sealed class VmdkDescriptor
{
    public const int LargestSize = 20 * 512 * 64;
    private const int MostExtents = 4096;

    private readonly Dictionary<string, string> _values = new(StringComparer.OrdinalIgnoreCase);
    private readonly List<VmdkExtentLine> _extents = [];

    public IReadOnlyList<VmdkExtentLine> Extents => _extents;

    /// <summary>Where the eight digits of the content's id are in the text; -1: it has none.</summary>
    public int CidAt { get; private set; } = -1;

    public string CreateType => this["createType"] ?? string.Empty;

    public uint Cid => Hex("CID", 0);

    public uint ParentCid => Hex("parentCID", uint.MaxValue);

    /// <summary>The parent of a delta; null: none.</summary>
    public string? ParentFileName => ParentCid == uint.MaxValue ? null : this["parentFileNameHint"];

    private string? this[string key] => _values.TryGetValue(key, out string? value) ? value : null;

    public static bool Probe(ReadOnlySpan<byte> start) => start.StartsWith("# Disk DescriptorFile"u8) || start.StartsWith("# Disk Descriptor File"u8);

    /// <exception cref="BlockException">An extent line cannot be understood.</exception>
    public static VmdkDescriptor Parse(ReadOnlySpan<byte> text)
    {
        int end = text.IndexOf((byte)0);
        VmdkDescriptor descriptor = new() { CidAt = FindCid(end < 0 ? text : text[..end]) };
        foreach (string raw in Encoding.UTF8.GetString(end < 0 ? text : text[..end]).Split('\n'))
        {
            string line = raw.Trim();
            if (line.Length == 0 || line[0] == '#')
                continue;
            if (line.StartsWith("RW ", StringComparison.Ordinal) || line.StartsWith("RDONLY ", StringComparison.Ordinal) || line.StartsWith("NOACCESS ", StringComparison.Ordinal))
            {
                descriptor._extents.Add(ParseExtent(line));
                if (descriptor._extents.Count > MostExtents)
                    throw new BlockException($"VMDK descriptor has more than {MostExtents} extents");
                continue;
            }
            int equals = line.IndexOf('=', StringComparison.Ordinal);
            if (equals > 0)
                descriptor._values[line[..equals].Trim()] = line[(equals + 1)..].Trim().Trim('"');
        }
        return descriptor;
    }

    /// <summary>The text of a new image's descriptor.</summary>
    public static string Write(string createType, long sectors, string extent, uint cid, VmdkHardware hardware)
    {
        int heads = hardware.AdapterType == "ide" ? 16 : 255;
        long cylinders = hardware.AdapterType == "ide" ? Math.Min(16383, sectors / (63 * heads)) : sectors / (63 * heads);
        return string.Create(
            CultureInfo.InvariantCulture,
            $"# Disk DescriptorFile\nversion=1\nCID={cid:x8}\nparentCID=ffffffff\ncreateType=\"{createType}\"\n\n# Extent description\n{extent}\n\n# The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"{hardware.Version}\"\nddb.geometry.cylinders = \"{cylinders}\"\nddb.geometry.heads = \"{heads}\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"{hardware.AdapterType}\"\nddb.toolsVersion = \"{hardware.ToolsVersion}\"\n");
    }

    private static int FindCid(ReadOnlySpan<byte> text)
    {
        for (int at = 0; at < text.Length;)
        {
            ReadOnlySpan<byte> line = text[at..];
            if (line.StartsWith("CID="u8) && line.Length >= 12 && uint.TryParse(line.Slice(4, 8), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out _))
                return at + 4;
            int next = line.IndexOf((byte)'\n');
            if (next < 0)
                return -1;
            at += next + 1;
        }
        return -1;
    }

    private static VmdkExtentLine ParseExtent(string line)
    {
        int quote = line.IndexOf('"', StringComparison.Ordinal);
        int close = quote < 0 ? -1 : line.IndexOf('"', quote + 1);
        string[] head = (quote < 0 ? line : line[..quote]).Split(' ', StringSplitOptions.RemoveEmptyEntries);
        if (head.Length < 3 || !long.TryParse(head[1], NumberStyles.None, CultureInfo.InvariantCulture, out long sectors) || sectors is <= 0 or > long.MaxValue / 512 || (quote >= 0 && close < 0))
            throw new BlockException($"Invalid extent line: {line}");
        long offset = 0;
        string rest = close < 0 ? string.Empty : line[(close + 1)..].Trim();
        if (rest.Length > 0 && (!long.TryParse(rest.Split(' ')[0], NumberStyles.None, CultureInfo.InvariantCulture, out offset) || offset > long.MaxValue / 1024))
            throw new BlockException($"Invalid extent line: {line}");
        string kind = head[2];
        if (kind != "ZERO" && quote < 0)
            throw new BlockException($"Invalid extent line: {line}");
        return new VmdkExtentLine(head[0], sectors, kind, quote < 0 ? string.Empty : line[(quote + 1)..close], offset);
    }

    private uint Hex(string key, uint missing) =>
        this[key] is string text && uint.TryParse(text, NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out uint value) ? value : missing;
}

/// <summary>What a new image's descriptor says of the virtual machine it is for.</summary>
/// <param name="AdapterType">ide, lsilogic, buslogic or legacyESX; decides the geometry.</param>
/// <param name="Version">Version of the virtual hardware.</param>
/// <param name="ToolsVersion">Version of the guest tools; 2147483647: unknown.</param>
public sealed record VmdkHardware(string AdapterType = "ide", string Version = "4", string ToolsVersion = "2147483647");
