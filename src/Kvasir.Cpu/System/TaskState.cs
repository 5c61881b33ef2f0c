using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>The current task state segment: stacks of inner levels, and where its parts lie.</summary>
internal static unsafe class TaskState
{
    /// <summary>A 32-bit (or 64-bit) TSS, by the type in TR.</summary>
    public static bool Is32(in SegmentState tr) => (tr.Attributes & 8) != 0;

    public static ulong Linear(SoftVcpu vcpu, ulong offset) => DescriptorTables.CutLinear(vcpu.Block, vcpu.Tr.Base + offset);

    /// <summary>SS and ESP of an inner level in a 16-bit or 32-bit TSS.</summary>
    public static bool TryReadStack(SoftVcpu vcpu, int cpl, uint external, out ushort selector, out uint pointer)
    {
        selector = 0;
        pointer = 0;
        bool wide = Is32(in vcpu.Tr);
        uint offset = wide ? 4u + (uint)cpl * 8 : 2u + (uint)cpl * 4;
        uint bytes = wide ? 6u : 4u;
        if (offset + bytes - 1 > vcpu.Tr.Limit)
            return DescriptorTables.Fail(vcpu, ExceptionVector.InvalidTss, vcpu.Tr.Selector, external);
        int size = wide ? 4 : 2;
        if (!vcpu.Mmu.TryReadSystem(Linear(vcpu, offset), size, out ulong p) || !vcpu.Mmu.TryReadSystem(Linear(vcpu, offset + (uint)size), 2, out ulong s))
            return false;
        pointer = (uint)p;
        selector = (ushort)s;
        return true;
    }
}
