using System;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>
/// A file on an NFS server (version 3 or 4), through libnfs: "nfs://host/export/path", with the library's parameters after a question mark
/// (uid, gid, version, nfsport, mountport, debug). One request at a time is under way, in as many pieces as the server and the library want.
/// </summary>
public sealed class NfsNode : BlockNode
{
    private const string Package = "libnfs13";
    private const int ReadWrite = 2;
    private const int CreateMode = 0b110_000_000;

    private readonly AsyncMutex _lock = new();
    private readonly Libnfs _file;
    private readonly bool _readOnly;
    private long _length;

    private NfsNode(string url, Libnfs file, bool readOnly, long length, long allocated)
    {
        FileName = url;
        _file = file;
        _readOnly = readOnly;
        _length = length;
        AllocatedBytes = allocated;
    }

    public override string Driver => "nfs";

    public override string FileName { get; }

    public override long Length => Volatile.Read(ref _length);

    public override bool IsReadOnly => _readOnly;

    public override bool IsGrowable => true;

    public override bool HasFastZero => false;

    public override bool IsZeroWhenCreated => true;

    /// <summary>What the file took on the server's disk when it was opened.</summary>
    public override long AllocatedBytes { get; }

    /// <exception cref="BlockException">The library is missing, or the server refuses.</exception>
    public static ValueTask<NfsNode> OpenAsync(string url, bool readOnly) => OpenAsync(url, readOnly, 0);

    /// <summary>Creates a file, or empties the one there.</summary>
    /// <exception cref="BlockException">The library is missing, or the server refuses.</exception>
    public static ValueTask<NfsNode> CreateAsync(string url) => OpenAsync(url, readOnly: false, CreateMode);

    private static async ValueTask<NfsNode> OpenAsync(string url, bool readOnly, int createMode)
    {
        if (!Libnfs.IsPresent)
            throw new BlockException($"nfs needs the library libnfs: install the package {Package}, or mount the share on the host and name the file", BlockErrno.NotSupported);
        return await Task.Run(() =>
        {
            Libnfs file = Libnfs.Open(url, readOnly ? 0 : ReadWrite, createMode, out string error)
                ?? throw new BlockException($"Failed to {(createMode == 0 ? "open" : "create")} '{url}': {error}", BlockErrno.Io);
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

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) =>
        CallAsync("read", () => _file.Read(offset, buffer.Span));

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        await CallAsync("write", () =>
        {
            if (!_file.Write(offset, buffer.Span))
                return false;
            if (offset + buffer.Length > _length)
                Volatile.Write(ref _length, offset + buffer.Length);
            return true;
        }).ConfigureAwait(false);
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
