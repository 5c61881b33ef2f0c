using System;
using System.Globalization;
using System.Runtime.CompilerServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Block;

/// <summary>How a host file is opened.</summary>
public sealed record HostFileOptions
{
    public bool ReadOnly { get; init; }

    public CacheMode Cache { get; init; } = CacheMode.Writeback;

    public AsyncMode Async { get; init; } = AsyncMode.Auto;

    /// <summary>What is kept from others (QEMU's locks). Off: no locks, as for a forced shared read.</summary>
    public bool Lock { get; init; } = true;

    /// <summary>What others may do meanwhile.</summary>
    public BlockPermission Shared { get; init; } = BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged;

    /// <summary>Whether discards reach the file as holes.</summary>
    public bool Discard { get; init; } = true;

    /// <summary>
    /// For files that are being filled: large writes reserve their blocks first where that makes them cheaper. (ext4's delayed allocation
    /// takes more time for each 4 KiB block than the copy of its data; fallocate(2) deals with a whole run at once.)
    /// </summary>
    public bool ReserveBlocks { get; init; }
}

/// <summary>A file or block device of the host.</summary>
public sealed class HostFile : BlockNode
{
    private const int LargestRequest = 1 << 30;
    private const int SmallestReservation = 256 << 10;

    // Configuration
    private readonly string _path;
    private readonly HostFileOptions _options;
    private readonly bool _isDevice;
    private readonly AsyncFile _file;
    private readonly bool _throughCache;

    // State
    private readonly Lock _sizing = new();
    private int _growing;
    private long _growingTo;
    private long _length;
    private int _noZeroRange;
    private int _noPunch;
    private bool _reserve;
    private long _dataStart;
    private long _dataEnd;

    private HostFile(string path, HostFileOptions options, SafeFileHandle handle, bool isDevice, long length)
    {
        _path = path;
        _options = options;
        _isDevice = isDevice;
        _length = length;
        bool direct = options.Cache is CacheMode.None or CacheMode.DirectSync;
        _throughCache = options.Cache is CacheMode.Writethrough or CacheMode.DirectSync;
        int alignment = !direct ? 1 : isDevice ? Math.Max(512, NativeFile.SectorSize(handle)) : ProbeAlignment(handle);
        RequestAlignment = alignment;
        _reserve = options.ReserveBlocks && !direct && !isDevice && NativeFile.IsExt4(handle);
        _file = new AsyncFile(handle, direct, alignment, options.Async);
    }

    public override string Driver => _isDevice ? "host_device" : "file";

    public override string FileName => _path;

    public override long Length => Volatile.Read(ref _length);

    public override bool IsReadOnly => _options.ReadOnly;

    public override bool IsGrowable => !_isDevice;

    public override int RequestAlignment { get; }

    public override bool IsZeroWhenCreated => !_isDevice;

    /// <summary>The open file, for copies inside the kernel.</summary>
    public SafeFileHandle Handle => _file.Handle;

    /// <summary>Copies a range into another file inside the kernel: bytes copied, or -errno.</summary>
    public long CopyTo(HostFile target, long offset, long targetOffset, long length)
    {
        target.BeginGrowth(targetOffset + length);
        try
        {
            long done = NativeFile.CopyRange(_file.Handle, offset, target._file.Handle, targetOffset, length);
            if (done > 0)
                target.Grew(targetOffset + done);
            return done;
        }
        finally
        {
            target.EndGrowth();
        }
    }

    public override long AllocatedBytes => NativeFile.AllocatedBytes(_file.Handle);

    /// <exception cref="BlockException">The file cannot be opened, or is in use.</exception>
    public static HostFile Open(string path, HostFileOptions options)
    {
        OpenFlags flags = options.ReadOnly ? OpenFlags.ReadOnly : OpenFlags.ReadWrite;
        if (options.Cache is CacheMode.None or CacheMode.DirectSync)
            flags |= OpenFlags.Direct;
        CheckKind(path);
        SafeFileHandle? handle = NativeFile.Open(path, flags, 0, out int error);
        if (handle is null && (flags & OpenFlags.Direct) != 0 && error == NativeFile.ErrorInvalid)
            throw new BlockException("file system may not support O_DIRECT\n" + $"Could not open '{path}': {BlockException.Text(error)}", error);
        if (handle is null)
            throw new BlockException($"Could not open '{path}': {BlockException.Text(error)}", error);
        try
        {
            FileKind kind = NativeFile.Kind(handle);
            if (kind is not (FileKind.Regular or FileKind.BlockDevice))
                throw WrongKind(path);
            long length = kind == FileKind.BlockDevice ? NativeFile.BlockDeviceSize(handle) : NativeFile.Size(handle);
            if (length < 0)
                throw BlockException.FromErrno($"Could not get the size of '{path}'", (int)-length);
            if (options.Lock)
            {
                BlockPermission held = options.ReadOnly ? BlockPermission.ConsistentRead : BlockPermission.ConsistentRead | BlockPermission.Write | BlockPermission.Resize;
                ImageLock.Take(handle, path, held, options.Shared);
            }
            return new HostFile(path, options, handle, kind == FileKind.BlockDevice, length);
        }
        catch
        {
            handle.Dispose();
            throw;
        }
    }

    /// <summary>Creates a file of <paramref name="length"/> zero bytes, or empties the one there.</summary>
    public static async ValueTask<HostFile> CreateAsync(string path, long length, Preallocation preallocation, HostFileOptions options)
    {
        SafeFileHandle? handle = NativeFile.Open(path, OpenFlags.ReadWrite | OpenFlags.Create, 0b110_100_100, out int error);
        if (handle is null)
            throw new BlockException($"Could not create '{path}': {BlockException.Text(error)}", error);
        if (NativeFile.Kind(handle) == FileKind.Regular)
        {
            try
            {
                // Nobody else may be using what is about to be emptied.
                ImageLock.Take(handle, path, BlockPermission.Write | BlockPermission.Resize, BlockPermission.ConsistentRead | BlockPermission.WriteUnchanged);
                // ext4 writes a file back when it is closed after a truncation to nothing, so a new file is spared one.
                int result = NativeFile.Size(handle) == 0 ? 0 : NativeFile.Truncate(handle, 0);
                if (result < 0)
                    throw BlockException.FromErrno($"Could not resize '{path}'", -result);
            }
            catch
            {
                handle.Dispose();
                throw;
            }
        }
        ImageLock.Release(handle);
        handle.Dispose();
        HostFile file = Open(path, options);
        try
        {
            if (file._isDevice)
            {
                if (file.Length < length)
                    throw new BlockException("Device is too small", BlockErrno.NoSpace);
            }
            else
            {
                await file.ResizeAsync(length, preallocation).ConfigureAwait(false);
            }
            return file;
        }
        catch
        {
            await file.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if (_options.Cache == CacheMode.Unsafe || _options.ReadOnly)
            return;
        int result = await _file.SyncAsync().ConfigureAwait(false);
        if (result < 0)
            throw BlockException.FromErrno($"Could not flush '{_path}'", -result);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    public override async ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        if (_isDevice)
        {
            if (length > Length)
                throw new BlockException("Cannot grow device files", BlockErrno.Invalid);
            return;
        }
        if (IsReadOnly)
            throw ReadOnlyError();
        long old = Length;
        if (preallocation == Preallocation.Metadata)
            throw new BlockException("Unsupported preallocation mode 'metadata'", BlockErrno.NotSupported);
        if (preallocation != Preallocation.Off && length < old)
            throw new BlockException("Preallocation can't be used for shrinking files", BlockErrno.NotSupported);
        if (preallocation == Preallocation.Falloc && length > old)
        {
            int allocated = await _file.AllocateAsync(AllocateMode.Allocate, old, length - old).ConfigureAwait(false);
            if (allocated < 0)
                throw BlockException.FromErrno("Could not preallocate data for the new file", -allocated);
        }
        else if (length > old)
        {
            GrowTo(length);
        }
        else if (length != old)
        {
            Truncate(length);
            Volatile.Write(ref _length, length);
        }
        Grew(length);
        Volatile.Write(ref _dataEnd, 0);
        if (preallocation == Preallocation.Full && length > old)
            await WriteZeroDataAsync(old, length - old, ZeroFlags.None, cancellation).ConfigureAwait(false);
    }

    public override ValueTask DisposeAsync()
    {
        if (!_file.Handle.IsClosed && _options.Lock)
            ImageLock.Release(_file.Handle);
        _file.Dispose();
        return base.DisposeAsync();
    }

    protected internal override bool TryReadNow(long offset, Span<byte> buffer) => offset <= Length - buffer.Length && _file.TryReadNow(offset, buffer);

    protected internal override bool TryWriteNow(long offset, ReadOnlySpan<byte> buffer) =>
        DetectZeroes == DetectZeroes.Off && !_options.ReadOnly && !_throughCache && !_reserve && offset <= Length - buffer.Length && _file.TryWriteNow(offset, buffer);

    protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        ValueTask<int> read = _file.ReadAsync(offset, buffer);
        if (!read.IsCompletedSuccessfully)
            return FinishReadAsync(read, offset, buffer);
        int done = read.Result;
        return done == buffer.Length ? default : FinishReadAsync(new ValueTask<int>(done), offset, buffer);
    }

    protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        bool through = _throughCache || ((flags & WriteFlags.ForceUnitAccess) != 0 && _options.Cache != CacheMode.Unsafe);
        if (_reserve && buffer.Length >= SmallestReservation)
        {
            // Where it fails, the write itself says whether there is room; what cannot be reserved once will not be the next time.
            _reserve = NativeFile.Allocate(_file.Handle, AllocateMode.Allocate | AllocateMode.KeepSize, offset, buffer.Length) == 0;
        }
        bool grows = offset + buffer.Length > Length;
        if (grows)
            BeginGrowth(offset + buffer.Length);
        ValueTask<int> write = _file.WriteAsync(offset, buffer, through);
        if (!write.IsCompletedSuccessfully)
            return FinishWriteAsync(write, offset, buffer, through, grows);
        int done = write.Result;
        if (done != buffer.Length)
            return FinishWriteAsync(new ValueTask<int>(done), offset, buffer, through, grows);
        Grew(offset + done);
        if (grows)
            EndGrowth();
        return default;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
    {
        long end = offset + length;
        if (_isDevice)
        {
            if (NativeFile.ZeroDevice(_file.Handle, offset, length) != 0)
                await WriteZeroDataAsync(offset, length, flags, cancellation).ConfigureAwait(false);
            return;
        }
        bool done = false;
        if ((flags & ZeroFlags.MayUnmap) != 0 && _options.Discard && _noPunch == 0)
        {
            // A hole past the end of the file is there already: only the size has to grow.
            int result = await PunchAsync(offset, length).ConfigureAwait(false);
            if (result == 0)
                GrowTo(end);
            done = result == 0;
        }
        if (!done && NothingFrom(offset, end))
            done = true;
        if (!done && _noZeroRange == 0)
        {
            int result = await _file.AllocateAsync(AllocateMode.ZeroRange, offset, length).ConfigureAwait(false);
            if (result == 0)
            {
                Grew(end);
                Volatile.Write(ref _dataEnd, 0);
                done = true;
            }
            else if (result is -NativeFile.ErrorNotSupported or -NativeFile.ErrorNoSystemCall or -NativeFile.ErrorInvalid)
            {
                _noZeroRange = 1;
            }
            else
            {
                throw BlockException.FromErrno($"Could not write zeroes to '{_path}'", -result);
            }
        }
        if (!done)
            await WriteZeroDataAsync(offset, length, flags, cancellation).ConfigureAwait(false);
        else if ((flags & ZeroFlags.ForceUnitAccess) != 0 || _throughCache)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        if (!_options.Discard)
            return;
        if (_isDevice)
        {
            _ = NativeFile.DiscardDevice(_file.Handle, offset, length);
            return;
        }
        if (_noPunch == 0)
            _ = await PunchAsync(offset, length).ConfigureAwait(false);
    }

    protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation)
    {
        const BlockFlags data = BlockFlags.Data | BlockFlags.Allocated | BlockFlags.OffsetValid;
        if (_isDevice)
            return new ValueTask<BlockStatus>(new BlockStatus(length, data, offset));
        // The extent found last answers the questions that follow it; any hole made since then clears it.
        long knownStart = Volatile.Read(ref _dataStart);
        long knownEnd = Volatile.Read(ref _dataEnd);
        if (offset >= knownStart && offset < knownEnd)
            return new ValueTask<BlockStatus>(new BlockStatus(Math.Min(length, knownEnd - offset), data, offset));
        long start = NativeFile.FindData(_file.Handle, offset);
        if (start == -NativeFile.ErrorNoDevice)
            return new ValueTask<BlockStatus>(new BlockStatus(length, BlockFlags.Zero | BlockFlags.Allocated | BlockFlags.OffsetValid, offset));
        if (start < 0)
            return new ValueTask<BlockStatus>(new BlockStatus(length, data, offset));
        if (start > offset)
        {
            return new ValueTask<BlockStatus>(
                new BlockStatus(Math.Min(length, start - offset), BlockFlags.Zero | BlockFlags.Allocated | BlockFlags.OffsetValid, offset));
        }
        long hole = NativeFile.FindHole(_file.Handle, offset);
        if (hole <= offset)
            return new ValueTask<BlockStatus>(new BlockStatus(length, data, offset));
        if (IsReadOnly)
        {
            Volatile.Write(ref _dataStart, offset);
            Volatile.Write(ref _dataEnd, hole);
        }
        return new ValueTask<BlockStatus>(new BlockStatus(Math.Min(length, hole - offset), data, offset));
    }

    /// <summary>
    /// Refuses what is neither a file nor a block device before it is opened: an image may name anything, and to open a FIFO waits for whoever writes to it, to open
    /// a device may rewind a tape or start a watchdog.
    /// </summary>
    private static void CheckKind(string path)
    {
        using SafeFileHandle? place = NativeFile.Open(path, OpenFlags.PathOnly, 0, out _);
        // What is not there, or not allowed, is told of by the opening itself.
        if (place is not null && NativeFile.Kind(place) is not (FileKind.Regular or FileKind.BlockDevice))
            throw WrongKind(path);
    }

    private static BlockException WrongKind(string path) => new($"'file' driver requires '{path}' to be a regular file", BlockErrno.Invalid);

    private static int ProbeAlignment(SafeFileHandle handle)
    {
        // The smallest granularity a direct read accepts; an empty file accepts all, so the page size is the safe answer there.
        using AlignedBuffer probe = AlignedBuffer.Rent(4096);
        if (NativeFile.Size(handle) < 4096)
            return 4096;
        return NativeFile.Read(handle, 512, probe.Memory.Span[..512]) >= 0 ? 512 : 4096;
    }

    // To grow a file is to set its size, and a write under way may be making it larger still: sizes are set with the lock held, to no less than any
    // write that was begun needs.
    private void BeginGrowth(long end)
    {
        lock (_sizing)
        {
            _growing++;
            _growingTo = Math.Max(_growingTo, end);
        }
    }

    private void EndGrowth()
    {
        lock (_sizing)
        {
            if (--_growing == 0)
                _growingTo = 0;
        }
    }

    /// <summary>Makes the file at least so long, with a hole.</summary>
    private void GrowTo(long end)
    {
        lock (_sizing)
        {
            if (end <= Length)
                return;
            long length = Math.Max(end, _growingTo);
            Truncate(length);
            Grew(length);
        }
    }

    /// <summary>Whether a range lies behind the end of the file and no write reaches behind its start: then the file has grown over it, and it is zeros.</summary>
    private bool NothingFrom(long offset, long end)
    {
        lock (_sizing)
        {
            if (offset < Math.Max(Length, _growingTo))
                return false;
            Truncate(end);
            Grew(end);
            return true;
        }
    }

    private void Truncate(long length)
    {
        int result = NativeFile.Truncate(_file.Handle, length);
        if (result < 0)
            throw BlockException.FromErrno($"Failed to resize the file to {length.ToString(CultureInfo.InvariantCulture)} bytes", -result);
    }

    private void Grew(long end)
    {
        long known = Volatile.Read(ref _length);
        while (end > known)
        {
            long seen = Interlocked.CompareExchange(ref _length, end, known);
            if (seen == known)
                return;
            known = seen;
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<int> PunchAsync(long offset, long length)
    {
        int result = await _file.AllocateAsync(AllocateMode.PunchHole | AllocateMode.KeepSize, offset, length).ConfigureAwait(false);
        Volatile.Write(ref _dataEnd, 0);
        if (result is -NativeFile.ErrorNotSupported or -NativeFile.ErrorNoSystemCall)
            _noPunch = 1;
        return result;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask FinishReadAsync(ValueTask<int> first, long offset, Memory<byte> buffer)
    {
        int done = await first.ConfigureAwait(false);
        while (true)
        {
            if (done < 0)
                throw BlockException.FromErrno($"Could not read '{_path}' at {offset}", -done);
            if (done == 0)
            {
                // Past the end of the file: zeros, as of any hole.
                buffer.Span.Clear();
                return;
            }
            offset += done;
            buffer = buffer[done..];
            if (buffer.IsEmpty)
                return;
            // A direct read stops short only at the end of the file, where the rest cannot be aligned.
            if (RequestAlignment > 1 && (done & (RequestAlignment - 1)) != 0)
            {
                buffer.Span.Clear();
                return;
            }
            done = await _file.ReadAsync(offset, buffer).ConfigureAwait(false);
        }
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder))]
    private async ValueTask FinishWriteAsync(ValueTask<int> first, long offset, ReadOnlyMemory<byte> buffer, bool through, bool grows)
    {
        try
        {
            int done = await first.ConfigureAwait(false);
            while (true)
            {
                if (done < 0)
                    throw BlockException.FromErrno($"Could not write '{_path}' at {offset}", -done);
                if (done == 0)
                    throw BlockException.FromErrno($"Could not write '{_path}' at {offset}", BlockErrno.NoSpace);
                offset += done;
                Grew(offset);
                buffer = buffer[done..];
                if (buffer.IsEmpty)
                    return;
                done = await _file.WriteAsync(offset, buffer[..Math.Min(buffer.Length, LargestRequest)], through).ConfigureAwait(false);
            }
        }
        finally
        {
            if (grows)
                EndGrowth();
        }
    }
}
