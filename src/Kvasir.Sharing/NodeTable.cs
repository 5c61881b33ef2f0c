using System;
using System.Collections.Generic;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <summary>A file or folder that the guest knows by a number.</summary>
internal sealed class Node(ulong id, ulong device, ulong inode, uint kind)
{
    public ulong Id { get; } = id;

    public ulong Device { get; } = device;

    public ulong Inode { get; } = inode;

    /// <summary>The file's kind, which it keeps for life (<see cref="FileAttributes64.KindMask"/>).</summary>
    public uint Kind { get; } = kind;

    /// <summary>When it was made, where the file system says: a later file that has its number is another one.</summary>
    public (long Seconds, uint Nanoseconds)? Born { get; set; }

    /// <summary>
    /// Out of a saved state, and not seen since: when it was changed last, where that is all there is to know it by; null: nothing is, and it stays unknown.
    /// </summary>
    public (bool Awaited, (long Seconds, uint Nanoseconds)? Changed) Saved { get; set; }

    /// <summary>An O_PATH descriptor, or -1 where it was closed to spare descriptors.</summary>
    public int Fd { get; set; } = -1;

    /// <summary>How often the guest was told of it and did not forget.</summary>
    public ulong Lookups { get; set; }

    /// <summary>Where it was seen last; null for the root.</summary>
    public Node? Parent { get; set; }

    /// <summary>Its name there, with the final zero.</summary>
    public byte[] Name { get; set; } = [];
}

/// <summary>
/// The files that the guest knows. A bounded number of them is held open; the others are opened again by name, and taken only where the name still
/// stands for the same file. One thread.
/// </summary>
internal sealed partial class NodeTable : IDisposable
{
    public const ulong RootId = 1;

    private const int OpenNodes = 2048;
    private const int LongestName = 255;
    private const int MaximumNodes = 4 << 20;
    private const int DeepestPath = 2048;
    private const int NoMemory = 12;
    private const int Stale = 116;
    private const int TooManyLinks = 40;

    private readonly Dictionary<ulong, Node> _byId = [];
    private readonly Dictionary<(ulong Device, ulong Inode), Node> _byFile = [];
    private readonly Queue<Node> _open = new();
    private readonly Stack<Node> _path = new();
    private readonly Node _root;
    private ulong _nextId = RootId + 1;
    private int _openCount;

    /// <param name="rootFd">The folder, opened with O_PATH; owned from here on.</param>
    public NodeTable(int rootFd, in FileAttributes64 attributes)
    {
        _root = new Node(RootId, attributes.Device, attributes.Inode, FileAttributes64.Folder) { Fd = rootFd };
        Add(_root);
    }

    public int Count => _byId.Count;

    public Node? Find(ulong id) => _byId.GetValueOrDefault(id);

    /// <summary>Closes what is held open beyond the limit. Between requests.</summary>
    public void Trim()
    {
        while (_openCount > OpenNodes && _open.TryDequeue(out Node? node))
        {
            if (node.Fd >= 0)
                CloseNode(node);
        }
    }

    /// <summary>A node's descriptor.</summary>
    /// <returns>-errno where the file is not there any more.</returns>
    public int Open(Node node)
    {
        if (node.Fd >= 0)
            return node.Fd;
        _path.Clear();
        for (Node? at = node; at is not null && at.Fd < 0; at = at.Parent)
        {
            _path.Push(at);
            if (_path.Count > DeepestPath)
                return -TooManyLinks;
        }
        while (_path.TryPop(out Node? next))
        {
            if (next.Parent is not { Fd: >= 0 } parent)
                return -Stale;
            int fd = FileAt.Open(parent.Fd, next.Name, FileAt.OpenPath | FileAt.OpenNoFollow);
            if (fd < 0)
                return -Stale;
            if (FileAt.Stat(fd, out FileAttributes64 attributes) < 0 || !IsSame(next, fd, attributes))
            {
                _ = FileAt.Close(fd);
                return -Stale;
            }
            Hold(next, fd);
        }
        return node.Fd;
    }

    /// <summary>Finds a name below a folder, and counts that the guest is told of it.</summary>
    /// <returns>0, or -errno.</returns>
    public int Lookup(Node parent, ReadOnlySpan<byte> name, out Node? node, out FileAttributes64 attributes)
    {
        node = null;
        attributes = default;
        int folder = Open(parent);
        if (folder < 0)
            return folder;
        int fd = FileAt.Open(folder, name, FileAt.OpenPath | FileAt.OpenNoFollow);
        if (fd < 0)
            return fd;
        int result = FileAt.Stat(fd, out attributes);
        if (result < 0)
        {
            _ = FileAt.Close(fd);
            return result;
        }
        if (_byFile.TryGetValue((attributes.Device, attributes.Inode), out node) && (node.Fd >= 0 ? node.Kind == attributes.Kind : IsSame(node, fd, attributes)))
        {
            if (node.Fd >= 0)
                _ = FileAt.Close(fd);
            else
                Hold(node, fd);
        }
        else
        {
            if (_byId.Count >= MaximumNodes)
            {
                _ = FileAt.Close(fd);
                return -NoMemory;
            }
            node = new Node(_nextId++, attributes.Device, attributes.Inode, attributes.Kind) { Born = Born(fd) };
            Add(node);
            Hold(node, fd);
        }
        if (node != _root)
        {
            node.Parent = parent;
            if (!name.SequenceEqual(node.Name))
                node.Name = name.ToArray();
        }
        node.Lookups++;
        return 0;
    }

    /// <summary>A file has another name now.</summary>
    public void Moved(Node folder, ReadOnlySpan<byte> name)
    {
        if (folder.Fd < 0)
            return;
        int fd = FileAt.Open(folder.Fd, name, FileAt.OpenPath | FileAt.OpenNoFollow);
        if (fd < 0)
            return;
        if (FileAt.Stat(fd, out FileAttributes64 attributes) == 0 && _byFile.TryGetValue((attributes.Device, attributes.Inode), out Node? node) && node != _root
            && (node.Fd >= 0 || IsSame(node, fd, attributes)))
        {
            node.Parent = folder;
            node.Name = name.ToArray();
        }
        _ = FileAt.Close(fd);
    }

    /// <summary>The guest gives lookups back.</summary>
    public void Forget(ulong id, ulong lookups)
    {
        if (id == RootId || !_byId.TryGetValue(id, out Node? node))
            return;
        node.Lookups -= Math.Min(lookups, node.Lookups);
        if (node.Lookups == 0)
            Remove(node);
    }

    /// <summary>The guest starts anew: all but the root goes.</summary>
    public void Clear()
    {
        // Folders that the guest has forgotten are open all the same where a file below them was looked for.
        while (_open.TryDequeue(out Node? open))
        {
            if (open.Fd >= 0)
                CloseNode(open);
        }
        foreach (Node node in (Node[])[.. _byId.Values])
        {
            if (node != _root)
                Remove(node);
        }
    }

    public void Dispose()
    {
        Clear();
        if (_root.Fd >= 0)
            _ = FileAt.Close(_root.Fd);
        _root.Fd = -1;
    }

    private static (long, uint)? Born(int fd) => FileAt.Age(fd, out (long, uint) time, out bool made) >= 0 && made ? time : null;

    /// <summary>Whether what a name stands for now is the file that a node stood for.</summary>
    private static bool IsSame(Node node, int fd, in FileAttributes64 attributes)
    {
        if (attributes.Device != node.Device || attributes.Inode != node.Inode || attributes.Kind != node.Kind)
            return false;
        if (node.Born is null && !node.Saved.Awaited)
            return true;
        if (FileAt.Age(fd, out (long, uint) time, out bool made) < 0)
            return false;
        if (node.Born is { } born)
            return made && time == born;
        bool same = !made && node.Saved.Changed == time;
        if (same)
            node.Saved = default;
        return same;
    }

    private void Add(Node node)
    {
        _byId[node.Id] = node;
        _byFile[(node.Device, node.Inode)] = node;
    }

    private void Remove(Node node)
    {
        _byId.Remove(node.Id);
        if (_byFile.TryGetValue((node.Device, node.Inode), out Node? same) && same == node)
            _byFile.Remove((node.Device, node.Inode));
        if (node.Fd >= 0)
            CloseNode(node);
    }

    private void Hold(Node node, int fd)
    {
        node.Fd = fd;
        _openCount++;
        _open.Enqueue(node);
        // Nodes that were forgotten stay in the queue until their turn: it must not outgrow what is open.
        while (_open.Count > 2 * OpenNodes && _open.Peek().Fd < 0)
            _open.Dequeue();
    }

    private void CloseNode(Node node)
    {
        _ = FileAt.Close(node.Fd);
        node.Fd = -1;
        _openCount--;
    }
}
