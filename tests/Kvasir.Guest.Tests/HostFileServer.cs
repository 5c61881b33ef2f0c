using System;
using System.Net;
using System.Net.Sockets;
using System.Threading;

namespace Kvasir.Guest.Tests;

/// <summary>Gives each who connects the same bytes.</summary>
internal sealed class HostFileServer : IDisposable
{
    private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
    private readonly byte[] _data;

    public HostFileServer(byte[] data)
    {
        _data = data;
        _listener.Start();
        new Thread(Serve) { IsBackground = true }.Start();
    }

    public int Port => ((IPEndPoint)_listener.LocalEndpoint).Port;

    public bool WasUsed { get; private set; }

    public void Dispose() => _listener.Dispose();

    private void Serve()
    {
        try
        {
            while (true)
            {
                using Socket client = _listener.AcceptSocket();
                WasUsed = true;
                client.Send(_data);
                client.Shutdown(SocketShutdown.Send);
                client.ReceiveTimeout = 600_000;
                while (client.Receive(new byte[1]) > 0)
                {
                }
            }
        }
        catch (Exception e) when (e is SocketException or ObjectDisposedException)
        {
            // The test is over.
        }
    }
}
