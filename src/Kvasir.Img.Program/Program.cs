using System;
using Kvasir.Img;

namespace Kvasir.Img.Program;

/// <summary>The command's <c>img</c>, <c>io</c> and <c>nbd</c> by themselves.</summary>
internal static class Program
{
    private static int Main(string[] arguments)
    {
        if (StorageCommands.Owns(arguments))
            return StorageCommands.Execute(arguments);
        Console.Error.WriteLine("kvasir-img: the first word is img, io or nbd");
        return 2;
    }
}
