using System;
using System.Buffers.Binary;
using System.Text;
using Kvasir.Core;
using Kvasir.Sharing;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// Virtio file system device (virtio 1.2, 5.11): carries FUSE messages between the guest and a server. Its thread does the host's file calls, one after the
/// other; a slow disk holds up this share alone.
/// </summary>
public sealed class VirtioFs : VirtioDevice
{
    /// <summary>Bytes of the longest tag.</summary>
    public const int LongestTag = 36;

    private const ushort PriorityQueueSize = 64;
    private const ushort RequestQueueSize = 256;
    private const int ConfigBytes = LongestTag + 4;
    private const int AnswerHead = 16;
    private const int Invalid = 22;

    /// <param name="Server">What the guest knows and has open.</param>
    public sealed record FsState(FuseServer.State Server) : ModelState;

    // Wiring
    private readonly FuseServer _server;

    // State, of the device's thread
    private readonly byte[] _request = new byte[FuseServer.MaximumRequest];
    private readonly byte[] _reply = new byte[FuseServer.MaximumReply];

    /// <param name="server">Whoever made it disposes it, after this device.</param>
    /// <param name="tag">What the guest mounts it by: 1 to 36 bytes of UTF-8.</param>
    public VirtioFs(string name, GuestMemory memory, FuseServer server, string tag)
        : base(VirtioType.FileSystem, name, memory, [PriorityQueueSize, RequestQueueSize], ConfigBytes)
    {
        _server = server;
        byte[] text = Encoding.UTF8.GetBytes(tag);
        if (text.Length is 0 or > LongestTag)
            throw new ArgumentException($"a share's tag has 1 to {LongestTag} bytes", nameof(tag));
        Span<byte> config = stackalloc byte[ConfigBytes];
        config.Clear();
        text.CopyTo(config);
        BinaryPrimitives.WriteUInt32LittleEndian(config[LongestTag..], 1);
        SetConfig(0, config);
    }

    protected override ulong DeviceFeatures => 0;

    protected override void Process(Virtqueue queue)
    {
        while (queue.Pop() is { } element)
        {
            queue.Push(element, (uint)Serve(element));
            queue.Notify();
        }
    }

    protected override ModelState SaveModel() => new FsState(_server.Save());

    protected override string? CheckModel(ModelState? model) => model is FsState state ? FuseServer.Fault(state.Server) : "it is not a file system's";

    protected override void RestoreModel(ModelState? model) => _server.Restore(((FsState)model!).Server);

    /// <summary>What the guest had open is closed: its driver is gone.</summary>
    protected override void Stopped() => _server.Reset();

    private int Serve(VirtqueueElement element)
    {
        Span<byte> reply = _reply.AsSpan(0, (int)Math.Min(element.WritableLength, _reply.Length));
        int length;
        if (element.ReadableLength > _request.Length)
        {
            // Longer than this server said it takes.
            if (reply.Length < AnswerHead)
                return 0;
            reply = reply[..AnswerHead];
            reply.Clear();
            BinaryPrimitives.WriteInt32LittleEndian(reply, AnswerHead);
            BinaryPrimitives.WriteInt32LittleEndian(reply[4..], -Invalid);
            element.Read(8, reply[8..]);
            length = AnswerHead;
        }
        else
        {
            // Copied once: the guest could change a message while it is looked at.
            Span<byte> request = _request.AsSpan(0, (int)element.ReadableLength);
            element.Read(0, request);
            length = _server.Serve(request, reply);
        }
        element.Write(0, reply[..length]);
        return length;
    }
}
