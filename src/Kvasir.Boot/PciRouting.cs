namespace Kvasir.Boot;

/// <summary>
/// How the pins of PCI slots on bus 0 are wired to the ISA bridge's PIRQs. SeaBIOS programs interrupt lines by the same rule.
/// </summary>
public static class PciRouting
{
    public const int Slots = 32;
    public const int Pins = 4;

    /// <summary>From this slot on an ICH9 board wires INTA-INTD to PIRQA-PIRQD; below, turned by slot, to PIRQE-PIRQH.</summary>
    private const int FirstBuiltInSlot = 25;

    /// <summary>Whether PIRQs have inputs of their own at the IOAPIC, from <see cref="ChipsetAddresses.FirstPciGsi"/>.</summary>
    public static bool HasDirectInputs(PciDescription pci) => pci.PirqCount > Pins;

    /// <summary>Which PIRQ a slot's pin is wired to: 0 for PIRQA.</summary>
    /// <param name="slot">Device number, 0 to 31.</param>
    /// <param name="pin">0 for INTA.</param>
    public static int Pirq(PciDescription pci, int slot, int pin)
    {
        if (!HasDirectInputs(pci))
            return (slot + pin + Pins - 1) % Pins;
        return slot < FirstBuiltInSlot ? Pins + (slot + pin) % Pins : pin;
    }
}
