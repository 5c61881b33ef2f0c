using System;
using System.Collections.Generic;
using System.Globalization;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Crypto;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>amend: what can be changed in an image that is there, key slots included.</summary>
public sealed partial class ImgTool
{
    private async Task<int> AmendAsync(string[] args)
    {
        CommandLine line = new(args, "ho:qpt:f:", "help", "object=", "image-opts", "force");
        AddObjects(line);
        if (!line.Has("o"))
            throw new UsageException("Must specify options (-o)");
        if (AsksForHelp(line) && line.Value("f") is string wanted)
            return ListAmendOptions(wanted);
        if (AsksForHelp(line))
        {
            await using BlockNode probed = await OpenAsync(One(line), null, line.Has("image-opts"), noIo: true, noBacking: true).ConfigureAwait(false);
            return ListAmendOptions(probed.Driver);
        }
        ImageOptions options = CreationOptions(line);
        await using BlockNode node = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), write: true, cache: ParseCache(line.Value("t"), CacheMode.Writeback), noIo: options.Below("encrypt").Values.Count == 0).ConfigureAwait(false);
        if (node is LuksImage luks)
        {
            await AmendSlotsAsync(luks.Header, luks.File, 0, options, string.Empty, KeySecret(line, "key-secret"), line.Has("force")).ConfigureAwait(false);
            return 0;
        }
        if (node is not Qcow2Image image)
            throw new BlockException($"Format driver '{node.Driver}' does not support option amendment");
        CheckAmendable(image, options);
        ProgressLine progress = Progress(line.Has("p") && !line.Has("q"));
        progress.Report(0, 1);
        if (options["compat"] is string compat)
        {
            await image.SetVersionAsync(compat switch
            {
                "0.10" or "v2" => 2,
                "1.1" or "v3" => 3,
                _ => throw new BlockException($"Unknown compatibility level {compat}"),
            }).ConfigureAwait(false);
        }
        if (options.Size("refcount_bits") is long bits)
            await image.SetRefcountBitsAsync((int)Math.Min(bits, 1024)).ConfigureAwait(false);
        if (options["lazy_refcounts"] is string lazy)
            await image.SetLazyRefcountsAsync(ImageOptions.ParseFlag("lazy_refcounts", lazy)).ConfigureAwait(false);
        if (options["data_file"] is string dataFile)
            await image.SetDataFileNameAsync(dataFile).ConfigureAwait(false);
        if (options["data_file_raw"] is string raw)
            await image.SetDataFileRawAsync(ImageOptions.ParseFlag("data_file_raw", raw)).ConfigureAwait(false);
        if (options.Below("encrypt").Values.Count > 0)
            await AmendSlotsAsync(image.Luks ?? throw new BlockException("The image is not encrypted with LUKS"), image.File, image.CryptoHeader.Offset, options, "encrypt.", KeySecret(line, "encrypt.key-secret"), line.Has("force")).ConfigureAwait(false);
        if (options.Size("size") is long size)
            await image.ResizeAsync((size + 511) & ~511L).ConfigureAwait(false);
        progress.Report(1, 1);
        progress.End();
        return 0;
    }

    /// <summary>Refuses what cannot be changed in an image that is there.</summary>
    private static void CheckAmendable(Qcow2Image image, ImageOptions options)
    {
        foreach ((string key, string value) in options.Values)
        {
            switch (key)
            {
                case "compat" or "lazy_refcounts" or "size" or "data_file_raw" or "refcount_bits":
                    break;
                case "backing_file" when value != (image.BackingFileName ?? string.Empty):
                case "backing_fmt" when value != (image.BackingFormat ?? string.Empty):
                    throw new BlockException("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.");
                case "backing_file" or "backing_fmt":
                    break;
                case "data_file" when image.DataFile is null:
                    throw new BlockException("data-file can only be set for images that use an external data file");
                case "data_file":
                    break;
                default:
                    if (key is "encrypt.state" or "encrypt.new-secret" or "encrypt.old-secret" or "encrypt.keyslot" or "encrypt.iter-time")
                        break;
                    ImageCreator.CheckOptions("qcow2", new ImageOptions { [key] = value });
                    throw new BlockException($"Invalid parameter '{key}'\nThis option is only supported for image creation");
            }
        }
    }

    private static readonly string[] s_amendable = ["backing_file", "backing_fmt", "compat", "data_file", "data_file_raw", "lazy_refcounts", "refcount_bits", "size"];

    private int ListAmendOptions(string format)
    {
        if (format is not ("qcow2" or "luks"))
            throw new BlockException($"Format driver '{format}' does not support option amendment");
        _out.WriteLine($"Amend options for '{format}':");
        string prefix = format == "qcow2" ? "encrypt." : string.Empty;
        List<(string Name, string Type, string Meaning)> options =
        [
            (prefix + "iter-time", "num", "Time to spend in PBKDF in milliseconds"), (prefix + "keyslot", "num", "Select a single keyslot to modify explicitly"),
            (prefix + "new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"), (prefix + "old-secret", "str", "Select all keyslots that match this password"),
            (prefix + "state", "str", "Select new state of affected keyslots (active/inactive)"),
        ];
        if (format == "qcow2")
        {
            foreach ((string name, string type, string meaning) in ImageCreator.OptionsOf(format))
            {
                if (Array.IndexOf(s_amendable, name) >= 0)
                    options.Add((name, type, meaning));
            }
        }
        options.Sort((a, b) => string.CompareOrdinal(a.Name, b.Name));
        WriteOptions(options, named: true);
        return 0;
    }

    /// <summary>The id of the secret that the image is named with; null: it is named without one.</summary>
    private static string? KeySecret(CommandLine line, string key)
    {
        string name = One(line);
        if (line.Has("image-opts"))
            return ImageOptions.ParseList(name, "file")[key];
        return name.StartsWith("json:", StringComparison.Ordinal) ? ImageOptions.ParseJson(name[5..])[key] : null;
    }

    private async ValueTask AmendSlotsAsync(LuksHeader header, BlockNode file, long offset, ImageOptions options, string prefix, string? keySecret, bool force)
    {
        ReadOnlyMemory<byte>? SecretOf(string key) => options[prefix + key] is string id
            ? Secrets.TryGetValue(id, out ReadOnlyMemory<byte> secret) ? secret : throw new BlockException($"No secret with id '{id}'")
            : default(ReadOnlyMemory<byte>?);
        int? slot = options.Size(prefix + "keyslot") is long index ? (int)Math.Min(index, 1000) : null;
        if (slot is >= LuksHeader.Slots)
            throw new BlockException($"Invalid keyslot {slot} specified, must be between 0 and {LuksHeader.Slots - 1}");
        switch (options[prefix + "state"])
        {
            case "active":
                if (options[prefix + "old-secret"] is not null)
                    throw new BlockException("'old-secret' must not be given when activating keyslots");
                ReadOnlyMemory<byte> added = SecretOf("new-secret") ?? throw new BlockException("'new-secret' is required to activate a keyslot");
                ReadOnlyMemory<byte> existing = keySecret is not null && Secrets.TryGetValue(keySecret, out ReadOnlyMemory<byte> known) ? known : OtherSecret(options[prefix + "new-secret"]) ?? added;
                await header.AddSlotAsync(file, offset, existing, added, slot, (int)Math.Clamp(options.Size(prefix + "iter-time") ?? 2000, 1, int.MaxValue), force).ConfigureAwait(false);
                break;
            case "inactive":
                if (slot is null && SecretOf("old-secret") is null)
                    throw new BlockException("To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given");
                await header.EraseSlotsAsync(file, offset, SecretOf("old-secret"), slot, force).ConfigureAwait(false);
                break;
            case null:
                throw new BlockException("Parameter 'state' is missing");
            default:
                throw new BlockException($"Parameter 'state' does not accept value '{options[prefix + "state"]}'");
        }
    }

    /// <summary>A secret that is not the new one, for an image that is named without its own.</summary>
    private ReadOnlyMemory<byte>? OtherSecret(string? added)
    {
        foreach ((string id, ReadOnlyMemory<byte> secret) in Secrets)
        {
            if (id != added)
                return secret;
        }
        return null;
    }
}
