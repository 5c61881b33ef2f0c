using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;

namespace Kvasir.Linux;

/// <summary>
/// libnfs, looked for when it is first needed. One object is one open file on a server; calls wait for their answer and come from one
/// thread at a time. <see cref="LastError"/> says why one failed.
/// </summary>
public sealed unsafe partial class Libnfs : IDisposable
{
    private const int Depth = 32;
    private const int ErrorExists = 17;

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
    public string LastError => _context is null ? "the connection to the server is lost" : Error(_context);

    /// <summary>
    /// The most bytes for one write. Releases up to 4.0.0 have 4 KiB for a whole request of NFS version 4 (libnfs pull request 319).
    /// </summary>
    private int LargestWrite => _isVersion4 && Library.Value.Name == Names[0] ? 2048 : Limit("nfs_get_writemax");

    /// <summary>The most bytes for one read.</summary>
    private int LargestRead => Limit("nfs_get_readmax");

    /// <summary>Mounts the export and opens the file that "nfs://host/export/path[?uid=N&amp;gid=N&amp;version=4...]" names.</summary>
    /// <param name="url">The address.</param>
    /// <param name="flags">As open(2) has them.</param>
    /// <param name="createMode">The file is made with this mode, or emptied where there is one; 0: it must be there.</param>
    /// <param name="error">Why it failed.</param>
    public static Libnfs? Open(string url, int flags, int createMode, out string error)
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
                if (result == 0 && createMode != 0)
                {
                    // What nfs_creat opens is for writing only where the protocol tells (version 4), which also refuses what is there.
                    result = ((delegate* unmanaged<void*, byte*, int, void**, int>)Function("nfs_creat"))(context, parsed[2], createMode, &file);
                    if (result == 0)
                        _ = ((delegate* unmanaged<void*, void*, int>)Function("nfs_close"))(context, file);
                    else if (result == -ErrorExists)
                        result = 0;
                }
                if (result == 0)
                    result = ((delegate* unmanaged<void*, byte*, int, void**, int>)Function("nfs_open"))(context, parsed[2], flags, &file);
                if (result == 0 && createMode != 0)
                    result = ((delegate* unmanaged<void*, void*, ulong, int>)Function("nfs_ftruncate"))(context, file, 0);
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
        bool good = _context is not null && ((delegate* unmanaged<void*, void*, ulong*, int>)Function("nfs_fstat64"))(_context, _file, facts) == 0;
        (length, allocated) = good ? ((long)facts[7], (long)facts[10]) : (0, 0);
        return good;
    }

    /// <summary>Reads all of it; zeros past the end.</summary>
    public bool Read(long offset, Span<byte> buffer)
    {
        using SignalGuard guard = new();
        fixed (byte* data = buffer)
            return Transfer(offset, data, buffer.Length, LargestRead, isRead: true);
    }

    /// <summary>Writes all of it.</summary>
    public bool Write(long offset, ReadOnlySpan<byte> buffer)
    {
        using SignalGuard guard = new();
        fixed (byte* data = buffer)
            return Transfer(offset, data, buffer.Length, LargestWrite, isRead: false);
    }

    public bool Flush()
    {
        using SignalGuard guard = new();
        return _context is not null && ((delegate* unmanaged<void*, void*, int>)Function("nfs_fsync"))(_context, _file) == 0;
    }

    public bool Resize(long length)
    {
        using SignalGuard guard = new();
        return _context is not null && ((delegate* unmanaged<void*, void*, ulong, int>)Function("nfs_ftruncate"))(_context, _file, (ulong)length) == 0;
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

    /// <summary>One request of a transfer.</summary>
    private struct Piece
    {
        public long Offset;
        public byte* Data;
        public int Length;
        public int Result;
        public PieceState State;
        public bool IsRead;
    }

    private enum PieceState
    {
        Free,
        UnderWay,
        Answered,
    }

    [StructLayout(LayoutKind.Sequential)]
    private struct PollEntry
    {
        public int Descriptor;
        public short Events;
        public short Occurred;
    }

    /// <summary>Moves bytes in pieces of at most <paramref name="largest"/>, several of them under way.</summary>
    private bool Transfer(long offset, byte* data, int length, int largest, bool isRead)
    {
        if (_context is null)
            return false;
        var start = (delegate* unmanaged<void*, void*, ulong, ulong, void*, void*, int>)Function("nfs_pread_async");
        var startWrite = (delegate* unmanaged<void*, void*, ulong, ulong, void*, void*, void*, int>)Function("nfs_pwrite_async");
        delegate* unmanaged[Cdecl]<int, void*, void*, void*, void> answered = &Answered;
        Piece* pieces = stackalloc Piece[Depth];
        new Span<Piece>(pieces, Depth).Clear();
        int begun = 0;
        int underWay = 0;
        bool good = true;
        do
        {
            for (Piece* piece = pieces; piece < pieces + Depth; piece++)
            {
                if (piece->State == PieceState.UnderWay)
                    continue;
                if (piece->State == PieceState.Answered)
                {
                    underWay--;
                    piece->State = PieceState.Free;
                    good &= piece->Result > 0 || (piece->Result == 0 && isRead);
                    // What a short answer leaves is asked for again; past the end there is nothing.
                    int done = Math.Clamp(piece->Result, 0, piece->Length);
                    if (done == 0)
                        new Span<byte>(piece->Data, isRead ? piece->Length : 0).Clear();
                    piece->Offset += done;
                    piece->Data += done;
                    piece->Length = done == 0 ? 0 : piece->Length - done;
                }
                if (piece->Length == 0 && begun < length)
                {
                    piece->Offset = offset + begun;
                    piece->Data = data + begun;
                    piece->Length = Math.Min(largest, length - begun);
                    begun += piece->Length;
                }
                if (!good || piece->Length == 0)
                    continue;
                piece->IsRead = isRead;
                piece->State = PieceState.UnderWay;
                // SAFETY: signatures of nfsc/libnfs.h; a piece and its bytes stay until the library has answered or is taken down.
                int result = isRead
                    ? start(_context, _file, (ulong)piece->Offset, (ulong)piece->Length, answered, piece)
                    : startWrite(_context, _file, (ulong)piece->Offset, (ulong)piece->Length, piece->Data, answered, piece);
                if (result == 0)
                    underWay++;
                else
                    (good, piece->State) = (false, PieceState.Free);
            }
            if (underWay > 0 && !Service())
            {
                // Its answers to what is under way come while it is taken down, never later.
                Destroy(_context);
                _context = null;
                return false;
            }
        }
        while (underWay > 0);
        return good;
    }

    /// <summary>Waits for the server and lets the library answer.</summary>
    private bool Service()
    {
        PollEntry entry = new()
        {
            Descriptor = ((delegate* unmanaged<void*, int>)Function("nfs_get_fd"))(_context),
            Events = (short)((delegate* unmanaged<void*, int>)Function("nfs_which_events"))(_context),
        };
        // Not for ever: the library counts its own time-outs when it is called.
        return poll(&entry, 1, 1000) >= 0 && ((delegate* unmanaged<void*, int, int>)Function("nfs_service"))(_context, entry.Occurred) >= 0;
    }

    [UnmanagedCallersOnly(CallConvs = [typeof(CallConvCdecl)])]
    private static void Answered(int result, void* context, void* data, void* argument)
    {
        // SAFETY: the piece that the request was begun with; a read gives as many bytes as its result says.
        Piece* piece = (Piece*)argument;
        if (piece->IsRead && result > 0)
            new ReadOnlySpan<byte>(data, Math.Min(result, piece->Length)).CopyTo(new Span<byte>(piece->Data, piece->Length));
        piece->Result = result;
        piece->State = PieceState.Answered;
    }

    [LibraryImport("libc")]
    private static partial int poll(PollEntry* entries, nuint count, int milliseconds);

    // 0: the server was not asked, as with version 4.
    private int Limit(string function)
    {
        ulong limit = ((delegate* unmanaged<void*, ulong>)Function(function))(_context);
        return limit == 0 ? 64 << 10 : (int)Math.Clamp(limit, 512, 1 << 20);
    }
}
