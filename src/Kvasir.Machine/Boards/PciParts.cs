using System.Globalization;
using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Pci;
using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>The PCI Express root complex of a Q35 board: host bridge, LPC bridge, and the slots of bus 0.</summary>
internal sealed class PciParts : IVirtioPlaces
{
    private const int FirstFreeSlot = 2;
    private const int LpcSlot = 0x1f;

    /// <summary>Where an ICH9 has its root ports.</summary>
    private const int RootPortSlot = 0x1c;

    /// <summary>Slots for devices that come while the VM runs.</summary>
    private const int RootPortCount = 4;

    private readonly BoardFrame _board;

    private PciParts(BoardFrame board, Q35HostBridge host)
    {
        _board = board;
        Host = host;
    }

    public Q35HostBridge Host { get; }

    public static PciParts Build(BoardFrame board, PciDescription pci)
    {
        IIrqLine[] direct = new IIrqLine[Ich9Lpc.PirqCount];
        for (int pirq = 0; pirq < direct.Length; pirq++)
            direct[pirq] = board.SharedPin(ChipsetAddresses.FirstPciGsi + pirq);
        IIrqLine[] pic = new IIrqLine[Kvasir.Devices.Chipset.IsaIrqs.Count];
        for (int irq = 0; irq < pic.Length; irq++)
            pic[irq] = board.Irqs.PicInput(irq);
        Ich9Lpc lpc = new(direct, pic, ChipsetAddresses.PmBase);
        Q35HostBridge host = new(board.Apics, (slot, pin, asserted) => lpc.SetPirq(PciRouting.Pirq(pci, slot, pin), asserted), board.Memory.LowSize);
        host.RootBus.Plug(lpc, new PciSlot(LpcSlot));
        host.Map(board.Ports, board.Mmio, pci.WindowEnd, pci.HighWindow, pci.HighWindowSize);
        board.Add(host);
        board.DoorbellsTaken += host.Connect;
        board.Add(lpc);
        if (pci.Ecam is { } ecam)
            board.ActAsFirmware = () => host.EnableEcam(ecam);
        for (int number = 1; number <= RootPortCount; number++)
        {
            PcieRootPort port = board.Add(new PcieRootPort($"port{number}", number, board.Apics));
            if (number == 1)
                port.MarkMultifunction();
            host.RootBus.Plug(port, new PciSlot(RootPortSlot, number - 1));
            board.RootPorts.Add(port);
            board.Devices?.Watch(port);
        }
        PciParts parts = new(board, host);
        board.Virtio = parts;
        return parts;
    }

    public string Add(VirtioDevice device)
    {
        int slot = Host.RootBus.FreeDevice(FirstFreeSlot);
        if (slot < 0)
            throw new MachineException($"there is no PCI slot left for {device.Name}");
        _board.Own(device);
        _board.AddPausable(device);
        VirtioPci function = _board.Add(new VirtioPci(device, HasLegacyInterface(device.Type)));
        Host.RootBus.Plug(function, new PciSlot(slot));
        return string.Create(CultureInfo.InvariantCulture, $"/pci@i0cf8/scsi@{slot:x}");
    }

    /// <summary>Types that drivers of before virtio 1.0 know.</summary>
    private static bool HasLegacyInterface(VirtioType type) =>
        type is VirtioType.Net or VirtioType.Block or VirtioType.Console or VirtioType.Rng or VirtioType.Balloon or VirtioType.Scsi or VirtioType.Transport9P;
}
