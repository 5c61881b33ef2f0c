using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>
/// A file on an NFS server (version 3 or 4), through libnfs: "nfs://host/export/path", with the library's parameters after a question mark
/// (uid, gid, version, nfsport, mountport, debug). One request at a time is under way.
/// </summary>
public sealed class NfsNode : BlockNode
{
    private const string Package = "libnfs13";
    private const int ReadWrite = 2;

    private readonly AsyncMutex _lock = new();
    private readonly Libnfs _file;
    private readonly bool _readOnly;
    private readonly int _largestRead;
    private readonly int _largestWrite;
    private long _length;

    private NfsNode(string url, Libnfs file, bool readOnly, long length, long allocated)
    {
        FileName = url;
        _file = file;
        _readOnly = readOnly;
        _length = length;
        AllocatedBytes = allocated;
        (_largestRead, _largestWrite) = (file.LargestRead, file.LargestWrite);
    }

    public override string Driver => "nfs";

    public override string FileName { get; }

    public override long Length => Volatile.Read(ref _length);

    public override bool IsReadOnly => _readOnly;

    public override bool IsGrowable => true;

    public override bool HasFastZero => false;

    /// <summary>What the file took on the server's disk when it was opened.</summary>
    public override long AllocatedBytes { get; }

    /// <exception cref="BlockException">The library is missing, or the server refuses.</exception>
    public static async ValueTask<NfsNode> OpenAsync(string url, bool readOnly)
    {
        if (!Libnfs.IsPresent)
            throw new BlockException($"nfs needs the library libnfs: install the package {Package}, or mount the share on the host and name the file", BlockErrno.NotSupported);
        return await Task.Run(() =>
        {
            Libnfs file = Libnfs.Open(url, readOnly ? 0 : ReadWrite, out string error) ?? throw new BlockException($"Failed to open '{url}': {error}", BlockErrno.Io);
            if (file.Size(out long length, out long allocated))
                return new NfsNode(url, file, readOnly, length, allocated);
            string reason = file.LastError;
            file.Dispose();
            throw new BlockException($"'{url}' does not tell its size: {reason}", BlockErrno.Io);
        }).ConfigureAwait(false);
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if (!_readOnly)
            await CallAsync("flush", _file.Flush).ConfigureAwait(false);
    }

    public override async ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        if (preallocation is not (Preallocation.Off or Preallocation.Metadata))
            throw new BlockException("A file on an NFS server cannot be preallocated", BlockErrno.NotSupported);
        await CallAsync("resize", () => _file.Resize(length)).ConfigureAwait(false);
        Volatile.Write(ref _length, length);
    }

    public override async ValueTask DisposeAsync()
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        await Task.Run(_file.Dispose).ConfigureAwait(false);
        _lock.Exit();
        await base.DisposeAsync().ConfigureAwait(false);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            Memory<byte> part = buffer[..Math.Min(buffer.Length, _largestRead)];
            long at = offset;
            int done = 0;
            await CallAsync("read", () => (done = _file.Read(at, part.Span)) >= 0).ConfigureAwait(false);
            if (done == 0)
            {
                // Past the end, where formats expect zeros.
                buffer.Span.Clear();
                return;
            }
            buffer = buffer[done..];
            offset += done;
        }
    }

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            ReadOnlyMemory<byte> part = buffer[..Math.Min(buffer.Length, _largestWrite)];
            long at = offset;
            int done = 0;
            await CallAsync("write", () =>
            {
                done = _file.Write(at, part.Span);
                if (done > 0 && at + done > _length)
                    Volatile.Write(ref _length, at + done);
                return done > 0;
            }).ConfigureAwait(false);
            buffer = buffer[done..];
            offset += done;
        }
        if ((flags & WriteFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    private async ValueTask CallAsync(string what, Func<bool> call)
    {
        await _lock.EnterAsync().ConfigureAwait(false);
        try
        {
            if (!await Task.Run(call).ConfigureAwait(false))
                throw new BlockException($"Could not {what} '{FileName}': {_file.LastError}", BlockErrno.Io);
        }
        finally
        {
            _lock.Exit();
        }
    }
}
