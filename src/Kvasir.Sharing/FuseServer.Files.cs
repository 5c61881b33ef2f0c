using System;
using System.Buffers.Binary;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <content>Open files and folders.</content>
public sealed partial class FuseServer
{
    private int OpenFile(Node node, ref FuseReader arguments, ref FuseWriter writer)
    {
        int flags = (int)arguments.U32();
        if (_handles.Count >= MaximumHandles)
            return -TableFull;
        int fd = OpenRegular(node, flags & FileAt.AccessModeMask);
        if (fd < 0)
            return fd;
        AnswerHandle(fd, node, flags & FileAt.AccessModeMask, ref writer);
        return 0;
    }

    private int OpenFolder(Node node, ref FuseWriter writer)
    {
        if (node.Kind != FileAttributes64.Folder)
            return -NotFolder;
        if (_handles.Count >= MaximumHandles)
            return -TableFull;
        int path = _nodes.Open(node);
        if (path < 0)
            return path;
        int fd = FileAt.Reopen(path, FileAt.OpenDirectory);
        if (fd < 0)
            return fd;
        AnswerHandle(fd, node, 0, ref writer);
        return 0;
    }

    /// <summary>Opens a regular file: pipes and devices are the guest kernel's own business, and would have this thread wait.</summary>
    private int OpenRegular(Node node, int flags)
    {
        if (node.Kind != FileAttributes64.Regular)
            return node.Kind == FileAttributes64.Folder ? -IsFolder : -NotSupported;
        if (_readOnly && (flags & FileAt.AccessModeMask) != 0)
            return -ReadOnlySystem;
        int path = _nodes.Open(node);
        return path < 0 ? path : FileAt.Reopen(path, flags | FileAt.OpenNonBlocking);
    }

    /// <summary>struct fuse_open_out.</summary>
    private void AnswerHandle(int fd, Node node, int access, ref FuseWriter writer)
    {
        ulong number = _nextHandle++;
        _handles[number] = new Handle(fd, node, access);
        writer.U64(number);
        writer.U64(0);
    }

    private int Read(ref FuseReader arguments, ref FuseWriter writer)
    {
        ulong number = arguments.U64();
        ulong offset = arguments.U64();
        uint size = arguments.U32();
        if (!_handles.TryGetValue(number, out Handle? handle))
            return -BadHandle;
        if (offset > long.MaxValue)
            return -Invalid;
        int done = FileAt.Read(handle.Fd, (long)offset, writer.Rest[..(int)Math.Min(Math.Min(size, MaximumTransfer), (uint)writer.Rest.Length)]);
        if (done > 0)
            writer.Advance(done);
        return done;
    }

    private int Write(ref FuseReader arguments, ref FuseWriter writer)
    {
        ulong number = arguments.U64();
        ulong offset = arguments.U64();
        uint size = arguments.U32();
        arguments.Skip(20);
        if (!_handles.TryGetValue(number, out Handle? handle))
            return -BadHandle;
        if (offset > long.MaxValue || size > arguments.Rest.Length)
            return -Invalid;
        int done = FileAt.Write(handle.Fd, (long)offset, arguments.Rest[..(int)size]);
        if (done < 0)
            return done;
        writer.U32((uint)done);
        writer.U32(0);
        return 0;
    }

    private int Release(ref FuseReader arguments)
    {
        if (!_handles.Remove(arguments.U64(), out Handle? handle))
            return -BadHandle;
        Close(handle);
        return 0;
    }

    private int Sync(ref FuseReader arguments)
    {
        const uint dataOnly = 1;
        if (!_handles.TryGetValue(arguments.U64(), out Handle? handle))
            return -BadHandle;
        return FileAt.Sync(handle.Fd, (arguments.U32() & dataOnly) != 0);
    }

    private int Allocate(ref FuseReader arguments)
    {
        ulong number = arguments.U64();
        ulong offset = arguments.U64();
        ulong length = arguments.U64();
        uint mode = arguments.U32();
        if (!_handles.TryGetValue(number, out Handle? handle))
            return -BadHandle;
        if (offset > long.MaxValue || length > long.MaxValue)
            return -Invalid;
        return FileAt.Allocate(handle.Fd, (int)mode, (long)offset, (long)length);
    }

    private int Seek(ref FuseReader arguments, ref FuseWriter writer)
    {
        ulong number = arguments.U64();
        ulong offset = arguments.U64();
        uint whence = arguments.U32();
        const uint data = 3;
        const uint hole = 4;
        if (!_handles.TryGetValue(number, out Handle? handle))
            return -BadHandle;
        if (whence is not (data or hole) || offset > long.MaxValue)
            return -Invalid;
        long found = FileAt.Seek(handle.Fd, (long)offset, (int)whence);
        if (found < 0)
            return (int)found;
        writer.U64((ulong)found);
        return 0;
    }

    private int ReadFolder(ref FuseReader arguments, ref FuseWriter writer)
    {
        ulong number = arguments.U64();
        ulong offset = arguments.U64();
        uint size = arguments.U32();
        if (!_handles.TryGetValue(number, out Handle? handle))
            return -BadHandle;
        if (handle.Node.Kind != FileAttributes64.Folder)
            return -NotFolder;
        long at = FileAt.Seek(handle.Fd, (long)offset, 0);
        if (at < 0)
            return (int)at;
        int room = (int)Math.Min(size, (uint)writer.Rest.Length);
        // An entry here is no shorter than the kernel's own: what is read fits.
        int read = FileAt.ReadEntries(handle.Fd, _entries.AsSpan(0, Math.Min(_entries.Length, Math.Max(room, 0))));
        if (read < 0)
            return read == -Invalid && room < 512 ? -Invalid : read;
        ReadOnlySpan<byte> entries = _entries.AsSpan(0, read);
        const int kernelHead = 19;
        const int head = 24;
        while (entries.Length > kernelHead)
        {
            int length = BinaryPrimitives.ReadUInt16LittleEndian(entries[16..]);
            ReadOnlySpan<byte> name = entries[kernelHead..length];
            name = name[..name.IndexOf((byte)0)];
            int padded = (head + name.Length + 7) & ~7;
            if (padded > room)
                break;
            writer.U64(BinaryPrimitives.ReadUInt64LittleEndian(entries));
            writer.U64(BinaryPrimitives.ReadUInt64LittleEndian(entries[8..]));
            writer.U32((uint)name.Length);
            writer.U32(entries[18]);
            writer.Bytes(name);
            writer.Zeros(padded - head - name.Length);
            room -= padded;
            entries = entries[length..];
        }
        return 0;
    }
}
