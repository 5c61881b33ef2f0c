using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.Linq;
using System.Net;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Kvasir.Network.User;
using Kvasir.Tests;
using Xunit;

namespace Kvasir.Network.Tests;

/// <summary>libslirp with a guest's stack made of frames on one side and this host's sockets on the other.</summary>
public sealed class UserNetworkTests
{
    private static readonly IPAddress Gateway = IPAddress.Parse("10.0.2.2");

    private static UserNetwork Make(UserNetworkSettings? settings = null)
    {
        if (UserNetwork.LibraryVersion is null)
            Assert.Skip("libslirp is not installed (package libslirp0)");
        return new UserNetwork(settings ?? new UserNetworkSettings { HostLoopback = true });
    }

    [Fact]
    public void Dhcp_gives_address_router_name_server_and_host_name()
    {
        using UserNetwork network = Make(new UserNetworkSettings { HostName = "walnut" });
        (IPAddress address, Dictionary<byte, byte[]> options) = new FrameGuest(network).Dhcp();
        Assert.Equal(IPAddress.Parse("10.0.2.15"), address);
        Assert.Equal([255, 255, 255, 0], options[1]);
        Assert.Equal([10, 0, 2, 2], options[3]);
        Assert.Equal([10, 0, 2, 3], options[6]);
        Assert.Equal("walnut", Encoding.ASCII.GetString(options[12]));
    }

    [Fact]
    public void Another_network_has_other_addresses()
    {
        UserNetworkSettings settings = new()
        {
            Network = IPAddress.Parse("192.168.76.0"),
            Host = IPAddress.Parse("192.168.76.1"),
            NameServer = IPAddress.Parse("192.168.76.2"),
            DhcpStart = IPAddress.Parse("192.168.76.9"),
        };
        using UserNetwork network = Make(settings);
        FrameGuest guest = new(network) { Gateway = settings.Host };
        Assert.Equal(settings.DhcpStart, guest.Dhcp().Address);
    }

    [Theory]
    [InlineData(false, 0)]
    [InlineData(true, 0)]
    [InlineData(true, 1448)]
    public void A_connection_of_the_guest_carries_data_both_ways(bool leaveChecksum, ushort segmentSize)
    {
        using TcpListener listener = Listen(out ushort port);
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        FrameTcp connection = FrameTcp.Connect(guest, Gateway, 40000, port);
        using Socket server = listener.AcceptSocket();
        byte[] data = Enumerable.Range(0, segmentSize > 0 ? 40_000 : 1400).Select(i => (byte)(i * 7)).ToArray();
        connection.Send(data, leaveChecksum, segmentSize);
        Assert.Equal(data, ReceiveExactly(server, data.Length));
        server.Send(data);
        Assert.Equal(data, ReceiveAll(connection, data.Length));
        server.Shutdown(SocketShutdown.Send);
        connection.Close();
        Assert.True(connection.Ended);
    }

    [Fact]
    public void A_thousand_connections_are_open_at_once()
    {
        const int count = 1000;
        using TcpListener listener = Listen(out ushort port);
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        List<Socket> servers = [];
        try
        {
            Thread acceptor = new(() =>
            {
                while (servers.Count < count)
                    servers.Add(listener.AcceptSocket());
            });
            acceptor.Start();
            FrameTcp[] connections = FrameTcp.Connect(guest, Gateway, 20_000, port, count);
            Assert.True(acceptor.Join(TimeSpan.FromSeconds(120)), "not all connections came");
            for (int index = 0; index < count; index++)
                connections[index].Send(BitConverter.GetBytes(index));
            HashSet<int> numbers = [];
            foreach (Socket server in servers)
            {
                byte[] number = ReceiveExactly(server, 4);
                numbers.Add(BitConverter.ToInt32(number));
                server.Send(number);
            }
            Assert.Equal(count, numbers.Count);
            for (int index = 0; index < count; index++)
                Assert.Equal(index, BitConverter.ToInt32(connections[index].Receive(4)));
        }
        finally
        {
            foreach (Socket server in servers)
                server.Dispose();
        }
    }

    [Fact]
    public void Buffers_of_connections_go_back_to_the_host()
    {
        using UserNetwork network = Make();
        // Freed once, a block of this size would have the C library take all smaller ones from its heap from then on.
        Marshal.FreeHGlobal(Marshal.AllocHGlobal(4 << 20));
        nint block = Marshal.AllocHGlobal(128 << 10);
        Marshal.FreeHGlobal(block);
        // What is mapped alone begins a page, after glibc's two words.
        Assert.Equal(16, block & 0xfff);
    }

    [Fact]
    public void Datagrams_go_both_ways()
    {
        using UdpClient server = new(new IPEndPoint(IPAddress.Loopback, 0));
        server.Client.ReceiveTimeout = 120_000;
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        foreach (bool leaveChecksum in (bool[])[false, true])
        {
            guest.SendUdp(Gateway, 5000, (ushort)((IPEndPoint)server.Client.LocalEndPoint!).Port, "to the host"u8.ToArray(), leaveChecksum);
            IPEndPoint? from = null;
            Assert.Equal("to the host", Encoding.ASCII.GetString(server.Receive(ref from)));
            server.Send("to the guest"u8, from);
            Assert.Equal("to the guest", Encoding.ASCII.GetString(guest.ExpectUdp(5000, "datagram")));
        }
    }

    [Fact]
    public void Echo_of_the_gateway_comes_back()
    {
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        guest.SendTransport(Gateway, 1, [8, 0, 0, 0, 0, 7, 0, 1, .. "ping"u8], 2, leaveChecksum: false);
        byte[] answer = guest.Expect(f => FrameGuest.Type(f) == 0x0800 && f[23] == 1, "echo reply");
        Assert.Equal(0, answer[34]);
        Assert.Equal("ping", Encoding.ASCII.GetString(answer, 42, 4));
    }

    [Fact]
    public void Forwards_are_added_listed_and_removed_while_it_runs()
    {
        int port = HostPort.Take();
        using UserNetwork network = Make(new UserNetworkSettings { Forwards = [PortForward.Parse($"tcp:127.0.0.1:{HostPort.Take()}-:80")] });
        FrameGuest guest = new(network);
        guest.Dhcp();
        PortForward added = PortForward.Parse($"tcp:127.0.0.1:{port}-:22");
        network.AddForward(added);
        Assert.Equal(2, network.Forwards.Count);
        Assert.Contains("HOST_FORWARD", network.DescribeConnections(), StringComparison.Ordinal);
        Assert.Contains("open already", Assert.Throws<NetworkException>(() => network.AddForward(added)).Message, StringComparison.Ordinal);

        using (TcpClient client = new("127.0.0.1", port))
        {
            FrameTcp connection = FrameTcp.Accept(guest, 22);
            client.Client.Send("hello guest"u8);
            Assert.Equal("hello guest", Encoding.ASCII.GetString(connection.Receive(11)));
            connection.Send("hello host"u8.ToArray());
            Assert.Equal("hello host", Encoding.ASCII.GetString(ReceiveExactly(client.Client, 10)));
        }
        Assert.True(network.RemoveForward(PortForward.ParseHostSide($"tcp:127.0.0.1:{port}")));
        Assert.False(network.RemoveForward(added));
        Assert.Throws<SocketException>(() => new TcpClient("127.0.0.1", port));
        Assert.Single(network.Forwards);
    }

    [Fact]
    public void A_forward_of_datagrams_reaches_the_guest()
    {
        int port = HostPort.Take();
        using UserNetwork network = Make(new UserNetworkSettings { Forwards = [PortForward.Parse($"udp:127.0.0.1:{port}-:53")] });
        FrameGuest guest = new(network);
        guest.Dhcp();
        using UdpClient client = new();
        client.Client.ReceiveTimeout = 120_000;
        client.Send("question"u8.ToArray(), "127.0.0.1", port);
        byte[] frame = guest.Expect(f => FrameGuest.Type(f) == 0x0800 && f[23] == 17 && f[37] == 53, "forwarded datagram");
        Assert.Equal("question", Encoding.ASCII.GetString(frame, 42, 8));
        guest.SendUdp(new IPAddress(frame.AsSpan(26, 4)), 53, (ushort)(frame[34] << 8 | frame[35]), "answer"u8.ToArray());
        IPEndPoint? from = null;
        Assert.Equal("answer", Encoding.ASCII.GetString(client.Receive(ref from)));
    }

    [Fact]
    public void A_port_in_use_is_said_by_name()
    {
        using TcpListener listener = Listen(out ushort port);
        PortForward forward = PortForward.Parse($"tcp:127.0.0.1:{port}-:22");
        using UserNetwork network = Make();
        NetworkException refused = Assert.Throws<NetworkException>(() => network.AddForward(forward));
        Assert.Contains($"tcp:127.0.0.1:{port}-:22: Address already in use", refused.Message, StringComparison.Ordinal);
    }

    [Theory]
    [InlineData("10.0.2.2")]
    [InlineData("127.0.0.1")]
    [InlineData("127.9.9.9")]
    [InlineData("0.0.0.0")]
    [InlineData("10.0.2.3")]
    [InlineData("10.0.2.77")]
    [InlineData("10.0.2.255")]
    public void The_hosts_loopback_is_out_of_reach_unless_asked_for(string address)
    {
        using TcpListener listener = Listen(out ushort port);
        using UserNetwork network = Make(new UserNetworkSettings());
        FrameGuest guest = new(network);
        guest.Dhcp();
        Assert.True(FrameTcp.IsRefused(guest, IPAddress.Parse(address), 41000, port, TimeSpan.FromSeconds(1)));
        Assert.False(listener.Pending());
    }

    [Theory]
    [InlineData("::1")]
    [InlineData("::")]
    [InlineData("::ffff:127.0.0.1")]
    [InlineData("::7f00:1")]
    public void So_are_its_names_in_ipv6(string address)
    {
        byte[] frame = [.. FrameGuest.Ethernet(new byte[6], 0x86dd), 0x60, 0, 0, 0, 0, 0, 59, 64, .. IPAddress.Parse("fec0::9").GetAddressBytes(), .. IPAddress.Parse(address).GetAddressBytes()];
        GuestFilter filter = new(new UserNetworkSettings());
        Assert.False(filter.IsAllowed(frame));
        IPAddress.Parse("2001:db8::2").GetAddressBytes().CopyTo(frame, 38);
        Assert.True(filter.IsAllowed(frame));
    }

    [Theory]
    [InlineData("10.0.2.2")]
    [InlineData("10.0.2.3")]
    [InlineData("10.0.2.99")]
    [InlineData("255.255.255.255")]
    public void Datagrams_to_the_hosts_loopback_go_nowhere(string address)
    {
        using UdpClient server = new(new IPEndPoint(IPAddress.Loopback, 0));
        using UserNetwork network = Make(new UserNetworkSettings());
        FrameGuest guest = new(network);
        guest.Dhcp();
        guest.SendUdp(IPAddress.Parse(address), 5000, (ushort)((IPEndPoint)server.Client.LocalEndPoint!).Port, "secret"u8.ToArray());
        guest.Dhcp();
        Thread.Sleep(200);
        Assert.Equal(0, server.Available);
        Assert.True(network.Counters.Refused > 0);    }

    [Fact]
    public void A_restricted_guest_reaches_nothing_and_is_reached_through_forwards()
    {
        int forwarded = HostPort.Take();
        using TcpListener listener = Listen(out ushort port);
        using UserNetwork network = Make(new UserNetworkSettings { Restricted = true, HostLoopback = true, Forwards = [PortForward.Parse($"tcp:127.0.0.1:{forwarded}-:22")] });
        FrameGuest guest = new(network);
        guest.Dhcp();
        Assert.True(FrameTcp.IsRefused(guest, Gateway, 42000, port, TimeSpan.FromSeconds(1)));
        Assert.False(listener.Pending());
        using TcpClient client = new("127.0.0.1", forwarded);
        FrameTcp connection = FrameTcp.Accept(guest, 22);
        client.Client.Send("x"u8);
        Assert.Single(connection.Receive(1));
    }

    [Fact]
    public void A_guest_without_room_loses_nothing()
    {
        using TcpListener listener = Listen(out ushort port);
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        FrameTcp connection = FrameTcp.Connect(guest, Gateway, 43000, port);
        using Socket server = listener.AcceptSocket();
        guest.SetRoom(false);
        byte[] data = Enumerable.Range(0, 20_000).Select(i => (byte)(i * 13)).ToArray();
        server.Send(data);
        Thread.Sleep(100);
        guest.SetRoom(true);
        Assert.Equal(data, ReceiveAll(connection, data.Length));
        Assert.Equal(0, network.Counters.Dropped);
    }

    /// <summary>A defect behind the library's back ends the network, with a report, and not the process.</summary>
    [Fact]
    public void A_device_that_fails_ends_its_network_alone()
    {
        if (UserNetwork.LibraryVersion is null)
            Assert.Skip("libslirp is not installed (package libslirp0)");
        using BlockingCollection<string> said = [];
        using UserNetwork network = new(new UserNetworkSettings(), said.Add);
        FrameGuest guest = new(network) { Handler = _ => throw new InvalidOperationException("on purpose") };
        byte[] gateway = Gateway.GetAddressBytes();
        guest.SendFrame([
            .. FrameGuest.Ethernet([255, 255, 255, 255, 255, 255], 0x0806), 0, 1, 8, 0, 6, 4, 0, 1, .. FrameGuest.Mac, .. guest.Address.GetAddressBytes(), 0, 0, 0, 0, 0, 0, .. gateway]);
        Assert.True(said.TryTake(out string? report, 120_000, TestContext.Current.CancellationToken));
        Assert.Contains("on purpose", report, StringComparison.Ordinal);
        Assert.Throws<NetworkException>(() => network.Forwards);
    }

    [Fact]
    public void Frames_of_any_content_end_nothing()
    {
        using UserNetwork network = Make();
        FrameGuest guest = new(network);
        guest.Dhcp();
        Random random = new(5);
        byte[] sound = [.. FrameGuest.Ethernet(guest.ResolveGateway(), 0x0800), .. FrameGuest.Ip4(guest.Address, Gateway, 6, 40), .. new byte[40]];
        for (int round = 0; round < 4000; round++)
        {
            byte[] frame = random.Next(3) == 0 ? new byte[random.Next(100)] : (byte[])sound.Clone();
            if (frame != sound && frame.Length > 0)
            {
                for (int change = 0; change < 4; change++)
                    frame[random.Next(frame.Length)] = (byte)random.Next();
                // Not a broadcast storm towards other hosts: the destination stays in the guest's own network.
                if (frame.Length > 33)
                    Gateway.GetAddressBytes().CopyTo(frame, 30);
            }
            VnetHeader header = new() { Flags = (VnetFlags)random.Next(4), ChecksumStart = (ushort)random.Next(200), ChecksumOffset = (ushort)random.Next(200) };
            guest.SendFrame(frame[..random.Next(frame.Length + 1)], header);
        }
        guest.Dhcp();
    }

    [Theory]
    [InlineData("tcp:127.0.0.1:2222-:22", "tcp:127.0.0.1:2222-:22")]
    [InlineData("tcp::2222-:22", "tcp:127.0.0.1:2222-:22")]
    [InlineData(":0.0.0.0:1-10.0.2.20:65535", "tcp:0.0.0.0:1-10.0.2.20:65535")]
    [InlineData("udp:[::1]:53-[fec0::15]:53", "udp:[::1]:53-[fec0::15]:53")]
    public void Forwards_are_read(string text, string expected) => Assert.Equal(expected, PortForward.Parse(text).ToString());

    [Theory]
    [InlineData("")]
    [InlineData("sctp::1-:2")]
    [InlineData("tcp:1-:2")]
    [InlineData("tcp::0-:2")]
    [InlineData("tcp::1-:70000")]
    [InlineData("tcp::1")]
    [InlineData("tcp::1-:2x")]
    [InlineData("tcp:300.1.1.1:1-:2")]
    [InlineData("tcp:[::1]:1-:2")]
    [InlineData("tcp:[::1:1-:2")]
    [InlineData("tcp:1.2.3.4:1-[::1]:2")]
    public void Wrong_forwards_are_refused(string text) => Assert.Throws<FormatException>(() => PortForward.Parse(text));

    private static TcpListener Listen(out ushort port)
    {
        TcpListener listener = new(IPAddress.Loopback, 0);
        listener.Start(1024);
        port = (ushort)((IPEndPoint)listener.LocalEndpoint).Port;
        return listener;
    }

    private static byte[] ReceiveExactly(Socket socket, int count)
    {
        socket.ReceiveTimeout = 120_000;
        byte[] data = new byte[count];
        for (int at = 0; at < count;)
        {
            int got = socket.Receive(data, at, count - at, SocketFlags.None);
            Assert.NotEqual(0, got);
            at += got;
        }
        return data;
    }

    private static byte[] ReceiveAll(FrameTcp connection, int count)
    {
        List<byte> data = [];
        while (data.Count < count && !connection.Ended)
            data.AddRange(connection.Receive(1));
        return [.. data];
    }
}
