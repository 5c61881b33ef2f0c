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

/// <summary>check, map, snapshot.</summary>
public sealed partial class ImgTool
{
    private async Task<int> CheckAsync(string[] args)
    {
        const int Corruptions = 2;
        const int Leaks = 3;
        const int NotSupported = 63;
        CommandLine line = new(args, "hf:r:T:qU", "help", "repair=", "output=", "object=", "image-opts", "force-share");
        AddObjects(line);
        bool json = Json(line);
        string name = One(line);
        CheckRepair repair = (line.Value("r") ?? line.Value("repair")) switch
        {
            null => CheckRepair.None,
            "leaks" => CheckRepair.Leaks,
            "all" => CheckRepair.All,
            string other => throw new UsageException($"Unknown option value for -r (expecting 'leaks' or 'all'): {other}"),
        };
        await using BlockNode node = await OpenAsync(
            name, line.Value("f"), line.Has("image-opts"), write: repair != CheckRepair.None, cache: ParseSourceCache(line.Value("T")), share: line.Has("U") || line.Has("force-share"),
            noBacking: true, check: true, noIo: true).ConfigureAwait(false);
        Qcow2Image? image = node as Qcow2Image;
        if (image is null && !PlacesCheck.Supports(node))
        {
            _out.Flush();
            _error.WriteLine($"{_program}: This image format does not support checks");
            return NotSupported;
        }
        if (image is null && repair != CheckRepair.None)
            throw new BlockException($"Images of format '{node.Driver}' can be checked and not repaired", BlockErrno.NotSupported);
        bool quiet = line.Has("q");
        List<string> lines = [];
        CheckResult result = image is null
            ? await PlacesCheck.RunAsync(node, quiet ? null : lines.Add).ConfigureAwait(false)
            : await image.CheckAsync(repair, quiet ? null : lines.Add).ConfigureAwait(false);
        foreach (string text in lines)
            _error.WriteLine(text);
        if (result.CorruptionsFixed + result.LeaksFixed > 0)
        {
            if (!quiet && !json)
            {
                _out.WriteLine($"The following inconsistencies were found and repaired:\n\n    {result.LeaksFixed} leaked clusters\n    {result.CorruptionsFixed} corruptions\n\nDouble checking the fixed image now...");
            }
            CheckResult again = await image!.CheckAsync(CheckRepair.None, null).ConfigureAwait(false);
            again.LeaksFixed = result.LeaksFixed;
            again.CorruptionsFixed = result.CorruptionsFixed;
            result = again;
        }
        if (json)
            await CheckJsonAsync(name, node.Driver, result).ConfigureAwait(false);
        else if (!quiet)
            CheckHuman(result);
        return result.CheckErrors > 0 ? Failure : result.Corruptions > 0 ? Corruptions : result.Leaks > 0 ? Leaks : 0;
    }

    private void CheckHuman(CheckResult result)
    {
        if (result.Corruptions + result.Leaks + result.CheckErrors == 0)
        {
            _out.WriteLine("No errors were found on the image.");
        }
        else
        {
            if (result.Corruptions > 0)
                _out.WriteLine($"\n{result.Corruptions} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.");
            if (result.Leaks > 0)
                _out.WriteLine($"\n{result.Leaks} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.");
            if (result.CheckErrors > 0)
                _out.WriteLine($"\n{result.CheckErrors} internal errors have occurred during the check.");
        }
        if (result.TotalClusters != 0 && result.AllocatedClusters != 0)
        {
            _out.WriteLine(string.Create(
                CultureInfo.InvariantCulture,
                $"{result.AllocatedClusters}/{result.TotalClusters} = {result.AllocatedClusters * 100.0 / result.TotalClusters:F2}% allocated, {result.FragmentedClusters * 100.0 / result.AllocatedClusters:F2}% fragmented, {result.CompressedClusters * 100.0 / result.AllocatedClusters:F2}% compressed clusters"));
        }
        if (result.ImageEndOffset > 0)
            _out.WriteLine($"Image end offset: {result.ImageEndOffset}");
    }

    private ValueTask CheckJsonAsync(string name, string format, CheckResult result) => WriteJsonAsync(writer =>
    {
        writer.WriteStartObject();
        if (result.ImageEndOffset > 0)
            writer.WriteNumber("image-end-offset", result.ImageEndOffset);
        if (result.CorruptionsFixed > 0)
            writer.WriteNumber("corruptions-fixed", result.CorruptionsFixed);
        if (result.LeaksFixed > 0)
            writer.WriteNumber("leaks-fixed", result.LeaksFixed);
        if (result.CompressedClusters > 0)
            writer.WriteNumber("compressed-clusters", result.CompressedClusters);
        if (result.Corruptions > 0)
            writer.WriteNumber("corruptions", result.Corruptions);
        if (result.Leaks > 0)
            writer.WriteNumber("leaks", result.Leaks);
        if (result.TotalClusters > 0)
            writer.WriteNumber("total-clusters", result.TotalClusters);
        writer.WriteNumber("check-errors", result.CheckErrors);
        if (result.AllocatedClusters > 0)
            writer.WriteNumber("allocated-clusters", result.AllocatedClusters);
        writer.WriteString("filename", name);
        writer.WriteString("format", format);
        if (result.FragmentedClusters > 0)
            writer.WriteNumber("fragmented-clusters", result.FragmentedClusters);
        writer.WriteEndObject();
        return default;
    });

    private async Task<int> MapAsync(string[] args)
    {
        CommandLine line = new(args, "f:s:l:hU", "help", "output=", "object=", "image-opts", "force-share", "start-offset=", "max-length=");
        AddObjects(line);
        bool json = Json(line);
        await using BlockNode top = await OpenAsync(One(line), line.Value("f"), line.Has("image-opts"), share: line.Has("U") || line.Has("force-share")).ConfigureAwait(false);
        long offset = (line.Value("s") ?? line.Value("start-offset")) is string start ? ParseSize(start, "start offset") : 0;
        long end = (line.Value("l") ?? line.Value("max-length")) is string length ? Math.Min(top.Length, offset + ParseSize(length, "max length")) : top.Length;
        if (!json)
            _out.WriteLine($"{"Offset",-16}{"Length",-16}{"Mapped to",-16}{"File"}");
        ChainExtent pending = default;
        long pendingStart = 0;
        bool first = true;
        while (offset < end)
        {
            ChainExtent extent = await ChainStatus.AtAsync(top, offset, end - offset).ConfigureAwait(false);
            if (pending.Length > 0 && Mergeable(pending, extent))
            {
                pending = pending with { Length = pending.Length + extent.Length };
            }
            else
            {
                Emit(pending, pendingStart, json, ref first, last: false);
                (pending, pendingStart) = (extent, offset);
            }
            offset += extent.Length;
        }
        Emit(pending, pendingStart, json, ref first, last: true);
        if (json && first)
            _out.Write($"[{{ \"start\": {offset}, \"length\": 0, \"depth\": 0, \"present\": false, \"zero\": false, \"data\": false}}");
        if (json)
            _out.WriteLine("]");
        return 0;
    }

    private static bool Mergeable(ChainExtent a, ChainExtent b) =>
        Meaning(a.Flags) == Meaning(b.Flags) && a.Depth == b.Depth && ReferenceEquals(a.Node, b.Node)
        && ((a.Flags & BlockFlags.OffsetValid) == 0 || b.HostOffset == a.HostOffset + a.Length);

    private static BlockFlags Meaning(BlockFlags flags) => flags & (BlockFlags.Data | BlockFlags.Zero | BlockFlags.Allocated | BlockFlags.OffsetValid | BlockFlags.Compressed);

    private void Emit(ChainExtent extent, long start, bool json, ref bool first, bool last)
    {
        if (extent.Length == 0)
            return;
        bool data = (extent.Flags & BlockFlags.Data) != 0;
        bool zero = (extent.Flags & BlockFlags.Zero) != 0;
        bool placed = (extent.Flags & BlockFlags.OffsetValid) != 0;
        if (!json)
        {
            if (data && !placed)
                throw new BlockException("File contains external, encrypted or compressed clusters.");
            if (data && !zero)
                _out.WriteLine($"{Hex(start),-16}{Hex(extent.Length),-16}{Hex(extent.HostOffset),-16}{(extent.Node!.DataFileAt(start) ?? extent.Node).FileName}");
            return;
        }
        if (!first)
            _out.WriteLine(",");
        _out.Write(first ? "[" : string.Empty);
        first = false;
        bool present = (extent.Flags & BlockFlags.Allocated) != 0;
        _out.Write($"{{ \"start\": {start}, \"length\": {extent.Length}, \"depth\": {extent.Depth}, \"present\": {Word(present)}, \"zero\": {Word(zero)}, \"data\": {Word(data)}");
        if (placed)
            _out.Write($", \"offset\": {extent.HostOffset}");
        _out.Write("}");
        _ = last;
    }

    /// <summary>C's %#x, which gives zero no prefix.</summary>
    private static string Hex(long value) => value == 0 ? "0" : "0x" + value.ToString("x", CultureInfo.InvariantCulture);

    private async Task<int> SnapshotAsync(string[] args)
    {
        CommandLine line = new(args, "la:c:d:hqU", "help", "object=", "image-opts", "force-share");
        AddObjects(line);
        string? create = line.Value("c");
        string? apply = line.Value("a");
        string? delete = line.Value("d");
        bool list = create is null && apply is null && delete is null;
        bool share = line.Has("U") || line.Has("force-share");
        if ((create is null ? 0 : 1) + (apply is null ? 0 : 1) + (delete is null ? 0 : 1) + (line.Has("l") ? 1 : 0) > 1)
            throw new UsageException("Cannot mix '-l', '-a', '-c', '-d'");
        string name = One(line);
        await using BlockNode node = await OpenAsync(name, null, line.Has("image-opts"), write: !list, share: share, noIo: true, noBacking: true).ConfigureAwait(false);
        if (node is not Qcow2Image image)
        {
            if (list)
                return 0;
            throw new BlockException(apply is not null ? $"Could not apply snapshot '{apply}': Block driver does not support snapshots"
                : delete is not null ? $"Could not delete snapshot '{delete}': snapshot not found" : $"Could not create snapshot '{create}': -95 (Operation not supported)", BlockErrno.NotSupported);
        }
        if (list)
        {
            if (line.Has("l") && image.Snapshots.Count > 0)
                WriteSnapshots(image);
            return 0;
        }
        string wanted = create ?? apply ?? delete!;
        if (create is not null)
        {
            await image.CreateSnapshotAsync(create, TimeProvider.System.GetUtcNow()).ConfigureAwait(false);
            return 0;
        }
        // A bitmap that records would not know what applying changes.
        if (apply is not null && image.IsRecording)
            return Fail($"Could not apply snapshot '{wanted}': Device has active dirty bitmaps");
        // Deletion goes by name alone: a number could be either.
        Qcow2Snapshot? snapshot = apply is not null ? image.FindSnapshot(wanted) : System.Linq.Enumerable.FirstOrDefault(image.Snapshots, s => s.Name == wanted);
        if (snapshot is null)
            return Fail(apply is not null ? $"Could not apply snapshot '{wanted}': Failed to load snapshot: No such file or directory" : $"Could not delete snapshot '{wanted}': snapshot not found");
        if (apply is not null)
            await image.ApplySnapshotAsync(snapshot).ConfigureAwait(false);
        else
            await image.DeleteSnapshotAsync(snapshot).ConfigureAwait(false);
        return 0;
    }

    private void WriteSnapshots(Qcow2Image image)
    {
        _out.WriteLine("Snapshot list:");
        _out.WriteLine($"{"ID",-10}{"TAG",-17}{"VM SIZE",8}{"DATE",20}{"VM CLOCK",13}{"ICOUNT",11}");
        foreach (Qcow2Snapshot snapshot in image.Snapshots)
        {
            DateTimeOffset date = DateTimeOffset.FromUnixTimeSeconds(snapshot.Seconds).ToLocalTime();
            ulong clock = snapshot.VmClock / 1_000_000;
            string run = string.Create(CultureInfo.InvariantCulture, $"{clock / 3_600_000:00}:{clock / 60_000 % 60:00}:{clock / 1000 % 60:00}.{clock % 1000:000}");
            string count = snapshot.InstructionCount == ulong.MaxValue ? string.Empty : snapshot.InstructionCount.ToString(CultureInfo.InvariantCulture);
            _out.WriteLine($"{snapshot.Id,-9} {snapshot.Name,-16} {HumanSize(snapshot.VmStateSize),8}{date.ToString("yyyy-MM-dd HH:mm:ss", CultureInfo.InvariantCulture),20}{run,13}{count,11}");
        }
    }
}
