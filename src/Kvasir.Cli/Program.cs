using System;
using Kvasir.Cli.Guests;
using Kvasir.Cli.Options;
using Kvasir.Img;

namespace Kvasir.Cli;

internal static class Program
{
    public static string Version
    {
        get
        {
            Version? version = typeof(Program).Assembly.GetName().Version;
            return $"kvasir {version?.ToString(3)}";
        }
    }

    private static int Main(string[] arguments)
    {
        try
        {
            // Asked by scripts and often: not worth a command tree.
            if (arguments is ["--version"])
            {
                Console.Out.WriteLine(Version);
                return 0;
            }
            if (StorageCommands.Owns(arguments))
                return StorageCommands.Execute(arguments);
            return CommandLine.Invoke(CommandLine.Build(RunCommand.Execute, Doctor, Guest), arguments);
        }
        catch (CommandException e)
        {
            Console.Error.WriteLine($"kvasir: {e.Message}");
            return (int)e.ExitCode;
        }
    }

    private static int Doctor() => new DoctorCommand(Console.Out).Execute();

    private static int Guest(string userland)
    {
        GuestFiles files = DefaultGuest.Get(
            userland switch
            {
                "amd64" => Userland.Amd64,
                "i386" => Userland.I386,
                _ => throw new CommandException(ExitCode.Usage, $"--userland: '{userland}' is none of amd64, i386"),
            },
            Console.Error.WriteLine);
        Console.Out.WriteLine(files.Kernel);
        Console.Out.WriteLine(files.InitialRamdisk);
        return 0;
    }
}
