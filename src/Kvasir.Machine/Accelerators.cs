using System;
using System.Globalization;
using Kvasir.Core;
using Kvasir.Cpu;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>What executes a VM.</summary>
public enum AcceleratorKind
{
    /// <summary>KVM where it is faster than the software CPU, else that.</summary>
    Auto,
    Kvm,
    Soft,
}

/// <summary>How the software CPU executes guest code.</summary>
public enum ExecutionEngine
{
    /// <summary>Warm code is translated to host code, the rest interpreted.</summary>
    Translator,
    Interpreter,

    /// <summary>Translated blocks are interpreted as well, and compared: to look for defects, with one vCPU.</summary>
    LockStep,
}

/// <summary>Who hears what an accelerator has to say; null: nobody. Called on any thread.</summary>
/// <param name="Kvm">What KVM could not do, at a limited rate.</param>
/// <param name="Cpu">Each MSR that the software CPU does not have, once for each vCPU.</param>
/// <param name="Translator">The translator's counts, when it starts over and at the end.</param>
public sealed record AcceleratorLogs(Action<string>? Kvm = null, Action<string>? Cpu = null, Action<string>? Translator = null);

/// <summary>An accelerator that was chosen.</summary>
/// <param name="Processors">Makes it for a board.</param>
/// <param name="TscFrequency">Hz of the guest's time stamp counter on it.</param>
/// <param name="Reason">What was chosen and why, in one line.</param>
public sealed record Acceleration(ProcessorSource Processors, ulong TscFrequency, string Reason);

/// <summary>Chooses what executes a VM.</summary>
public static class Accelerators
{
    /// <summary>The slowest that the software CPU runs kernel code on any host of the last decade, in instructions a second.</summary>
    private const double SoftwareAtLeast = 20e6;

    /// <param name="configuration">The VM's configuration.</param>
    /// <param name="logs">Who hears of it.</param>
    /// <param name="memory">Spares a start the look at a KVM that was found slow before; null: KVM is always tried.</param>
    /// <exception cref="MachineException">The processor model is not known, or a feature cannot be switched; or KVM was asked for and cannot be used.</exception>
    public static Acceleration Select(VmConfiguration configuration, AcceleratorLogs? logs = null, ProbeMemory? memory = null)
    {
        logs ??= new AcceleratorLogs();
        if (configuration.Accelerator == AcceleratorKind.Soft)
            return Software(configuration, "soft (as asked for)", logs);
        if (configuration.Accelerator == AcceleratorKind.Auto && memory?.Recall() is { } known)
            return Software(configuration, Decide(new KvmProbe(null, null, known, 0, [])).Reason, logs);
        KvmProbe probe = KvmProbe.Run();
        if (configuration.Accelerator == AcceleratorKind.Kvm)
        {
            if (probe.Problem is not null)
                throw new MachineException($"--accel kvm: {probe.Problem}{(probe.Fix is null ? "" : $": {probe.Fix}")}; --accel soft needs no KVM");
            return Kvm(configuration, probe, $"kvm (as asked for; ring-0 code runs at {probe.SpeedText} instructions/s here)", logs.Kvm);
        }
        (bool kvm, string reason) = Decide(probe);
        if (probe.Problem is null && probe.InstructionsPerSecond < SoftwareAtLeast)
            memory?.Keep(probe.InstructionsPerSecond);
        return kvm ? Kvm(configuration, probe, reason, logs.Kvm) : Software(configuration, reason, logs);
    }

    /// <summary>Whether KVM is the better choice on this host, and the line that says so.</summary>
    public static (bool Kvm, string Reason) Decide(KvmProbe probe)
    {
        ArgumentNullException.ThrowIfNull(probe);
        if (probe.Problem is not null)
            return (false, $"soft (kvm: {probe.Problem})");
        if (probe.InstructionsPerSecond < SoftwareAtLeast)
            return (false, $"soft (kvm: ring-0 code runs at {probe.SpeedText} instructions/s here)");
        double software = SoftwareSpeed();
        string against = string.Create(CultureInfo.InvariantCulture, $"ring-0 code runs at {probe.SpeedText} instructions/s here, {software / 1e6:#,0} M on the software CPU");
        return probe.InstructionsPerSecond > software ? (true, $"kvm ({against})") : (false, $"soft (kvm: {against})");
    }

    /// <summary>How fast the software CPU runs kernel code here, in instructions a second.</summary>
    public static double SoftwareSpeed()
    {
        using SpeedLoop loop = new();
        using CodeCache code = new(loop.Memory, new ExecutionBarrier(), 4ul << 20);
        using SoftVcpu vcpu = new(0, new CpuModel(), loop.Memory, loop.Ports, loop.Mmio, loop.Apic, loop.Clock, code);
        return loop.Measure(vcpu);
    }

    private static Acceleration Software(VmConfiguration configuration, string reason, AcceleratorLogs logs)
    {
        CpuModel model = Model(configuration, VmClock.DefaultTscFrequency);
        return new Acceleration(
            (memory, ports, mmio, clock) => new SoftwareProcessors(model, memory, ports, mmio, clock, configuration.Engine, logs), VmClock.DefaultTscFrequency, reason);
    }

    private static Acceleration Kvm(VmConfiguration configuration, KvmProbe probe, string reason, Action<string>? log)
    {
        CpuModel model = Model(configuration, probe.TscFrequency);
        return new Acceleration(
            (memory, ports, mmio, clock) =>
            {
                KvmSystem system = new();
                KernelIrqChip irqChip = configuration.IrqChip ?? DefaultIrqChip(system, probe);
                return new KvmProcessors(system, model, memory, ports, mmio, clock, log, probe.Ring3NeedsMending, irqChip);
            },
            probe.TscFrequency, reason);
    }

    private static KernelIrqChip DefaultIrqChip(KvmSystem system, KvmProbe probe) =>
        probe.IsHardware && system.Capability(KvmCapability.SplitIrqChip) > 0 ? KernelIrqChip.Split : KernelIrqChip.Off;

    private static CpuModel Model(VmConfiguration configuration, ulong tscFrequency)
    {
        try
        {
            return CpuModel.Parse(configuration.Cpu, configuration.Cpus, tscFrequency);
        }
        catch (CpuModelException e)
        {
            throw new MachineException($"--cpu: {e.Message}", e);
        }
    }
}
