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
    /// <param name="place">Where in its page the block starts.</param>
    [UnmanagedCallersOnly]
    public static ulong Execute(VcpuBlock* s, uint op, uint place)
    {
        try
        {
            s->SlowOperations++;
            s->BlockRip = s->CodeBase + place;
            s->TlbChanged = false;
            DeferredFlags.ToLazy(s);
            Op* operation = (Op*)(s->OpBase + op);
            Op* next = operation->Handler(s, operation);
            if (next == operation + 1 && (next->Flags & OpFlags.Stale) == 0 && !s->TlbChanged)
                return 0;
            s->ExitOp = next;
            return 1;
        }
        catch (Exception e)
        {
            return Fail(s, e);
        }
    }

    /// <summary>The check of a group of accesses failed. Returns the translated code to go on with, or 0: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static byte* Rest(VcpuBlock* s, uint exit)
    {
        try
        {
            return SoftVcpu.From(s).Code.Translator!.Rest(s, exit);
        }
        catch (Exception e)
        {
            Fail(s, e);
            return null;
        }
    }

    /// <summary>Finds where a direct branch leads. Returns the translated code to go on with, or 0: leave, <see cref="VcpuBlock.ExitOp"/> is set.</summary>
    [UnmanagedCallersOnly]
    public static byte* Link(VcpuBlock* s, uint exit)
    {
        try
        {
            return SoftVcpu.From(s).Code.Translator!.Link(s, exit);
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
