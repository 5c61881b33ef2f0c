using System;
using System.Numerics;
using System.Runtime.InteropServices;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <content>The leaves of CPUID (Intel SDM vol. 2, CPUID; AMD64 APM vol. 3, appendix E).</content>
public sealed partial class CpuModel
{
    /// <summary>Hz of the local APIC timer's input: leaf 15h calls it the crystal.</summary>
    private const uint ApicBusFrequency = 1_000_000_000;

    private const uint LastIntelLeaf = 0x16;
    private const uint LastAmdLeaf = 0xd;
    private const uint HypervisorLeaf = 0x4000_0000;
    private const uint HypervisorTimingLeaf = 0x4000_0010;
    private const uint LastIntelExtended = 0x8000_0008;
    private const uint LastAmdExtended = 0x8000_0021;
    private const uint XsaveLegacyBytes = 576;
    private const uint AvxBytes = 256;

    /// <summary>What CPUID gives. Leaves depend on the vCPU where they tell its APIC ID, CR4.OSXSAVE or XCR0.</summary>
    public unsafe CpuidResult Cpuid(uint leaf, uint subleaf, SoftVcpu vcpu)
    {
        ArgumentNullException.ThrowIfNull(vcpu);
        VcpuBlock* s = vcpu.Block;
        return Cpuid(leaf, subleaf, (uint)vcpu.Index, (s->Cr4 & (ulong)Cr4.OSXSAVE) != 0, s->Xcr0);
    }

    /// <summary>What CPUID gives on a vCPU with an APIC ID, CR4.OSXSAVE and XCR0.</summary>
    public CpuidResult Cpuid(uint leaf, uint subleaf, uint apicId, bool osxsave, ulong xcr0) => leaf switch
    {
        < 0x4000_0000 => Basic(leaf, subleaf, apicId, osxsave, xcr0),
        < 0x8000_0000 => Has(CpuFeature.Hypervisor) ? Hypervisor(leaf) : default,
        _ => Extended(leaf, subleaf, apicId),
    };

    private CpuidResult Basic(uint leaf, uint subleaf, uint apicId, bool osxsave, ulong xcr0)
    {
        switch (leaf)
        {
            case 0:
                (uint a, uint b, uint c) = Text(_vendor);
                return new CpuidResult(IsAmd ? LastAmdLeaf : LastIntelLeaf, a, c, b);
            case 1:
                uint logical = (uint)Math.Min(1 << TopologyBits, 255);
                uint ecx = Word(CpuidWord.Leaf1Ecx) | (osxsave ? 1u << ((int)CpuFeature.Osxsave & 31) : 0);
                // CLFLUSH line in units of 8 bytes; the APIC ID in the top byte.
                return new CpuidResult(Signature, 8u << 8 | logical << 16 | (apicId & 0xff) << 24, ecx, Word(CpuidWord.Leaf1Edx));
            case 2:
                // FFh: look at leaf 4; FEh: at leaf 18h for the TLB; F0h: 64-byte prefetch.
                return IsAmd ? default : new CpuidResult(0x00fe_ff01, 0, 0, 0xf0);
            case 4:
                return IsAmd ? default : Cache(subleaf, (uint)Math.Min((1 << TopologyBits) - 1, 63) << 26);
            case 6:
                return new CpuidResult(Word(CpuidWord.Leaf6Eax), 0, 0, 0);
            case 7:
                return subleaf == 0 ? new CpuidResult(0, Word(CpuidWord.Leaf7Ebx), Word(CpuidWord.Leaf7Ecx), Word(CpuidWord.Leaf7Edx)) : default;
            case 0xb:
                return Topology(subleaf, apicId);
            case 0xd:
                return Has(CpuFeature.Xsave) ? Xsave(subleaf, xcr0) : default;
            case 0x15 when !IsAmd:
                // TSC = crystal × EBX / EAX.
                ulong divisor = (ulong)BigInteger.GreatestCommonDivisor(_tscFrequency, ApicBusFrequency);
                return new CpuidResult((uint)(ApicBusFrequency / divisor), (uint)(_tscFrequency / divisor), ApicBusFrequency, 0);
            case 0x16 when !IsAmd:
                uint megahertz = (uint)(_tscFrequency / 1_000_000);
                return new CpuidResult(megahertz, megahertz, 100, 0);
            default:
                return default;
        }
    }

    private CpuidResult Hypervisor(uint leaf)
    {
        switch (leaf)
        {
            case HypervisorLeaf:
                (uint a, uint b, uint c) = Text("KvasirKvasir");
                return new CpuidResult(HypervisorTimingLeaf, a, b, c);
            case HypervisorTimingLeaf:
                return new CpuidResult((uint)(_tscFrequency / 1000), ApicBusFrequency / 1000, 0, 0);
            default:
                return default;
        }
    }

    private CpuidResult Extended(uint leaf, uint subleaf, uint apicId)
    {
        switch (leaf)
        {
            case 0x8000_0000:
                (uint a, uint b, uint c) = IsAmd ? Text(_vendor) : default;
                return new CpuidResult(IsAmd ? LastAmdExtended : LastIntelExtended, a, c, b);
            case 0x8000_0001:
                return new CpuidResult(IsAmd ? Signature : 0, 0, Word(CpuidWord.Extended1Ecx), Word(CpuidWord.Extended1Edx) | (IsAmd ? AmdDuplicates() : 0));
            case 0x8000_0002 or 0x8000_0003 or 0x8000_0004:
                ReadOnlySpan<uint> brand = MemoryMarshal.Cast<byte, uint>(_brand).Slice((int)(leaf - 0x8000_0002) * 4, 4);
                return new CpuidResult(brand[0], brand[1], brand[2], brand[3]);
            case 0x8000_0005 when IsAmd:
                // 32 KiB, 8 ways, 64-byte lines, for data and for code; TLBs of 64 entries.
                return new CpuidResult(0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140);
            case 0x8000_0006:
                // L2: 512 KiB, 8 ways, 64-byte lines. L3 (AMD): 16 MiB in units of 512 KiB, 16 ways.
                return IsAmd ? new CpuidResult(0, 0x4200_4200, 0x0200_6140, 32u << 18 | 0x8140) : new CpuidResult(0, 0, 0x0200_6040, 0);
            case 0x8000_0007:
                return new CpuidResult(0, 0, 0, Word(CpuidWord.Extended7Edx));
            case 0x8000_0008:
                uint cores = IsAmd ? (uint)TopologyBits << 12 | (uint)(Vcpus - 1) & 0xff : 0;
                return new CpuidResult(48 << 8 | PageWalker.PhysicalBits, Word(CpuidWord.Extended8Ebx), cores, 0);
            case 0x8000_001d when IsAmd && Has(CpuFeature.TopologyExtensions):
                return Cache(subleaf, 0);
            case 0x8000_001e when IsAmd && Has(CpuFeature.TopologyExtensions):
                return new CpuidResult(apicId, apicId & 0xff, 0, 0);
            case 0x8000_0021 when IsAmd:
                // ECX: TSA does not apply, as for the other leaks.
                return new CpuidResult(Word(CpuidWord.Extended21Eax), 0, 6, 0);
            default:
                return default;
        }
    }

    /// <summary>AMD repeats these bits of 1.EDX.</summary>
    private uint AmdDuplicates()
    {
        const uint repeated = 0x0183_f3ff;
        return Word(CpuidWord.Leaf1Edx) & repeated;
    }

    /// <summary>Leaf 4, or 8000001Dh: L1 data, L1 code, L2, L3. Only L3 is shared.</summary>
    private CpuidResult Cache(uint subleaf, uint cores)
    {
        const uint lineAndPartitions = 63;
        uint sharing = (uint)Math.Min((1 << TopologyBits) - 1, 4095) << 14;
        const uint selfInitializing = 1 << 8;
        return subleaf switch
        {
            0 => new CpuidResult(1 | 1 << 5 | selfInitializing | cores, lineAndPartitions | 7 << 22, 63, 0),
            1 => new CpuidResult(2 | 1 << 5 | selfInitializing | cores, lineAndPartitions | 7 << 22, 63, 0),
            2 => new CpuidResult(3 | 2 << 5 | selfInitializing | cores, lineAndPartitions | 7 << 22, 1023, 0),
            3 => new CpuidResult(3 | 3 << 5 | selfInitializing | sharing | cores, lineAndPartitions | 15 << 22, 16383, 0),
            _ => default,
        };
    }

    /// <summary>Leaf Bh: one thread a core, all cores in one package.</summary>
    private CpuidResult Topology(uint subleaf, uint apicId) => subleaf switch
    {
        0 => new CpuidResult(0, 1, 1 << 8, apicId),
        1 => new CpuidResult((uint)TopologyBits, (uint)Vcpus, 2 << 8 | 1, apicId),
        _ => new CpuidResult(0, 0, subleaf & 0xff, apicId),
    };

    private CpuidResult Xsave(uint subleaf, ulong xcr0)
    {
        uint all = XsaveLegacyBytes + ((AllowedXcr0 & 4) != 0 ? AvxBytes : 0);
        uint enabled = XsaveLegacyBytes + ((xcr0 & 4) != 0 ? AvxBytes : 0);
        switch (subleaf)
        {
            case 0:
                return new CpuidResult((uint)AllowedXcr0, enabled, all, 0);
            case 1:
                bool compacts = Has(CpuFeature.Xsavec) || Has(CpuFeature.Xsaves);
                return new CpuidResult(Word(CpuidWord.LeafDEax), compacts ? enabled : 0, 0, 0);
            case 2 when (AllowedXcr0 & 4) != 0:
                return new CpuidResult(AvxBytes, XsaveLegacyBytes, 0, 0);
            default:
                return default;
        }
    }
}
