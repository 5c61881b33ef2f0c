using System.Collections.Generic;
using Kvasir.Boot;
using Kvasir.Kvm;

namespace Kvasir.Machine;

/// <summary>A device that the user added, with its settings as written.</summary>
public sealed record DeviceSetting(string Name, IReadOnlyDictionary<string, string> Settings);

/// <summary>All that makes a VM what it is: the machine, and what it boots. Where each value came from is the business of who fills it in.</summary>
public sealed record VmConfiguration
{
    public const ulong DefaultMemory = 512ul << 20;

    /// <summary>The least a board can be built with, in bytes.</summary>
    public const ulong MinimumMemory = 1ul << 20;

    /// <summary>The VM's name: unique among the user's running VMs, and the name of its run folder.</summary>
    public required string Name { get; init; }

    public AcceleratorKind Accelerator { get; init; } = AcceleratorKind.Auto;

    /// <summary>Which interrupt controllers are KVM's, where it executes; null: the local APICs where the processor itself runs guests, none where KVM emulates kernels.</summary>
    public KernelIrqChip? IrqChip { get; init; }

    /// <summary>How the software CPU executes, where it does.</summary>
    public ExecutionEngine Engine { get; init; } = ExecutionEngine.Translator;

    public MachineKind Machine { get; init; } = MachineKind.Q35;

    public int Cpus { get; init; } = 1;

    /// <summary>RAM in bytes, a multiple of 4 KiB.</summary>
    public ulong Memory { get; init; } = DefaultMemory;

    /// <summary>"host", "max" or a model's name, then <c>,+feature</c> and <c>,-feature</c>.</summary>
    public string Cpu { get; init; } = "max";

    /// <summary>Path of the kernel to boot directly; null where firmware boots.</summary>
    public string? Kernel { get; init; }

    /// <summary>Path of the initial file system, or a list of modules for a multiboot kernel as <c>path arguments,path arguments</c>.</summary>
    public string? InitialRamdisk { get; init; }

    public string KernelCommandLine { get; init; } = "";

    /// <summary>Path of a firmware image that holds the reset vector; null where a kernel is booted directly.</summary>
    public string? Firmware { get; init; }

    public IReadOnlyList<DiskConfiguration> Disks { get; init; } = [];

    public IReadOnlyList<ShareConfiguration> Shares { get; init; } = [];

    public IReadOnlyList<DeviceSetting> Devices { get; init; } = [];

    /// <summary>The guest's reset ends the VM.</summary>
    public bool NoReboot { get; init; }
}
