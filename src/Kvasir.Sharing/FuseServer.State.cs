using System.Collections.Generic;
using Kvasir.Linux;

namespace Kvasir.Sharing;

/// <summary>A file or folder that the guest had open.</summary>
/// <param name="Access">For reading, writing or both, as open(2) has it.</param>
public sealed record SavedHandle(ulong Number, ulong Node, int Access);

/// <content>
/// Saved states. Files are named by their paths below the shared folder, and with a state they are opened again by them. What is not the same file any more, by
/// its number and the time of its making, is stale (ESTALE), and the guest's kernel looks its name up anew: it is never given another file under a number that it knows.
/// </content>
public sealed partial class FuseServer
{
    /// <summary>What the guest knows and has open. A state says nothing of the shared folder's place.</summary>
    public sealed record State(bool Initialized, ulong NextNode, ulong NextHandle, SavedNode[] Nodes, SavedHandle[] Handles);

    /// <summary>The state between two requests.</summary>
    public State Save()
    {
        List<SavedHandle> handles = [];
        foreach ((ulong number, Handle handle) in _handles)
        {
            // A guest that forgot a file that it has open finds it stale.
            if (handle.Node.Lookups > 0 || handle.Node.Id == NodeTable.RootId)
                handles.Add(new SavedHandle(number, handle.Node.Id, handle.Access));
        }
        return new State(_initialized, _nodes.NextId, _nextHandle, _nodes.Save(), [.. handles]);
    }

    /// <summary>Looks whether a state can be put back. Nothing changes.</summary>
    /// <returns>What is wrong with it, or null.</returns>
    public static string? Fault(State? state)
    {
        if (state is not { Nodes: { } nodes, Handles: { } handles })
            return "it is not whole";
        if (NodeTable.Fault(nodes, state.NextNode) is { } fault)
            return fault;
        if (handles.Length > MaximumHandles)
            return $"it has {handles.Length} open files";
        if (!state.Initialized && nodes.Length + handles.Length > 0)
            return "it has files, and its driver had not begun";
        HashSet<ulong> known = [NodeTable.RootId];
        foreach (SavedNode node in nodes)
        {
            if (node.Lookups > 0)
                known.Add(node.Id);
        }
        HashSet<ulong> numbers = [];
        foreach (SavedHandle? handle in handles)
        {
            if (handle is null || handle.Number == 0 || handle.Number >= state.NextHandle || !numbers.Add(handle.Number))
                return $"there is no open file {handle?.Number}, or two";
            if (!known.Contains(handle.Node) || (handle.Access & ~FileAt.AccessModeMask) != 0)
                return $"open file {handle.Number} is of no file, or open for nothing";
        }
        return null;
    }

    /// <summary>Puts back what <see cref="Fault"/> found sound.</summary>
    public void Restore(State state)
    {
        Reset();
        _initialized = state.Initialized;
        _nodes.Restore(state.Nodes, state.NextNode);
        _nextHandle = state.NextHandle;
        foreach (SavedHandle saved in state.Handles)
        {
            _nodes.Trim();
            Node node = _nodes.Find(saved.Node)!;
            _handles[saved.Number] = new Handle(Reopen(node, saved.Access), node, saved.Access);
        }
    }

    private int Reopen(Node node, int access)
    {
        if (node.Kind != FileAttributes64.Folder)
        {
            int file = OpenRegular(node, access);
            return file < 0 ? -Stale : file;
        }
        int path = _nodes.Open(node);
        int folder = path < 0 ? path : FileAt.Reopen(path, FileAt.OpenDirectory);
        return folder < 0 ? -Stale : folder;
    }
}
