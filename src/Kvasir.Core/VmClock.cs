using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Core;

/// <summary>
/// The VM's time: guest nanoseconds that stop while the VM is paused, and timers on them. Every guest-visible counter (TSC, APIC timer,
/// HPET, PM timer, PIT, RTC) derives from it, so that a guest finds them consistent. Timer call-backs run on the clock's own thread,
/// one at a time, with no lock held; they may arm and disarm timers.
/// </summary>
public sealed unsafe class VmClock : IDisposable
{
    /// <summary>The default frequency of the guest's time stamp counter on the software CPU: one tick a nanosecond.</summary>
    public const ulong DefaultTscFrequency = 1_000_000_000;

    // Configuration
    private readonly bool _manual;

    // State
    private readonly Lock _lock = new();
    private readonly PriorityQueue<VmTimer, long> _queue = new();
    private readonly int* _wake;
    private Thread? _thread;
    private long _offset;
    private long _pausedAt;
    private volatile bool _running = true;
    private volatile bool _disposed;

    /// <summary>Makes a clock that starts at 0 and runs with the host's monotonic clock.</summary>
    /// <param name="wallStart">Wall-clock time at guest nanosecond 0; default: now.</param>
    /// <param name="tscFrequency">Ticks a second of the guest's time stamp counter.</param>
    public VmClock(DateTimeOffset? wallStart = null, ulong tscFrequency = DefaultTscFrequency)
        : this(manual: false, wallStart ?? TimeProvider.System.GetUtcNow(), tscFrequency)
    {
    }

    private VmClock(bool manual, DateTimeOffset wallStart, ulong tscFrequency)
    {
        _manual = manual;
        WallStart = wallStart;
        TscFrequency = tscFrequency;
        _wake = (int*)System.Runtime.InteropServices.NativeMemory.AllocZeroed(64);
        _offset = manual ? 0 : HostNanoseconds();
    }

    /// <summary>Makes a clock for tests that stands at 0 until <see cref="Advance"/> moves it.</summary>
    public static VmClock CreateManual(DateTimeOffset? wallStart = null, ulong tscFrequency = DefaultTscFrequency) =>
        new(manual: true, wallStart ?? DateTimeOffset.UnixEpoch, tscFrequency);

    /// <summary>Wall-clock time at guest nanosecond 0.</summary>
    public DateTimeOffset WallStart { get; }

    /// <summary>Ticks a second of the guest's time stamp counter.</summary>
    public ulong TscFrequency { get; }

    /// <summary>Guest nanoseconds since the clock was made, without those in which it was paused.</summary>
    public long Now => _manual || !_running ? Volatile.Read(ref _pausedAt) : HostNanoseconds() - Volatile.Read(ref _offset);

    /// <summary>The wall clock as the guest should see it.</summary>
    public DateTimeOffset WallNow => WallStart.AddTicks(Now / 100);

    /// <summary>What a time stamp counter that started with the clock shows now.</summary>
    public ulong TscNow => ToTicks(Now, TscFrequency);

    public bool Running => _running;

    /// <summary>Ticks of a counter of the given frequency (Hz) in a number of nanoseconds, without overflow.</summary>
    public static ulong ToTicks(long nanoseconds, ulong frequency)
    {
        if (frequency == 1_000_000_000)
            return (ulong)nanoseconds;
        ulong high = Math.BigMul((ulong)nanoseconds, frequency, out ulong low);
        return (ulong)(new UInt128(high, low) / 1_000_000_000u);
    }

    /// <summary>The nanosecond at which a counter of the given frequency (Hz) reaches a number of ticks, rounded up.</summary>
    public static long ToNanoseconds(ulong ticks, ulong frequency)
    {
        if (frequency == 1_000_000_000)
            return ticks > long.MaxValue ? long.MaxValue : (long)ticks;
        ulong high = Math.BigMul(ticks, 1_000_000_000ul, out ulong low);
        UInt128 result = (new UInt128(high, low) + (frequency - 1)) / frequency;
        return result > (UInt128)long.MaxValue ? long.MaxValue : (long)result;
    }

    /// <summary>A timer whose call-back runs on the clock's thread when its deadline has come.</summary>
    public VmTimer CreateTimer(Action callback) => new(this, callback);

    /// <summary>Stops guest time. Timers wait.</summary>
    public void Pause()
    {
        lock (_lock)
        {
            if (!_running)
                return;
            Volatile.Write(ref _pausedAt, Now);
            _running = false;
        }
    }

    /// <summary>Lets guest time go on from where it stopped.</summary>
    public void Resume()
    {
        lock (_lock)
        {
            if (_running)
                return;
            if (!_manual)
                Volatile.Write(ref _offset, HostNanoseconds() - _pausedAt);
            _running = true;
        }
        Signal();
    }

    /// <summary>Moves a manual clock forward, running each timer at its own moment.</summary>
    public void Advance(long nanoseconds)
    {
        if (!_manual)
            throw new InvalidOperationException("only a manual clock can be advanced");
        long end = _pausedAt + nanoseconds;
        while (TryTakeDue(end, out VmTimer? timer, out long due))
        {
            Volatile.Write(ref _pausedAt, Math.Max(_pausedAt, due));
            timer.Fire();
        }
        Volatile.Write(ref _pausedAt, end);
    }

    public void Dispose()
    {
        _disposed = true;
        Thread? thread;
        lock (_lock)
            thread = _thread;
        Signal();
        if (thread is not null && thread != Thread.CurrentThread)
            thread.Join();
    }

    internal void Arm(VmTimer timer, long deadline)
    {
        bool first;
        lock (_lock)
        {
            first = !_queue.TryPeek(out _, out long earliest) || deadline < earliest;
            timer.Deadline = deadline;
            if (timer.Queued)
                _queue.Remove(timer, out _, out _);
            timer.Queued = true;
            _queue.Enqueue(timer, deadline);
            if (!_manual && _thread is null && !_disposed)
            {
                _thread = new Thread(RunTimers) { IsBackground = true, Name = "timers" };
                _thread.Start();
                return;
            }
        }
        if (first)
            Signal();
    }

    internal void Disarm(VmTimer timer)
    {
        lock (_lock)
        {
            timer.Deadline = long.MaxValue;
            if (timer.Queued)
                _queue.Remove(timer, out _, out _);
            timer.Queued = false;
        }
    }

    private static long HostNanoseconds() => Stopwatch.GetTimestamp();

    private void Signal()
    {
        Interlocked.Increment(ref *_wake);
        Futex.Wake(_wake);
    }

    private void RunTimers()
    {
        // Stopwatch counts nanoseconds of CLOCK_MONOTONIC on Linux, the clock of the futex deadline.
        while (!_disposed)
        {
            int seen = Volatile.Read(ref *_wake);
            if (_running && TryTakeDue(Now, out VmTimer? timer, out _))
            {
                timer.Fire();
                continue;
            }
            long hostDeadline = long.MaxValue;
            lock (_lock)
            {
                if (_running && _queue.TryPeek(out _, out long next) && next < long.MaxValue - _offset)
                    hostDeadline = next + _offset;
            }
            if (!_disposed)
                Futex.Wait(_wake, seen, hostDeadline);
        }
    }

    private bool TryTakeDue(long now, out VmTimer timer, out long deadline)
    {
        lock (_lock)
        {
            if (_queue.TryPeek(out timer!, out deadline) && deadline <= now)
            {
                _queue.Dequeue();
                timer.Queued = false;
                timer.Deadline = long.MaxValue;
                return true;
            }
        }
        return false;
    }
}

/// <summary>One timer of a <see cref="VmClock"/>. Its owner guards against a call-back that was under way when it was disarmed.</summary>
public sealed class VmTimer
{
    private readonly VmClock _clock;
    private readonly Action _callback;

    internal VmTimer(VmClock clock, Action callback)
    {
        _clock = clock;
        _callback = callback;
    }

    /// <summary>The guest nanosecond at which it fires; <see cref="long.MaxValue"/> while disarmed.</summary>
    public long Deadline { get; internal set; } = long.MaxValue;

    public bool Armed => Deadline != long.MaxValue;

    internal bool Queued { get; set; }

    /// <summary>Sets the deadline (guest nanoseconds, absolute). A deadline in the past fires at once, on the clock's thread.</summary>
    public void Arm(long deadline) => _clock.Arm(this, deadline);

    public void Disarm() => _clock.Disarm(this);

    internal void Fire() => _callback();
}
