using System.Collections.Generic;
using Kvasir.Devices.Virtio;

namespace Kvasir.Machine;

/// <summary>A disk as the monitor shows it.</summary>
/// <param name="Waiting">Requests that wait for the VM to go on, after the host failed.</param>
public readonly record struct DiskStatus(string Name, string Path, long Bytes, bool ReadOnly, bool Removable, int Waiting);

/// <summary>The memory balloon as the monitor shows it, in bytes.</summary>
/// <param name="Ballooned">Taken from the guest.</param>
/// <param name="Statistics">What the guest said last.</param>
public readonly record struct BalloonStatus(ulong Memory, ulong Ballooned, long GivenBack, BalloonStatistics Statistics);

/// <summary>What a monitor asks of a VM's devices while it runs. Any thread but a vCPU's or a device's. Faults are <see cref="MachineException"/>.</summary>
public interface IDeviceControl
{
    IReadOnlyList<DiskStatus> Disks { get; }

    /// <summary>Plugs a disk into a free slot, or into the SCSI controller.</summary>
    void AddDisk(DiskConfiguration disk);

    /// <summary>The NICs, those that were plugged in among them.</summary>
    IReadOnlyList<NicConnection> Nics { get; }

    /// <summary>Plugs a NIC into a free slot. Its back end is the VM's once this comes back.</summary>
    void AddNic(NicConnection nic);

    /// <summary>Asks the guest to let go of a device that was plugged into a slot. It is gone when the guest has, which may take seconds.</summary>
    void Remove(string name);

    /// <summary>Changes a disk's size and tells the guest.</summary>
    /// <param name="bytes">A multiple of 512.</param>
    void ResizeDisk(string name, long bytes);

    /// <summary>The balloon, after asking the guest for new statistics; null where the VM has none.</summary>
    BalloonStatus? Balloon { get; }

    /// <summary>Has the guest come down to, or up to, so much memory in bytes.</summary>
    void SetMemory(ulong bytes);

    /// <summary>Has the guest name its free pages once, which go back to the host.</summary>
    void ReclaimFreePages();

    /// <summary>The guest's virtio consoles have a terminal of another size.</summary>
    void ResizeConsole(ushort columns, ushort rows);
}
