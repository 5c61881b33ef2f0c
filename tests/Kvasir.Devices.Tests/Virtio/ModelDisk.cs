using System;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>A raw image of its own for a disk device, whose host can be made to fail.</summary>
internal sealed class ModelDisk : IAsyncDisposable
{
    private FaultNode? _faults;
    private BlockBackend? _backend;

    /// <param name="content">What the image holds.</param>
    public ModelDisk(byte[] content) => File.WriteAllBytes(Path, content);

    public string Path { get; } = System.IO.Path.Combine(System.IO.Path.GetTempPath(), $"kvasir-disk-{Guid.NewGuid():N}");

    /// <summary>What the host refuses, once it is open.</summary>
    public FaultNode Faults => _faults!;

    public BlockBackend Backend => _backend!;

    public async Task<BlockBackend> OpenAsync(BackendOptions? options = null)
    {
        Assert.Null(_backend);
        options ??= new BackendOptions { Format = "raw" };
        _faults = new FaultNode(await Image.OpenAsync(Path, new OpenOptions { Format = "raw", ReadOnly = options.ReadOnly }, TestContext.Current.CancellationToken));
        return _backend = BlockBackend.Over(_faults, options);
    }

    /// <summary>Closes it, and removes the image. The device that uses it was disposed before.</summary>
    public async ValueTask DisposeAsync()
    {
        if (_backend is not null)
            await _backend.DisposeAsync();
        File.Delete(Path);
    }
}
