using System;
using System.IO;
using Kvasir.Linux;

namespace Kvasir.Img;

/// <summary>
/// <c>kvasir img</c>, <c>io</c> and <c>nbd</c>, as processes. Their words follow qemu-img, qemu-io and qemu-nbd (getopt's rules, their exit
/// codes), so they are handed over as they are and not parsed by a command tree.
/// </summary>
public static class StorageCommands
{
    /// <summary>Whether a command line is one of theirs.</summary>
    public static bool Owns(string[] arguments) => arguments is ["img" or "io" or "nbd", ..];

    private static int Complain(StreamWriter error, string message)
    {
        try
        {
            error.WriteLine(message);
        }
        catch (IOException)
        {
            // Nobody reads what is wrong either: the exit code still says it.
        }
        return 1;
    }

    /// <summary>Carries out a command line that is one of theirs, and gives the process's exit code.</summary>
    public static int Execute(string[] arguments)
    {
        string program = $"kvasir {arguments[0]}";
        string[] rest = arguments[1..];
        using StreamWriter output = new(new DescriptorStream(FileDescriptor.StandardOutput)) { AutoFlush = false };
        using StreamWriter error = new(new DescriptorStream(FileDescriptor.StandardError)) { AutoFlush = true };
        try
        {
            int code = arguments[0] switch
            {
                "img" => new ImgTool(program, output, error, !TerminalMode.IsTerminal(FileDescriptor.StandardOutput)).RunAsync(rest).GetAwaiter().GetResult(),
                "io" => new IoTool(program, Console.In, output, error, !Console.IsInputRedirected).RunAsync(rest).GetAwaiter().GetResult(),
                _ => new NbdTool(program, output, error).RunAsync(rest).GetAwaiter().GetResult(),
            };
            output.Flush();
            return code;
        }
        catch (IOException failure)
        {
            // Whoever read the output has gone (a pipe into head), or the disk that takes it is full.
            return Complain(error, $"kvasir: {arguments[0]}: cannot write the output: {failure.Message}");
        }
    }
}
