using System;
using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Devices.Virtio;

/// <summary>
/// The thread that works on some of a device's queues. It begins with the first work and sleeps while there is none. Signals are bits, so that
/// what is told twice is done once. Where a bell was asked for, an accelerator may signal that in place of the guest's write, past the vCPU's thread.
/// </summary>
#pragma warning disable CA1001 // See Dispose: the semaphore and the bell are left to the garbage collector on purpose.
internal sealed class QueueWorker : IDisposable
#pragma warning restore CA1001
{
    private readonly string _name;
    private readonly Action<ulong> _work;
    private readonly SemaphoreSlim _wake = new(0);
    private readonly Lock _starting = new();
    private Thread? _thread;
    private EventFd? _bell;
    private ulong _belled;
    private long _bits;
    private volatile bool _started;
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
        if (!_started)
            Start();
        Wake();
    }

    /// <summary>A descriptor whose signals ask for work as <see cref="Signal"/> does. One serves all that is asked for, and looks at all of it.</summary>
    /// <returns>Null where the thread sleeps elsewhere already.</returns>
    public EventFd? Bell(ulong bits)
    {
        lock (_starting)
        {
            if (_bell is null && _started)
                return null;
            _bell ??= new EventFd(blocks: true);
            Interlocked.Or(ref _belled, bits);
        }
        Start();
        return _bell;
    }

    /// <summary>Ends the thread and waits for it. Semaphore and bell stay: a late signal may still reach them.</summary>
    public void Dispose()
    {
        if (_ended)
            return;
        _ended = true;
        Wake();
        if (_thread is { } thread && thread != Thread.CurrentThread)
            thread.Join();
    }

    private void Start()
    {
        lock (_starting)
        {
            if (_started)
                return;
            _thread = new Thread(Run) { IsBackground = true, Name = _name };
            _thread.Start();
            _started = true;
        }
    }

    private void Wake()
    {
        if (_bell is { } bell)
            bell.Signal();
        else
            _wake.Release();
    }

    private void Run()
    {
        while (true)
        {
            if (_bell is { } bell)
                bell.Wait();
            else
                _wake.Wait();
            if (_ended)
                return;
            ulong bits = (ulong)Interlocked.Exchange(ref _bits, 0) | Volatile.Read(ref _belled);
            if (bits != 0)
                _work(bits);
        }
    }
}
