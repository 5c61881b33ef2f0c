using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Formats;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>info.</summary>
public sealed partial class ImgTool
{
    private static readonly JsonWriterOptions JsonLayout = new() { Indented = true, IndentSize = 4, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    private async Task<int> InfoAsync(string[] args)
    {
        CommandLine line = new(args, "hf:U", "help", "backing-chain", "force-share", "image-opts", "object=", "output=");
        AddObjects(line);
        bool json = Json(line);
        bool chain = line.Has("backing-chain");
        await using BlockNode top = await OpenAsync(
            One(line), line.Value("f"), line.Has("image-opts"), share: line.Has("U") || line.Has("force-share"), noBacking: !chain, check: true, noIo: true).ConfigureAwait(false);
        List<BlockNode> nodes = [];
        for (BlockNode? node = top; node is not null; node = chain ? node.Backing : null)
            nodes.Add(node);
        if (json)
        {
            await WriteJsonAsync(async writer =>
            {
                if (chain)
                    writer.WriteStartArray();
                foreach (BlockNode node in nodes)
                    await InfoJsonAsync(writer, node).ConfigureAwait(false);
                if (chain)
                    writer.WriteEndArray();
            }).ConfigureAwait(false);
            return 0;
        }
        for (int i = 0; i < nodes.Count; i++)
        {
            if (i > 0)
                _out.WriteLine();
            await InfoHumanAsync(nodes[i]).ConfigureAwait(false);
        }
        return 0;
    }

    private async ValueTask WriteJsonAsync(Func<Utf8JsonWriter, ValueTask> write)
    {
        using MemoryStream buffer = new();
        using (Utf8JsonWriter writer = new(buffer, JsonLayout))
            await write(writer).ConfigureAwait(false);
        _out.WriteLine(Encoding.UTF8.GetString(buffer.ToArray()));
    }

    private static bool IsEncrypted(BlockNode node) =>
        node is Qcow2Image { Encryption: not Qcow2Encryption.None } or Kvasir.Block.Crypto.LuksImage or Kvasir.Block.Formats.QcowImage { IsEncrypted: true };

    private async ValueTask InfoHumanAsync(BlockNode node)
    {
        Qcow2Image? image = node as Qcow2Image;
        _out.WriteLine($"image: {node.FileName}");
        _out.WriteLine($"file format: {node.Driver}");
        _out.WriteLine($"virtual size: {HumanSize(node.Length)} ({node.Length} bytes)");
        long allocated = node.AllocatedBytes;
        _out.WriteLine($"disk size: {(allocated < 0 ? "unavailable" : HumanSize(allocated))}");
        if (IsEncrypted(node))
            _out.WriteLine("encrypted: yes");
        if (node.ClusterSize > 0)
            _out.WriteLine($"cluster_size: {node.ClusterSize}");
        if (image is { IsDirty: true })
            _out.WriteLine("cleanly shut down: no");
        if (BackingOf(node) is (string backing, var backingFormat))
        {
            string full = Image.ResolveBacking(node.FileName, backing);
            _out.WriteLine(full == backing ? $"backing file: {backing}" : $"backing file: {backing} (actual path: {full})");
            if (backingFormat is not null)
                _out.WriteLine($"backing file format: {backingFormat}");
        }
        if (image is { Snapshots.Count: > 0 })
            WriteSnapshots(image);
        await SpecificHumanAsync(node).ConfigureAwait(false);
    }

    /// <summary>The lines that only one format has.</summary>
    internal async ValueTask SpecificHumanAsync(BlockNode node)
    {
        if (node is VmdkImage vmdk)
            VmdkHuman(vmdk);
        if (node is Kvasir.Block.Crypto.LuksImage plain)
        {
            _out.WriteLine("Format specific information:");
            WriteLuks(plain.Header, "    ", nested: false);
        }
        Qcow2Image? image = node as Qcow2Image;
        if (image is null)
            return;
        _out.WriteLine("Format specific information:");
        _out.WriteLine($"    compat: {(image.Version >= 3 ? "1.1" : "0.10")}");
        _out.WriteLine($"    compression type: {Name(image.CompressionType)}");
        if (image.Version < 3)
        {
            _out.WriteLine("    refcount bits: 16");
            return;
        }
        _out.WriteLine($"    lazy refcounts: {(image.LazyRefcounts ? "true" : "false")}");
        IReadOnlyList<Qcow2BitmapInfo> bitmaps = await Qcow2Bitmaps.ListAsync(image).ConfigureAwait(false);
        if (bitmaps.Count > 0)
        {
            _out.WriteLine("    bitmaps:");
            for (int i = 0; i < bitmaps.Count; i++)
            {
                _out.WriteLine($"        [{i}]:");
                _out.WriteLine("            flags:" + (bitmaps[i].InUse || bitmaps[i].Auto ? string.Empty : " "));
                int flag = 0;
                if (bitmaps[i].InUse)
                    _out.WriteLine($"                [{flag++}]: in-use");
                if (bitmaps[i].Auto)
                    _out.WriteLine($"                [{flag}]: auto");
                _out.WriteLine($"            name: {bitmaps[i].Name}");
                _out.WriteLine($"            granularity: {1L << bitmaps[i].GranularityBits}");
            }
        }
        _out.WriteLine($"    refcount bits: {image.RefcountBits}");
        if (image.Encryption == Qcow2Encryption.Aes)
            _out.WriteLine("    encrypt:\n        format: aes");
        if (image.Luks is not null)
        {
            _out.WriteLine("    encrypt:");
            WriteLuks(image.Luks, "        ", nested: true);
        }
        if (image.DataFileName is string data)
        {
            _out.WriteLine($"    data file: {data}");
            _out.WriteLine($"    data file raw: {(image.DataFileIsRaw ? "true" : "false")}");
        }
        _out.WriteLine($"    corrupt: {(image.IsCorrupt ? "true" : "false")}");
        _out.WriteLine($"    extended l2: {(image.HasExtendedL2 ? "true" : "false")}");
    }

    private void WriteLuks(Kvasir.Block.Crypto.LuksHeader luks, string indent, bool nested)
    {
        (string mode, string generator, string? generatorHash, int bits) = Describe(luks);
        _out.WriteLine($"{indent}ivgen alg: {generator}");
        _out.WriteLine($"{indent}hash alg: {luks.HashName}");
        _out.WriteLine($"{indent}cipher alg: {luks.CipherName}-{bits}");
        _out.WriteLine($"{indent}uuid: {luks.Uuid}");
        if (generatorHash is not null)
            _out.WriteLine($"{indent}ivgen hash alg: {generatorHash}");
        if (nested)
            _out.WriteLine($"{indent}format: luks");
        _out.WriteLine($"{indent}cipher mode: {mode}");
        _out.WriteLine($"{indent}slots:");
        for (int i = 0; i < Kvasir.Block.Crypto.LuksHeader.Slots; i++)
        {
            Kvasir.Block.Crypto.LuksSlot slot = luks.Slot(i);
            _out.WriteLine($"{indent}    [{i}]:");
            _out.WriteLine($"{indent}        active: {Word(slot.Active)}");
            if (slot.Active)
                _out.WriteLine($"{indent}        iters: {slot.Iterations}");
            _out.WriteLine($"{indent}        key offset: {slot.KeyOffset}");
            if (slot.Active)
                _out.WriteLine($"{indent}        stripes: {slot.Stripes}");
        }
        _out.WriteLine($"{indent}payload offset: {luks.PayloadOffset}");
        _out.WriteLine($"{indent}master key iters: {luks.MasterKeyIterations}");
    }

    private static void LuksJson(Utf8JsonWriter writer, Kvasir.Block.Crypto.LuksHeader luks, bool nested)
    {
        (string mode, string generator, string? generatorHash, int bits) = Describe(luks);
        writer.WriteString("ivgen-alg", generator);
        if (generatorHash is not null)
            writer.WriteString("ivgen-hash-alg", generatorHash);
        writer.WriteString("hash-alg", luks.HashName);
        writer.WriteString("cipher-alg", $"{luks.CipherName}-{bits}");
        writer.WriteString("uuid", luks.Uuid);
        if (nested)
            writer.WriteString("format", "luks");
        writer.WriteString("cipher-mode", mode);
        writer.WriteStartArray("slots");
        for (int i = 0; i < Kvasir.Block.Crypto.LuksHeader.Slots; i++)
        {
            Kvasir.Block.Crypto.LuksSlot slot = luks.Slot(i);
            writer.WriteStartObject();
            writer.WriteBoolean("active", slot.Active);
            if (slot.Active)
                writer.WriteNumber("iters", slot.Iterations);
            writer.WriteNumber("key-offset", slot.KeyOffset);
            if (slot.Active)
                writer.WriteNumber("stripes", slot.Stripes);
            writer.WriteEndObject();
        }
        writer.WriteEndArray();
        writer.WriteNumber("payload-offset", luks.PayloadOffset);
        writer.WriteNumber("master-key-iters", luks.MasterKeyIterations);
    }

    private static (string Mode, string Generator, string? GeneratorHash, int Bits) Describe(Kvasir.Block.Crypto.LuksHeader luks)
    {
        string[] parts = luks.CipherMode.Split('-', ':');
        return (parts[0], parts[Math.Min(1, parts.Length - 1)], parts.Length > 2 ? parts[2] : null, (parts[0] == "xts" ? luks.KeyBytes / 2 : luks.KeyBytes) * 8);
    }

    private static string Name(Qcow2Compression compression) => compression == Qcow2Compression.Zstd ? "zstd" : "zlib";

    private static async ValueTask InfoJsonAsync(Utf8JsonWriter writer, BlockNode node)
    {
        Qcow2Image? image = node as Qcow2Image;
        writer.WriteStartObject();
        (string? Name, string? Format) below = BackingOf(node);
        if (below.Format is string backingFormat)
            writer.WriteString("backing-filename-format", backingFormat);
        if (image is { Snapshots.Count: > 0 })
        {
            writer.WriteStartArray("snapshots");
            foreach (Qcow2Snapshot snapshot in image.Snapshots)
            {
                writer.WriteStartObject();
                if (snapshot.InstructionCount != ulong.MaxValue)
                    writer.WriteNumber("icount", snapshot.InstructionCount);
                writer.WriteNumber("vm-clock-nsec", snapshot.VmClock % 1_000_000_000);
                writer.WriteString("name", snapshot.Name);
                writer.WriteNumber("date-sec", snapshot.Seconds);
                writer.WriteNumber("date-nsec", snapshot.Nanoseconds);
                writer.WriteNumber("vm-clock-sec", snapshot.VmClock / 1_000_000_000);
                writer.WriteString("id", snapshot.Id);
                writer.WriteNumber("vm-state-size", snapshot.VmStateSize);
                writer.WriteEndObject();
            }
            writer.WriteEndArray();
        }
        writer.WriteNumber("virtual-size", node.Length);
        writer.WriteString("filename", node.FileName);
        if (node.ClusterSize > 0)
            writer.WriteNumber("cluster-size", node.ClusterSize);
        writer.WriteString("format", node.Driver);
        long allocated = node.AllocatedBytes;
        if (allocated >= 0)
            writer.WriteNumber("actual-size", allocated);
        if (image is not null)
            await SpecificJsonAsync(writer, image).ConfigureAwait(false);
        if (node is VmdkImage vmdk)
            VmdkJson(writer, vmdk);
        if (node is Kvasir.Block.Crypto.LuksImage luks)
        {
            writer.WriteStartObject("format-specific");
            writer.WriteString("type", "luks");
            writer.WriteStartObject("data");
            LuksJson(writer, luks.Header, nested: false);
            writer.WriteEndObject();
            writer.WriteEndObject();
        }
        if (below.Name is string backing)
        {
            writer.WriteString("full-backing-filename", Image.ResolveBacking(node.FileName, backing));
            writer.WriteString("backing-filename", backing);
        }
        if (IsEncrypted(node))
            writer.WriteBoolean("encrypted", true);
        if (node.Driver is not ("parallels" or "bochs" or "cloop" or "dmg"))
            writer.WriteBoolean("dirty-flag", image?.IsDirty ?? false);
        writer.WriteEndObject();
    }

    private static (string? Name, string? Format) BackingOf(BlockNode node) => node switch
    {
        Qcow2Image { BackingFileName: not null } image => (image.BackingFileName, image.BackingFormat),
        IOverlayFormat { BackingFileName: not null } overlay => (overlay.BackingFileName, overlay.BackingFormat),
        _ => (null, null),
    };

    private void VmdkHuman(VmdkImage image)
    {
        _out.WriteLine("Format specific information:");
        _out.WriteLine($"    cid: {image.Cid}");
        _out.WriteLine($"    parent cid: {image.ParentCid}");
        _out.WriteLine($"    create type: {image.CreateType}");
        _out.WriteLine("    extents:");
        for (int i = 0; i < image.ExtentList.Count; i++)
        {
            VmdkExtentInfo extent = image.ExtentList[i];
            _out.WriteLine($"        [{i}]:");
            if (extent.IsCompressed)
                _out.WriteLine("            compressed: true");
            _out.WriteLine($"            virtual size: {extent.Length}");
            _out.WriteLine($"            filename: {extent.FileName}");
            if (extent.ClusterSize > 0)
                _out.WriteLine($"            cluster size: {extent.ClusterSize}");
            _out.WriteLine($"            format: {extent.Format}");
        }
    }

    private static void VmdkJson(Utf8JsonWriter writer, VmdkImage image)
    {
        writer.WriteStartObject("format-specific");
        writer.WriteString("type", "vmdk");
        writer.WriteStartObject("data");
        writer.WriteNumber("cid", image.Cid);
        writer.WriteNumber("parent-cid", image.ParentCid);
        writer.WriteString("create-type", image.CreateType);
        writer.WriteStartArray("extents");
        foreach (VmdkExtentInfo extent in image.ExtentList)
        {
            writer.WriteStartObject();
            if (extent.IsCompressed)
                writer.WriteBoolean("compressed", true);
            writer.WriteNumber("virtual-size", extent.Length);
            writer.WriteString("filename", extent.FileName);
            if (extent.ClusterSize > 0)
                writer.WriteNumber("cluster-size", extent.ClusterSize);
            writer.WriteString("format", extent.Format);
            writer.WriteEndObject();
        }
        writer.WriteEndArray();
        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    private static async ValueTask SpecificJsonAsync(Utf8JsonWriter writer, Qcow2Image image)
    {
        writer.WriteStartObject("format-specific");
        writer.WriteString("type", "qcow2");
        writer.WriteStartObject("data");
        writer.WriteString("compat", image.Version >= 3 ? "1.1" : "0.10");
        writer.WriteString("compression-type", Name(image.CompressionType));
        if (image.Version >= 3)
            writer.WriteBoolean("lazy-refcounts", image.LazyRefcounts);
        IReadOnlyList<Qcow2BitmapInfo> bitmaps = await Qcow2Bitmaps.ListAsync(image).ConfigureAwait(false);
        if (bitmaps.Count > 0)
        {
            writer.WriteStartArray("bitmaps");
            foreach (Qcow2BitmapInfo bitmap in bitmaps)
            {
                writer.WriteStartObject();
                writer.WriteStartArray("flags");
                if (bitmap.InUse)
                    writer.WriteStringValue("in-use");
                if (bitmap.Auto)
                    writer.WriteStringValue("auto");
                writer.WriteEndArray();
                writer.WriteString("name", bitmap.Name);
                writer.WriteNumber("granularity", 1L << bitmap.GranularityBits);
                writer.WriteEndObject();
            }
            writer.WriteEndArray();
        }
        writer.WriteNumber("refcount-bits", image.RefcountBits);
        if (image.Encryption == Qcow2Encryption.Aes)
        {
            writer.WriteStartObject("encrypt");
            writer.WriteString("format", "aes");
            writer.WriteEndObject();
        }
        if (image.Luks is not null)
        {
            writer.WriteStartObject("encrypt");
            LuksJson(writer, image.Luks, nested: true);
            writer.WriteEndObject();
        }
        if (image.DataFileName is string data)
        {
            writer.WriteString("data-file", data);
            writer.WriteBoolean("data-file-raw", image.DataFileIsRaw);
        }
        if (image.Version >= 3)
        {
            writer.WriteBoolean("corrupt", image.IsCorrupt);
            writer.WriteBoolean("extended-l2", image.HasExtendedL2);
        }
        writer.WriteEndObject();
        writer.WriteEndObject();
    }

    private static string Word(bool value) => value ? "true" : "false";
}
