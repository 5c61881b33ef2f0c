using System;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Block;

/// <summary>
/// An image of a Ceph cluster, through librbd: "rbd:pool[/namespace]/image[@snapshot][:id=user][:conf=file][:setting=value...]"; a backslash
/// before a separator takes its meaning away.
/// </summary>
public sealed class RbdNode : BlockNode
{
    private const string Package = "librbd1";
    private const int LargestTransfer = 4 << 20;

    private readonly Librbd _image;
    private readonly bool _readOnly;
    private long _length;

    private RbdNode(string name, Librbd image, bool readOnly, long length)
    {
        FileName = name;
        _image = image;
        _readOnly = readOnly;
        _length = length;
    }

    public override string Driver => "rbd";

    public override string FileName { get; }

    public override long Length => Volatile.Read(ref _length);

    public override bool IsReadOnly => _readOnly;

    public override bool HasFastZero => false;

    /// <exception cref="BlockException">The library is missing, or the cluster refuses.</exception>
    public static async ValueTask<RbdNode> OpenAsync(string name, bool readOnly)
    {
        Address address = Address.Parse(name);
        if (!Librbd.IsPresent)
            throw new BlockException($"rbd needs the library librbd: install the package {Package}, or map the image on the host (rbd map, package ceph-common) and name the device", BlockErrno.NotSupported);
        readOnly |= address.Snapshot.Length > 0;
        return await Task.Run(() =>
        {
            Librbd image = Librbd.Open((address.Pool, address.Namespace, address.Image, address.Snapshot), address.User, address.Configuration, address.Settings, readOnly, out string error)
                ?? throw new BlockException(error, BlockErrno.Io);
            long length = image.Size();
            if (length >= 0)
                return new RbdNode(name, image, readOnly, length);
            image.Dispose();
            throw new BlockException($"'{name}' does not tell its size: {Reason(length)}", BlockErrno.Io);
        }).ConfigureAwait(false);
    }

    public override async ValueTask FlushAsync(CancellationToken cancellation = default)
    {
        if (!_readOnly)
            await CallAsync("flush", () => _image.Flush()).ConfigureAwait(false);
    }

    public override async ValueTask ResizeAsync(long length, Preallocation preallocation = Preallocation.Off, CancellationToken cancellation = default)
    {
        if (preallocation != Preallocation.Off)
            throw new BlockException("An image of a Ceph cluster cannot be preallocated", BlockErrno.NotSupported);
        await CallAsync("resize", () => _image.Resize(length)).ConfigureAwait(false);
        Volatile.Write(ref _length, length);
    }

    public override async ValueTask DisposeAsync()
    {
        await Task.Run(_image.Dispose).ConfigureAwait(false);
        await base.DisposeAsync().ConfigureAwait(false);
    }

    protected override async ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            Memory<byte> part = buffer[..Math.Min(buffer.Length, LargestTransfer)];
            long at = offset;
            long done = await CallAsync("read", () => _image.Read(at, part.Span)).ConfigureAwait(false);
            if (done == 0)
                throw new BlockException($"'{FileName}' ends before {offset + buffer.Length}", BlockErrno.Io);
            buffer = buffer[(int)done..];
            offset += done;
        }
    }

    protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
    {
        while (!buffer.IsEmpty)
        {
            ReadOnlyMemory<byte> part = buffer[..Math.Min(buffer.Length, LargestTransfer)];
            long at = offset;
            long done = await CallAsync("write", () => _image.Write(at, part.Span)).ConfigureAwait(false);
            if (done == 0)
                throw new BlockException($"Could not write '{FileName}': nothing was taken", BlockErrno.Io);
            buffer = buffer[(int)done..];
            offset += done;
        }
        if ((flags & WriteFlags.ForceUnitAccess) != 0)
            await FlushAsync(cancellation).ConfigureAwait(false);
    }

    protected override async ValueTask DiscardCoreAsync(long offset, long length, CancellationToken cancellation) =>
        await CallAsync("discard", () => _image.Discard(offset, length)).ConfigureAwait(false);

    private async ValueTask<long> CallAsync(string what, Func<long> call)
    {
        long result = await Task.Run(call).ConfigureAwait(false);
        return result >= 0 ? result : throw new BlockException($"Could not {what} '{FileName}': {Reason(result)}", BlockErrno.Io);
    }

    private static string Reason(long result) => Marshal.GetPInvokeErrorMessage((int)-result);

    /// <summary>The parts of a name.</summary>
    internal sealed record Address(string Pool, string Namespace, string Image, string Snapshot, string? User, string? Configuration, IReadOnlyDictionary<string, string> Settings)
    {
        /// <exception cref="BlockException">It is no such name.</exception>
        public static Address Parse(string name)
        {
            if (!name.StartsWith("rbd:", StringComparison.Ordinal))
                throw new BlockException("File name must start with 'rbd:'");
            List<string> parts = Split(name[4..], ':');
            List<string> path = Split(parts[0], '/');
            if (path.Count is < 2 or > 3)
                throw new BlockException("Pool name and image name are required: rbd:pool/image");
            List<string> image = Split(path[^1], '@');
            Dictionary<string, string> settings = new(StringComparer.Ordinal);
            foreach (string setting in parts.GetRange(1, parts.Count - 1))
            {
                int equals = setting.IndexOf('=', StringComparison.Ordinal);
                if (equals <= 0)
                    throw new BlockException($"conf option {setting} has no value");
                settings[Plain(setting[..equals])] = Plain(setting[(equals + 1)..]);
            }
            _ = settings.Remove("id", out string? user);
            _ = settings.Remove("conf", out string? configuration);
            string pool = Plain(path[0]);
            string last = Plain(image[0]);
            if (pool.Length == 0 || last.Length == 0)
                throw new BlockException("Pool name and image name are required: rbd:pool/image");
            return new Address(pool, path.Count == 3 ? Plain(path[1]) : string.Empty, last, image.Count > 1 ? Plain(image[1]) : string.Empty, user, configuration, settings);
        }

        /// <summary>The name that options make.</summary>
        public static string Name(ImageOptions options)
        {
            StringBuilder name = new("rbd:");
            name.Append(Guarded(options["pool"] ?? throw new BlockException("Parameter 'pool' is missing")));
            if (options["namespace"] is { Length: > 0 } space)
                name.Append('/').Append(Guarded(space));
            name.Append('/').Append(Guarded(options["image"] ?? throw new BlockException("Parameter 'image' is missing")));
            if (options["snapshot"] is { Length: > 0 } snapshot)
                name.Append('@').Append(Guarded(snapshot));
            if (options["user"] is string user)
                name.Append(":id=").Append(Guarded(user));
            if (options["conf"] is string configuration)
                name.Append(":conf=").Append(Guarded(configuration));
            List<string> monitors = [];
            for (int i = 0; options[$"server.{i}.host"] is string host; i++)
                monitors.Add($"{host}:{options[$"server.{i}.port"] ?? "6789"}");
            if (monitors.Count > 0)
                name.Append(":mon_host=").Append(Guarded(string.Join(',', monitors)));
            return name.ToString();
        }

        private static string Guarded(string text)
        {
            StringBuilder guarded = new();
            foreach (char c in text)
            {
                if (c is ':' or '/' or '@' or '\\')
                    guarded.Append('\\');
                guarded.Append(c);
            }
            return guarded.ToString();
        }

        private static List<string> Split(string text, char separator)
        {
            List<string> parts = [];
            int start = 0;
            for (int i = 0; i < text.Length; i++)
            {
                if (text[i] == '\\')
                {
                    i++;
                }
                else if (text[i] == separator)
                {
                    parts.Add(text[start..i]);
                    start = i + 1;
                }
            }
            parts.Add(text[start..]);
            return parts;
        }

        private static string Plain(string text)
        {
            StringBuilder plain = new();
            for (int i = 0; i < text.Length; i++)
            {
                if (text[i] == '\\' && i + 1 < text.Length)
                    i++;
                plain.Append(text[i]);
            }
            return plain.ToString();
        }
    }
}
