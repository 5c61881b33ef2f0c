using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <summary>Virtio block device (virtio 1.2, 5.2).</summary>
public sealed class VirtioBlk : VirtioDiskDevice
{
    public const ushort DefaultQueueSize = 256;
    public const int SectorSize = 512;

    /// <summary>Characters of the serial number that the guest sees.</summary>
    public const int SerialLength = 20;

    private const int ConfigBytes = 60;
    private const int HeaderSize = 16;
    private const int RangeSize = 16;
    private const int MaximumRanges = 256;

    [Flags]
    private enum Feature : ulong
    {
        SegmentMaximum = 1 << 2,
        Geometry = 1 << 4,
        ReadOnly = 1 << 5,
        BlockSize = 1 << 6,
        Flush = 1 << 9,
        Topology = 1 << 10,
        ConfigWriteback = 1 << 11,
        MultiQueue = 1 << 12,
        Discard = 1 << 13,
        WriteZeroes = 1 << 14,
    }

    private enum Config
    {
        Capacity = 0,
        SegmentMaximum = 12,
        Geometry = 16,
        BlockSize = 20,
        PhysicalBlockExponent = 24,
        MinimumIoSize = 26,
        Writeback = 32,
        QueueCount = 34,
        MaximumDiscardSectors = 36,
        MaximumDiscardRanges = 40,
        DiscardAlignment = 44,
        MaximumZeroSectors = 48,
        MaximumZeroRanges = 52,
        ZeroMayUnmap = 56,
    }

    private enum RequestType : uint
    {
        In = 0,
        Out = 1,
        Flush = 4,
        GetId = 8,
        Discard = 11,
        WriteZeroes = 13,
    }

    private enum Result : byte
    {
        Ok = 0,
        IoError = 1,
        Unsupported = 2,
    }

    [StructLayout(LayoutKind.Sequential, Size = HeaderSize)]
    private readonly record struct Header(RequestType Type, uint Reserved, ulong Sector);

    [StructLayout(LayoutKind.Sequential, Size = RangeSize)]
    private readonly record struct Range(ulong Sector, uint Sectors, uint Flags);

    // Configuration
    private readonly Disk _disk;

    // State

    /// <summary>The capacity that the driver was told.</summary>
    private ulong _sectors;

    /// <param name="disk">The disk. Whoever opened its back end closes it.</param>
    /// <param name="queues">Request queues.</param>
    /// <param name="workers">Threads.</param>
    public VirtioBlk(string name, GuestMemory memory, Disk disk, int queues = 1, int workers = 1, ushort queueSize = DefaultQueueSize)
        : base(VirtioType.Block, name, memory, Sizes(queues, queueSize), ConfigBytes, workers)
    {
        _disk = disk;
        DiskSettings settings = disk.Settings;
        Span<byte> config = stackalloc byte[ConfigBytes];
        config.Clear();
        WriteCapacity(config);
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.SegmentMaximum..], (uint)Math.Min(queueSize - 2, 254));
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.BlockSize..], (uint)settings.LogicalBlock);
        config[(int)Config.PhysicalBlockExponent] = (byte)System.Numerics.BitOperations.Log2((uint)Math.Max(1, settings.PhysicalBlock / settings.LogicalBlock));
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.MinimumIoSize..], (ushort)Math.Max(1, settings.PhysicalBlock / settings.LogicalBlock));
        config[(int)Config.Writeback] = disk.Backend.WriteCache ? (byte)1 : (byte)0;
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.QueueCount..], (ushort)queues);
        const uint sectors = 1u << 21;
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.MaximumDiscardSectors..], sectors);
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.MaximumDiscardRanges..], MaximumRanges);
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.DiscardAlignment..], (uint)settings.LogicalBlock / SectorSize);
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.MaximumZeroSectors..], sectors);
        BinaryPrimitives.WriteUInt32LittleEndian(config[(int)Config.MaximumZeroRanges..], MaximumRanges);
        config[(int)Config.ZeroMayUnmap] = 1;
        SetConfig(0, config);
        disk.Backend.Resized += OnResized;
    }

    public Disk Disk => _disk;

    protected override ulong DeviceFeatures
    {
        get
        {
            Feature features = Feature.SegmentMaximum | Feature.Geometry | Feature.BlockSize | Feature.Flush | Feature.Topology | Feature.ConfigWriteback;
            if (Queues.Length > 1)
                features |= Feature.MultiQueue;
            if (_disk.IsReadOnly)
                features |= Feature.ReadOnly;
            else
                features |= Feature.WriteZeroes;
            if (_disk.Backend.CanDiscard)
                features |= Feature.Discard;
            return (ulong)features;
        }
    }

    /// <summary>Writes are stable when they end: the driver knows no flush, or chose so.</summary>
    private bool WritesThrough =>
        Has((ulong)Feature.ConfigWriteback) ? ConfigByte((int)Config.Writeback) == 0 : !Has((ulong)Feature.Flush);

    protected override bool WritingConfig(int offset, ReadOnlySpan<byte> bytes) =>
        offset == (int)Config.Writeback && bytes.Length == 1 && bytes[0] <= 1 && Has((ulong)Feature.ConfigWriteback);

    protected override void Process(Virtqueue queue) => ProcessRequests(queue);

    protected override void ProcessWake() => RetryKept(_disk);

    protected override void Stopped() => DropKept(_disk);

    private protected override void CollectHeld(List<VirtqueueElement> held) => CollectKept(_disk, held);

    /// <summary>The capacity is this disk's.</summary>
    protected override void RestoreModel(ModelState? model)
    {
        Span<byte> config = stackalloc byte[(int)Config.BlockSize];
        ReadConfigStart(config);
        WriteCapacity(config);
        KeepConfig(0, config);
    }

    private protected override VirtioDiskRequest NewRequest() => new Request(this);

    protected override void Dispose(bool disposing)
    {
        _disk.Backend.Resized -= OnResized;
        base.Dispose(disposing);
    }

    private static ushort[] Sizes(int queues, ushort size)
    {
        ushort[] sizes = new ushort[queues];
        Array.Fill(sizes, size);
        return sizes;
    }

    private void OnResized()
    {
        Span<byte> config = stackalloc byte[(int)Config.BlockSize];
        ReadConfigStart(config);
        WriteCapacity(config);
        SetConfig(0, config);
        ConfigChanged();
    }

    private void ReadConfigStart(Span<byte> config)
    {
        for (int i = 0; i < config.Length; i++)
            config[i] = ConfigByte(i);
    }

    private void WriteCapacity(Span<byte> config)
    {
        ulong sectors = (ulong)_disk.Backend.Length / SectorSize;
        Volatile.Write(ref _sectors, sectors);
        BinaryPrimitives.WriteUInt64LittleEndian(config, sectors);
        // What CHS has no room for says so with its largest value, as ATA disks do (ATA/ATAPI-7, annex C).
        const byte heads = 16;
        const byte perTrack = 63;
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.Geometry..], (ushort)Math.Min(sectors / (heads * perTrack), 16383));
        config[(int)Config.Geometry + 2] = heads;
        config[(int)Config.Geometry + 3] = perTrack;
    }

    /// <summary>One request of the driver's.</summary>
    private sealed class Request(VirtioBlk device) : VirtioDiskRequest(device)
    {
        private Result _result;
        private RequestType _type;
        private uint _written;
        private int _range;
        private int _ranges;

        public override bool TryAgain() => Start();

        protected override bool Begin(VirtqueueElement element)
        {
            _result = Result.Ok;
            _written = 0;
            // The last writable byte takes the result; without it there is no way to answer.
            if (element.WritableLength < 1 || !element.TryRead(0, out Header header))
                return Break("a block request without header or status");
            _type = header.Type;
            switch (_type)
            {
                case RequestType.In:
                    return Transfer(BlockOperation.Read, header.Sector, element.Writable, 0, element.WritableLength - 1);
                case RequestType.Out:
                    return device._disk.IsReadOnly
                        ? Reject(Result.IoError)
                        : Transfer(BlockOperation.Write, header.Sector, element.Readable, HeaderSize, element.ReadableLength - HeaderSize);
                case RequestType.Flush:
                    Clear();
                    Operation = BlockOperation.Flush;
                    return Start();
                case RequestType.GetId:
                    return GetId(element);
                case RequestType.Discard or RequestType.WriteZeroes:
                    return device._disk.IsReadOnly ? Reject(Result.IoError) : BeginRanges(element);
                default:
                    return Reject(Result.Unsupported);
            }
        }

        protected override uint WriteAnswer(VirtqueueElement element)
        {
            element.WriteLast((byte)_result);
            return _result == Result.Ok ? _written + 1 : 1;
        }

        private bool Transfer(BlockOperation operation, ulong sector, ReadOnlySpan<GuestRun> runs, long skip, long length)
        {
            if (length < 0 || length % SectorSize != 0 || !Fits(sector, (ulong)length / SectorSize))
                return Reject(Result.IoError);
            if (length == 0)
                return true;
            bool through = operation == BlockOperation.Write && device.WritesThrough;
            long offset = (long)sector * SectorSize;
            if (operation == BlockOperation.Read)
                _written = (uint)length;
            if (!through && RunNow(device._disk, operation, offset, runs, skip, length))
                return true;
            Clear();
            Operation = operation;
            Offset = offset;
            ForceUnitAccess = through;
            AddRuns(runs, skip, length);
            return Start();
        }

        private static bool IsUnsupported(int errno) => errno == BlockErrno.NotSupported;

        private bool Fits(ulong sector, ulong count)
        {
            ulong sectors = Volatile.Read(ref device._sectors);
            return sector <= sectors && count <= sectors - sector;
        }

        private bool Start() => Run(device._disk) && Next();

        protected override bool Next()
        {
            if (Outcome != 0)
                return Reject(IsUnsupported(Outcome) ? Result.Unsupported : Result.IoError);
            if (_type is not (RequestType.Discard or RequestType.WriteZeroes) || ++_range >= _ranges)
                return true;
            return StartRange();
        }

        private bool GetId(VirtqueueElement element)
        {
            Span<byte> id = stackalloc byte[SerialLength];
            id.Clear();
            string serial = device._disk.Settings.Serial;
            Encoding.ASCII.GetBytes(serial.AsSpan(0, Math.Min(serial.Length, SerialLength)), id);
            _written = (uint)element.Write(0, id[..(int)Math.Min(SerialLength, element.WritableLength - 1)]);
            return true;
        }

        private bool BeginRanges(VirtqueueElement element)
        {
            long length = element.ReadableLength - HeaderSize;
            if (length <= 0 || length % RangeSize != 0 || length / RangeSize > MaximumRanges)
                return Reject(Result.Unsupported);
            _range = 0;
            _ranges = (int)(length / RangeSize);
            return StartRange();
        }

        private bool StartRange()
        {
            const uint unmap = 1;
            _ = Element!.TryRead(HeaderSize + _range * (long)RangeSize, out Range range);
            if ((range.Flags & ~unmap) != 0 || (_type == RequestType.Discard && range.Flags != 0))
                return Reject(Result.Unsupported);
            if (!Fits(range.Sector, range.Sectors))
                return Reject(Result.IoError);
            Clear();
            Operation = _type == RequestType.Discard ? BlockOperation.Discard : BlockOperation.WriteZeroes;
            Offset = (long)range.Sector * SectorSize;
            Length = (long)range.Sectors * SectorSize;
            ForceUnitAccess = _type == RequestType.WriteZeroes && device.WritesThrough;
            MayUnmap = (range.Flags & unmap) != 0;
            return Start();
        }

        private bool Reject(Result result)
        {
            _result = result;
            return true;
        }
    }
}
