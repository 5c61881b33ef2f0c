using System;
using System.Text;
using System.Threading;
using Kvasir.Devices.Serial;
using Kvasir.Linux;

namespace Kvasir.Cli.Terminal;

/// <summary>
/// Standard input and output behind a serial port. Input is read on a thread of its own; on a terminal it knows the Ctrl-A keys, and goes on
/// looking for them while the guest takes nothing. The end of the input leaves the VM running.
/// </summary>
internal sealed class StdioBackend : ICharacterBackend, IDisposable
{
    /// <summary>How much typing is kept for a guest that does not read.</summary>
    private const int TypeAhead = 64 * 1024;

    // Configuration
    private readonly bool _interactive;

    // Wiring
    private readonly OutputPump _output;
    private readonly EventFd _wake = new();
    private readonly Thread _reader;
    private ICharacterDevice? _device;

    // State of the reader's thread
    private readonly byte[] _pending = new byte[TypeAhead];
    private int _pendingCount;
    private EscapeFilter _filter;

    // State
    private volatile bool _disposed;

    /// <param name="interactive">Standard input is a terminal.</param>
    public StdioBackend(bool interactive)
    {
        _interactive = interactive;
        _output = new OutputPump(FileDescriptor.StandardOutput, "serial-out") { RoomAgain = () => _device?.OutputPossible() };
        _reader = new Thread(Read) { IsBackground = true, Name = "serial-in" };
    }

    /// <summary>What Ctrl-A C opens and Ctrl-A X and H speak to. Set before <see cref="Start"/>.</summary>
    public ConsoleMonitor? Monitor { get; set; }

    /// <summary>Begins to read.</summary>
    public void Start() => _reader.Start();

    public void Attach(ICharacterDevice device) => _device = device;

    public int Write(ReadOnlySpan<byte> bytes) => _output.Write(bytes);

    public void ResumeInput() => _wake.Signal();

    /// <summary>Prints a text of ours between the guest's; a text that finds the queue full is dropped.</summary>
    public void Print(string text) =>
        _output.Write(Encoding.UTF8.GetBytes(_interactive ? text.Replace("\n", "\r\n", StringComparison.Ordinal) : text));

    /// <summary>Writes out what is queued and lets go of the input.</summary>
    public void Dispose()
    {
        if (_disposed)
            return;
        _disposed = true;
        _wake.Signal();
        if (!_reader.ThreadState.HasFlag(ThreadState.Unstarted) && _reader != Thread.CurrentThread)
            _reader.Join();
        _output.Dispose();
        _wake.Dispose();
    }

    private void Read()
    {
        byte[] buffer = new byte[4096];
        bool ended = false;
        while (!_disposed)
        {
            Offer();
            // What a pipe holds it keeps; a terminal is read on, for the keys that are ours.
            bool listen = !ended && (_interactive || _pendingCount == 0);
            (bool input, bool woken) = FileDescriptor.WaitForInput(listen ? FileDescriptor.StandardInput : -1, _wake.Fd);
            if (woken)
                _wake.Clear();
            if (!input || _disposed)
                continue;
            int length = FileDescriptor.Read(FileDescriptor.StandardInput, buffer);
            ended = length == 0;
            if (_interactive)
                Interpret(buffer.AsSpan(0, length));
            else
                Keep(buffer.AsSpan(0, length));
        }
    }

    private void Interpret(ReadOnlySpan<byte> keys)
    {
        foreach (byte typed in keys)
        {
            byte key = typed;
            switch (_filter.Next(ref key))
            {
                case KeyMeaning.Byte when Monitor is { IsOpen: true }:
                    Monitor.Key(key);
                    break;
                case KeyMeaning.Byte:
                    Keep([key]);
                    break;
                case KeyMeaning.Monitor:
                    Monitor?.Toggle();
                    break;
                case KeyMeaning.Quit:
                    Monitor?.Quit();
                    break;
                case KeyMeaning.Help:
                    Monitor?.ShowKeys();
                    break;
                case KeyMeaning.Break:
                    Offer();
                    _device?.ReceiveBreak();
                    break;
                default:
                    break;
            }
        }
    }

    private void Keep(ReadOnlySpan<byte> bytes)
    {
        int taken = Math.Min(bytes.Length, TypeAhead - _pendingCount);
        bytes[..taken].CopyTo(_pending.AsSpan(_pendingCount));
        _pendingCount += taken;
    }

    private void Offer()
    {
        if (_pendingCount == 0 || _device is null)
            return;
        int taken = _device.Receive(_pending.AsSpan(0, _pendingCount));
        _pending.AsSpan(taken, _pendingCount - taken).CopyTo(_pending);
        _pendingCount -= taken;
    }
}
