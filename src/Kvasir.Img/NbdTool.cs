using System;
using System.Collections.Generic;
using System.Globalization;
using System.IO;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>`kvasir nbd`: serves an image over NBD with qemu-nbd's options, until its last client leaves or a signal comes.</summary>
public sealed partial class NbdTool(string program, TextWriter output, TextWriter error)
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
                args, "hVb:p:k:e:f:rsnx:D:tvo:l:B:ALT:c:d", "help", "version", "bind=", "port=", "socket=", "shared=", "format=", "read-only", "snapshot", "nocache", "cache=", "aio=", "discard=", "detect-zeroes=",
                "export-name=", "description=", "persistent", "verbose", "image-opts", "object=", "tls-creds=", "tls-authz=", "pid-file=", "force-share", "offset=", "load-snapshot=", "bitmap=", "allocation-depth", "list",
                "fork", "trace=", "connect=", "disconnect", "selinux-label=");
            if (line.Has("h") || line.Has("help"))
                return Help();
            if (line.Has("V") || line.Has("version"))
            {
                output.WriteLine(ToolVersion.Line(program, "qemu-nbd"));
                return 0;
            }
            foreach (string pattern in Both(line, "T", "trace"))
                ToolVersion.Trace(program, pattern, error);
            if (Any(line, "c", "connect") || Any(line, "d", "disconnect"))
                throw new BlockException($"kernel NBD devices are nbd-client's (package nbd-client): serve the image with '{program} -t -k SOCKET FILE', attach it with 'nbd-client -unix SOCKET /dev/nbd0', detach it with 'nbd-client -d /dev/nbd0'");
            foreach (string definition in line.Values("object"))
                _objects.Add(definition);
            if (Any(line, "L", "list"))
                return await ListAsync(line, stop).ConfigureAwait(false);
            if (line.Operands.Count != 1)
                throw new UsageException(line.Operands.Count == 0 ? "Invalid number of arguments: which image?" : $"Invalid number of arguments: '{line.Operands[1]}'");
            if (line.Has("fork") && !BackgroundServer.IsOne)
                return await BackgroundServer.LaunchAsync(args, output, error).ConfigureAwait(false);
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

    private static List<string> Both(CommandLine line, string letter, string name) => [.. line.Values(letter), .. line.Values(name)];

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
              -o, --offset=BYTES        leave out what comes before this offset
              -x, --export-name=NAME    the export's name (default: empty)
              -D, --description=TEXT    its description
              -e, --shared=N            clients at a time (default: 1; 0: any number)
              -t, --persistent          go on after the last client has left
              -r, --read-only           refuse writes
              -s, --snapshot            writes go to a temporary overlay that is lost at the end
              -l, --load-snapshot=NAME  serve an internal snapshot, read-only: its id or name, or snapshot.id=ID,snapshot.name=NAME
              -B, --bitmap=NAME         offer a persistent bitmap as qemu:dirty-bitmap:NAME (several times: several)
              -A, --allocation-depth    offer qemu:allocation-depth: which image of the chain decides
              -L, --list                list the exports of the server at -k, or -b and -p
              -f, --format=FORMAT       the image's format (default: by its content)
              -n, --nocache             past the host's page cache; --cache=MODE for all modes
                  --discard=unmap|ignore, --detect-zeroes=off|on|unmap, --aio=threads|io_uring
                  --image-opts          FILE is a list of options
                  --object=...          secret,id=,data=, tls-creds-x509,id=,dir=,endpoint=server or throttle-group,id=,limits.iops-total=
                  --tls-creds=ID        require TLS
                  --fork                serve in the background; returns once the server listens
                  --selinux-label=LABEL the listening socket's SELinux label
                  --pid-file=PATH       write the process id there once the server listens
            """);
        return 0;
    }
}
