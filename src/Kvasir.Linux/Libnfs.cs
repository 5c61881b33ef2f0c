using System;
using System.Runtime.InteropServices;
using System.Text;

namespace Kvasir.Linux;

/// <summary>
/// libnfs, looked for when it is first needed. One object is one open file on a server; calls wait for their answer and come from one
/// thread at a time. <see cref="LastError"/> says why one failed.
/// </summary>
public sealed unsafe class Libnfs : IDisposable
{
    // Version 16 changed the order of the arguments of reads and writes.
    private static readonly string[] Names = ["libnfs.so.13", "libnfs.so.14"];
    private static readonly Lazy<(nint Handle, string Name)> Library = new(Load);

    private void* _context;
    private void* _file;

    private readonly bool _isVersion4;

    private Libnfs(void* context, void* file, bool isVersion4)
    {
        _isVersion4 = isVersion4;
        _context = context;
        _file = file;
    }

    /// <summary>Whether the library is there.</summary>
    public static bool IsPresent => Library.Value.Handle != 0;

    /// <summary>What the library says of the last failure.</summary>
    public string LastError => Error(_context);

    /// <summary>
    /// The most bytes for one write. Releases up to 4.0.0 have 4 KiB for a whole request of NFS version 4 (libnfs pull request 319).
    /// </summary>
    public int LargestWrite => _isVersion4 && Library.Value.Name == Names[0] ? 2048 : Limit("nfs_get_writemax");

    /// <summary>The most bytes for one read.</summary>
    public int LargestRead => Limit("nfs_get_readmax");

    /// <summary>Mounts the export and opens the file that "nfs://host/export/path[?uid=N&amp;gid=N&amp;version=4...]" names.</summary>
    /// <param name="url">The address.</param>
    /// <param name="flags">As open(2) has them.</param>
    /// <param name="error">Why it failed.</param>
    public static Libnfs? Open(string url, int flags, out string error)
    {
        using SignalGuard guard = new();
        void* file = null;
        // SAFETY: signatures of nfsc/libnfs.h; strings end with a zero and stay pinned for the calls; the library copies what it keeps.
        void* context = ((delegate* unmanaged<void*>)Function("nfs_init_context"))();
        if (context is null)
        {
            error = "cannot make a context";
            return null;
        }
        fixed (byte* text = Encoding.UTF8.GetBytes(url + "\0"))
        {
            // struct nfs_url: char *server, *path, *file.
            byte** parsed = (byte**)((delegate* unmanaged<void*, byte*, void*>)Function("nfs_parse_url_full"))(context, text);
            int result = -1;
            if (parsed is not null)
            {
                result = ((delegate* unmanaged<void*, byte*, byte*, int>)Function("nfs_mount"))(context, parsed[0], parsed[1]);
                if (result == 0)
                    result = ((delegate* unmanaged<void*, byte*, int, void**, int>)Function("nfs_open"))(context, parsed[2], flags, &file);
                ((delegate* unmanaged<void*, void>)Function("nfs_destroy_url"))(parsed);
            }
            error = result == 0 ? string.Empty : Error(context);
            if (result == 0)
                return new Libnfs(context, file, url.Contains("version=4", StringComparison.Ordinal));
        }
        Destroy(context);
        return null;
    }

    /// <summary>The file's size, and what it takes on the server's disk.</summary>
    public bool Size(out long length, out long allocated)
    {
        using SignalGuard guard = new();
        // struct nfs_stat_64 is nothing but uint64_t: dev, ino, mode, nlink, uid, gid, rdev, size, blksize, blocks, used, and times.
        ulong* facts = stackalloc ulong[32];
        bool good = ((delegate* unmanaged<void*, void*, ulong*, int>)Function("nfs_fstat64"))(_context, _file, facts) == 0;
        (length, allocated) = good ? ((long)facts[7], (long)facts[10]) : (0, 0);
        return good;
    }

    /// <summary>Bytes read, 0 at the end; negative: it failed.</summary>
    public int Read(long offset, Span<byte> buffer)
    {
        using SignalGuard guard = new();
        fixed (byte* data = buffer)
            return ((delegate* unmanaged<void*, void*, ulong, ulong, byte*, int>)Function("nfs_pread"))(_context, _file, (ulong)offset, (ulong)buffer.Length, data);
    }

    /// <summary>Bytes written; negative: it failed.</summary>
    public int Write(long offset, ReadOnlySpan<byte> buffer)
    {
        using SignalGuard guard = new();
        fixed (byte* data = buffer)
            return ((delegate* unmanaged<void*, void*, ulong, ulong, byte*, int>)Function("nfs_pwrite"))(_context, _file, (ulong)offset, (ulong)buffer.Length, data);
    }

    public bool Flush()
    {
        using SignalGuard guard = new();
        return ((delegate* unmanaged<void*, void*, int>)Function("nfs_fsync"))(_context, _file) == 0;
    }

    public bool Resize(long length)
    {
        using SignalGuard guard = new();
        return ((delegate* unmanaged<void*, void*, ulong, int>)Function("nfs_ftruncate"))(_context, _file, (ulong)length) == 0;
    }

    public void Dispose()
    {
        if (_context is null)
            return;
        using SignalGuard guard = new();
        _ = ((delegate* unmanaged<void*, void*, int>)Function("nfs_close"))(_context, _file);
        Destroy(_context);
        _context = null;
    }

    private static (nint Handle, string Name) Load()
    {
        foreach (string name in Names)
        {
            if (NativeLibrary.TryLoad(name, out nint library))
                return (library, name);
        }
        return (0, string.Empty);
    }

    private static nint Function(string name) => NativeLibrary.GetExport(Library.Value.Handle, name);

    private static string Error(void* context) =>
        Marshal.PtrToStringUTF8((nint)((delegate* unmanaged<void*, byte*>)Function("nfs_get_error"))(context))?.Trim() ?? "unknown";

    private static void Destroy(void* context) => ((delegate* unmanaged<void*, void>)Function("nfs_destroy_context"))(context);

    // 0: the server was not asked, as with version 4.
    private int Limit(string function)
    {
        ulong limit = ((delegate* unmanaged<void*, ulong>)Function(function))(_context);
        return limit == 0 ? 64 << 10 : (int)Math.Clamp(limit, 512, 1 << 20);
    }
}
