using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using Kvasir.Network.User;
using Kvasir.Tests;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Linux's own drivers at work on virtio-net and virtio-fs, with this host at the other end.</summary>
public sealed class NetworkTests
{
    private const int Size = 8 << 20;

    private static void NeedLibrary()
    {
        if (UserNetwork.LibraryVersion is null)
            Assert.Skip("libslirp is not installed (package libslirp0)");
    }

    private static void WaitForAddress(GuestSession guest) => guest.Run("n=0; until [ -s /etc/resolv.conf ] || [ $n = 1000 ]; do sleep 0.3; n=$((n+1)); done; [ -s /etc/resolv.conf ]");

    private static byte[] Data()
    {
        byte[] data = new byte[Size];
        new Random(7).NextBytes(data);
        return data;
    }

    private static string Hash(byte[] data) => Convert.ToHexStringLower(SHA256.HashData(data));

    [Theory]
    [InlineData("q35")]
    [InlineData("microvm")]
    public void A_guest_gets_addresses_and_moves_files_both_ways(string machine)
    {
        NeedLibrary();
        byte[] data = Data();
        int forwarded = HostPort.Take();
        using HostFileServer server = new(data);
        using GuestSession guest = GuestSession.Boot("--machine", machine, "--net", $"user,loopback,hostfwd=tcp:127.0.0.1:{forwarded}-:8080");
        WaitForAddress(guest);
        Assert.Contains("10.0.2.15/24", guest.Run("ip -4 addr show eth0"), StringComparison.Ordinal);
        Assert.Contains("default via 10.0.2.2", guest.Run("ip route"), StringComparison.Ordinal);
        Assert.Equal("nameserver 10.0.2.3", guest.Run("cat /etc/resolv.conf"));
        DiskTests.RunUntil(guest, "ip -6 addr show eth0 | grep fec0 | grep -qv tentative");
        Assert.Contains("fec0::", guest.Run("ip -6 addr show eth0"), StringComparison.Ordinal);
        DiskTests.RunUntil(guest, "ping -c 2 10.0.2.2");
        DiskTests.RunUntil(guest, "ping6 -c 2 fec0::2");

        // From the host to the guest, then the same file from the guest to the host.
        Assert.Equal(Hash(data), guest.Run($"nc 10.0.2.2 {server.Port} </dev/null >/tmp/file; sha256sum </tmp/file").Split(' ')[0]);
        guest.Send("nc -l -p 8080 </tmp/file &");
        Assert.Equal(Hash(data), Hash(Fetch(forwarded)));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void A_name_is_asked_of_the_hosts_servers_or_refused_and_the_hosts_loopback_is_out_of_reach()
    {
        NeedLibrary();
        using HostFileServer server = new(Data());
        using GuestSession guest = GuestSession.Boot();
        WaitForAddress(guest);
        // Whether the host has a name server is its business; that the guest's question gets an answer or a fault is the network's.
        guest.Run("timeout 120 nslookup localhost.invalid 10.0.2.3 >/tmp/answer 2>&1 || [ $? != 127 ]; [ -s /tmp/answer ]");
        foreach (string address in (string[])["10.0.2.2", "10.0.2.3", "10.0.2.99"])
            guest.Run($"timeout 3 nc {address} {server.Port} </dev/null >/tmp/got 2>/dev/null || [ $? != 127 ]; [ ! -s /tmp/got ]");
        Assert.False(server.WasUsed);
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void A_name_gets_its_addresses_from_the_hosts_name_server()
    {
        NeedLibrary();
        using TemporaryFolder folder = new();
        File.WriteAllBytes(folder["dns.py"], GuestImages.Script("dns.py"));
        // A host of its own, as far as names go: its resolv.conf, and nobody else at port 53.
        string[] namespaces = [.. Environment.IsPrivilegedProcess ? new[] { "-m", "-n" } : ["-r", "-m", "-n"]];
        Assert.SkipUnless(Succeeds("unshare", [.. namespaces, "true"]), "namespaces cannot be made here");
        Assert.SkipUnless(Succeeds("python3", "--version"), "python3 is not installed");
        using GuestSession guest = GuestSession.StartProgram(
            "unshare", [.. namespaces, "sh", "-c", "cd \"$1\"; shift; exec python3 dns.py \"$@\"", "sh", folder.Path, KvasirProgram.Path, "run"]);
        guest.Expect(GuestSession.Prompt);
        WaitForAddress(guest);
        guest.Run("nslookup answer.test >/tmp/answer");
        string answer = guest.Run("cat /tmp/answer");
        Assert.Contains("10.0.2.3", answer, StringComparison.Ordinal);
        Assert.Contains("192.0.2.7", answer, StringComparison.Ordinal);
        Assert.Contains("2001:db8::7", answer, StringComparison.Ordinal);
        guest.Run("! nslookup other.test >/tmp/answer 2>&1 && grep -q NXDOMAIN /tmp/answer");
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    private static bool Succeeds(string program, params string[] arguments)
    {
        try
        {
            using Process process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardError = true, RedirectStandardOutput = true })!;
            process.WaitForExit();
            return process.ExitCode == 0;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return false;
        }
    }

    [Fact]
    public void Two_vms_talk_over_a_socket_without_anybodys_leave()
    {
        using TemporaryFolder folder = new();
        string path = folder["link"];
        using GuestSession one = GuestSession.Boot("--net", $"socket,listen={path},capture={folder["one.pcapng"]}");
        using GuestSession two = GuestSession.Boot("--net", $"socket,connect={path}");
        one.Run("ifconfig eth0 10.9.0.1 netmask 255.255.255.0");
        two.Run("ifconfig eth0 10.9.0.2 netmask 255.255.255.0");
        two.Run("n=0; until ping -c 2 -W 2 10.9.0.1 || [ $n = 100 ]; do n=$((n+1)); done; ping -c 1 10.9.0.1");
        string hash = one.Run("head -c 3000000 /dev/urandom >/tmp/f; sha256sum </tmp/f");
        one.Run("httpd -p 9000 -h /tmp");
        Assert.Equal(hash, two.Run("wget -q -O - http://10.9.0.1:9000/f | sha256sum"));
        foreach (GuestSession guest in (GuestSession[])[one, two])
        {
            guest.Send("poweroff");
            Assert.Equal(0, guest.WaitForExit());
        }
        Assert.True(new FileInfo(folder["one.pcapng"]).Length > 3_000_000);
    }

    [Fact]
    public void A_shared_folder_is_a_file_system_of_the_guests()
    {
        using TemporaryFolder folder = new();
        string shared = folder["shared"];
        Directory.CreateDirectory(shared);
        File.WriteAllText(folder["secret"], "secret");
        byte[] data = Data();
        File.WriteAllBytes(Path.Combine(shared, "file"), data);
        File.CreateSymbolicLink(Path.Combine(shared, "out"), "../secret");
        File.CreateSymbolicLink(Path.Combine(shared, "up"), "..");
        using GuestSession guest = GuestSession.Boot("--share", shared, "--share", $"{shared},tag=fixed,readonly");
        guest.Run("modprobe virtiofs; mkdir /share /fixed; mount -t virtiofs share /share && mount -t virtiofs fixed /fixed");
        Assert.Equal(Hash(data), guest.Run("sha256sum </share/file").Split(' ')[0]);
        // A folder tree with links, modes and times, made, moved and compared by the guest itself.
        guest.Run("mkdir -p /share/tree/a/b; for i in $(seq 150); do echo $i >/share/tree/a/f$i; done; ln -s f1 /share/tree/a/link; ln /share/tree/a/f2 /share/tree/hard; chmod 640 /share/tree/a/f3");
        guest.Run("[ \"$(ls /share/tree/a | wc -l)\" = 152 ] && [ \"$(cat /share/tree/a/* 2>/dev/null | wc -l)\" = 151 ] && [ \"$(stat -c %a /share/tree/a/f3)\" = 640 ]");
        guest.Run("mv /share/tree/a /share/tree/c && cp -r /share/tree /tmp/copy && cp -r /tmp/copy /share/again && diff -r /share/tree /share/again");
        guest.Run("dd if=/dev/urandom of=/share/big bs=64k count=64 2>/dev/null; truncate -s 1000000 /share/big; [ \"$(stat -c %s /share/big)\" = 1000000 ]");
        Assert.Equal(Hash(File.ReadAllBytes(Path.Combine(shared, "big"))), guest.Run("sha256sum </share/big").Split(' ')[0]);
        guest.Run("rm -r /share/again && [ ! -e /share/again ]");
        Assert.Equal("7\n", File.ReadAllText(Path.Combine(shared, "tree/c/f7")));
        Assert.Equal((UnixFileMode)0x1a0, File.GetUnixFileMode(Path.Combine(shared, "tree/c/f3")));
        Assert.False(Directory.Exists(Path.Combine(shared, "again")));
        // Links lead where they lead in the guest; nothing of the host's outside is to be seen.
        guest.Run("! cat /share/out 2>/dev/null && ! cat /share/up/secret 2>/dev/null && echo changed >/share/out && [ -e /secret ]");
        Assert.Equal("secret", File.ReadAllText(folder["secret"]));
        guest.Run("! touch /fixed/new 2>/dev/null && ! rm /fixed/file 2>/dev/null && ! sh -c 'echo x >>/fixed/file' 2>/dev/null && [ -e /fixed/file ]");
        Assert.Equal(data, File.ReadAllBytes(Path.Combine(shared, "file")));
        guest.Run("umount /share /fixed && mount -t virtiofs share /share && [ -e /share/file ] && umount /share");
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    private static byte[] Fetch(int port)
    {
        for (int attempt = 0; ; attempt++)
        {
            try
            {
                using TcpClient client = new("127.0.0.1", port);
                using MemoryStream received = new();
                client.GetStream().CopyTo(received);
                if (received.Length > 0)
                    return received.ToArray();
            }
            catch (Exception e) when (e is SocketException or IOException)
            {
                // The guest does not listen yet.
            }
            Assert.True(attempt < 1000, "nothing came through the forward");
            Thread.Sleep(300);
        }
    }
}
