using System;
using System.Collections.Concurrent;
using System.Collections.Generic;
using System.IO;
using System.Runtime.InteropServices;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block.Filters;
using Kvasir.Linux;
using Microsoft.Win32.SafeHandles;
using Xunit;

namespace Kvasir.Block.Tests;

/// <summary>What a device sees of its disk. Alone, as one test counts what the process allocates.</summary>
[Collection(nameof(Alone))]
public sealed class BlockBackendTests
{
    [CollectionDefinition(nameof(Alone), DisableParallelization = true)]
    public sealed class Alone;

    [Theory]
    [InlineData("raw", CacheMode.Writeback)]
    [InlineData("raw", CacheMode.None)]
    [InlineData("qcow2", CacheMode.Writeback)]
    [InlineData("qcow2", CacheMode.None)]
    [InlineData("qcow2", CacheMode.DirectSync)]
    [InlineData("qcow2", CacheMode.Unsafe)]
    public async Task Scattered_guest_memory_reaches_the_disk_and_comes_back(string format, CacheMode cache)
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        await Peer.ImgOkAsync("create", "-q", "-f", format, path, "8M");
        await using BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = format, Cache = cache });
        byte[] content = new byte[8 << 20];
        Random random = new(3);
        using AlignedBuffer ram = AlignedBuffer.Rent(1 << 20);
        nint host = ram.Address;
        using SemaphoreSlim done = new(0);
        WaitingRequest request = new(done);
        for (int round = 0; round < 60; round++)
        {
            request.Clear();
            request.Offset = random.Next(0, 8000) * 512L;
            List<(int At, int Length)> pieces = [];
            for (int i = random.Next(1, 9), at = 0; i > 0; i--)
            {
                at += random.Next(0, 3) * 512;
                int length = random.Next(1, 20) * 512;
                pieces.Add((at, length));
                at += length;
            }
            foreach ((int at, int length) in pieces)
                request.Add(host + at, length);
            request.ForceUnitAccess = random.Next(4) == 0;
            request.Operation = BlockOperation.Write;
            random.NextBytes(ram.Memory.Span[..(1 << 18)]);
            int position = (int)request.Offset;
            foreach ((int at, int length) in pieces)
            {
                ram.Memory.Span.Slice(at, length).CopyTo(content.AsSpan(position));
                position += length;
            }
            await RunAsync(backend, request, done);
            byte[] sent = ram.Memory.Span[..(1 << 18)].ToArray();
            ram.Memory.Span[..(1 << 18)].Clear();
            request.Operation = BlockOperation.Read;
            await RunAsync(backend, request, done);
            foreach ((int at, int length) in pieces)
                Assert.True(ram.Memory.Span.Slice(at, length).SequenceEqual(sent.AsSpan(at, length)));
        }
        request.Clear();
        request.Operation = BlockOperation.WriteZeroes;
        (request.Offset, request.Length, request.MayUnmap) = (1 << 20, 3 << 20, true);
        content.AsSpan(1 << 20, 3 << 20).Clear();
        await RunAsync(backend, request, done);
        request.Operation = BlockOperation.Flush;
        await RunAsync(backend, request, done);
        byte[] whole = new byte[8 << 20];
        await backend.Node.ReadAsync(0, whole);
        Assert.True(whole.AsSpan().SequenceEqual(content));
    }

    [Fact]
    public async Task A_snapshot_disk_leaves_its_image_alone()
    {
        using TestFolder folder = new();
        string path = folder["disk.qcow2"];
        await Peer.ImgOkAsync("create", "-q", "-f", "qcow2", path, "4M");
        byte[] before = await File.ReadAllBytesAsync(path);
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "qcow2", Snapshot = true }))
        {
            Assert.False(backend.IsReadOnly);
            await backend.Node.WriteAsync(1234, new byte[] { 1, 2, 3 });
            byte[] back = new byte[3];
            await backend.Node.ReadAsync(1234, back);
            Assert.Equal([1, 2, 3], back);
        }
        Assert.Equal(before, await File.ReadAllBytesAsync(path));
    }

    [Fact]
    public async Task What_a_guest_must_not_do_is_an_errno()
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        await File.WriteAllBytesAsync(path, new byte[4096]);
        using SemaphoreSlim done = new(0);
        WaitingRequest request = new(done);
        byte[] data = new byte[512];
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { ReadOnly = true }))
        {
            request.Add(data);
            request.Operation = BlockOperation.Write;
            backend.Submit(request);
            await done.WaitAsync();
            Assert.Equal(BlockErrno.Perm, request.Error);
        }
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions()))
        {
            foreach (long offset in new[] { 4096L, 4000, -512, long.MaxValue, long.MinValue })
            {
                request.Operation = BlockOperation.Read;
                request.Offset = offset;
                backend.Submit(request);
                await done.WaitAsync();
                Assert.Equal(BlockErrno.Io, request.Error);
            }
            request.Offset = 3584;
            await RunAsync(backend, request, done);
        }
        FaultNode faulty = new(new NullNode(1 << 20, true), new FaultRule(FaultKind.Write, BlockErrno.NoSpace));
        await using (BlockBackend backend = BlockBackend.Over(faulty, new BackendOptions()))
        {
            request.Operation = BlockOperation.Write;
            backend.Submit(request);
            await done.WaitAsync();
            Assert.Equal(BlockErrno.NoSpace, request.Error);
        }
    }

    [Fact]
    public async Task The_short_way_into_the_page_cache_keeps_to_every_rule()
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        using SemaphoreSlim done = new(0);
        WaitingRequest request = new(done);
        byte[] data = new byte[512];
        request.Add(data);
        // The last sector is not whole.
        await File.WriteAllBytesAsync(path, Filled(8000, 1));
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "raw" }))
        {
            request.Operation = BlockOperation.Read;
            request.Offset = 7680;
            await RunAsync(backend, request, done);
            Assert.Equal([.. Filled(320, 1), .. new byte[192]], data);
            request.Operation = BlockOperation.Write;
            data.AsSpan().Fill(2);
            await RunAsync(backend, request, done);
            request.Offset = 512;
            await RunAsync(backend, request, done);
        }
        byte[] whole = await File.ReadAllBytesAsync(path);
        Assert.Equal([.. Filled(512, 1), .. Filled(512, 2), .. Filled(6656, 1), .. Filled(512, 2)], whole);
        // A window of the file.
        await using (BlockBackend backend = await BlockBackend.OpenAsync(ImageOptions.ParseList($"driver=raw,offset=1024,size=1024,file.filename={path}"), new BackendOptions()))
        {
            data.AsSpan().Fill(3);
            request.Offset = 512;
            await RunAsync(backend, request, done);
            request.Offset = 1024;
            backend.Submit(request);
            await done.WaitAsync();
            Assert.Equal(BlockErrno.Io, request.Error);
        }
        byte[] after = await File.ReadAllBytesAsync(path);
        Assert.Equal([.. whole[..1536], .. Filled(512, 3), .. whole[2048..]], after);
        // A guessed format stays what it is.
        await using (BlockBackend backend = BlockBackend.Over(await Image.OpenAsync(path, new OpenOptions { Probe = true, ReadOnly = false }), new BackendOptions()))
        {
            new byte[] { (byte)'Q', (byte)'F', (byte)'I', 0xfb, 0, 0, 0, 3 }.CopyTo(data, 0);
            request.Offset = 0;
            backend.Submit(request);
            await done.WaitAsync();
            Assert.Equal(BlockErrno.Perm, request.Error);
        }
        // Zeros are found, whoever looks for them.
        data.AsSpan().Clear();
        request.Clear();
        byte[] page = new byte[4096];
        request.Add(page);
        await File.WriteAllBytesAsync(path, Filled(1 << 20, 1));
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "raw", DetectZeroes = DetectZeroes.Unmap, Discard = true }))
        {
            request.Offset = 4096;
            await RunAsync(backend, request, done);
            Assert.Equal(BlockFlags.Zero, (await backend.StatusAsync(4096, 4096)).Flags & BlockFlags.Zero);
        }
        await using (BlockNode node = await Image.OpenAsync(path, new OpenOptions { Format = "raw", ReadOnly = false }))
        {
            node.DetectZeroes = DetectZeroes.Unmap;
            await using BlockBackend backend = BlockBackend.Over(node, new BackendOptions());
            request.Offset = 16384;
            await RunAsync(backend, request, done);
            Assert.Equal(BlockFlags.Zero, (await backend.StatusAsync(16384, 4096)).Flags & BlockFlags.Zero);
        }
    }

    private static byte[] Filled(int length, byte value)
    {
        byte[] bytes = new byte[length];
        bytes.AsSpan().Fill(value);
        return bytes;
    }

    [Theory]
    [InlineData("raw", CacheMode.Writeback, BlockOperation.Read)]
    [InlineData("raw", CacheMode.Writeback, BlockOperation.Write)]
    [InlineData("raw", CacheMode.None, BlockOperation.Read)]
    [InlineData("raw", CacheMode.None, BlockOperation.Write)]
    [InlineData("qcow2", CacheMode.Writeback, BlockOperation.Read)]
    [InlineData("qcow2", CacheMode.Writeback, BlockOperation.Write)]
    [InlineData("qcow2", CacheMode.None, BlockOperation.Read)]
    [InlineData("qcow2", CacheMode.None, BlockOperation.Write)]
    public async Task Requests_allocate_nothing_in_steady_state(string format, CacheMode cache, BlockOperation operation)
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        await Peer.ImgOkAsync("create", "-q", "-f", format, "-o", format == "qcow2" ? "preallocation=metadata" : "preallocation=off", path, "16M");
        await using BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = format, Cache = cache });
        byte[] fill = new byte[1 << 20];
        fill.AsSpan().Fill(1);
        for (int i = 0; i < 16; i++)
            await backend.Node.WriteAsync((long)i << 20, fill);
        const int depth = 32;
        using AlignedBuffer ram = AlignedBuffer.Rent(depth * 4096);
        LoopingRequest[] requests = new LoopingRequest[depth];
        for (int i = 0; i < depth; i++)
        {
            requests[i] = new LoopingRequest(backend, i + 1) { Operation = operation };
            requests[i].Add(ram.Address + (i * 4096), 4096);
        }
        await LoopAsync(requests, 300);
        await LoopAsync(requests, 300);
        long before = GC.GetTotalAllocatedBytes(precise: true);
        await LoopAsync(requests, 500);
        long perRequest = (GC.GetTotalAllocatedBytes(precise: true) - before) / (depth * 500);
        Assert.True(perRequest < 8, $"{perRequest} bytes per request");
    }

    [Fact]
    public async Task Requests_to_a_closed_disk_end_with_an_error_and_each_ends_once()
    {
        for (int round = 0; round < 50; round++)
        {
            BlockBackend backend = BlockBackend.Over(new RawImage(new RecordingFile(new byte[4096])), new BackendOptions());
            using CountdownEvent ended = new(4 * 200);
            int refused = 0;
            using Barrier start = new(5);
            Thread[] devices = new Thread[4];
            for (int i = 0; i < devices.Length; i++)
            {
                devices[i] = new Thread(() =>
                {
                    start.SignalAndWait();
                    for (int n = 0; n < 200; n++)
                    {
                        CountedRequest request = new(ended) { Operation = n % 2 == 0 ? BlockOperation.Read : BlockOperation.Write };
                        request.Add(new byte[512]);
                        backend.Submit(request);
                        if (request.Error == BlockErrno.NoDevice)
                            Interlocked.Increment(ref refused);
                    }
                });
                devices[i].Start();
            }
            start.SignalAndWait();
            await backend.DisposeAsync();
            foreach (Thread device in devices)
                device.Join();
            Assert.True(ended.Wait(TimeSpan.FromSeconds(30)), "a request never ended");
            using CountdownEvent last = new(1);
            CountedRequest late = new(last) { Operation = BlockOperation.Flush };
            backend.Submit(late);
            Assert.True(last.IsSet);
            Assert.Equal(BlockErrno.NoDevice, late.Error);
            Assert.Contains("closed", late.ErrorText, StringComparison.Ordinal);
            await Assert.ThrowsAsync<BlockException>(async () => await backend.SwapAsync(node => new ValueTask<BlockNode>(node)));
            await backend.DisposeAsync();
        }
    }

    [Fact]
    public async Task What_the_page_cache_takes_is_done_at_once_unless_something_speaks_against_it()
    {
        using TestFolder folder = new();
        string path = folder["disk"];
        byte[] content = Filled(65536, 7);
        await File.WriteAllBytesAsync(path, content);
        byte[] data = Filled(4096, 9);
        byte[] read = new byte[4096];
        using (SafeFileHandle file = File.OpenHandle(path))
            Assert.SkipWhen(NativeFile.ReadCached(file, 0, read) < 0, "the file system of temporary files does not say what is in the page cache (RWF_NOWAIT)");
        await using (BlockBackend backend = await BlockBackend.OpenAsync(path, new BackendOptions { Format = "raw" }))
        {
            Assert.True(backend.TryRunNow(BlockOperation.Write, 4096, data));
            Assert.True(backend.TryRunNow(BlockOperation.Read, 4096, read));
            Assert.Equal(data, read);
            Assert.False(backend.TryRunNow(BlockOperation.Flush, 0, read));
            Assert.False(backend.TryRunNow(BlockOperation.Read, -4096, read));
            Assert.False(backend.TryRunNow(BlockOperation.Write, 65536 - 2048, data));
            backend.WriteCache = false;
            Assert.False(backend.TryRunNow(BlockOperation.Write, 8192, data));
            backend.WriteCache = true;
            await backend.SwapAsync(node =>
            {
                Assert.False(backend.TryRunNow(BlockOperation.Write, 8192, data));
                Assert.False(backend.TryRunNow(BlockOperation.Read, 8192, read));
                return ValueTask.FromResult(node);
            });
            Assert.True(backend.TryRunNow(BlockOperation.Read, 8192, read));
            Assert.Equal(Filled(4096, 7), read);
            await backend.DrainAsync();
            await backend.DisposeAsync();
            Assert.False(backend.TryRunNow(BlockOperation.Write, 8192, data));
            Assert.False(backend.TryRunNow(BlockOperation.Read, 8192, read));
        }
        BackendOptions raw = new() { Format = "raw" };
        foreach (BackendOptions options in new[] { raw with { ReadOnly = true }, raw with { DetectZeroes = DetectZeroes.On }, raw with { Cache = CacheMode.Writethrough } })
        {
            await using BlockBackend backend = await BlockBackend.OpenAsync(path, options);
            Assert.False(backend.TryRunNow(BlockOperation.Write, 0, data));
            Assert.True(backend.TryRunNow(BlockOperation.Read, 0, read));
        }
        await using BlockBackend throttled = await BlockBackend.OpenAsync(path, raw with { Throttle = new ThrottleLimits { RequestsPerSecond = 1e6 } });
        Assert.False(throttled.TryRunNow(BlockOperation.Write, 0, data));
        Assert.False(throttled.TryRunNow(BlockOperation.Read, 0, read));
        Array.Copy(data, 0, content, 4096, data.Length);
        Assert.Equal(content, await File.ReadAllBytesAsync(path));
    }

    [Fact]
    public async Task A_throttled_disk_keeps_to_its_rate()
    {
        ImageOptions options = ImageOptions.ParseList("file=x,iops=400,cache=none,discard=ignore,bus=virtio");
        BackendOptions applied = new BackendOptions().Apply(options);
        Assert.Equal(400, applied.Throttle!.RequestsPerSecond);
        Assert.Equal((CacheMode.None, false), (applied.Cache, applied.Discard));
        Assert.Equal(["file", "bus"], options.Values.Keys);
        await using BlockBackend backend = BlockBackend.Over(new NullNode(1 << 20, true), applied);
        byte[] data = new byte[512];
        long start = System.Diagnostics.Stopwatch.GetTimestamp();
        for (int i = 0; i < 200; i++)
            await backend.Node.ReadAsync(0, data);
        double seconds = System.Diagnostics.Stopwatch.GetElapsedTime(start).TotalSeconds;
        Assert.InRange(seconds, 0.3, 3);
    }

    private static async Task RunAsync(BlockBackend backend, WaitingRequest request, SemaphoreSlim done)
    {
        backend.Submit(request);
        await done.WaitAsync();
        Assert.True(request.Error == 0, request.ErrorText);
    }

    private static async Task LoopAsync(LoopingRequest[] requests, int rounds)
    {
        List<Task> tasks = [];
        foreach (LoopingRequest request in requests)
            tasks.Add(request.LoopAsync(rounds));
        await Task.WhenAll(tasks);
    }

    private sealed class WaitingRequest(SemaphoreSlim done) : BlockRequest
    {
        protected override void OnCompleted() => done.Release();
    }

    /// <summary>Submits itself again at another place until its rounds are done, as a busy device does.</summary>
    /// <summary>Signals each of its ends: one more than there should be is an exception.</summary>
    private sealed class CountedRequest(CountdownEvent ended) : BlockRequest
    {
        protected override void OnCompleted() => ended.Signal();
    }

    private sealed class LoopingRequest(BlockBackend backend, int seed) : BlockRequest
    {
        private uint _state = (uint)seed * 2654435761;
        private TaskCompletionSource _done = new();
        private int _left;
        private int _nested;

        public Task LoopAsync(int rounds)
        {
            _done = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
            _left = rounds;
            Next();
            return _done.Task;
        }

        protected override void OnCompleted()
        {
            if (Error != 0)
                _done.TrySetException(new InvalidOperationException(ErrorText));
            else if (--_left == 0)
                _done.SetResult();
            else if (Interlocked.Increment(ref _nested) == 1)
                Continue();
        }

        // A request that completes within its submission must not pile up frames.
        private void Continue()
        {
            do
                Next();
            while (Interlocked.Decrement(ref _nested) != 0);
        }

        private void Next()
        {
            _state = (_state * 1664525) + 1013904223;
            Offset = (_state >> 20) * 4096L;
            backend.Submit(this);
        }
    }
}
