namespace Kvasir.Boot;

/// <summary>
/// Where things stand on Kvasir's boards: the guest-physical addresses, ports and interrupt numbers that are the same for every machine kind.
/// Devices are placed at these numbers by the composition root, and the firmware tables tell the guest of them.
/// </summary>
public static class ChipsetAddresses
{
    // Memory
    /// <summary>Extended BIOS data area: the last KiB of conventional memory.</summary>
    public const ulong Ebda = 0x9_fc00;
    public const ulong VideoMemory = 0xa_0000;
    public const ulong VideoMemorySize = 0x2_0000;

    /// <summary>The segment that a guest scans for RSDP, SMBIOS and MP table anchors.</summary>
    public const ulong BiosSegment = 0xf_0000;
    public const ulong OneMiB = 0x10_0000;

    /// <summary>PCI Express configuration space, 1 MiB for each of 256 buses.</summary>
    public const ulong Ecam = 0xb000_0000;
    public const ulong EcamSize = 0x1000_0000;
    public const ulong PciWindow = 0xc000_0000;

    /// <summary>One past the last byte of the 32-bit PCI window.</summary>
    public const ulong PciWindowEnd = 0xfec0_0000;
    public const ulong IoApic = 0xfec0_0000;
    public const ulong Hpet = 0xfed0_0000;

    /// <summary>Bytes of the HPET's register block.</summary>
    public const ulong HpetSize = 0x400;
    public const ulong LocalApic = 0xfee0_0000;
    public const ulong FourGiB = 1ul << 32;

    // Ports
    public const ushort PmBase = 0x600;

    /// <summary>PM1a event block: status and enable, 4 bytes.</summary>
    public const ushort Pm1aEvent = PmBase;

    /// <summary>PM1a control, 2 bytes.</summary>
    public const ushort Pm1aControl = PmBase + 4;

    /// <summary>PM timer, 4 bytes.</summary>
    public const ushort PmTimer = PmBase + 8;

    /// <summary>General purpose events: status, then enable.</summary>
    public const ushort Gpe0 = PmBase + 0x20;

    /// <summary>Bytes of the GPE0 block, status and enable together.</summary>
    public const byte Gpe0Size = 16;

    /// <summary>Ports that the power management block takes, from <see cref="PmBase"/>.</summary>
    public const ushort PmSize = 0x80;
    public const ushort SmiCommand = 0xb2;
    public const ushort ResetControl = 0xcf9;
    public const ushort FwCfg = 0x510;
    public const ushort FwCfgSize = 12;
    public const ushort Com1 = 0x3f8;
    public const ushort Com2 = 0x2f8;
    public const ushort Com3 = 0x3e8;
    public const ushort Com4 = 0x2e8;
    public const ushort PciConfigAddress = 0xcf8;

    // Values
    /// <summary>Written to <see cref="SmiCommand"/> to hand power management to the operating system (sets SCI_EN).</summary>
    public const byte AcpiEnable = 0x02;

    /// <summary>Written to <see cref="SmiCommand"/> to take it back.</summary>
    public const byte AcpiDisable = 0x03;

    /// <summary>Written to <see cref="ResetControl"/>: full reset.</summary>
    public const byte ResetValue = 0x06;

    /// <summary>SLP_TYP of S3 and S5 in PM1 control.</summary>
    public const byte SleepTypeS3 = 1;
    public const byte SleepTypeS5 = 0;

    // Interrupts
    public const byte SciIrq = 9;
    public const byte RtcIrq = 8;
    public const byte KeyboardIrq = 1;
    public const byte MouseIrq = 12;
    public const byte FpuIrq = 13;

    /// <summary>The IOAPIC input that ISA IRQ 0 is wired to.</summary>
    public const byte TimerGsi = 2;

    /// <summary>The first IOAPIC input beyond the ISA interrupts.</summary>
    public const byte FirstPciGsi = 16;
}
