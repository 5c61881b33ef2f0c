using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>Reads and marks descriptors in the GDT and LDT. Methods that give false have recorded a fault.</summary>
internal static unsafe class DescriptorTables
{
    /// <summary>The selector without its RPL is null.</summary>
    public static bool IsNull(ushort selector) => (selector & 0xfffc) == 0;

    public static bool IsLongMode(VcpuBlock* s) => (s->Efer & (ulong)Efer.LMA) != 0;

    public static bool Is64(VcpuBlock* s) => (s->Mode & CodeMode.SizeMask) == CodeMode.Code64;

    /// <summary>An address cut to 32 bits outside long mode.</summary>
    public static ulong CutLinear(VcpuBlock* s, ulong linear) => IsLongMode(s) ? linear : (uint)linear;

    /// <summary>Where a selector's descriptor lies. False, with nothing recorded: beyond the table's limit.</summary>
    public static bool TryLocate(SoftVcpu vcpu, ushort selector, int bytes, out ulong linear)
    {
        VcpuBlock* s = vcpu.Block;
        uint offset = (uint)selector & 0xfff8;
        linear = 0;
        if ((selector & 4) != 0)
        {
            if ((vcpu.Ldtr.Attributes & (uint)SegmentAttributes.Unusable) != 0 || offset + (uint)bytes - 1 > vcpu.Ldtr.Limit)
                return false;
            linear = CutLinear(s, vcpu.Ldtr.Base + offset);
            return true;
        }
        if (offset + (uint)bytes - 1 > vcpu.Gdtr.Limit)
            return false;
        linear = CutLinear(s, vcpu.Gdtr.Base + offset);
        return true;
    }

    /// <summary>Reads a selector's descriptor; beyond the table's limit the vector is raised with the selector as error code.</summary>
    public static bool TryRead(SoftVcpu vcpu, ushort selector, ExceptionVector vector, uint external, out Descriptor descriptor)
    {
        descriptor = default;
        if (!TryLocate(vcpu, selector, 8, out ulong linear))
            return Fail(vcpu, vector, selector, external);
        if (!vcpu.Mmu.TryReadSystem(linear, 8, out ulong raw))
            return false;
        descriptor = new Descriptor(raw);
        return true;
    }

    /// <summary>The upper half of a 16-byte descriptor: base bits 32-63, whose type field must be zero.</summary>
    public static bool TryReadUpper(SoftVcpu vcpu, ushort selector, ExceptionVector vector, uint external, out ulong upper)
    {
        upper = 0;
        if (!TryLocate(vcpu, selector, 16, out ulong linear))
            return Fail(vcpu, vector, selector, external);
        if (!vcpu.Mmu.TryReadSystem(linear + 8, 8, out upper))
            return false;
        return (upper >> 40 & 31) == 0 || Fail(vcpu, vector, selector, external);
    }

    /// <summary>Sets the accessed bit of a code or data segment's descriptor in its table, as loading it does.</summary>
    public static bool TryMarkAccessed(SoftVcpu vcpu, ushort selector, in Descriptor descriptor)
    {
        if ((descriptor.Attributes & SegmentAttributes.Accessed) != 0)
            return true;
        return TryWriteType(vcpu, selector, (byte)(descriptor.Raw >> 40) | (ulong)SegmentAttributes.Accessed);
    }

    /// <summary>Writes the byte with type, S, DPL and P.</summary>
    public static bool TryWriteType(SoftVcpu vcpu, ushort selector, ulong type) =>
        TryLocate(vcpu, selector, 8, out ulong linear) && vcpu.Mmu.TryWriteSystem(linear + 5, 1, type);

    /// <summary>Records an exception whose error code is a selector.</summary>
    public static bool Fail(SoftVcpu vcpu, ExceptionVector vector, ushort selector, uint external = 0) =>
        Access.Record(vcpu.Block, vector, ((uint)selector & 0xfffc) | external);
}
