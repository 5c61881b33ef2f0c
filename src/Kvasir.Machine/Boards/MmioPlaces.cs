using System.Collections.Generic;
using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>Places for virtio devices in memory, on a board without PCI: a register block and an I/O APIC pin each.</summary>
internal sealed class MmioPlaces(BoardFrame board) : IVirtioPlaces
{
    private const ulong FirstAddress = 0xfeb0_0000;
    private const int FirstPin = 16;

    /// <summary>As many as there are pins beyond the ISA interrupts.</summary>
    private const int Count = 8;

    private readonly List<VirtioMmioDescription> _places = [];

    /// <summary>What the firmware tables and the kernel's command line tell of.</summary>
    public IReadOnlyList<VirtioMmioDescription> Places => _places;

    public string? Add(VirtioDevice device)
    {
        if (_places.Count == Count)
            throw new MachineException($"this machine has {Count} places for virtio devices, and {device.Name} would be one more");
        ulong address = FirstAddress + (ulong)_places.Count * VirtioMmio.RegionSize;
        int pin = FirstPin + _places.Count;
        board.Own(device);
        board.AddPausable(device);
        VirtioMmio transport = board.Add(new VirtioMmio(device, board.SharedPin(pin)));
        board.Mmio.Map(new Gpa(address), VirtioMmio.RegionSize, transport, AccessSize.Byte, AccessSize.Dword);
        _places.Add(new VirtioMmioDescription(address, (uint)VirtioMmio.RegionSize, (uint)pin));
        return null;
    }
}
