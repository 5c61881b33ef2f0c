using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Net;
using System.Net.Sockets;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Nbd;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>NBD clients and servers that break the protocol, or break off, byte by byte as they would send it.</summary>
public sealed class NbdHostileTests
{
    private static readonly TimeSpan Long = TimeSpan.FromSeconds(30);

    [Fact]
    public async Task A_client_that_breaks_off_within_a_write_leaves_the_server_free()
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        NbdServer server = Serve(folder["s"], node, mostConnections: 1);
        using (Socket socket = await ConnectAsync(folder["s"]))
        {
            await AskAsync(socket, []);
            byte[] request = Request(1, 0, 65536);
            await socket.SendAsync(request);
            await socket.SendAsync(new byte[1000]);
        }
        // The only place is free again, and nothing of the broken request holds the server at its end.
        await using (NbdClient next = await NbdClient.ConnectAsync(Address(folder["s"]), readOnly: true).AsTask().WaitAsync(Long))
            Assert.Equal(1 << 20, next.Length);
        await server.DisposeAsync().AsTask().WaitAsync(Long);
    }

    [Fact]
    public async Task A_client_without_a_place_waits_for_one()
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        await using NbdServer server = Serve(folder["s"], node, mostConnections: 1);
        NbdClient first = await NbdClient.ConnectAsync(Address(folder["s"]), readOnly: true);
        Task<NbdClient> second = NbdClient.ConnectAsync(Address(folder["s"]), readOnly: true).AsTask();
        byte[] data = new byte[512];
        await first.ReadAsync(0, data);
        Assert.False(second.IsCompleted);
        await first.DisposeAsync();
        await using NbdClient served = await second.WaitAsync(Long);
        await served.ReadAsync(0, data);
    }

    [Fact]
    public async Task A_client_that_says_nothing_does_not_keep_its_place()
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        await using NbdServer server = Serve(folder["s"], node, mostConnections: 1);
        server.NegotiationLimit = TimeSpan.FromMilliseconds(300);
        using Socket silent = await ConnectAsync(folder["s"]);
        server.NegotiationLimit = TimeSpan.FromSeconds(30);
        await using NbdClient client = await NbdClient.ConnectAsync(Address(folder["s"]), readOnly: true).AsTask().WaitAsync(Long);
        Assert.Equal(1 << 20, client.Length);
    }

    [Fact]
    public async Task A_socket_left_behind_is_replaced_and_nothing_else_is()
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        using (Socket gone = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified))
        {
            // Its name stays, as after a kill: the process that closes a socket does not remove it.
            gone.Bind(new UnixDomainSocketEndPoint(folder["other"]));
            gone.Listen();
            File.Move(folder["other"], folder["s"]);
        }
        await using (NbdServer server = Serve(folder["s"], node))
        {
            await using NbdClient client = await NbdClient.ConnectAsync(Address(folder["s"]), readOnly: true);
            Assert.Throws<BlockException>(() => Serve(folder["s"], node));
        }
        await File.WriteAllTextAsync(folder["s"], "not a socket");
        Assert.Throws<BlockException>(() => Serve(folder["s"], node));
        Assert.Equal("not a socket", await File.ReadAllTextAsync(folder["s"]));
    }

    [Theory]
    [InlineData(0, 1 << 20, 512, 22)]
    [InlineData(0, 512 << 10, 1 << 20, 22)]
    [InlineData(0, -512, 1024, 22)]
    [InlineData(1, (1 << 20) - 511, 512, 28)]
    [InlineData(4, 1 << 20, 512, 28)]
    [InlineData(6, long.MaxValue - 10, 512, 28)]
    [InlineData(99, 0, 512, 22)]
    [InlineData(7, 0, 512, 22)]
    public async Task Requests_outside_the_export_are_refused_one_by_one(int command, long offset, int length, uint expected)
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 20, true);
        await using NbdServer server = Serve(folder["s"], node);
        using Socket socket = await ConnectAsync(folder["s"]);
        await AskAsync(socket, []);
        await socket.SendAsync(Request((ushort)command, offset, length));
        if (command == 1)
            await socket.SendAsync(new byte[length]);
        Assert.Equal(expected, BinaryPrimitives.ReadUInt32BigEndian((await ReceiveAsync(socket, 16)).AsSpan(4)));
        // The connection lives on.
        await socket.SendAsync(Request(0, 0, 512));
        byte[] good = await ReceiveAsync(socket, 16 + 512);
        Assert.Equal(0u, BinaryPrimitives.ReadUInt32BigEndian(good.AsSpan(4)));
    }

    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    public async Task A_request_beyond_the_protocols_bound_ends_the_connection(int command)
    {
        using TestFolder folder = new();
        await using BlockNode node = new Filters.NullNode(1 << 30, true);
        await using NbdServer server = Serve(folder["s"], node);
        using Socket socket = await ConnectAsync(folder["s"]);
        await AskAsync(socket, []);
        await socket.SendAsync(Request((ushort)command, 0, (32 << 20) + 1));
        Assert.Equal(0, await socket.ReceiveAsync(new byte[1]).WaitAsync(Long));
    }

    [Fact]
    public async Task A_read_only_export_takes_no_write_of_any_kind()
    {
        using TestFolder folder = new();
        RecordingFile file = new(new byte[1 << 20]);
        await using NbdServer server = Serve(folder["s"], file, readOnly: true);
        using Socket socket = await ConnectAsync(folder["s"]);
        await AskAsync(socket, []);
        foreach (ushort command in (ushort[])[1, 4, 6])
        {
            await socket.SendAsync(Request(command, 0, 512));
            if (command == 1)
                await socket.SendAsync(new byte[512]);
            Assert.Equal(1u, BinaryPrimitives.ReadUInt32BigEndian((await ReceiveAsync(socket, 16)).AsSpan(4)));
        }
        Assert.Empty(file.Log);
    }

    [Fact]
    public async Task A_write_with_fua_is_flushed_before_it_is_answered()
    {
        using TestFolder folder = new();
        RecordingFile file = new(new byte[1 << 20]);
        // A format in between, that answers for the file's flush.
        await using RawImage raw = new(file);
        await using NbdServer server = Serve(folder["s"], new FlushCounter(raw));
        using Socket socket = await ConnectAsync(folder["s"]);
        await AskAsync(socket, []);
        foreach ((ushort command, int flushes) in ((ushort, int)[])[(1, 1), (4, 2), (6, 3)])
        {
            byte[] request = Request(command, 0, 512);
            BinaryPrimitives.WriteUInt16BigEndian(request.AsSpan(4), 1);
            await socket.SendAsync(request);
            if (command == 1)
                await socket.SendAsync(new byte[512]);
            Assert.Equal(0u, BinaryPrimitives.ReadUInt32BigEndian((await ReceiveAsync(socket, 16)).AsSpan(4)));
            Assert.Equal(flushes, file.Log.FindAll(entry => entry.Offset == -1).Count);
        }
    }

    [Fact]
    public async Task A_clients_flush_and_stable_writes_reach_the_file()
    {
        using TestFolder folder = new();
        RecordingFile file = new(new byte[1 << 20]);
        await using NbdServer server = Serve(folder["s"], new FlushCounter(new RawImage(file)));
        await using NbdClient client = await NbdClient.ConnectAsync(Address(folder["s"]), readOnly: false);
        int Flushes() => file.Log.FindAll(entry => entry.Offset == -1).Count;
        await client.WriteAsync(0, new byte[512]);
        Assert.Equal(0, Flushes());
        await client.FlushAsync();
        Assert.Equal(1, Flushes());
        await client.WriteAsync(0, new byte[512], WriteFlags.ForceUnitAccess);
        Assert.Equal(2, Flushes());
        await client.WriteZeroesAsync(0, 512, ZeroFlags.ForceUnitAccess);
        Assert.Equal(3, Flushes());
        await client.DiscardAsync(0, 4096);
        // Zeros that may be a hole, and zeros that may not, are told apart.
        NoHoles holes = new();
        await using NbdServer other = Serve(folder["t"], holes);
        await using NbdClient filling = await NbdClient.ConnectAsync(Address(folder["t"]), readOnly: false);
        await filling.WriteZeroesAsync(0, 512, ZeroFlags.MayUnmap);
        await filling.WriteZeroesAsync(0, 512, ZeroFlags.None);
        Assert.Equal([ZeroFlags.MayUnmap, ZeroFlags.None], holes.Seen);
        BlockStatus status = await filling.StatusAsync(0, 4096);
        Assert.True(status is { IsZero: true, IsData: false });
        status = await filling.StatusAsync(8192, 4096);
        Assert.True(status is { IsZero: false, IsData: true });
    }

    /// <summary>Answers to a read of 1024 bytes at 0: what is right, and what must fail it instead of leaving it with what was in memory before.</summary>
    [Theory]
    [InlineData("data 0 1024 done", true)]
    [InlineData("data 0 512, data 512 512 done", true)]
    [InlineData("data 512 512, data 0 512 done", true)]
    [InlineData("data 512 512, hole 0 512, none done", true)]
    [InlineData("none done", false)]
    [InlineData("data 0 512 done", false)]
    [InlineData("data 512 512 done", false)]
    [InlineData("hole 0 1023 done", false)]
    [InlineData("data 0 1024, data 0 1 done", false)]
    [InlineData("data 1 1024 done", false)]
    [InlineData("data -1 512 done", false)]
    [InlineData("hole 512 4294967295 done", false)]
    [InlineData("data 0 1024, error done", false)]
    [InlineData("error, data 0 1024 done", false)]
    [InlineData("status done", false)]
    [InlineData("wrong cookie", false)]
    [InlineData("wrong magic", false)]
    [InlineData("simple", true)]
    [InlineData("simple error", false)]
    [InlineData("simple short", false)]
    [InlineData("short data", false)]
    public async Task Short_and_crooked_answers_fail_the_read(string answer, bool good)
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script(answer, cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        byte[] buffer = new byte[1024];
        Array.Fill(buffer, (byte)0xee);
        Task read = client.ReadAsync(0, buffer).AsTask().WaitAsync(Long);
        if (good)
        {
            await read;
            Assert.DoesNotContain((byte)0xee, buffer);
        }
        else
        {
            Assert.IsType<BlockException>(await Record.ExceptionAsync(() => read));
        }
    }

    /// <summary>Parts that overlap add up to the right size: what they leave out is zero, and nothing that was in memory before.</summary>
    [Fact]
    public async Task What_an_answer_leaves_out_never_shows_old_memory()
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script("data 512 512, data 512 512 done", cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        byte[] buffer = new byte[1024];
        Array.Fill(buffer, (byte)0xee);
        await client.ReadAsync(0, buffer);
        Assert.DoesNotContain((byte)0xee, buffer);
    }

    /// <summary>A request that was answered is over: its memory may be another one's by now.</summary>
    [Theory]
    [InlineData("data 0 1024 done, data 0 1024 done")]
    [InlineData("data 0 1024 done, error done")]
    [InlineData("data 0 1024 done, none done")]
    public async Task A_second_answer_ends_the_connection(string answer)
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script(answer, cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        await client.ReadAsync(0, new byte[1024]).AsTask().WaitAsync(Long);
        await Assert.ThrowsAsync<BlockException>(async () => await client.ReadAsync(0, new byte[1024]).AsTask().WaitAsync(Long));
    }

    [Theory]
    [InlineData("status 0 0")]
    [InlineData("other context")]
    [InlineData("none done")]
    [InlineData("simple")]
    public async Task A_status_that_says_nothing_fails(string answer)
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script(answer, cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        await Assert.ThrowsAsync<BlockException>(async () => await client.StatusAsync(0, 4096).AsTask().WaitAsync(Long));
    }

    [Fact]
    public async Task A_status_never_says_more_than_was_asked()
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script("status 4294967295 3", cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        BlockStatus status = await client.StatusAsync(0, 4096);
        Assert.Equal(4096, status.Length);
        Assert.True(status.IsZero);
    }

    [Theory]
    [InlineData(0, true, false)]
    [InlineData(1, false, false)]
    [InlineData(2, false, true)]
    [InlineData(3, false, true)]
    public async Task A_status_is_told_as_the_server_tells_it(int flags, bool data, bool zero)
    {
        using FakeServer server = new();
        server.Answer = (cookie, _, _) => Script($"status 1024 {flags}", cookie);
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        BlockStatus status = await client.StatusAsync(0, 4096);
        Assert.Equal((1024, data, zero), (status.Length, status.IsData, status.IsZero));
    }

    [Fact]
    public async Task The_sizes_that_a_server_takes_are_kept_to()
    {
        using FakeServer server = new() { Least = 4096, Most = 8192 };
        List<(long Offset, int Length)> seen = [];
        server.Answer = (cookie, offset, length) =>
        {
            lock (seen)
                seen.Add((offset, length));
            return Script($"data {offset} {length} done", cookie);
        };
        await using NbdClient client = await NbdClient.ConnectAsync(server.Address, readOnly: false);
        await client.ReadAsync(5000, new byte[20000]);
        Assert.Equal([(4096, 8192), (12288, 8192), (20480, 8192)], seen);
    }

    [Theory]
    [InlineData(3u, 8192u, 1 << 20)]
    [InlineData(0u, 8192u, 1 << 20)]
    [InlineData(1u << 20, 1u << 20, 1 << 20)]
    [InlineData(4096u, 512u, 1 << 20)]
    [InlineData(4096u, 5000u, 1 << 20)]
    [InlineData(4096u, 8192u, (1 << 20) + 512)]
    [InlineData(1u, 8192u, -1)]
    public async Task Impossible_exports_are_refused(uint least, uint most, long size)
    {
        using FakeServer server = new() { Least = least, Most = most, Size = size };
        await Assert.ThrowsAsync<BlockException>(async () => await NbdClient.ConnectAsync(server.Address, readOnly: false).AsTask().WaitAsync(Long));
    }

    [Theory]
    [InlineData("nbd:localhost:99999")]
    [InlineData("nbd:localhost:0")]
    [InlineData("nbd:localhost:-1")]
    [InlineData("nbd:localhost")]
    [InlineData("nbd://localhost:99999/x")]
    [InlineData("nbd+unix:///x")]
    [InlineData("nbd+unix:///x?socket=")]
    [InlineData("nbd:unix:")]
    [InlineData("nbd:unix:/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")]
    public async Task Addresses_that_cannot_be_are_told_in_a_line(string address)
    {
        (int code, string text) = await Peer.ImgAsync("info", address);
        Assert.Equal(1, code);
        Assert.StartsWith("qemu-img: Could not open", text, StringComparison.Ordinal);
        Assert.DoesNotContain("Parameter '", text, StringComparison.Ordinal);
    }

    /// <summary>A server of one export without a name.</summary>
    private static NbdServer Serve(string socket, BlockNode node, bool readOnly = false, int mostConnections = 0) =>
        NbdServer.Start(new UnixDomainSocketEndPoint(socket), [new NbdExport(string.Empty, node, readOnly)], mostConnections: mostConnections);

    private static NbdAddress Address(string socket) => NbdAddress.Parse($"nbd+unix:///?socket={socket}");

    private static async Task<Socket> ConnectAsync(string path)
    {
        Socket socket = new(AddressFamily.Unix, SocketType.Stream, ProtocolType.Unspecified);
        await socket.ConnectAsync(new UnixDomainSocketEndPoint(path));
        await ReceiveAsync(socket, 18);
        return socket;
    }

    /// <summary>Asks for the default export by its name.</summary>
    private static async Task AskAsync(Socket socket, byte[] name)
    {
        await socket.SendAsync(new byte[] { 0, 0, 0, 3 });
        byte[] option = new byte[16 + name.Length];
        "IHAVEOPT"u8.CopyTo(option);
        option[11] = 1;
        option[15] = (byte)name.Length;
        name.CopyTo(option, 16);
        await socket.SendAsync(option);
        await ReceiveAsync(socket, 10);
    }

    private static byte[] Request(ushort command, long offset, int length)
    {
        byte[] request = new byte[28];
        BinaryPrimitives.WriteUInt32BigEndian(request, 0x25609513);
        BinaryPrimitives.WriteUInt16BigEndian(request.AsSpan(6), command);
        BinaryPrimitives.WriteInt64BigEndian(request.AsSpan(16), offset);
        BinaryPrimitives.WriteInt32BigEndian(request.AsSpan(24), length);
        return request;
    }

    private static async Task<byte[]> ReceiveAsync(Socket socket, int length)
    {
        byte[] data = new byte[length];
        for (int done = 0; done < length;)
        {
            int part = await socket.ReceiveAsync(data.AsMemory(done)).AsTask().WaitAsync(Long);
            Assert.True(part > 0, "the other side hung up");
            done += part;
        }
        return data;
    }

    /// <summary>An answer from words: chunks "data AT SIZE", "hole AT SIZE", "status SIZE FLAGS", "none", "error", each with "done" where it ends the answer.</summary>
    private static byte[] Script(string words, ulong cookie)
    {
        using MemoryStream all = new();
        foreach (string text in words.Split(", "))
        {
            string[] word = text.Split(' ');
            long first = word.Length > 1 && long.TryParse(word[1], out long at) ? at : 0;
            uint second = word.Length > 2 && uint.TryParse(word[2], out uint size) ? size : 0;
            bool done = word[^1] == "done";
            switch (word[0])
            {
                case "simple":
                    byte[] simple = new byte[16 + (text == "simple" ? 1024 : text == "simple short" ? 100 : 0)];
                    BinaryPrimitives.WriteUInt32BigEndian(simple, 0x67446698);
                    simple[7] = (byte)(text == "simple error" ? 5 : 0);
                    BinaryPrimitives.WriteUInt64BigEndian(simple.AsSpan(8), cookie);
                    all.Write(simple);
                    break;
                case "wrong":
                    all.Write(Chunk(word[1] == "cookie" ? cookie + 77 : cookie, 0, true, []));
                    if (word[1] == "magic")
                        all.GetBuffer()[0] ^= 0xff;
                    break;
                case "short":
                    all.Write(Chunk(cookie, 1, true, [.. Big(0), .. new byte[1024]]).AsSpan(0, 300));
                    break;
                case "data":
                    all.Write(Chunk(cookie, 1, done, [.. Big(first), .. new byte[second]]));
                    break;
                case "hole":
                    all.Write(Chunk(cookie, 2, done, [.. Big(first), .. Big(second).AsSpan(4)]));
                    break;
                case "status":
                    all.Write(Chunk(cookie, 5, true, [0, 0, 0, 1, .. Big(first).AsSpan(4), .. Big(second).AsSpan(4)]));
                    break;
                case "other":
                    all.Write(Chunk(cookie, 5, true, [0, 0, 0, 2, 0, 0, 16, 0, 0, 0, 0, 0]));
                    break;
                case "error":
                    all.Write(Chunk(cookie, 0x8001, done, [0, 0, 0, 5, 0, 0]));
                    break;
                default:
                    all.Write(Chunk(cookie, 0, done, []));
                    break;
            }
        }
        return all.ToArray();
    }

    private static byte[] Big(long value)
    {
        byte[] bytes = new byte[8];
        BinaryPrimitives.WriteInt64BigEndian(bytes, value);
        return bytes;
    }

    private static byte[] Chunk(ulong cookie, ushort type, bool done, byte[] payload)
    {
        byte[] chunk = new byte[20 + payload.Length];
        BinaryPrimitives.WriteUInt32BigEndian(chunk, 0x668e33ef);
        BinaryPrimitives.WriteUInt16BigEndian(chunk.AsSpan(4), (ushort)(done ? 1 : 0));
        BinaryPrimitives.WriteUInt16BigEndian(chunk.AsSpan(6), type);
        BinaryPrimitives.WriteUInt64BigEndian(chunk.AsSpan(8), cookie);
        BinaryPrimitives.WriteInt32BigEndian(chunk.AsSpan(16), payload.Length);
        payload.CopyTo(chunk, 20);
        return chunk;
    }

    /// <summary>A node that hands on what it gets; writes that must be stable are flushed by it, as formats do.</summary>
    private sealed class FlushCounter(BlockNode below) : BlockNode
    {
        public override string Driver => "test";

        public override BlockNode File => below;

        public override long Length => below.Length;

        protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) => below.ReadAsync(offset, buffer, cancellation);

        protected override async ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation)
        {
            await below.WriteAsync(offset, buffer, WriteFlags.None, cancellation);
            if ((flags & WriteFlags.ForceUnitAccess) != 0)
                await below.FlushAsync(cancellation);
        }
    }

    /// <summary>Remembers how zeros were asked for; its first 8 KiB are a hole.</summary>
    private sealed class NoHoles : BlockNode
    {
        public List<ZeroFlags> Seen { get; } = [];

        public override string Driver => "test";

        public override long Length => 1 << 20;

        protected override ValueTask ReadCoreAsync(long offset, Memory<byte> buffer, CancellationToken cancellation) => default;

        protected override ValueTask WriteCoreAsync(long offset, ReadOnlyMemory<byte> buffer, WriteFlags flags, CancellationToken cancellation) => default;

        protected override ValueTask WriteZeroesCoreAsync(long offset, long length, ZeroFlags flags, CancellationToken cancellation)
        {
            Seen.Add(flags);
            return default;
        }

        protected override ValueTask<BlockStatus> StatusCoreAsync(long offset, long length, CancellationToken cancellation) => offset < 8192
            ? new(new BlockStatus(Math.Min(length, 8192 - offset), BlockFlags.Zero | BlockFlags.Allocated))
            : new(new BlockStatus(length, BlockFlags.Data | BlockFlags.Allocated));
    }

    /// <summary>A server that negotiates as it is told, and answers each request with the bytes it is given.</summary>
    private sealed class FakeServer : IDisposable
    {
        private readonly TcpListener _listener = new(IPAddress.Loopback, 0);

        public FakeServer()
        {
            _listener.Start();
            _ = Task.Run(ServeAsync);
        }

        public Func<ulong, long, int, byte[]> Answer { get; set; } = (_, _, _) => [];

        public uint Least { get; init; } = 1;

        public uint Most { get; init; } = 32 << 20;

        public long Size { get; init; } = 1 << 20;

        public NbdAddress Address => new("127.0.0.1", ((IPEndPoint)_listener.LocalEndpoint).Port, null, string.Empty, false);

        public void Dispose() => _listener.Dispose();

        private async Task ServeAsync()
        {
            try
            {
                using TcpClient client = await _listener.AcceptTcpClientAsync();
                NetworkStream stream = client.GetStream();
                await stream.WriteAsync((byte[])[.. "NBDMAGICIHAVEOPT"u8, 0, 3]);
                byte[] head = new byte[28];
                await stream.ReadExactlyAsync(head.AsMemory(0, 4));
                uint option = 0;
                while (option != 7)
                {
                    await stream.ReadExactlyAsync(head.AsMemory(0, 16));
                    option = BinaryPrimitives.ReadUInt32BigEndian(head.AsSpan(8));
                    await stream.ReadExactlyAsync(new byte[BinaryPrimitives.ReadInt32BigEndian(head.AsSpan(12))]);
                    if (option == 10)
                        await stream.WriteAsync(Reply(option, 4, [0, 0, 0, 1, .. Encoding.ASCII.GetBytes("base:allocation")]));
                    if (option == 7)
                    {
                        await stream.WriteAsync(Reply(option, 3, [0, 0, .. Big(Size), 0, 0x7d]));
                        await stream.WriteAsync(Reply(option, 3, [0, 3, .. Big(Least).AsSpan(4), .. Big(4096).AsSpan(4), .. Big(Most).AsSpan(4)]));
                    }
                    await stream.WriteAsync(Reply(option, 1, []));
                }
                while (true)
                {
                    await stream.ReadExactlyAsync(head);
                    if (head[7] == 2)
                        return;
                    byte[] answer = Answer(BinaryPrimitives.ReadUInt64BigEndian(head.AsSpan(8)), BinaryPrimitives.ReadInt64BigEndian(head.AsSpan(16)), BinaryPrimitives.ReadInt32BigEndian(head.AsSpan(24)));
                    await stream.WriteAsync(answer);
                    // Nothing in these tests is answered with these lengths but what breaks off.
                    if (answer.Length is 116 or 300)
                        return;
                }
            }
            catch (Exception error) when (error is IOException or SocketException or ObjectDisposedException)
            {
                // The client has gone.
            }
        }

        private static byte[] Reply(uint option, uint type, byte[] data) =>
            [0, 3, 0xe8, 0x89, 4, 0x55, 0x65, 0xa9, .. Big(option).AsSpan(4), .. Big(type).AsSpan(4), .. Big(data.Length).AsSpan(4), .. data];
    }
}
