using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Text.RegularExpressions;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>
/// The host's own programs and libraries, run in the guest and on the host: the same script must print the same. The C library and the
/// cryptographic one choose their code by the processor's features, so this is AVX2, FMA, AES, SHA and BMI at work.
/// </summary>
public sealed class ProgramsTests
{
    private static readonly string[] Programs =
        ["perl", "sha256sum", "sha1sum", "sha512sum", "md5sum", "cksum", "sort", "wc", "gzip", "cmp", "openssl", "sh", "cat"];

    [Fact]
    public void Print_the_same_as_on_the_host()
    {
        using TemporaryFolder folder = new();
        byte[] script = GuestImages.Script("programs.sh");
        File.WriteAllBytes(folder["programs.sh"], script);
        HashSet<string> files = new(StringComparer.Ordinal);
        foreach (string program in Programs)
        {
            string path = $"/usr/bin/{program}";
            if (!File.Exists(path))
                Assert.Skip($"'{path}' is not installed");
            files.Add(path);
            foreach (Match library in Regex.Matches(Execute(folder.Path, "ldd", path), @"(?<= )/\S+(?= \()|(?<=^\s)/\S+(?= \()", RegexOptions.Multiline))
                files.Add(library.Value);
        }
        Execute(folder.Path, "openssl", "genrsa", "-out", "key.pem", "2048");
        string expected = Execute(folder.Path, "sh", "programs.sh");
        Assert.Contains("Verified OK", expected);

        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        GuestImages.Extend(
            folder["initrd"],
            initialRamdisk,
            [
                .. files.Select(file => ($"host{file}", File.ReadAllBytes(file))),
                ("host/bin/sh", File.ReadAllBytes("/usr/bin/sh")),
                ("host/work/key.pem", File.ReadAllBytes(folder["key.pem"])),
                ("host/work/programs.sh", script),
                ("host/dev/null", []),
            ]);
        using GuestSession guest = GuestSession.Start(
            "run", "--kernel", kernel, "--initrd", folder["initrd"], "--append", GuestImages.CommandLine, "--cpus", "2");
        guest.Expect(GuestSession.Prompt);
        string printed = guest.Run("chroot /host /bin/sh -c 'cd /work && sh programs.sh'", TimeSpan.FromMinutes(15));
        Assert.Equal(expected.TrimEnd('\n').Split('\n'), printed.Split('\n'));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    private static string Execute(string folder, string program, params string[] arguments)
    {
        using Process process = Process.Start(new ProcessStartInfo(program, arguments)
        {
            WorkingDirectory = folder,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        })!;
        System.Threading.Tasks.Task<string> error = process.StandardError.ReadToEndAsync();
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        Assert.True(process.ExitCode == 0, $"{program}: {error.GetAwaiter().GetResult()}");
        return output;
    }
}
