using System;
using System.Runtime.InteropServices;

namespace Kvasir.Linux;

/// <summary>
/// libiscsi, looked for when it is first needed. One object is one session with a target's logical unit; calls wait for their answer and
/// come from one thread at a time. <see cref="LastError"/> says why one failed.
/// </summary>
public sealed unsafe partial class Libiscsi : IDisposable
{
    private static readonly string[] Names = ["libiscsi.so.9", "libiscsi.so.8", "libiscsi.so.7", "libiscsi.so"];
    private const int DataIn = 64;
    private const int LogoutSeconds = 5;
    private static readonly Lazy<nint> Library = new(Load);

    private void* _context;
    private readonly int _lun;

    private Libiscsi(void* context, int lun)
    {
        _context = context;
        _lun = lun;
    }

    /// <summary>Whether the library is there.</summary>
    public static bool IsPresent => Library.Value != 0;

    /// <summary>Logs in to the unit that "iscsi://[user%password@]host[:port]/target/lun" names.</summary>
    /// <param name="url">The address.</param>
    /// <param name="initiator">The name to log in with.</param>
    /// <param name="timeout">Seconds after which a request without an answer has failed; 0: it waits.</param>
    /// <param name="error">Why it failed.</param>
    public static Libiscsi? Connect(string url, string initiator, int timeout, out string error)
    {
        using SignalGuard guard = new();
        error = string.Empty;
        fixed (byte* name = Utf8(initiator))
        fixed (byte* text = Utf8(url))
        {
            // SAFETY: signatures of iscsi.h; strings end with a zero and stay pinned for the calls; the library copies what it keeps.
            void* context = ((delegate* unmanaged<byte*, void*>)Function("iscsi_create_context"))(name);
            if (context is null)
            {
                error = "cannot make a session";
                return null;
            }
            byte* parsed = (byte*)((delegate* unmanaged<void*, byte*, void*>)Function("iscsi_parse_full_url"))(context, text);
            if (parsed is null)
            {
                error = Error(context);
                Destroy(context);
                return null;
            }
            // struct iscsi_url: char portal[256], target[256], user[256], passwd[256], target_user[256], target_passwd[256]; int lun.
            int lun = *(int*)(parsed + (6 * 256));
            byte* portal = parsed;
            byte* target = parsed + 256;
            byte* user = parsed + 512;
            byte* password = parsed + 768;
            int result = ((delegate* unmanaged<void*, byte*, int>)Function("iscsi_set_targetname"))(context, target);
            const int normalSession = 2;
            if (result == 0)
                result = ((delegate* unmanaged<void*, int, int>)Function("iscsi_set_session_type"))(context, normalSession);
            if (result == 0 && *user != 0)
                result = ((delegate* unmanaged<void*, byte*, byte*, int>)Function("iscsi_set_initiator_username_pwd"))(context, user, password);
            if (result == 0)
                SetTimeout(context, timeout);
            if (result == 0)
                result = ((delegate* unmanaged<void*, byte*, int, int>)Function("iscsi_full_connect_sync"))(context, portal, lun);
            ((delegate* unmanaged<void*, void>)Function("iscsi_destroy_url"))(parsed);
            if (result == 0)
                return new Libiscsi(context, lun);
            error = Error(context);
            Destroy(context);
            return null;
        }
    }

    /// <summary>What the library says of the last failure.</summary>
    public string LastError => Error(_context);

    /// <summary>Block size and number of blocks (READ CAPACITY (16)).</summary>
    public bool Capacity(out long blocks, out int blockSize)
    {
        using SignalGuard guard = new();
        (blocks, blockSize) = (0, 0);
        void* task = ((delegate* unmanaged<void*, int, void*>)Function("iscsi_readcapacity16_sync"))(_context, _lun);
        // The answer's bytes as SBC-3 has them: last block (8, big-endian), block length (4).
        byte* data = Answer(task, 12);
        if (data is not null)
        {
            blocks = System.Buffers.Binary.BinaryPrimitives.ReadInt64BigEndian(new ReadOnlySpan<byte>(data, 8)) + 1;
            blockSize = System.Buffers.Binary.BinaryPrimitives.ReadInt32BigEndian(new ReadOnlySpan<byte>(data + 8, 4));
        }
        Free(task);
        return data is not null;
    }

    /// <summary>Reads whole blocks.</summary>
    public bool Read(long block, int blockSize, Span<byte> buffer)
    {
        using SignalGuard guard = new();
        void* task = ((delegate* unmanaged<void*, int, ulong, uint, int, int, int, int, int, int, void*>)Function("iscsi_read16_sync"))(
            _context, _lun, (ulong)block, (uint)buffer.Length, blockSize, 0, 0, 0, 0, 0);
        byte* data = Answer(task, buffer.Length);
        if (data is not null)
            new ReadOnlySpan<byte>(data, buffer.Length).CopyTo(buffer);
        Free(task);
        return data is not null;
    }

    /// <summary>Writes whole blocks.</summary>
    public bool Write(long block, int blockSize, ReadOnlySpan<byte> buffer, bool forceUnitAccess)
    {
        using SignalGuard guard = new();
        fixed (byte* data = buffer)
        {
            // SAFETY: the library sends the bytes before the call returns.
            void* task = ((delegate* unmanaged<void*, int, ulong, byte*, uint, int, int, int, int, int, int, void*>)Function("iscsi_write16_sync"))(
                _context, _lun, (ulong)block, data, (uint)buffer.Length, blockSize, 0, 0, forceUnitAccess ? 1 : 0, 0, 0);
            return Finish(task);
        }
    }

    /// <summary>SYNCHRONIZE CACHE of everything.</summary>
    public bool Flush()
    {
        using SignalGuard guard = new();
        return Finish(((delegate* unmanaged<void*, int, int, int, int, int, void*>)Function("iscsi_synchronizecache10_sync"))(_context, _lun, 0, 0, 0, 0));
    }

    public void Dispose()
    {
        if (_context is null)
            return;
        using SignalGuard guard = new();
        // A target that went silent does not hold the program.
        SetTimeout(_context, LogoutSeconds);
        _ = ((delegate* unmanaged<void*, int>)Function("iscsi_logout_sync"))(_context);
        Destroy(_context);
        _context = null;
    }

    private static nint Load()
    {
        foreach (string name in Names)
        {
            if (NativeLibrary.TryLoad(name, out nint library))
                return library;
        }
        return 0;
    }

    private static nint Function(string name) => NativeLibrary.GetExport(Library.Value, name);

    private static byte[] Utf8(string text) => System.Text.Encoding.UTF8.GetBytes(text + "\0");

    private static string Error(void* context) =>
        Marshal.PtrToStringUTF8((nint)((delegate* unmanaged<void*, byte*>)Function("iscsi_get_error"))(context))?.Trim() ?? "unknown";

    private static void SetTimeout(void* context, int seconds) => _ = ((delegate* unmanaged<void*, int, int>)Function("iscsi_set_timeout"))(context, seconds);

    private static void Destroy(void* context) => _ = ((delegate* unmanaged<void*, int>)Function("iscsi_destroy_context"))(context);

    private static void Free(void* task)
    {
        if (task is not null)
            ((delegate* unmanaged<void*, void>)Function("scsi_free_scsi_task"))(task);
    }

    private static bool Finish(void* task)
    {
        bool good = task is not null && *(int*)task == 0;
        Free(task);
        return good;
    }

    /// <summary>The bytes that a good answer brought; null: it failed, or brought fewer.</summary>
    private static byte* Answer(void* task, int length)
    {
        // SAFETY: struct scsi_task (scsi-lowlevel.h) begins with int status; int cdb_size; int xfer_dir; int expxferlen; unsigned char
        // cdb[16]; int residual_status (an enum); size_t residual; struct scsi_sense sense (16 bytes); struct scsi_data datain {int size;
        // unsigned char *data;}, and has done so in every release that has these names.
        if (task is null || *(int*)task != 0)
            return null;
        int size = *(int*)((byte*)task + DataIn);
        return size >= length ? *(byte**)((byte*)task + DataIn + 8) : null;
    }
}
