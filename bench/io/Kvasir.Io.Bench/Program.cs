using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;

namespace Kvasir.Io.Bench;

/// <summary>
/// virtio-blk without a guest: a driver in this process fills its ring, the device's one thread works. Prints requests a second, requests a
/// second of processor time of the device's thread, and bytes allocated a request.
/// With limits (iops=, bps=, as in the options of a disk) it prints those requests a second only, after a fifth of the requests has used the burst up.
/// Usage: Kvasir.Io.Bench read|write FILE COUNT [LIMITS]
/// </summary>
internal static class Program
{
    private const ulong Rings = 0x10_0000;
    private const ulong Headers = 0x20_0000;
    private const ulong Data = 0x40_0000;
    private const ushort QueueSize = 256;

    /// <summary>Three descriptors a request: header, data, status.</summary>
    private const int Slots = QueueSize / 3;
    private const int Block = 4096;

    private static int Main(string[] arguments)
    {
        if (arguments.Length is not (3 or 4) || arguments[0] is not ("read" or "write"))
        {
            Console.Error.WriteLine("usage: Kvasir.Io.Bench read|write FILE COUNT [LIMITS]");
            return 2;
        }
        bool write = arguments[0] == "write";
        int count = int.Parse(arguments[2], CultureInfo.InvariantCulture);
        using GuestMemory memory = new(16ul << 20);
        BackendOptions options = new() { Format = "raw" };
        if (arguments.Length == 4)
            options = options.Apply(ImageOptions.ParseList(arguments[3]));
        BlockBackend backend = BlockBackend.OpenAsync(arguments[1], options).AsTask().GetAwaiter().GetResult();
        using VirtioBlk device = new("blk", memory, new Disk(backend, new DiskSettings { Name = "bench" }));
        Driver driver = new(device, memory, write, new FileInfo(arguments[1]).Length);
        driver.Run(Math.Min(count / 5, 50_000));
        long allocated = GC.GetTotalAllocatedBytes(precise: true);
        long worked = DeviceNanoseconds();
        long start = Stopwatch.GetTimestamp();
        driver.Run(count);
        double seconds = Stopwatch.GetElapsedTime(start).TotalSeconds;
        if (arguments.Length == 4)
        {
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{count / seconds:0.0}"));
            return 0;
        }
        double busy = (DeviceNanoseconds() - worked) / 1e9;
        double each = (GC.GetTotalAllocatedBytes(precise: true) - allocated) / (double)count;
        Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{count / seconds:0} {count / busy:0} {each:0.0}"));
        return 0;
    }

    /// <summary>Processor time of the device's thread, which has its name (proc(5), schedstat).</summary>
    private static long DeviceNanoseconds()
    {
        foreach (string task in Directory.EnumerateDirectories("/proc/self/task"))
        {
            if (File.ReadAllText($"{task}/comm").TrimEnd() == "blk")
                return long.Parse(File.ReadAllText($"{task}/schedstat").Split(' ')[0], CultureInfo.InvariantCulture);
        }
        throw new InvalidOperationException("the device has no thread");
    }

    private sealed class Driver
    {
        private readonly VirtioMmio _registers;
        private readonly GuestRun _available;
        private readonly GuestRun _used;
        private readonly GuestRun _headers;
        private readonly long _blocks;
        private ushort _next;
        private ushort _taken;
        private ulong _random = 88172645463325252;

        public Driver(VirtioBlk device, GuestMemory memory, bool write, long fileSize)
        {
            _blocks = fileSize / Block;
            _registers = new VirtioMmio(device, IrqLine.None);
            ulong available = Rings + QueueSize * 16;
            ulong used = Rings + 0x4000;
            Register(0x70, 3);
            Register(0x24, 1);
            Register(0x20, 1);
            Register(0x24, 0);
            // Flushes are the driver's business; no event index: the device is told by flag.
            Register(0x20, 1 << 9);
            Register(0x70, 11);
            Register(0x30, 0);
            Register(0x38, QueueSize);
            Register(0x80, (uint)Rings);
            Register(0x90, (uint)available);
            Register(0xa0, (uint)used);
            Register(0x44, 1);
            for (int slot = 0; slot < Slots; slot++)
            {
                ulong header = Headers + (ulong)slot * 64;
                memory.TryWrite(new Gpa(header), write ? 1u : 0u);
                Descriptor(memory, slot * 3, header, 16, 1);
                Descriptor(memory, slot * 3 + 1, Data + (ulong)slot * Block, Block, (ushort)(write ? 1 : 3));
                Descriptor(memory, slot * 3 + 2, header + 32, 1, 2);
            }
            memory.TryGetRun(new Gpa(available), 6 + 2 * QueueSize, true, out _available);
            memory.TryGetRun(new Gpa(used), 6 + 8 * QueueSize, true, out _used);
            memory.TryGetRun(new Gpa(Headers), Slots * 64, true, out _headers);
            // This driver polls: no interrupts.
            MemoryMarshal.Write(_available.Span, (ushort)1);
            Register(0x70, 15);
        }

        public void Run(int count)
        {
            int sent = 0;
            int done = 0;
            SpinWait wait = default;
            Stack free = new();
            while (done < count)
            {
                bool added = false;
                while (sent < count && free.Count > 0)
                {
                    int slot = free.Pop();
                    MemoryMarshal.Write(_headers.Span[(slot * 64 + 8)..], (ulong)(Next() % (ulong)_blocks) * (Block / 512));
                    MemoryMarshal.Write(_available.Span[(4 + 2 * (_next & (QueueSize - 1)))..], (ushort)(slot * 3));
                    _next++;
                    sent++;
                    added = true;
                }
                if (added)
                {
                    Volatile.Write(ref MemoryMarshal.AsRef<ushort>(_available.Span[2..]), _next);
                    Interlocked.MemoryBarrier();
                    if ((Volatile.Read(ref MemoryMarshal.AsRef<ushort>(_used.Span)) & 1) == 0)
                        Register(0x50, 0);
                }
                ushort published = Volatile.Read(ref MemoryMarshal.AsRef<ushort>(_used.Span[2..]));
                if (published == _taken)
                {
                    wait.SpinOnce(sleep1Threshold: -1);
                    continue;
                }
                wait.Reset();
                for (; _taken != published; _taken++)
                {
                    int slot = (int)MemoryMarshal.Read<uint>(_used.Span[(4 + 8 * (_taken & (QueueSize - 1)))..]) / 3;
                    if (_headers.Span[slot * 64 + 32] != 0)
                        throw new InvalidOperationException("a request failed");
                    free.Push(slot);
                    done++;
                }
            }
        }

        private ulong Next()
        {
            _random ^= _random << 13;
            _random ^= _random >> 7;
            _random ^= _random << 17;
            return _random;
        }

        private void Register(int register, uint value) => _registers.Write((ulong)register, AccessSize.Dword, value);

        private static void Descriptor(GuestMemory memory, int index, ulong address, uint length, ushort flags)
        {
            ulong at = Rings + (ulong)index * 16;
            memory.TryWrite(new Gpa(at), address);
            memory.TryWrite(new Gpa(at + 8), length);
            memory.TryWrite(new Gpa(at + 12), flags);
            memory.TryWrite(new Gpa(at + 14), (ushort)(index + 1));
        }

        /// <summary>The slots that are free, all at first.</summary>
        private sealed class Stack
        {
            private readonly int[] _slots = new int[Slots];

            public Stack()
            {
                for (int i = 0; i < Slots; i++)
                    _slots[i] = i;
            }

            public int Count { get; private set; } = Slots;

            public int Pop() => _slots[--Count];

            public void Push(int slot) => _slots[Count++] = slot;
        }
    }
}
