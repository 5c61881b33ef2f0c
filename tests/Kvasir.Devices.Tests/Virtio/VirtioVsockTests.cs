using System;
using System.IO;
using System.Linq;
using System.Net.Sockets;
using System.Runtime.InteropServices;
using System.Text;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Virtio;
using Kvasir.Network.Vsock;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>virtio-vsock and its bridge to Unix sockets, packet by packet.</summary>
public sealed class VirtioVsockTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Received = 0x80_0000;
    private const ulong Sent = 0xa0_0000;
    private const int Buffers = 16;
    private const int BufferSize = 4096;
    private const uint Room = 128 * 1024;

    private readonly GuestMemory _memory = new(32ul << 20);
    private readonly string _folder = Directory.CreateTempSubdirectory("kvasir-vsock-").FullName;
    private readonly VsockBridge _bridge;
    private readonly VirtioVsock _device;
    private ModelDriver _driver;
    private ModelQueue[] _queues = [];

    /// <summary>Of the packets that are sent and expected.</summary>
    private ushort _type = VsockPacket.Stream;

    public VirtioVsockTests()
    {
        _bridge = new VsockBridge(Host);
        _device = new VirtioVsock("vsock", _memory, _bridge, cid: 5);
        _driver = new ModelDriver(_device, _memory);
        _device.Connect();
        StartDriver();
    }

    private string Host => Path.Combine(_folder, "s");

    public void Dispose()
    {
        _bridge.Dispose();
        _device.Dispose();
        _memory.Dispose();
        Directory.Delete(_folder, recursive: true);
    }

    private void StartDriver(ulong features = ulong.MaxValue)
    {
        _queues = _driver.Start(features & ~ModelDriver.RingPacked, 64, Rings);
        for (int i = 0; i < Buffers; i++)
            GiveBuffer(i);
        _driver.Kick(0);
    }

    /// <summary>The queue hands out the lowest free descriptor, so that a buffer's place follows from its number.</summary>
    private void GiveBuffer(int number) => Assert.Equal(number, _queues[0].TryAdd([new Part(Received + (ulong)number * BufferSize, BufferSize, true)], indirect: false));

    private void Send(VsockOperation operation, uint hostPort, uint guestPort, ReadOnlySpan<byte> data = default, VsockShutdown flags = default, uint forwarded = 0, ulong cid = 2, uint? length = null, ushort? type = null)
    {
        VsockPacket packet = new()
        {
            SourceCid = 5,
            DestinationCid = cid,
            SourcePort = guestPort,
            DestinationPort = hostPort,
            Length = length ?? (uint)data.Length,
            Type = type ?? _type,
            Operation = operation,
            Flags = (uint)flags,
            BufferSize = Room,
            Forwarded = forwarded,
        };
        byte[] bytes = [.. MemoryMarshal.AsBytes(new ReadOnlySpan<VsockPacket>(in packet)), .. data];
        _memory.TryWrite(new Gpa(Sent), bytes);
        Assert.True(_queues[1].TryAdd([new Part(Sent, (uint)bytes.Length, false)], indirect: false) >= 0);
        _driver.Kick(1);
        _driver.Wait(_queues[1]);
    }

    /// <summary>The next packet that the device gives.</summary>
    private (VsockPacket Packet, byte[] Data) Next()
    {
        (int id, uint written) = _driver.Wait(_queues[0]);
        ulong at = Received + (ulong)id * BufferSize;
        byte[] bytes = new byte[written];
        Assert.True(_memory.TryRead(new Gpa(at), bytes));
        VsockPacket packet = MemoryMarshal.Read<VsockPacket>(bytes);
        Assert.Equal(VsockPacket.HeaderSize + (int)packet.Length, bytes.Length);
        Assert.Equal((VsockPacket.HostCid, 5ul, _type), (packet.SourceCid, packet.DestinationCid, packet.Type));
        GiveBuffer(id);
        _driver.Kick(0);
        return (packet, bytes[VsockPacket.HeaderSize..]);
    }

    private VsockPacket Expect(VsockOperation operation)
    {
        VsockPacket packet = Next().Packet;
        Assert.Equal(operation, packet.Operation);
        return packet;
    }

    private Socket Connect(uint port, out VsockPacket request)
    {
        Socket client = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = 120_000 };
        client.Connect(new UnixDomainSocketEndPoint(Host));
        client.Send(Encoding.ASCII.GetBytes($"CONNECT {port}\nearly"));
        request = Expect(VsockOperation.Request);
        Assert.Equal(port, request.DestinationPort);
        return client;
    }

    private static string Read(Socket socket, int length)
    {
        byte[] bytes = new byte[length];
        int done = 0;
        while (done < length)
        {
            int part = socket.Receive(bytes.AsSpan(done));
            if (part == 0)
                break;
            done += part;
        }
        return Encoding.ASCII.GetString(bytes, 0, done);
    }

    private static Socket Listen(string path, SocketType type = SocketType.Stream)
    {
        Socket listener = new(AddressFamily.Unix, type, ProtocolType.Unspecified) { ReceiveTimeout = 120_000 };
        listener.Bind(new UnixDomainSocketEndPoint(path));
        listener.Listen(4);
        return listener;
    }

    [Fact]
    public void TheGuestLearnsItsContext()
    {
        Assert.Equal(5u, _device.ReadConfig(0, AccessSize.Dword));
        Assert.Equal(0u, _device.ReadConfig(4, AccessSize.Dword));
    }

    [Fact]
    public void AProgramOfTheHostsReachesAPortOfTheGuests()
    {
        using Socket client = Connect(1234, out VsockPacket request);
        Send(VsockOperation.Response, request.SourcePort, 1234);
        string greeting = $"OK {request.SourcePort}\n";
        Assert.Equal(greeting, Read(client, greeting.Length));
        (VsockPacket data, byte[] bytes) = Next();
        Assert.Equal((VsockOperation.Data, "early"), (data.Operation, Encoding.ASCII.GetString(bytes)));
        Send(VsockOperation.Data, request.SourcePort, 1234, "hello"u8);
        Assert.Equal("hello", Read(client, 5));
        client.Shutdown(SocketShutdown.Send);
        Assert.Equal(VsockShutdown.Send, Expect(VsockOperation.Shutdown).Shutdown);
        // The guest's direction is still open.
        Send(VsockOperation.Data, request.SourcePort, 1234, "more"u8);
        Assert.Equal("more", Read(client, 4));
        Send(VsockOperation.Shutdown, request.SourcePort, 1234, flags: VsockShutdown.Both);
        Assert.Equal("", Read(client, 1));
        Expect(VsockOperation.Reset);
    }

    [Fact]
    public void TheGuestReachesAProgramOfTheHosts()
    {
        using Socket listener = Listen($"{Host}_77");
        Send(VsockOperation.Request, 77, 900);
        Assert.Equal((77u, 900u), Expect(VsockOperation.Response) is var packet ? (packet.SourcePort, packet.DestinationPort) : default);
        using Socket program = listener.Accept();
        program.ReceiveTimeout = 120_000;
        Send(VsockOperation.Data, 77, 900, "question"u8);
        Assert.Equal("question", Read(program, 8));
        program.Send("answer"u8);
        Assert.Equal("answer", Encoding.ASCII.GetString(Next().Data));
        program.Dispose();
        Assert.Equal(VsockShutdown.Both, Expect(VsockOperation.Shutdown).Shutdown);
        Send(VsockOperation.Shutdown, 77, 900, flags: VsockShutdown.Both);
        Expect(VsockOperation.Reset);
        // The ports are free again.
        Send(VsockOperation.Request, 77, 900);
        Expect(VsockOperation.Response);
    }

    [Fact]
    public void MessagesOfTheHostsStayWhole()
    {
        using Socket client = ConnectForMessages(1234);
        VsockPacket request = Expect(VsockOperation.Request);
        Send(VsockOperation.Response, request.SourcePort, 1234);
        Assert.Equal($"OK {request.SourcePort}\n", ReadMessage(client));
        byte[] longer = new byte[10_000];
        new Random(1).NextBytes(longer);
        client.Send("first"u8);
        client.Send("second"u8);
        client.Send(longer);
        Assert.Equal("first", Encoding.ASCII.GetString(NextMessage(1)));
        Assert.Equal("second", Encoding.ASCII.GetString(NextMessage(1)));
        // In as many packets as the driver's buffers make of it.
        Assert.Equal(longer, NextMessage(3));
        client.Shutdown(SocketShutdown.Send);
        Assert.Equal(VsockShutdown.Send, Expect(VsockOperation.Shutdown).Shutdown);
        Send(VsockOperation.Shutdown, request.SourcePort, 1234, flags: VsockShutdown.Both);
        Expect(VsockOperation.Reset);
    }

    [Fact]
    public void MessagesOfTheGuestsStayWhole()
    {
        const VsockShutdown last = (VsockShutdown)VsockPacket.EndOfMessage;
        _type = VsockPacket.SequencedPackets;
        using Socket listener = Listen($"{Host}_77", SocketType.Seqpacket);
        Send(VsockOperation.Request, 77, 900);
        Expect(VsockOperation.Response);
        using Socket program = listener.Accept();
        program.ReceiveTimeout = 120_000;
        Send(VsockOperation.Data, 77, 900, "one"u8, last);
        Send(VsockOperation.Data, 77, 900, "two, "u8);
        Send(VsockOperation.Data, 77, 900, "in pieces"u8, last);
        Assert.Equal("one", ReadMessage(program));
        Assert.Equal("two, in pieces", ReadMessage(program));
        // Around the end of what the bridge keeps, many times.
        byte[] message = new byte[7001];
        for (int i = 0; i < 40; i++)
        {
            message.AsSpan().Fill((byte)i);
            message[0] = (byte)'a';
            for (int at = 0; at < message.Length; at += 3000)
            {
                int length = Math.Min(3000, message.Length - at);
                Send(VsockOperation.Data, 77, 900, message.AsSpan(at, length), at + length == message.Length ? last : default);
            }
            Assert.Equal(Encoding.ASCII.GetString(message), ReadMessage(program));
        }
        // What has no end is not delivered, and does not keep the connection.
        Send(VsockOperation.Data, 77, 900, "unfinished"u8);
        Send(VsockOperation.Shutdown, 77, 900, flags: VsockShutdown.Both);
        Assert.Equal("", ReadMessage(program));
        while (Next().Packet.Operation is var operation && operation != VsockOperation.Reset)
            Assert.Equal(VsockOperation.CreditUpdate, operation);
    }

    [Fact]
    public void AMessageWaitsForTheGuestsRoomAndOneThatIsTooLongEndsTheConnection()
    {
        using Socket client = ConnectForMessages(1);
        VsockPacket request = Expect(VsockOperation.Request);
        Send(VsockOperation.Response, request.SourcePort, 1);
        ReadMessage(client);
        byte[] message = new byte[60_000];
        Thread writer = new(() =>
        {
            for (int i = 0; i < 3; i++)
                client.Send(message);
        });
        writer.Start();
        uint got = 0;
        while (got < Room)
            got += Next().Packet.Length;
        Assert.Equal(Room, got);
        Send(VsockOperation.CreditRequest, request.SourcePort, 1);
        Expect(VsockOperation.CreditUpdate);
        Send(VsockOperation.CreditUpdate, request.SourcePort, 1, forwarded: Room);
        VsockPacket packet = default;
        while (got < 3 * message.Length)
        {
            packet = Next().Packet;
            got += packet.Length;
        }
        Assert.Equal((3u * (uint)message.Length, VsockPacket.EndOfMessage), (got, packet.Flags));
        writer.Join();
        client.Send(new byte[65_537]);
        Expect(VsockOperation.Reset);
    }

    [Fact]
    public void KindsOfSocketsAreNotMixed()
    {
        using Socket listener = Listen($"{Host}_77");
        Send(VsockOperation.Request, 77, 900);
        Expect(VsockOperation.Response);
        using Socket program = listener.Accept();
        program.ReceiveTimeout = 120_000;
        _type = VsockPacket.SequencedPackets;
        Send(VsockOperation.Data, 77, 900, "message"u8);
        Expect(VsockOperation.Reset);
        // A program that listens for a row of bytes gets no messages.
        Send(VsockOperation.Request, 77, 901);
        Expect(VsockOperation.Reset);
        _type = VsockPacket.Stream;
        Send(VsockOperation.Data, 77, 900, "bytes"u8);
        Assert.Equal("bytes", Read(program, 5));
        // Nor does a driver that knows of none.
        StartDriver(ulong.MaxValue & ~2ul);
        _type = VsockPacket.SequencedPackets;
        Send(VsockOperation.Request, 77, 900);
        Expect(VsockOperation.Reset);
        using Socket client = new(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified) { ReceiveTimeout = 120_000 };
        client.Connect(new UnixDomainSocketEndPoint($"{Host}.seqpacket"));
        Assert.Equal("", ReadMessage(client));
    }

    private Socket ConnectForMessages(uint port)
    {
        _type = VsockPacket.SequencedPackets;
        Socket client = new(AddressFamily.Unix, SocketType.Seqpacket, ProtocolType.Unspecified) { ReceiveTimeout = 120_000 };
        client.Connect(new UnixDomainSocketEndPoint($"{Host}.seqpacket"));
        client.Send(Encoding.ASCII.GetBytes($"CONNECT {port}"));
        return client;
    }

    /// <summary>The next message for the guest, which comes in so many packets.</summary>
    private byte[] NextMessage(int packets)
    {
        byte[] message = [];
        for (int i = 1; i <= packets; i++)
        {
            (VsockPacket packet, byte[] data) = Next();
            Assert.Equal((VsockOperation.Data, i == packets ? VsockPacket.EndOfMessage : 0u), (packet.Operation, packet.Flags));
            message = [.. message, .. data];
        }
        return message;
    }

    private static string ReadMessage(Socket socket)
    {
        byte[] bytes = new byte[1 << 17];
        return Encoding.ASCII.GetString(bytes, 0, socket.Receive(bytes));
    }

    [Fact]
    public void NoMoreIsSentThanTheGuestHasRoomFor()
    {
        using Socket client = Connect(1, out VsockPacket request);
        Send(VsockOperation.Response, request.SourcePort, 1);
        byte[] bulk = new byte[2 * Room];
        new Random(3).NextBytes(bulk);
        using Socket sender = client;
        Thread writer = new(() => sender.Send(bulk));
        writer.Start();
        MemoryStream got = new();
        // The five bytes that came with the greeting count as well.
        while (got.Length < Room)
            got.Write(Next().Data);
        Assert.Equal(Room, got.Length);
        Send(VsockOperation.CreditRequest, request.SourcePort, 1);
        // Answered, and with nothing in between, though the program has more to send.
        Expect(VsockOperation.CreditUpdate);
        Send(VsockOperation.CreditUpdate, request.SourcePort, 1, forwarded: Room);
        while (got.Length < 2 * Room)
            got.Write(Next().Data);
        Send(VsockOperation.CreditUpdate, request.SourcePort, 1, forwarded: 2 * Room);
        while (got.Length < bulk.Length + 5)
            got.Write(Next().Data);
        writer.Join();
        Assert.Equal([.. "early"u8, .. bulk], got.ToArray());
    }

    [Fact]
    public void AGuestThatSendsMoreThanThereIsRoomForLosesItsConnection()
    {
        using Socket listener = Listen($"{Host}_7");
        Send(VsockOperation.Request, 7, 8);
        uint room = Expect(VsockOperation.Response).BufferSize;
        // Nobody reads: the socket's own buffer fills up first, then the bridge's.
        byte[] part = new byte[32 * 1024];
        int parts = 0;
        VsockOperation answer = VsockOperation.CreditUpdate;
        while (answer == VsockOperation.CreditUpdate)
        {
            Send(VsockOperation.Data, 7, 8, part);
            Assert.True(++parts < 1000, "a guest may send without end");
            while (answer == VsockOperation.CreditUpdate && _queues[0].TryTake(out int id, out uint _))
            {
                _memory.TryRead(new Gpa(Received + (ulong)id * BufferSize), out VsockPacket packet);
                answer = packet.Operation;
                GiveBuffer(id);
                _driver.Kick(0);
            }
        }
        Assert.Equal(VsockOperation.Reset, answer);
        Assert.True(parts * part.Length > room);
    }

    [Theory]
    [InlineData(VsockOperation.Data, 2)]
    [InlineData(VsockOperation.Response, 2)]
    [InlineData(VsockOperation.Shutdown, 2)]
    [InlineData((VsockOperation)99, 2)]
    public void WhatBelongsToNoConnectionIsReset(VsockOperation operation, ulong cid)
    {
        Send(operation, 11, 12, cid: cid);
        VsockPacket reset = Expect(VsockOperation.Reset);
        Assert.Equal((11u, 12u), (reset.SourcePort, reset.DestinationPort));
        // And nobody listens there.
        Send(VsockOperation.Request, 13, 14);
        Assert.Equal(13u, Expect(VsockOperation.Reset).SourcePort);
    }

    [Theory]
    [InlineData(4000)]
    [InlineData(6)]
    [InlineData(uint.MaxValue)]
    public void ALengthThatIsNotThereEndsTheConnection(uint length)
    {
        using Socket listener = Listen($"{Host}_7");
        Send(VsockOperation.Request, 7, 8);
        Expect(VsockOperation.Response);
        Send(VsockOperation.Data, 7, 8, "short"u8, length: length);
        Expect(VsockOperation.Reset);
    }

    [Theory]
    [InlineData("GET / HTTP/1.1\r\n\r\n")]
    [InlineData("CONNECT x\n")]
    [InlineData("CONNECT 4294967296\n")]
    [InlineData("CONNECT 00000000000000000000000000000000000000")]
    public void AClientThatSaysSomethingElseIsSentAway(string text)
    {
        using Socket client = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified) { ReceiveTimeout = 120_000 };
        client.Connect(new UnixDomainSocketEndPoint(Host));
        client.Send(Encoding.ASCII.GetBytes(text));
        int length;
        try
        {
            length = client.Receive(new byte[1]);
        }
        catch (SocketException e) when (e.SocketErrorCode == SocketError.ConnectionReset)
        {
            // What it said was not read to the end.
            length = 0;
        }
        Assert.Equal(0, length);
        using Socket other = Connect(9, out _);
    }

    /// <summary>The host's sockets are not in a saved state: the driver is told that its connections are gone, and what it sends on them is refused.</summary>
    [Theory]
    [InlineData(5, false)]
    [InlineData(5, true)]
    [InlineData(6, false)]
    public void ARestoredGuestHearsThatItsConnectionsAreGone(ulong cid, bool buffersComeLater)
    {
        const ulong events = 0xc0_0000;
        using Socket listener = Listen($"{Host}_9");
        Send(VsockOperation.Request, 9, 1234);
        Expect(VsockOperation.Response);
        if (!buffersComeLater)
            Assert.True(_queues[2].TryAdd([new Part(events, 4, true)], indirect: false) >= 0);
        _driver.Kick(2);
        _device.Pause();
        VirtioDevice.State saved = _device.Save();
        _memory.TryWrite(new Gpa(events), 0xffff_ffffu);
        using VsockBridge bridge = new(Path.Combine(_folder, "second"));
        using VirtioVsock second = new("second", _memory, bridge, cid);
        second.Connect();
        ModelDriver first = _driver;
        _driver = new ModelDriver(second, _memory);
        second.Pause();
        second.Restore(saved);
        Assert.Equal(cid, _driver[0x100]);
        Assert.False(_queues[2].TryTake(out _, out _));
        second.Resume();
        if (buffersComeLater)
        {
            Assert.True(_queues[2].TryAdd([new Part(events, 4, true)], indirect: false) >= 0);
            _driver.Kick(2);
        }
        Assert.Equal(4u, _driver.Wait(_queues[2]).Written);
        Assert.True(_memory.TryRead(new Gpa(events), out uint kind));
        Assert.Equal(0u, kind);
        if (cid == 5)
        {
            Send(VsockOperation.Data, 9, 1234, "lost"u8);
            Assert.Equal(1234u, Expect(VsockOperation.Reset).DestinationPort);
        }
        // Once is enough.
        Assert.True(_queues[2].TryAdd([new Part(events, 4, true)], indirect: false) >= 0);
        _driver.Kick(2);
        second.Pause();
        Assert.False(_queues[2].TryTake(out _, out _));
        _driver = first;
        bridge.Dispose();
    }

    [Fact]
    public void ADriversResetEndsAllConnections()
    {
        using Socket client = Connect(1234, out VsockPacket request);
        Send(VsockOperation.Response, request.SourcePort, 1234);
        string greeting = $"OK {request.SourcePort}\n";
        Assert.Equal(greeting, Read(client, greeting.Length));
        Next();
        StartDriver();
        Assert.Equal("", Read(client, 1));
        using Socket again = Connect(1235, out _);
    }

    [Fact]
    public void AnythingAGuestSendsIsSurvived()
    {
        using Socket listener = Listen($"{Host}_1");
        using Socket messages = Listen($"{Host}_2", SocketType.Seqpacket);
        Random random = new(11);
        byte[] bytes = new byte[256];
        for (int i = 0; i < 5000; i++)
        {
            random.NextBytes(bytes);
            VsockPacket packet = MemoryMarshal.Read<VsockPacket>(bytes);
            if (random.Next(8) != 0)
            {
                packet.SourceCid = 5;
                packet.DestinationCid = 2;
                packet.SourcePort = (uint)random.Next(3);
                packet.DestinationPort = (uint)random.Next(3);
                packet.Length = (uint)random.Next(300);
                packet.Type = (ushort)random.Next(1, 3);
                packet.Operation = (VsockOperation)random.Next(9);
            }
            MemoryMarshal.Write(bytes, packet);
            _memory.TryWrite(new Gpa(Sent), bytes);
            Assert.True(_queues[1].TryAdd([new Part(Sent, (uint)random.Next(1, bytes.Length), false)], indirect: false) >= 0);
            _driver.Kick(1);
            _driver.Wait(_queues[1]);
            while (_queues[0].TryTake(out int id, out uint _))
            {
                GiveBuffer(id);
                _driver.Kick(0);
            }
        }
        Assert.Equal(15u, _driver.Status);
    }
}
