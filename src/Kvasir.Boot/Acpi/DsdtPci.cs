using System.Collections.Generic;
using System.Globalization;

namespace Kvasir.Boot.Acpi;

/// <summary>
/// The PCI host bridge in AML: windows, interrupt routing, the ISA bridge with its PIRQ routers (Intel ICH9 datasheet, "PIRQ[n]_ROUT";
/// 82371SB (PIIX3) datasheet, "PIRQRC[A:D]").
/// </summary>
internal static class DsdtPci
{
    /// <summary>PIRQ register, bit 7: not routed to the 8259s.</summary>
    private const uint Unrouted = 0x80;

    /// <summary>Where the interrupt number lies in the descriptor that <see cref="AmlResources.Interrupts"/> writes.</summary>
    private const ulong InterruptNumberOffset = 5;

    public static AmlTerm HostBridge(PciDescription pci, AmlTerm[] isaDevices)
    {
        AmlResources windows = new AmlResources()
            .BusNumbers(0, (ushort)(pci.BusCount - 1))
            .Io(ChipsetAddresses.PciConfigAddress, 8)
            .IoWindow(0x0000, ChipsetAddresses.PciConfigAddress - 1)
            .IoWindow(0x0d00, 0xffff)
            .MemoryWindow32(ChipsetAddresses.VideoMemory, ChipsetAddresses.VideoMemory + ChipsetAddresses.VideoMemorySize - 1, cacheable: true)
            .MemoryWindow32(pci.Window, pci.WindowEnd - 1);
        if (pci.HighWindowSize > 0)
            windows.MemoryWindow64(pci.HighWindow, pci.HighWindow + pci.HighWindowSize - 1);

        List<AmlTerm> bridge = [];
        if (pci.Ecam is null)
        {
            bridge.Add(Aml.Name("_HID", Aml.EisaId("PNP0A03")));
        }
        else
        {
            bridge.Add(Aml.Name("_HID", Aml.EisaId("PNP0A08")));
            bridge.Add(Aml.Name("_CID", Aml.EisaId("PNP0A03")));
            bridge.Add(OperatingSystemCapabilities());
        }
        bridge.Add(Aml.Name("_UID", Aml.Zero));
        bridge.Add(Aml.Name("_CRS", windows.End()));
        bridge.Add(Aml.Device("ISA", [Aml.Name("_ADR", pci.IsaBridge), .. PirqRegisters(pci), .. isaDevices]));
        bridge.Add(Aml.Name("PRTP", RoutingTable(pci, direct: false)));
        if (PciRouting.HasDirectInputs(pci))
        {
            bridge.Add(Aml.Name("PRTA", RoutingTable(pci, direct: true)));
            bridge.Add(Aml.Method(
                "_PRT", 0, false, Aml.If(Aml.Path("PICF"), Aml.Return(Aml.Path("PRTA"))), Aml.Else(Aml.Return(Aml.Path("PRTP")))));
        }
        else
        {
            bridge.Add(Aml.Method("_PRT", 0, false, Aml.Return(Aml.Path("PRTP"))));
        }

        List<AmlTerm> links = [.. LinkMethods()];
        for (int i = 0; i < pci.PirqCount; i++)
            links.Add(Link(i));
        return Aml.Scope("\\_SB", [Aml.Device("PCI0", [.. bridge]), .. links]);
    }

    /// <summary>_OSC: native hot-plug, PME, AER and capability structures belong to the operating system (PCI Firmware specification 3.x).</summary>
    private static AmlTerm OperatingSystemCapabilities()
    {
        // 33DB4D5B-1FF7-401C-9657-7441C03DD766, as a UUID is laid out in a buffer.
        byte[] uuid = [0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66];
        const ulong granted = 0x1d;
        const ulong unknownUuid = 4;
        return Aml.Method(
            "_OSC",
            4,
            true,
            Aml.CreateDwordField(Aml.Arg(3), Aml.Zero, "CDW1"),
            Aml.If(
                Aml.LEqual(Aml.Arg(0), Aml.Buffer(uuid)),
                Aml.CreateDwordField(Aml.Arg(3), 8, "CDW3"),
                Aml.And(Aml.Path("CDW3"), granted, Aml.Path("CDW3"))),
            Aml.Else(Aml.Or(Aml.Path("CDW1"), unknownUuid, Aml.Path("CDW1"))),
            Aml.Return(Aml.Arg(3)));
    }

    private static AmlTerm[] PirqRegisters(PciDescription pci)
    {
        List<(string Name, int Bits)> fields = [];
        for (int i = 0; i < pci.PirqCount; i++)
        {
            if (i == 4)
                fields.Add(("", 32));
            fields.Add((Register(i), 8));
        }
        return
        [
            Aml.OperationRegion("PIRQ", AmlRegionSpace.PciConfig, 0x60, (ulong)(pci.PirqCount > 4 ? 12 : 4)),
            Aml.Field("PIRQ", 1, [.. fields]),
        ];
    }

    /// <summary>_PRT: for each slot and pin the link device, or (<paramref name="direct"/>) the IOAPIC input of its own.</summary>
    private static AmlTerm RoutingTable(PciDescription pci, bool direct)
    {
        List<AmlTerm> entries = [];
        for (int slot = 0; slot < PciRouting.Slots; slot++)
        {
            for (int pin = 0; pin < PciRouting.Pins; pin++)
            {
                int pirq = PciRouting.Pirq(pci, slot, pin);
                ulong address = ((ulong)slot << 16) | 0xffff;
                entries.Add(direct
                    ? Aml.Package(address, (ulong)pin, Aml.Zero, (ulong)(ChipsetAddresses.FirstPciGsi + pirq))
                    : Aml.Package(address, (ulong)pin, Aml.Path(LinkName(pirq)), Aml.Zero));
            }
        }
        return Aml.Package([.. entries]);
    }

    /// <summary>Methods that the link devices share: status and current setting for a PIRQ register's value.</summary>
    private static AmlTerm[] LinkMethods() =>
    [
        Aml.Method(
            "LNKS", 1, false, Aml.If(Aml.And(Aml.Arg(0), Unrouted, Aml.Zero), Aml.Return(0x09)), Aml.Return(0x0b)),
        Aml.Method(
            "LNKR",
            1,
            true,
            Aml.Name("BUF0", new AmlResources().Interrupts(edge: false, shared: true, 0).End()),
            Aml.CreateDwordField(Aml.Path("BUF0"), InterruptNumberOffset, "IRQN"),
            Aml.If(
                Aml.LEqual(Aml.And(Aml.Arg(0), Unrouted, Aml.Zero), Aml.Zero),
                Aml.Store(Aml.And(Aml.Arg(0), 0x0f, Aml.Zero), Aml.Path("IRQN"))),
            Aml.Return(Aml.Path("BUF0"))),
    ];

    private static AmlTerm Link(int number)
    {
        AmlTerm register = Aml.Path("\\_SB.PCI0.ISA." + Register(number));
        return Aml.Device(
            LinkName(number),
            Aml.Name("_HID", Aml.EisaId("PNP0C0F")),
            Aml.Name("_UID", (ulong)number),
            Aml.Name("_PRS", new AmlResources().Interrupts(edge: false, shared: true, 5, 10, 11).End()),
            Aml.Method("_STA", 0, false, Aml.Return(Aml.Call("LNKS", register))),
            Aml.Method("_DIS", 0, false, Aml.Or(register, Unrouted, register)),
            Aml.Method("_CRS", 0, false, Aml.Return(Aml.Call("LNKR", register))),
            Aml.Method(
                "_SRS",
                1,
                true,
                Aml.CreateDwordField(Aml.Arg(0), InterruptNumberOffset, "IRQN"),
                Aml.Store(Aml.Path("IRQN"), register)));
    }

    private static string Register(int number) => string.Create(CultureInfo.InvariantCulture, $"PRQ{(char)('A' + number)}");

    private static string LinkName(int number) => string.Create(CultureInfo.InvariantCulture, $"LNK{(char)('A' + number)}");
}
