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
public sealed record FaultRule(FaultKind Kind, int Errno = BlockErrno.Io, long Offset = -1, int Skip = 0, bool Once = false);

/// <summary>Passes requests on and fails those that its rules name: for tests of what lies above.</summary>
public sealed class FaultNode : BlockNode
{
    private readonly Lock _lock = new();
    private readonly List<(FaultRule Rule, int Seen)> _rules = [];

    public FaultNode(BlockNode file, params ReadOnlySpan<FaultRule> rules)
    {
        File = file;
        foreach (FaultRule rule in rules)
            _rules.Add((rule, 0));
    }

    public override string Driver => "blkdebug";

    public override BlockNode File { get; }

    public override long Length => File.Length;

    public override bool IsGrowable => File.IsGrowable;

    public void Add(FaultRule rule)
    {
        lock (_lock)
            _rules.Add((rule, 0));
    }

    public void Clear()
    {
        lock (_lock)
            _rules.Clear();
    }

    public override ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        Check(FaultKind.Flush, 0, 0);
        return File.FlushAsync(cancellation);
    }

    public override ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default) =>
        File.ResizeAsync(length, preallocation, cancellation);

    internal static FaultNode FromOptions(BlockNode file, ImageOptions options)
    {
        FaultNode node = new(file);
        for (int i = 0; options.Below("inject-error." + i) is { Values.Count: > 0 } rule; i++)
        {
            FaultKind kind = (rule["iotype"] ?? rule["event"]) switch
            {
                "read" or "read_aio" => FaultKind.Read,
                "write-zeroes" => FaultKind.WriteZeroes,
                "discard" => FaultKind.Discard,
                "flush" or "flush_to_disk" => FaultKind.Flush,
                _ => FaultKind.Write,
            };
            long sector = rule.Size("sector") ?? -1;
            node.Add(new FaultRule(kind, (int)(rule.Size("errno") ?? BlockErrno.Io), sector < 0 ? -1 : sector * 512, 0, rule.Flag("once", false)));
        }
        return node;
    }

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        Check(FaultKind.Read, offset, buffer.Length);
        return File.ReadAsync(offset, buffer, cancellation);
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        Check(FaultKind.Write, offset, buffer.Length);
        return File.WriteAsync(offset, buffer, flags, cancellation);
    }

    protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        Check(FaultKind.WriteZeroes, offset, length);
        return File.WriteZeroesAsync(offset, length, flags, cancellation);
    }

    protected override ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        Check(FaultKind.Discard, offset, length);
        return File.DiscardAsync(offset, length, cancellation);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => File.StatusAsync(offset, length, cancellation);

    private void Check(FaultKind kind, long offset, long length)
    {
        lock (_lock)
        {
            for (int i = 0; i < _rules.Count; i++)
            {
                (FaultRule rule, int seen) = _rules[i];
                if (rule.Kind != kind || (rule.Offset >= 0 && (rule.Offset < offset || rule.Offset >= offset + length)))
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
