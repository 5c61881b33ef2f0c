using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Block.Qcow2;

namespace Kvasir.Img;

/// <summary>`kvasir io`: qemu-io's commands, from -c options or standard input.</summary>
public sealed partial class IoTool
{
    private const byte DefaultPattern = 0xcd;
    private const int DumpWidth = 16;

    private readonly string _program;
    private readonly TextReader _input;
    private readonly TextWriter _out;
    private readonly TextWriter _error;
    private readonly ToolObjects _objects = new();
    private readonly List<Task> _pending = [];
    private readonly System.Threading.Lock _print = new();
    private readonly bool _prompts;
    private BlockNode? _node;
    private OpenOptions _open = new() { ReadOnly = false, Probe = true };
    private string? _name;
    private bool _imageOptions;
    private bool _copyOnRead;
    private bool _throwAway;
    private bool _failed;
    private bool _quit;

    /// <param name="program">Name for messages.</param>
    /// <param name="input">Commands, when no -c gives any.</param>
    /// <param name="output">Standard output.</param>
    /// <param name="error">Standard error.</param>
    /// <param name="prompts">Show a prompt for each command that is read.</param>
    public IoTool(string program, TextReader input, TextWriter output, TextWriter error, bool prompts = true)
    {
        _program = program;
        _input = input;
        _out = output;
        _error = error;
        _prompts = prompts;
    }

    /// <summary>Runs a command line and returns the exit code.</summary>
    public async Task<int> RunAsync(string[] args)
    {
        try
        {
            CommandLine line = new(args, "hVc:d:f:rsnCmki:t:T:U", "help", "version", "cmd=", "format=", "read-only", "snapshot", "nocache", "copy-on-read", "misalign", "native-aio", "aio=", "cache=", "discard=", "trace=", "force-share", "object=", "image-opts");
            if (line.Has("h") || line.Has("help"))
            {
                _out.WriteLine($"Usage: {_program} [OPTIONS]... [-c STRING]... [file]\nOptions and commands are those of qemu-io; see '{_program} -c help'.");
                return 0;
            }
            if (line.Has("V") || line.Has("version"))
            {
                _out.WriteLine($"{_program} version 0.1.0 (command line of qemu-io 7.2)");
                return 0;
            }
            foreach (string definition in line.Values("object"))
                _objects.Add(definition);
            _imageOptions = line.Has("image-opts");
            if (_imageOptions && (line.Has("f") || line.Has("format")))
                throw new BlockException("--image-opts and -f are mutually exclusive");
            _copyOnRead = line.Has("C") || line.Has("copy-on-read");
            _throwAway = line.Has("s") || line.Has("snapshot");
            _open = _open with
            {
                Format = line.Value("f") ?? line.Value("format"),
                Probe = !line.Has("f") && !line.Has("format"),
                ReadOnly = line.Has("r") || line.Has("read-only"),
                Cache = line.Has("n") || line.Has("nocache") ? CacheMode.None : CacheOf(line.Value("t") ?? line.Value("cache")),
                Async = AsyncOf(line.Has("k") || line.Has("native-aio") ? "native" : line.Value("i") ?? line.Value("aio")),
                ForceShare = line.Has("U") || line.Has("force-share"),
                // A raw image that is only read is left to everybody, as QEMU's tools do; a writer keeps other writers out.
                Shared = (line.Value("f") ?? line.Value("format")) == "raw" && (line.Has("r") || line.Has("read-only")) ? BlockPermission.All : BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged,
                Discard = DiscardOf(line.Value("d") ?? line.Value("discard")),
                Secrets = _objects.Secrets,
                Credentials = _objects.Credentials,
            };
            if (line.Operands.Count > 1)
                throw new UsageException("Only one file can be opened at a time");
            if (line.Operands.Count == 1 && !await OpenAsync(line.Operands[0]).ConfigureAwait(false))
                return 1;
            List<string> commands = [.. line.Values("c"), .. line.Values("cmd")];
            foreach (string command in commands)
            {
                if (!_quit)
                    await ExecuteAsync(command).ConfigureAwait(false);
            }
            if (commands.Count == 0)
                await ReadCommandsAsync().ConfigureAwait(false);
        }
        catch (UsageException error)
        {
            _error.WriteLine($"{_program}: {error.Message}");
            _error.WriteLine($"Try '{_program} --help' for more information.");
            _failed = true;
        }
        catch (BlockException error)
        {
            _error.WriteLine($"{_program}: {error.Message}");
            _failed = true;
        }
        finally
        {
            await DrainAsync().ConfigureAwait(false);
            await CloseAsync().ConfigureAwait(false);
        }
        return _failed ? 1 : 0;
    }

    /// <summary>The image itself, below a filter of this tool's.</summary>
    private BlockNode? Format => _node is CopyOnReadNode filter ? filter.File : _node;

    // Requests that run beside the commands write, too: the writer is only touched with its lock held.
    private void FlushOutput()
    {
        lock (_print)
            _out.Flush();
    }

    private static CacheMode CacheOf(string? text) => text switch
    {
        null or "writeback" => CacheMode.Writeback,
        "none" or "off" => CacheMode.None,
        "writethrough" => CacheMode.Writethrough,
        "directsync" => CacheMode.DirectSync,
        "unsafe" => CacheMode.Unsafe,
        _ => throw new BlockException($"Invalid cache option: {text}"),
    };

    // io_uring is how requests are made wherever the kernel has it: "native" is taken for the same thing.
    private static Kvasir.Linux.AsyncMode AsyncOf(string? text) => text switch
    {
        null or "native" or "io_uring" => Kvasir.Linux.AsyncMode.Auto,
        "threads" => Kvasir.Linux.AsyncMode.Threads,
        _ => throw new BlockException($"Invalid aio option: {text}"),
    };

    private static bool DiscardOf(string? text) => text switch
    {
        null or "unmap" or "on" => true,
        "ignore" or "off" => false,
        _ => throw new BlockException($"Invalid discard option: {text}"),
    };

    private async ValueTask ReadCommandsAsync()
    {
        while (!_quit)
        {
            _out.Write("qemu-io> ");
            FlushOutput();
            if (await _input.ReadLineAsync().ConfigureAwait(false) is not string command)
            {
                _out.WriteLine();
                break;
            }
            await ExecuteAsync(command).ConfigureAwait(false);
        }
    }

    private async ValueTask<bool> OpenAsync(string name)
    {
        try
        {
            _name = name;
            if (_open is { ForceShare: true, ReadOnly: false })
                throw new BlockException("force-share=on can only be used with read-only images");
            OpenOptions how = _throwAway ? _open with { ReadOnly = true } : _open;
            BlockNode node = _imageOptions
                ? await Image.OpenAsync(ImageOptions.ParseList(name, "file"), how).ConfigureAwait(false)
                : await Image.OpenAsync(name, how).ConfigureAwait(false);
            if (_open.Probe && !_imageOptions && node is RawImage && !how.ReadOnly)
            {
                _error.WriteLine($"WARNING: Image format was not specified for '{name}' and probing guessed raw.");
                _error.WriteLine("         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.");
                _error.WriteLine("         Specify the 'raw' format explicitly to remove the restrictions.");
            }
            if (_throwAway && !_open.ReadOnly)
                node = await BlockBackend.CoverAsync(node).ConfigureAwait(false);
            _node = _copyOnRead && !node.IsReadOnly && node.Backing is not null ? new CopyOnReadNode(node) : node;
            return true;
        }
        catch (BlockException error)
        {
            _error.WriteLine($"{_program}: can't open{(_imageOptions ? string.Empty : $" device {name}")}: {error.Message}");
            _failed = true;
            return false;
        }
    }

    private async ValueTask CloseAsync()
    {
        if (_node is null)
            return;
        try
        {
            await _node.DisposeAsync().ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            _error.WriteLine($"{_program}: {error.Message}");
            _failed = true;
        }
        _node = null;
    }

    private async ValueTask DrainAsync()
    {
        await Task.WhenAll(_pending).ConfigureAwait(false);
        _pending.Clear();
    }

    private async ValueTask ExecuteAsync(string text)
    {
        string[] words = text.Split([' ', '\t'], StringSplitOptions.RemoveEmptyEntries);
        if (words.Length == 0)
            return;
        try
        {
            await DispatchAsync(words[0], words[1..]).ConfigureAwait(false);
        }
        catch (UsageException error)
        {
            _out.WriteLine(error.Message);
            _failed = true;
        }
        catch (CommandRefusedException error)
        {
            FlushOutput();
            _error.WriteLine(error.Message);
            _failed = true;
        }
        catch (BlockException error)
        {
            Complain(words[0], error);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException or FormatException or OverflowException or ArgumentException)
        {
            _out.WriteLine($"{words[0]} failed: {error.Message}");
            _failed = true;
        }
        FlushOutput();
    }

    private void Complain(string command, BlockException error)
    {
        lock (_print)
        {
            _out.WriteLine($"{command} failed: {BlockException.Text(error.Errno)}");
            _out.Flush();
            // More than the error's name is told where it says more than "the request is wrong".
            if (error.Errno is not (BlockErrno.Invalid or BlockErrno.Io or BlockErrno.NotSupported) || !error.Message.StartsWith("request of", StringComparison.Ordinal))
                _error.WriteLine($"{_program}: {error.Message}");
        }
        _failed = true;
    }

    private async ValueTask DispatchAsync(string command, string[] args)
    {
        if (Array.Find(s_commands, c => c.Name == command || c.Alias == command) is not Command known)
            throw new CommandRefusedException($"command \"{command}\" not found");
        if (args.Length < known.Least || args.Length > known.Most)
            throw new CommandRefusedException($"bad argument count {args.Length} to {command}, expected {known.Expects}");
        switch (command)
        {
            case "quit" or "q":
                _quit = true;
                return;
            case "help" or "?":
                Help(args);
                return;
            case "abort":
                FlushOutput();
                Environment.FailFast("abort command");
                return;
            case "sleep":
                await Task.Delay((int)Math.Min(Milliseconds(args[0]), int.MaxValue)).ConfigureAwait(false);
                return;
            case "sigraise":
                FlushOutput();
                RaiseSignal(args[0]);
                return;
            case "open" or "o":
                await OpenCommandAsync(args).ConfigureAwait(false);
                return;
            default:
                break;
        }
        if (_node is null)
            throw new CommandRefusedException("no file open, try 'help open'");
        CommandLine Parse(string letters)
        {
            try
            {
                return new CommandLine(args, letters);
            }
            catch (UsageException error) when (error.Message.StartsWith("unrecognized option", StringComparison.Ordinal))
            {
                _error.WriteLine($"{command}: invalid option -- '{error.Message[^2]}'");
                throw new UsageException(known.Line, error);
            }
        }
        switch (command)
        {
            case "close" or "c":
                await DrainAsync().ConfigureAwait(false);
                await CloseAsync().ConfigureAwait(false);
                break;
            case "read" or "r":
                await ReadAsync(Parse("abCl:pP:qs:v"), "read", vector: false).ConfigureAwait(false);
                break;
            case "readv":
                await ReadAsync(Parse("CP:qv"), "read", vector: true).ConfigureAwait(false);
                break;
            case "aio_read":
                _pending.Add(RunLaterAsync("readv", ReadAsync(Parse("CP:iqv"), "read", vector: true)));
                break;
            case "write" or "w":
                await WriteAsync(Parse("bcCfnpP:qs:uz"), vector: false).ConfigureAwait(false);
                break;
            case "writev":
                await WriteAsync(Parse("CfP:q"), vector: true).ConfigureAwait(false);
                break;
            case "aio_write":
                _pending.Add(RunLaterAsync("aio_write", WriteAsync(Parse("CfiP:quz"), vector: true)));
                break;
            case "aio_flush":
                await DrainAsync().ConfigureAwait(false);
                break;
            case "flush" or "f":
                await _node.FlushAsync().ConfigureAwait(false);
                break;
            case "discard" or "d":
                await DiscardAsync(Parse("Cq")).ConfigureAwait(false);
                break;
            case "truncate" or "t":
                await TruncateAsync(Parse("m:")).ConfigureAwait(false);
                break;
            case "length" or "l":
                _out.WriteLine(Size(_node.Length));
                break;
            case "alloc" or "a":
                await AllocAsync(args).ConfigureAwait(false);
                break;
            case "map":
                await MapAsync().ConfigureAwait(false);
                break;
            case "info" or "i":
                _out.WriteLine($"format name: {_node.Driver}");
                _out.WriteLine($"cluster size: {Size(_node.ClusterSize)}");
                _out.WriteLine($"vm state offset: {Size((Format as Qcow2Image)?.VmStateOffset ?? 0)}");
                await new ImgTool(_program, _out, _error, piped: true).SpecificHumanAsync(Format!).ConfigureAwait(false);
                break;
            case "break" or "remove_break" or "resume" or "wait_break":
                throw new UsageException(command switch
                {
                    "break" => "Could not set breakpoint: Operation not supported",
                    "resume" => "Could not resume request: Operation not supported",
                    "remove_break" => $"Could not remove breakpoint {args[0]}: Operation not supported",
                    _ => "Could not wait for a suspended request: Operation not supported",
                });
            case "reopen":
                await ReopenAsync(Parse("rwc:o:")).ConfigureAwait(false);
                break;
            default:
                throw new CommandRefusedException($"command \"{command}\" not found");
        }
    }

    private async Task RunLaterAsync(string name, ValueTask task)
    {
        try
        {
            await task.ConfigureAwait(false);
        }
        catch (BlockException error)
        {
            // Nobody waits for these: as with qemu-io they do not decide the exit code.
            bool failed = _failed;
            Complain(name, error);
            _failed = failed;
        }
    }

    private async ValueTask OpenCommandAsync(string[] args)
    {
        CommandLine line = new(args, "snCro:ki:t:d:U");
        if (_node is not null)
            throw new CommandRefusedException($"{_program}: file open already, try 'help close'");
        OpenOptions keep = _open;
        _open = _open with { ReadOnly = line.Has("r"), Cache = line.Has("n") ? CacheMode.None : CacheOf(line.Value("t")), ForceShare = line.Has("U") };
        string? name = line.Operands.Count > 0 ? line.Operands[0] : null;
        if (line.Value("o") is string options)
        {
            ImageOptions parsed = ImageOptions.ParseList(options);
            if (parsed["driver"] is string driver)
                _open = _open with { Format = driver, Probe = false };
            name ??= parsed["file.filename"] ?? parsed["filename"];
        }
        _ = await OpenAsync(name ?? throw new CommandRefusedException("bad argument count 0 to open, expected at least 1 arguments")).ConfigureAwait(false);
        _open = keep with { ReadOnly = _open.ReadOnly, Cache = _open.Cache, Format = _open.Format, Probe = _open.Probe };
    }

    private async ValueTask ReopenAsync(CommandLine line)
    {
        if (line.Has("r") && line.Has("w"))
            throw new CommandRefusedException($"{_program}: Only one -r/-w option may be given");
        if (line.Value("o") is string changed)
        {
            foreach (string key in ImageOptions.ParseList(changed).Values.Keys)
                throw new CommandRefusedException($"{_program}: Cannot change the option '{key}'");
        }
        CacheMode cacheMode = _open.Cache;
        try
        {
            cacheMode = line.Value("c") is string text ? CacheOf(text) : cacheMode;
        }
        catch (BlockException error)
        {
            throw new CommandRefusedException($"{_program}: {error.Message}", error);
        }
        await DrainAsync().ConfigureAwait(false);
        await CloseAsync().ConfigureAwait(false);
        if (line.Has("r") || line.Has("w"))
            _open = _open with { ReadOnly = line.Has("r") };
        _open = _open with { Cache = cacheMode };
        _ = await OpenAsync(_name!).ConfigureAwait(false);
    }

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
            length += Number(line.Operands[i], "length");
        return (offset, length);
    }

    private async ValueTask ReadAsync(CommandLine line, string verb, bool vector)
    {
        (long offset, long length) = Range(line, vector, vector ? "readv" : "read");
        if (length > int.MaxValue - 512)
            throw new UsageException($"length cannot exceed {int.MaxValue / 512 * 512}, given {line.Operands[1]}");
        if ((line.Has("s") || line.Has("l")) && !line.Has("P"))
            throw new UsageException(Line("read"));
        byte? pattern = line.Value("P") is string text ? Pattern(text) : null;
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
                int from = line.Value("s") is string s ? (int)Number(s, "pattern offset") : 0;
                int count = line.Value("l") is string l ? (int)Number(l, "pattern length") : data.Length - from;
                if (data.AsSpan(from, Math.Min(count, data.Length - from)).ContainsAnyExcept(expected))
                {
                    _out.WriteLine($"Pattern verification failed at offset {offset + from}, {count} bytes");
                    _failed = true;
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

    private static string Size(double bytes)
    {
        string[] units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        int unit = 0;
        while (unit < units.Length - 1 && bytes >= 1024)
        {
            bytes /= 1024;
            unit++;
        }
        string number = bytes.ToString("F3", CultureInfo.InvariantCulture);
        return (number.EndsWith(".000", StringComparison.Ordinal) ? number[..^4] : number) + " " + units[unit];
    }

    private void Report(string verb, TimeSpan time, long offset, long count, long total, bool machine)
    {
        double seconds = Math.Max(time.TotalSeconds, 1e-9);
        if (machine)
        {
            _out.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{total},1,{(int)time.TotalHours}:{time.Minutes:00}:{time.Seconds:00}.{time.Milliseconds / 10:00},{total / seconds:F3},{1 / seconds:F3}"));
            return;
        }
        _out.WriteLine($"{verb} {total}/{count} bytes at offset {offset}");
        _out.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{Size(total)}, 1 ops; {(time.TotalMinutes >= 1 ? $"{(int)time.TotalHours}:{time.Minutes:00}:" : string.Empty)}{time.Seconds:00}.{time.Milliseconds / 10:00} sec ({Size(total / seconds)}/sec and {1 / seconds:F4} ops/sec)"));
    }

    private void Dump(ReadOnlySpan<byte> data, long offset)
    {
        StringBuilder line = new();
        for (int at = 0; at < data.Length; at += DumpWidth)
        {
            line.Clear();
            line.Append(CultureInfo.InvariantCulture, $"{offset + at:x8}:  ");
            ReadOnlySpan<byte> row = data.Slice(at, Math.Min(DumpWidth, data.Length - at));
            foreach (byte value in row)
                line.Append(CultureInfo.InvariantCulture, $"{value:x2} ");
            line.Append(' ');
            foreach (byte value in row)
                line.Append(char.IsAsciiLetterOrDigit((char)value) ? (char)value : '.');
            _out.WriteLine(line.ToString());
        }
    }
}
