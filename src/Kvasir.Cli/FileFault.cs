using System;
using System.IO;

namespace Kvasir.Cli;

/// <summary>Why a file could not be opened, in few words; .NET's messages repeat the whole path.</summary>
internal static class FileFault
{
    public static string Reason(Exception fault) => fault switch
    {
        FileNotFoundException or DirectoryNotFoundException => "there is no such file",
        UnauthorizedAccessException => "no permission, or not a file",
        _ => fault.Message,
    };
}
