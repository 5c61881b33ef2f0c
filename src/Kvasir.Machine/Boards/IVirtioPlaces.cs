using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>Where a board's virtio devices go: slots of a PCI bus, or memory-mapped registers.</summary>
internal interface IVirtioPlaces
{
    /// <summary>Gives a device the next place. It is reset, paused and freed with the board from now on.</summary>
    /// <returns>The place as firmware names it (IEEE 1275 device path), without what hangs on the device; null where firmware boots from none.</returns>
    /// <exception cref="MachineException">There is no place left.</exception>
    string? Add(VirtioDevice device);
}
