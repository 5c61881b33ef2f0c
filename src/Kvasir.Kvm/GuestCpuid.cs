using System;
using System.Collections.Generic;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>What CPUID tells a guest under KVM: of the processor model's features, those that KVM offers too.</summary>
internal static class GuestCpuid
{
    private const uint XsaveBit = 1u << 26;
    private const uint OsxsaveBit = 1u << 27;
    private const uint TscDeadlineBit = 1u << 24;
    private const uint X2ApicBit = 1u << 21;
    private const uint HypervisorBit = 1u << 31;
    private const uint HttBit = 1u << 28;

    /// <summary>Makes the table for one vCPU.</summary>
    /// <param name="model">The processor model's leaves for that vCPU.</param>
    /// <param name="supported">What KVM offers.</param>
    /// <param name="apicMsrs">The vCPU hears of accesses to the APIC's MSRs: x2APIC and the TSC deadline are Kvasir's own and work.</param>
    public static CpuidEntry[] Merge(IReadOnlyList<CpuidEntry> model, IReadOnlyList<CpuidEntry> supported, bool apicMsrs)
    {
        CpuidEntry[] result = new CpuidEntry[model.Count];
        bool xsave = (Find(supported, 1, 0).Ecx & XsaveBit) != 0;
        for (int i = 0; i < result.Length; i++)
        {
            CpuidEntry e = model[i];
            CpuidEntry s = Find(supported, e.Leaf, e.Subleaf);
            result[i] = (e.Leaf, e.Subleaf) switch
            {
                (1, _) => e with { Ecx = Leaf1Ecx(e.Ecx, s.Ecx, apicMsrs), Edx = e.Edx & (s.Edx | HttBit) },
                (6, _) => e with { Eax = e.Eax & s.Eax },
                (7, 0) => e with { Ebx = e.Ebx & s.Ebx, Ecx = e.Ecx & s.Ecx, Edx = e.Edx & s.Edx },
                (0xd, _) when !xsave => e with { Eax = 0, Ebx = 0, Ecx = 0, Edx = 0 },
                (0xd, 0) => e with { Eax = e.Eax & s.Eax },
                (0xd, 1) => e with { Eax = e.Eax & s.Eax },
                (0x8000_0001, _) => e with { Ecx = e.Ecx & s.Ecx, Edx = e.Edx & s.Edx },
                (0x8000_0007, _) => e with { Edx = e.Edx & s.Edx },
                (0x8000_0008, _) => e with { Eax = (e.Eax & ~0xffu) | Math.Min(e.Eax & 0xff, s.Eax & 0xff), Ebx = e.Ebx & s.Ebx },
                (0x8000_0021, _) => e with { Eax = e.Eax & s.Eax },
                _ => e,
            };
        }
        return result;
    }

    /// <summary>Bits of XCR0 that the guest may set.</summary>
    public static ulong AllowedXcr0(IReadOnlyList<CpuidEntry> table) =>
        (Find(table, 1, 0).Ecx & XsaveBit) == 0 ? 3 : Find(table, 0xd, 0).Eax | 3ul;

    /// <summary>Whether KVM shows the guest XSAVE although the table did not: its CPUID is then partly the host's, whatever the table says.</summary>
    public static bool IsForced(IReadOnlyList<CpuidEntry> asked, IReadOnlyList<CpuidEntry> shown) =>
        ((Find(shown, 1, 0).Ecx & ~Find(asked, 1, 0).Ecx) & XsaveBit) != 0;

    /// <summary>
    /// The table for a KVM that shows the host's features in the leaves that are there: what it shows must then be whole, or the guest stumbles. Leaf Dh
    /// describes the state that XSAVE saves up to AVX; leaf 7 goes, as it would show features with more state than <see cref="Kvasir.Core.CpuState"/> has.
    /// </summary>
    public static CpuidEntry[] Complete(IReadOnlyList<CpuidEntry> table, IReadOnlyList<CpuidEntry> supported)
    {
        const uint stateLeaf = 0xd;
        const uint structuredLeaf = 7;
        const uint avxSubleaf = 2;
        List<CpuidEntry> result = [];
        foreach (CpuidEntry entry in table)
        {
            if (entry.Leaf is not (stateLeaf or structuredLeaf))
                result.Add(entry);
        }
        foreach (CpuidEntry entry in supported)
        {
            if (entry.Leaf == stateLeaf && entry.Subleaf <= avxSubleaf)
                result.Add(entry);
        }
        return [.. result];
    }

    private static uint Leaf1Ecx(uint model, uint supported, bool apicMsrs)
    {
        uint own = HypervisorBit | (apicMsrs ? TscDeadlineBit | X2ApicBit : 0);
        uint never = OsxsaveBit | (apicMsrs ? 0 : TscDeadlineBit | X2ApicBit);
        return model & (supported | own) & ~never;
    }

    private static CpuidEntry Find(IReadOnlyList<CpuidEntry> table, uint leaf, uint subleaf)
    {
        foreach (CpuidEntry entry in table)
        {
            if (entry.Leaf == leaf && (!entry.HasSubleaves || entry.Subleaf == subleaf))
                return entry;
        }
        return default;
    }
}
