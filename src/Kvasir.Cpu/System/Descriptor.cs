using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>An 8-byte entry of a descriptor table: a segment or a gate (Intel SDM vol. 3, "Segment Descriptors" and "Gate Descriptors").</summary>
internal readonly record struct Descriptor(ulong Raw)
{
    public SegmentAttributes Attributes => (SegmentAttributes)(Raw >> 40 & 0xf0ff);

    public uint Base => (uint)(Raw >> 16 & 0xff_ffff) | (uint)(Raw >> 32 & 0xff00_0000);

    /// <summary>The last valid offset in bytes.</summary>
    public uint Limit
    {
        get
        {
            uint limit = (uint)(Raw & 0xffff) | (uint)(Raw >> 32 & 0xf_0000);
            return (Attributes & SegmentAttributes.Granularity) != 0 ? limit << 12 | 0xfff : limit;
        }
    }

    public int Dpl => (int)(Raw >> 45 & 3);

    public bool IsPresent => (Raw >> 47 & 1) != 0;

    public bool IsSystem => (Raw >> 44 & 1) == 0;

    public SystemDescriptorType SystemType => (SystemDescriptorType)(Raw >> 40 & 15);

    public bool IsCode => (Raw >> 43 & 3) == 3;

    public bool IsConforming => (Attributes & SegmentAttributes.ExpandDownOrConforming) != 0;

    public bool IsReadable => !IsSystem && (!IsCode || (Attributes & SegmentAttributes.WritableOrReadable) != 0);

    public bool IsWritableData => !IsSystem && !IsCode && (Attributes & SegmentAttributes.WritableOrReadable) != 0;

    public bool IsLong => (Attributes & SegmentAttributes.Long) != 0;

    public bool IsDefault32 => (Attributes & SegmentAttributes.Default32) != 0;

    // As a gate.

    public ushort GateSelector => (ushort)(Raw >> 16);

    public uint GateOffset => (uint)(Raw & 0xffff) | (uint)(Raw >> 32 & 0xffff_0000);

    /// <summary>Parameters that a call gate copies.</summary>
    public int GateCount => (int)(Raw >> 32 & 31);

    /// <summary>Interrupt stack table entry of a 64-bit gate.</summary>
    public int GateIst => (int)(Raw >> 32 & 7);

    /// <summary>What a segment register holds after this descriptor was loaded into it.</summary>
    public SegmentState ToSegment(ushort selector) => new(selector, Base, Limit, (uint)(Attributes | (IsSystem ? 0 : SegmentAttributes.Accessed)));
}
