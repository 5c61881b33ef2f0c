using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>The commands that make requests, and breakpoints for them.</summary>
public sealed partial class IoTool
{
    private static long Number(string text, string what)
    {
        try
        {
            return ImageOptions.ParseSize(text, what);
        }
        catch (BlockException)
        {
            throw new UsageException($"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}");
        }
    }

    /// <summary>A byte as strtol(3) reads it: 0x for hexadecimal, 0 for octal.</summary>
    private static byte Pattern(string text)
    {
        long value = -1;
        if (text.StartsWith("0x", StringComparison.OrdinalIgnoreCase))
            _ = long.TryParse(text.AsSpan(2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out value);
        else if (text.Length > 1 && text[0] == '0' && text.AsSpan().IndexOfAnyExceptInRange('0', '7') < 0 && text.Length < 8)
            value = Convert.ToInt64(text, 8);
        else if (!long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out value))
            value = -1;
        return value is >= 0 and <= 255 ? (byte)value : throw new UsageException($"{text} is not a valid pattern byte");
    }

    private static long Milliseconds(string text) =>
        long.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out long value) ? value : throw new UsageException($"{text} is not a valid number");

    private static (long Offset, long Length) Range(CommandLine line, bool vector, string name)
    {
        if (line.Operands.Count < 2 || (!vector && line.Operands.Count > 2))
            throw new UsageException(Line(name));
        long offset = Number(line.Operands[0], "offset");
        long length = 0;
        for (int i = 1; i < line.Operands.Count; i++)
        {
            long part = Number(line.Operands[i], "length");
            length = part <= long.MaxValue - length ? length + part : throw new UsageException("the lengths are too large");
        }
        return (offset, length);
    }

    private async ValueTask ReadAsync(CommandLine line, string verb, bool vector, bool later = false)
    {
        (long offset, long length) = Range(line, vector, vector ? "readv" : "read");
        if (length > int.MaxValue - 512)
            throw new UsageException($"length cannot exceed {int.MaxValue / 512 * 512}, given {line.Operands[1]}");
        if ((line.Has("s") || line.Has("l")) && !line.Has("P"))
            throw new UsageException(Line("read"));
        byte? pattern = line.Value("P") is string text ? Pattern(text) : null;
        long from = line.Value("s") is string s ? Number(s, "pattern offset") : 0;
        long count = line.Value("l") is string l ? Number(l, "pattern length") : length - from;
        if (count < 0 || from > length - count)
            throw new UsageException("pattern verification range exceeds end of read data");
        byte[] data = new byte[length];
        long start = Stopwatch.GetTimestamp();
        if (line.Has("b"))
            await ((Format as Qcow2Image) ?? throw new BlockException("no VM state in this format", BlockErrno.NotSupported)).ReadVmStateAsync(offset, data).ConfigureAwait(false);
        else
            await _node!.ReadAsync(offset, data).ConfigureAwait(false);
        TimeSpan time = Stopwatch.GetElapsedTime(start);
        lock (_print)
        {
            if (pattern is byte expected)
            {
                if (data.AsSpan((int)from, (int)count).ContainsAnyExcept(expected))
                {
                    _out.WriteLine($"Pattern verification failed at offset {offset + from}, {count} bytes");
                    // As with qemu-io, what runs beside the commands does not decide the exit code.
                    _failed |= !later;
                }
            }
            if (line.Has("q"))
                return;
            if (line.Has("v"))
                Dump(data, offset);
            Report(verb, time, offset, length, length, line.Has("C"));
        }
    }

    private async ValueTask WriteAsync(CommandLine line, bool vector)
    {
        (long offset, long length) = Range(line, vector, vector ? "writev" : "write");
        if ((line.Has("z") ? 1 : 0) + (line.Has("P") ? 1 : 0) + (line.Has("s") ? 1 : 0) > 1)
            throw new UsageException("Only one of -z, -P, and -s can be specified at the same time");
        if (line.Has("b") && line.Has("z"))
            throw new UsageException("-b and -z cannot be specified at the same time");
        if (line.Has("i"))
        {
            _out.WriteLine("injecting invalid write request");
            return;
        }
        if (_node!.IsReadOnly)
            throw new CommandRefusedException($"{_program}: Block node is read-only");
        if (line.Has("c") && (offset & 511) != 0)
            throw new UsageException($"{offset} is not a sector-aligned value for 'offset'");
        if ((line.Has("u") || line.Has("n")) && !line.Has("z"))
            throw new UsageException($"-{(line.Has("u") ? 'u' : 'n')} requires -z to be specified");
        bool fua = line.Has("f");
        long start = Stopwatch.GetTimestamp();
        if (line.Has("z"))
        {
            ZeroFlags flags = (line.Has("u") && _open.Discard ? ZeroFlags.MayUnmap : 0) | (line.Has("n") ? ZeroFlags.NoFallback : 0) | (fua ? ZeroFlags.ForceUnitAccess : 0);
            await _node!.WriteZeroesAsync(offset, length, flags).ConfigureAwait(false);
        }
        else
        {
            if (length > int.MaxValue - 512)
                throw new UsageException($"length cannot exceed {int.MaxValue / 512 * 512}, given {line.Operands[1]}");
            byte[] data = new byte[length];
            if (line.Value("s") is string file)
                Repeat(await ReadPatternAsync(file).ConfigureAwait(false), data);
            else
                data.AsSpan().Fill(line.Value("P") is string text ? Pattern(text) : DefaultPattern);
            start = Stopwatch.GetTimestamp();
            if (line.Has("b"))
                await ((Format as Qcow2Image) ?? throw new BlockException("no VM state in this format", BlockErrno.NotSupported)).WriteVmStateAsync(offset, data).ConfigureAwait(false);
            else
                await _node!.WriteAsync(offset, data, (fua ? WriteFlags.ForceUnitAccess : WriteFlags.None) | (line.Has("c") ? WriteFlags.Compressed : WriteFlags.None)).ConfigureAwait(false);
        }
        TimeSpan time = Stopwatch.GetElapsedTime(start);
        if (line.Has("q"))
            return;
        lock (_print)
            Report("wrote", time, offset, length, length, line.Has("C"));
    }

    private static async ValueTask<byte[]> ReadPatternAsync(string file)
    {
        try
        {
            return await File.ReadAllBytesAsync(file).ConfigureAwait(false);
        }
        catch (FileNotFoundException error)
        {
            throw new CommandRefusedException($"{file}: No such file or directory", error);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new CommandRefusedException($"{file}: {error.Message}", error);
        }
    }

    private static void Repeat(byte[] pattern, byte[] data)
    {
        if (pattern.Length == 0)
            throw new UsageException("the pattern file is empty");
        for (int at = 0; at < data.Length; at += pattern.Length)
            pattern.AsSpan(0, Math.Min(pattern.Length, data.Length - at)).CopyTo(data.AsSpan(at));
    }

    private async ValueTask DiscardAsync(CommandLine line)
    {
        (long offset, long length) = Range(line, vector: false, "discard");
        long start = Stopwatch.GetTimestamp();
        // An image opened to ignore discards still says where they would have failed.
        if (_open.Discard || offset + length > _node!.Length)
            await _node!.DiscardAsync(offset, length).ConfigureAwait(false);
        if (!line.Has("q"))
            Report("discard", Stopwatch.GetElapsedTime(start), offset, length, length, line.Has("C"));
    }

    private async ValueTask TruncateAsync(CommandLine line)
    {
        if (line.Operands.Count != 1)
            throw new UsageException(Line("truncate"));
        await _node!.ResizeAsync(Number(line.Operands[0], "length"), PreallocationOf(line.Value("m"))).ConfigureAwait(false);
    }

    private Preallocation PreallocationOf(string? text)
    {
        try
        {
            return ImageCreator.ParsePreallocation(text);
        }
        catch (BlockException error)
        {
            throw new CommandRefusedException($"{_program}: {error.Message}", error);
        }
    }

    private async ValueTask AllocAsync(string[] args)
    {
        long offset = Number(args[0], "offset");
        long count = args.Length > 1 ? Number(args[1], "count") : 512;
        // What lies past the end is not asked for.
        count = Math.Max(0, Math.Min(count, _node!.Length - offset));
        long allocated = 0;
        for (long at = offset; at < offset + count;)
        {
            BlockStatus status = await _node!.StatusAsync(at, offset + count - at).ConfigureAwait(false);
            if (status.Length == 0)
                break;
            allocated += status.IsAllocated ? status.Length : 0;
            at += status.Length;
        }
        _out.WriteLine($"{allocated}/{count} bytes allocated at offset {Size(offset)}");
    }

    private async ValueTask MapAsync()
    {
        long offset = 0;
        while (offset < _node!.Length)
        {
            BlockStatus first = await _node.StatusAsync(offset, _node.Length - offset).ConfigureAwait(false);
            long run = first.Length;
            while (offset + run < _node.Length)
            {
                BlockStatus next = await _node.StatusAsync(offset + run, _node.Length - offset - run).ConfigureAwait(false);
                if (next.IsAllocated != first.IsAllocated || next.Length == 0)
                    break;
                run += next.Length;
            }
            _out.WriteLine($"{Size(run)} (0x{run:x}) bytes {(first.IsAllocated ? "    allocated" : "not allocated")} at offset {Size(offset)} (0x{offset:x})");
            offset += run;
        }
    }

    private void Say(string text)
    {
        lock (_print)
            _out.WriteLine(text);
    }

    /// <summary>Breakpoints of a blkdebug node anywhere below.</summary>
    private async ValueTask BreakAsync(string command, string[] args)
    {
        BlockNode? node = _node;
        while (node is not null and not FaultNode)
            node = node.File;
        FaultNode? faults = node as FaultNode;
        switch (command)
        {
            case "break":
                if (faults is null || FaultNode.KindOf(args[0]) is not FaultKind kind)
                    throw new UsageException($"Could not set breakpoint: {(faults is null ? "Operation not supported" : "No such file or directory")}");
                faults.Report ??= Say;
                faults.Break(kind, args[1]);
                break;
            case "remove_break":
                if (faults?.RemoveBreak(args[0]) != true)
                    throw new UsageException($"Could not remove breakpoint {args[0]}: {(faults is null ? "Operation not supported" : "No such file or directory")}");
                break;
            case "resume":
                if (faults?.Resume(args[0]) != true)
                    throw new UsageException($"Could not resume request: {(faults is null ? "Operation not supported" : "No such file or directory")}");
                break;
            default:
                if (faults is null)
                    throw new UsageException("Could not wait for a suspended request: Operation not supported");
                await faults.WaitBreakAsync(args[0]).ConfigureAwait(false);
                break;
        }
    }
}
