using System;
using System.Collections.Generic;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
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
            DiskBackend backend = Open(disk, power.Pause);
            board.Own(new Closing(backend));
            int queues = disk.Queues > 0 ? disk.Queues : Math.Min(configuration.Cpus, MaximumQueues);
            board.Places(disk.Name).Add(new VirtioBlk(disk.Name, board.Memory, backend, queues, Math.Min(queues, Environment.ProcessorCount)));
        }
    }

    /// <summary>Opens one image with all that its configuration says.</summary>
    public static DiskBackend Open(DiskConfiguration disk, Action<string>? pause)
    {
        BlockNode node;
        try
        {
            node = OpenAsync(disk).AsTask().GetAwaiter().GetResult();
        }
        catch (BlockException error)
        {
            throw new MachineException($"disk {disk.Path}: {error.Message}", error);
        }
        DiskSettings settings = new()
        {
            Name = disk.Name,
            ReadOnly = disk.ReadOnly,
            Serial = disk.Serial,
            Discard = disk.Discard,
            LogicalBlock = disk.LogicalBlock,
            PhysicalBlock = disk.PhysicalBlock,
            WriteError = disk.WriteError,
            ReadError = disk.ReadError,
        };
        return new DiskBackend(node, settings, pause);
    }

    private static async ValueTask<BlockNode> OpenAsync(DiskConfiguration disk)
    {
        OpenOptions options = new()
        {
            Format = disk.Format,
            Probe = disk.Format is null,
            ReadOnly = disk.ReadOnly || disk.Snapshot,
            Cache = disk.Cache,
            Discard = disk.Discard,
        };
        BlockNode node = await Image.OpenAsync(disk.Path, options).ConfigureAwait(false);
        return disk.Limits is { } limits ? new ThrottleNode(node, limits) : node;
    }

    /// <summary>Closes an image with the board, after its device.</summary>
    private sealed class Closing(DiskBackend backend) : IDisposable
    {
        public void Dispose() => backend.DisposeAsync().AsTask().GetAwaiter().GetResult();
    }
}
