using System;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;

namespace Kvasir.Cpu;

/// <summary>What translated code calls. General registers and deferred flags are in the vCPU's state then. No exception leaves these methods.</summary>
internal static unsafe class CallBacks
{
    /// <summary>Executes an operation by its handler. 0: go on with the next; 1: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    /// <param name="s">The vCPU's state.</param>
    /// <param name="op">The operation's distance from <see cref="VcpuBlock.OpBase"/>.</param>
    [UnmanagedCallersOnly]
    public static ulong Execute(VcpuBlock* s, uint op)
    {
        try
        {
            return Execute(s, (Op*)(s->OpBase + op)) ? 0ul : 1;
        }
        catch (Exception e)
        {
            return Fail(s, e);
        }
    }

    /// <summary>Executes the operation of a site by its handler. 0: go on at <see cref="VcpuBlock.Resume"/>; 1: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static ulong ExecuteSite(VcpuBlock* s, ulong after)
    {
        try
        {
            Translator translator = SoftVcpu.From(s).Code.Translator!;
            CodeSite* site = translator.SiteOf(after);
            site->Flags.Store(s);
            if (!Execute(s, (Op*)(s->OpBase + site->Op)))
                return 1;
            if (site->Resume == 0)
                throw new InvalidOperationException("a branch's handler goes on behind it");
            s->Resume = translator.CodeAt(site->Resume);
            s->ReloadFlags = site->ReloadFlags;
            if (site->Mirrored != CodeSite.NotMirrored)
                s->ResumeT1 = *(ulong*)((byte*)s + Layout.Bias + site->Mirrored);
            return 0;
        }
        catch (Exception e)
        {
            return Fail(s, e);
        }
    }

    /// <summary>Execution goes on at a site's operation in the interpreter: sets <see cref="VcpuBlock.ExitOp"/>.</summary>
    [UnmanagedCallersOnly]
    public static void Leave(VcpuBlock* s, ulong after)
    {
        try
        {
            CodeSite* site = SoftVcpu.From(s).Code.Translator!.SiteOf(after);
            site->Flags.Store(s);
            s->ExitOp = (Op*)(s->OpBase + site->Op);
            s->BlockRip = s->CodeBase + (ulong)EntryOf(s->ExitOp)->Disp;
        }
        catch (Exception e)
        {
            Fail(s, e);
        }
    }

    /// <summary>The operation that a block's operation, or itself, is entered by.</summary>
    public static Op* EntryOf(Op* op) => (op->Flags & OpFlags.Entry) != 0 ? op : op - op->Ordinal;

    /// <returns>Whether the next operation comes next; if not, <see cref="VcpuBlock.ExitOp"/> is set.</returns>
    private static bool Execute(VcpuBlock* s, Op* operation)
    {
        s->SlowOperations++;
        s->BlockRip = s->CodeBase + (ulong)EntryOf(operation)->Disp;
        s->TlbChanged = false;
        DeferredFlags.ToLazy(s);
        Op* next = operation->Handler(s, operation);
        if (next == operation + 1 && (next->Flags & OpFlags.Stale) == 0 && !s->TlbChanged)
            return true;
        s->ExitOp = next;
        return false;
    }

    /// <summary>The check of a group of accesses failed. Returns the translated code to go on with, or 0: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static byte* Rest(VcpuBlock* s, ulong after)
    {
        try
        {
            return SoftVcpu.From(s).Code.Translator!.Rest(s, after);
        }
        catch (Exception e)
        {
            Fail(s, e);
            return null;
        }
    }

    /// <summary>Finds where a direct branch leads. Returns the translated code to go on with, or 0: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static byte* Link(VcpuBlock* s, ulong after)
    {
        try
        {
            return SoftVcpu.From(s).Code.Translator!.Link(s, after);
        }
        catch (Exception e)
        {
            Fail(s, e);
            return null;
        }
    }

    /// <summary>Finds the block at <see cref="VcpuBlock.Rip"/>. Returns its translation, or 0: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static byte* Find(VcpuBlock* s)
    {
        try
        {
            return SoftVcpu.From(s).Code.Translator!.Find(s);
        }
        catch (Exception e)
        {
            Fail(s, e);
            return null;
        }
    }

    /// <summary>The arithmetic flags as <see cref="FlagKind.Packed"/> has them.</summary>
    [UnmanagedCallersOnly]
    public static uint PackFlags(VcpuBlock* s) => DeferredFlags.Pack(s);

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static ulong Fail(VcpuBlock* s, Exception e)
    {
        SoftVcpu.From(s).TranslationFailure = e;
        s->ExitOp = null;
        return 1;
    }
}
