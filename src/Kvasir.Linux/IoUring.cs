using System;
using System.Runtime.InteropServices;
using System.Threading;

namespace Kvasir.Linux;

/// <summary>
/// One io_uring(7) of the process: requests from any thread, completions handed out by one thread of its own. Where the kernel or
/// a seccomp filter refuses rings, <see cref="Shared"/> is null and callers use threads instead.
/// </summary>
internal sealed unsafe partial class IoUring
{
    private const long SysSetup = 425;
    private const long SysEnter = 426;
    private const uint EnterGetEvents = 1;
    private const uint FeatureSingleMap = 1;
    private const ulong OffsetSqRing = 0;
    private const ulong OffsetCqRing = 0x800_0000;
    private const ulong OffsetEntries = 0x1000_0000;
    private const uint Entries = 256;

    private static readonly Lazy<IoUring?> Instance = new(TryCreate);

    // Wiring
    private readonly int _fd;
    private readonly uint* _sqTail;
    private readonly uint _sqMask;
    private readonly uint* _sqArray;
    private readonly Entry* _sqEntries;
    private readonly uint* _cqHead;
    private readonly uint* _cqTail;
    private readonly uint _cqMask;
    private readonly Completion* _cqEntries;

    // State
    private readonly Lock _submit = new();
    private readonly FileOperation?[] _slots = new FileOperation?[Entries];
    private readonly int[] _freeSlots = new int[Entries];
    private int _freeCount;

    private IoUring(int fd, in Parameters parameters)
    {
        _fd = fd;
        ulong sqLength = parameters.SqArray + (parameters.SqEntries * 4ul);
        ulong cqLength = parameters.CqCqes + (parameters.CqEntries * (ulong)sizeof(Completion));
        bool single = (parameters.Features & FeatureSingleMap) != 0;
        // SAFETY: the kernel laid out both rings in these mappings at the offsets it reported; they live as long as the process.
        byte* sq = MemoryMap.MapFile(fd, OffsetSqRing, single ? Math.Max(sqLength, cqLength) : sqLength, Protection.Read | Protection.Write);
        byte* cq = single ? sq : MemoryMap.MapFile(fd, OffsetCqRing, cqLength, Protection.Read | Protection.Write);
        _sqEntries = (Entry*)MemoryMap.MapFile(fd, OffsetEntries, parameters.SqEntries * (ulong)sizeof(Entry), Protection.Read | Protection.Write);
        _sqTail = (uint*)(sq + parameters.SqTail);
        _sqMask = *(uint*)(sq + parameters.SqRingMask);
        _sqArray = (uint*)(sq + parameters.SqArray);
        _cqHead = (uint*)(cq + parameters.CqHead);
        _cqTail = (uint*)(cq + parameters.CqTail);
        _cqMask = *(uint*)(cq + parameters.CqRingMask);
        _cqEntries = (Completion*)(cq + parameters.CqCqes);
        for (int i = 0; i < _freeSlots.Length; i++)
            _freeSlots[i] = i;
        _freeCount = _freeSlots.Length;
        Thread reaper = new(Reap) { IsBackground = true, Name = "io_uring" };
        reaper.Start();
    }

    /// <summary>The process's ring; null where the kernel gives none.</summary>
    public static IoUring? Shared => Instance.Value;

    /// <summary>Hands a prepared operation to the kernel. False: every slot is taken, use a thread.</summary>
    public bool TrySubmit(FileOperation operation, byte opcode, int fd, long offset, byte* buffer, uint length, uint flags)
    {
        lock (_submit)
        {
            if (_freeCount == 0)
                return false;
            int slot = _freeSlots[--_freeCount];
            _slots[slot] = operation;
            uint tail = *_sqTail;
            uint index = tail & _sqMask;
            // SAFETY: the submission queue has as many entries as there are slots, so the entry is free; the buffer is pinned by
            // the operation until its completion.
            _sqEntries[index] = new Entry { Opcode = opcode, Fd = fd, Offset = (ulong)offset, Address = (ulong)buffer, Length = length, RwFlags = flags, UserData = (ulong)slot };
            _sqArray[index] = index;
            Volatile.Write(ref *_sqTail, tail + 1);
            long submitted;
            do
                submitted = syscall(SysEnter, _fd, 1, 0, 0, null, 0);
            while (submitted < 0 && Marshal.GetLastPInvokeError() is 4 or 11 or 16);
            if (submitted == 1)
                return true;
            *_sqTail = tail;
            _slots[slot] = null;
            _freeSlots[_freeCount++] = slot;
            return false;
        }
    }

    private static IoUring? TryCreate()
    {
        Parameters parameters = default;
        long fd = syscall(SysSetup, Entries, &parameters);
        return fd < 0 ? null : new IoUring((int)fd, parameters);
    }

    private void Reap()
    {
        while (true)
        {
            uint head = *_cqHead;
            uint tail = Volatile.Read(ref *_cqTail);
            if (head == tail)
            {
                // An interrupted wait just looks again.
                _ = syscall(SysEnter, _fd, 0, 1, EnterGetEvents, null, 0);
                continue;
            }
            while (head != tail)
            {
                // SAFETY: entries between head and tail are the kernel's finished completions.
                Completion completion = _cqEntries[head & _cqMask];
                head++;
                Volatile.Write(ref *_cqHead, head);
                FileOperation? operation;
                lock (_submit)
                {
                    int slot = (int)completion.UserData;
                    operation = _slots[slot];
                    _slots[slot] = null;
                    _freeSlots[_freeCount++] = slot;
                }
                operation?.OnKernelDone(completion.Result);
            }
        }
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
