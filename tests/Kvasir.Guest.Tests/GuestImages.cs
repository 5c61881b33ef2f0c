using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Reflection;
using System.Text;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>The default guest's kernel and initial file system, as files, and file systems made of it with more in them.</summary>
internal static class GuestImages
{
    private static readonly Lock Building = new();
    private static readonly Dictionary<string, (string Kernel, string InitialRamdisk)> Built = [];

    /// <summary>
    /// What a kernel that is given directly needs to be told. Quiet: its messages would stand between a program's. No timer check: it counts ticks over
    /// tens of milliseconds and panics where a busy host made them late.
    /// </summary>
    public const string CommandLine = "console=ttyS0 quiet no_timer_check";

    /// <summary>The default guest with 64-bit or 32-bit programs. Skips the test where it cannot be had.</summary>
    public static (string Kernel, string InitialRamdisk) Default(string userland)
    {
        lock (Building)
        {
            if (Built.TryGetValue(userland, out (string, string) files))
                return files;
            (int code, string output, string error) = KvasirProgram.Run(TimeSpan.FromMinutes(10), "guest", "--userland", userland);
            if (code == 1)
                Assert.Skip($"the default guest cannot be had here: {error.Trim().Split('\n')[^1]}");
            Assert.Equal(0, code);
            string[] paths = output.Trim().Split('\n');
            return Built[userland] = (paths[0], paths[1]);
        }
    }

    /// <summary>
    /// Writes an initial file system with further files. A kernel unpacks the archives that follow one another in it (Linux
    /// Documentation/driver-api/early-userspace/buffer-format.rst).
    /// </summary>
    /// <param name="path">Where to write it.</param>
    /// <param name="initialRamdisk">The one to begin with.</param>
    /// <param name="files">Paths without a leading slash; their folders are made. All are executable.</param>
    public static void Extend(string path, string initialRamdisk, IEnumerable<(string Path, byte[] Content)> files)
    {
        using FileStream output = File.Create(path);
        using (FileStream begin = File.OpenRead(initialRamdisk))
            begin.CopyTo(output);
        Pad(output);
        HashSet<string> folders = new(StringComparer.Ordinal);
        uint inode = 0x10000;
        foreach ((string file, byte[] content) in files)
        {
            string[] parts = file.Split('/');
            for (int depth = 1; depth < parts.Length; depth++)
            {
                string folder = string.Join('/', parts.Take(depth));
                if (folders.Add(folder))
                    WriteEntry(output, folder, 0x41ed, inode++, []);
            }
            WriteEntry(output, file, 0x81ed, inode++, content);
        }
        WriteEntry(output, "TRAILER!!!", 0, 0, []);
    }

    /// <summary>One of this project's scripts.</summary>
    public static byte[] Script(string name) => Resource($"guest/{name}");

    /// <summary>A file built into this program.</summary>
    public static byte[] Resource(string name)
    {
        using Stream source = Assembly.GetExecutingAssembly().GetManifestResourceStream(name)
            ?? throw new FileNotFoundException($"the tests were built without '{name}'");
        using MemoryStream content = new();
        source.CopyTo(content);
        return content.ToArray();
    }

    /// <summary>One entry of a "newc" archive.</summary>
    private static void WriteEntry(FileStream output, string path, uint mode, uint inode, byte[] content)
    {
        uint[] fields = [inode, mode, 0, 0, 1, 0, (uint)content.Length, 0, 0, 0, 0, (uint)path.Length + 1, 0];
        output.Write(Encoding.ASCII.GetBytes($"070701{string.Concat(fields.Select(field => field.ToString("x8", System.Globalization.CultureInfo.InvariantCulture)))}{path}\0"));
        Pad(output);
        output.Write(content);
        Pad(output);
    }

    private static void Pad(FileStream output) => output.Write(new byte[(int)(-output.Position & 3)]);
}

/// <summary>A folder that goes away with the test.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("kvasir-guest-").FullName;

    /// <summary>The path of a file in it.</summary>
    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
