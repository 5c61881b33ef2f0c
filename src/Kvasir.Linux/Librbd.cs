using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;

namespace Kvasir.Linux;

/// <summary>
/// librbd and librados, looked for when they are first needed. One object is one open image of a Ceph cluster; calls wait for their answer
/// and may come from several threads. Failures are negative errno values.
/// </summary>
public sealed unsafe class Librbd : IDisposable
{
    private static readonly Lazy<nint> Rados = new(() => NativeLibrary.TryLoad("librados.so.2", out nint library) ? library : 0);
    private static readonly Lazy<nint> Rbd = new(() => NativeLibrary.TryLoad("librbd.so.1", out nint library) ? library : 0);

    private void* _cluster;
    private void* _pool;
    private void* _image;

    private Librbd()
    {
    }

    /// <summary>Whether both libraries are there.</summary>
    public static bool IsPresent => Rados.Value != 0 && Rbd.Value != 0;

    /// <summary>Connects to the cluster and opens an image.</summary>
    /// <param name="place">Pool, namespace (may be empty), image and snapshot (may be empty).</param>
    /// <param name="user">The client's name without "client."; null: the default.</param>
    /// <param name="configuration">The configuration file; null: the usual one, if there is any.</param>
    /// <param name="settings">Further settings of the configuration, such as mon_host.</param>
    /// <param name="readOnly">Whether it is opened for reading only.</param>
    /// <param name="error">Why it failed.</param>
    public static Librbd? Open(
        (string Pool, string Namespace, string Image, string Snapshot) place, string? user, string? configuration, IEnumerable<KeyValuePair<string, string>> settings, bool readOnly, out string error)
    {
        Librbd session = new();
        error = session.Connect(place, user, configuration, settings, readOnly);
        if (error.Length == 0)
            return session;
        session.Dispose();
        return null;
    }

    public long Size()
    {
        ulong size = 0;
        int result = ((delegate* unmanaged<void*, ulong*, int>)Function(Rbd.Value, "rbd_get_size"))(_image, &size);
        return result < 0 ? result : (long)size;
    }

    public long Read(long offset, Span<byte> buffer)
    {
        fixed (byte* data = buffer)
            return ((delegate* unmanaged<void*, ulong, nuint, byte*, nint>)Function(Rbd.Value, "rbd_read"))(_image, (ulong)offset, (nuint)buffer.Length, data);
    }

    public long Write(long offset, ReadOnlySpan<byte> buffer)
    {
        fixed (byte* data = buffer)
            return ((delegate* unmanaged<void*, ulong, nuint, byte*, nint>)Function(Rbd.Value, "rbd_write"))(_image, (ulong)offset, (nuint)buffer.Length, data);
    }

    public int Discard(long offset, long length) => ((delegate* unmanaged<void*, ulong, ulong, int>)Function(Rbd.Value, "rbd_discard"))(_image, (ulong)offset, (ulong)length);

    public int Flush() => ((delegate* unmanaged<void*, int>)Function(Rbd.Value, "rbd_flush"))(_image);

    public int Resize(long length) => ((delegate* unmanaged<void*, ulong, int>)Function(Rbd.Value, "rbd_resize"))(_image, (ulong)length);

    public void Dispose()
    {
        if (_image is not null)
            _ = ((delegate* unmanaged<void*, int>)Function(Rbd.Value, "rbd_close"))(_image);
        if (_pool is not null)
            ((delegate* unmanaged<void*, void>)Function(Rados.Value, "rados_ioctx_destroy"))(_pool);
        if (_cluster is not null)
            ((delegate* unmanaged<void*, void>)Function(Rados.Value, "rados_shutdown"))(_cluster);
        _image = null;
        _pool = null;
        _cluster = null;
    }

    private static nint Function(nint library, string name) => NativeLibrary.GetExport(library, name);

    private static byte[]? Utf8(string? text) => text is null ? null : Encoding.UTF8.GetBytes(text + "\0");

    private static string Reason(int result) => Marshal.GetPInvokeErrorMessage(-result);

    private string Connect(
        (string Pool, string Namespace, string Image, string Snapshot) place, string? user, string? configuration, IEnumerable<KeyValuePair<string, string>> settings, bool readOnly)
    {
        void* made = null;
        int result;
        // SAFETY: signatures of rados/librados.h and rbd/librbd.h; strings end with a zero, stay pinned for the calls and are copied.
        fixed (byte* name = Utf8(user))
            result = ((delegate* unmanaged<void**, byte*, int>)Function(Rados.Value, "rados_create"))(&made, name);
        if (result < 0)
            return "error initializing: " + Reason(result);
        _cluster = made;
        fixed (byte* path = Utf8(configuration))
            result = ((delegate* unmanaged<void*, byte*, int>)Function(Rados.Value, "rados_conf_read_file"))(_cluster, path);
        // Without the usual file all may come from the settings.
        if (result < 0 && configuration is not null)
            return $"error reading conf file {configuration}: {Reason(result)}";
        foreach ((string key, string value) in settings)
        {
            fixed (byte* name = Utf8(key), text = Utf8(value))
                result = ((delegate* unmanaged<void*, byte*, byte*, int>)Function(Rados.Value, "rados_conf_set"))(_cluster, name, text);
            if (result < 0)
                return $"invalid conf option {key}: {Reason(result)}";
        }
        result = ((delegate* unmanaged<void*, int>)Function(Rados.Value, "rados_connect"))(_cluster);
        if (result < 0)
            return "error connecting: " + Reason(result);
        fixed (byte* pool = Utf8(place.Pool))
            result = ((delegate* unmanaged<void*, byte*, void**, int>)Function(Rados.Value, "rados_ioctx_create"))(_cluster, pool, &made);
        if (result < 0)
            return $"error opening pool {place.Pool}: {Reason(result)}";
        _pool = made;
        if (place.Namespace.Length > 0)
        {
            fixed (byte* space = Utf8(place.Namespace))
                ((delegate* unmanaged<void*, byte*, void>)Function(Rados.Value, "rados_ioctx_set_namespace"))(_pool, space);
        }
        fixed (byte* image = Utf8(place.Image), snapshot = Utf8(place.Snapshot.Length > 0 ? place.Snapshot : null))
        {
            result = ((delegate* unmanaged<void*, byte*, void**, byte*, int>)Function(Rbd.Value, readOnly ? "rbd_open_read_only" : "rbd_open"))(_pool, image, &made, snapshot);
        }
        if (result < 0)
            return $"error reading header from {place.Image}: {Reason(result)}";
        _image = made;
        return string.Empty;
    }
}
