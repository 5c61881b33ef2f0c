using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;

namespace Kvasir.Block.Nbd;

/// <summary>What a server offers.</summary>
/// <param name="Name">Name that clients ask for; empty: the default export.</param>
/// <param name="Node">The disk; stays the caller's.</param>
/// <param name="ReadOnly">Refuse writes.</param>
public sealed record NbdExport(string Name, BlockNode Node, bool ReadOnly)
{
    /// <summary>A text for people, as clients may show it.</summary>
    public string? Description { get; init; }
}

/// <summary>
/// An NBD server: fixed newstyle, structured replies, block status, write zeroes, trim, TLS, any number of connections. Clients are
/// hostile input: what breaks the protocol ends its connection and nothing else.
/// </summary>
public sealed class NbdServer : IAsyncDisposable
{
    private readonly Socket _listener;
    private readonly TlsCredentials? _credentials;
    private readonly Dictionary<string, NbdExport> _exports = new(StringComparer.Ordinal);
    private readonly CancellationTokenSource _stop = new();
    private readonly Lock _lock = new();
    private readonly HashSet<Task> _connections = [];
    private readonly string? _socketPath;
    private Task _accept = Task.CompletedTask;

    private NbdServer(Socket listener, string? socketPath, IEnumerable<NbdExport> exports, TlsCredentials? credentials)
    {
        _listener = listener;
        _socketPath = socketPath;
        _credentials = credentials;
        foreach (NbdExport export in exports)
            _exports.Add(export.Name, export);
    }

    /// <summary>Most connections at a time; 0: no limit.</summary>
    public int MostConnections { get; init; }

    /// <summary>Ends when the last client has left (for a server that serves once).</summary>
    public bool StopWhenUnused { get; init; }

    /// <summary>Where the server listens.</summary>
    public EndPoint Address => _listener.LocalEndPoint!;

    /// <summary>Ends when the server has stopped listening.</summary>
    public Task Completion => _accept;

    /// <summary>Listens on a UNIX socket, or on TCP.</summary>
    /// <exception cref="BlockException">The address cannot be had.</exception>
    public static NbdServer Start(EndPoint address, IEnumerable<NbdExport> exports, TlsCredentials? credentials = null, int mostConnections = 0, bool stopWhenUnused = false)
    {
        bool unix = address is UnixDomainSocketEndPoint;
        Socket listener = unix
            ? new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified)
            : new Socket(address.AddressFamily, SocketType.Stream, ProtocolType.Tcp);
        try
        {
            listener.Bind(address);
            listener.Listen(16);
        }
        catch (SocketException error)
        {
            listener.Dispose();
            throw new BlockException($"Failed to listen on {address}: {error.Message}", error);
        }
        NbdServer server = new(listener, unix ? address.ToString() : null, exports, credentials) { MostConnections = mostConnections, StopWhenUnused = stopWhenUnused };
        server._accept = Task.Run(server.AcceptAsync);
        return server;
    }

    internal NbdExport? Find(string name) => _exports.TryGetValue(name, out NbdExport? export) ? export : null;

    internal IEnumerable<NbdExport> Exports => _exports.Values;

    internal bool RequiresTls => _credentials is not null;

    internal async ValueTask<Stream> SecureAsync(Stream stream, CancellationToken cancellation)
    {
        SslStream secure = new(stream);
        await secure.AuthenticateAsServerAsync(_credentials!.ServerOptions(), cancellation).ConfigureAwait(false);
        return secure;
    }

    public async ValueTask DisposeAsync()
    {
        await _stop.CancelAsync().ConfigureAwait(false);
        _listener.Dispose();
        await _accept.ConfigureAwait(false);
        Task[] open;
        lock (_lock)
            open = [.. _connections];
        await Task.WhenAll(open).ConfigureAwait(false);
        if (_socketPath is not null)
            File.Delete(_socketPath);
        _stop.Dispose();
    }

    private async Task AcceptAsync()
    {
        while (!_stop.IsCancellationRequested)
        {
            Socket socket;
            try
            {
                socket = await _listener.AcceptAsync(_stop.Token).ConfigureAwait(false);
            }
            catch (Exception error) when (error is OperationCanceledException or SocketException or ObjectDisposedException)
            {
                return;
            }
            lock (_lock)
            {
                if (MostConnections > 0 && _connections.Count >= MostConnections)
                {
                    socket.Dispose();
                    continue;
                }
                if (socket.AddressFamily != AddressFamily.Unix)
                    socket.NoDelay = true;
                Task connection = Task.Run(() => ServeAsync(socket));
                _connections.Add(connection);
                _ = connection.ContinueWith(Forget, CancellationToken.None, TaskContinuationOptions.ExecuteSynchronously, TaskScheduler.Default);
            }
        }
    }

    private void Forget(Task connection)
    {
        lock (_lock)
        {
            _connections.Remove(connection);
            if (StopWhenUnused && _connections.Count == 0)
                _listener.Close();
        }
    }

    private async Task ServeAsync(Socket socket)
    {
        Stream stream = new NetworkStream(socket, ownsSocket: true);
        try
        {
            using NbdConnection connection = new(this, stream);
            await connection.RunAsync(_stop.Token).ConfigureAwait(false);
        }
        catch (Exception error) when (error is IOException or OperationCanceledException or BlockException or System.Security.Authentication.AuthenticationException or ObjectDisposedException)
        {
            // A client that breaks off or breaks the protocol has told all there is to tell by doing so.
        }
        finally
        {
            await stream.DisposeAsync().ConfigureAwait(false);
        }
    }
}
