using System;
using System.Globalization;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Nbd;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>`kvasir nbd`: serves an image over NBD with qemu-nbd's options, until its last client leaves or a signal comes.</summary>
public sealed class NbdTool(string program, TextWriter output, TextWriter error)
{
    private readonly ToolObjects _objects = new();

    /// <summary>Runs a command line and returns the exit code.</summary>
    /// <param name="args">The words after the command.</param>
    /// <param name="stop">Ends the server as a signal would.</param>
    public async Task<int> RunAsync(string[] args, CancellationToken stop = default)
    {
        try
        {
            CommandLine line = new(
                args, "hVb:p:k:e:f:rsnx:D:tv", "help", "version", "bind=", "port=", "socket=", "shared=", "format=", "read-only", "snapshot", "nocache", "cache=", "aio=", "discard=", "detect-zeroes=",
                "export-name=", "description=", "persistent", "verbose", "image-opts", "object=", "tls-creds=", "pid-file=", "force-share");
            if (line.Has("h") || line.Has("help"))
                return Help();
            if (line.Has("V") || line.Has("version"))
            {
                output.WriteLine($"{program} version 0.1.0 (command line of qemu-nbd version 7.2.0)");
                return 0;
            }
            foreach (string definition in line.Values("object"))
                _objects.Add(definition);
            if (line.Operands.Count != 1)
                throw new UsageException(line.Operands.Count == 0 ? "Invalid number of arguments: which image?" : $"Invalid number of arguments: '{line.Operands[1]}'");
            return await ServeAsync(line, stop).ConfigureAwait(false);
        }
        catch (UsageException failure)
        {
            error.WriteLine($"{program}: {failure.Message}");
            error.WriteLine($"Try '{program} --help' for more information.");
            return 1;
        }
        catch (Exception failure) when (failure is BlockException or LinuxException or IOException or UnauthorizedAccessException)
        {
            error.WriteLine($"{program}: {failure.Message}");
            return 1;
        }
    }

    private static string? Either(CommandLine line, string letter, string name) => line.Value(letter) ?? line.Value(name);

    private static bool Any(CommandLine line, string letter, string name) => line.Has(letter) || line.Has(name);

    private static int Number(string? text, int fallback, int least, int most, string what)
    {
        if (text is null)
            return fallback;
        return int.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out int number) && number >= least && number <= most
            ? number
            : throw new UsageException($"Invalid {what} '{text}'");
    }

    private int Help()
    {
        output.WriteLine($"Usage: {program} [OPTIONS] FILE");
        output.WriteLine(
            """
            Serves the disk image FILE to NBD clients. Options are those of qemu-nbd(8):
              -k, --socket=PATH         listen on this Unix socket
              -b, --bind=ADDRESS        listen on this address (default: 127.0.0.1)
              -p, --port=PORT           and port (default: 10809)
              -x, --export-name=NAME    the export's name (default: empty)
              -D, --description=TEXT    its description
              -e, --shared=N            clients at a time (default: 1; 0: any number)
              -t, --persistent          go on after the last client has left
              -r, --read-only           refuse writes
              -s, --snapshot            writes go to a temporary overlay that is lost at the end
              -f, --format=FORMAT       the image's format (default: by its content)
              -n, --nocache             past the host's page cache; --cache=MODE for all modes
                  --discard=unmap|ignore, --detect-zeroes=off|on|unmap, --aio=threads|io_uring
                  --image-opts          FILE is a list of options
                  --object=...          secret,id=,data= or tls-creds-x509,id=,dir=,endpoint=server
                  --tls-creds=ID        require TLS
                  --pid-file=PATH       write the process id there once the server listens
            """);
        return 0;
    }

    private async Task<int> ServeAsync(CommandLine line, CancellationToken stop)
    {
        string name = Either(line, "x", "export-name") ?? string.Empty;
        bool readOnly = Any(line, "r", "read-only");
        int shared = Number(Either(line, "e", "shared"), 1, 0, int.MaxValue, "shared device number");
        int port = Number(Either(line, "p", "port"), NbdAddress.DefaultPort, 0, 65535, "port");
        TlsCredentials? credentials = null;
        if (line.Value("tls-creds") is string id && (!_objects.Credentials.TryGetValue(id, out credentials) || !credentials.IsServer))
            throw new UsageException($"No server TLS credentials with id '{id}'");
        BackendOptions options = new()
        {
            Format = Either(line, "f", "format"),
            Probe = Either(line, "f", "format") is null,
            ReadOnly = readOnly,
            Snapshot = Any(line, "s", "snapshot"),
            Cache = Any(line, "n", "nocache") ? CacheMode.None : BackendOptions.ParseCache(line.Value("cache") ?? "writeback"),
            Discard = line.Value("discard") is not ("ignore" or "off"),
            DetectZeroes = BackendOptions.ParseDetectZeroes(line.Value("detect-zeroes") ?? "off"),
            Async = line.Value("aio") == "threads" ? AsyncMode.Threads : AsyncMode.Auto,
            Secrets = _objects.Secrets,
            Credentials = _objects.Credentials,
            ForceShare = line.Has("force-share"),
        };
        EndPoint address = Either(line, "k", "socket") is string path
            ? NbdAddress.SocketAt(path)
            : new IPEndPoint(await ResolveAsync(Either(line, "b", "bind") ?? "127.0.0.1", stop).ConfigureAwait(false), port);
        await using BlockBackend backend = line.Has("image-opts")
            ? await BlockBackend.OpenAsync(ImageOptions.ParseList(line.Operands[0], "file"), options, stop).ConfigureAwait(false)
            : await BlockBackend.OpenAsync(line.Operands[0], options, stop).ConfigureAwait(false);
        NbdExport export = new(name, backend.Node, readOnly) { Description = Either(line, "D", "description") };
        await using NbdServer server = NbdServer.Start(address, [export], credentials, shared, stopWhenUnused: !Any(line, "t", "persistent"));
        if (line.Value("pid-file") is string pidFile)
            await File.WriteAllTextAsync(pidFile, Environment.ProcessId.ToString(CultureInfo.InvariantCulture) + "\n", stop).ConfigureAwait(false);
        if (Any(line, "v", "verbose") || port == 0)
            output.WriteLine($"listening on {server.Address}");
        await output.FlushAsync(stop).ConfigureAwait(false);
        TaskCompletionSource signalled = new(TaskCreationOptions.RunContinuationsAsynchronously);
        void OnSignal(PosixSignalContext context)
        {
            context.Cancel = true;
            signalled.TrySetResult();
        }

        using PosixSignalRegistration terminate = PosixSignalRegistration.Create(PosixSignal.SIGTERM, OnSignal);
        using PosixSignalRegistration interrupt = PosixSignalRegistration.Create(PosixSignal.SIGINT, OnSignal);
        using PosixSignalRegistration hangUp = PosixSignalRegistration.Create(PosixSignal.SIGHUP, OnSignal);
        using CancellationTokenRegistration stopped = stop.Register(() => signalled.TrySetResult());
        await Task.WhenAny(server.Completion, signalled.Task).ConfigureAwait(false);
        return 0;
    }

    private static async ValueTask<IPAddress> ResolveAsync(string host, CancellationToken stop)
    {
        if (IPAddress.TryParse(host, out IPAddress? address))
            return address;
        try
        {
            IPAddress[] found = await Dns.GetHostAddressesAsync(host, stop).ConfigureAwait(false);
            return found.Length > 0 ? found[0] : throw new BlockException($"'{host}' has no address");
        }
        catch (SocketException failure)
        {
            throw new BlockException($"'{host}' has no address: {failure.Message}", failure);
        }
    }
}
