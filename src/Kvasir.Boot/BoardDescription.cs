using System;
using System.Collections.Generic;
using System.Linq;
using Kvasir.Core;

namespace Kvasir.Boot;

public enum MachineKind
{
    /// <summary>PCI Express, ICH9-like. The default.</summary>
    Q35,

    /// <summary>i440FX and PIIX3, for old systems.</summary>
    Pc,

    /// <summary>No PCI: virtio over memory-mapped registers only.</summary>
    Microvm,
}

/// <summary>A 16550 on the board.</summary>
/// <param name="Number">1 for COM1.</param>
public readonly record struct SerialPortDescription(int Number, ushort Port, byte Irq);

/// <summary>A virtio device with its registers in memory (virtio 1.x, "Virtio Over MMIO").</summary>
/// <param name="Gsi">The IOAPIC input, level triggered.</param>
public readonly record struct VirtioMmioDescription(ulong Address, uint Size, uint Gsi);

/// <summary>The PCI host bridge and what is fixed behind it.</summary>
public sealed record PciDescription
{
    /// <summary>Enhanced configuration space, or null where there is only the port mechanism.</summary>
    public ulong? Ecam { get; init; }

    /// <summary>Buses, from 0.</summary>
    public int BusCount { get; init; } = 256;
    public ulong Window { get; init; } = ChipsetAddresses.PciWindow;
    public ulong WindowEnd { get; init; } = ChipsetAddresses.PciWindowEnd;

    /// <summary>The window above 4 GiB, or 0 for none.</summary>
    public ulong HighWindow { get; init; }
    public ulong HighWindowSize { get; init; }

    /// <summary>Address of the ISA bridge as _ADR writes it: device in the high half, function in the low.</summary>
    public uint IsaBridge { get; init; }

    /// <summary>
    /// PIRQ routing registers: 4 (60h-63h, PIIX3) or 8 (60h-63h and 68h-6Bh, ICH9) of the ISA bridge. With 8, inputs 16-23 of the IOAPIC are
    /// wired to PIRQA-PIRQH; with 4, the ISA interrupt chosen in the register is used with both controllers.
    /// </summary>
    public int PirqCount { get; init; } = 8;
}

/// <summary>Names and numbers that a guest shows its user (SMBIOS). ASCII; an empty string is left out.</summary>
public sealed record SystemIdentity
{
    public string Manufacturer { get; init; } = "Kvasir";

    /// <summary>The default names the machine kind.</summary>
    public string Product { get; init; } = "";
    public string Version { get; init; } = "";
    public string SerialNumber { get; init; } = "";
    public string Sku { get; init; } = "";
    public string Family { get; init; } = "Virtual Machine";
    public string AssetTag { get; init; } = "";
    public Guid Uuid { get; init; }
    public string ProcessorName { get; init; } = "";
}

/// <summary>
/// All that firmware tables and loaders must know of a board. Machine kinds differ in this data alone. The composition root makes one beside
/// the devices it describes.
/// </summary>
public sealed record BoardDescription
{
    public required MachineKind Kind { get; init; }

    /// <summary>APIC IDs of the processors, the boot processor first.</summary>
    public required IReadOnlyList<uint> ApicIds { get; init; }

    /// <summary>Physical address bits of the processors, as CPUID 80000008h gives them: MTRR masks need it.</summary>
    public int PhysicalAddressBits { get; init; } = 40;

    /// <summary>CPUID leaf 1, EAX and EDX, of every processor: SMBIOS and the MP table repeat them.</summary>
    public uint ProcessorSignature { get; init; } = 0x0000_0600;
    public uint ProcessorFeatures { get; init; } = 0x0000_0201;

    /// <summary>What the VM says of itself in SMBIOS.</summary>
    public SystemIdentity Identity { get; init; } = new();

    public bool HasAcpi { get; init; } = true;
    public bool HasHpet { get; init; } = true;

    /// <summary>HPET comparators, as its capabilities register gives them.</summary>
    public int HpetComparators { get; init; } = 3;
    public bool HasKeyboardController { get; init; } = true;
    public bool HasRtc { get; init; } = true;

    /// <summary>8237s with their page registers.</summary>
    public bool HasDma { get; init; } = true;
    public bool HasVga { get; init; }
    public bool HasFwCfg { get; init; } = true;

    /// <summary>Suspend to memory is offered to the guest.</summary>
    public bool HasS3 { get; init; }

    /// <summary>The PM timer counts 32 bits, not 24.</summary>
    public bool PmTimer32Bit { get; init; }
    public byte IoApicId { get; init; }
    public ulong IoApicAddress { get; init; } = ChipsetAddresses.IoApic;

    /// <summary>Inputs of the IOAPIC.</summary>
    public int IoApicPins { get; init; } = 24;
    public IReadOnlyList<SerialPortDescription> SerialPorts { get; init; } = [new(1, ChipsetAddresses.Com1, 4)];
    public IReadOnlyList<VirtioMmioDescription> VirtioMmio { get; init; } = [];
    public PciDescription? Pci { get; init; }

    /// <summary>The default machine: PCI Express with ECAM.</summary>
    /// <param name="processors">How many.</param>
    /// <param name="memorySize">RAM in bytes: where the 64-bit PCI window starts depends on it.</param>
    /// <param name="physicalAddressBits">Of the processors: how far that window can reach.</param>
    public static BoardDescription Q35(int processors, ulong memorySize, int physicalAddressBits = 40) => new()
    {
        Kind = MachineKind.Q35,
        PhysicalAddressBits = physicalAddressBits,
        ApicIds = Sequence(processors),
        Pci = new PciDescription
        {
            Ecam = ChipsetAddresses.Ecam,
            HighWindow = HighWindowStart(memorySize),
            HighWindowSize = Math.Min(64ul << 30, (1ul << physicalAddressBits) - Math.Min(1ul << physicalAddressBits, HighWindowStart(memorySize))),
            IsaBridge = 0x001f_0000,
            PirqCount = 8,
        },
    };

    /// <summary>For old systems: conventional PCI behind an i440FX.</summary>
    public static BoardDescription Pc(int processors) => new()
    {
        Kind = MachineKind.Pc,
        ApicIds = Sequence(processors),
        Pci = new PciDescription { IsaBridge = 0x0001_0000, PirqCount = 4 },
    };

    /// <summary>The smallest machine: no PCI.</summary>
    public static BoardDescription Microvm(int processors) => new()
    {
        Kind = MachineKind.Microvm,
        ApicIds = Sequence(processors),
    };

    private static ulong HighWindowStart(ulong memorySize)
    {
        const ulong gibibyte = 1ul << 30;
        ulong highEnd = memorySize <= GuestMemory.LowRamMaximum
            ? ChipsetAddresses.FourGiB
            : ChipsetAddresses.FourGiB + memorySize - GuestMemory.LowRamLimit;
        return (highEnd + gibibyte - 1) & ~(gibibyte - 1);
    }

    private static uint[] Sequence(int processors)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(processors, 1);
        return [.. Enumerable.Range(0, processors).Select(i => (uint)i)];
    }
}
