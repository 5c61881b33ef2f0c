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
                _out.WriteLine(ToolVersion.Line(_program, "qemu-io"));
                return 0;
            }
            foreach (string pattern in line.Values("T"))
                ToolVersion.Trace(_program, pattern, _error);
            foreach (string pattern in line.Values("trace"))
                ToolVersion.Trace(_program, pattern, _error);
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
                ThrottleGroups = _objects.ThrottleGroups,
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
                CommandLine read = Parse("CP:iqv");
                if (read.Has("i"))
                    _out.WriteLine("injecting invalid read request");
                else
                    await LaterAsync(RunLaterAsync("readv", ReadAsync(read, "read", vector: true, later: true))).ConfigureAwait(false);
                break;
            case "write" or "w":
                await WriteAsync(Parse("bcCfnpP:qs:uz"), vector: false).ConfigureAwait(false);
                break;
            case "writev":
                await WriteAsync(Parse("CfP:q"), vector: true).ConfigureAwait(false);
                break;
            case "aio_write":
                await LaterAsync(RunLaterAsync("aio_write", WriteAsync(Parse("CfiP:quz"), vector: true))).ConfigureAwait(false);
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
                await BreakAsync(command, args).ConfigureAwait(false);
                break;
            case "reopen":
                await ReopenAsync(Parse("rwc:o:")).ConfigureAwait(false);
                break;
            default:
                throw new CommandRefusedException($"command \"{command}\" not found");
        }
    }

    /// <summary>Keeps a request that runs beside the commands; what is wrong with its words is told at once.</summary>
    private async ValueTask LaterAsync(Task request)
    {
        if (request.IsFaulted)
            await request.ConfigureAwait(false);
        _pending.Add(request);
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
}
