using System;
using System.Collections.Generic;
using System.Threading;
using System.Threading.Tasks;
using System.Threading.Tasks.Sources;

namespace Kvasir.Block;

/// <summary>
/// A lock that may be held across awaits. Uncontended entry is one atomic operation; waiters are pooled and served in order.
/// Not re-entrant.
/// </summary>
internal sealed class AsyncMutex
{
    private readonly Lock _lock = new();
    private readonly Queue<Waiter> _waiters = new();
    private readonly Stack<Waiter> _pool = new();
    private bool _held;

    /// <summary>Waits for the lock; <see cref="Exit"/> gives it back.</summary>
    public ValueTask EnterAsync()
    {
        lock (_lock)
        {
            if (!_held)
            {
                _held = true;
                return default;
            }
            Waiter waiter = _pool.TryPop(out Waiter? pooled) ? pooled : new Waiter(this);
            _waiters.Enqueue(waiter);
            return waiter.Task;
        }
    }

    /// <summary>Takes the lock if nobody holds it.</summary>
    public bool TryEnter()
    {
        lock (_lock)
        {
            if (_held)
                return false;
            _held = true;
            return true;
        }
    }

    public void Exit()
    {
        Waiter? next;
        lock (_lock)
        {
            if (!_waiters.TryDequeue(out next))
            {
                _held = false;
                return;
            }
        }
        next.Signal();
    }

    private sealed class Waiter(AsyncMutex owner) : IValueTaskSource, IThreadPoolWorkItem
    {
        private ManualResetValueTaskSourceCore<bool> _source;

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
