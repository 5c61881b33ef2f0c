using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Text;
using Xunit;

namespace Kvasir.Sharing.Tests;

/// <content>Saved states.</content>
public sealed partial class FuseServerTests
{
    [Fact]
    public void Another_server_knows_and_has_open_what_the_saved_one_did()
    {
        Directory.CreateDirectory(At("a/b"));
        File.WriteAllText(At("a/b/file"), "content");
        ulong folder = _client.Lookup(_client.Lookup(Root, "a"), "b");
        ulong file = _client.Lookup(folder, "file");
        ulong reading = _client.Open(file, 0);
        ulong writing = _client.Open(file, 2);
        ulong listing = _client.Open(folder, 0, folder: true);
        (ulong made, ulong madeHandle) = _client.Create(folder, "made");
        using FuseServer second = Restored(_server.Save());
        FuseClient client = new(second);
        Assert.Equal(_server.Held, second.Held);
        Assert.Equal("content", Encoding.ASCII.GetString(client.Read(file, reading, 0, 100)));
        Assert.Equal(3, client.Write(file, writing, 0, "CON"u8.ToArray()));
        Assert.Equal(-1, client.Write(file, reading, 0, "x"u8.ToArray()));
        Assert.Equal(4, client.Write(made, madeHandle, 0, "made"u8.ToArray()));
        Assert.Equal("CONtent", File.ReadAllText(At("a/b/file")));
        Assert.NotEmpty(client.Ask(28, folder, FuseClient.U64(listing, 0), FuseClient.U32(4096, 0), FuseClient.U64(0), FuseClient.U32(0, 0)));
        // The same file is the same number, and a new one has one of its own, as handles have.
        Assert.Equal(file, client.Lookup(folder, "file"));
        File.WriteAllText(At("new"), "");
        Assert.DoesNotContain(client.Lookup(Root, "new"), new[] { Root, folder, file, made });
        Assert.DoesNotContain(client.Open(file, 0), new[] { reading, writing, listing, madeHandle });
        client.Release(file, reading);
        Assert.Equal(0, client.Error);
        client.Release(file, reading);
        Assert.Equal(BadHandle, client.Error);
    }

    [Fact]
    public void What_is_another_file_by_now_is_stale()
    {
        string[] names = ["removed", "replaced", "moved", "linked", "kept", "retyped"];
        foreach (string name in names)
            File.WriteAllText(At(name), name);
        Dictionary<string, (ulong Node, ulong Handle)> known = names.ToDictionary(name => name, name =>
        {
            ulong node = _client.Lookup(Root, name);
            return (node, _client.Open(node, 2));
        });
        FuseServer.State saved = _server.Save();
        _server.Reset();
        File.Delete(At("removed"));
        // A file system may well give the new file the number that the old one had.
        File.Delete(At("replaced"));
        File.WriteAllText(At("replaced"), "another");
        File.Move(At("moved"), At("elsewhere"));
        File.Delete(At("linked"));
        File.CreateSymbolicLink(At("linked"), "../secret");
        File.Delete(At("retyped"));
        Directory.CreateDirectory(At("retyped"));
        using FuseServer second = Restored(saved);
        FuseClient client = new(second);
        foreach (string name in names)
        {
            (ulong node, ulong handle) = known[name];
            byte[] read = client.Read(node, handle, 0, 100);
            Assert.Equal(name == "kept" ? "kept" : "", Encoding.ASCII.GetString(read));
            Assert.Equal(name == "kept" ? 0 : BadHandle, client.Error);
            Assert.Equal(name == "kept" ? 1 : -1, client.Write(node, handle, 0, "k"u8.ToArray()));
            client.Ask(3, node, FuseClient.U32(0, 0), FuseClient.U64(0));
            Assert.Equal(name == "kept" ? 0 : Stale, client.Error);
            client.Ask(3, node, FuseClient.U32(1, 0), FuseClient.U64(handle));
            Assert.Equal(name == "kept" ? 0 : Stale, client.Error);
            client.Ask(4, node, FuseClient.U32(1 << 3 | 1 << 6, 0), FuseClient.U64(handle, 0, 0, 0, 0, 0), FuseClient.U32(0, 0, 0, 0, 0, 0, 0, 0));
            Assert.Equal(name == "kept" ? 0 : Stale, client.Error);
            client.Release(node, handle);
            Assert.Equal(0, client.Error);
        }
        Assert.Equal("another", File.ReadAllText(At("replaced")));
        Assert.Equal("moved", File.ReadAllText(At("elsewhere")));
        Assert.Equal("secret", File.ReadAllText(Path.Combine(_outside, "secret")));
        ulong renewed = client.Lookup(Root, "replaced");
        Assert.NotEqual(known["replaced"].Node, renewed);
        Assert.Equal("another", Encoding.ASCII.GetString(client.Read(renewed, client.Open(renewed, 0), 0, 100)));
    }

    /// <summary>The same number and name, but made at another time: the file system gave the number to a new file.</summary>
    [Fact]
    public void A_number_that_was_given_to_a_new_file_is_stale()
    {
        File.WriteAllText(At("file"), "text");
        ulong node = _client.Lookup(Root, "file");
        FuseServer.State saved = _server.Save();
        SavedNode one = Assert.Single(saved.Nodes);
        Assert.NotNull(one.Time);
        foreach (SavedNode other in new[] { one with { Time = (one.Time!.Value.Seconds - 1, one.Time.Value.Nanoseconds) }, one with { IsBirth = false, Time = null }, one with { Kind = 0x4000 }, one with { Inode = one.Inode + 1 } })
        {
            using FuseServer second = Restored(saved with { Nodes = [other] });
            FuseClient client = new(second);
            client.Ask(3, node, FuseClient.U32(0, 0), FuseClient.U64(0));
            Assert.Equal(Stale, client.Error);
            Assert.NotEqual(node, client.Lookup(Root, "file"));
        }
    }

    [Fact]
    public void A_read_only_server_opens_nothing_for_writing_out_of_a_state()
    {
        (ulong node, ulong handle) = _client.Create(Root, "file");
        _client.Write(node, handle, 0, "text"u8.ToArray());
        FuseServer.State saved = _server.Save();
        using FuseServer second = new(_folder, readOnly: true);
        Assert.Null(FuseServer.Fault(saved));
        second.Restore(saved);
        FuseClient client = new(second);
        Assert.Equal(-1, client.Write(node, handle, 0, "x"u8.ToArray()));
        ulong reading = client.Open(node, 0);
        Assert.Equal("text", Encoding.ASCII.GetString(client.Read(node, reading, 0, 100)));
    }

    [Fact]
    public void A_damaged_state_is_found()
    {
        Directory.CreateDirectory(At("a"));
        File.WriteAllText(At("a/file"), "content");
        ulong file = _client.Lookup(_client.Lookup(Root, "a"), "file");
        _client.Open(file, 0);
        FuseServer.State good = _server.Save();
        Assert.Null(FuseServer.Fault(good));
        SavedNode node = good.Nodes.Single(saved => saved.Id == file);
        SavedHandle handle = Assert.Single(good.Handles);
        FuseServer.State With(SavedNode changed) => good with { Nodes = [.. good.Nodes.Where(saved => saved.Id != file), changed] };
        FuseServer.State[] bad =
        [
            With(node with { Name = [.. "../secret\0"u8] }), With(node with { Name = [.. "..\0"u8] }), With(node with { Name = [.. ".\0"u8] }), With(node with { Name = [.. "open"u8] }),
            With(node with { Name = [0] }), With(node with { Name = [.. "a\0b\0"u8] }), With(node with { Name = null! }), With(node with { Name = [.. new byte[300].Select(_ => (byte)'x'), 0] }),
            With(node with { Id = Root }), With(node with { Id = good.NextNode }), With(node with { Parent = 999 }), With(node with { Lookups = 0 }), With(node with { Id = 7777 }),
            good with { Nodes = [.. good.Nodes, node] }, good with { Nodes = [null!] }, good with { Initialized = false },
            good with { Handles = [handle with { Number = 0 }] }, good with { Handles = [handle with { Number = good.NextHandle }] }, good with { Handles = [handle, handle] },
            good with { Handles = [handle with { Node = 999 }] }, good with { Handles = [handle with { Access = 0x200 }] }, good with { Handles = [null!] },
            good with { Handles = [.. Enumerable.Range(1, 16385).Select(i => new SavedHandle((ulong)i, Root, 0))], NextHandle = 20_000 },
        ];
        Assert.All(bad, state => Assert.NotNull(FuseServer.Fault(state)));
    }

    /// <summary>A folder that is in itself, and one that the guest has forgotten.</summary>
    [Fact]
    public void Paths_out_of_a_state_end()
    {
        Directory.CreateDirectory(At("a"));
        File.WriteAllText(At("a/file"), "content");
        ulong folder = _client.Lookup(Root, "a");
        ulong file = _client.Lookup(folder, "file");
        _client.Ask(2, folder, FuseClient.U64(1));
        FuseServer.State saved = _server.Save();
        using (FuseServer second = Restored(saved))
        {
            FuseClient client = new(second);
            client.Ask(3, folder, FuseClient.U32(0, 0), FuseClient.U64(0));
            Assert.Equal(Stale, client.Error);
            client.Ask(3, file, FuseClient.U32(0, 0), FuseClient.U64(0));
            Assert.Equal(0, client.Error);
        }
        using FuseServer looped = Restored(saved with { Nodes = [.. saved.Nodes.Select(node => node with { Parent = node.Id == folder ? file : folder })] });
        FuseClient other = new(looped);
        other.Ask(3, file, FuseClient.U32(0, 0), FuseClient.U64(0));
        Assert.NotEqual(0, other.Error);
    }

    /// <summary>Folders that were forgotten and opened again on the way to a file below are closed when the guest begins anew.</summary>
    [Fact]
    public void Beginning_anew_closes_all()
    {
        Directory.CreateDirectory(At("a"));
        Directory.CreateDirectory(At("many"));
        File.WriteAllText(At("a/file"), "content");
        for (int i = 0; i < 2100; i++)
            File.WriteAllText(At($"many/{i}"), "");
        ulong folder = _client.Lookup(Root, "a");
        ulong file = _client.Lookup(folder, "file");
        _client.Ask(2, folder, FuseClient.U64(1));
        ulong many = _client.Lookup(Root, "many");
        for (int i = 0; i < 2100; i++)
            _client.Lookup(many, $"{i}");
        _client.Ask(3, file, FuseClient.U32(0, 0), FuseClient.U64(0));
        Assert.Equal(0, _client.Error);
        Assert.Contains(At("a"), Open());
        _client.Initialize();
        Assert.Equal([_folder], Open());
    }

    private List<string> Open() =>
        [.. Directory.EnumerateFileSystemEntries("/proc/self/fd").Select(path => new FileInfo(path).LinkTarget).OfType<string>().Where(path => path.StartsWith(_folder, StringComparison.Ordinal))];

    private FuseServer Restored(FuseServer.State saved)
    {
        Assert.Null(FuseServer.Fault(saved));
        FuseServer second = new(_folder, readOnly: false);
        second.Restore(saved);
        return second;
    }
}
