using System;
using System.Runtime.InteropServices;
using System.Threading;

namespace Kvasir.Linux;

/// <summary>
/// One io_uring(7) of the process and its thread. Requests come from any thread into a queue; the ring's thread alone speaks to the kernel,
/// hands over all that are queued with one call, and takes what is finished from the same call. Finished requests go on in pool
/// threads: as many as keep up, so that a busy disk wakes nobody for each request. Where the kernel or a seccomp filter refuses rings,
/// <see cref="Shared"/> is null and callers use threads instead.
/// </summary>
#pragma warning disable CA1001 // The ring, and what it owns, lives as long as the process.
internal sealed unsafe partial class IoUring : IThreadPoolWorkItem
#pragma warning restore CA1001
{
    private const long SysSetup = 425;
    private const long SysEnter = 426;
    private const uint EnterGetEvents = 1;
    private const uint FeatureSingleMap = 1;
    private const uint SetupSingleIssuer = 1 << 12;
    private const uint SetupDeferTaskRun = 1 << 13;
    private const ulong OffsetSqRing = 0;
    private const ulong OffsetCqRing = 0x800_0000;
    private const ulong OffsetEntries = 0x1000_0000;
    private const byte OpPollAdd = 6;
    private const uint PollIn = 1;
    private const uint Entries = 256;
    private const ulong WakeTag = ulong.MaxValue;

    private static readonly Lazy<IoUring?> Instance = new(TryCreate);

    // Wiring
    private readonly EventFd _wake = new();
    private readonly ManualResetEventSlim _ready = new();
    private int _fd = -1;
    private uint* _sqTail;
    private uint _sqMask;
    private uint* _sqArray;
    private Entry* _sqEntries;
    private uint* _cqHead;
    private uint* _cqTail;
    private uint _cqMask;
    private Completion* _cqEntries;

    // State of the ring's thread
    private readonly FileOperation?[] _slots = new FileOperation?[Entries];
    private readonly int[] _freeSlots = new int[Entries];
    private int _freeCount;
    private bool _wakeArmed;

    // Shared
    private readonly Lock _queueLock = new();
    private readonly Lock _doneLock = new();
    private FileQueue _queue;
    private FileQueue _done;
    private bool _sleeping;
    private int _scheduled;

    private IoUring()
    {
        Thread thread = new(Run) { IsBackground = true, Name = "io_uring" };
        thread.Start();
        _ready.Wait();
    }

    /// <summary>The process's ring; null where the kernel gives none.</summary>
    public static IoUring? Shared => Instance.Value;

    /// <summary>Queues a prepared operation.</summary>
    public void Submit(FileOperation operation)
    {
        bool wake;
        lock (_queueLock)
        {
            _queue.Add(operation);
            wake = _sleeping;
            _sleeping = false;
        }
        if (wake)
            _wake.Signal();
    }

    /// <summary>Finished requests go on, on a pool thread.</summary>
    void IThreadPoolWorkItem.Execute()
    {
        // From here on another worker may be asked for; this one takes what is there.
        Volatile.Write(ref _scheduled, 0);
        while (true)
        {
            FileOperation? operation;
            bool more;
            lock (_doneLock)
            {
                operation = _done.Take();
                more = !_done.IsEmpty;
            }
            if (operation is null)
                return;
            if (more)
                Schedule();
            operation.OnKernelDone();
        }
    }

    private static IoUring? TryCreate()
    {
        IoUring ring = new();
        return ring._fd >= 0 ? ring : null;
    }

    private void Schedule()
    {
        if (Volatile.Read(ref _scheduled) == 0 && Interlocked.Exchange(ref _scheduled, 1) == 0)
            ThreadPool.UnsafeQueueUserWorkItem(this, preferLocal: false);
    }

    private bool Open()
    {
        // The ring belongs to the thread that makes it: only then may the kernel run completions where they are waited for.
        Parameters parameters = new() { Flags = SetupSingleIssuer | SetupDeferTaskRun };
        long fd = syscall(SysSetup, Entries, &parameters);
        if (fd < 0)
        {
            parameters = default;
            fd = syscall(SysSetup, Entries, &parameters);
        }
        if (fd < 0)
            return false;
        ulong sqLength = parameters.SqArray + (parameters.SqEntries * 4ul);
        ulong cqLength = parameters.CqCqes + (parameters.CqEntries * (ulong)sizeof(Completion));
        bool single = (parameters.Features & FeatureSingleMap) != 0;
        // SAFETY: the kernel laid out both rings in these mappings at the offsets it reported; they live as long as the process.
        byte* sq = MemoryMap.MapFile((int)fd, OffsetSqRing, single ? Math.Max(sqLength, cqLength) : sqLength, Protection.Read | Protection.Write);
        byte* cq = single ? sq : MemoryMap.MapFile((int)fd, OffsetCqRing, cqLength, Protection.Read | Protection.Write);
        _sqEntries = (Entry*)MemoryMap.MapFile((int)fd, OffsetEntries, parameters.SqEntries * (ulong)sizeof(Entry), Protection.Read | Protection.Write);
        _sqTail = (uint*)(sq + parameters.SqTail);
        _sqMask = *(uint*)(sq + parameters.SqRingMask);
        _sqArray = (uint*)(sq + parameters.SqArray);
        _cqHead = (uint*)(cq + parameters.CqHead);
        _cqTail = (uint*)(cq + parameters.CqTail);
        _cqMask = *(uint*)(cq + parameters.CqRingMask);
        _cqEntries = (Completion*)(cq + parameters.CqCqes);
        // One entry is kept for the wake-up.
        for (int i = 0; i < _freeSlots.Length - 1; i++)
            _freeSlots[i] = i;
        _freeCount = _freeSlots.Length - 1;
        _fd = (int)fd;
        return true;
    }

    private void Run()
    {
        bool open = Open();
        _ready.Set();
        if (!open)
            return;
        uint unsubmitted = 0;
        while (true)
        {
            unsubmitted += Fill();
            bool idle = unsubmitted == 0;
            if (idle)
            {
                if (!_wakeArmed)
                {
                    Push(new Entry { Opcode = OpPollAdd, Fd = _wake.Fd, RwFlags = PollIn, UserData = WakeTag });
                    _wakeArmed = true;
                    unsubmitted++;
                }
                lock (_queueLock)
                    _sleeping = _queue.IsEmpty;
            }
            bool wait = idle && Volatile.Read(ref _sleeping);
            long submitted = syscall(SysEnter, _fd, unsubmitted, wait ? 1u : 0u, EnterGetEvents, null, 0);
            if (submitted > 0)
                unsubmitted -= (uint)submitted;
            // An interrupted or overfull call just looks again.
            Reap();
        }
    }

    /// <summary>Moves queued requests into the submission ring; the result says how many.</summary>
    private uint Fill()
    {
        uint filled = 0;
        while (_freeCount > 0)
        {
            FileOperation? operation;
            lock (_queueLock)
                operation = _queue.Take();
            if (operation is null)
                return filled;
            int slot = _freeSlots[--_freeCount];
            _slots[slot] = operation;
            operation.Describe(out byte opcode, out int fd, out long offset, out byte* buffer, out uint length, out uint flags);
            Push(new Entry { Opcode = opcode, Fd = fd, Offset = (ulong)offset, Address = (ulong)buffer, Length = length, RwFlags = flags, UserData = (ulong)slot });
            filled++;
        }
        return filled;
    }

    private void Push(in Entry entry)
    {
        // SAFETY: there are as many entries as slots and the wake-up together can use, so the next one is free; a request's buffer is
        // pinned by it until its completion.
        uint tail = *_sqTail;
        _sqEntries[tail & _sqMask] = entry;
        _sqArray[tail & _sqMask] = tail & _sqMask;
        Volatile.Write(ref *_sqTail, tail + 1);
    }

    private void Reap()
    {
        uint head = *_cqHead;
        uint tail = Volatile.Read(ref *_cqTail);
        bool any = false;
        while (head != tail)
        {
            // SAFETY: entries between head and tail are the kernel's finished completions.
            Completion completion = _cqEntries[head & _cqMask];
            head++;
            Volatile.Write(ref *_cqHead, head);
            if (completion.UserData == WakeTag)
            {
                _wakeArmed = false;
                _wake.Clear();
                continue;
            }
            int slot = (int)completion.UserData;
            FileOperation operation = _slots[slot]!;
            _slots[slot] = null;
            _freeSlots[_freeCount++] = slot;
            operation.SetKernelResult(completion.Result);
            lock (_doneLock)
                _done.Add(operation);
            any = true;
        }
        if (any)
            Schedule();
    }

    [StructLayout(LayoutKind.Sequential, Size = 64)]
    private struct Entry
    {
        public byte Opcode;
        public byte Flags;
        public ushort Priority;
        public int Fd;
        public ulong Offset;
        public ulong Address;
        public uint Length;
        public uint RwFlags;
        public ulong UserData;
    }

    /// <summary>struct io_uring_cqe, which only the kernel writes.</summary>
    private readonly struct Completion(ulong userData, int result, uint flags)
    {
        public readonly ulong UserData = userData;
        public readonly int Result = result;
        public readonly uint Flags = flags;
    }

    /// <summary>struct io_uring_params.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 120)]
    private struct Parameters
    {
        public uint SqEntries, CqEntries, Flags, ThreadCpu, ThreadIdle, Features, WqFd, Reserved0, Reserved1, Reserved2;
        public uint SqHead, SqTail, SqRingMask, SqRingEntries, SqFlags, SqDropped, SqArray, SqReserved;
        public ulong SqUserAddress;
        public uint CqHead, CqTail, CqRingMask, CqRingEntries, CqOverflow, CqCqes, CqFlags, CqReserved;
        public ulong CqUserAddress;
    }

    [LibraryImport("libc", SetLastError = true)]
    private static partial long syscall(long number, uint entries, Parameters* parameters);

    [LibraryImport("libc", SetLastError = true)]
    private static partial long syscall(long number, int fd, uint submit, uint wait, uint flags, void* signals, nuint size);
}
