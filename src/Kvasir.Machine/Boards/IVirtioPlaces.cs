using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>Where a board's virtio devices go: slots of a PCI bus, or memory-mapped registers.</summary>
internal interface IVirtioPlaces
{
    /// <summary>Gives a device the next place. It is reset, paused and freed with the board from now on.</summary>
    /// <exception cref="MachineException">There is no place left.</exception>
    void Add(VirtioDevice device);
}
