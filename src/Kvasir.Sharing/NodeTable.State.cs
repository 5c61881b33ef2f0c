using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <summary>A file as a saved state has it: by name, and by what shows that the name stands for the same file still.</summary>
/// <param name="Lookups">0: the guest knows it no more, but files below it.</param>
/// <param name="Time">When it was made or changed; null: that is not known, and it will be another file.</param>
/// <param name="IsBirth">It is the time of its making.</param>
public sealed record SavedNode(
    ulong Id, ulong Device, ulong Inode, uint Kind, ulong Lookups, ulong Parent, byte[] Name, (long Seconds, uint Nanoseconds)? Time, bool IsBirth);

/// <content>Saved states.</content>
internal sealed partial class NodeTable
{
    public ulong NextId => _nextId;

    /// <summary>All nodes but the root.</summary>
    public SavedNode[] Save()
    {
        Dictionary<ulong, SavedNode> saved = [];
        foreach (Node node in _byId.Values)
        {
            // Folders that the guest forgot lead to files that it knows.
            for (Node? at = node; at is not null && at != _root && !saved.ContainsKey(at.Id); at = at.Parent)
                saved.Add(at.Id, Save(at));
        }
        return [.. saved.Values];
    }

    /// <summary>Looks whether saved nodes can be put back.</summary>
    /// <returns>What is wrong with them, or null.</returns>
    public static string? Fault(SavedNode[] nodes, ulong nextId)
    {
        if (nodes.Length >= MaximumNodes)
            return $"it has {nodes.Length} files";
        HashSet<ulong> ids = [RootId];
        HashSet<(ulong, ulong)> files = [];
        foreach (SavedNode? node in nodes)
        {
            if (node is not { Name.Length: >= 2 and <= LongestName + 1 })
                return "a file has no name";
            ReadOnlySpan<byte> name = node.Name.AsSpan(0, node.Name.Length - 1);
            if (node.Name[^1] != 0 || name.ContainsAny((byte)0, (byte)'/') || name.SequenceEqual("."u8) || name.SequenceEqual(".."u8))
                return $"file {node.Id} has a name that leads elsewhere";
            if (node.Id >= nextId || !ids.Add(node.Id))
                return $"there is no file {node.Id}, or two";
            if (node.Lookups > 0 && !files.Add((node.Device, node.Inode)) && !node.IsBirth)
                return $"file {node.Id} has two numbers";
        }
        return nodes.FirstOrDefault(node => !ids.Contains(node.Parent)) is { } orphan ? $"file {orphan.Id} is in folder {orphan.Parent}, which is not there" : null;
    }

    /// <summary>Puts back what <see cref="Fault"/> found sound. Files are opened as they are asked for.</summary>
    public void Restore(SavedNode[] nodes, ulong nextId)
    {
        Clear();
        _nextId = nextId;
        Dictionary<ulong, Node> made = new() { [RootId] = _root };
        foreach (SavedNode saved in nodes)
        {
            made[saved.Id] = new Node(saved.Id, saved.Device, saved.Inode, saved.Kind)
            {
                Lookups = saved.Lookups,
                Name = [.. saved.Name],
                Born = saved.IsBirth ? saved.Time : null,
                Saved = (true, saved.IsBirth ? null : saved.Time),
            };
        }
        foreach (SavedNode saved in nodes)
        {
            Node node = made[saved.Id];
            node.Parent = made[saved.Parent];
            if (saved.Lookups > 0)
                Add(node);
        }
    }

    private static SavedNode Save(Node node)
    {
        (long, uint)? time = node.Born;
        if (time is null && node.Fd >= 0 && FileAt.Age(node.Fd, out (long, uint) changed, out _) >= 0)
            time = changed;
        else if (time is null && node.Saved.Awaited)
            time = node.Saved.Changed;
        return new SavedNode(node.Id, node.Device, node.Inode, node.Kind, node.Lookups, node.Parent!.Id, [.. node.Name], time, node.Born is not null);
    }
}
