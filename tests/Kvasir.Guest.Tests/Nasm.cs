using System;
using System.Diagnostics;
using System.IO;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Assembles this project's bare-metal guests. A test is skipped where nasm is not installed.</summary>
internal static class Nasm
{
    /// <returns>The path of the image made.</returns>
    public static string Assemble(TemporaryFolder folder, string name, params string[] definitions)
    {
        string source = folder[$"{name}.asm"];
        string image = folder[$"{name}.bin"];
        File.WriteAllBytes(source, GuestImages.Resource($"image/{name}.asm"));
        File.WriteAllBytes(folder["pvh.inc"], GuestImages.Resource("image/pvh.inc"));
        ProcessStartInfo start = new("nasm", ["-f", "bin", $"-I{Path.GetDirectoryName(source)}/", .. definitions, "-o", image, source]) { RedirectStandardError = true };
        Process? process;
        try
        {
            process = Process.Start(start);
        }
        catch (System.ComponentModel.Win32Exception)
        {
            Assert.Skip("'nasm' is not installed (package nasm)");
            throw;
        }
        using (process)
        {
            string error = process!.StandardError.ReadToEnd();
            process.WaitForExit();
            Assert.True(process.ExitCode == 0, error);
        }
        return image;
    }
}
