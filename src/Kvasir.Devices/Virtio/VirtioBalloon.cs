using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Runtime.InteropServices;
using System.Threading;
using Kvasir.Core;

namespace Kvasir.Devices.Virtio;

/// <summary>What a guest says of its memory; a negative number: it did not say.</summary>
public readonly record struct BalloonStatistics(
    long SwapIn, long SwapOut, long MajorFaults, long MinorFaults, long Free, long Total, long Available, long Caches)
{
    public static BalloonStatistics Unknown { get; } = new(-1, -1, -1, -1, -1, -1, -1, -1);
}

/// <summary>
/// Virtio memory balloon (virtio 1.2, 5.5): the driver gives pages back to the host, on request (inflate) or because they are free (free page reporting and
/// hinting). Pages that are given back take no memory of the host's until the guest touches them again.
/// </summary>
public sealed class VirtioBalloon : VirtioDevice
{
    /// <summary>Bytes of a balloon page, whatever the guest's pages are.</summary>
    public const int PageSize = 4096;

    private const ushort QueueSize = 128;
    private const int ConfigBytes = 16;
    private const int StatisticSize = 10;
    private const uint HintStop = 0;
    private const uint HintDone = 1;
    private const uint FirstHint = 2;

    [Flags]
    private enum Feature : ulong
    {
        MustTellHost = 1 << 0,
        Statistics = 1 << 1,
        DeflateOnOom = 1 << 2,
        FreePageHint = 1 << 3,
        PagePoison = 1 << 4,
        PageReporting = 1 << 5,
    }

    private enum Config
    {
        Pages = 0,
        Actual = 4,
        HintCommand = 8,
        PoisonValue = 12,
    }

    private enum Role
    {
        Inflate,
        Deflate,
        Statistics,
        FreePages,
        Reporting,
        None,
    }

    private enum Tag : ushort
    {
        SwapIn = 0,
        SwapOut = 1,
        MajorFaults = 2,
        MinorFaults = 3,
        Free = 4,
        Total = 5,
        Available = 6,
        Caches = 7,
    }

    /// <param name="NextHint">Number of the next request for free pages.</param>
    /// <param name="Hinting">Number of the one that the driver answers.</param>
    /// <param name="StatisticsAsked">The driver is to be asked for statistics.</param>
    public sealed record BalloonState(uint NextHint, uint Hinting, bool StatisticsAsked, BalloonStatistics Statistics) : ModelState;

    // State
    private readonly Lock _lock = new();
    private VirtqueueElement? _statisticsBuffer;
    private BalloonStatistics _statistics = BalloonStatistics.Unknown;
    private uint _hint = FirstHint;
    private uint _hinting;
    private bool _statisticsAsked;
    private long _givenBack;
    private int _statisticsTaken;

    public VirtioBalloon(string name, GuestMemory memory)
        : base(VirtioType.Balloon, name, memory, [QueueSize, QueueSize, QueueSize, QueueSize, QueueSize], ConfigBytes)
    {
    }

    protected override ulong DeviceFeatures =>
        (ulong)(Feature.Statistics | Feature.DeflateOnOom | Feature.FreePageHint | Feature.PagePoison | Feature.PageReporting);

    /// <summary>Bytes that the driver has put into the balloon.</summary>
    public ulong Actual => (ulong)ReadConfig((int)Config.Actual, AccessSize.Dword) * PageSize;

    /// <summary>Bytes that were given back to the host so far, in all ways, pages that came back counted again.</summary>
    public long GivenBack => Interlocked.Read(ref _givenBack);

    /// <summary>What the driver said last.</summary>
    public BalloonStatistics Statistics
    {
        get
        {
            lock (_lock)
                return _statistics;
        }
    }

    /// <summary>Asks the driver for a balloon of a size in bytes. It comes to it as it can.</summary>
    public void SetTarget(ulong bytes)
    {
        Span<byte> pages = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(pages, (uint)Math.Min(bytes / PageSize, uint.MaxValue));
        SetConfig((int)Config.Pages, pages);
        ConfigChanged();
    }

    /// <summary>How often the driver has said something.</summary>
    public int StatisticsTaken => Volatile.Read(ref _statisticsTaken);

    /// <summary>Asks the driver for statistics, which come after.</summary>
    public void AskStatistics()
    {
        lock (_lock)
            _statisticsAsked = true;
        WakeWorker();
    }

    /// <summary>Has the driver name all pages that it has free now, once; what it names goes back to the host.</summary>
    /// <returns>False where the driver does not do that.</returns>
    public bool AskFreePages()
    {
        if (!IsRunning || !Has((ulong)Feature.FreePageHint))
            return false;
        uint command;
        lock (_lock)
        {
            command = _hint;
            _hint = _hint == uint.MaxValue ? FirstHint : _hint + 1;
        }
        SetCommand(command);
        return true;
    }

    protected override bool WritingConfig(int offset, ReadOnlySpan<byte> bytes) => offset is >= (int)Config.Actual and < (int)Config.HintCommand or >= (int)Config.PoisonValue;

    protected override void Process(Virtqueue queue)
    {
        switch (RoleOf(queue.Index))
        {
            case Role.Inflate:
                while (queue.Pop() is { } element)
                {
                    Inflate(element);
                    queue.Push(element, 0);
                }
                queue.Notify();
                break;
            case Role.Deflate:
                // The pages come back by being touched.
                while (queue.Pop() is { } element)
                    queue.Push(element, 0);
                queue.Notify();
                break;
            case Role.Statistics:
                TakeStatistics(queue);
                break;
            case Role.FreePages:
                TakeFreePages(queue);
                break;
            case Role.Reporting:
                while (queue.Pop() is { } element)
                {
                    GiveBack(element);
                    queue.Push(element, 0);
                }
                queue.Notify();
                break;
            default:
                break;
        }
    }

    protected override void ProcessWake()
    {
        VirtqueueElement? buffer = null;
        lock (_lock)
        {
            if (_statisticsAsked)
                buffer = _statisticsBuffer;
            if (buffer is not null)
            {
                _statisticsBuffer = null;
                _statisticsAsked = false;
            }
        }
        // Its return is the request (5.5.6.4).
        buffer?.Queue.Complete(buffer, 0);
    }

    private protected override void CollectHeld(List<VirtqueueElement> held)
    {
        lock (_lock)
        {
            if (_statisticsBuffer is not null)
                held.Add(_statisticsBuffer);
        }
    }

    protected override ModelState SaveModel()
    {
        lock (_lock)
            return new BalloonState(_hint, _hinting, _statisticsAsked, _statistics);
    }

    protected override string? CheckModel(ModelState? model)
    {
        if (model is not BalloonState state)
            return "it is not a balloon's";
        return state.NextHint < FirstHint ? $"there is no request {state.NextHint} for free pages" : null;
    }

    protected override void RestoreModel(ModelState? model)
    {
        BalloonState state = (BalloonState)model!;
        // What was asked of the guest still is, after its next reset too.
        Span<byte> target = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(target, ReadConfig((int)Config.Pages, AccessSize.Dword));
        KeepConfig((int)Config.Pages, target);
        lock (_lock)
        {
            _hint = state.NextHint;
            _hinting = state.Hinting;
            _statisticsAsked = state.StatisticsAsked;
            _statistics = state.Statistics;
        }
    }

    protected override void Stopped()
    {
        lock (_lock)
        {
            _statisticsBuffer?.Queue.Forget(_statisticsBuffer);
            _statisticsBuffer = null;
            _statistics = BalloonStatistics.Unknown;
            _hinting = 0;
        }
        SetConfig((int)Config.HintCommand, [0, 0, 0, 0]);
    }

    /// <summary>A queue's number depends on which features before it were taken: a driver counts only those that there are.</summary>
    private Role RoleOf(int index)
    {
        if (index < 2)
            return (Role)index;
        ReadOnlySpan<(Feature Feature, Role Role)> optional =
            [(Feature.Statistics, Role.Statistics), (Feature.FreePageHint, Role.FreePages), (Feature.PageReporting, Role.Reporting)];
        int at = 2;
        foreach ((Feature feature, Role role) in optional)
        {
            if (Has((ulong)feature) && at++ == index)
                return role;
        }
        return Role.None;
    }

    /// <summary>Page numbers in 32 bits each. Neighbours go back in one piece: a host call for each page would cost more than the page is worth.</summary>
    private void Inflate(VirtqueueElement element)
    {
        Span<byte> numbers = stackalloc byte[1024];
        ulong first = 0;
        ulong count = 0;
        for (long at = 0; at < element.ReadableLength; at += numbers.Length)
        {
            int length = element.Read(at, numbers);
            foreach (uint page in MemoryMarshal.Cast<byte, uint>(numbers[..length]))
            {
                if (count > 0 && page == first + count)
                {
                    count++;
                }
                else if (count > 0 && page + 1 == first)
                {
                    first = page;
                    count++;
                }
                else
                {
                    Discard(first * PageSize, count * PageSize);
                    first = page;
                    count = 1;
                }
            }
        }
        Discard(first * PageSize, count * PageSize);
    }

    /// <summary>Gives back what the writable part names; what lies outside RAM is ignored.</summary>
    private void GiveBack(VirtqueueElement element)
    {
        // Pages that the driver fills with a pattern must keep it.
        if (Has((ulong)Feature.PagePoison) && ReadConfig((int)Config.PoisonValue, AccessSize.Dword) != 0)
            return;
        foreach (ref readonly GuestRun run in element.Writable)
            Interlocked.Add(ref _givenBack, run.Discard());
    }

    private void Discard(ulong address, ulong length)
    {
        while (length > 0 && Memory.TryGetRun(new Gpa(address), length, write: true, out GuestRun run))
        {
            Interlocked.Add(ref _givenBack, run.Discard());
            address += (ulong)run.Length;
            length -= (ulong)run.Length;
        }
    }

    private void TakeFreePages(Virtqueue queue)
    {
        while (queue.Pop() is { } element)
        {
            if (element.ReadableLength >= 4)
            {
                element.TryRead(0, out uint command);
                bool stops = command == HintStop;
                lock (_lock)
                    _hinting = command;
                queue.Push(element, 0);
                // Nobody keeps the named pages from the driver any longer than this.
                if (stops)
                    SetCommand(HintDone);
                continue;
            }
            uint hinting;
            lock (_lock)
                hinting = _hinting;
            if (hinting >= FirstHint && hinting == ReadConfig((int)Config.HintCommand, AccessSize.Dword))
                GiveBack(element);
            queue.Push(element, 0);
        }
        queue.Notify();
    }

    private void TakeStatistics(Virtqueue queue)
    {
        while (queue.Pop() is { } element)
        {
            BalloonStatistics statistics = Parse(element);
            VirtqueueElement? surplus;
            lock (_lock)
            {
                _statistics = statistics;
                _statisticsTaken++;
                surplus = _statisticsBuffer;
                _statisticsBuffer = element;
            }
            // There is one such buffer; a second one is answered at once.
            if (surplus is not null)
                queue.Push(surplus, 0);
        }
        queue.Notify();
        WakeWorker();
    }

    private static BalloonStatistics Parse(VirtqueueElement element)
    {
        BalloonStatistics statistics = BalloonStatistics.Unknown;
        Span<byte> entry = stackalloc byte[StatisticSize];
        const int most = 64;
        for (int i = 0; i < most && element.Read(i * StatisticSize, entry) == StatisticSize; i++)
        {
            long value = (long)Math.Min(BinaryPrimitives.ReadUInt64LittleEndian(entry[2..]), long.MaxValue);
            statistics = (Tag)BinaryPrimitives.ReadUInt16LittleEndian(entry) switch
            {
                Tag.SwapIn => statistics with { SwapIn = value },
                Tag.SwapOut => statistics with { SwapOut = value },
                Tag.MajorFaults => statistics with { MajorFaults = value },
                Tag.MinorFaults => statistics with { MinorFaults = value },
                Tag.Free => statistics with { Free = value },
                Tag.Total => statistics with { Total = value },
                Tag.Available => statistics with { Available = value },
                Tag.Caches => statistics with { Caches = value },
                _ => statistics,
            };
        }
        return statistics;
    }

    private void SetCommand(uint command)
    {
        Span<byte> bytes = stackalloc byte[4];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, command);
        SetConfig((int)Config.HintCommand, bytes);
        ConfigChanged();
    }
}
