using System;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Formats;

/// <summary>The formats beside raw, qcow2 and LUKS.</summary>
internal static class FormatTable
{
    /// <summary>The format that a file's first bytes look like; null when like none here.</summary>
    public static string? Probe(ReadOnlySpan<byte> start)
    {
        if (VdiImage.Probe(start))
            return "vdi";
        if (VpcImage.Probe(start))
            return "vpc";
        if (VmdkImage.Probe(start))
            return "vmdk";
        if (VhdxImage.Probe(start))
            return "vhdx";
        if (ParallelsImage.Probe(start))
            return "parallels";
        if (QcowImage.Probe(start))
            return "qcow";
        if (QedImage.Probe(start))
            return "qed";
        if (BochsImage.Probe(start))
            return "bochs";
        return CloopImage.Probe(start) ? "cloop" : null;
    }

    public static bool Has(string format) => format is "vdi" or "vpc" or "vmdk" or "vhdx" or "parallels" or "qed" or "qcow" or "cloop" or "dmg" or "bochs";

    /// <summary>Opens an image of a format by its name.</summary>
    /// <exception cref="BlockException">There is no such format, or the image is damaged.</exception>
    public static async ValueTask<BlockNode> OpenAsync(string format, BlockNode file, OpenOptions options, CancellationToken cancellation) => format switch
    {
        "vdi" => await VdiImage.OpenAsync(file, cancellation).ConfigureAwait(false),
        "vpc" => await VpcDifferencing.OpenAnyAsync(file, options.ReadOnly, cancellation).ConfigureAwait(false),
        "vmdk" => await VmdkImage.OpenAsync(file, options, cancellation).ConfigureAwait(false),
        "vhdx" => await VhdxDifferencing.OpenAnyAsync(file, options.ReadOnly, cancellation).ConfigureAwait(false),
        "parallels" => CheckReadOnly(format, options, await ParallelsImage.OpenAsync(file, cancellation).ConfigureAwait(false)),
        "qed" => CheckReadOnly(format, options, await QedImage.OpenAsync(file, cancellation).ConfigureAwait(false)),
        "cloop" => CheckReadOnly(format, options, await CloopImage.OpenAsync(file, cancellation).ConfigureAwait(false)),
        "bochs" => CheckReadOnly(format, options, await BochsImage.OpenAsync(file, cancellation).ConfigureAwait(false)),
        "dmg" => CheckReadOnly(format, options, await DmgImage.OpenAsync(file, cancellation).ConfigureAwait(false)),
        _ => throw new BlockException($"Unknown driver '{format}'"),
    };

    /// <summary>Refuses to open an image for writing whose format is only read.</summary>
    public static BlockNode CheckReadOnly(string format, OpenOptions options, BlockNode image) =>
        options.ReadOnly ? image : throw new BlockException($"Images of format '{format}' can only be read: open it read-only, or convert it", BlockErrno.ReadOnly);
}
