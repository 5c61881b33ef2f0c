using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>
/// A logical unit of an iSCSI target (RFC 7143), through libiscsi: "iscsi://[user%password@]host[:port]/target-name/lun". One request at a
/// time is under way; a lost session fails requests until the library has logged in again.
/// </summary>
public sealed class IscsiNode : BlockNode
{
    private const int LargestTransfer = 1 << 20;
    private const string Package = "libiscsi7";

    private readonly AsyncMutex _lock = new();
    private readonly Libiscsi _session;
    private readonly bool _readOnly;
    private readonly int _blockSize;

    private IscsiNode(string url, Libiscsi session, bool readOnly, long blocks, int blockSize)
    {
        FileName = url;
        _session = session;
        _readOnly = readOnly;
        _blockSize = blockSize;
        Length = blocks * blockSize;
    }

    public override string Driver => "iscsi";

    public override string FileName { get; }

    public override long Length { get; }

    public override bool IsReadOnly => _readOnly;

    public override int RequestAlignment => _blockSize;

    public override bool HasFastZero => false;

    /// <param name="url">The unit's address.</param>
    /// <param name="initiator">The name to log in with; null: Kvasir's.</param>
    /// <param name="timeout">Seconds after which a request that the target does not answer has failed; 0: it waits.</param>
    /// <param name="readOnly">Whether writes are refused.</param>
    /// <exception cref="BlockException">The library is missing, or the target refuses.</exception>
    public static async ValueTask<IscsiNode> OpenAsync(string url, string? initiator, int timeout, bool readOnly)
    {
        if (!Libiscsi.IsPresent)
            throw new BlockException($"iscsi needs the library libiscsi: install the package {Package}", BlockErrno.NotSupported);
        return await Task.Run(() =>
        {
            Libiscsi session = Libiscsi.Connect(url, initiator ?? "iqn.2026-01.org.kvasir", timeout, out string error) ?? throw new BlockException($"Failed to log in to '{url}': {error}", BlockErrno.Io);
            if (session.Capacity(out long blocks, out int blockSize) && blocks > 0 && blockSize is 512 or 1024 or 2048 or 4096 && blocks <= long.MaxValue / blockSize)
                return new IscsiNode(url, session, readOnly, blocks, blockSize);
            string reason = session.LastError;
            session.Dispose();
            throw new BlockException($"'{url}' does not tell its capacity: {reason}", BlockErrno.Io);
        }).ConfigureAwait(false);
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if (!_readOnly)
            await CallAsync("flush", _session.Flush).ConfigureAwait(false);
    }

    public override async ValueTask DisposeAsync()
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        await Task.Run(_session.Dispose).ConfigureAwait(false);
        _lock.Exit();
        await base.DisposeAsync().ConfigureAwait(false);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            Memory<byte> part = buffer[..Math.Min(buffer.Length, LargestTransfer)];
            long block = offset / _blockSize;
            await CallAsync("read", () => _session.Read(block, _blockSize, part.Span)).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        bool fua = (flags & WriteFlags.ForceUnitAccess) != 0;
        while (!buffer.IsEmpty)
        {
            ReadOnlyMemory<byte> part = buffer[..Math.Min(buffer.Length, LargestTransfer)];
            long block = offset / _blockSize;
            await CallAsync("write", () => _session.Write(block, _blockSize, part.Span, fua)).ConfigureAwait(false);
            buffer = buffer[part.Length..];
            offset += part.Length;
        }
    }

    private async ValueTask CallAsync(string what, Func<bool> call)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            if (!await Task.Run(call).ConfigureAwait(false))
                throw new BlockException($"Could not {what} '{FileName}': {_session.LastError}", BlockErrno.Io);
        }
        finally
        {
            _lock.Exit();
        }
    }
}
