using System;
using System.Buffers.Binary;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Block;
using Kvasir.Block.Filters;
using Kvasir.Core;
using Kvasir.Devices.Storage;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>virtio-scsi and the units behind it, command by command.</summary>
public sealed partial class VirtioScsiTests : IAsyncDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Request = 0x90_0000;
    private const ulong Response = 0x90_1000;
    private const ulong Data = 0xa0_0000;
    private const int Blocks = 4096;
    private const ulong All = ulong.MaxValue & ~ModelDriver.RingPacked;

    private readonly GuestMemory _memory = new(32ul << 20);
    private readonly VirtioScsi _device;
    private ModelDriver _driver;
    private readonly ModelQueue[] _queues;
    private readonly ModelDisk _disk = new([.. Enumerable.Range(0, Blocks * 512).Select(i => (byte)(i / 512))]);
    private ScsiUnit? _unit;

    public VirtioScsiTests()
    {
        _device = new VirtioScsi("scsi", _memory);
        _driver = new ModelDriver(_device, _memory);
        _queues = _driver.Start(All, 64, Rings);
    }

    public async ValueTask DisposeAsync()
    {
        _device.Dispose();
        await _disk.DisposeAsync();
        _memory.Dispose();
    }

    private async Task AttachAsync(bool cd = false, int target = 2, Action<string>? pause = null)
    {
        BlockBackend backend = await _disk.OpenAsync(new BackendOptions { Format = "raw", ReadOnly = cd });
        _unit = new ScsiUnit(new Disk(backend, new DiskSettings { Name = "unit", Serial = "S1", IsCd = cd, ReadError = ErrorPolicy.Stop }, pause), target, 0);
        _device.Attach(_unit);
    }

    private sealed record Answer(byte Status, byte Response, uint Residual, byte Key, byte Code, byte Qualifier, byte[] Data);

    private Answer Execute(ReadOnlySpan<byte> cdb, int dataIn = 0, byte[]? dataOut = null, int target = 2, int unit = 0)
    {
        byte[] header = new byte[51];
        header[0] = 1;
        header[1] = (byte)target;
        header[2] = 0x40;
        header[3] = (byte)unit;
        cdb.CopyTo(header.AsSpan(19));
        _memory.TryWrite(new Gpa(Request), header);
        _memory.TryWrite(new Gpa(Response), Enumerable.Repeat((byte)0xee, 108).ToArray());
        Part[] parts = [new Part(Request, 51, false)];
        if (dataOut is not null)
        {
            _memory.TryWrite(new Gpa(Data), dataOut);
            parts = [.. parts, new Part(Data, (uint)dataOut.Length, false)];
        }
        parts = [.. parts, new Part(Response, 108, true)];
        if (dataIn > 0)
            parts = [.. parts, new Part(Data, (uint)dataIn, true)];
        Assert.True(_queues[2].TryAdd(parts, indirect: false) >= 0);
        _driver.Kick(2);
        _driver.Wait(_queues[2]);
        byte[] response = new byte[108];
        _memory.TryRead(new Gpa(Response), response);
        byte[] data = new byte[dataIn];
        _memory.TryRead(new Gpa(Data), data);
        return new Answer(
            response[10], response[11], BinaryPrimitives.ReadUInt32LittleEndian(response.AsSpan(4)), (byte)(response[14] & 0xf), response[24], response[25], data);
    }

    private static byte[] Cdb10(byte operation, uint block, ushort count, byte flags = 0)
    {
        byte[] cdb = new byte[10];
        cdb[0] = operation;
        cdb[1] = flags;
        BinaryPrimitives.WriteUInt32BigEndian(cdb.AsSpan(2), block);
        BinaryPrimitives.WriteUInt16BigEndian(cdb.AsSpan(7), count);
        return cdb;
    }

    /// <summary>There is no way to answer a request without room for a response.</summary>
    [Theory]
    [InlineData(50, 108)]
    [InlineData(51, 107)]
    public async Task ARequestThatIsTooShortAsksForAReset(uint request, uint response)
    {
        await AttachAsync();
        Assert.True(_queues[2].TryAdd([new Part(Request, request, false), new Part(Response, response, true)], indirect: false) >= 0);
        _driver.Kick(2);
        Assert.True(SpinWait.SpinUntil(() => (_driver.Status & 64) != 0, 120_000));
        Assert.False(_queues[2].TryTake(out int _, out uint _));
    }

    private void ClearAttention() => Execute([0x00, 0, 0, 0, 0, 0]);

    [Fact]
    public async Task AUnitSaysWhatItIs()
    {
        await AttachAsync();
        Answer first = Execute([0x00, 0, 0, 0, 0, 0]);
        Assert.Equal((2, 6, 0x29), (first.Status, first.Key, first.Code));
        Assert.Equal(0, Execute([0x00, 0, 0, 0, 0, 0]).Status);
        Answer inquiry = Execute([0x12, 0, 0, 0, 96, 0], 96);
        Assert.Equal(0, inquiry.Data[0]);
        Assert.Equal("KVASIR  HARDDISK        ", Encoding.ASCII.GetString(inquiry.Data, 8, 24));
        Assert.Equal(96u - 36, inquiry.Residual);
        Answer serial = Execute([0x12, 1, 0x80, 0, 64, 0], 64);
        Assert.Equal("S1", Encoding.ASCII.GetString(serial.Data, 4, serial.Data[3]));
        Answer capacity = Execute([0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
        Assert.Equal((uint)Blocks - 1, BinaryPrimitives.ReadUInt32BigEndian(capacity.Data));
        Assert.Equal(512u, BinaryPrimitives.ReadUInt32BigEndian(capacity.Data.AsSpan(4)));
        Answer wide = Execute([0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], 32);
        Assert.Equal((ulong)Blocks - 1, BinaryPrimitives.ReadUInt64BigEndian(wide.Data));
        Assert.Equal(0xc0, wide.Data[14]);
        Answer caching = Execute([0x1a, 0, 0x08, 0, 64, 0], 64);
        Assert.Equal((0x08, 0x12, 4), (caching.Data[4], caching.Data[5], caching.Data[6]));
        Answer luns = Execute([0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0], 64);
        Assert.Equal(8u, BinaryPrimitives.ReadUInt32BigEndian(luns.Data));
    }

    [Fact]
    public async Task DataMovesAndItsEndsAreChecked()
    {
        await AttachAsync();
        ClearAttention();
        Answer read = Execute(Cdb10(0x28, 5, 3), 1536);
        Assert.Equal(0, read.Status);
        Assert.Equal(0u, read.Residual);
        Assert.Equal([5, 6, 7], new[] { read.Data[0], read.Data[512], read.Data[1024] });
        Assert.Equal(512u, Execute(Cdb10(0x28, 5, 1), 1024).Residual);
        byte[] written = new byte[1024];
        new Random(1).NextBytes(written);
        Assert.Equal(0, Execute(Cdb10(0x2a, 100, 2, flags: 8), 0, written).Status);
        Assert.Equal(written, Execute(Cdb10(0x28, 100, 2), 1024).Data);
        Answer beyond = Execute(Cdb10(0x28, Blocks - 1, 2), 1024);
        Assert.Equal((2, 5, 0x21), (beyond.Status, beyond.Key, beyond.Code));
        // Less room than the command moves.
        Assert.Equal(5, Execute(Cdb10(0x28, 0, 4), 512).Key);
        Answer unknown = Execute([0xef, 0, 0, 0, 0, 0]);
        Assert.Equal((5, 0x20), (unknown.Key, unknown.Code));
        Assert.Equal(0, Execute(Cdb10(0x35, 0, 0)).Status);
        Assert.Equal(written, File.ReadAllBytes(_disk.Path).AsSpan(100 * 512, 1024).ToArray());
    }

    [Fact]
    public async Task UnmappedAndZeroedBlocksReadAsZeros()
    {
        await AttachAsync();
        ClearAttention();
        byte[] list = new byte[8 + 32];
        BinaryPrimitives.WriteUInt16BigEndian(list, 38);
        BinaryPrimitives.WriteUInt16BigEndian(list.AsSpan(2), 32);
        BinaryPrimitives.WriteUInt64BigEndian(list.AsSpan(8), 16);
        BinaryPrimitives.WriteUInt32BigEndian(list.AsSpan(16), 8);
        BinaryPrimitives.WriteUInt64BigEndian(list.AsSpan(24), 3);
        BinaryPrimitives.WriteUInt32BigEndian(list.AsSpan(32), 1);
        byte[] unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 40, 0];
        Assert.Equal(0, Execute(unmap, 0, list).Status);
        byte[] sameAs = [0x93, 8, 0, 0, 0, 0, 0, 0, 0, 40, 0, 0, 0, 4, 0, 0];
        Assert.Equal(0, Execute(sameAs, 0, new byte[512]).Status);
        byte[] content = File.ReadAllBytes(_disk.Path);
        for (int block = 0; block < 64; block++)
        {
            bool zero = block is 0 or 3 or (>= 16 and < 24) or (>= 40 and < 44);
            Assert.Equal(zero ? 0 : block, content[block * 512]);
        }
        byte[] pattern = new byte[512];
        pattern[9] = 1;
        Assert.Equal(5, Execute(sameAs, 0, pattern).Key);
        BinaryPrimitives.WriteUInt64BigEndian(list.AsSpan(8), Blocks);
        Assert.Equal((5, 0x21), (Execute(unmap, 0, list).Key, Execute(unmap, 0, list).Code));
        BinaryPrimitives.WriteUInt16BigEndian(list.AsSpan(2), 33);
        Assert.Equal(0x26, Execute(unmap, 0, list).Code);
    }

    [Fact]
    public async Task ACdIsReadOnlyAndHasATrack()
    {
        await AttachAsync(cd: true);
        ClearAttention();
        Assert.Equal(5, Execute([0x12, 0, 0, 0, 36, 0], 36).Data[0]);
        Answer capacity = Execute([0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], 8);
        Assert.Equal((uint)Blocks / 4 - 1, BinaryPrimitives.ReadUInt32BigEndian(capacity.Data));
        Assert.Equal(4, Execute(Cdb10(0x28, 1, 1), 2048).Data[0]);
        Answer write = Execute(Cdb10(0x2a, 0, 1), 0, new byte[2048]);
        Assert.Equal((7, 0x27), (write.Key, write.Code));
        Answer toc = Execute([0x43, 0, 0, 0, 0, 0, 0, 0, 20, 0], 20);
        Assert.Equal((1, 1, 0xaa), (toc.Data[2], toc.Data[3], toc.Data[14]));
        Assert.Equal((uint)Blocks / 4, BinaryPrimitives.ReadUInt32BigEndian(toc.Data.AsSpan(16)));
    }

    [Fact]
    public async Task UnitsComeAndGo()
    {
        Assert.Equal(3, Execute([0x00, 0, 0, 0, 0, 0]).Response);
        ulong events = 0xb0_0000;
        for (int i = 0; i < 4; i++)
            _queues[1].TryAdd([new Part(events + (ulong)i * 64, 16, true)], indirect: false);
        _driver.Kick(1);
        await AttachAsync();
        byte[] item = new byte[16];
        void Next()
        {
            (int id, uint length) = _driver.Wait(_queues[1]);
            Assert.Equal(16u, length);
            _memory.TryRead(new Gpa(events + (ulong)id * 64), item);
        }

        Next();
        Assert.Equal([1, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], item);
        ClearAttention();
        // No such unit of a target that there is.
        Answer missing = Execute([0x00, 0, 0, 0, 0, 0], unit: 5);
        Assert.Equal((2, 5, 0x25), (missing.Status, missing.Key, missing.Code));
        Assert.Equal(0x7f, Execute([0x12, 0, 0, 0, 36, 0], 36, unit: 5).Data[0]);
        await _disk.Backend.ResizeAsync(2 * Blocks * 512, TestContext.Current.CancellationToken);
        Next();
        Assert.Equal([3, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0x2a, 0x09, 0, 0], item);
        Answer changed = Execute([0x00, 0, 0, 0, 0, 0]);
        Assert.Equal((6, 0x2a, 9), (changed.Key, changed.Code, changed.Qualifier));
        _device.Detach(_unit!);
        Next();
        Assert.Equal(2, item[12]);
        Assert.Equal(3, Execute([0x00, 0, 0, 0, 0, 0]).Response);
    }

    [Fact]
    public async Task AHostErrorIsAMediumError()
    {
        await AttachAsync();
        ClearAttention();
        _disk.Faults.Add(new FaultRule(FaultKind.Read, Once: true));
        Answer read = Execute(Cdb10(0x28, 5, 1), 512);
        Assert.Equal((2, 3, 0x11, 512u), (read.Status, read.Key, read.Code, read.Residual));
        Assert.Equal(0, Execute(Cdb10(0x28, 5, 1), 512).Status);
    }

    [Fact]
    public async Task RandomCommandsAreAnswered()
    {
        await AttachAsync();
        Random random = new(4);
        byte[] cdb = new byte[16];
        for (int i = 0; i < 3000; i++)
        {
            random.NextBytes(cdb);
            // Mostly commands that there are.
            byte[] known = [0x00, 0x03, 0x08, 0x12, 0x1a, 0x25, 0x28, 0x35, 0x41, 0x42, 0x43, 0x4a, 0x5a, 0x88, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa8];
            if (random.Next(4) != 0)
                cdb[0] = known[random.Next(known.Length)];
            if (random.Next(2) == 0)
                cdb.AsSpan(2, 6).Clear();
            bool output = random.Next(2) == 0;
            byte[] data = new byte[random.Next(1, 5000)];
            random.NextBytes(data);
            Answer answer = output ? Execute(cdb, 0, data) : Execute(cdb, data.Length);
            Assert.Contains(answer.Status, (byte[])[0, 2]);
        }
        Assert.Equal(15u, _driver.Status);
        // A request that is too short to be one.
        _queues[2].TryAdd([new Part(Request, 20, false), new Part(Response, 108, true)], indirect: false);
        _driver.Kick(2);
        Assert.True(SpinWait.SpinUntil(() => (_driver.Status & 64) != 0, 120_000));
    }
}
