using System;
using System.Runtime.CompilerServices;
using System.Threading.Tasks;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Linux;

/// <summary>How waiting file requests are run.</summary>
public enum AsyncMode
{
    /// <summary>io_uring where the kernel gives one, else threads.</summary>
    Auto,

    /// <summary>The thread pool.</summary>
    Threads,
}

/// <summary>
/// Reads and writes of an open file without blocking the caller for the medium: page-cache hits complete at once on the caller's
/// thread, everything else goes through io_uring or a pool thread. Results are byte counts or -errno. With O_DIRECT the caller keeps
/// offsets and lengths on <see cref="Alignment"/>; memory that is not aligned is bounced here.
/// </summary>
public sealed class AsyncFile(SafeFileHandle handle, bool direct, int alignment, AsyncMode mode) : IDisposable
{
    /// <summary>Offset and length granularity of direct requests; 1 when the page cache is in between.</summary>
    public int Alignment { get; } = direct ? alignment : 1;

    public SafeFileHandle Handle { get; } = handle;

    private bool Ring => mode == AsyncMode.Auto;

    private readonly int _fd = direct ? -1 : (int)handle.DangerousGetHandle();

    /// <summary>Reads at once what the page cache holds. The caller sees to the file staying open meanwhile.</summary>
    /// <returns>False where that does not give all of it: nothing counts as read then.</returns>
    public bool TryReadNow(long offset, Span<byte> buffer) => !direct && NativeFile.ReadCachedNow(_fd, offset, buffer) == buffer.Length;

    /// <summary>Writes into the page cache at once. The caller sees to the file staying open meanwhile.</summary>
    /// <returns>False where not all of it was written: it is to be written again.</returns>
    public bool TryWriteNow(long offset, ReadOnlySpan<byte> buffer) => !direct && NativeFile.WriteNow(_fd, offset, buffer) == buffer.Length;

    public ValueTask<int> ReadAsync(long offset, Memory<byte> buffer)
    {
        if (direct)
        {
            return AlignedBuffer.IsAligned(buffer, Alignment)
                ? FileOperation.StartAsync(Handle, FileOperation.Request.Read, offset, buffer, buffer.Length, 0, Ring)
                : ReadBouncedAsync(offset, buffer);
        }
        int done = NativeFile.ReadCached(Handle, offset, buffer.Span);
        return done >= 0
            ? new ValueTask<int>(done)
            : FileOperation.StartAsync(Handle, FileOperation.Request.Read, offset, buffer, buffer.Length, 0, Ring);
    }

    /// <param name="offset">Where in the file.</param>
    /// <param name="buffer">What to write.</param>
    /// <param name="throughCache">Stable on the medium when the task ends (RWF_DSYNC).</param>
    public ValueTask<int> WriteAsync(long offset, ReadOnlyMemory<byte> buffer, bool throughCache)
    {
        if (direct)
        {
            return AlignedBuffer.IsAligned(buffer, Alignment)
                ? FileOperation.StartAsync(Handle, FileOperation.Request.Write, offset, buffer, buffer.Length, throughCache ? 1 : 0, Ring)
                : WriteBouncedAsync(offset, buffer, throughCache);
        }
        // A write into the page cache is a memory copy: a hand-over to another thread would cost more than it.
        return throughCache
            ? FileOperation.StartAsync(Handle, FileOperation.Request.Write, offset, buffer, buffer.Length, 1, Ring)
            : new ValueTask<int>(NativeFile.Write(Handle, offset, buffer.Span, throughCache: false));
    }

    /// <summary>fdatasync(2).</summary>
    public ValueTask<int> SyncAsync() => FileOperation.StartAsync(Handle, FileOperation.Request.Sync, 0, default, 0, 0, Ring);

    /// <summary>fallocate(2).</summary>
    public ValueTask<int> AllocateAsync(AllocateMode allocate, long offset, long length) =>
        FileOperation.StartAsync(Handle, FileOperation.Request.Allocate, offset, default, length, (int)allocate, Ring);

    public void Dispose() => Handle.Dispose();

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<int> ReadBouncedAsync(long offset, Memory<byte> buffer)
    {
        using AlignedBuffer bounce = AlignedBuffer.Rent(buffer.Length);
        Memory<byte> part = bounce.Memory[..buffer.Length];
        int done = await FileOperation.StartAsync(Handle, FileOperation.Request.Read, offset, part, part.Length, 0, Ring).ConfigureAwait(false);
        if (done > 0)
            part.Span[..done].CopyTo(buffer.Span);
        return done;
    }

    [AsyncMethodBuilder(typeof(PooledMethodBuilder<>))]
    private async ValueTask<int> WriteBouncedAsync(long offset, ReadOnlyMemory<byte> buffer, bool throughCache)
    {
        using AlignedBuffer bounce = AlignedBuffer.Rent(buffer.Length);
        Memory<byte> part = bounce.Memory[..buffer.Length];
        buffer.Span.CopyTo(part.Span);
        return await FileOperation.StartAsync(Handle, FileOperation.Request.Write, offset, part, part.Length, throughCache ? 1 : 0, Ring).ConfigureAwait(false);
    }
}
