using System;
using System.Diagnostics;
using System.Globalization;
using Kvasir.Core;
using Kvasir.Devices.Tests.Virtio;
using Kvasir.Devices.Virtio;
using Kvasir.Network;

// What virtio-net's device side carries, driven by a driver without a guest: both on this one thread. Prints one line for each direction, ring and size.
const int batch = 64;
const ulong rings = 0x10_0000;
const ulong buffers = 0x100_0000;
TimeSpan time = TimeSpan.FromSeconds(args.Length > 0 ? double.Parse(args[0], CultureInfo.InvariantCulture) : 2);

foreach (bool packed in (bool[])[false, true])
{
    foreach (int length in (int[])[1514, 16014, 65014])
    {
        Report("guest to host", packed, length, Measure(packed, length, receive: false));
        Report("host to guest", packed, length, Measure(packed, length, receive: true));
    }
}

static void Report(string what, bool packed, int length, (double Frames, double Seconds, long Allocated) result) => Console.WriteLine(string.Create(
    CultureInfo.InvariantCulture,
    $"{what}, {(packed ? "packed" : "split"),-6} ring, {length,6}-byte frames: {result.Frames * length * 8 / result.Seconds / 1e9,6:0.0} Gbit/s, {result.Frames / result.Seconds / 1e6,5:0.00} M frames/s, {result.Allocated} bytes allocated"));

(double Frames, double Seconds, long Allocated) Measure(bool packed, int length, bool receive)
{
    using GuestMemory memory = new(64ul << 20);
    using ManualNetwork network = new() { Sent = null };
    using VirtioNet device = new("net", memory, network, new NicSettings(new byte[] { 0x52, 0x54, 0, 1, 2, 3 }));
    device.Connect();
    ModelDriver driver = new(device, memory);
    ModelQueue[] queues = driver.Start(packed ? ulong.MaxValue : ulong.MaxValue & ~ModelDriver.RingPacked, 256, rings);
    byte[] frame = new byte[length];
    new Random(1).NextBytes(frame);
    ((byte[])[0x52, 0x54, 0, 1, 2, 3]).CopyTo(frame, 0);
    for (int index = 0; index < batch; index++)
        memory.TryWrite(new Gpa(Place(index) + 12), frame);
    Run(TimeSpan.FromSeconds(1));
    return Run(time);

    (double Frames, double Seconds, long Allocated) Run(TimeSpan span)
    {
        Stopwatch watch = Stopwatch.StartNew();
        long allocated = GC.GetAllocatedBytesForCurrentThread();
        long frames = 0;
        while (watch.Elapsed < span)
        {
            for (int index = 0; index < batch; index++)
            {
                ReadOnlySpan<Part> parts = receive
                    ? [new Part(Place(index), (uint)length + 12, true)]
                    : [new Part(Place(index), 12, false), new Part(Place(index) + 12, (uint)length, false)];
                queues[receive ? 0 : 1].TryAdd(parts, indirect: false);
            }
            if (receive)
            {
                for (int index = 0; index < batch; index++)
                    device.Receive(0, default, frame);
            }
            else
            {
                device.Transmit(0);
            }
            int done = 0;
            while (queues[receive ? 0 : 1].TryTake(out _, out _))
                done++;
            if (done != batch)
                throw new InvalidOperationException($"{done} of {batch} frames came through");
            frames += done;
        }
        return (frames, watch.Elapsed.TotalSeconds, GC.GetAllocatedBytesForCurrentThread() - allocated);
    }
}

static ulong Place(int index) => buffers + (ulong)index * 0x1_2000;
