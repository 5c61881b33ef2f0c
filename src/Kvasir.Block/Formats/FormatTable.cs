using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>The formats beside raw, qcow2 and LUKS.</summary>
internal static class FormatTable
{
    /// <summary>The format that a file's first bytes look like; null when like none here.</summary>
    public static string? Probe(ReadOnlySpan<byte> start, string name)
    {
        _ = name;
        if (VdiImage.Probe(start))
            return "vdi";
        if (VpcImage.Probe(start))
            return "vpc";
        return null;
    }

    public static async ValueTask<BlockNode> OpenAsync(string format, BlockNode file, OpenOptions options, CancellationToken cancellation) => format switch
    {
        "vdi" => await VdiImage.OpenAsync(file, cancellation).ConfigureAwait(false),
        "vpc" => await VpcImage.OpenAsync(file, cancellation).ConfigureAwait(false),
        _ => throw new BlockException($"Unknown driver '{format}'"),
    };
}
