using System;

namespace Kvasir.Block;

/// <summary>Which options an image of a format takes when it is opened. Any other is refused: it would be ignored, and nobody told.</summary>
internal static class GraphOptions
{
    // A name that ends in a dot stands for all options below it.
    private static readonly string[] s_all =
    [
        "driver", "node-name", "read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache.", "file", "file.", "filename", "image", "image.", "aio", "locking",
    ];

    private static readonly string[] s_qcow2 =
    [
        "lazy-refcounts", "l2-cache-size", "l2-cache-entry-size", "cache-size", "refcount-cache-size", "cache-clean-interval", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other",
        "overlap-check", "overlap-check.", "encrypt.", "data-file", "data-file.", "backing", "backing.",
    ];

    /// <exception cref="BlockException">There is an option that the format does not have.</exception>
    public static void Check(string format, ImageOptions options, bool probed)
    {
        string[] own = format switch
        {
            "qcow2" => s_qcow2,
            "qcow" => ["encrypt.", "backing", "backing."],
            "raw" => ["offset", "size"],
            "luks" => ["key-secret", "header", "header."],
            "vmdk" or "qed" or "vpc" or "vhdx" => ["backing", "backing.", "force_size_calc"],
            _ => [],
        };
        foreach (string key in options.Values.Keys)
        {
            // Before the format is known, options of any may stand there.
            if (!Allows(s_all, key) && !Allows(own, key) && !(probed && Allows(s_qcow2, key)))
                throw new BlockException($"Block format '{format}' does not support the option '{key}'");
        }
    }

    private static bool Allows(string[] names, string key)
    {
        foreach (string name in names)
        {
            if (name.EndsWith('.') ? key.StartsWith(name, StringComparison.Ordinal) : key == name)
                return true;
        }
        return false;
    }
}
