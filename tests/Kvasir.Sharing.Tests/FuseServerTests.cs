using System;
using System.Buffers.Binary;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using Xunit;

namespace Kvasir.Sharing.Tests;

public sealed partial class FuseServerTests : IDisposable
{
    private const ulong Root = 1;
    private const int NotPermitted = 1;
    private const int NoEntry = 2;
    private const int BadHandle = 9;
    private const int Invalid = 22;
    private const int ReadOnlySystem = 30;
    private const int NotSupported = 95;
    private const int Stale = 116;

    private readonly string _outside = Directory.CreateTempSubdirectory("kvasir-share-").FullName;
    private readonly string _folder;
    private readonly FuseServer _server;
    private readonly FuseClient _client;

    public FuseServerTests()
    {
        _folder = Path.Combine(_outside, "shared");
        Directory.CreateDirectory(_folder);
        File.WriteAllText(Path.Combine(_outside, "secret"), "secret");
        _server = new FuseServer(_folder, readOnly: false);
        _client = new FuseClient(_server);
        _client.Initialize();
    }

    public void Dispose()
    {
        _server.Dispose();
        // Names of any bytes are among them, which .NET's strings do not hold.
        using System.Diagnostics.Process process = System.Diagnostics.Process.Start("rm", ["-rf", _outside]);
        process.WaitForExit();
    }

    private string At(string name) => Path.Combine(_folder, name);

    [Fact]
    public void A_file_is_made_written_read_and_removed()
    {
        (ulong node, ulong handle) = _client.Create(Root, "file");
        Assert.Equal(0, _client.Error);
        byte[] data = Enumerable.Range(0, 200_000).Select(i => (byte)(i * 31)).ToArray();
        Assert.Equal(data.Length, _client.Write(node, handle, 5, data));
        Assert.Equal(data, _client.Read(node, handle, 5, 250_000));
        Assert.Equal(data, File.ReadAllBytes(At("file"))[5..]);
        Assert.Equal((UnixFileMode)0x1a4, File.GetUnixFileMode(At("file")));
        _client.Release(node, handle);
        Assert.Equal(0, _client.Error);
        _client.Read(node, handle, 0, 10);
        Assert.Equal(BadHandle, _client.Error);
        _client.Ask(10, Root, FuseClient.Name("file"));
        Assert.Equal(0, _client.Error);
        Assert.False(File.Exists(At("file")));
    }

    [Fact]
    public void Names_move_are_linked_and_listed()
    {
        Directory.CreateDirectory(At("d"));
        File.WriteAllText(At("a"), "content");
        ulong d = _client.Lookup(Root, "d");
        ulong a = _client.Lookup(Root, "a");
        _client.Ask(12, Root, FuseClient.U64(d), FuseClient.Name("a"), FuseClient.Name("b"));
        Assert.Equal(0, _client.Error);
        Assert.Equal("content", File.ReadAllText(At("d/b")));
        Assert.Equal(a, _client.Lookup(d, "b"));
        Assert.NotEqual(0ul, FuseClient.Entry(_client.Ask(13, Root, FuseClient.U64(a), FuseClient.Name("c"))));
        Assert.Equal("content", File.ReadAllText(At("c")));
        _client.Ask(6, Root, FuseClient.Name("link"), FuseClient.Name("/etc/passwd"));
        Assert.Equal(0, _client.Error);
        Assert.Equal("/etc/passwd", new FileInfo(At("link")).LinkTarget);
        Assert.Equal("/etc/passwd", Encoding.UTF8.GetString(_client.Ask(5, _client.Lookup(Root, "link"))));
        Assert.Equal([".", "..", "c", "d", "link"], List(Root).Order(StringComparer.Ordinal));
    }

    [Fact]
    public void A_folder_of_any_size_is_listed_whole()
    {
        List<string> names = [.. Enumerable.Range(0, 3000).Select(i => $"file-{i:0000}-{new string('x', i % 100)}")];
        foreach (string name in names)
            File.WriteAllBytes(At(name), []);
        Assert.Equal([".", "..", .. names], List(Root).Order(StringComparer.Ordinal));
    }

    [Theory]
    [InlineData("..")]
    [InlineData(".")]
    [InlineData("../secret")]
    [InlineData("/etc/passwd")]
    [InlineData("d/../../secret")]
    [InlineData("")]
    public void No_name_leads_outside(string name)
    {
        Directory.CreateDirectory(At("d"));
        Assert.Equal(0ul, _client.Lookup(Root, name));
        Assert.True(_client.Error is Invalid or NoEntry);
        Assert.Equal(0ul, _client.Create(Root, name).Node);
        Assert.NotEqual(0, _client.Error);
        foreach (uint removal in (uint[])[10, 11])
        {
            _client.Ask(removal, Root, FuseClient.Name(name));
            Assert.NotEqual(0, _client.Error);
        }
        _client.Ask(12, Root, FuseClient.U64(Root), FuseClient.Name("d"), FuseClient.Name(name));
        Assert.NotEqual(0, _client.Error);
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
    }

    [Fact]
    public void A_symbolic_link_is_a_file_of_its_own_to_the_server()
    {
        File.CreateSymbolicLink(At("out"), "../secret");
        File.CreateSymbolicLink(At("up"), "..");
        ulong file = _client.Lookup(Root, "out");
        ulong folder = _client.Lookup(Root, "up");
        Assert.Equal(0ul, _client.Open(file, 0));
        Assert.NotEqual(0, _client.Error);
        Assert.Equal(0ul, _client.Open(folder, 0, folder: true));
        Assert.NotEqual(0, _client.Error);
        Assert.Equal(0ul, _client.Lookup(folder, "secret"));
        Assert.NotEqual(0, _client.Error);
        Assert.Equal(0ul, _client.Create(folder, "made").Node);
        Assert.NotEqual(0, _client.Error);
        // Opening for creation goes through no link either, and sets nothing beyond it.
        Assert.Equal(0ul, _client.Create(Root, "out", flags: 0x201).Node);
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
        _client.Ask(4, file, FuseClient.U32(8, 0), FuseClient.U64(0, 0, 0, 0, 0, 0), new byte[32]);
        Assert.NotEqual(0, _client.Error);
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
    }

    [Fact]
    public void A_folder_that_became_a_link_on_the_host_leads_nowhere()
    {
        Directory.CreateDirectory(At("d/e"));
        ulong d = _client.Lookup(Root, "d");
        ulong e = _client.Lookup(d, "e");
        Directory.Delete(At("d"), recursive: true);
        File.CreateSymbolicLink(At("d"), "..");
        Assert.Equal(0ul, _client.Lookup(d, "secret"));
        Assert.NotEqual(0, _client.Error);
        Assert.Equal(0ul, _client.Create(e, "made").Node);
        Assert.False(File.Exists(Path.Combine(_outside, "made")));
    }

    [Fact]
    public void Devices_are_not_made_and_pipes_not_opened()
    {
        _client.Ask(8, Root, FuseClient.U32(0x21b6, 0x103, 0, 0), FuseClient.Name("null"));
        Assert.Equal(NotPermitted, _client.Error);
        _client.Ask(8, Root, FuseClient.U32(0x11b6, 0, 0, 0), FuseClient.Name("pipe"));
        Assert.Equal(0, _client.Error);
        Assert.Equal(0ul, _client.Open(_client.Lookup(Root, "pipe"), 0));
        Assert.Equal(NotSupported, _client.Error);
    }

    [Fact]
    public void A_read_only_share_changes_nothing()
    {
        File.WriteAllText(At("file"), "content");
        using FuseServer server = new(_folder, readOnly: true);
        FuseClient client = new(server);
        client.Initialize();
        ulong file = client.Lookup(Root, "file");
        Assert.Equal("content", Encoding.ASCII.GetString(client.Read(file, client.Open(file, 0), 0, 100)));
        Assert.Equal(0ul, client.Open(file, 1));
        Assert.Equal(ReadOnlySystem, client.Error);
        foreach ((uint operation, byte[][] arguments) in ((uint, byte[][])[])
        [
            (35, [FuseClient.U32(1, 0x81a4, 0, 0), FuseClient.Name("n")]),
            (9, [FuseClient.U32(0x1ff, 0), FuseClient.Name("n")]),
            (10, [FuseClient.Name("file")]),
            (12, [FuseClient.U64(Root), FuseClient.Name("file"), FuseClient.Name("n")]),
            (6, [FuseClient.Name("n"), FuseClient.Name("t")]),
        ])
        {
            client.Ask(operation, Root, arguments);
            Assert.Equal(ReadOnlySystem, client.Error);
        }
        client.Ask(4, file, FuseClient.U32(1, 0), new byte[80]);
        Assert.Equal(ReadOnlySystem, client.Error);
        Assert.Equal(["file"], Directory.EnumerateFileSystemEntries(_folder).Select(path => Path.GetFileName(path)));
    }

    [Fact]
    public void More_files_than_are_held_open_stay_known()
    {
        const int count = 5000;
        List<ulong> nodes = [];
        for (int i = 0; i < count; i++)
        {
            File.WriteAllText(At($"f{i}"), $"content {i}");
            nodes.Add(_client.Lookup(Root, $"f{i}"));
        }
        Assert.True(Directory.EnumerateFileSystemEntries("/proc/self/fd").Count() < 3000);
        foreach (int i in (int[])[0, 1, 2500, count - 1])
        {
            ulong handle = _client.Open(nodes[i], 0);
            Assert.Equal($"content {i}", Encoding.ASCII.GetString(_client.Read(nodes[i], handle, 0, 100)));
            _client.Release(nodes[i], handle);
        }
        // Another file under an old name is not the old file.
        File.Move(At("f10"), At("kept"));
        File.WriteAllText(At("f10"), "another");
        Assert.Equal(0ul, _client.Open(nodes[10], 0));
        Assert.Equal(Stale, _client.Error);
        for (int i = 0; i < count; i++)
            _client.Ask(2, nodes[i], FuseClient.U64(1));
        Assert.Equal((0, 1), _server.Held);
    }

    [Fact]
    public void Extended_attributes_are_the_users_alone()
    {
        ulong node = _client.Create(Root, "file").Node;
        _client.Ask(21, node, FuseClient.U32(3, 0), FuseClient.Name("security.capability"), "abc"u8.ToArray());
        Assert.Equal(NotSupported, _client.Error);
        _client.Ask(21, node, FuseClient.U32(3, 0), FuseClient.Name("trusted.x"), "abc"u8.ToArray());
        Assert.Equal(NotSupported, _client.Error);
        _client.Ask(21, node, FuseClient.U32(3, 0), FuseClient.Name("user.x"), "abc"u8.ToArray());
        if (_client.Error == NotSupported)
            Assert.Skip("the temporary folder's file system has no extended attributes");
        Assert.Equal("abc"u8, _client.Ask(22, node, FuseClient.U32(100, 0), FuseClient.Name("user.x")));
        Assert.Contains("user.x\0", Encoding.ASCII.GetString(_client.Ask(23, node, FuseClient.U32(100, 0))), StringComparison.Ordinal);
    }

    [Fact]
    public void Messages_of_any_content_are_survived_and_leave_nothing_outside()
    {
        Random random = new(11);
        Directory.CreateDirectory(At("d"));
        File.WriteAllText(At("d/f"), "x");
        byte[] reply = new byte[FuseServer.MaximumReply];
        string[] names = ["d", "f", "..", "../secret", "new", "", "a/b"];
        for (int round = 0; round < 60_000; round++)
        {
            byte[] request = new byte[random.Next(200)];
            random.NextBytes(request);
            if (request.Length >= 40)
            {
                // INIT and DESTROY are rare, so that there are nodes and handles to meet.
                uint operation = (uint)random.Next(1, 52);
                if (operation is 26 or 38 && random.Next(50) != 0)
                    operation = 1;
                BinaryPrimitives.WriteUInt32LittleEndian(request.AsSpan(4), operation);
                BinaryPrimitives.WriteUInt64LittleEndian(request.AsSpan(16), (ulong)random.Next(0, 6));
                if (operation == 26 && request.Length >= 56)
                    FuseClient.U32(7, 31, 0, uint.MaxValue).CopyTo(request, 40);
                int at = 40 + 8 * random.Next(0, 12);
                byte[] name = FuseClient.Name(names[random.Next(names.Length)]);
                if (random.Next(3) > 0 && at + name.Length <= request.Length)
                {
                    if (random.Next(2) == 0)
                        Array.Clear(request, 40, at - 40);
                    request[40] = (byte)random.Next(4);
                    name.CopyTo(request, at);
                }
            }
            int length = _server.Serve(request, reply.AsSpan(0, random.Next(4) == 0 ? random.Next(200) : reply.Length));
            Assert.InRange(length, 0, reply.Length);
        }
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
        Assert.Equal(["secret", "shared"], Directory.EnumerateFileSystemEntries(_outside).Select(path => Path.GetFileName(path)!).Order(StringComparer.Ordinal));
    }

    /// <summary>A request that ends too early, wherever, has an answer of its length or an error, and changes nothing outside.</summary>
    [Fact]
    public void Requests_cut_at_any_byte_are_answered()
    {
        (ulong file, ulong handle) = _client.Create(Root, "file");
        byte[] reply = new byte[FuseServer.MaximumReply];
        byte[] arguments = [.. FuseClient.U64(handle), .. FuseClient.U32(4, 0, 4, 0), .. FuseClient.U64(0, 0), .. FuseClient.Name("../secret"), .. FuseClient.Name("name"), .. new byte[40]];
        for (uint operation = 1; operation < 53; operation++)
        {
            if (operation is 26 or 38)
                continue;
            foreach (ulong node in new[] { Root, file, 99ul })
            {
                byte[] request = [.. FuseClient.U32((uint)(40 + arguments.Length), operation), .. FuseClient.U64(77, node), .. new byte[16], .. arguments];
                for (int cut = 0; cut <= request.Length; cut++)
                {
                    int length = _server.Serve(request.AsSpan(0, cut), reply);
                    if (length == 0)
                        continue;
                    Assert.InRange(length, 16, reply.Length);
                    Assert.Equal((length, 77ul), (BinaryPrimitives.ReadInt32LittleEndian(reply), BinaryPrimitives.ReadUInt64LittleEndian(reply.AsSpan(8))));
                    Assert.InRange(BinaryPrimitives.ReadInt32LittleEndian(reply.AsSpan(4)), -4095, 0);
                }
            }
            // Most of them cut nothing off that was needed: the file may be closed or have gone by now.
            (file, handle) = _client.Create(Root, $"file{operation}");
            FuseClient.U64(handle).CopyTo(arguments, 0);
        }
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
        Assert.Equal(2, Directory.EnumerateFileSystemEntries(_outside).Count());
    }

    private List<string> List(ulong node)
    {
        List<string> names = [];
        ulong handle = _client.Open(node, 0, folder: true);
        ulong offset = 0;
        while (true)
        {
            byte[] answer = _client.Ask(28, node, FuseClient.U64(handle, offset), FuseClient.U32(4096, 0), FuseClient.U64(0), FuseClient.U32(0, 0));
            Assert.Equal(0, _client.Error);
            if (answer.Length == 0)
                break;
            for (int at = 0; at < answer.Length;)
            {
                offset = BinaryPrimitives.ReadUInt64LittleEndian(answer.AsSpan(at + 8));
                int length = BinaryPrimitives.ReadInt32LittleEndian(answer.AsSpan(at + 16));
                names.Add(Encoding.UTF8.GetString(answer, at + 24, length));
                at += (24 + length + 7) & ~7;
            }
        }
        _client.Release(node, handle, folder: true);
        return names;
    }
}
