using System;
using System.Collections.Generic;
using System.Globalization;
using System.Runtime.Intrinsics.X86;
using Kvasir.Linux;

namespace Kvasir.Kvm;

/// <summary>What a host's KVM is good for, found by trying it.</summary>
/// <param name="Problem">Why it cannot be used, in a few words; null where it can.</param>
/// <param name="Fix">What to do about that: a command or a switch; null where nothing is known or needed.</param>
/// <param name="InstructionsPerSecond">How fast kernel code runs.</param>
/// <param name="TscFrequency">Hz of the guest's time stamp counter.</param>
/// <param name="Missing">What KVM lacks of what Kvasir can use.</param>
/// <param name="Ring3NeedsMending">SYSCALL has to be completed outside KVM, and what raises #UD in ring 3 looked at.</param>
public sealed record KvmProbe(
    string? Problem, string? Fix, double InstructionsPerSecond, ulong TscFrequency, IReadOnlyList<string> Missing, bool Ring3NeedsMending = false)
{
    /// <summary>Below this, kernel code is emulated and not executed by a processor.</summary>
    private const double SlowestProcessor = 50e6;
    private const int MoreMeasurements = 3;

    private const int VmxBit = 5;
    private const int SvmBit = 2;
    private const int HypervisorBit = 31;

    /// <summary>The guest's kernel runs on the processor itself.</summary>
    public bool IsHardware => Problem is null && InstructionsPerSecond >= SlowestProcessor;

    /// <summary>The speed for a person: "1.3 M".</summary>
    public string SpeedText => string.Create(CultureInfo.InvariantCulture, $"{InstructionsPerSecond / 1e6:#,0.0} M");

    /// <summary>Opens KVM, makes a VM, and runs a small loop in it. Never throws for what the host lacks.</summary>
    public static KvmProbe Run(IKvmCalls? calls = null, string path = KvmSystem.DevicePath)
    {
        try
        {
            using KvmSystem system = new(calls, path);
            using SpeedLoop loop = new();
            using KvmVm vm = new(system, loop.Memory);
            using KvmVcpu vcpu = vm.CreateVcpu(0, new KvmVcpuWiring
            {
                Ports = loop.Ports,
                Mmio = loop.Mmio,
                Apic = loop.Apic,
                Clock = loop.Clock,
                Cpuid = system.SupportedCpuid,
                Signature = 0,
            });
            double speed = loop.Measure(vcpu);
            if (speed == 0)
                return new KvmProbe($"a vCPU does not run ({vcpu.FailureReport.Split('\n')[0]})", null, 0, 0, []);
            // A busy host takes the processor away in the middle of a measurement.
            for (int again = 0; again < MoreMeasurements && speed < SlowestProcessor; again++)
                speed = Math.Max(speed, loop.Measure(vcpu));
            List<string> missing = FindMissing(system, vm);
            bool stays = speed < SlowestProcessor && SystemCallCheck.StaysInRing3(system);
            if (stays)
                missing.Add("the change to ring 0 at SYSCALL (Kvasir completes it)");
            return new KvmProbe(null, null, speed, vcpu.TscFrequency, missing, stays);
        }
        catch (LinuxException e)
        {
            (string problem, string? fix) = Explain(e, path);
            return new KvmProbe(problem, fix, 0, 0, []);
        }
    }

    private static List<string> FindMissing(KvmSystem system, KvmVm vm)
    {
        List<string> missing = [];
        if (!vm.HasMsrExits)
            missing.Add("MSR exits (no x2APIC, no TSC deadline timer)");
        if (!vm.ExitsOnEmulationFailure)
            missing.Add("exits on emulation failure (user-mode instructions that KVM does not know get #UD)");
        Add(missing, system, KvmCapability.SplitIrqChip, "local APICs of its own beside the board's other controllers");
        Add(missing, system, KvmCapability.IoEventFdAnyLength, "event descriptors for writes (virtio's doorbells leave the guest)");
        Add(missing, system, KvmCapability.CoalescedPio, "keeping quiet writes");
        Add(missing, system, KvmCapability.AdjustClock, "a clock that can be set (it goes on while the VM is paused)");
        Add(missing, system, KvmCapability.ReadOnlyMemory, "read-only memory slots");
        Add(missing, system, KvmCapability.NestedState, "nested virtualization state");
        Add(missing, system, KvmCapability.Xcrs, "extended processor state");
        return missing;
    }

    private static void Add(List<string> missing, KvmSystem system, KvmCapability capability, string name)
    {
        if (system.Capability(capability) <= 0)
            missing.Add(name);
    }

    private static (string Problem, string? Fix) Explain(LinuxException e, string path) => e.Errno switch
    {
        Errno.NotFound => ($"{path} is missing", MissingFix()),
        Errno.Denied => ($"{path} may not be opened by this user", "sudo usermod -aG kvm $USER, then log in again"),
        Errno.NoDevice or Errno.NoSuchDevice => ($"{path} is there, but no KVM module behind it", MissingFix()),
        Errno.Busy => ("another hypervisor holds the processor's virtualization", "stop the other hypervisor (VirtualBox, VMware) or unload its module"),
        Errno.NotATerminal => ($"{path} is no KVM device", null),
        _ => (e.Message, null),
    };

    /// <summary>Whether the module, the firmware's switch or the host's nesting is what is missing shows in CPUID.</summary>
    private static string MissingFix()
    {
        if (!X86Base.IsSupported)
            return "run on an x86-64 processor";
        (_, _, int features, _) = X86Base.CpuId(1, 0);
        (_, _, int extended, _) = X86Base.CpuId(unchecked((int)0x8000_0001), 0);
        if ((features >> VmxBit & 1) != 0)
            return "sudo modprobe kvm_intel; where that fails, switch on VT-x in the BIOS";
        if ((extended >> SvmBit & 1) != 0)
            return "sudo modprobe kvm_amd; where that fails, switch on SVM (AMD-V) in the BIOS";
        return features >> HypervisorBit != 0
            ? "this host is itself a VM without nested virtualization: have its host set kvm_intel.nested=1 or kvm_amd.nested=1 and pass the processor through"
            : "switch on virtualization (VT-x or SVM) in the BIOS";
    }
}
