using System;
using System.Collections.Generic;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>A file given to a kernel beside it: an initial RAM disk or a multiboot module.</summary>
/// <param name="Content">The whole file.</param>
/// <param name="Arguments">The module's string (multiboot, PVH). Linux has none.</param>
public readonly record struct BootModule(ReadOnlyMemory<byte> Content, string Arguments = "");

/// <summary>What a VM is to start with.</summary>
public sealed record BootRequest
{
    /// <summary>The whole kernel file.</summary>
    public required ReadOnlyMemory<byte> Kernel { get; init; }

    /// <summary>The kernel's name: multiboot kernels find it before their arguments.</summary>
    public string KernelName { get; init; } = "kernel";

    public string CommandLine { get; init; } = "";

    /// <summary>Linux takes one, its initial RAM disk.</summary>
    public IReadOnlyList<BootModule> Modules { get; init; } = [];
}

public enum KernelKind
{
    /// <summary>An ELF file with a Xen note that gives a PVH entry.</summary>
    Pvh,

    /// <summary>A file with a multiboot (version 1) header: ELF, or any with the header's address fields.</summary>
    Multiboot,

    /// <summary>A Linux bzImage.</summary>
    Linux,
}

/// <summary>A kernel in memory, ready to run.</summary>
/// <param name="Cpu">The boot processor at the kernel's entry.</param>
/// <param name="Entry">How it is entered, for a person: "64-bit Linux boot protocol 2.15".</param>
/// <param name="Placed">What lies where, in ascending order.</param>
/// <param name="Map">The memory map the guest was given.</param>
public sealed record LoadedKernel(KernelKind Kind, string Entry, CpuState Cpu, IReadOnlyList<PlacedRange> Placed, IReadOnlyList<AddressRange> Map);
