using System;
using Kvasir.Cli.Guests;

namespace Kvasir.Cli;

internal static class Program
{
    private static int Main(string[] arguments)
    {
        try
        {
            GuestFiles g = DefaultGuest.Get(arguments.Length > 0 ? Userland.I386 : Userland.Amd64, s => Console.Error.WriteLine(s));
            Console.WriteLine(g);
            return 0;
        }
        catch (CommandException e)
        {
            Console.Error.WriteLine($"kvasir: {e.Message}");
            return (int)e.ExitCode;
        }
    }
}
