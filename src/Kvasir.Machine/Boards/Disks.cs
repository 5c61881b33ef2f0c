using System;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;

namespace Kvasir.Machine.Boards;

/// <summary>Opens the VM's disks and hangs them on their buses.</summary>
internal static class Disks
{
    private const int MaximumQueues = 8;

    /// <exception cref="MachineException">An image cannot be opened, or there is no place for a disk.</exception>
    public static void Build(BoardFrame board, VmConfiguration configuration, IPowerControl power)
    {
        foreach (DiskConfiguration disk in configuration.Disks)
        {
            OpenDisk opened = board.Own(OpenDisk.Open(disk, power.Pause));
            int queues = disk.Queues > 0 ? disk.Queues : Math.Min(configuration.Cpus, MaximumQueues);
            int workers = Math.Min(queues, Environment.ProcessorCount);
            board.Places(disk.Settings.Name).Add(new VirtioBlk(disk.Settings.Name, board.Memory, opened.Disk, queues, workers));
        }
    }
}

/// <summary>A disk with its image, which is closed with it.</summary>
internal sealed class OpenDisk : IDisposable
{
    private OpenDisk(Disk disk)
    {
        Disk = disk;
    }

    public Disk Disk { get; }

    /// <exception cref="MachineException">The image cannot be opened.</exception>
    public static OpenDisk Open(DiskConfiguration configuration, Action<string>? pause)
    {
        try
        {
            BlockBackend backend = BlockBackend.OpenAsync(configuration.Path, configuration.Options).AsTask().GetAwaiter().GetResult();
            return new OpenDisk(new Disk(backend, configuration.Settings, pause));
        }
        catch (BlockException error)
        {
            throw new MachineException($"disk {configuration.Path}: {error.Message}", error);
        }
    }

    public void Dispose() => Disk.Backend.DisposeAsync().AsTask().GetAwaiter().GetResult();
}
