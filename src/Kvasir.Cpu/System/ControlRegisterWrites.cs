using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>
/// What writing CR0, CR3 and CR4 checks and changes: mode switches and address spaces (Intel SDM vol. 3, "Control Registers" and ch. "Paging").
/// Methods that give false have recorded #GP(0) and changed nothing.
/// </summary>
internal static unsafe class ControlRegisterWrites
{
    private const ulong Cr0Bits = (ulong)(Cr0.PE | Cr0.MP | Cr0.EM | Cr0.TS | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.NW | Cr0.CD | Cr0.PG);

    /// <summary>CR4 bits that change what translations mean.</summary>
    private const ulong TranslationBits = (ulong)(Cr4.PSE | Cr4.PAE | Cr4.PGE | Cr4.PCIDE | Cr4.SMEP | Cr4.SMAP);

    private const ulong PhysicalMask = (1ul << PageWalker.PhysicalBits) - 1;

    /// <summary>Bits of a PDPTE that must be clear in PAE paging.</summary>
    private const ulong PdpteReserved = ~PhysicalMask | 0x1e6;

    public static bool TryWriteCr0(SoftVcpu vcpu, ulong value)
    {
        VcpuBlock* s = vcpu.Block;
        bool upper = value >> 32 != 0;
        value = (value & Cr0Bits) | (ulong)Cr0.ET;
        ulong old = s->Cr0;
        ulong changed = old ^ value;
        bool paging = (value & (ulong)Cr0.PG) != 0;
        bool protectedMode = (value & (ulong)Cr0.PE) != 0;
        if (upper || (paging && !protectedMode) || ((value & (ulong)Cr0.NW) != 0 && (value & (ulong)Cr0.CD) == 0))
            return Refuse(s);
        ulong efer = s->Efer;
        if ((changed & (ulong)Cr0.PG) != 0)
        {
            bool is64 = DescriptorTables.Is64(s);
            if (paging && (efer & (ulong)Efer.LME) != 0)
            {
                bool wrongTask = vcpu.Tr.Selector != 0 && !TaskState.Is32(in vcpu.Tr);
                if ((s->Cr4 & (ulong)Cr4.PAE) == 0 || (s->SegAttributes[SegmentLoads.Cs] & (uint)SegmentAttributes.Long) != 0 || wrongTask)
                    return Refuse(s);
                efer |= (ulong)Efer.LMA;
            }
            else if (paging && (s->Cr4 & (ulong)Cr4.PAE) != 0 && !PdptesHold(vcpu, s->Cr3))
            {
                return Refuse(s);
            }
            else if (!paging)
            {
                if (is64 || (s->Cr4 & (ulong)Cr4.PCIDE) != 0)
                    return Refuse(s);
                efer &= ~(ulong)Efer.LMA;
            }
        }
        s->Cr0 = value;
        s->Efer = efer;
        if ((changed & (ulong)(Cr0.PE | Cr0.PG)) != 0)
        {
            if ((changed & (ulong)Cr0.PE) != 0)
                s->Cpl = 0;
            vcpu.UpdateMode();
            vcpu.UpdateAllBounds();
        }
        if ((changed & (ulong)(Cr0.PG | Cr0.WP)) != 0)
            vcpu.Mmu.FlushAll();
        else if ((changed & (ulong)Cr0.AM) != 0)
            vcpu.Mmu.UpdateRights();
        return true;
    }

    public static bool TryWriteCr3(SoftVcpu vcpu, ulong value)
    {
        VcpuBlock* s = vcpu.Block;
        bool pcids = (s->Cr4 & (ulong)Cr4.PCIDE) != 0;
        bool keep = pcids && value >> 63 != 0;
        if (pcids)
            value &= ~(1ul << 63);
        if (DescriptorTables.IsLongMode(s))
        {
            if ((value & ~PhysicalMask) != 0)
                return Refuse(s);
        }
        else
        {
            value = (uint)value;
            if ((s->Cr0 & (ulong)Cr0.PG) != 0 && (s->Cr4 & (ulong)Cr4.PAE) != 0 && !PdptesHold(vcpu, value))
                return Refuse(s);
        }
        s->Cr3 = value;
        vcpu.Mmu.SwitchAddressSpace(keep);
        return true;
    }

    public static bool TryWriteCr4(SoftVcpu vcpu, ulong value)
    {
        VcpuBlock* s = vcpu.Block;
        if ((value & ~(ulong)vcpu.Model.AllowedCr4) != 0)
            return Refuse(s);
        ulong changed = s->Cr4 ^ value;
        bool longMode = DescriptorTables.IsLongMode(s);
        bool pae = (value & (ulong)Cr4.PAE) != 0;
        if (longMode && !pae)
            return Refuse(s);
        bool pcidsOn = (changed & value & (ulong)Cr4.PCIDE) != 0;
        if (pcidsOn && (!longMode || (s->Cr3 & 0xfff) != 0))
            return Refuse(s);
        const ulong reloads = (ulong)(Cr4.PAE | Cr4.PGE | Cr4.PSE | Cr4.SMEP);
        if (!longMode && pae && (s->Cr0 & (ulong)Cr0.PG) != 0 && (changed & reloads) != 0 && !PdptesHold(vcpu, s->Cr3))
            return Refuse(s);
        s->Cr4 = value;
        if ((changed & (ulong)Cr4.DE) != 0)
            vcpu.Debug.SetActivity();
        if ((changed & TranslationBits) != 0)
        {
            vcpu.Mmu.FlushAll();
            if ((changed & (ulong)Cr4.PCIDE) != 0)
                vcpu.Mmu.SwitchAddressSpace(keep: false);
        }
        return true;
    }

    /// <summary>Writes EFER (Intel SDM vol. 3, "IA32_EFER"): LMA is read-only, LME cannot change while paging.</summary>
    public static bool TryWriteEfer(SoftVcpu vcpu, ulong value)
    {
        VcpuBlock* s = vcpu.Block;
        ulong lma = s->Efer & (ulong)Efer.LMA;
        if ((value & ~((ulong)vcpu.Model.AllowedEfer | (ulong)Efer.LMA)) != 0)
            return false;
        value = (value & ~(ulong)Efer.LMA) | lma;
        ulong changed = s->Efer ^ value;
        if ((changed & (ulong)Efer.LME) != 0 && (s->Cr0 & (ulong)Cr0.PG) != 0)
            return false;
        s->Efer = value;
        if ((changed & (ulong)Efer.NXE) != 0)
            vcpu.Mmu.FlushAll();
        return true;
    }

    /// <summary>Whether the four entries that a CR3 of PAE paging points at have no reserved bit set. A missing page reads as absent entries.</summary>
    private static bool PdptesHold(SoftVcpu vcpu, ulong cr3)
    {
        ulong at = cr3 & 0xffff_ffe0;
        for (int i = 0; i < 4; i++)
        {
            if (vcpu.Memory.TryRead(new Gpa(at + (ulong)i * 8), out ulong entry) && (entry & 1) != 0 && (entry & PdpteReserved) != 0)
                return false;
        }
        return true;
    }

    private static bool Refuse(VcpuBlock* s) => Access.Record(s, ExceptionVector.GeneralProtection, 0);
}
