using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Text;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Qcow2;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>`kvasir img`: qemu-img's commands. One instance runs one command.</summary>
public sealed partial class ImgTool
{
    private const int Failure = 1;

    private readonly string _program;
    private readonly TextWriter _out;
    private readonly TextWriter _error;
    private readonly bool _piped;
    private readonly ToolObjects _objects = new();

    /// <param name="program">Name for messages.</param>
    /// <param name="output">Standard output.</param>
    /// <param name="error">Standard error.</param>
    /// <param name="piped">Output is no terminal.</param>
    public ImgTool(string program, TextWriter output, TextWriter error, bool piped)
    {
        _program = program;
        _out = output;
        _error = error;
        _piped = piped;
    }

    /// <summary>Runs a command line and returns the exit code.</summary>
    public async Task<int> RunAsync(string[] args)
    {
        if (args.Length == 0)
            return Complain("Not enough arguments");
        try
        {
            args = SkipTrace(args);
            // Tracing nothing and doing nothing is no mistake, as qemu-img has it.
            if (args.Length == 0)
                return 0;
            string command = args[0];
            string[] rest = args[1..];
            return command switch
            {
                "create" => await CreateAsync(rest).ConfigureAwait(false),
                "info" => await InfoAsync(rest).ConfigureAwait(false),
                "check" => await CheckAsync(rest).ConfigureAwait(false),
                "map" => await MapAsync(rest).ConfigureAwait(false),
                "snapshot" => await SnapshotAsync(rest).ConfigureAwait(false),
                "convert" => await ConvertAsync(rest).ConfigureAwait(false),
                "compare" => await CompareAsync(rest).ConfigureAwait(false),
                "resize" => await ResizeAsync(rest).ConfigureAwait(false),
                "commit" => await CommitAsync(rest).ConfigureAwait(false),
                "rebase" => await RebaseAsync(rest).ConfigureAwait(false),
                "measure" => await MeasureAsync(rest).ConfigureAwait(false),
                "amend" => await AmendAsync(rest).ConfigureAwait(false),
                "bitmap" => await BitmapAsync(rest).ConfigureAwait(false),
                "dd" => await DdAsync(rest).ConfigureAwait(false),
                "bench" => await BenchAsync(rest).ConfigureAwait(false),
                "-h" or "--help" => Help(),
                "-V" or "--version" => Version(),
                _ => Complain($"Command not found: {command}"),
            };
        }
        catch (UsageException error)
        {
            return Complain(error.Message);
        }
        catch (BlockException error)
        {
            return Fail(error.Message);
        }
        catch (Exception error) when (error is LinuxException or IOException or UnauthorizedAccessException or FormatException or OverflowException)
        {
            return Fail(error.Message);
        }
    }

    /// <summary>Takes the tracing options off that may stand before the command.</summary>
    private string[] SkipTrace(string[] args)
    {
        while (args.Length > 0 && (args[0].StartsWith("-T", StringComparison.Ordinal) || args[0] == "--trace" || args[0].StartsWith("--trace=", StringComparison.Ordinal)))
        {
            bool apart = args[0] is "-T" or "--trace";
            if (apart && args.Length == 1)
                throw new UsageException($"missing argument for option '{args[0]}'");
            ToolVersion.Trace(_program, apart ? args[1] : args[0][(args[0][1] == 'T' ? 2 : 8)..], _error);
            args = args[(apart ? 2 : 1)..];
        }
        return args;
    }

    private int Help()
    {
        _out.WriteLine($"usage: {_program} command [command options]");
        _out.WriteLine("Options and output are those of qemu-img(1).");
        _out.WriteLine();
        _out.WriteLine("Command syntax:");
        foreach (string syntax in s_syntax)
            _out.WriteLine("  " + syntax);
        _out.WriteLine();
        _out.WriteLine("Supported formats: blkdebug file host_device http https luks nbd null-co qcow2 raw throttle vdi vhdx vmdk vpc; read-only: bochs cloop dmg parallels qcow qed");
        return 0;
    }

    private static readonly string[] s_syntax =
    [
        "amend [--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o options filename",
        "bench [-c count] [-d depth] [-f fmt] [--flush-interval=N] [-i aio] [-n] [--no-drain] [-o offset] [--pattern=byte] [-q] [-s size] [-S step] [-t cache] [-w] [-U] filename",
        "bitmap (--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b source_file [-F source_fmt]] [-g granularity] [--object objectdef] [--image-opts | -f fmt] filename bitmap",
        "check [--object objectdef] [--image-opts] [-q] [-f fmt] [--output=human|json] [-r leaks|all] [-T src_cache] [-U] filename",
        "commit [--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] filename",
        "compare [--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2",
        "convert [--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps [--skip-broken-bitmaps]] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot] [-S sparse_size] [-r rate_limit] [-m workers] [-W] [--salvage] filename [filename2 ...] output_filename",
        "create [--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]",
        "dd [--object objectdef] [--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output",
        "info [--object objectdef] [--image-opts] [-f fmt] [--output=human|json] [--backing-chain] [-U] filename",
        "map [--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] [--output=human|json] [-U] filename",
        "measure [--output=human|json] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] [-f fmt] [-l snapshot] filename]",
        "snapshot [--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] filename",
        "rebase [--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] -b backing_file [-F backing_fmt] filename",
        "resize [--object objectdef] [--image-opts] [-f fmt] [--preallocation=mode] [-q] [--shrink] filename [+ | -]size",
    ];

    private int Version()
    {
        _out.WriteLine(ToolVersion.Line(_program, "qemu-img"));
        return 0;
    }

    private int Complain(string message)
    {
        _out.Flush();
        _error.WriteLine($"{_program}: {message}");
        _error.WriteLine($"Try '{_program} --help' for more information");
        return Failure;
    }

    private int Fail(string message)
    {
        _out.Flush();
        // The lines of the size message carry the program's name each, hints stand alone.
        _error.WriteLine($"{_program}: {message.Replace("\nkilobytes", $"\n{_program}: kilobytes", StringComparison.Ordinal)}");
        return Failure;
    }

    private IReadOnlyDictionary<string, ReadOnlyMemory<byte>> Secrets => _objects.Secrets;

    /// <summary>Takes in all --object options of a command line.</summary>
    private void AddObjects(CommandLine line)
    {
        foreach (string definition in line.Values("object"))
            _objects.Add(definition);
    }

    private static CacheMode ParseCache(string? text, CacheMode fallback) => text switch
    {
        null => fallback,
        "none" or "off" => CacheMode.None,
        "writeback" => CacheMode.Writeback,
        "writethrough" => CacheMode.Writethrough,
        "directsync" => CacheMode.DirectSync,
        "unsafe" => CacheMode.Unsafe,
        _ => throw new BlockException($"Invalid cache option: {text}"),
    };

    /// <summary>The cache mode for reading sources (-T).</summary>
    private static CacheMode ParseSourceCache(string? text)
    {
        try
        {
            return ParseCache(text, CacheMode.Writeback);
        }
        catch (BlockException error)
        {
            throw new BlockException($"Invalid source cache option: {text}", error);
        }
    }

    private async ValueTask<BlockNode> OpenAsync(
        string name, string? format, bool imageOptions, bool write = false, CacheMode cache = CacheMode.Writeback, bool share = false, bool noBacking = false, bool check = false, bool noIo = false, bool threads = false)
    {
        OpenOptions options = new()
        {
            Format = format,
            Probe = format is null,
            ReadOnly = !write,
            Cache = cache,
            ForceShare = share,
            NoBacking = noBacking,
            ForCheck = check,
            NoIo = noIo,
            Async = threads ? AsyncMode.Threads : AsyncMode.Auto,
            Secrets = Secrets,
            Credentials = _objects.Credentials,
            ThrottleGroups = _objects.ThrottleGroups,
            // Reading an image that a guest writes is for the guest's process to allow, not for the reader to forbid.
            Shared = write ? BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged : BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged | (format == "raw" ? BlockPermission.All : BlockPermission.None),
        };
        if (imageOptions && format is not null)
            throw new BlockException("--image-opts and --format are mutually exclusive");
        if (share && write)
            throw new BlockException($"Could not open '{name}': force-share=on can only be used with read-only images");
        BlockNode node = await OpenNamedAsync(name, imageOptions, options).ConfigureAwait(false);
        if (write && format is null && node is RawImage)
        {
            _error.WriteLine($"WARNING: Image format was not specified for '{name}' and probing guessed raw.");
            _error.WriteLine("         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.");
            _error.WriteLine("         Specify the 'raw' format explicitly to remove the restrictions.");
        }
        return node;
    }

    private static async ValueTask<BlockNode> OpenNamedAsync(string name, bool imageOptions, OpenOptions options)
    {
        if (!imageOptions)
            return await Image.OpenAsync(name, options).ConfigureAwait(false);
        try
        {
            return await Image.OpenAsync(ImageOptions.ParseList(name, "file"), options).ConfigureAwait(false);
        }
        catch (BlockException error) when (!error.Message.StartsWith("Could not open", StringComparison.Ordinal))
        {
            throw new BlockException($"Could not open '{name}': {error.Message}", error.Errno);
        }
    }

    private static string One(CommandLine line) => line.Operands.Count == 1 ? line.Operands[0] : throw new UsageException("Expecting one image file name");

    private static bool Json(CommandLine line) => line.Value("output") switch
    {
        null or "human" => false,
        "json" => true,
        _ => throw new BlockException("--output must be used with human or json as argument."),
    };

    private static long ParseSize(string text, string what)
    {
        try
        {
            return ImageOptions.ParseSize(text, what);
        }
        catch (BlockException error)
        {
            // A number that is only too large is told apart from what is none.
            if (text.Length > 0 && text.AsSpan(0, text.Length - 1).IndexOfAnyExceptInRange('0', '9') < 0 && "0123456789bkKmMgGtTpPeE".Contains(text[^1], StringComparison.Ordinal))
                throw new BlockException($"Invalid {what} specified. Must be between 0 and {long.MaxValue}.", error);
            throw new BlockException($"Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\nkilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.", error);
        }
    }

    /// <summary>A size as qemu-img writes it: up to three significant digits and a binary unit.</summary>
    internal static string HumanSize(long bytes)
    {
        string[] units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        int unit = 0;
        double value = bytes;
        while (unit < units.Length - 1 && value >= 1000)
        {
            // 1000 of a unit is "0.977" of the next one, never a four-digit number.
            value /= 1024;
            unit++;
        }
        return Significant(value, 3) + " " + units[unit];
    }

    /// <summary>C's %0.{digits}g for the numbers that occur here.</summary>
    internal static string Significant(double value, int digits)
    {
        if (value == 0)
            return "0";
        int exponent = (int)Math.Floor(Math.Log10(Math.Abs(value)));
        int decimals = Math.Max(0, digits - 1 - exponent);
        string text = value.ToString("F" + decimals.ToString(CultureInfo.InvariantCulture), CultureInfo.InvariantCulture);
        return text.Contains('.', StringComparison.Ordinal) ? text.TrimEnd('0').TrimEnd('.') : text;
    }

    private ProgressLine Progress(bool wanted) => new(wanted ? _out : null);

    /// <summary>The "(12.34/100%)" line.</summary>
    private sealed class ProgressLine(TextWriter? output)
    {
        private readonly System.Threading.Lock _lock = new();
        private double _last = -1;

        public void Report(long done, long total)
        {
            if (output is null)
                return;
            double percent = total == 0 ? 100 : 100.0 * done / total;
            lock (_lock)
            {
                if (percent < _last + 0.5)
                    return;
                _last = percent;
                output.Write(string.Create(CultureInfo.InvariantCulture, $"    ({percent:F2}/100%)\r"));
                output.Flush();
            }
        }

        public void End()
        {
            if (output is null)
                return;
            lock (_lock)
                output.WriteLine("    (100.00/100%)");
        }
    }
}
