using System;
using System.IO;
using System.Net.Sockets;
using System.Threading;
using Kvasir.Devices.Serial;
using Kvasir.Linux;

namespace Kvasir.Cli.Terminal;

/// <summary>
/// A listening Unix socket behind a serial port. One client at a time, who may come and go; the guest sees on its modem lines whether one is there, and
/// what it writes to nobody is dropped.
/// </summary>
internal sealed class UnixSocketBackend : ICharacterBackend, IDisposable
{
    // Configuration
    private readonly string _path;

    // Wiring
    private readonly Socket _listener;
    private readonly Thread _thread;
    private ICharacterDevice? _device;

    // State
    private readonly object _lock = new();
    private readonly AutoResetEvent _room = new(false);
    private Socket? _client;
    private OutputPump? _output;
    private volatile bool _disposed;

    /// <exception cref="CommandException">The path cannot be listened on.</exception>
    public UnixSocketBackend(string path)
    {
        _path = path;
        _listener = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            UnixDomainSocketEndPoint address = new(path);
            RemoveStale(path, address);
            _listener.Bind(address);
            _listener.Listen(1);
        }
        catch (Exception e) when (e is SocketException or IOException or UnauthorizedAccessException or ArgumentException)
        {
            _listener.Dispose();
            throw new CommandException(ExitCode.HostTrouble, $"--serial: cannot listen on {path}: {e.Message}", e);
        }
        _thread = new Thread(Serve) { IsBackground = true, Name = "serial-unix" };
    }

    /// <summary>Begins to take clients.</summary>
    public void Start()
    {
        _device?.SetConnected(false);
        _thread.Start();
    }

    public void Attach(ICharacterDevice device) => _device = device;

    public int Write(ReadOnlySpan<byte> bytes)
    {
        OutputPump? output = Volatile.Read(ref _output);
        return output is null ? bytes.Length : output.Write(bytes);
    }

    public void ResumeInput() => _room.Set();

    public void Dispose()
    {
        lock (_lock)
        {
            if (_disposed)
                return;
            _disposed = true;
        }
        Volatile.Read(ref _output)?.Flush(TimeSpan.FromSeconds(2));
        // Closing wakes the thread out of Accept or Receive.
        _listener.Dispose();
        lock (_lock)
        {
            if (_client is not null)
                HangUp(_client);
        }
        _room.Set();
        if (!_thread.ThreadState.HasFlag(ThreadState.Unstarted))
            _thread.Join();
        _room.Dispose();
        File.Delete(_path);
    }

    /// <summary>Removes a socket that nobody listens on; a VM that was killed leaves one.</summary>
    private static void RemoveStale(string path, UnixDomainSocketEndPoint address)
    {
        if (!FileStatus.IsSocket(path))
            return;
        using Socket probe = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(address);
        }
        catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionRefused)
        {
            File.Delete(path);
            return;
        }
        throw new IOException("another process listens there");
    }

    private void Serve()
    {
        while (!_disposed)
        {
            Socket client;
            try
            {
                client = _listener.Accept();
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                if (_disposed)
                    return;
                continue;
            }
            lock (_lock)
            {
                if (_disposed)
                {
                    client.Dispose();
                    return;
                }
                _client = client;
            }
            Talk(client);
            lock (_lock)
                _client = null;
            client.Dispose();
        }
    }

    private void Talk(Socket client)
    {
        // The descriptor must outlive the pump's thread, which its own writes could otherwise carry into another file.
        using OutputPump output = new((int)client.Handle, "serial-out") { RoomAgain = () => _device?.OutputPossible() };
        Volatile.Write(ref _output, output);
        _device?.SetConnected(true);
        Receive(client);
        Volatile.Write(ref _output, null);
        _device?.SetConnected(false);
        HangUp(client);
        // A guest that waited for this client's room need not wait any more.
        _device?.OutputPossible();
    }

    /// <summary>Ends the talk in both directions; the descriptor stays.</summary>
    private static void HangUp(Socket client)
    {
        try
        {
            client.Shutdown(SocketShutdown.Both);
        }
        catch (SocketException)
        {
            // The client has left already.
        }
    }

    private void Receive(Socket client)
    {
        byte[] buffer = new byte[4096];
        try
        {
            while (true)
            {
                int length = client.Receive(buffer);
                if (length == 0)
                    return;
                ReadOnlySpan<byte> rest = buffer.AsSpan(0, length);
                while (rest.Length > 0 && !_disposed)
                {
                    int taken = _device?.Receive(rest) ?? rest.Length;
                    rest = rest[taken..];
                    if (rest.Length > 0)
                        _room.WaitOne();
                }
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // The client is gone; the next one is waited for.
        }
    }
}
