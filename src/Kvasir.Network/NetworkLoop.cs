using System;
using System.Collections.Concurrent;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;

namespace Kvasir.Network;

/// <summary>What a <see cref="NetworkLoop"/> does between its waits.</summary>
internal interface ILoopWork
{
    /// <summary>Adds the descriptors to wait for.</summary>
    /// <param name="polls">To be added to.</param>
    /// <param name="milliseconds">How long the wait may be; -1: without limit.</param>
    /// <returns>How long it shall be.</returns>
    int Prepare(PollSet polls, int milliseconds);

    /// <summary>Looks at what came.</summary>
    void Process(PollSet polls, bool failed);

    /// <summary>Queues were kicked.</summary>
    /// <param name="queues">One bit for each queue.</param>
    void Kicked(ulong queues);
}

/// <summary>The thread of a back end: waits for descriptors, time and kicks, and lets the back end work. An idle one sleeps.</summary>
#pragma warning disable CA1001 // See Dispose: the bell is left to the garbage collector on purpose.
internal sealed class NetworkLoop : IDisposable
#pragma warning restore CA1001
{
    // Wiring
    private readonly ILoopWork _work;
    private readonly PollSet _polls = new();
    private readonly EventFd _wake = new();
    private readonly Thread _thread;
    private readonly Action<string>? _log;

    // State
    private readonly ConcurrentQueue<Action> _orders = new();
    private EventFd? _bell;
    private long _belled;
    private long _kicked;
    private int _asleep;
    private volatile bool _stopping;
    private bool _started;
    private bool _disposed;

    public NetworkLoop(string name, ILoopWork work, Action<string>? log)
    {
        _work = work;
        _log = log;
        _thread = new Thread(Run) { IsBackground = true, Name = name };
    }

    public void Start()
    {
        _started = true;
        _thread.Start();
    }

    /// <summary>Any thread; costs a system call only where the loop sleeps.</summary>
    public void Kick(int queue)
    {
        Interlocked.Or(ref _kicked, 1L << queue);
        // Interlocked.Or is a full barrier: either the loop sees the bit before it sleeps, or this sees it asleep.
        if (Volatile.Read(ref _asleep) != 0)
            _wake.Signal();
    }

    /// <summary>A descriptor whose signals are kicks of a queue, and of all others that it was asked for. Any thread.</summary>
    public EventFd Bell(int queue)
    {
        Interlocked.Or(ref _belled, 1L << queue);
        if (Volatile.Read(ref _bell) is null)
        {
            EventFd made = new();
            if (Interlocked.CompareExchange(ref _bell, made, null) is null)
                _wake.Signal();
            else
                made.Dispose();
        }
        return _bell!;
    }

    /// <summary>Carries something out on the loop's thread, and waits for it.</summary>
    public T Ask<T>(Func<T> action)
    {
        if (Thread.CurrentThread == _thread || !_started)
            return action();
        TaskCompletionSource<T> done = new(TaskCreationOptions.RunContinuationsAsynchronously);
        _orders.Enqueue(() =>
        {
            try
            {
                done.SetResult(action());
            }
            catch (Exception e)
            {
                done.SetException(e);
            }
        });
        _wake.Signal();
        while (!done.Task.IsCompleted && !_thread.Join(0))
            _ = Task.WaitAny([done.Task], 100);
        return done.Task.IsCompleted ? done.Task.GetAwaiter().GetResult() : throw new NetworkException("the network has ended");
    }

    /// <summary>Ends the thread. The bell stays: who signals it may yet have to name it to be rid of it.</summary>
    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _stopping = true;
        _wake.Signal();
        if (_started && Thread.CurrentThread != _thread)
            _thread.Join();
        _polls.Dispose();
        _wake.Dispose();
    }

    private void Run()
    {
        try
        {
            while (!_stopping)
                Turn();
        }
        catch (Exception e)
        {
            // A defect here must not take the VM with it: its network is dead, and said to be.
            _log?.Invoke($"the network's thread {_thread.Name} has failed: {e}");
        }
    }

    private void Turn()
    {
        _polls.Clear();
        int wake = _polls.Add(_wake.Fd, PollEvents.Input);
        EventFd? bell = Volatile.Read(ref _bell);
        int rung = bell is null ? -1 : _polls.Add(bell.Fd, PollEvents.Input);
        int wait = _work.Prepare(_polls, -1);
        Interlocked.Exchange(ref _asleep, 1);
        if (Volatile.Read(ref _kicked) != 0 || !_orders.IsEmpty || _stopping)
            wait = 0;
        int ready = _polls.Wait(wait);
        Volatile.Write(ref _asleep, 0);
        if (_polls.Returned(wake) != PollEvents.None)
            _wake.Clear();
        if (bell is not null && _polls.Returned(rung) != PollEvents.None)
        {
            bell.Clear();
            Interlocked.Or(ref _kicked, Volatile.Read(ref _belled));
        }
        _work.Process(_polls, ready < 0);
        while (_orders.TryDequeue(out Action? order))
            order();
        ulong kicked = (ulong)Interlocked.Exchange(ref _kicked, 0);
        if (kicked != 0)
            _work.Kicked(kicked);
    }
}
