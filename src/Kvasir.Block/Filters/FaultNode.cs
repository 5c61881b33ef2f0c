using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Filters;

public enum FaultKind
{
    Read,
    Write,
    WriteZeroes,
    Discard,
    Flush,
}

/// <summary>A failure to inject.</summary>
/// <param name="Kind">Which requests.</param>
/// <param name="Errno">What they fail with.</param>
/// <param name="Offset">Only requests that touch this byte; -1: any.</param>
/// <param name="Skip">Requests of the kind to let pass first.</param>
/// <param name="Once">Only one request.</param>
/// <param name="AfterOpen">Not before the format above has opened its image.</param>
public sealed record FaultRule(FaultKind Kind, int Errno = BlockErrno.Io, long Offset = -1, int Skip = 0, bool Once = false, bool AfterOpen = false);

/// <summary>Passes requests on and fails those that its rules name: for tests of what lies above.</summary>
public sealed class FaultNode : BlockNode
{
    private readonly Lock _lock = new();
    private readonly List<(FaultRule Rule, int Seen)> _rules = [];
    private readonly List<(FaultKind Kind, string Tag)> _breakpoints = [];
    private readonly Dictionary<string, TaskCompletionSource> _suspended = new(StringComparer.Ordinal);
    private readonly Dictionary<string, TaskCompletionSource> _awaited = new(StringComparer.Ordinal);
    private bool _open;

    public FaultNode(BlockNode file, params ReadOnlySpan<FaultRule> rules)
    {
        File = file;
        foreach (FaultRule rule in rules)
            _rules.Add((rule, 0));
    }

    /// <summary>Is told when a request stops and when it goes on, as QEMU's tools say it.</summary>
    public Action<string>? Report { get; set; }

    public override string Driver => "blkdebug";

    public override BlockNode File { get; }

    public override long Length => File.Length;

    public override bool IsGrowable => File.IsGrowable;

    public void Add(FaultRule rule)
    {
        lock (_lock)
            _rules.Add((rule, 0));
    }

    /// <summary>The format above has opened its image: rules that wait for that count from now on.</summary>
    public void Arm()
    {
        lock (_lock)
            _open = true;
    }

    public void Clear()
    {
        lock (_lock)
            _rules.Clear();
    }

    /// <summary>The next request of a kind stops before it reaches what lies below, until it is resumed by the tag.</summary>
    public void Break(FaultKind kind, string tag)
    {
        lock (_lock)
            _breakpoints.Add((kind, tag));
    }

    /// <summary>Takes a breakpoint away, and lets go on what one of this tag has stopped; false: none waits for a request.</summary>
    public bool RemoveBreak(string tag)
    {
        lock (_lock)
        {
            bool found = _breakpoints.RemoveAll(b => b.Tag == tag) > 0;
            _ = Resume(tag);
            return found;
        }
    }

    /// <summary>Lets a stopped request go on; false: none is stopped under the tag.</summary>
    public bool Resume(string tag)
    {
        lock (_lock)
        {
            if (!_suspended.Remove(tag, out TaskCompletionSource? stopped))
                return false;
            _awaited.Remove(tag);
            Report?.Invoke($"blkdebug: Resuming request '{tag}'");
            stopped.SetResult();
            return true;
        }
    }

    /// <summary>Waits until a request is stopped under a tag.</summary>
    public Task WaitBreakAsync(string tag)
    {
        lock (_lock)
        {
            if (_suspended.ContainsKey(tag))
                return Task.CompletedTask;
            if (!_awaited.TryGetValue(tag, out TaskCompletionSource? waiting))
                _awaited[tag] = waiting = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            return waiting.Task;
        }
    }

    /// <summary>The kind of request that an event's name means; null: an event inside a format, which is not seen from here.</summary>
    public static FaultKind? KindOf(string name) => name switch
    {
        "read" or "read_aio" or "read_backing_aio" => FaultKind.Read,
        "write" or "write_aio" or "pwritev" or "cor_write" => FaultKind.Write,
        "write-zeroes" or "pwritev_zero" => FaultKind.WriteZeroes,
        "discard" => FaultKind.Discard,
        "flush" or "flush_to_disk" or "flush_to_os" => FaultKind.Flush,
        _ => null,
    };

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        await CheckAsync(FaultKind.Flush, 0, 0).ConfigureAwait(false);
        await File.FlushAsync(cancellation).ConfigureAwait(false);
    }

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        File.ResizeAsync(length, preallocation, cancellation);

    internal static FaultNode FromOptions(BlockNode file, ImageOptions options)
    {
        FaultNode node = new(file);
        // With one rule QEMU also takes it without a number; a set of rules comes as numbered entries.
        if (options.Below("inject-error").Values.Count > 0 && options.Below("inject-error.0").Values.Count == 0)
            throw new BlockException("inject-error rules are numbered: inject-error.0.event=...");
        for (int i = 0; options.Below("inject-error." + i) is { Values.Count: > 0 } rule; i++)
        {
            string name = rule["iotype"] ?? rule["event"] ?? throw new BlockException("Parameter 'event' is missing");
            FaultKind kind = KindOf(name)
                ?? throw new BlockException($"blkdebug event '{name}' is not supported: faults are injected by kind of request (read, write, write-zeroes, discard, flush)", BlockErrno.NotSupported);
            long sector = rule.Size("sector") ?? -1;
            node.Add(new FaultRule(kind, (int)(rule.Size("errno") ?? BlockErrno.Io), sector < 0 ? -1 : sector * 512, 0, rule.Flag("once", false), rule["iotype"] is null));
        }
        return node;
    }

    /// <summary>Rules in the form of QEMU's configuration files: sections [inject-error] of lines key = "value".</summary>
    internal static ImageOptions ParseRules(string text)
    {
        ImageOptions options = new();
        int rule = -1;
        foreach (string raw in text.Split('\n'))
        {
            string line = raw.Trim();
            if (line.Length == 0 || line[0] == '#')
                continue;
            if (line[0] == '[')
            {
                rule = line == "[inject-error]" ? rule + 1 : throw new BlockException($"blkdebug section {line} is not supported", BlockErrno.NotSupported);
                continue;
            }
            int equals = line.IndexOf('=', StringComparison.Ordinal);
            if (equals < 0 || rule < 0)
                throw new BlockException($"Could not parse blkdebug config file: '{line}'");
            options[$"inject-error.{rule}.{line[..equals].Trim()}"] = line[(equals + 1)..].Trim().Trim('"');
        }
        return options;
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        await CheckAsync(FaultKind.Read, offset, buffer.Length).ConfigureAwait(false);
        await File.ReadAsync(offset, buffer, cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await CheckAsync(FaultKind.Write, offset, buffer.Length).ConfigureAwait(false);
        await File.WriteAsync(offset, buffer, flags, cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        await CheckAsync(FaultKind.WriteZeroes, offset, length).ConfigureAwait(false);
        await File.WriteZeroesAsync(offset, length, flags, cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        await CheckAsync(FaultKind.Discard, offset, length).ConfigureAwait(false);
        await File.DiscardAsync(offset, length, cancellation).ConfigureAwait(false);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) =>
        ChainStatus.BelowAsync(File, offset, length, cancellation);

    /// <summary>Stops the request where a breakpoint waits for its kind, and fails it where a rule says so.</summary>
    private ValueTask CheckAsync(FaultKind kind, long offset, long length)
    {
        lock (_lock)
        {
            int at = _breakpoints.FindIndex(b => b.Kind == kind && !_suspended.ContainsKey(b.Tag));
            if (at < 0)
            {
                Check(kind, offset, length);
                return default;
            }
            string tag = _breakpoints[at].Tag;
            _breakpoints.RemoveAt(at);
            TaskCompletionSource stopped = new(TaskCreationOptions.RunContinuationsAsynchronously);
            _suspended.Add(tag, stopped);
            Report?.Invoke($"blkdebug: Suspended request '{tag}'");
            if (_awaited.Remove(tag, out TaskCompletionSource? waiting))
                waiting.SetResult();
            return StopAsync(stopped.Task, kind, offset, length);
        }
    }

    private async ValueTask StopAsync(Task resumed, FaultKind kind, long offset, long length)
    {
        await resumed.ConfigureAwait(false);
        Check(kind, offset, length);
    }

    private void Check(FaultKind kind, long offset, long length)
    {
        lock (_lock)
        {
            for (int i = 0; i < _rules.Count; i++)
            {
                (FaultRule rule, int seen) = _rules[i];
                if (rule.Kind != kind || (rule.AfterOpen && !_open) || (rule.Offset >= 0 && (rule.Offset < offset || rule.Offset >= offset + length)))
                    continue;
                _rules[i] = (rule, seen + 1);
                if (seen < rule.Skip)
                    continue;
                if (rule.Once)
                    _rules.RemoveAt(i);
                throw BlockException.FromErrno($"injected {kind} fault at {offset}", rule.Errno);
            }
        }
    }
}
