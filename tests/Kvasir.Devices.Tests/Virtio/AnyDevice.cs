using System;
using System.IO;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Serial;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;
using Kvasir.Network.Vsock;
using Kvasir.Sharing;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>A device of any type with what it needs of the host, for tests that are the same for all of them.</summary>
internal sealed class AnyDevice : IAsyncDisposable
{
    private readonly string _folder = Directory.CreateTempSubdirectory("kvasir-any-").FullName;
    private ModelDisk? _disk;
    private VsockBridge? _bridge;
    private FuseServer? _server;

    private AnyDevice()
    {
    }

    /// <summary>Names of all types.</summary>
    public static string[] Types => ["blk", "net", "scsi", "console", "rng", "balloon", "fs", "vsock"];

    public VirtioDevice Device { get; private set; } = null!;

    /// <summary>A queue whose buffers come back whatever is in them.</summary>
    public int RequestQueue { get; private set; }

    public string Folder => Path.Combine(_folder, "shared");

    /// <summary>The NIC's network.</summary>
    public ManualNetwork Network { get; } = new();

    public static async Task<AnyDevice> OpenAsync(string type, GuestMemory memory)
    {
        AnyDevice any = new();
        switch (type)
        {
            case "blk":
                any.Device = new VirtioBlk(type, memory, await any.DiskAsync(), queues: 2);
                break;
            case "net":
                any.Network.Sent = null;
                VirtioNet net = new(type, memory, any.Network, new NicSettings(new byte[] { 0x52, 0x54, 0, 1, 2, 3 }, Pairs: 1, Mtu: 1500));
                net.Connect();
                (any.Device, any.RequestQueue) = (net, 2);
                break;
            case "scsi":
                VirtioScsi scsi = new(type, memory);
                scsi.Attach(new ScsiUnit(await any.DiskAsync(), 0, 0));
                (any.Device, any.RequestQueue) = (scsi, 2);
                break;
            case "console":
                any.Device = new VirtioConsole(type, memory, [new ConsolePort(new Sink()), new ConsolePort(new Sink(), "channel")]);
                any.RequestQueue = 1;
                break;
            case "rng":
                any.Device = new VirtioRng(type, memory);
                break;
            case "balloon":
                any.Device = new VirtioBalloon(type, memory);
                break;
            case "fs":
                Directory.CreateDirectory(any.Folder);
                any._server = new FuseServer(any.Folder, readOnly: false);
                (any.Device, any.RequestQueue) = (new VirtioFs(type, memory, any._server, "share"), 1);
                break;
            default:
                any._bridge = new VsockBridge(Path.Combine(any._folder, "vsock"));
                VirtioVsock vsock = new(type, memory, any._bridge);
                vsock.Connect();
                (any.Device, any.RequestQueue) = (vsock, 1);
                break;
        }
        return any;
    }

    public async ValueTask DisposeAsync()
    {
        _bridge?.Dispose();
        Device.Dispose();
        _server?.Dispose();
        if (_disk is not null)
            await _disk.DisposeAsync();
        // A guest can make names of any bytes, which .NET's strings do not hold.
        using System.Diagnostics.Process process = System.Diagnostics.Process.Start("rm", ["-rf", _folder]);
        await process.WaitForExitAsync();
    }

    private async Task<Disk> DiskAsync()
    {
        _disk = new ModelDisk(new byte[1 << 20]);
        return new Disk(await _disk.OpenAsync(new BackendOptions { Format = "raw" }), new DiskSettings { Name = "disk" });
    }

    /// <summary>Takes all, and says nothing.</summary>
    private sealed class Sink : ICharacterBackend
    {
        public void Attach(ICharacterDevice device)
        {
        }

        public int Write(ReadOnlySpan<byte> bytes) => bytes.Length;

        public void ResumeInput()
        {
        }
    }
}
