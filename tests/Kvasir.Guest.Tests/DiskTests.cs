using System;
using System.Diagnostics;
using System.Globalization;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Security.Cryptography;
using System.Text;
using System.Text.RegularExpressions;
using System.Threading;
using Xunit;

namespace Kvasir.Guest.Tests;

/// <summary>Virtio devices under Linux's own drivers.</summary>
public sealed class DiskTests
{
    private const long MiB = 1L << 20;

    /// <summary>The monitor's key, and what leaves it.</summary>
    private const string MonitorKey = "\u0001c";

    private static string MakeImage(TemporaryFolder folder, string name, int megabytes, int seed)
    {
        string path = folder[name];
        byte[] content = new byte[megabytes * MiB];
        new Random(seed).NextBytes(content);
        File.WriteAllBytes(path, content);
        return path;
    }

    private static string Sum(ReadOnlySpan<byte> bytes) => Convert.ToHexStringLower(SHA256.HashData(bytes));

    /// <summary>A guest on a terminal, so that its monitor can be reached.</summary>
    internal static GuestSession BootOnTerminal(params string[] arguments)
    {
        Assert.SkipUnless(File.Exists("/usr/bin/script"), "script(1) is missing (package bsdutils)");
        // script(1) hands its command to $SHELL or sh, and not every shell gives its process to the last command by itself.
        string command = $"exec {string.Join(' ', arguments.Prepend("run").Prepend(KvasirProgram.Path).Select(word => $"'{word}'"))}";
        GuestSession session = GuestSession.StartProgram("/usr/bin/script", "-qec", command, "/dev/null");
        try
        {
            session.Expect(GuestSession.Prompt);
            return session;
        }
        catch
        {
            session.Dispose();
            throw;
        }
    }

    internal static string Monitor(GuestSession guest, string command)
    {
        guest.Type(MonitorKey);
        guest.Expect("(kvasir) ");
        guest.Type($"{command}\r");
        guest.Expect($"{command}\n");
        string answer = guest.Expect("(kvasir) ");
        guest.Type(MonitorKey);
        return answer;
    }

    internal static void RunUntil(GuestSession guest, string condition) =>
        guest.Run($"n=0; until {condition}; do sleep 1; n=$((n+1)); [ $n -lt 300 ] || break; done; {condition}");

    [Theory]
    [InlineData("q35", "amd64")]
    [InlineData("microvm", "amd64")]
    [InlineData("q35", "i386")]
    public void Disks_and_random_numbers_reach_the_guest(string machine, string userland)
    {
        (string kernel, string initrd) = GuestImages.Default(userland);
        using TemporaryFolder folder = new();
        string image = MakeImage(folder, "disk.img", 4, 1);
        string sum = Sum(File.ReadAllBytes(image));
        using GuestSession guest = GuestSession.Boot(
            "--machine", machine, "--kernel", kernel, "--initrd", initrd, "--append", GuestImages.CommandLine,
            "--disk", $"{image},serial=serial-1", "--disk", $"{image},readonly,force-share=on,bus=scsi", "--device", "virtio-rng");
        RunUntil(guest, "[ -b /dev/sda ]");
        Assert.Equal(sum, guest.Run("sha256sum </dev/vda | cut -d ' ' -f 1"));
        Assert.Equal(sum, guest.Run("sha256sum </dev/sda | cut -d ' ' -f 1"));
        Assert.Equal("1", guest.Run("cat /sys/block/sda/ro"));
        Assert.Equal("serial-1", guest.Run("cat /sys/block/vda/serial"));
        Assert.Equal("64", guest.Run("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c"));
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Equal(sum, Sum(File.ReadAllBytes(image)));
    }

    [Fact]
    public void What_the_guest_writes_is_in_the_image()
    {
        using TemporaryFolder folder = new();
        string first = MakeImage(folder, "first.img", 8, 2);
        string second = MakeImage(folder, "second.img", 8, 3);
        string cd = MakeImage(folder, "cd.iso", 2, 4);
        string kept = Sum(File.ReadAllBytes(second));
        using GuestSession guest = GuestSession.Boot(
            "--cpus", "2", "--disk", $"{first},queues=2,werror=report", "--disk", $"{first},bus=scsi,snapshot,force-share=on", "--disk", $"{second},snapshot,iops=200", "--cdrom", cd);
        RunUntil(guest, "[ -b /dev/sda ] && [ -b /dev/sr0 ]");
        Assert.Equal("2", guest.Run("ls /sys/block/vda/mq | wc -l"));
        guest.Run("dd if=/dev/urandom of=/tmp/data bs=1M count=3 2>/dev/null");
        string written = guest.Run("sha256sum </tmp/data | cut -d ' ' -f 1");
        // Two writers at once, past the page cache and through it, then read back both ways.
        guest.Run("dd if=/tmp/data of=/dev/vda bs=16k oflag=direct 2>/dev/null & dd if=/tmp/data of=/dev/vda bs=64k seek=64 2>/dev/null; wait $!; sync");
        Assert.Equal(written, guest.Run("dd if=/dev/vda bs=4k count=768 iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1"));
        Assert.Equal(written, guest.Run("dd if=/dev/vda bs=64k skip=64 count=48 2>/dev/null | sha256sum | cut -d ' ' -f 1"));
        // The SCSI disk's and the snapshot's writes are kept aside.
        guest.Run("dd if=/tmp/data of=/dev/sda bs=32k oflag=direct 2>/dev/null; dd if=/tmp/data of=/dev/vdb bs=32k oflag=direct 2>/dev/null; sync");
        Assert.Equal(written, guest.Run("dd if=/dev/sda bs=48k count=64 iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1"));
        guest.Run("blkdiscard -o 1048576 -l 1048576 /dev/sda");
        Assert.Equal(Sum(new byte[MiB]), guest.Run("dd if=/dev/sda bs=64k skip=16 count=16 iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1"));
        Assert.Equal(Sum(File.ReadAllBytes(cd)), guest.Run("sha256sum </dev/sr0 | cut -d ' ' -f 1"));
        guest.Run("blkdiscard -o 7340032 -l 1048576 /dev/vda");
        // 200 requests a second are no more, though a few may come at once.
        Stopwatch throttled = Stopwatch.StartNew();
        guest.Run("dd if=/dev/vdb of=/dev/null bs=4k count=500 iflag=direct 2>/dev/null");
        Assert.InRange(throttled.Elapsed, TimeSpan.FromSeconds(2), TimeSpan.MaxValue);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        byte[] content = File.ReadAllBytes(first);
        Assert.Equal(written, Sum(content.AsSpan(0, (int)(3 * MiB))));
        Assert.Equal(written, Sum(content.AsSpan((int)(4 * MiB), (int)(3 * MiB))));
        Assert.Equal(Sum(new byte[MiB]), Sum(content.AsSpan((int)(7 * MiB))));
        Assert.Equal(kept, Sum(File.ReadAllBytes(second)));
    }

    [Fact]
    public void Disks_come_and_go_under_load()
    {
        using TemporaryFolder folder = new();
        string fixedDisk = MakeImage(folder, "fixed.img", 4, 5);
        string hot = MakeImage(folder, "hot.img", 4, 6);
        using GuestSession guest = BootOnTerminal("--disk", fixedDisk, "--device", "virtio-scsi");
        guest.Run("(while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null; done) & echo $! >/tmp/load");
        for (int round = 0; round < 2; round++)
        {
            Assert.Contains("is plugged in", Monitor(guest, $"device_add virtio-blk,file={hot},id=hot{round}"), StringComparison.Ordinal);
            RunUntil(guest, "[ -b /dev/vdb ]");
            Assert.Equal(Sum(File.ReadAllBytes(hot)), guest.Run("sha256sum </dev/vdb | cut -d ' ' -f 1"));
            guest.Run("dd if=/dev/zero of=/dev/vdb bs=64k count=2 oflag=direct 2>/dev/null");
            Monitor(guest, $"device_del hot{round}");
            RunUntil(guest, "[ ! -e /sys/block/vdb ]");
            // The guest switches the slot off a moment later, and only then the image is free for another device.
            Assert.True(SpinWait.SpinUntil(() => !Monitor(guest, "info block").Contains($"hot{round}", StringComparison.Ordinal), GuestSession.DefaultLimit), guest.Output);
        }
        Assert.Contains("is plugged in", Monitor(guest, $"device_add scsi-hd,file={hot},id=unit"), StringComparison.Ordinal);
        RunUntil(guest, "[ -b /dev/sda ]");
        Assert.Equal(Sum(File.ReadAllBytes(hot)), guest.Run("sha256sum </dev/sda | cut -d ' ' -f 1"));
        Monitor(guest, "device_del unit");
        RunUntil(guest, "[ ! -e /sys/block/sda ]");
        Assert.Equal("8192", guest.Run("cat /sys/block/vda/size"));
        Monitor(guest, "block_resize disk0 6M");
        RunUntil(guest, "[ $(cat /sys/block/vda/size) = 12288 ]");
        guest.Run("kill $(cat /tmp/load)");
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
        Assert.Equal(6 * MiB, new FileInfo(fixedDisk).Length);
    }

    [Fact]
    public void A_balloon_gives_memory_back_to_the_host()
    {
        using GuestSession guest = BootOnTerminal("--device", "virtio-balloon", "--memory", "512M");
        int child = HostProcess.ChildOf(guest.ProcessId);
        // Measured while the memory is in use: what is freed goes back by itself within seconds (free page reporting).
        guest.Run("dd if=/dev/urandom bs=1M count=48 2>/dev/null >/tmp/fill; for i in 1 2 3; do cat /tmp/fill >/tmp/fill$i; done");
        long before = HostProcess.ResidentBytes(child);
        guest.Run("rm /tmp/fill*");
        Monitor(guest, "balloon 160M");
        Assert.True(SpinWait.SpinUntil(() => Monitor(guest, "info balloon").Contains("in the balloon 352 MiB", StringComparison.Ordinal), GuestSession.DefaultLimit), guest.Output);
        long during = HostProcess.ResidentBytes(child);
        Assert.True(during < before - 150 * MiB, $"{before >> 20} MiB before, {during >> 20} MiB with the balloon");
        Assert.Contains("guest: total", Monitor(guest, "info balloon"), StringComparison.Ordinal);
        // A guest that runs out of memory takes some back, and kills nobody.
        guest.Run("dd if=/dev/zero of=/tmp/fill bs=1M count=200 2>/dev/null; rm /tmp/fill; ! dmesg | grep -i 'out of memory'");
        Assert.True(
            SpinWait.SpinUntil(() => Monitor(guest, "info balloon") is string said && !said.Contains("in the balloon 352 MiB", StringComparison.Ordinal), GuestSession.DefaultLimit), guest.Output);
        Monitor(guest, "balloon 512M");
        RunUntil(guest, "[ $(awk '/^MemFree/ { print $2 }' /proc/meminfo) -gt 300000 ]");
        // All that is free goes back at once when it is asked for.
        long GivenBack() => long.Parse(Regex.Match(Monitor(guest, "info balloon"), @"given back so far (\d+) MiB").Groups[1].Value, CultureInfo.InvariantCulture);
        long givenBack = GivenBack();
        Assert.DoesNotContain("names no free pages", Monitor(guest, "balloon_free_pages"), StringComparison.Ordinal);
        Assert.True(SpinWait.SpinUntil(() => GivenBack() > givenBack + 200, GuestSession.DefaultLimit), guest.Output);
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void Console_ports_carry_bytes_both_ways()
    {
        using TemporaryFolder folder = new();
        string socketPath = folder["port"];
        using GuestSession guest = BootOnTerminal("--device", $"virtio-console,file={folder["console"]}", "--device", $"virtio-port,name=org.kvasir.test,unix={socketPath}");
        using Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        socket.Connect(new UnixDomainSocketEndPoint(socketPath));
        socket.ReceiveTimeout = 600_000;
        // The device tells of its ports in messages, which the driver works off by and by.
        RunUntil(guest, "[ \"$(cat /sys/class/virtio-ports/vport*p1/name)\" = org.kvasir.test ] && [ -e /dev/vport*p1 ] && [ -e /dev/hvc0 ]");
        guest.Run("echo to-the-host >$(ls /dev/vport*p1)");
        byte[] bytes = new byte[64];
        int length = 0;
        while (length < 12)
            length += socket.Receive(bytes.AsSpan(length));
        Assert.Equal("to-the-host\n", Encoding.ASCII.GetString(bytes, 0, length));
        guest.Run("{ (head -c 5 /dev/vport*p1 >/tmp/got; echo >>/tmp/got) & }");
        socket.Send("hello"u8);
        RunUntil(guest, "[ \"$(cat /tmp/got)\" = hello ]");
        guest.Run("echo on-the-console >/dev/hvc0");
        Assert.True(
            SpinWait.SpinUntil(() => File.ReadAllText(folder["console"]).Contains("on-the-console", StringComparison.Ordinal), GuestSession.DefaultLimit),
            "the console's file lacks what was written there");
        Monitor(guest, "console_size 132 50");
        RunUntil(guest, "[ \"$(stty -F /dev/hvc0 size)\" = '50 132' ]");
        guest.CheckKernelLog();
        guest.Send("poweroff");
        Assert.Equal(0, guest.WaitForExit());
    }

    [Fact]
    public void A_full_host_disk_pauses_the_guest_until_there_is_room()
    {
        Assert.SkipUnless(Environment.UserName == "root", "a small file system can only be mounted by root");
        using TemporaryFolder folder = new();
        string mount = folder["small"];
        Directory.CreateDirectory(mount);
        Assert.SkipUnless(Command("mount", "-t", "tmpfs", "-o", "size=4M", "none", mount) == 0, "mounting is not allowed here");
        try
        {
            string image = Path.Combine(mount, "disk.img");
            using (FileStream file = File.Create(image))
                file.SetLength(8 * MiB);
            using GuestSession guest = BootOnTerminal("--disk", $"{image},format=raw");
            guest.Send("dd if=/dev/urandom of=/tmp/data bs=1M count=6 2>/dev/null; dd if=/tmp/data of=/dev/vda bs=256k oflag=direct && echo writ\"\"ten");
            guest.Expect("the VM is paused: disk disk0: ");
            Assert.Contains("paused", Monitor(guest, "info status"), StringComparison.Ordinal);
            Assert.Contains("wait for 'cont'", Monitor(guest, "info block"), StringComparison.Ordinal);
            Assert.Equal(0, Command("mount", "-o", "remount,size=16M", mount));
            Monitor(guest, "cont");
            guest.Expect("written\n");
            string sum = guest.Run("sha256sum </tmp/data | cut -d ' ' -f 1");
            guest.CheckKernelLog();
            guest.Send("poweroff");
            Assert.Equal(0, guest.WaitForExit());
            Assert.Equal(sum, Sum(File.ReadAllBytes(image).AsSpan(0, (int)(6 * MiB))));
        }
        finally
        {
            Assert.Equal(0, Command("umount", "-l", mount));
        }
    }

    private static int Command(string program, params string[] arguments)
    {
        using Process process = Process.Start(new ProcessStartInfo(program, arguments) { RedirectStandardError = true })!;
        process.StandardError.ReadToEnd();
        process.WaitForExit();
        return process.ExitCode;
    }
}
