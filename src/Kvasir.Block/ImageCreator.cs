using System;
using System.Collections.Generic;
using System.Globalization;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Crypto;
using Kvasir.Block.Formats;
using Kvasir.Block.Qcow2;

namespace Kvasir.Block;

/// <summary>Creates images from the options that `qemu-img create -o` takes.</summary>
public static class ImageCreator
{
    /// <summary>Creates and opens an image.</summary>
    /// <param name="format">The format's name.</param>
    /// <param name="name">File to create.</param>
    /// <param name="size">Disk size in bytes.</param>
    /// <param name="options">The format's options; unknown ones are refused.</param>
    /// <param name="secrets">Passphrases by id.</param>
    /// <param name="cache">Cache mode of the opened image.</param>
    /// <param name="cancellation">Ends the creation early.</param>
    /// <exception cref="BlockException">The options make no image, or the file cannot be written.</exception>
    public static async ValueTask<BlockNode> CreateAsync(
        string format, string name, long size, ImageOptions options, IReadOnlyDictionary<string, ReadOnlyMemory<byte>> secrets,
        CacheMode cache = CacheMode.Writeback, CancellationToken cancellation = default)
    {
        CheckOptions(format, options);
        HostFileOptions fileOptions = new() { Cache = cache, ReserveBlocks = true };
        if (format is not ("raw" or "qcow2" or "luks" or "vdi" or "vpc" or "vmdk" or "vhdx"))
            throw NoSuchFormat(format);
        Preallocation preallocation = ParsePreallocation(options["preallocation"]);
        CheckPlace(name);
        if (format == "raw")
        {
            if (preallocation == Preallocation.Metadata)
                throw new BlockException("Unsupported preallocation mode: metadata", BlockErrno.NotSupported);
            return new RawImage(await Protocols.CreateAsync(name, RoundUp(size), preallocation, fileOptions, cancellation).ConfigureAwait(false));
        }
        // Options are judged before the file is emptied.
        Qcow2CreateOptions? qcow2 = format == "qcow2" ? Qcow2Options(RoundUp(size), options, secrets) : null;
        LuksCreateOptions? luks = format == "luks" ? LuksOptions(options, string.Empty, secrets) : null;
        BlockNode? data = null;
        if (qcow2?.DataFileName is string dataName)
        {
            data = await Protocols.CreateAsync(dataName, 0, Preallocation.Off, fileOptions, cancellation).ConfigureAwait(false);
            qcow2 = qcow2 with { DataFile = data };
        }
        if (format == "vmdk")
            return await CreateVmdkAsync(name, RoundUp(size), options, fileOptions, cancellation).ConfigureAwait(false);
        BlockNode file = await CreateFileAsync(format, name, fileOptions, cancellation).ConfigureAwait(false);
        try
        {
            return format switch
            {
                "qcow2" => await Qcow2Creator.CreateAsync(file, qcow2!, cancellation).ConfigureAwait(false),
                "luks" => await LuksImage.CreateAsync(file, RoundUp(size), luks!, preallocation, cancellation).ConfigureAwait(false),
                "vdi" => await VdiImage.CreateAsync(file, RoundUp(size), options.Flag("static", false), cancellation).ConfigureAwait(false),
                "vhdx" => await VhdxImage.CreateAsync(
                    file, RoundUp(size), options.Size("block_size") ?? 0, IsFixed(options["subformat"]), options.Size("log_size") ?? 1 << 20, cancellation).ConfigureAwait(false),
                _ => await VpcImage.CreateAsync(file, RoundUp(size), IsFixed(options["subformat"]), options.Flag("force_size", false), cancellation).ConfigureAwait(false),
            };
        }
        catch
        {
            await file.DisposeAsync().ConfigureAwait(false);
            if (data is not null)
                await data.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Refuses names in places where no image can be made.</summary>
    public static void CheckPlace(string name) => Protocols.CheckCreatable(name);

    /// <summary>The qcow2 layout that options ask for.</summary>
    public static Qcow2CreateOptions Qcow2Options(long size, ImageOptions options, IReadOnlyDictionary<string, ReadOnlyMemory<byte>> secrets)
    {
        string? encryption = options["encrypt.format"];
        if (encryption is not (null or "luks") || options.Flag("encryption", false))
            throw new BlockException("Only encryption format 'luks' is supported for new images", BlockErrno.NotSupported);
        return new Qcow2CreateOptions
        {
            Size = size,
            Version = options["compat"] switch
            {
                null or "1.1" or "v3" => 3,
                "0.10" or "v2" => 2,
                string other => throw new BlockException($"Parameter 'version' does not accept value '{other}'"),
            },
            ClusterSize = (int)Math.Min(options.Size("cluster_size") ?? 65536, int.MaxValue),
            RefcountBits = (int)Math.Min(options.Size("refcount_bits") ?? 16, 1024),
            LazyRefcounts = options.Flag("lazy_refcounts", false),
            ExtendedL2 = options.Flag("extended_l2", false),
            Compression = ParseCompression(options["compression_type"]),
            Preallocation = ParsePreallocation(options["preallocation"]),
            BackingFile = options["backing_file"],
            BackingFormat = options["backing_fmt"],
            DataFileName = options["data_file"],
            DataFileRaw = options.Flag("data_file_raw", false),
            Luks = encryption is null ? null : LuksOptions(options, "encrypt.", secrets),
        };
    }

    /// <summary>The names of the options a format takes, with what they mean.</summary>
    public static IReadOnlyList<(string Name, string Type, string Meaning)> OptionsOf(string format) => format switch
    {
        "raw" => [("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"), ("nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)"), ("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"), ("size", "size", "Virtual disk size")],
        "qcow2" =>
        [
            ("backing_file", "str", "File name of a base image"), ("backing_fmt", "str", "Image format of the base image"),
            ("cluster_size", "size", "qcow2 cluster size"), ("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
            ("compression_type", "str", "Compression method used for image cluster compression"), ("data_file", "str", "File name of an external data file"),
            ("data_file_raw", "bool (on/off)", "The external data file must stay valid as a raw image"),
            ("encrypt.cipher-alg", "str", "Name of encryption cipher algorithm"), ("encrypt.cipher-mode", "str", "Name of encryption cipher mode"),
            ("encrypt.format", "str", "Encrypt the image, format choices: 'luks'"), ("encrypt.hash-alg", "str", "Name of encryption hash algorithm"),
            ("encrypt.iter-time", "num", "Time to spend in PBKDF in milliseconds"), ("encrypt.ivgen-alg", "str", "Name of IV generator algorithm"),
            ("encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm"), ("encrypt.key-secret", "str", "ID of secret providing the LUKS passphrase"),
            ("encryption", "bool (on/off)", "Encrypt the image with format 'aes' (not supported for new images)"), ("extended_l2", "bool (on/off)", "Extended L2 tables"),
            ("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"), ("lazy_refcounts", "bool (on/off)", "Postpone refcount updates"),
            ("nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)"), ("preallocation", "str", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
            ("refcount_bits", "num", "Width of a reference count entry in bits"), ("size", "size", "Virtual disk size"),
        ],
        "luks" =>
        [
            ("cipher-alg", "str", "Name of encryption cipher algorithm"), ("cipher-mode", "str", "Name of encryption cipher mode"), ("hash-alg", "str", "Name of encryption hash algorithm"),
            ("iter-time", "num", "Time to spend in PBKDF in milliseconds"), ("ivgen-alg", "str", "Name of IV generator algorithm"), ("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
            ("key-secret", "str", "ID of the secret that provides the keyslot passphrase"), ("preallocation", "str", "Preallocation mode (allowed values: off, falloc, full)"), ("size", "size", "Virtual disk size"),
        ],
        "vdi" => [("size", "size", "Virtual disk size"), ("static", "bool (on/off)", "VDI static (pre-allocated) image")],
        "vpc" =>
        [
            ("force_size", "bool (on/off)", "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation"),
            ("size", "size", "Virtual disk size"), ("subformat", "str", "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} "),
        ],
        "vmdk" =>
        [
            ("adapter_type", "str", "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"),
            ("hwversion", "str", "VMDK hardware version"), ("size", "size", "Virtual disk size"),
            ("subformat", "str", "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | streamOptimized} "),
            ("toolsversion", "str", "VMware guest tools version"), ("zeroed_grain", "bool (on/off)", "Enable efficient zero writes using the zeroed-grain GTE feature"),
        ],
        "vhdx" =>
        [
            ("block_size", "size", "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size."),
            ("block_state_zero", "bool (on/off)", "Force use of payload blocks of type 'ZERO'; only 'on', the default, is supported"), ("log_size", "size", "Log size; min 1MB."),
            ("size", "size", "Virtual disk size; max of 64TB."), ("subformat", "str", "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."),
        ],
        _ => throw NoSuchFormat(format),
    };

    private static BlockException NoSuchFormat(string format) => format is "parallels" or "qed" or "qcow" or "cloop" or "dmg" or "bochs"
        ? new BlockException($"Images of format '{format}' are not created: use qcow2 (or raw, vmdk, vdi, vpc, vhdx, luks)", BlockErrno.NotSupported)
        : new BlockException($"Unknown file format '{format}'");

    public static Preallocation ParsePreallocation(string? text) => text switch
    {
        null or "off" => Preallocation.Off,
        "metadata" => Preallocation.Metadata,
        "falloc" => Preallocation.Falloc,
        "full" => Preallocation.Full,
        _ => throw new BlockException($"Invalid preallocation mode '{text}'"),
    };

    public static LuksCreateOptions LuksOptions(ImageOptions options, string prefix, IReadOnlyDictionary<string, ReadOnlyMemory<byte>> secrets)
    {
        string id = options[prefix + "key-secret"] ?? throw new BlockException($"Parameter '{prefix}key-secret' is required for cipher");
        if (!secrets.TryGetValue(id, out ReadOnlyMemory<byte> passphrase))
            throw new BlockException($"No secret with id '{id}'", BlockErrno.NoEntry);
        string algorithm = options[prefix + "cipher-alg"] ?? "aes-256";
        (string cipher, int keyBytes) = algorithm.Split('-') switch
        {
            ["aes" or "serpent" or "twofish", "128"] => (algorithm[..^4], 16),
            ["aes" or "serpent" or "twofish", "192"] => (algorithm[..^4], 24),
            ["aes" or "serpent" or "twofish", "256"] => (algorithm[..^4], 32),
            _ => throw new BlockException($"Cipher '{algorithm}' is not supported: use aes, serpent or twofish with 128, 192 or 256 bits, as in aes-256", BlockErrno.NotSupported),
        };
        return new LuksCreateOptions
        {
            Passphrase = passphrase,
            Cipher = cipher,
            CipherKeyBytes = keyBytes,
            CipherMode = options[prefix + "cipher-mode"] ?? "xts",
            IvGenerator = options[prefix + "ivgen-alg"] ?? "plain64",
            IvHash = options[prefix + "ivgen-hash-alg"] ?? "sha256",
            Hash = options[prefix + "hash-alg"] ?? "sha256",
            IterationMilliseconds = (int)Math.Clamp(options.Size(prefix + "iter-time") ?? 2000, 1, 3_600_000),
        };
    }

    private static bool IsFixed(string? subformat) => subformat switch
    {
        null or "dynamic" => false,
        "fixed" => true,
        _ => throw new BlockException($"Invalid subformat '{subformat}'"),
    };

    private static async ValueTask<BlockNode> CreateVmdkAsync(string name, long size, ImageOptions options, HostFileOptions fileOptions, CancellationToken cancellation)
    {
        VmdkLayout layout = options["subformat"] switch
        {
            null or "monolithicSparse" => VmdkLayout.MonolithicSparse,
            "monolithicFlat" => VmdkLayout.MonolithicFlat,
            "streamOptimized" => VmdkLayout.StreamOptimized,
            "twoGbMaxExtentSparse" or "twoGbMaxExtentFlat" => throw new BlockException("Images of several extents are read and not created: use monolithicSparse or monolithicFlat", BlockErrno.NotSupported),
            string other => throw new BlockException($"Invalid subformat '{other}'"),
        };
        bool zeroed = options.Flag("zeroed_grain", false);
        VmdkHardware hardware = new(options["adapter_type"] ?? "ide", options["hwversion"] ?? "4", options["toolsversion"] ?? "2147483647");
        if (hardware.AdapterType is not ("ide" or "buslogic" or "lsilogic" or "legacyESX"))
            throw new BlockException($"Unknown adapter type: {hardware.AdapterType}");
        if (!int.TryParse(hardware.ToolsVersion, NumberStyles.None, CultureInfo.InvariantCulture, out _))
            throw new BlockException("Invalid toolsversion");
        if (!uint.TryParse(hardware.Version, NumberStyles.None, CultureInfo.InvariantCulture, out _))
            throw new BlockException("Invalid hwversion");
        if (zeroed && layout != VmdkLayout.MonolithicSparse)
            throw new BlockException("Flat and stream-optimised images can't enable zeroed grain", BlockErrno.NotSupported);
        BlockNode? flat = null;
        BlockNode? file = null;
        try
        {
            if (layout == VmdkLayout.MonolithicFlat)
            {
                string path = Image.StripProtocol(name);
                string stem = path.EndsWith(".vmdk", StringComparison.Ordinal) ? path[..^5] : path;
                if (Image.HasProtocol(path))
                    throw new BlockException("A flat VMDK has two files: both must be files of the host", BlockErrno.NotSupported);
                flat = await HostFile.CreateAsync(stem + "-flat.vmdk", size, Preallocation.Off, fileOptions).ConfigureAwait(false);
            }
            file = await CreateFileAsync("vmdk", name, fileOptions, cancellation).ConfigureAwait(false);
            return await VmdkImage.CreateAsync(file, size, layout, zeroed, flat, hardware, cancellation).ConfigureAwait(false);
        }
        catch
        {
            if (file is not null)
                await file.DisposeAsync().ConfigureAwait(false);
            if (flat is not null)
                await flat.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>An empty file for an image of a format. Only qcow2 lays itself out where the storage has a size of its own.</summary>
    private static async ValueTask<BlockNode> CreateFileAsync(string format, string name, HostFileOptions options, CancellationToken cancellation)
    {
        BlockNode file = await Protocols.CreateAsync(name, 0, Preallocation.Off, options, cancellation).ConfigureAwait(false);
        if (file.IsGrowable || file is HostFile || format == "qcow2")
            return file;
        string driver = file.Driver;
        await file.DisposeAsync().ConfigureAwait(false);
        throw new BlockException($"Images of format '{format}' are not created over '{driver}': use raw or qcow2", BlockErrno.NotSupported);
    }

    /// <summary>Whether images of a format can lie over a backing file when they are created.</summary>
    public static bool TakesBacking(string format) => format == "qcow2";

    /// <exception cref="BlockException">An option is not one of the format's.</exception>
    public static void CheckOptions(string format, ImageOptions options)
    {
        IReadOnlyList<(string Name, string Type, string Meaning)> known = OptionsOf(format);
        foreach (string key in options.Values.Keys)
        {
            bool found = false;
            foreach ((string name, _, _) in known)
                found |= name == key;
            if (!found)
                throw new BlockException($"Invalid parameter '{key}'");
        }
        if (format == "vhdx" && !options.Flag("block_state_zero", true))
            throw new BlockException("block_state_zero=off is not supported: blocks of zeros are always marked as such", BlockErrno.NotSupported);
    }

    private static Qcow2Compression ParseCompression(string? text) => text switch
    {
        null or "zlib" => Qcow2Compression.Zlib,
        "zstd" => Qcow2Compression.Zstd,
        _ => throw new BlockException($"Parameter 'compression-type' does not accept value '{text}'"),
    };

    private static long RoundUp(long size) => size > long.MaxValue - 511 ? throw new BlockException("Image size is too large", BlockErrno.FileTooBig) : (size + 511) & ~511L;
}
