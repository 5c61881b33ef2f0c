using System;
using System.Collections.Generic;

namespace Kvasir.Cpu;

/// <content>
/// Calls out of the block: what the stub behind one must know is kept beside the code (<see cref="CodeSite"/>, <see cref="PendingExit"/>) and found by the
/// address that the call leaves on the stack. So a way out costs the code five bytes.
/// </content>
internal sealed unsafe partial class BlockCompiler
{
    private readonly List<CodeSite> _sites = [];
    private readonly List<PendingExit> _exits = [];

    /// <summary>Branches whose calls come at the end of the code.</summary>
    private readonly List<PendingExit> _branches = [];

    /// <summary>
    /// A direct branch of the code: positions of its field and of what follows the call that finds the target, and where in the page that is. Where the call is in the branch's own
    /// place (<see cref="Inline"/>), a jump takes its place. The flags are those that the branch leaves to be stored. The leader is for the way out of a group of accesses, which goes on there; the
    /// operation for a branch to another page, whose handler can find it.
    /// </summary>
    internal readonly record struct PendingExit(int Field, int After, int Target, bool Inline, FlagRecipe Flags, uint Leader, uint FarOp);

    /// <summary>The calls that need a site, in order; positions are in <see cref="Code"/>.</summary>
    public List<CodeSite> Sites => _sites;

    /// <summary>The direct branches, in order of <see cref="PendingExit.After"/>.</summary>
    public List<PendingExit> Exits => _exits;

    /// <summary>Notes that a call ends here, for an operation that finds its flags in memory and does not come back.</summary>
    private void AddSite(Op* op) => _sites.Add(new CodeSite { After = (uint)_a.Length, Op = (uint)OpOffset(op), Mirrored = CodeSite.NotMirrored });

    private void AddSite(in Cold cold)
    {
        CodeSite site = new()
        {
            After = (uint)_a.Length,
            Op = (uint)OpOffset(cold.Op),
            Resume = (uint)Math.Max(cold.Resume, 0),
            Mirrored = cold.Mirrored ?? CodeSite.NotMirrored,
            ReloadFlags = cold.ReloadFlags,
        };
        if (cold.NeedFlags)
            site.Flags = new FlagRecipe(in cold.Flags);
        _sites.Add(site);
    }

    /// <summary>A jump to a place in the page, or on at a leader, in five bytes that are a call until its target is known.</summary>
    private void EmitJumpExit(int inPage, uint leader = 0)
    {
        int field = _a.CallReplaceable(leader == 0 ? _stubs.Link : _stubs.Rest);
        _exits.Add(new PendingExit(field, field + sizeof(int), inPage, Inline: true, default, leader, 0));
    }

    /// <summary>A branch that was emitted, with a field that can be changed: it leads to a call at the end of the code first.</summary>
    private void AddExit(int field, int inPage, FlagRecipe flags = default, Op* far = null) =>
        _branches.Add(new PendingExit(field, 0, inPage, Inline: false, flags, 0, far == null ? 0 : (uint)OpOffset(far)));

    /// <summary>Makes the code of a branch on the way to its target: it stores the flags.</summary>
    /// <param name="flags">How.</param>
    /// <param name="origin">Where the code will be executed.</param>
    /// <param name="target">Where it shall lead.</param>
    /// <returns>The position of the last jump's field.</returns>
    public int CompileEdge(FlagRecipe flags, ulong origin, ulong target)
    {
        _a.Begin(origin);
        StoreRecipe(flags.Tracker);
        return _a.JumpPatchable(target);
    }

    /// <summary>Makes the code of a branch on the way to another page: it stores the flags and looks the target up.</summary>
    /// <param name="flags">How.</param>
    /// <param name="op">The branch's operation.</param>
    /// <param name="inPage">Where the target is, from the start of the branch's page.</param>
    /// <param name="mode">The <see cref="CodeMode"/> of the branch.</param>
    /// <param name="origin">Where the code will be executed.</param>
    public void CompileFarEdge(FlagRecipe flags, Op* op, int inPage, uint mode, ulong origin)
    {
        _mode = mode;
        _sites.Clear();
        _a.Begin(origin);
        if (!flags.IsNone)
            StoreRecipe(flags.Tracker);
        EmitFarJump(op, inPage);
    }

    private void EmitLinkCalls()
    {
        foreach (PendingExit branch in _branches)
        {
            _a.Fix(branch.Field);
            _a.CallTo(_stubs.Link);
            _exits.Add(branch with { After = _a.Length });
        }
    }
}
