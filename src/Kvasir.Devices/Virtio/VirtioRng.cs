using System;
using System.Security.Cryptography;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <summary>Virtio entropy device (virtio 1.2, 5.4): fills the driver's buffers with random bytes of the host's.</summary>
public sealed class VirtioRng : VirtioDevice
{
    private const ushort QueueSize = 64;

    /// <summary>The most one buffer is given, in bytes: a driver that wants more asks again.</summary>
    private const int Largest = 1 << 16;

    public VirtioRng(string name, GuestMemory memory)
        : base(VirtioType.Rng, name, memory, [QueueSize], configSize: 0)
    {
    }

    protected override ulong DeviceFeatures => 0;

    protected override void Process(Virtqueue queue)
    {
        while (queue.Pop() is { } element)
        {
            int given = 0;
            foreach (ref readonly GuestRun run in element.Writable)
            {
                int part = Math.Min(run.Length, Largest - given);
                RandomNumberGenerator.Fill(run.Span[..part]);
                given += part;
                if (given == Largest)
                    break;
            }
            queue.Push(element, (uint)given);
        }
        queue.Notify();
    }
}
