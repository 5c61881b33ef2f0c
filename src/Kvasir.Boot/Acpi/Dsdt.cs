using System;
using System.Collections.Generic;
using System.Globalization;

namespace Kvasir.Boot.Acpi;

/// <summary>The AML of a board: what devices stand where (ACPI specification, ch. "ACPI Namespace" and "Device Configuration").</summary>
internal static class Dsdt
{
    /// <summary>_STA: present, enabled, functioning, but not shown to the user.</summary>
    private const uint PresentHidden = 0x0b;

    public static AmlTerm[] Build(BoardDescription board)
    {
        List<AmlTerm> terms = [];
        if (board.Pci is PciDescription pci)
        {
            terms.Add(Aml.Name("PICF", Aml.Zero));
            terms.Add(Aml.Method("_PIC", 1, false, Aml.Store(Aml.Arg(0), Aml.Path("PICF"))));
            terms.Add(DsdtPci.HostBridge(pci, IsaDevices(board)));
        }
        else
        {
            terms.Add(Aml.Scope("\\_SB", IsaDevices(board)));
        }
        terms.Add(Aml.Scope("\\_SB", BoardDevices(board)));
        if (board.VirtioMmio.Count > 0)
            terms.Add(Aml.Scope("\\_SB", VirtioDevices(board)));
        terms.Add(Aml.Scope("\\_SB", Processors(board)));
        if (board.HasS3)
            terms.Add(SleepState("_S3", ChipsetAddresses.SleepTypeS3));
        terms.Add(SleepState("_S5", ChipsetAddresses.SleepTypeS5));
        return [.. terms];
    }

    /// <summary>A device with an EISA identifier and fixed resources.</summary>
    internal static AmlTerm FixedDevice(string name, string id, AmlResources resources, params AmlTerm[] more) =>
        Aml.Device(name, [Aml.Name("_HID", Aml.EisaId(id)), .. more, Aml.Name("_CRS", resources.End())]);

    private static AmlTerm[] IsaDevices(BoardDescription board)
    {
        List<AmlTerm> devices =
        [
            FixedDevice("PIC", "PNP0000", new AmlResources().Io(0x20, 2).Io(0xa0, 2).Io(0x4d0, 2).Irq(2)),
            FixedDevice("PIT", "PNP0100", new AmlResources().Io(0x40, 4).Irq(0)),
            FixedDevice("SPKR", "PNP0800", new AmlResources().Io(0x61, 1)),
            FixedDevice("FPU", "PNP0C04", new AmlResources().Io(0xf0, 1).Irq(ChipsetAddresses.FpuIrq)),
        ];
        if (board.HasDma)
            devices.Add(FixedDevice("DMAC", "PNP0200", new AmlResources().Io(0x00, 0x10).Io(0x81, 0x0f).Io(0xc0, 0x20).Dma(4)));
        if (board.HasRtc)
            devices.Add(FixedDevice("RTC", "PNP0B00", new AmlResources().Io(0x70, 2).Irq(ChipsetAddresses.RtcIrq)));
        if (board.HasKeyboardController)
        {
            devices.Add(FixedDevice("KBD", "PNP0303", new AmlResources().Io(0x60, 1).Io(0x64, 1).Irq(ChipsetAddresses.KeyboardIrq)));
            devices.Add(FixedDevice("MOU", "PNP0F13", new AmlResources().Irq(ChipsetAddresses.MouseIrq)));
        }
        foreach (SerialPortDescription serial in board.SerialPorts)
        {
            string name = string.Create(CultureInfo.InvariantCulture, $"COM{serial.Number}");
            devices.Add(FixedDevice(name, "PNP0501", new AmlResources().Io(serial.Port, 8).Irq(serial.Irq), Aml.Name("_UID", (ulong)serial.Number)));
        }
        return [.. devices];
    }

    private static AmlTerm[] BoardDevices(BoardDescription board)
    {
        AmlResources motherboard = new AmlResources()
            .Io(ChipsetAddresses.PmBase, (byte)ChipsetAddresses.PmSize)
            .Io(ChipsetAddresses.SmiCommand, 2)
            .Memory32(board.IoApicAddress, 0x1000)
            .Memory32(ChipsetAddresses.LocalApic, 0x1000);
        if (board.Pci?.Ecam is ulong ecam)
            motherboard.Memory32(ecam, (ulong)board.Pci.BusCount << 20);
        List<AmlTerm> devices = [FixedDevice("MBRD", "PNP0C02", motherboard, Aml.Name("_UID", Aml.One))];
        if (board.HasHpet)
        {
            AmlResources hpet = new AmlResources().Memory32(ChipsetAddresses.Hpet, ChipsetAddresses.HpetSize, writable: false);
            devices.Add(FixedDevice("HPET", "PNP0103", hpet, Aml.Name("_UID", Aml.Zero)));
        }
        if (board.HasFwCfg)
        {
            devices.Add(Aml.Device(
                "FWCF",
                Aml.Name("_HID", Aml.Text("QEMU0002")),
                Aml.Name("_STA", PresentHidden),
                Aml.Name("_CRS", new AmlResources().Io(ChipsetAddresses.FwCfg, (byte)ChipsetAddresses.FwCfgSize).End())));
        }
        return [.. devices];
    }

    private static AmlTerm[] VirtioDevices(BoardDescription board)
    {
        List<AmlTerm> devices = [];
        for (int i = 0; i < board.VirtioMmio.Count; i++)
        {
            VirtioMmioDescription virtio = board.VirtioMmio[i];
            devices.Add(Aml.Device(
                string.Create(CultureInfo.InvariantCulture, $"VM{i:X2}"),
                Aml.Name("_HID", Aml.Text("LNRO0005")),
                Aml.Name("_UID", (ulong)i),
                Aml.Name("_CCA", Aml.One),
                Aml.Name("_CRS", new AmlResources().Memory32(virtio.Address, virtio.Size).Interrupts(edge: false, shared: false, virtio.Gsi).End())));
        }
        return [.. devices];
    }

    /// <summary>Processors, numbered as the MADT numbers them. Old systems know only Processor(), whose number is one byte.</summary>
    private static AmlTerm[] Processors(BoardDescription board)
    {
        AmlTerm[] processors = new AmlTerm[board.ApicIds.Count];
        for (int i = 0; i < processors.Length; i++)
        {
            string name = string.Create(CultureInfo.InvariantCulture, $"C{i:X3}");
            processors[i] = i < byte.MaxValue
                ? Aml.Processor(name, (byte)i)
                : Aml.Device(name, Aml.Name("_HID", Aml.Text("ACPI0007")), Aml.Name("_UID", (ulong)i));
        }
        return processors;
    }

    private static AmlTerm SleepState(string name, byte type) => Aml.Name(name, Aml.Package(type, type, Aml.Zero, Aml.Zero));
}
