using System;
using System.Threading;
using Kvasir.Linux;

namespace Kvasir.Cli.Terminal;

/// <summary>
/// Carries bytes to a descriptor on its own thread, behind a bounded queue. A guest writes a character at a time: after the first one the thread
/// lingers, so that a burst becomes one write and its writers need not wake anybody. When nobody reads any more, the rest is dropped.
/// </summary>
internal sealed class OutputPump : IDisposable
{
    private const int Capacity = 64 * 1024;

    /// <summary>How long bytes may wait for company: too short to notice when typing.</summary>
    private const int LingerMilliseconds = 2;

    /// <summary>A burst of this size is not kept waiting.</summary>
    private const int Burst = 4096;

    // Wiring
    private readonly int _fd;
    private readonly Thread _thread;

    // State
    private readonly object _lock = new();
    private readonly byte[] _queue = new byte[Capacity];
    private int _first;
    private int _count;
    private bool _sleeping;
    private bool _refused;
    private bool _writing;
    private bool _closing;
    private int _error;

    public OutputPump(int fd, string name)
    {
        _fd = fd;
        _thread = new Thread(Run) { IsBackground = true, Name = name };
        _thread.Start();
    }

    /// <summary>Called, from the pump's thread and with no lock held, when there is room after <see cref="Write"/> took fewer bytes than it was given.</summary>
    public Action? RoomAgain { get; set; }

    /// <summary>The error's number (errno(3)) after which everything is dropped; 0 while all is well.</summary>
    public int Error => Volatile.Read(ref _error);

    /// <summary>Queues as many bytes as there is room for. Never blocks on the descriptor.</summary>
    public int Write(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            if (_error != 0 || _closing)
                return bytes.Length;
            int taken = Math.Min(bytes.Length, Capacity - _count);
            int at = (_first + _count) % Capacity;
            int run = Math.Min(taken, Capacity - at);
            bytes[..run].CopyTo(_queue.AsSpan(at));
            bytes[run..taken].CopyTo(_queue);
            int before = _count;
            _count += taken;
            _refused |= taken < bytes.Length;
            if (_sleeping || (before < Burst && _count >= Burst))
            {
                _sleeping = false;
                Monitor.PulseAll(_lock);
            }
            return taken;
        }
    }

    /// <summary>Waits until all that was queued is written, or nobody takes it within the time.</summary>
    /// <returns>Whether it is.</returns>
    public bool Flush(TimeSpan patience)
    {
        long deadline = Environment.TickCount64 + (long)patience.TotalMilliseconds;
        lock (_lock)
        {
            _sleeping = false;
            Monitor.PulseAll(_lock);
            while ((_count > 0 || _writing) && _error == 0)
            {
                long left = deadline - Environment.TickCount64;
                if (left <= 0 || !Monitor.Wait(_lock, (int)left))
                    return _count == 0 && !_writing;
            }
            return true;
        }
    }

    /// <summary>Ends the thread once it has written what is queued. A reader that takes nothing is not waited for: the thread ends with the process.</summary>
    public void Dispose()
    {
        bool flushed = Flush(TimeSpan.FromSeconds(2));
        lock (_lock)
        {
            _closing = true;
            Monitor.PulseAll(_lock);
        }
        if (flushed)
            _thread.Join();
    }

    private void Run()
    {
        byte[] chunk = new byte[Capacity];
        while (true)
        {
            int length;
            bool refused;
            lock (_lock)
            {
                _writing = false;
                Monitor.PulseAll(_lock);
                while (_count == 0 && !_closing)
                {
                    _sleeping = true;
                    Monitor.Wait(_lock);
                }
                _sleeping = false;
                if (_count == 0)
                    return;
                if (_count < Burst && !_closing)
                    Monitor.Wait(_lock, LingerMilliseconds);
                length = Math.Min(_count, Capacity - _first);
                _queue.AsSpan(_first, length).CopyTo(chunk);
                _first = (_first + length) % Capacity;
                _count -= length;
                refused = _refused;
                _refused = false;
                _writing = true;
            }
            if (refused)
                RoomAgain?.Invoke();
            int error = _error != 0 ? 0 : FileDescriptor.Write(_fd, chunk.AsSpan(0, length));
            if (error != 0)
                GiveUp(error);
        }
    }

    private void GiveUp(int error)
    {
        bool refused;
        lock (_lock)
        {
            Volatile.Write(ref _error, error);
            _count = 0;
            refused = _refused;
            _refused = false;
            Monitor.PulseAll(_lock);
        }
        // The guest goes on without a reader.
        if (refused)
            RoomAgain?.Invoke();
    }
}
