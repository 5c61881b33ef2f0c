using System;
using System.Collections.Generic;
using Kvasir.X86;

namespace Kvasir.Kvm;

/// <summary>What KVM offers guests that know it (Documentation/virt/kvm/x86/cpuid.rst and msr.rst): above all its clock.</summary>
internal static class Paravirtual
{
    private const uint SignatureLeaf = 0x4000_0000;
    private const uint FeatureLeaf = 0x4000_0001;
    private const uint LastLeaf = 0x4000_0010;

    [Flags]
    private enum Feature : uint
    {
        None = 0,
        Clock = 1 << 0,
        NoIoDelay = 1 << 1,
        Clock2 = 1 << 3,
        StealTime = 1 << 5,
        EndOfInterrupt = 1 << 6,
        Unhalt = 1 << 7,
        TlbFlush = 1 << 9,
        SendIpi = 1 << 11,
        StableClock = 1 << 24,
    }

    /// <summary>What works whatever controllers there are.</summary>
    private const Feature Always = Feature.Clock | Feature.NoIoDelay | Feature.Clock2 | Feature.StealTime | Feature.StableClock;

    /// <summary>What is done by, or through, a local APIC of KVM's.</summary>
    private const Feature WithKernelApic = Feature.EndOfInterrupt | Feature.Unhalt | Feature.TlbFlush | Feature.SendIpi;

    /// <summary>Registers through which a guest has KVM write to its memory: the clock's two pairs, asynchronous faults, stolen time, ends of interrupts.</summary>
    public static ReadOnlySpan<uint> Msrs => [0x11, 0x12, 0x4b56_4d00, 0x4b56_4d01, 0x4b56_4d02, 0x4b56_4d03, 0x4b56_4d04];

    /// <summary>Puts KVM's leaves in place of the model's own, where the model shows a hypervisor at all.</summary>
    public static void Apply(List<CpuidEntry> table, IReadOnlyList<CpuidEntry> supported, bool kernelApic)
    {
        int signature = table.FindIndex(static entry => entry.Leaf == SignatureLeaf && entry.Ebx != 0);
        uint offered = 0;
        foreach (CpuidEntry entry in supported)
        {
            if (entry.Leaf == FeatureLeaf)
                offered = entry.Eax;
        }
        if (signature < 0 || offered == 0)
            return;
        // "KVMKVMKVM"
        table[signature] = new CpuidEntry(SignatureLeaf, 0, false, LastLeaf, 0x4b4d_564b, 0x564b_4d56, 0x4d);
        table.RemoveAll(static entry => entry.Leaf == FeatureLeaf);
        Feature features = Always | (kernelApic ? WithKernelApic : 0);
        table.Add(new CpuidEntry(FeatureLeaf, 0, false, offered & (uint)features, 0, 0, 0));
    }
}
