using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>nfs-ganesha on this host's loopback, with one export of one protocol version. It lives until it is disposed.</summary>
internal sealed class NfsServer : IAsyncDisposable
{
    private readonly TestFolder _folder = new();
    private readonly int _version;
    private readonly int _port = FreePort();
    private readonly int _mountPort = FreePort();
    private readonly Socket? _registry;
    private readonly Process _daemon;

    private NfsServer(int version)
    {
        _version = version;
        Export = Directory.CreateDirectory(_folder["export"]).FullName;
        Directory.CreateDirectory(_folder["state"]);
        File.WriteAllText(_folder["conf"], $$"""
            NFS_CORE_PARAM { NFS_Port = {{_port}}; MNT_Port = {{_mountPort}}; Bind_addr = 127.0.0.1; NFS_Protocols = {{version}}; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }
            NFSV4 { Graceless = true; Minor_Versions = 0; RecoveryRoot = "{{_folder["state"]}}"; }
            EXPORT { Export_Id = 1; Path = "{{Export}}"; Pseudo = /share; Access_Type = RW; Squash = No_Root_Squash; Protocols = {{version}}; Transports = TCP; SecType = sys, none; FSAL { Name = VFS; } }
            """);
        string[] command = ["ganesha.nfsd", "-F", "-L", _folder["log"], "-f", _folder["conf"], "-p", _folder["pid"]];
        if (version == 3)
        {
            // Version 3 announces its ports to the host's rpcbind, and ends without one: it gets one of its own, that nobody else sees.
            _registry = new Socket(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
            _registry.Bind(new UnixDomainSocketEndPoint(_folder["rpcbind"]));
            _registry.Listen();
            _ = RegisterAsync(_registry);
            command = ["unshare", "-m", "sh", "-c", "mount -t tmpfs none /run && ln -s \"$0\" /run/rpcbind.sock && exec \"$@\"", _folder["rpcbind"], .. command];
        }
        _daemon = Process.Start(command[0], command[1..]);
    }

    /// <summary>The folder that it shares.</summary>
    public string Export { get; }

    public string Url(string name) => _version == 3
        ? $"nfs://127.0.0.1{Export}/{name}?version=3&nfsport={_port}&mountport={_mountPort}"
        : $"nfs://127.0.0.1/share/{name}?version=4&nfsport={_port}";

    /// <summary>Starts one and waits until it serves files; the test is skipped where the host has none that does.</summary>
    public static async Task<NfsServer> StartAsync(int version)
    {
        Peer.Need("ganesha.nfsd");
        if (version == 3)
            Peer.Need("unshare");
        if (!Kvasir.Linux.Libnfs.IsPresent)
            Assert.Skip("libnfs is not installed");
        if (!Environment.IsPrivilegedProcess)
            Assert.Skip("nfs-ganesha needs root");
        NfsServer server = new(version);
        try
        {
            await server.WaitAsync();
            return server;
        }
        catch
        {
            await server.DisposeAsync();
            throw;
        }
    }

    public static int FreePort()
    {
        using TcpListener listener = new(IPAddress.Loopback, 0);
        listener.Start();
        return ((IPEndPoint)listener.LocalEndpoint).Port;
    }

    public async ValueTask DisposeAsync()
    {
        _daemon.Kill();
        await _daemon.WaitForExitAsync();
        _daemon.Dispose();
        _registry?.Dispose();
        _folder.Dispose();
    }

    private async Task WaitAsync()
    {
        await File.WriteAllBytesAsync(Path.Combine(Export, "there"), new byte[512]);
        (int code, string text) answer = (1, string.Empty);
        Stopwatch time = Stopwatch.StartNew();
        int tries = 0;
        while (time.Elapsed < TimeSpan.FromMinutes(2) && !_daemon.HasExited)
        {
            // Once it says that it is ready, it serves the folder or never will (a file system without handles).
            bool ready = File.Exists(_folder["log"]) && (await File.ReadAllTextAsync(_folder["log"])).Contains("NFS SERVER INITIALIZED", StringComparison.Ordinal);
            answer = await Peer.ImgAsync("info", "-f", "raw", Url("there"));
            if (answer.code == 0)
                return;
            if (ready && ++tries == 10)
                break;
            await Task.Delay(100);
        }
        IEnumerable<string> log = File.Exists(_folder["log"]) ? (await File.ReadAllLinesAsync(_folder["log"])).TakeLast(4) : [];
        Assert.Skip($"nfs-ganesha does not serve files here: {answer.text.Trim()} {string.Join('\n', log)}");
    }

    /// <summary>Says yes to all that is asked of it: RPC (RFC 5531) over a stream, each answer a boolean.</summary>
    private static async Task RegisterAsync(Socket listener)
    {
        try
        {
            while (true)
            {
                using Socket client = await listener.AcceptAsync();
                byte[] word = new byte[4];
                using NetworkStream stream = new(client);
                while (await stream.ReadAtLeastAsync(word, 4, throwOnEndOfStream: false) == 4)
                {
                    byte[] call = new byte[BinaryPrimitives.ReadUInt32BigEndian(word) & int.MaxValue];
                    await stream.ReadExactlyAsync(call);
                    // One whole record: the call's number, an answer, accepted, no verifier (two words), success, true.
                    byte[] answer = new byte[32];
                    BinaryPrimitives.WriteUInt32BigEndian(answer, 0x8000_0000 | 28);
                    call.AsSpan(0, 4).CopyTo(answer.AsSpan(4));
                    answer[11] = 1;
                    answer[31] = 1;
                    await stream.WriteAsync(answer);
                }
            }
        }
        catch (Exception error) when (error is SocketException or IOException or ObjectDisposedException)
        {
        }
    }
}
