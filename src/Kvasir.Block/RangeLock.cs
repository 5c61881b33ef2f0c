using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using System.Threading.Tasks.Sources;

namespace Kvasir.Block;

/// <summary>
/// Keeps overlapping requests apart: each holder owns a range of bytes, others that touch it wait, in their order: whoever wants everything gets it
/// although others come and go. So a holder must not ask for a second range. Waiters are pooled.
/// </summary>
internal sealed class RangeLock
{
    private readonly Lock _lock = new();
    private readonly List<Entry> _held = [];
    private readonly List<Waiter> _waiters = [];
    private readonly Stack<Waiter> _pool = new();

    /// <summary>Waits until no other holder's range overlaps [start, end), then holds it until <see cref="Release"/>.</summary>
    public ValueTask AcquireAsync(long start, long end)
    {
        lock (_lock)
        {
            if (!Overlaps(start, end) && !IsAwaited(start, end, _waiters.Count))
            {
                _held.Add(new Entry(start, end));
                return default;
            }
            Waiter waiter = _pool.TryPop(out Waiter? pooled) ? pooled : new Waiter(this);
            waiter.Start = start;
            waiter.End = end;
            _waiters.Add(waiter);
            return waiter.Task;
        }
    }

    /// <summary>Holds the range if nobody else has part of it.</summary>
    public bool TryAcquire(long start, long end)
    {
        lock (_lock)
        {
            if (Overlaps(start, end) || IsAwaited(start, end, _waiters.Count))
                return false;
            _held.Add(new Entry(start, end));
            return true;
        }
    }

    public void Release(long start, long end)
    {
        lock (_lock)
        {
            _held.Remove(new Entry(start, end));
            for (int i = 0; i < _waiters.Count;)
            {
                Waiter waiter = _waiters[i];
                if (Overlaps(waiter.Start, waiter.End) || IsAwaited(waiter.Start, waiter.End, i))
                {
                    i++;
                    continue;
                }
                _waiters.RemoveAt(i);
                _held.Add(new Entry(waiter.Start, waiter.End));
                waiter.Signal();
            }
        }
    }

    /// <summary>Whether one of the first waiters wants a part of a range.</summary>
    private bool IsAwaited(long start, long end, int waiters)
    {
        for (int i = 0; i < waiters; i++)
        {
            if (start < _waiters[i].End && _waiters[i].Start < end)
                return true;
        }
        return false;
    }

    private bool Overlaps(long start, long end)
    {
        foreach (Entry entry in _held)
        {
            if (start < entry.End && entry.Start < end)
                return true;
        }
        return false;
    }

    private readonly record struct Entry(long Start, long End);

    private sealed class Waiter(RangeLock owner) : IValueTaskSource, IThreadPoolWorkItem
    {
        private ManualResetValueTaskSourceCore<bool> _source;

        public long Start { get; set; }

        public long End { get; set; }

        public ValueTask Task => new(this, _source.Version);

        /// <summary>Lets the waiter go on, in a pool thread: whoever gives the lock back does not run its next holder's work.</summary>
        public void Signal() => ThreadPool.UnsafeQueueUserWorkItem(this, preferLocal: true);

        void IThreadPoolWorkItem.Execute() => _source.SetResult(true);

        public void GetResult(short token)
        {
            _ = _source.GetResult(token);
            _source.Reset();
            lock (owner._lock)
                owner._pool.Push(this);
        }

        public ValueTaskSourceStatus GetStatus(short token) => _source.GetStatus(token);

        public void OnCompleted(Action<object?> continuation, object? state, short token, ValueTaskSourceOnCompletedFlags flags) =>
            _source.OnCompleted(continuation, state, token, flags);
    }
}
