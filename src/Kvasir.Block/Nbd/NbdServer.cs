using System;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Security;
using System.Net.Sockets;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Linux;
using Microsoft.Win32.SafeHandles;

namespace Kvasir.Block.Nbd;

/// <summary>What a server offers.</summary>
/// <param name="Name">Name that clients ask for; empty: the default export.</param>
/// <param name="Node">The disk; stays the caller's.</param>
/// <param name="ReadOnly">Refuse writes.</param>
public sealed record NbdExport(string Name, BlockNode Node, bool ReadOnly)
{
    /// <summary>A text for people, as clients may show it.</summary>
    public string? Description { get; init; }

    /// <summary>Kinds of block status that are offered beside base:allocation.</summary>
    public IReadOnlyList<NbdContext> Contexts { get; init; } = [];

    /// <summary>Where the export's first byte lies in what <see cref="Contexts"/> tell of.</summary>
    public long ContextOffset { get; init; }
}

/// <summary>
/// An NBD server: fixed newstyle, structured replies, block status, write zeroes, trim, TLS, any number of connections. Clients are
/// hostile input: what breaks the protocol ends its connection and nothing else.
/// </summary>
public sealed class NbdServer : IAsyncDisposable
{
    private static readonly TimeSpan AcceptPause = TimeSpan.FromMilliseconds(100);

    private readonly Socket _listener;
    private readonly TlsCredentials? _credentials;
    private readonly Dictionary<string, NbdExport> _exports = new(StringComparer.Ordinal);
    private readonly CancellationTokenSource _stop = new();
    private readonly Lock _lock = new();
    private readonly HashSet<Task> _connections = [];
    private readonly SemaphoreSlim _places;
    private readonly string? _socketPath;
    private Task _accept = Task.CompletedTask;
    private volatile bool _unused;

    private NbdServer(Socket listener, string? socketPath, IEnumerable<NbdExport> exports, TlsCredentials? credentials, int mostConnections)
    {
        MostConnections = mostConnections;
        _places = new SemaphoreSlim(mostConnections > 0 ? mostConnections : int.MaxValue);
        _listener = listener;
        // Whole, as the process may be in another folder by the end.
        _socketPath = socketPath is null ? null : Path.GetFullPath(socketPath);
        _credentials = credentials;
        foreach (NbdExport export in exports)
            _exports.Add(export.Name, export);
    }

    /// <summary>Most connections at a time, others wait for their turn; 0: no limit.</summary>
    public int MostConnections { get; }

    /// <summary>How long a client may take to ask for an export: one that never does must not keep others waiting.</summary>
    public TimeSpan NegotiationLimit { get; set; } = TimeSpan.FromSeconds(30);

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
            Bind(listener, address);
            listener.Listen(16);
        }
        catch (SocketException error)
        {
            listener.Dispose();
            throw new BlockException($"Failed to listen on {address}: {error.Message}", error);
        }
        NbdServer server = new(listener, unix ? address.ToString() : null, exports, credentials, mostConnections) { StopWhenUnused = stopWhenUnused };
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
        _places.Dispose();
    }

    private static void Bind(Socket listener, EndPoint address)
    {
        try
        {
            listener.Bind(address);
        }
        catch (SocketException error) when (error.SocketErrorCode == SocketError.AddressAlreadyInUse && address is UnixDomainSocketEndPoint && IsLeftOver(address))
        {
            File.Delete(address.ToString()!);
            listener.Bind(address);
        }
    }

    /// <summary>Whether a socket is one that a killed server left behind: it is a socket, and nobody listens.</summary>
    private static bool IsLeftOver(EndPoint address)
    {
        using SafeFileHandle? place = NativeFile.Open(address.ToString()!, OpenFlags.PathOnly, 0, out _);
        if (place is null || NativeFile.Kind(place) != FileKind.Socket)
            return false;
        using Socket probe = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        try
        {
            probe.Connect(address);
            return false;
        }
        catch (SocketException error)
        {
            return error.SocketErrorCode == SocketError.ConnectionRefused;
        }
    }

    private async Task AcceptAsync()
    {
        while (!_stop.IsCancellationRequested)
        {
            Socket socket;
            try
            {
                await _places.WaitAsync(_stop.Token).ConfigureAwait(false);
                socket = await _listener.AcceptAsync(_stop.Token).ConfigureAwait(false);
            }
            catch (SocketException) when (!_stop.IsCancellationRequested && !_unused)
            {
                // The client left before it was let in, or this process has no descriptor to spare just now: others may come.
                _places.Release();
                await Task.Delay(AcceptPause).ConfigureAwait(false);
                continue;
            }
            catch (Exception error) when (error is OperationCanceledException or SocketException or ObjectDisposedException)
            {
                return;
            }
            lock (_lock)
            {
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
            {
                _unused = true;
                _listener.Close();
            }
        }
        _places.Release();
    }

    private async Task ServeAsync(Socket socket)
    {
        Stream stream = new NetworkStream(socket, ownsSocket: true);
        try
        {
            NbdConnection connection = new(this, stream);
            await using (connection.ConfigureAwait(false))
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
