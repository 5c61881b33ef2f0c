using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Text.RegularExpressions;
using System.Threading;
using Kvasir.Network.User;
using Kvasir.Tests;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>The programs that are made to find faults in disks, file systems and networks, in the guest: fio with verification, iperf3, and a few of our own.</summary>
public sealed class ExerciseTests : IDisposable
{
    private const int Connections = 1000;

    private readonly TemporaryFolder _folder = new();

    public void Dispose() => _folder.Dispose();

    [Fact]
    public void Fio_reads_back_what_it_wrote_to_disks_and_a_shared_folder()
    {
        foreach (string disk in (string[])["blk", "scsi"])
        {
            using FileStream file = File.Create(_folder[disk]);
            file.SetLength(64 << 20);
        }
        Directory.CreateDirectory(_folder["shared"]);
        using GuestSession guest = Boot(
            ["fio"], "--cpus", "2", "--disk", $"{_folder["blk"]},format=raw,queues=2", "--disk", $"{_folder["scsi"]},format=raw,bus=scsi", "--share", _folder["shared"], "--net", "none");
        DiskTests.RunUntil(guest, "[ -b /dev/vda ] && [ -b /dev/sda ]");
        const string fio = "chroot /host /usr/bin/fio --output-format=terse --terse-version=3 --thread --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=7";
        foreach (string device in (string[])["vda", "sda"])
        {
            guest.Run($"{fio} --name={device} --filename=/dev/{device} --direct=1 --ioengine=libaio --iodepth=16 --rw=randwrite --bsrange=512-64k --size=24M >/tmp/{device}");
            // Two writers at once, each with its part of the disk.
            guest.Run($"{fio} --name={device} --filename=/dev/{device} --direct=1 --ioengine=libaio --iodepth=8 --rw=write --bs=4k --size=4M --offset=32M --offset_increment=8M --numjobs=2 >/tmp/{device}");
        }
        guest.Run("modprobe virtiofs; mount -t virtiofs share /host/share");
        guest.Run($"{fio} --name=files --directory=/share --ioengine=psync --rw=randwrite --bsrange=1k-32k --size=2M --nrfiles=4 --numjobs=2 >/tmp/files");
        Assert.Equal("1500 rounds", guest.Run("/bin/exercise file /host/share/random 1500"));
        guest.Run("umount /host/share");
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Equal(8, Directory.EnumerateFiles(_folder["shared"], "files.*").Count());
    }

    [Fact]
    public void Iperf3_and_a_thousand_connections_pass_through_the_user_network()
    {
        if (UserNetwork.LibraryVersion is null)
            Assert.Skip("libslirp is not installed (package libslirp0)");
        using GuestSession guest = Boot(["iperf3"], "--net", "user,loopback");
        guest.Run("n=0; until [ -s /etc/resolv.conf ] || [ $n = 1000 ]; do sleep 0.3; n=$((n+1)); done; [ -s /etc/resolv.conf ]");
        foreach (string direction in (string[])["", " -R"])
        {
            int port = HostPort.Take();
            using Process server = Process.Start(new ProcessStartInfo(
                "iperf3", ["-s", "-1", "-B", "127.0.0.1", "-p", port.ToString(CultureInfo.InvariantCulture)]) { RedirectStandardOutput = true })!;
            try
            {
                server.OutputDataReceived += (_, _) => { };
                server.BeginOutputReadLine();
                // The server may not listen yet.
                guest.Run($"n=0; until chroot /host /usr/bin/iperf3 -c 10.0.2.2 -p {port} -n 16M{direction} >/tmp/iperf; do n=$((n+1)); [ $n -lt 300 ]; sleep 1; done");
                Match received = Regex.Match(guest.Run("grep receiver /tmp/iperf"), @"([\d.]+) MBytes .* receiver");
                Assert.True(received.Success && double.Parse(received.Groups[1].Value, CultureInfo.InvariantCulture) > 10, guest.Output);
                Assert.True(server.WaitForExit(GuestSession.DefaultLimit), "iperf3 goes on without its client");
            }
            finally
            {
                if (!server.HasExited)
                    server.Kill();
            }
        }
        using EchoWhenAllAreThere echo = new(Connections);
        Assert.Equal($"{Connections} connections", guest.Run($"/bin/exercise connections 10.0.2.2 {echo.Port} {Connections}"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    /// <summary>The default guest with programs of the host's in /host, and /bin/exercise. Skips the test where they are not there.</summary>
    private GuestSession Boot(string[] programs, params string[] arguments)
    {
        List<(string, byte[])> files = [("host/dev/null", []), ("host/share/none", []), ("host/proc/none", []), ("host/sys/none", []), ("host/tmp/none", [])];
        HashSet<string> needed = new(StringComparer.Ordinal);
        foreach (string program in programs)
        {
            string path = $"/usr/bin/{program}";
            if (!File.Exists(path))
                Assert.Skip($"'{program}' is not installed (package {program})");
            needed.Add(path);
            foreach (Match library in Regex.Matches(Output("ldd", path), @"(?<= )/\S+(?= \()|(?<=^\s)/\S+(?= \()", RegexOptions.Multiline))
                needed.Add(library.Value);
        }
        files.AddRange(needed.Select(file => ($"host{file}", File.ReadAllBytes(file))));
        files.Add(("bin/exercise", Compile()));
        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        GuestImages.Extend(_folder["initrd"], initialRamdisk, files);
        GuestSession guest = GuestSession.Boot(
            ["--kernel", kernel, "--initrd", _folder["initrd"], "--append", GuestImages.CommandLine, "--memory", "1G", .. arguments]);
        guest.Run("for n in dev proc sys; do mount -o bind /$n /host/$n; done");
        return guest;
    }

    private byte[] Compile()
    {
        File.WriteAllBytes(_folder["exercise.c"], GuestImages.Script("exercise.c"));
        Output("gcc", "-O1", "-static", "-o", _folder["exercise"], _folder["exercise.c"]);
        return File.ReadAllBytes(_folder["exercise"]);
    }

    private static string Output(string program, params string[] arguments)
    {
        try
        {
            using Process process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardOutput = true })!;
            string output = process.StandardOutput.ReadToEnd();
            process.WaitForExit();
            Assert.Equal(0, process.ExitCode);
            return output;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            Assert.Skip($"'{program}' is not installed");
            throw;
        }
    }

    /// <summary>Answers nobody before a number of connections is open at once; then each gets back what it sent.</summary>
    private sealed class EchoWhenAllAreThere : IDisposable
    {
        private readonly TcpListener _listener = new(IPAddress.Loopback, 0);
        private readonly List<Socket> _clients = [];

        public EchoWhenAllAreThere(int count)
        {
            _listener.Start(count);
            new Thread(() => Serve(count)) { IsBackground = true }.Start();
        }

        public int Port => ((IPEndPoint)_listener.LocalEndpoint).Port;

        public void Dispose()
        {
            _listener.Dispose();
            foreach (Socket client in _clients)
                client.Dispose();
        }

        private void Serve(int count)
        {
            try
            {
                while (_clients.Count < count)
                    _clients.Add(_listener.AcceptSocket());
                byte[] number = new byte[4];
                foreach (Socket client in _clients)
                {
                    for (int at = 0; at < number.Length;)
                    {
                        int part = client.Receive(number.AsSpan(at));
                        if (part == 0)
                            return;
                        at += part;
                    }
                    client.Send(number);
                }
            }
            catch (Exception e) when (e is SocketException or ObjectDisposedException)
            {
                // The test is over.
            }
        }
    }
}
