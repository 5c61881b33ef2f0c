using System;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <content>What makes, moves and removes names.</content>
public sealed partial class FuseServer
{
    private int MakeSymbolicLink(in FuseHeader header, Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        ReadOnlySpan<byte> name = arguments.Text();
        ReadOnlySpan<byte> target = arguments.Text();
        int folder = OpenForChange(parent, name);
        if (folder < 0)
            return folder;
        if (target.Length < 2)
            return -Invalid;
        // Where it leads is for the guest to find out: here it is text.
        int result = FileAt.MakeLink(target, folder, name);
        return result < 0 ? result : Made(header, parent, name, null, ref writer);
    }

    private int MakeNode(in FuseHeader header, Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        uint mode = arguments.U32();
        arguments.Skip(12);
        ReadOnlySpan<byte> name = arguments.Text();
        int folder = OpenForChange(parent, name);
        if (folder < 0)
            return folder;
        if ((mode & FileAttributes64.KindMask) is not (FileAttributes64.Regular or FileAttributes64.Fifo or FileAttributes64.Socket))
            return -NotPermitted;
        int result = FileAt.MakeNode(folder, name, (mode & FileAttributes64.KindMask) | AllowedMode(mode));
        return result < 0 ? result : Made(header, parent, name, mode, ref writer);
    }

    private int MakeFolder(in FuseHeader header, Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        uint mode = arguments.U32();
        arguments.Skip(4);
        ReadOnlySpan<byte> name = arguments.Text();
        int folder = OpenForChange(parent, name);
        if (folder < 0)
            return folder;
        int result = FileAt.MakeFolder(folder, name, AllowedMode(mode));
        return result < 0 ? result : Made(header, parent, name, mode, ref writer);
    }

    private int Create(in FuseHeader header, Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        int flags = (int)arguments.U32();
        uint mode = arguments.U32();
        arguments.Skip(8);
        ReadOnlySpan<byte> name = arguments.Text();
        int folder = OpenForChange(parent, name);
        if (folder < 0)
            return folder;
        if (_handles.Count >= MaximumHandles)
            return -TableFull;
        int access = flags & FileAt.AccessModeMask;
        int fd = FileAt.Open(folder, name, access | FileAt.OpenCreate | FileAt.OpenExclusive | FileAt.OpenNoFollow, AllowedMode(mode));
        bool made = fd >= 0;
        if (fd < 0 && (fd != -Exists || (flags & FileAt.OpenExclusive) != 0))
            return fd;
        int result = made ? Made(header, parent, name, mode, ref writer) : Answer(parent, name, ref writer);
        Node? node = result < 0 ? null : _answered;
        if (node is null)
        {
            if (made)
                _ = FileAt.Close(fd);
            return result < 0 ? result : -IoError;
        }
        if (!made)
        {
            fd = OpenRegular(node, access | (flags & FileAt.OpenTruncate));
            if (fd < 0)
            {
                _nodes.Forget(node.Id, 1);
                return fd;
            }
        }
        AnswerHandle(fd, node, access, ref writer);
        return 0;
    }

    private int Remove(Node parent, ref FuseReader arguments, bool isFolder)
    {
        ReadOnlySpan<byte> name = arguments.Text();
        int folder = OpenForChange(parent, name);
        return folder < 0 ? folder : FileAt.Remove(folder, name, isFolder);
    }

    private int Rename(Node parent, ref FuseReader arguments, bool withFlags)
    {
        Node? target = _nodes.Find(arguments.U64());
        uint flags = withFlags ? arguments.U32() : 0;
        if (withFlags)
            arguments.Skip(4);
        ReadOnlySpan<byte> from = arguments.Text();
        ReadOnlySpan<byte> to = arguments.Text();
        const uint noReplace = 1;
        const uint exchange = 2;
        if (target is null)
            return -Stale;
        if ((flags & ~(noReplace | exchange)) != 0)
            return -Invalid;
        int source = OpenForChange(parent, from);
        if (source < 0)
            return source;
        int place = OpenForChange(target, to);
        if (place < 0)
            return place;
        int result = FileAt.Rename(source, from, place, to, flags);
        if (result < 0)
            return result;
        _nodes.Moved(target, to);
        if ((flags & exchange) != 0)
            _nodes.Moved(parent, from);
        return 0;
    }

    private int Link(Node parent, ref FuseReader arguments, ref FuseWriter writer)
    {
        Node? node = _nodes.Find(arguments.U64());
        ReadOnlySpan<byte> name = arguments.Text();
        if (node is null)
            return -Stale;
        int folder = OpenForChange(parent, name);
        if (folder < 0)
            return folder;
        int fd = _nodes.Open(node);
        if (fd < 0)
            return fd;
        int result = FileAt.HardLink(fd, folder, name);
        return result < 0 ? result : Answer(parent, name, ref writer);
    }

    private int SetExtended(Node node, ref FuseReader arguments)
    {
        uint size = arguments.U32();
        int flags = (int)arguments.U32();
        ReadOnlySpan<byte> name = arguments.Text();
        int fd = OpenForExtended(node, name, change: true);
        if (fd < 0)
            return fd;
        if (size > arguments.Rest.Length || flags is < 0 or > 2)
            return -Invalid;
        return FileAt.SetAttribute(fd, name, arguments.Rest[..(int)size], flags);
    }

    private int GetExtended(Node node, ref FuseReader arguments, ref FuseWriter writer)
    {
        uint size = arguments.U32();
        arguments.Skip(4);
        ReadOnlySpan<byte> name = arguments.Text();
        int fd = OpenForExtended(node, name, change: false);
        if (fd < 0)
            return fd;
        return AnswerExtended(size, size == 0 ? FileAt.GetAttribute(fd, name, default) : FileAt.GetAttribute(fd, name, Room(size, ref writer)), ref writer);
    }

    private int ListExtended(Node node, ref FuseReader arguments, ref FuseWriter writer)
    {
        uint size = arguments.U32();
        int fd = _nodes.Open(node);
        if (fd < 0)
            return fd;
        if (node.Kind is not (FileAttributes64.Regular or FileAttributes64.Folder))
            return AnswerExtended(size, 0, ref writer);
        return AnswerExtended(size, size == 0 ? FileAt.ListAttributes(fd, default) : FileAt.ListAttributes(fd, Room(size, ref writer)), ref writer);
    }

    private int RemoveExtended(Node node, ref FuseReader arguments)
    {
        ReadOnlySpan<byte> name = arguments.Text();
        int fd = OpenForExtended(node, name, change: true);
        return fd < 0 ? fd : FileAt.RemoveAttribute(fd, name);
    }

    private static Span<byte> Room(uint size, ref FuseWriter writer) => writer.Rest[..(int)Math.Min(size, (uint)writer.Rest.Length)];

    private static int AnswerExtended(uint asked, int result, ref FuseWriter writer)
    {
        if (result < 0)
            return result;
        if (asked == 0)
        {
            writer.U32((uint)result);
            writer.U32(0);
        }
        else
        {
            writer.Advance(result);
        }
        return 0;
    }

    /// <summary>Only attributes for users: the others mean something to the host's kernel.</summary>
    private int OpenForExtended(Node node, ReadOnlySpan<byte> name, bool change)
    {
        if (change && _readOnly)
            return -ReadOnlySystem;
        if (name.Length > LongestName + 1 || !name.StartsWith("user."u8) || node.Kind is not (FileAttributes64.Regular or FileAttributes64.Folder))
            return -NotSupported;
        return _nodes.Open(node);
    }

    /// <summary>A folder in which a name is to change.</summary>
    private int OpenForChange(Node parent, ReadOnlySpan<byte> name)
    {
        if (_readOnly)
            return -ReadOnlySystem;
        int fault = CheckName(parent, name);
        return fault != 0 ? fault : _nodes.Open(parent);
    }

    /// <summary>Something new is there: gives it its owner and bits, and tells the guest of it.</summary>
    /// <param name="mode">Null: a symbolic link, whose bits are fixed.</param>
    private int Made(in FuseHeader header, Node parent, ReadOnlySpan<byte> name, uint? mode, ref FuseWriter writer)
    {
        int result = Answer(parent, name, ref writer);
        if (result < 0)
            return result;
        Node? node = _answered;
        int fd = node is null ? -Stale : _nodes.Open(node);
        if (fd < 0)
            return fd;
        if (_privileged)
            _ = FileAt.SetOwner(fd, header.User, header.Group);
        // The guest's mask was applied there; this process's own has nothing to say.
        if (mode is { } bits)
            _ = FileAt.SetMode(fd, AllowedMode(bits));
        return 0;
    }
}
