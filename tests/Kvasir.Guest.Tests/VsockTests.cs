using System;
using System.Diagnostics;
using System.IO;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Linux's vsock driver, with programs on this host's Unix sockets at the other end.</summary>
public sealed class VsockTests
{
    private const int Size = 4 << 20;

    [Theory]
    [InlineData("q35")]
    [InlineData("microvm")]
    public async Task Programs_of_the_guest_and_of_the_host_reach_each_other(string machine)
    {
        using TemporaryFolder folder = new();
        (string kernel, string initialRamdisk) = GuestImages.Default("amd64");
        GuestImages.Extend(folder["initrd"], initialRamdisk, [("bin/vsock", Compile(folder))]);
        byte[] data = new byte[Size];
        new Random(5).NextBytes(data);
        string path = folder["vsock"];
        using GuestSession guest = GuestSession.Boot(
            "--machine", machine, "--kernel", kernel, "--initrd", folder["initrd"], "--append", GuestImages.CommandLine, "--net", "none",
            "--device", $"virtio-vsock,guest-cid=7,socket={path}");
        guest.Run("chmod +x /bin/vsock; [ -c /dev/vsock ]");

        // To the guest and back again, more than either side keeps.
        guest.Send("vsock listen 1234 &");
        guest.Expect("listening\n");
        using (Socket client = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            client.Connect(new UnixDomainSocketEndPoint(path));
            client.Send("CONNECT 1234\n"u8);
            byte[] greeting = new byte[3];
            for (int got = 0; got < greeting.Length;)
                got += client.Receive(greeting.AsSpan(got));
            Assert.Equal("OK ", Encoding.ASCII.GetString(greeting));
            Task<byte[]> echo = Task.Run(() => ReadAll(client));
            client.Send(data);
            client.Shutdown(SocketShutdown.Send);
            byte[] back = await echo;
            // The rest of the greeting's line comes before.
            Assert.Equal(Size, back.Length - Array.IndexOf(back, (byte)'\n') - 1);
            Assert.Equal(SHA256.HashData(data), SHA256.HashData(back.AsSpan(back.Length - Size)));
        }
        DiskTests.RunUntil(guest, "! pidof vsock");

        // To a program of the host's, which answers.
        using Socket listener = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        listener.Bind(new UnixDomainSocketEndPoint($"{path}_99"));
        listener.Listen(1);
        Task<byte[]> served = Task.Run(async () =>
        {
            using Socket program = await listener.AcceptAsync();
            byte[] got = ReadAll(program);
            program.Send("thank you"u8);
            return got;
        }, TestContext.Current.CancellationToken);
        guest.Run("dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null");
        Assert.Equal("thank you", guest.Run("vsock connect 99 </tmp/data"));
        Assert.Equal(guest.Run("sha256sum </tmp/data").Split(' ')[0], Convert.ToHexStringLower(SHA256.HashData(await served)));

        // Messages stay whole, both ways.
        guest.Send("vsock echo 1235 &");
        guest.Expect("listening\n");
        using (Socket client = new(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified))
        {
            client.Connect(new UnixDomainSocketEndPoint($"{path}.seqpacket"));
            client.Send("CONNECT 1235\n"u8);
            byte[] message = new byte[70_000];
            Assert.StartsWith("OK ", Encoding.ASCII.GetString(message, 0, client.Receive(message)), StringComparison.Ordinal);
            foreach (int length in new[] { 1, 4096, 10_000, 65_536 })
            {
                client.Send(data.AsSpan(0, length));
                Assert.Equal(length, client.Receive(message));
                Assert.True(data.AsSpan(0, length).SequenceEqual(message.AsSpan(0, length)));
            }
        }
        DiskTests.RunUntil(guest, "! pidof vsock");
        using Socket messages = new(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified);
        messages.Bind(new UnixDomainSocketEndPoint($"{path}_97"));
        messages.Listen(1);
        Task echoed = Task.Run(async () =>
        {
            using Socket program = await messages.AcceptAsync();
            byte[] message = new byte[70_000];
            while (program.Receive(message) is > 0 and int length)
                program.Send(message.AsSpan(0, length));
        }, TestContext.Current.CancellationToken);
        Assert.Equal("all came back", guest.Run("vsock messages 97"));
        await echoed;

        // Nobody is there.
        guest.Run("! vsock connect 98 </dev/null 2>/tmp/why && grep -q reset /tmp/why");
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.False(File.Exists(path) || File.Exists($"{path}.seqpacket"));
    }

    [Fact]
    public void A_network_card_comes_and_goes()
    {
        using GuestSession guest = DiskTests.BootOnTerminal("--net", "none");
        for (int round = 0; round < 2; round++)
        {
            Assert.Contains("extra is plugged in", DiskTests.Monitor(guest, "device_add virtio-net,user,id=extra,mac=52:54:00:00:00:77"), StringComparison.Ordinal);
            DiskTests.RunUntil(guest, "[ -e /sys/class/net/eth0 ]");
            Assert.Equal("52:54:00:00:00:77", guest.Run("cat /sys/class/net/eth0/address"));
            guest.Run("ifconfig eth0 up; udhcpc -i eth0 -s /etc/lease -t 100 -T 2 -n -q >/dev/null 2>&1");
            Assert.Contains("10.0.2.15", guest.Run("ifconfig eth0"), StringComparison.Ordinal);
            DiskTests.RunUntil(guest, "ping -c 1 10.0.2.2");
            Assert.Contains("extra: user", DiskTests.Monitor(guest, "info network"), StringComparison.Ordinal);
            Assert.Contains("there is a device extra already", DiskTests.Monitor(guest, "device_add virtio-net,user,id=extra"), StringComparison.Ordinal);
            // It goes while frames go out and come in.
            guest.Run("for i in 1 2 3; do (while [ -e /sys/class/net/eth0 ]; do ping -c 3 -s 1400 10.0.2.2; done >/dev/null 2>&1) & done; sleep 1");
            DiskTests.Monitor(guest, "device_del extra");
            DiskTests.RunUntil(guest, "[ ! -e /sys/class/net/eth0 ]");
            Assert.True(SpinWait.SpinUntil(() => DiskTests.Monitor(guest, "info network").Contains("no NIC", StringComparison.Ordinal), GuestSession.DefaultLimit), guest.Output);
        }
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    private static byte[] Compile(TemporaryFolder folder)
    {
        File.WriteAllBytes(folder["vsock.c"], GuestImages.Script("vsock.c"));
        try
        {
            using Process compiler = Process.Start("gcc", ["-O1", "-static", "-o", folder["program"], folder["vsock.c"]])!;
            compiler.WaitForExit();
            Assert.Equal(0, compiler.ExitCode);
        }
        catch (System.ComponentModel.Win32Exception)
        {
            Assert.Skip("gcc is not installed");
        }
        return File.ReadAllBytes(folder["program"]);
    }

    private static byte[] ReadAll(Socket socket)
    {
        using MemoryStream all = new();
        byte[] part = new byte[65536];
        int length;
        while ((length = socket.Receive(part)) > 0)
            all.Write(part, 0, length);
        return all.ToArray();
    }
}
