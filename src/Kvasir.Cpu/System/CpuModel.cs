using System;
using System.Numerics;
using System.Runtime.InteropServices;
using System.Text;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu;

/// <summary>The four registers that CPUID leaves.</summary>
public readonly record struct CpuidResult(uint Eax, uint Ebx, uint Ecx, uint Edx);

/// <summary>What CPUID tells the guest, and what follows from it. Immutable; shared by all vCPUs of a VM.</summary>
public sealed partial class CpuModel
{
    /// <summary>"GenuineIntel" as leaf 0 gives it.</summary>
    public const string IntelVendor = "GenuineIntel";

    /// <summary>"AuthenticAMD" as leaf 0 gives it.</summary>
    public const string AmdVendor = "AuthenticAMD";

    private const string HygonVendor = "HygonGenuine";

    // Configuration
    private readonly uint[] _words = new uint[(int)CpuidWord.Count];
    private readonly string _vendor;
    private readonly byte[] _brand;
    private readonly ulong _tscFrequency;

    /// <summary>Everything the host has that Kvasir handles, for one vCPU.</summary>
    public CpuModel()
        : this("host", 1, VmClock.DefaultTscFrequency)
    {
    }

    private CpuModel(string specification, int vcpus, ulong tscFrequency)
    {
        HostCpu host = HostCpu.Read();
        string[] parts = specification.Split(',', StringSplitOptions.TrimEntries);
        string name = parts[0];
        Name = name;
        Vcpus = vcpus;
        _tscFrequency = tscFrequency;
        _vendor = host.Vendor;
        Signature = host.Signature;
        string brand = host.Brand;
        NamedModel model = default;
        bool everything = name is "host" or "max";
        if (!everything)
        {
            if (!FeatureTable.TryFind(name, out model))
                throw new CpuModelException($"no CPU model '{name}'; there are: {FeatureTable.ModelNames}");
            brand = model.Brand;
            if (model.Vendor is not null)
            {
                _vendor = model.Vendor;
                Signature = model.Signature;
            }
        }
        IsAmd = _vendor is AmdVendor or HygonVendor;
        _brand = new byte[48];
        Encoding.ASCII.GetBytes(brand.AsSpan(0, Math.Min(brand.Length, 47)), _brand);
        if (everything)
            AddAll(host);
        else
            AddModel(name, model.Features, host);
        Adjust(parts.AsSpan(1), host);
        Complete();
        AllowedCr4 = ComputeCr4();
        AllowedXcr0 = !Has(CpuFeature.Xsave) ? 1u : Has(CpuFeature.Avx) ? 7u : 3u;
        AllowedEfer = Efer.SCE
            | (Has(CpuFeature.LongMode) ? Efer.LME : 0)
            | (Has(CpuFeature.Nx) ? Efer.NXE : 0)
            | (Has(CpuFeature.AutomaticIbrs) ? (Efer)(1ul << 21) : 0);
    }

    /// <summary>The model's name as it was asked for.</summary>
    public string Name { get; }

    /// <summary>How many vCPUs the VM has: one core each, in one package.</summary>
    public int Vcpus { get; }

    /// <summary>The vendor is AMD (or Hygon): instructions that differ between vendors follow AMD's manual.</summary>
    public bool IsAmd { get; }

    /// <summary>Family, model and stepping as leaf 1 gives them in EAX.</summary>
    public uint Signature { get; }

    /// <summary>Bits of CR4 that may be set.</summary>
    public Cr4 AllowedCr4 { get; }

    /// <summary>Bits of XCR0 that may be set.</summary>
    public ulong AllowedXcr0 { get; }

    /// <summary>Bits of EFER that may be set, but LMA.</summary>
    public Efer AllowedEfer { get; }

    /// <summary>SPEC_CTRL and PRED_CMD exist.</summary>
    public bool HasSpecCtrl => Has(CpuFeature.SpecCtrl) || Has(CpuFeature.AmdIbrs);

    /// <summary>
    /// IA32_ARCH_CAPABILITIES: each guest instruction is executed under checks of its own, so that none of the known leaks between
    /// the guest's privilege levels applies (RDCL, SSB, MDS, TAA, stale MMIO data, GDS, RFDS, ITS), and enhanced IBRS is on offer.
    /// </summary>
    public const ulong ArchCapabilitiesValue = 0x4000_0000_0d10_e17b;

    /// <summary>Makes a model from the command line's text.</summary>
    /// <param name="specification"><c>host</c>, <c>max</c> or a model's name, then <c>,+feature</c> and <c>,-feature</c>.</param>
    /// <param name="vcpus">vCPUs of the VM.</param>
    /// <param name="tscFrequency">Hz of the guest's time stamp counter.</param>
    /// <exception cref="CpuModelException">No such model or feature, or the host lacks one.</exception>
    public static CpuModel Parse(string specification, int vcpus = 1, ulong tscFrequency = VmClock.DefaultTscFrequency)
    {
        ArgumentNullException.ThrowIfNull(specification);
        ArgumentOutOfRangeException.ThrowIfLessThan(vcpus, 1);
        return new CpuModel(specification, vcpus, tscFrequency);
    }

    /// <summary>Whether the guest is offered a feature.</summary>
    public bool Has(CpuFeature feature) => (_words[(int)feature >> 5] >> ((int)feature & 31) & 1) != 0;

    private void Set(CpuFeature feature, bool value)
    {
        uint bit = 1u << ((int)feature & 31);
        if (value)
            _words[(int)feature >> 5] |= bit;
        else
            _words[(int)feature >> 5] &= ~bit;
    }

    private uint Word(CpuidWord word) => _words[(int)word];

    private bool IsOffered(in FeatureEntry entry, HostCpu host) => entry.Origin switch
    {
        FeatureOrigin.Host => host.Has(entry.Feature),
        FeatureOrigin.HostAmd => IsAmd && host.Has(entry.Feature),
        FeatureOrigin.EmulatedAmd => IsAmd,
        FeatureOrigin.EmulatedIntel => !IsAmd,
        _ => true,
    };

    private void AddAll(HostCpu host)
    {
        foreach (FeatureEntry entry in FeatureTable.All)
            Set(entry.Feature, IsOffered(in entry, host));
    }

    private void AddModel(string name, CpuFeature[] features, HostCpu host)
    {
        foreach (CpuFeature feature in features)
        {
            FeatureEntry entry = FeatureTable.Find(feature);
            if (entry.Origin is FeatureOrigin.Host or FeatureOrigin.HostAmd && !host.Has(feature))
                throw new CpuModelException($"the host's processor lacks '{entry.Name}', which CPU model '{name}' needs; --cpu host or {name},-{entry.Name} does without");
            Set(feature, true);
        }
    }

    private void Adjust(ReadOnlySpan<string> changes, HostCpu host)
    {
        foreach (string change in changes)
        {
            if (change.Length < 2 || change[0] is not ('+' or '-'))
                throw new CpuModelException($"'{change}' is no change of a CPU model: write +feature or -feature");
            string name = change[1..];
            if (!FeatureTable.TryFindFeature(name, out FeatureEntry entry))
                throw new CpuModelException($"no CPU feature '{name}'; there are: {string.Join(", ", FeatureTable.Names())}");
            bool add = change[0] == '+';
            if (add && entry.Origin is FeatureOrigin.Host or FeatureOrigin.HostAmd && !host.Has(entry.Feature))
                throw new CpuModelException($"the host's processor lacks '{entry.Name}'");
            Set(entry.Feature, add);
        }
    }

    /// <summary>Features without what they build on go; those that follow from the VM's shape come.</summary>
    private void Complete()
    {
        Set(CpuFeature.Htt, Vcpus > 1);
        if (!Has(CpuFeature.Xsave))
        {
            Span<CpuFeature> needing = [CpuFeature.Avx, CpuFeature.Xsaveopt, CpuFeature.Xsavec, CpuFeature.Xgetbv1, CpuFeature.Xsaves];
            foreach (CpuFeature feature in needing)
                Set(feature, false);
        }
        if (!Has(CpuFeature.Avx))
        {
            Span<CpuFeature> needing = [CpuFeature.Avx2, CpuFeature.Fma, CpuFeature.F16c, CpuFeature.Vaes, CpuFeature.Vpclmulqdq];
            foreach (CpuFeature feature in needing)
                Set(feature, false);
        }
        if (!Has(CpuFeature.LongMode))
            Set(CpuFeature.Pcid, false);
        if (!Has(CpuFeature.Xsavec))
            Set(CpuFeature.Xsaves, false);
    }

    private Cr4 ComputeCr4()
    {
        Cr4 allowed = Cr4.TSD | Cr4.PCE | Cr4.OSFXSR | Cr4.OSXMMEXCPT;
        Span<(CpuFeature Feature, Cr4 Bits)> table =
        [
            (CpuFeature.Vme, Cr4.VME | Cr4.PVI), (CpuFeature.De, Cr4.DE), (CpuFeature.Pse, Cr4.PSE), (CpuFeature.Pae, Cr4.PAE), (CpuFeature.Mce, Cr4.MCE),
            (CpuFeature.Pge, Cr4.PGE), (CpuFeature.Umip, Cr4.UMIP), (CpuFeature.Fsgsbase, Cr4.FSGSBASE), (CpuFeature.Pcid, Cr4.PCIDE),
            (CpuFeature.Xsave, Cr4.OSXSAVE), (CpuFeature.Smep, Cr4.SMEP), (CpuFeature.Smap, Cr4.SMAP),
        ];
        foreach ((CpuFeature feature, Cr4 bits) in table)
        {
            if (Has(feature))
                allowed |= bits;
        }
        return allowed;
    }

    private static (uint A, uint B, uint C) Text(string twelve)
    {
        ReadOnlySpan<uint> words = MemoryMarshal.Cast<byte, uint>(Encoding.ASCII.GetBytes(twelve));
        return (words[0], words[1], words[2]);
    }

    /// <summary>Bits of an APIC ID that number the vCPUs of the package.</summary>
    private int TopologyBits => Vcpus <= 1 ? 0 : BitOperations.Log2((uint)Vcpus - 1) + 1;
}
