using System;
using Kvasir.Block;
using Kvasir.Devices.Storage;

namespace Kvasir.Machine.Boards;

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
