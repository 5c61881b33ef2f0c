using System.Threading;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>From RIP to decoded operations: the jump cache, the code cache, the decoder.</summary>
public static unsafe class BlockLookup
{
    /// <summary>The epoch of the code cache: pointers to operations from another one must not be kept.</summary>
    public static int Epoch(VcpuBlock* s) => SoftVcpu.From(s).Code.Epoch;

    /// <summary>Whether a block's single instruction crosses pages. <paramref name="first"/> is the block's first operation.</summary>
    public static bool CrossesPages(Op* first) => (first->Flags & OpFlags.CrossesPages) != 0;

    /// <summary>
    /// The operations at <see cref="VcpuBlock.Rip"/>, with <see cref="VcpuBlock.BlockRip"/> set; null after a fault, or where the code cache must be
    /// emptied first (<see cref="PendingWork.Resynchronize"/> is set then).
    /// </summary>
    public static Op* Find(VcpuBlock* s)
    {
        SoftVcpu vcpu = SoftVcpu.From(s);
        ulong rip = s->Rip;
        ulong linear = rip;
        if ((s->Mode & CodeMode.SizeMask) != CodeMode.Code64)
        {
            if (rip > s->SegLimit[1])
            {
                Access.Record(s, ExceptionVector.GeneralProtection, 0);
                return null;
            }
            linear = (uint)(s->SegBase[1] + rip);
        }
        byte* host = vcpu.Mmu.Fetch(linear, out bool device);
        if (host == null)
            return device ? vcpu.Decoder.FromDevice(linear) : null;

        ulong offset = (ulong)(host - vcpu.Memory.Host);
        ulong key = offset << 8 | s->Mode;
        Block* block = vcpu.Code.Find(key);
        if (block == null || !SecondPageHolds(vcpu, block, linear))
        {
            if (s->FaultVector != Fault.None)
                return null;
            if (vcpu.Code.IsFull)
            {
                vcpu.Post(PendingWork.Resynchronize);
                vcpu.CodeCacheFull = true;
                return null;
            }
            block = vcpu.Decoder.Build(linear, offset, key);
            if (block == null)
                return null;
        }
        s->BlockRip = rip;
        JumpEntry* entry = s->JumpCache + Mmu.JumpIndex(rip);
        // A block across pages depends on the second page's translation, and a limited one on CS: both are looked up each time.
        if (block->SecondPage == Block.NoPage && (s->Mode & CodeMode.CodeLimited) == 0)
        {
            entry->Rip = rip;
            entry->Key = s->JumpKey;
            entry->First = block->First;
            if (vcpu.Code.Translator is Translator translator)
                entry->Code = translator.CodeOf(block->First);
        }
        return block->First;
    }

    /// <summary>Whether the page after a crossing instruction's first is still the one that it was decoded from. A fault is recorded where it is not there.</summary>
    private static bool SecondPageHolds(SoftVcpu vcpu, Block* block, ulong linear)
    {
        if (block->SecondPage == Block.NoPage)
            return true;
        ulong next = vcpu.NextPage(linear);
        byte* host = vcpu.Mmu.Fetch(next, out _);
        return host != null && (ulong)(host - vcpu.Memory.Host) == block->SecondPage;
    }
}
