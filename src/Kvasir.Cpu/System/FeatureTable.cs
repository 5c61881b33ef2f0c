using System;
using System.Collections.Generic;

namespace Kvasir.Cpu;

/// <summary>A feature with the name that the command line knows it by.</summary>
internal readonly record struct FeatureEntry(string Name, CpuFeature Feature, FeatureOrigin Origin);

/// <summary>Every CPUID feature that Kvasir can offer, and the sets that make the well-known models.</summary>
internal static class FeatureTable
{
    public static readonly FeatureEntry[] All =
    [
        new("fpu", CpuFeature.Fpu, FeatureOrigin.Host),
        new("vme", CpuFeature.Vme, FeatureOrigin.Emulated),
        new("de", CpuFeature.De, FeatureOrigin.Emulated),
        new("pse", CpuFeature.Pse, FeatureOrigin.Emulated),
        new("tsc", CpuFeature.Tsc, FeatureOrigin.Emulated),
        new("msr", CpuFeature.Msr, FeatureOrigin.Emulated),
        new("pae", CpuFeature.Pae, FeatureOrigin.Emulated),
        new("mce", CpuFeature.Mce, FeatureOrigin.Emulated),
        new("cx8", CpuFeature.Cx8, FeatureOrigin.Emulated),
        new("apic", CpuFeature.Apic, FeatureOrigin.Emulated),
        new("sep", CpuFeature.Sep, FeatureOrigin.Emulated),
        new("mtrr", CpuFeature.Mtrr, FeatureOrigin.Emulated),
        new("pge", CpuFeature.Pge, FeatureOrigin.Emulated),
        new("mca", CpuFeature.Mca, FeatureOrigin.Emulated),
        new("cmov", CpuFeature.Cmov, FeatureOrigin.Emulated),
        new("pat", CpuFeature.Pat, FeatureOrigin.Emulated),
        new("pse36", CpuFeature.Pse36, FeatureOrigin.Emulated),
        new("clflush", CpuFeature.Clflush, FeatureOrigin.Emulated),
        new("mmx", CpuFeature.Mmx, FeatureOrigin.Host),
        new("fxsr", CpuFeature.Fxsr, FeatureOrigin.Host),
        new("sse", CpuFeature.Sse, FeatureOrigin.Host),
        new("sse2", CpuFeature.Sse2, FeatureOrigin.Host),
        new("ss", CpuFeature.SelfSnoop, FeatureOrigin.EmulatedIntel),
        new("sse3", CpuFeature.Sse3, FeatureOrigin.Host),
        new("pclmulqdq", CpuFeature.Pclmulqdq, FeatureOrigin.Host),
        new("ssse3", CpuFeature.Ssse3, FeatureOrigin.Host),
        new("fma", CpuFeature.Fma, FeatureOrigin.Host),
        new("cx16", CpuFeature.Cx16, FeatureOrigin.Host),
        new("pcid", CpuFeature.Pcid, FeatureOrigin.Emulated),
        new("sse4.1", CpuFeature.Sse41, FeatureOrigin.Host),
        new("sse4.2", CpuFeature.Sse42, FeatureOrigin.Host),
        new("x2apic", CpuFeature.X2Apic, FeatureOrigin.Emulated),
        new("movbe", CpuFeature.Movbe, FeatureOrigin.Emulated),
        new("popcnt", CpuFeature.Popcnt, FeatureOrigin.Host),
        new("tsc-deadline", CpuFeature.TscDeadline, FeatureOrigin.Emulated),
        new("aes", CpuFeature.Aes, FeatureOrigin.Host),
        new("xsave", CpuFeature.Xsave, FeatureOrigin.Host),
        new("avx", CpuFeature.Avx, FeatureOrigin.Host),
        new("f16c", CpuFeature.F16c, FeatureOrigin.Host),
        new("rdrand", CpuFeature.Rdrand, FeatureOrigin.Emulated),
        new("hypervisor", CpuFeature.Hypervisor, FeatureOrigin.Emulated),
        new("fsgsbase", CpuFeature.Fsgsbase, FeatureOrigin.Emulated),
        new("tsc-adjust", CpuFeature.TscAdjust, FeatureOrigin.Emulated),
        new("bmi1", CpuFeature.Bmi1, FeatureOrigin.Host),
        new("avx2", CpuFeature.Avx2, FeatureOrigin.Host),
        new("fdp-excptn-only", CpuFeature.FdpExceptionOnly, FeatureOrigin.Host),
        new("smep", CpuFeature.Smep, FeatureOrigin.Emulated),
        new("bmi2", CpuFeature.Bmi2, FeatureOrigin.Host),
        new("erms", CpuFeature.Erms, FeatureOrigin.Emulated),
        new("invpcid", CpuFeature.Invpcid, FeatureOrigin.Emulated),
        new("zero-fcs-fds", CpuFeature.ZeroFcsFds, FeatureOrigin.Host),
        new("rdseed", CpuFeature.Rdseed, FeatureOrigin.Emulated),
        new("adx", CpuFeature.Adx, FeatureOrigin.Host),
        new("smap", CpuFeature.Smap, FeatureOrigin.Emulated),
        new("clflushopt", CpuFeature.Clflushopt, FeatureOrigin.Emulated),
        new("clwb", CpuFeature.Clwb, FeatureOrigin.Emulated),
        new("sha-ni", CpuFeature.Sha, FeatureOrigin.Host),
        new("umip", CpuFeature.Umip, FeatureOrigin.Emulated),
        new("gfni", CpuFeature.Gfni, FeatureOrigin.Host),
        new("vaes", CpuFeature.Vaes, FeatureOrigin.Host),
        new("vpclmulqdq", CpuFeature.Vpclmulqdq, FeatureOrigin.Host),
        new("rdpid", CpuFeature.Rdpid, FeatureOrigin.Emulated),
        new("fsrm", CpuFeature.Fsrm, FeatureOrigin.Emulated),
        new("spec-ctrl", CpuFeature.SpecCtrl, FeatureOrigin.EmulatedIntel),
        new("stibp", CpuFeature.Stibp, FeatureOrigin.EmulatedIntel),
        new("arch-capabilities", CpuFeature.ArchCapabilities, FeatureOrigin.EmulatedIntel),
        new("xsaveopt", CpuFeature.Xsaveopt, FeatureOrigin.Host),
        new("xsavec", CpuFeature.Xsavec, FeatureOrigin.Host),
        new("xgetbv1", CpuFeature.Xgetbv1, FeatureOrigin.Host),
        new("xsaves", CpuFeature.Xsaves, FeatureOrigin.Host),
        new("lahf-lm", CpuFeature.Lahf, FeatureOrigin.Emulated),
        new("cmp-legacy", CpuFeature.CmpLegacy, FeatureOrigin.EmulatedAmd),
        new("cr8legacy", CpuFeature.Cr8Legacy, FeatureOrigin.EmulatedAmd),
        new("lzcnt", CpuFeature.Lzcnt, FeatureOrigin.Host),
        new("misalignsse", CpuFeature.MisalignSse, FeatureOrigin.HostAmd),
        new("prefetchw", CpuFeature.Prefetchw, FeatureOrigin.Emulated),
        new("topoext", CpuFeature.TopologyExtensions, FeatureOrigin.EmulatedAmd),
        new("syscall", CpuFeature.Syscall, FeatureOrigin.Emulated),
        new("nx", CpuFeature.Nx, FeatureOrigin.Emulated),
        new("mmxext", CpuFeature.MmxExtensions, FeatureOrigin.HostAmd),
        new("pdpe1gb", CpuFeature.Pdpe1gb, FeatureOrigin.Emulated),
        new("rdtscp", CpuFeature.Rdtscp, FeatureOrigin.Emulated),
        new("lm", CpuFeature.LongMode, FeatureOrigin.Emulated),
        new("wbnoinvd", CpuFeature.Wbnoinvd, FeatureOrigin.Emulated),
        new("ibpb", CpuFeature.AmdIbpb, FeatureOrigin.EmulatedAmd),
        new("ibrs", CpuFeature.AmdIbrs, FeatureOrigin.EmulatedAmd),
        new("amd-stibp", CpuFeature.AmdStibp, FeatureOrigin.EmulatedAmd),
        new("amd-no-ssb", CpuFeature.AmdSsbNo, FeatureOrigin.EmulatedAmd),
        new("btc-no", CpuFeature.AmdBtcNo, FeatureOrigin.EmulatedAmd),
        new("lfence-always-serializing", CpuFeature.LfenceSerializes, FeatureOrigin.EmulatedAmd),
        new("null-sel-clr-base", CpuFeature.NullSelectorClearsBase, FeatureOrigin.EmulatedAmd),
        new("auto-ibrs", CpuFeature.AutomaticIbrs, FeatureOrigin.EmulatedAmd),
        new("srso-no", CpuFeature.SrsoNo, FeatureOrigin.EmulatedAmd),
        new("invtsc", CpuFeature.InvariantTsc, FeatureOrigin.Emulated),
        new("arat", CpuFeature.Arat, FeatureOrigin.Emulated),
    ];

    private static readonly CpuFeature[] Level1 =
    [
        CpuFeature.Fpu, CpuFeature.Vme, CpuFeature.De, CpuFeature.Pse, CpuFeature.Tsc, CpuFeature.Msr, CpuFeature.Pae, CpuFeature.Mce, CpuFeature.Cx8,
        CpuFeature.Apic, CpuFeature.Sep, CpuFeature.Mtrr, CpuFeature.Pge, CpuFeature.Mca, CpuFeature.Cmov, CpuFeature.Pat, CpuFeature.Pse36,
        CpuFeature.Clflush, CpuFeature.Mmx, CpuFeature.Fxsr, CpuFeature.Sse, CpuFeature.Sse2, CpuFeature.Syscall, CpuFeature.Nx, CpuFeature.LongMode,
        CpuFeature.Hypervisor, CpuFeature.X2Apic, CpuFeature.TscDeadline, CpuFeature.InvariantTsc, CpuFeature.Arat,
    ];

    private static readonly CpuFeature[] Level2 =
    [
        CpuFeature.Cx16, CpuFeature.Lahf, CpuFeature.Popcnt, CpuFeature.Sse3, CpuFeature.Sse41, CpuFeature.Sse42, CpuFeature.Ssse3, CpuFeature.Rdtscp,
    ];

    private static readonly CpuFeature[] Level3 =
    [
        CpuFeature.Avx, CpuFeature.Avx2, CpuFeature.Bmi1, CpuFeature.Bmi2, CpuFeature.F16c, CpuFeature.Fma, CpuFeature.Lzcnt, CpuFeature.Movbe, CpuFeature.Xsave,
    ];

    private static readonly CpuFeature[] Haswell =
    [
        CpuFeature.Aes, CpuFeature.Pclmulqdq, CpuFeature.Pcid, CpuFeature.Rdrand, CpuFeature.Fsgsbase, CpuFeature.TscAdjust, CpuFeature.Smep, CpuFeature.Erms,
        CpuFeature.Invpcid, CpuFeature.Xsaveopt,
    ];

    private static readonly CpuFeature[] Epyc =
    [
        CpuFeature.Aes, CpuFeature.Pclmulqdq, CpuFeature.Rdrand, CpuFeature.Fsgsbase, CpuFeature.Smep, CpuFeature.Smap, CpuFeature.Rdseed, CpuFeature.Adx,
        CpuFeature.Clflushopt, CpuFeature.Sha, CpuFeature.Xsaveopt, CpuFeature.Xsavec, CpuFeature.Xgetbv1, CpuFeature.Prefetchw, CpuFeature.Pdpe1gb,
        CpuFeature.MisalignSse, CpuFeature.MmxExtensions, CpuFeature.CmpLegacy, CpuFeature.Cr8Legacy, CpuFeature.TopologyExtensions,
    ];

    /// <summary>A model by name: whose processor it is (null: the host's vendor and signature), and its features.</summary>
    public static bool TryFind(string name, out NamedModel model)
    {
        switch (name)
        {
            case "x86-64-v1" or "qemu64" or "base":
                model = new NamedModel(null, 0, "Kvasir x86-64-v1", Level1);
                return true;
            case "x86-64-v2":
                model = new NamedModel(null, 0, "Kvasir x86-64-v2", [.. Level1, .. Level2]);
                return true;
            case "x86-64-v3":
                model = new NamedModel(null, 0, "Kvasir x86-64-v3", [.. Level1, .. Level2, .. Level3]);
                return true;
            case "Nehalem":
                model = new NamedModel(CpuModel.IntelVendor, 0x0001_06a3, "Intel Core i7 9xx (Nehalem)", [.. Level1, .. Level2]);
                return true;
            case "Haswell":
                model = new NamedModel(CpuModel.IntelVendor, 0x0003_06c4, "Intel Core Processor (Haswell)", [.. Level1, .. Level2, .. Level3, .. Haswell]);
                return true;
            case "Skylake-Client":
                model = new NamedModel(CpuModel.IntelVendor, 0x0005_06e3, "Intel Core Processor (Skylake)",
                [
                    .. Level1, .. Level2, .. Level3, .. Haswell, CpuFeature.Rdseed, CpuFeature.Adx, CpuFeature.Smap, CpuFeature.Prefetchw,
                    CpuFeature.Xsavec, CpuFeature.Xgetbv1,
                ]);
                return true;
            case "EPYC":
                model = new NamedModel(CpuModel.AmdVendor, 0x0080_0f12, "AMD EPYC Processor", [.. Level1, .. Level2, .. Level3, .. Epyc]);
                return true;
            default:
                model = default;
                return false;
        }
    }

    /// <summary>Names of all models, for messages.</summary>
    public const string ModelNames = "host, max, x86-64-v1, x86-64-v2, x86-64-v3, qemu64, Nehalem, Haswell, Skylake-Client, EPYC";

    public static bool TryFindFeature(string name, out FeatureEntry entry)
    {
        // Spellings differ in '_', '-' and '.': /proc/cpuinfo has sse4_1, others sse4.1 or sse4-1.
        string plain = Plain(name);
        foreach (FeatureEntry candidate in All)
        {
            if (string.Equals(Plain(candidate.Name), plain, StringComparison.OrdinalIgnoreCase))
            {
                entry = candidate;
                return true;
            }
        }
        entry = default;
        return false;
    }

    /// <summary>The table's entry of a feature.</summary>
    public static FeatureEntry Find(CpuFeature feature) => Array.Find(All, e => e.Feature == feature);

    public static IEnumerable<string> Names()
    {
        foreach (FeatureEntry entry in All)
            yield return entry.Name;
    }

    private static string Plain(string name) => name.Replace("-", "", StringComparison.Ordinal).Replace("_", "", StringComparison.Ordinal).Replace(".", "", StringComparison.Ordinal);
}

/// <summary>A well-known processor.</summary>
internal readonly record struct NamedModel(string? Vendor, uint Signature, string Brand, CpuFeature[] Features);
