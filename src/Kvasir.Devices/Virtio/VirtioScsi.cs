using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Block;
using Kvasir.Core;
using Kvasir.Devices.Storage;

namespace Kvasir.Devices.Virtio;

/// <summary>Virtio SCSI host device (virtio 1.2, 5.6). Logical units come and go while the guest runs.</summary>
public sealed partial class VirtioScsi : VirtioDiskDevice
{
    public const int MaximumTarget = 255;

    private const ushort QueueSize = 256;
    private const int ControlQueue = 0;
    private const int EventQueue = 1;
    private const int FirstRequestQueue = 2;
    private const int ConfigBytes = 36;
    private const int CdbSize = 32;
    private const int SenseSize = 96;

    /// <summary>LUN, tag, attributes, CDB.</summary>
    private const int RequestHeader = 19 + CdbSize;
    private const int ResponseHeader = 12 + SenseSize;

    [Flags]
    private enum Feature : ulong
    {
        HotPlug = 1 << 1,
        Change = 1 << 2,
    }

    private enum Config
    {
        QueueCount = 0,
        SegmentMaximum = 4,
        MaximumSectors = 8,
        CommandsPerUnit = 12,
        EventSize = 16,
        SenseLength = 20,
        CdbLength = 24,
        MaximumChannel = 28,
        MaximumTarget = 30,
        MaximumUnit = 32,
    }

    private enum Response : byte
    {
        Ok = 0,
        Aborted = 2,
        BadTarget = 3,
        Reset = 4,
        FunctionSucceeded = 10,
        FunctionRejected = 11,
        IncorrectUnit = 12,
    }

    private enum EventKind : uint
    {
        None = 0,
        TransportReset = 1,
        ParameterChange = 3,
        Missed = 0x8000_0000,
    }

    private enum ResetReason : uint
    {
        Rescan = 1,
        Removed = 2,
    }

    [StructLayout(LayoutKind.Sequential, Pack = 1, Size = 16)]
    private readonly record struct Event(EventKind Kind, ulong Unit, uint Reason);

    [StructLayout(LayoutKind.Sequential, Pack = 1, Size = 12)]
    private readonly record struct ResponseFields(uint SenseLength, uint Residual, ushort Qualifier, ScsiStatus Status, Response Response);

    // State
    private readonly Lock _units = new();
    private readonly Queue<Event> _events = new();
    private volatile ScsiUnit[] _attached = [];
    private bool _missed;

    /// <summary>Requests whose unit left while the VM was paused: answered when it goes on. Also the lock for the list.</summary>
    private readonly List<Request> _orphans = [];

    /// <summary>Counts resets: a request from before one has no ring any more to be answered in.</summary>
    private int _resets;

    /// <param name="queues">Request queues.</param>
    public VirtioScsi(string name, GuestMemory memory, int queues = 1)
        : base(VirtioType.Scsi, name, memory, Sizes(queues), ConfigBytes, workers: 1)
    {
        Span<byte> config = stackalloc byte[ConfigBytes];
        config.Clear();
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.QueueCount..], queues);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.SegmentMaximum..], QueueSize - 2);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.MaximumSectors..], 0xffff);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.CommandsPerUnit..], QueueSize / 2);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.EventSize..], 16);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.SenseLength..], SenseSize);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.CdbLength..], CdbSize);
        BinaryPrimitives.WriteUInt16LittleEndian(config[(int)Config.MaximumTarget..], MaximumTarget);
        BinaryPrimitives.WriteInt32LittleEndian(config[(int)Config.MaximumUnit..], 16383);
        SetConfig(0, config);
    }

    public IReadOnlyList<ScsiUnit> Units => _attached;

    protected override ulong DeviceFeatures => (ulong)(Feature.HotPlug | Feature.Change);

    /// <summary>The lowest target without a unit, or -1.</summary>
    public int FreeTarget
    {
        get
        {
            ScsiUnit[] units = _attached;
            for (int target = 0; target <= MaximumTarget; target++)
            {
                if (!Array.Exists(units, unit => unit.Target == target))
                    return target;
            }
            return -1;
        }
    }

    /// <summary>Attaches a unit and tells a driver that runs.</summary>
    /// <exception cref="ArgumentException">There is one at its address.</exception>
    public void Attach(ScsiUnit unit)
    {
        lock (_units)
        {
            if (Find(unit.Target, unit.Unit) is not null)
                throw new ArgumentException($"target {unit.Target}, unit {unit.Unit} is taken");
            _attached = [.. _attached, unit];
        }
        unit.Disk.Backend.Resized += () => Post(EventKind.ParameterChange, unit, 0x2a | 0x09 << 8);
        if (Has((ulong)Feature.HotPlug))
            Post(EventKind.TransportReset, unit, (uint)ResetReason.Rescan);
    }

    /// <summary>
    /// Takes a unit away, and comes back when no request uses its disk any more. Requests that are under way go on to their end; those that wait for the VM to
    /// go on are answered, at once or, where it is paused, when it does.
    /// </summary>
    public void Detach(ScsiUnit unit)
    {
        lock (_units)
            _attached = Array.FindAll(_attached, other => other != unit);
        // A request that found the unit before is seen here, or sees that the unit is gone (Request.Begin).
        Interlocked.MemoryBarrier();
        SpinWait wait = default;
        do
        {
            foreach (DiskRequest kept in unit.Disk.TakeKept())
            {
                ((Request)kept).Orphan();
                lock (_orphans)
                    _orphans.Add((Request)kept);
                // A device that is paused is woken again when it goes on.
                WakeWorker();
            }
            wait.SpinOnce();
        }
        while (Array.Exists(_requests, request => request.Task.IsOf(unit, null)));
        if (Has((ulong)Feature.HotPlug))
            Post(EventKind.TransportReset, unit, (uint)ResetReason.Removed);
    }

    protected override void Process(Virtqueue queue)
    {
        switch (queue.Index)
        {
            case ControlQueue:
                while (queue.Pop() is { } element)
                    Control(queue, element);
                queue.Notify();
                break;
            case EventQueue:
                SendEvents();
                break;
            default:
                ProcessRequests(queue);
                break;
        }
    }

    protected override bool ProcessesAgain(Virtqueue queue) => queue.Index != EventQueue;

    protected override void ProcessWake()
    {
        SendEvents();
        AnswerOrphans();
        foreach (ScsiUnit unit in _attached)
            RetryKept(unit.Disk);
    }

    protected override void Stopped()
    {
        lock (_events)
        {
            _events.Clear();
            _missed = false;
        }
        _resets++;
        foreach (ScsiUnit unit in _attached)
        {
            DropKept(unit.Disk);
            unit.Reset();
        }
    }

    /// <summary>The caller holds the device.</summary>
    private void AnswerOrphans()
    {
        Request[] orphans;
        lock (_orphans)
        {
            orphans = [.. _orphans];
            _orphans.Clear();
        }
        foreach (Request orphan in orphans)
        {
            // A reset came between.
            if (orphan.Resets != _resets)
            {
                orphan.Drop();
                continue;
            }
            HoldAgain();
            orphan.Finish();
        }
    }

    private static ushort[] Sizes(int queues)
    {
        ushort[] sizes = new ushort[FirstRequestQueue + queues];
        Array.Fill(sizes, QueueSize);
        return sizes;
    }

    /// <summary>
    /// Single level addressing (SAM-5, 4.7): 1, target, then the unit as REPORT LUNS has it, in peripheral form below 256. Linux takes the two bytes for the
    /// number as they are.
    /// </summary>
    private static ulong Address(ScsiUnit unit)
    {
        Span<byte> bytes = stackalloc byte[8];
        bytes.Clear();
        bytes[0] = 1;
        bytes[1] = (byte)unit.Target;
        bytes[2] = unit.Unit < 256 ? (byte)0 : (byte)(0x40 | unit.Unit >> 8);
        bytes[3] = (byte)unit.Unit;
        return BinaryPrimitives.ReadUInt64LittleEndian(bytes);
    }

    private ScsiUnit? Find(int target, int unit)
    {
        foreach (ScsiUnit candidate in _attached)
        {
            if (candidate.Target == target && candidate.Unit == unit)
                return candidate;
        }
        return null;
    }

    private ScsiUnit? Find(ReadOnlySpan<byte> address, out bool targetExists)
    {
        targetExists = false;
        if (address[0] != 1)
            return null;
        foreach (ScsiUnit candidate in _attached)
            targetExists |= candidate.Target == address[1];
        return Find(address[1], (address[2] & 0x3f) << 8 | address[3]);
    }

    private void Post(EventKind kind, ScsiUnit unit, uint reason)
    {
        if (!IsRunning)
            return;
        lock (_events)
        {
            if (_events.Count < MostEvents)
                _events.Enqueue(new Event(kind, Address(unit), reason));
            else
                _missed = true;
        }
        WakeWorker();
    }

    private void SendEvents()
    {
        Virtqueue queue = Queues[EventQueue];
        Span<byte> bytes = stackalloc byte[16];
        lock (_events)
        {
            while (_events.Count > 0 && queue.Pop() is { } element)
            {
                Event item = _events.Dequeue();
                if (_missed)
                    item = item with { Kind = item.Kind | EventKind.Missed };
                _missed = false;
                BinaryPrimitives.WriteUInt32LittleEndian(bytes, (uint)item.Kind);
                BinaryPrimitives.WriteUInt64LittleEndian(bytes[4..], item.Unit);
                BinaryPrimitives.WriteUInt32LittleEndian(bytes[12..], item.Reason);
                queue.Push(element, (uint)element.Write(0, bytes));
            }
        }
        queue.Notify();
    }

    private protected override void CollectHeld(List<VirtqueueElement> held)
    {
        // Those of units that left are told so when they are taken again.
        lock (_orphans)
            held.AddRange(_orphans.FindAll(orphan => orphan.Resets == _resets).ConvertAll(orphan => orphan.Buffer));
        foreach (ScsiUnit unit in _attached)
            CollectKept(unit.Disk, held);
    }

    private protected override VirtioDiskRequest NewRequest() => Track(new Request(this));

    /// <summary>One SCSI command.</summary>
    private sealed class Request(VirtioScsi device) : VirtioDiskRequest(device)
    {
        private readonly byte[] _cdb = new byte[CdbSize];
        private readonly byte[] _reply = new byte[ScsiUnit.LargestReply];
        private ScsiUnit? _unit;
        private ScsiSense _sense;
        private Response _response;
        private long _moved;
        private long _expected;
        private int _range;
        private int _ranges;

        /// <summary>What task management may ask of it.</summary>
        public TaskState Task { get; } = new();

        public override bool TryAgain() => Task.IsAborted || (Run(_unit!.Disk) && Next());

        /// <summary>How many resets the device had seen when it began.</summary>
        public int Resets { get; private set; }

        /// <summary>Its unit went away while it waited: it uses the disk no more, and <see cref="VirtioDiskRequest.Finish"/> or Drop is all that is left for it.</summary>
        public void Orphan()
        {
            _moved = 0;
            _sense = ScsiSense.NoSuchUnit;
            Left();
        }

        protected override bool Begin(VirtqueueElement element)
        {
            _sense = ScsiSense.None;
            _response = Response.Ok;
            _moved = 0;
            _ranges = 0;
            Resets = device._resets;
            if (element.ReadableLength < RequestHeader || element.WritableLength < ResponseHeader)
                return Break("a SCSI request that is too short");
            Span<byte> address = stackalloc byte[8];
            element.Read(0, address);
            element.Read(19, _cdb);
            _expected = Math.Max(element.ReadableLength - RequestHeader, element.WritableLength - ResponseHeader);
            _unit = device.Find(address, out bool targetExists);
            if (_unit is null)
                return Missing(targetExists);
            element.TryRead(8, out ulong tag);
            Task.Begin(_unit, tag);
            Interlocked.MemoryBarrier();
            // It went away meanwhile, and its disk is closed as soon as no task is its.
            if (Array.IndexOf(device._attached, _unit) < 0)
                return Missing(targetExists: false);
            if (_cdb[0] == (byte)ScsiOperation.ReportLuns)
                return ReportLuns(_unit.Target);
            ScsiSense attention = _unit.TakeAttention((ScsiOperation)_cdb[0]);
            if (attention.IsError)
                return Check(attention);
            if (_cdb[0] == (byte)ScsiOperation.Unmap)
                return BeginUnmap();
            if (!_unit.TryMedium(_cdb, out ScsiMediumCommand command, out ScsiSense sense))
            {
                Array.Clear(_reply);
                int length = _unit.Answer(_cdb, _reply, out sense);
                return sense.IsError ? Check(sense) : Reply(length);
            }
            return sense.IsError ? Check(sense) : Begin(command);
        }

        protected override uint WriteAnswer(VirtqueueElement element)
        {
            _unit = null;
            if (Task.IsAborted)
            {
                _response = Task.ByReset ? Response.Reset : Response.Aborted;
                _sense = ScsiSense.None;
                _moved = 0;
            }
            Span<byte> response = stackalloc byte[ResponseHeader];
            response.Clear();
            int senseLength = 0;
            if (_sense.IsError)
            {
                senseLength = ScsiUnit.WriteSense(_sense, response[12..]);
                response[10] = (byte)ScsiStatus.CheckCondition;
            }
            BinaryPrimitives.WriteInt32LittleEndian(response, senseLength);
            BinaryPrimitives.WriteUInt32LittleEndian(response[4..], (uint)Math.Max(0, _expected - _moved));
            response[11] = (byte)_response;
            element.Write(0, response);
            long data = element.WritableLength > ResponseHeader ? _moved : 0;
            return (uint)(ResponseHeader + data);
        }

        protected override void Left()
        {
            _unit = null;
            Task.End();
        }

        /// <summary>There is no such unit: INQUIRY and REPORT LUNS of a target that exists are answered all the same (SPC-4, 6.4.2).</summary>
        private bool Missing(bool targetExists)
        {
            if (!targetExists)
            {
                _response = Response.BadTarget;
                return true;
            }
            Span<byte> address = stackalloc byte[2];
            Element!.Read(0, address);
            if (_cdb[0] == (byte)ScsiOperation.ReportLuns)
                return ReportLuns(address[1]);
            if (_cdb[0] != (byte)ScsiOperation.Inquiry)
                return Check(ScsiSense.NoSuchUnit);
            const byte notConnected = 0x7f;
            Array.Clear(_reply);
            _reply[0] = notConnected;
            _reply[4] = 31;
            return Reply(36);
        }

        private bool ReportLuns(int target)
        {
            Array.Clear(_reply);
            int at = 8;
            foreach (ScsiUnit unit in device._attached)
            {
                if (unit.Target != target || at + 8 > _reply.Length)
                    continue;
                BinaryPrimitives.WriteUInt16BigEndian(_reply.AsSpan(at), (ushort)(unit.Unit < 256 ? unit.Unit : 0x4000 | unit.Unit));
                at += 8;
            }
            BinaryPrimitives.WriteInt32BigEndian(_reply, at - 8);
            return Reply(at);
        }

        private bool Reply(int length)
        {
            long room = Math.Min(ScsiUnit.Allocated(_cdb), Element!.WritableLength - ResponseHeader);
            length = (int)Math.Min(length, room);
            _moved = Element.Write(ResponseHeader, _reply.AsSpan(0, length));
            return true;
        }

        private bool Begin(ScsiMediumCommand command)
        {
            Clear();
            Operation = command.Operation;
            Offset = command.Offset;
            Length = command.Length;
            ForceUnitAccess = command.ForceUnitAccess;
            MayUnmap = command.Unmap;
            VirtqueueElement element = Element!;
            bool transfers = command.Operation is BlockOperation.Read or BlockOperation.Write;
            ReadOnlySpan<GuestRun> runs = default;
            int skip = 0;
            switch (command.Operation)
            {
                case BlockOperation.Read:
                    if (command.Length > element.WritableLength - ResponseHeader)
                        return Check(ScsiSense.InvalidField);
                    runs = element.Writable;
                    skip = ResponseHeader;
                    break;
                case BlockOperation.Write:
                    if (command.Length > element.ReadableLength - RequestHeader)
                        return Check(ScsiSense.InvalidField);
                    runs = element.Readable;
                    skip = RequestHeader;
                    break;
                case BlockOperation.WriteZeroes when !IsZeroBlock():
                    return Check(ScsiSense.InvalidParameter);
                default:
                    break;
            }
            if (transfers && command.Length == 0)
                return true;
            _moved = transfers ? command.Length : _expected;
            Disk disk = _unit!.Disk;
            if (!transfers)
                return Run(disk) && Next();
            bool through = command.Operation == BlockOperation.Write && command.ForceUnitAccess;
            if (!through && RunNow(disk, command.Operation, command.Offset, runs, skip, command.Length))
                return Next();
            AddRuns(runs, skip, command.Length);
            return Run(disk) && Next();
        }

        /// <summary>WRITE SAME with anything but zeros is not offered; without a data-out buffer it means zeros.</summary>
        private bool IsZeroBlock()
        {
            long length = Math.Min(Element!.ReadableLength - RequestHeader, _unit!.BlockSize);
            for (long done = 0; done < length;)
            {
                Span<byte> part = _reply.AsSpan(0, (int)Math.Min(_reply.Length, length - done));
                done += Element.Read(RequestHeader + done, part);
                if (part.ContainsAnyExcept((byte)0))
                    return false;
            }
            return true;
        }

        private bool BeginUnmap()
        {
            if (_unit!.Disk.IsReadOnly)
                return Check(ScsiSense.WriteProtected);
            if (!_unit.Disk.Backend.CanDiscard)
                return Check(ScsiSense.InvalidOperation);
            Span<byte> header = stackalloc byte[8];
            long given = Math.Min(Element!.ReadableLength - RequestHeader, BinaryPrimitives.ReadUInt16BigEndian(_cdb.AsSpan(7)));
            if (given < 8 || Element.Read(RequestHeader, header) < 8)
                return given == 0 || Check(ScsiSense.InvalidParameter);
            int bytes = BinaryPrimitives.ReadUInt16BigEndian(header[2..]);
            if (bytes > given - 8 || bytes % 16 != 0 || bytes / 16 > ScsiUnit.MaximumUnmapRanges)
                return Check(ScsiSense.InvalidParameter);
            _moved = _expected;
            _range = -1;
            _ranges = bytes / 16;
            return NextRange();
        }

        private bool NextRange()
        {
            Span<byte> range = stackalloc byte[16];
            while (++_range < _ranges)
            {
                Element!.Read(RequestHeader + 8 + _range * 16L, range);
                ulong block = BinaryPrimitives.ReadUInt64BigEndian(range);
                uint count = BinaryPrimitives.ReadUInt32BigEndian(range[8..]);
                if (block > _unit!.Blocks || count > _unit.Blocks - block)
                    return Check(ScsiSense.OutOfRange);
                if (count == 0)
                    continue;
                Clear();
                // Zeroes and not a mere discard: the unit promises that unmapped blocks read as zeros.
                Operation = BlockOperation.WriteZeroes;
                MayUnmap = true;
                Offset = (long)block * _unit.BlockSize;
                Length = (long)count * _unit.BlockSize;
                if (!Run(_unit.Disk))
                    return false;
                if (Outcome != 0)
                    return Next();
            }
            return true;
        }

        protected override bool Next()
        {
            if (Task.IsAborted)
                return true;
            if (Outcome == 0)
                return _ranges == 0 || NextRange();
            _moved = 0;
            return Check(Operation == BlockOperation.Read ? ScsiSense.ReadError : Outcome == BlockErrno.NoSpace ? ScsiSense.SpaceAllocationFailed : ScsiSense.WriteError);
        }

        private bool Check(ScsiSense sense)
        {
            _sense = sense;
            return true;
        }
    }
}
