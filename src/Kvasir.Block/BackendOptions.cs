using System;
using System.Collections.Generic;
using Kvasir.Block.Filters;
using Kvasir.Block.Nbd;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>What becomes of writes of nothing but zeros.</summary>
public enum DetectZeroes
{
    /// <summary>They are stored like others.</summary>
    Off,

    /// <summary>They are stored as zeroes, which takes no room where the format can say so.</summary>
    On,

    /// <summary>And their room is given back.</summary>
    Unmap,
}

/// <summary>How a disk of a VM is opened. The names in <see cref="Apply"/> are those of QEMU's -drive.</summary>
public sealed record BackendOptions
{
    /// <summary>The image's format; null: raw, unless <see cref="Probe"/>.</summary>
    public string? Format { get; init; }

    /// <summary>Whether the format may be guessed from the content. A disk guessed to be raw then refuses writes that look like another format's header.</summary>
    public bool Probe { get; init; }

    public bool ReadOnly { get; init; }

    /// <summary>Writes go to a temporary overlay that is lost when the back end closes.</summary>
    public bool Snapshot { get; init; }

    public CacheMode Cache { get; init; } = CacheMode.Writeback;

    public AsyncMode Async { get; init; } = AsyncMode.Auto;

    /// <summary>Whether discards give space back to the host.</summary>
    public bool Discard { get; init; } = true;

    public DetectZeroes DetectZeroes { get; init; }

    /// <summary>Speed limits; null: none.</summary>
    public ThrottleLimits? Throttle { get; init; }

    /// <summary>Open although another process has the image.</summary>
    public bool ForceShare { get; init; }

    /// <summary>Let others write to the image as well (clustered file systems).</summary>
    public bool ShareWrites { get; init; }

    /// <summary>Passphrases by the id that options name them with.</summary>
    public IReadOnlyDictionary<string, ReadOnlyMemory<byte>> Secrets { get; init; } = new Dictionary<string, ReadOnlyMemory<byte>>();

    /// <summary>TLS certificates by id.</summary>
    public IReadOnlyDictionary<string, TlsCredentials> Credentials { get; init; } = new Dictionary<string, TlsCredentials>();

    /// <summary>Groups of rate limits by the id that options name them with.</summary>
    public IReadOnlyDictionary<string, ThrottleGroup> ThrottleGroups { get; init; } = new Dictionary<string, ThrottleGroup>();

    /// <summary>Takes the options that belong here out of a list and gives them a place; what stays in the list is not a back end's.</summary>
    /// <exception cref="BlockException">A value is none of those allowed.</exception>
    public BackendOptions Apply(ImageOptions options)
    {
        BackendOptions result = this;
        string? Take(string key)
        {
            string? value = options[key];
            options[key] = null;
            return value;
        }

        if (Take("format") is string format)
            result = result with { Format = format, Probe = false };
        foreach (string key in new[] { "readonly", "read-only" })
        {
            if (Take(key) is string readOnly)
                result = result with { ReadOnly = ImageOptions.ParseFlag(key, readOnly) };
        }
        if (Take("snapshot") is string snapshot)
            result = result with { Snapshot = ImageOptions.ParseFlag("snapshot", snapshot) };
        if (Take("cache") is string cache)
            result = result with { Cache = ParseCache(cache) };
        if (Take("aio") is string aio)
        {
            result = result with
            {
                Async = aio switch
                {
                    "threads" => AsyncMode.Threads,
                    "io_uring" or "native" => AsyncMode.Auto,
                    _ => throw new BlockException($"Parameter 'aio' expects 'threads' or 'io_uring', not '{aio}'"),
                },
            };
        }
        if (Take("discard") is string discard)
        {
            result = result with
            {
                Discard = discard switch
                {
                    "unmap" or "on" => true,
                    "ignore" or "off" => false,
                    _ => throw new BlockException($"Parameter 'discard' expects 'unmap' or 'ignore', not '{discard}'"),
                },
            };
        }
        if (Take("detect-zeroes") is string detect)
            result = result with { DetectZeroes = ParseDetectZeroes(detect) };
        if (Take("force-share") is string force)
            result = result with { ForceShare = ImageOptions.ParseFlag("force-share", force) };
        if (Take("share-rw") is string share)
            result = result with { ShareWrites = ImageOptions.ParseFlag("share-rw", share) };
        ThrottleLimits limits = ThrottleLimits.FromOptions(options);
        foreach (string key in new List<string>(options.Values.Keys))
        {
            if (ThrottleLimits.IsOption(key))
                options[key] = null;
        }
        return limits.IsLimited ? result with { Throttle = limits } : result;
    }

    /// <exception cref="BlockException">The text names no cache mode.</exception>
    public static CacheMode ParseCache(string text) => text switch
    {
        "none" or "off" => CacheMode.None,
        "writeback" => CacheMode.Writeback,
        "writethrough" => CacheMode.Writethrough,
        "directsync" => CacheMode.DirectSync,
        "unsafe" => CacheMode.Unsafe,
        _ => throw new BlockException($"Invalid cache option: {text} (none, writeback, writethrough, directsync or unsafe)"),
    };

    /// <exception cref="BlockException">The text is none of them.</exception>
    public static DetectZeroes ParseDetectZeroes(string text) => text switch
    {
        "off" => DetectZeroes.Off,
        "on" => DetectZeroes.On,
        "unmap" => DetectZeroes.Unmap,
        _ => throw new BlockException($"Parameter 'detect-zeroes' expects 'off', 'on' or 'unmap', not '{text}'"),
    };

    internal OpenOptions ToOpenOptions() => new()
    {
        Format = Format,
        Probe = Probe,
        ReadOnly = ReadOnly || Snapshot,
        Cache = Cache,
        Async = Async,
        Discard = Discard,
        ForceShare = ForceShare,
        Secrets = Secrets,
        Credentials = Credentials,
        ThrottleGroups = ThrottleGroups,
        Shared = ShareWrites ? BlockPermission.All : BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged,
    };
}
