using System;
using System.Collections.Generic;
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

/// <summary>Serving an image, and asking another server for its exports.</summary>
public sealed partial class NbdTool
{
    private static readonly string[] s_perDevice = ["o", "offset", "x", "export-name", "D", "description", "A", "allocation-depth", "B", "bitmap"];

    private async Task<int> ListAsync(CommandLine line, CancellationToken stop)
    {
        if (line.Operands.Count != 0)
            throw new BlockException("List mode is incompatible with a file name");
        if (Array.Exists(s_perDevice, line.Has))
            throw new BlockException("List mode is incompatible with per-device settings");
        if (line.Has("fork"))
            throw new BlockException("List mode is incompatible with forking");
        TlsCredentials? credentials = Credentials(line, isServer: false);
        int port = Number(Either(line, "p", "port"), NbdAddress.DefaultPort, 1, 65535, "port");
        string? socket = Either(line, "k", "socket");
        NbdAddress address = new(socket is null ? Either(line, "b", "bind") ?? "127.0.0.1" : null, port, socket, string.Empty, credentials is not null);
        IReadOnlyList<NbdListing> exports = await NbdListing.ReadAsync(address, credentials, stop).ConfigureAwait(false);
        output.WriteLine($"exports available: {exports.Count}");
        foreach (NbdListing export in exports)
        {
            output.WriteLine($" export: '{export.Name}'");
            if (export.Description.Length > 0)
                output.WriteLine($"  description: {export.Description}");
            if (export.Length is long length)
            {
                output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"  size:  {(ulong)length}"));
                output.WriteLine($"  flags: 0x{export.Flags:x} ( {string.Concat(System.Linq.Enumerable.Select(export.Features, f => f + " "))})");
            }
            if (export.BlockSizes is (uint least, uint preferred, uint most))
                output.WriteLine(string.Create(CultureInfo.InvariantCulture, $"  min block: {least}\n  opt block: {preferred}\n  max block: {most}"));
            if (export.Contexts.Count > 0)
                output.WriteLine($"  available meta contexts: {export.Contexts.Count}");
            foreach (string context in export.Contexts)
                output.WriteLine($"   {context}");
        }
        return 0;
    }

    private TlsCredentials? Credentials(CommandLine line, bool isServer)
    {
        if (line.Has("tls-authz"))
        {
            throw new BlockException(line.Has("tls-creds")
                ? "--tls-authz is not supported: a server with verify-peer=on (the default) lets clients in whose certificate is one of ca-cert.pem's authority, so give its clients an authority of their own"
                : "--tls-authz is not permitted without --tls-creds");
        }
        if (line.Value("tls-creds") is not string id)
            return null;
        if (!_objects.Credentials.TryGetValue(id, out TlsCredentials? credentials))
            throw new BlockException($"Failed to get TLS creds: No TLS credentials with id '{id}'");
        return credentials.IsServer == isServer ? credentials
            : throw new BlockException($"Failed to get TLS creds: Expecting TLS credentials with a {(isServer ? "server" : "client")} endpoint");
    }

    private async Task<int> ServeAsync(CommandLine line, CancellationToken stop)
    {
        BackgroundServer.Enter();
        string name = Bounded(Either(line, "x", "export-name") ?? string.Empty, "export name");
        string? description = Either(line, "D", "description") is string text ? Bounded(text, "export description") : null;
        string? snapshot = Either(line, "l", "load-snapshot");
        bool readOnly = Any(line, "r", "read-only") || snapshot is not null;
        int shared = Number(Either(line, "e", "shared"), 1, 0, int.MaxValue, "shared device number");
        int port = Number(Either(line, "p", "port"), NbdAddress.DefaultPort, 0, 65535, "port");
        long offset = Offset(Either(line, "o", "offset"));
        TlsCredentials? credentials = Credentials(line, isServer: true);
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
            ThrottleGroups = _objects.ThrottleGroups,
            ForceShare = line.Has("force-share"),
        };
        EndPoint address = Either(line, "k", "socket") is string path
            ? NbdAddress.SocketAt(path)
            : new IPEndPoint(await ResolveAsync(Either(line, "b", "bind") ?? "127.0.0.1", stop).ConfigureAwait(false), port);
        await using BlockBackend backend = line.Has("image-opts")
            ? await BlockBackend.OpenAsync(ImageOptions.ParseList(line.Operands[0], "file"), options, stop).ConfigureAwait(false)
            : await BlockBackend.OpenAsync(line.Operands[0], options, stop).ConfigureAwait(false);
        BlockNode image = backend.Node;
        await using BlockNode? view = snapshot is null ? null : await SnapshotView.OpenAsync(image, snapshot).ConfigureAwait(false);
        image = view ?? image;
        // The image under its filters: the back end closes it, and the window only looks through.
        NbdExport export = new(name, offset == 0 ? image : From(image, offset), readOnly)
        {
            Description = description,
            Contexts = await ContextsAsync(line, image, stop).ConfigureAwait(false),
            ContextOffset = offset,
        };
        LabelSockets(line.Value("selinux-label"));
        await using NbdServer server = NbdServer.Start(address, [export], credentials, shared, stopWhenUnused: !Any(line, "t", "persistent"));
        if (line.Value("selinux-label") is not null)
            LabelSockets(string.Empty);
        if (line.Value("pid-file") is string pidFile)
            await WriteProcessIdAsync(pidFile, stop).ConfigureAwait(false);
        if (Any(line, "v", "verbose") || port == 0)
            output.WriteLine($"listening on {server.Address}");
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
        await BackgroundServer.ReadyAsync(output, error).ConfigureAwait(false);
        await output.FlushAsync(stop).ConfigureAwait(false);
        await Task.WhenAny(server.Completion, signalled.Task).ConfigureAwait(false);
        return 0;
    }

    private static RawImage From(BlockNode image, long offset) => offset <= image.Length
        ? new RawImage(image, offset, image.Length - offset)
        : throw new BlockException($"The offset ({offset}) has to be smaller or equal to the size of the image ({image.Length})", BlockErrno.Invalid);

    private static async ValueTask<IReadOnlyList<NbdContext>> ContextsAsync(CommandLine line, BlockNode image, CancellationToken stop)
    {
        List<NbdContext> contexts = [];
        if (Any(line, "A", "allocation-depth"))
            contexts.Add(new NbdDepthContext(image));
        foreach (string bitmap in new SortedSet<string>(Both(line, "B", "bitmap"), StringComparer.Ordinal))
            contexts.Add(await NbdBitmapContext.OpenAsync(image, bitmap, stop).ConfigureAwait(false));
        return contexts;
    }

    private static string Bounded(string text, string what) =>
        System.Text.Encoding.UTF8.GetByteCount(text) <= 4096 ? text : throw new BlockException($"{what} '{text[..32]}...' too long: at most 4096 bytes");

    /// <summary>A number of bytes: no suffixes here, as qemu-nbd has it.</summary>
    private static long Offset(string? text)
    {
        if (text is null)
            return 0;
        bool hex = text.StartsWith("0x", StringComparison.OrdinalIgnoreCase);
        return long.TryParse(hex ? text[2..] : text, hex ? NumberStyles.AllowHexSpecifier : NumberStyles.None, CultureInfo.InvariantCulture, out long offset) && offset >= 0
            ? offset
            : throw new BlockException($"Invalid offset '{text}'");
    }

    /// <summary>The label that the kernel gives to sockets which this thread makes; empty: the policy's again.</summary>
    private static void LabelSockets(string? label)
    {
        if (label is null)
            return;
        try
        {
            File.WriteAllText("/proc/thread-self/attr/sockcreate", label);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new BlockException($"Cannot set SELinux socket create context to {label}: {failure.Message}", failure);
        }
    }

    private static async ValueTask WriteProcessIdAsync(string path, CancellationToken stop)
    {
        try
        {
            await File.WriteAllTextAsync(path, Environment.ProcessId.ToString(CultureInfo.InvariantCulture) + "\n", stop).ConfigureAwait(false);
        }
        catch (Exception failure) when (failure is IOException or UnauthorizedAccessException)
        {
            throw new BlockException($"Could not create '{path}': {failure.Message}", failure);
        }
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
