using System;
using System.Collections.Generic;
using System.IO;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>What <c>kvasir doctor</c> says of KVM.</summary>
/// <param name="Usable">VMs can run on it.</param>
/// <param name="State">What is there, or what is wrong.</param>
/// <param name="Fix">What to do about it; null where nothing is needed or known.</param>
/// <param name="Choice">What <c>--accel auto</c> picks here, and why.</param>
/// <param name="Details">The host's module and its switches, and what KVM lacks; a line each.</param>
public sealed record KvmDiagnosis(bool Usable, string State, string? Fix, string Choice, IReadOnlyList<string> Details)
{
    private const string Modules = "/sys/module";

    private static readonly (string Module, string Parameter, string Meaning, string? FixWhenOff)[] s_switches =
    [
        ("kvm_intel", "ept", "extended page tables", "page tables are shadowed, which is slow: sudo modprobe -r kvm_intel && sudo modprobe kvm_intel ept=1"),
        ("kvm_intel", "unrestricted_guest", "real mode on the processor", null),
        ("kvm_intel", "nested", "VMs inside VMs", "echo 'options kvm_intel nested=1' | sudo tee /etc/modprobe.d/kvm.conf, then load the module again"),
        ("kvm_amd", "npt", "nested page tables", "page tables are shadowed, which is slow: sudo modprobe -r kvm_amd && sudo modprobe kvm_amd npt=1"),
        ("kvm_amd", "nested", "VMs inside VMs", "echo 'options kvm_amd nested=1' | sudo tee /etc/modprobe.d/kvm.conf, then load the module again"),
    ];

    /// <summary>Looks at the host, for some 10 ms.</summary>
    public static KvmDiagnosis Run()
    {
        KvmProbe probe = KvmProbe.Run();
        string choice = Accelerators.Decide(probe).Reason;
        List<string> details = [];
        foreach (string module in (ReadOnlySpan<string>)["kvm_intel", "kvm_amd", "kvm_pvm"])
        {
            if (Directory.Exists(Path.Combine(Modules, module)))
                details.Add($"module {module} is loaded");
        }
        foreach ((string module, string parameter, string meaning, string? fix) in s_switches)
        {
            if (Read(Path.Combine(Modules, module, "parameters", parameter)) is not { } value)
                continue;
            bool on = value is "Y" or "1";
            details.Add($"{module}.{parameter} ({meaning}): {(on ? "on" : fix is null ? "off" : $"off; {fix}")}");
        }
        foreach (string missing in probe.Missing)
            details.Add($"lacks {missing}");
        if (probe.Problem is { } problem)
            return new KvmDiagnosis(false, problem, probe.Fix, choice, details);
        string state = probe.IsHardware
            ? $"works on the processor's virtualization; ring-0 code runs at {probe.SpeedText} instructions/s"
            : $"works without the processor's virtualization: it emulates kernels, at {probe.SpeedText} instructions/s";
        return new KvmDiagnosis(true, state, null, choice, details);
    }

    private static string? Read(string path)
    {
        try
        {
            return File.ReadAllText(path).Trim();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // A module that is not loaded has no switches.
            return null;
        }
    }
}
