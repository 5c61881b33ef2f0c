using System;
using System.Collections.Generic;
using System.IO;
using System.Text;
using System.Threading;

namespace Kvasir.Devices.Serial;

/// <summary>A back end that swallows everything and says nothing.</summary>
public sealed class NullBackend : ICharacterBackend
{
    public void Attach(ICharacterDevice device)
    {
    }

    public int Write(ReadOnlySpan<byte> bytes) => bytes.Length;

    public void ResumeInput()
    {
    }
}

/// <summary>A back end in memory: what the guest wrote can be read, and input can be queued.</summary>
public sealed class MemoryBackend : ICharacterBackend
{
    // Configuration
    private readonly int _capacity;

    // Wiring
    private ICharacterDevice? _device;

    // State
    private readonly Lock _lock = new();
    private readonly List<byte> _output = [];
    private readonly Queue<byte> _input = new();
    private bool _refused;

    /// <param name="capacity">Bytes it takes before it is full, until <see cref="Take"/>.</param>
    public MemoryBackend(int capacity = int.MaxValue)
    {
        _capacity = capacity;
    }

    /// <summary>Bytes of input that the device has not taken yet.</summary>
    public int PendingInput
    {
        get
        {
            lock (_lock)
                return _input.Count;
        }
    }

    /// <summary>What the guest wrote and nobody took yet, one character a byte.</summary>
    public string Text
    {
        get
        {
            lock (_lock)
                return Encoding.Latin1.GetString([.. _output]);
        }
    }

    public void Attach(ICharacterDevice device) => _device = device;

    public int Write(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            int taken = Math.Min(bytes.Length, _capacity - _output.Count);
            _output.AddRange(bytes[..taken]);
            _refused |= taken < bytes.Length;
            return taken;
        }
    }

    public void ResumeInput() => Push();

    /// <summary>Takes out what the guest wrote; a full back end has room again.</summary>
    public byte[] Take()
    {
        byte[] bytes;
        bool refused;
        lock (_lock)
        {
            bytes = [.. _output];
            _output.Clear();
            refused = _refused;
            _refused = false;
        }
        if (refused)
            _device?.OutputPossible();
        return bytes;
    }

    /// <summary>Queues input for the guest.</summary>
    public void Send(ReadOnlySpan<byte> bytes)
    {
        lock (_lock)
        {
            foreach (byte b in bytes)
                _input.Enqueue(b);
        }
        Push();
    }

    /// <summary>Queues text for the guest, one byte a character.</summary>
    public void Send(string text) => Send(Encoding.Latin1.GetBytes(text));

    private void Push()
    {
        while (true)
        {
            byte next;
            lock (_lock)
            {
                if (!_input.TryDequeue(out next))
                    return;
            }
            if (_device is not null && _device.Receive([next]) == 1)
                continue;
            lock (_lock)
            {
                // Back to the front, in order.
                byte[] rest = [.. _input];
                _input.Clear();
                _input.Enqueue(next);
                foreach (byte b in rest)
                    _input.Enqueue(b);
            }
            return;
        }
    }
}

/// <summary>
/// A back end that writes to a stream on its own thread, behind a bounded queue: the guest waits (its transmitter stays busy) when the
/// stream is slower than it. After a write error the rest is dropped, and <see cref="Failure"/> says why.
/// </summary>
public sealed class StreamBackend : ICharacterBackend, IDisposable
{
    private const int QueueSize = 64 * 1024;

    // Wiring
    private readonly Stream _stream;
    private readonly Thread _thread;
    private ICharacterDevice? _device;

    // State
    private readonly Lock _lock = new();
    private readonly AutoResetEvent _wake = new(false);
    private readonly byte[] _queue = new byte[QueueSize];
    private int _first;
    private int _count;
    private bool _refused;
    private bool _disposed;
    private volatile IOException? _failure;

    /// <param name="stream">Written to, flushed when the queue runs empty, and closed by <see cref="Dispose"/>.</param>
    public StreamBackend(Stream stream)
    {
        _stream = stream;
        _thread = new Thread(Run) { IsBackground = true, Name = "serial-out" };
        _thread.Start();
    }

    /// <summary>Why bytes are being dropped; null while all is well.</summary>
    public IOException? Failure => _failure;

    /// <summary>Makes a back end that writes a new file.</summary>
    /// <exception cref="IOException">It cannot be created.</exception>
    /// <exception cref="UnauthorizedAccessException">It may not be created.</exception>
    public static StreamBackend CreateFile(string path) =>
        new(new FileStream(path, FileMode.Create, FileAccess.Write, FileShare.ReadWrite, bufferSize: 0));

    public void Attach(ICharacterDevice device) => _device = device;

    public int Write(ReadOnlySpan<byte> bytes)
    {
        int taken;
        lock (_lock)
        {
            taken = Math.Min(bytes.Length, QueueSize - _count);
            int at = (_first + _count) % QueueSize;
            int run = Math.Min(taken, QueueSize - at);
            bytes[..run].CopyTo(_queue.AsSpan(at));
            bytes[run..taken].CopyTo(_queue);
            _count += taken;
            _refused |= taken < bytes.Length;
        }
        if (taken > 0)
            _wake.Set();
        return taken;
    }

    public void ResumeInput()
    {
    }

    /// <summary>Writes what is queued and closes the stream.</summary>
    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
        }
        _wake.Set();
        _thread.Join();
        _wake.Dispose();
    }

    private void Run()
    {
        byte[] chunk = new byte[QueueSize];
        while (true)
        {
            int length;
            bool refused;
            bool ends;
            lock (_lock)
            {
                length = Math.Min(_count, QueueSize - _first);
                _queue.AsSpan(_first, length).CopyTo(chunk);
                _first = (_first + length) % QueueSize;
                _count -= length;
                refused = _refused;
                _refused = false;
                ends = _disposed;
            }
            if (refused)
                _device?.OutputPossible();
            if (length > 0)
                WriteOut(chunk.AsSpan(0, length));
            else if (ends)
                break;
            else
                _wake.WaitOne();
        }
        try
        {
            _stream.Dispose();
        }
        catch (IOException e)
        {
            _failure ??= e;
        }
    }

    private void WriteOut(ReadOnlySpan<byte> bytes)
    {
        if (_failure is not null)
            return;
        try
        {
            _stream.Write(bytes);
            _stream.Flush();
        }
        catch (IOException e)
        {
            _failure = e;
        }
    }
}
