using System;
using System.Collections.Generic;
using System.Diagnostics;
using System.IO;
using System.Linq;
using System.Net;
using System.Text;
using Kvasir.Cli.Guests;
using Kvasir.Cli.Options;
using Kvasir.Network.Sockets;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class NetOptionTests
{
    private static NetSetting One(string text) => Assert.Single(NetOption.Parse([text])!);

    [Fact]
    public void Nothing_said_is_not_none()
    {
        Assert.Null(NetOption.Parse([]));
        Assert.Empty(NetOption.Parse(["none"])!);
        Assert.Equal(2, NetOption.Parse(["user", "tap,ifname=tap3"])!.Count);
    }

    [Fact]
    public void A_user_network_is_read()
    {
        NetSetting net = One("user,net=192.168.76.0/24,dns=192.168.76.9,restrict=on,loopback,ipv6=off,hostname=h1,mac=52:54:0:a:b:c,mtu=1500,queues=2,hostfwd=tcp::2222-:22,hostfwd=udp::5353-:53");
        Assert.Equal(IPAddress.Parse("192.168.76.2"), net.User!.Host);
        Assert.Equal(IPAddress.Parse("192.168.76.9"), net.User.NameServer);
        Assert.Equal(IPAddress.Parse("192.168.76.15"), net.User.DhcpStart);
        Assert.Equal(IPAddress.Parse("255.255.255.0"), net.User.Netmask);
        Assert.True(net.User.Restricted && net.User.HostLoopback && !net.User.Ip6);
        Assert.Equal(["tcp:127.0.0.1:2222-:22", "udp:127.0.0.1:5353-:53"], net.User.Forwards.Select(forward => forward.ToString()));
        Assert.Equal([0x52, 0x54, 0, 10, 11, 12], net.Mac!);
        Assert.Equal((1500, 2, 1500), (net.Mtu, net.Queues, net.User.Mtu));
    }

    [Fact]
    public void Taps_and_sockets_are_read()
    {
        Assert.Equal("br0", One("tap,ifname=tap0,bridge=br0,ip=10.1.2.3/16").Tap!.Bridge);
        Assert.Equal(16, One("tap,ip=10.1.2.3/16").Tap!.PrefixLength);
        Assert.Equal(new SocketSettings(SocketRole.Listen, "/a"), One("socket,listen=/a").Socket);
        Assert.Equal(new SocketSettings(SocketRole.Connect, "/a"), One("socket,connect=/a").Socket);
        Assert.Equal(new SocketSettings(SocketRole.Datagram, "/b", "/a"), One("socket,local=/a,remote=/b").Socket);
    }

    [Theory]
    [InlineData("bridge", "'bridge' is none of")]
    [InlineData("user,ifname=x", "user has no 'ifname'")]
    [InlineData("user,mac=1:2:3", "is no MAC address")]
    [InlineData("user,mac=01:00:5e:00:00:01", "no address of a single machine")]
    [InlineData("user,mtu=70000", "mtu: '70000'")]
    [InlineData("user,mtu=500", "which IPv6 needs")]
    [InlineData("user,hostfwd=tcp::1", "no guest's side")]
    [InlineData("user,net=10.0.2.0/31", "no IPv4 network")]
    [InlineData("user,host=10.0.3.1", "outside the guest's network")]
    [InlineData("user,restrict=maybe", "neither on nor off")]
    [InlineData("user,ipv4=off,ipv6=off", "both off")]
    [InlineData("user,queues=0", "queues: '0'")]
    [InlineData("user,restrict,restrict", "given twice")]
    [InlineData("user,model=e1000", "not supported yet")]
    [InlineData("tap,ifname=a/b", "no interface's name")]
    [InlineData("tap,ip=10.0.0.1", "no IPv4 address with a prefix")]
    [InlineData("socket", "listen=PATH")]
    [InlineData("socket,listen=/a,connect=/b", "listen=PATH")]
    [InlineData("socket,listen=", "name a Unix socket")]
    public void What_makes_no_sense_is_said(string text, string expected)
    {
        CommandException fault = Assert.Throws<CommandException>(() => NetOption.Parse([text]));
        Assert.Equal(ExitCode.Usage, fault.ExitCode);
        Assert.Contains(expected, fault.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_seed_disk_is_found_by_its_label_and_holds_what_was_given()
    {
        SeedDisk seed = new() { HostName = "h1", SshKeys = ["ssh-ed25519 AAAA me"], UserData = "#!/bin/sh\necho hello\n"u8.ToArray() };
        byte[] disc = seed.Build();
        Assert.Equal(disc, seed.Build());
        Assert.NotEqual(disc, (seed with { HostName = "h2" }).Build());
        string path = Path.GetTempFileName();
        try
        {
            File.WriteAllBytes(path, disc);
            string label = Run("blkid", "-p", "-o", "value", "-s", "LABEL", path);
            Assert.Equal("cidata", label.Trim());
            string text = Encoding.ASCII.GetString(disc);
            Assert.Contains("local-hostname: h1\npublic-keys:\n  - ssh-ed25519 AAAA me\n", text, StringComparison.Ordinal);
            Assert.Contains("#!/bin/sh\necho hello\n", text, StringComparison.Ordinal);
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void A_private_key_is_not_given_away()
    {
        string path = Path.GetTempFileName();
        try
        {
            File.WriteAllText(path, "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n");
            Assert.Contains("is a private key", Assert.Throws<CommandException>(() => SeedDisk.ReadKeys(path)).Message, StringComparison.Ordinal);
            File.WriteAllText(path, "# mine\nssh-ed25519 AAAA me\n\necdsa-sha2-nistp256 BBBB\n");
            Assert.Equal(["ssh-ed25519 AAAA me", "ecdsa-sha2-nistp256 BBBB"], SeedDisk.ReadKeys(path));
            File.WriteAllText(path, "nonsense\n");
            Assert.Throws<CommandException>(() => SeedDisk.ReadKeys(path));
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void Shares_have_tags_of_their_own()
    {
        string folder = Path.GetTempPath();
        Assert.Equal(["share", "share1", "x"], ShareOption.Parse([folder, folder, $"{folder},tag=x,readonly"]).Select(share => share.Tag));
        Assert.Throws<CommandException>(() => ShareOption.Parse([$"{folder},tag=a", $"{folder},tag=a"]));
        Assert.Throws<CommandException>(() => ShareOption.Parse(["/no/such/folder"]));
        Assert.Throws<CommandException>(() => ShareOption.Parse([$"{folder},mode=1"]));
    }

    private static string Run(string program, params string[] arguments)
    {
        string? found = HostPrograms.Find(program);
        if (found is null)
            Assert.Skip($"'{program}' is not installed (package util-linux)");
        using Process process = Process.Start(new ProcessStartInfo(found!, arguments) { RedirectStandardOutput = true })!;
        string output = process.StandardOutput.ReadToEnd();
        process.WaitForExit();
        return output;
    }
}
