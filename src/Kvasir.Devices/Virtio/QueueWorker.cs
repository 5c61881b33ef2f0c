using System;
using System.Threading;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// The thread that works on some of a device's queues. It begins with the first work and sleeps while there is none. Signals are bits, so that
/// what is told twice is done once.
/// </summary>
#pragma warning disable CA1001 // See Dispose: the semaphore is left to the garbage collector on purpose.
internal sealed class QueueWorker : IDisposable
#pragma warning restore CA1001
{
    private readonly string _name;
    private readonly Action<ulong> _work;
    private readonly SemaphoreSlim _wake = new(0);
    private Thread? _thread;
    private long _bits;
    private int _started;
    private volatile bool _ended;

    /// <param name="name">Of the thread.</param>
    /// <param name="work">Given the bits that were signalled; must not throw.</param>
    public QueueWorker(string name, Action<ulong> work)
    {
        _name = name;
        _work = work;
    }

    /// <summary>Asks for work. Any thread; never waits.</summary>
    public void Signal(ulong bits)
    {
        if (_ended || Interlocked.Or(ref _bits, (long)bits) != 0)
            return;
        if (Volatile.Read(ref _started) == 0 && Interlocked.Exchange(ref _started, 1) == 0)
        {
            _thread = new Thread(Run) { IsBackground = true, Name = _name };
            _thread.Start();
        }
        _wake.Release();
    }

    /// <summary>Ends the thread and waits for it. The semaphore stays: it holds nothing of the host's, and a late signal may still reach it.</summary>
    public void Dispose()
    {
        if (_ended)
            return;
        _ended = true;
        _wake.Release();
        if (_thread is { } thread && thread != Thread.CurrentThread)
            thread.Join();
    }

    private void Run()
    {
        while (true)
        {
            _wake.Wait();
            if (_ended)
                return;
            ulong bits = (ulong)Interlocked.Exchange(ref _bits, 0);
            if (bits != 0)
                _work(bits);
        }
    }
}
