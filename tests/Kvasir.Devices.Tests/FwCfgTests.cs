using System;
using System.Buffers.Binary;
using System.Linq;
using System.Text;
using Kvasir.Core;
using Kvasir.Devices.Firmware;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class FwCfgTests : IDisposable
{
    private const uint Error = 1;
    private const uint DoRead = 2;
    private const uint DoSkip = 4;
    private const uint DoSelect = 8;
    private const uint DoWrite = 16;

    private readonly GuestMemory _memory = new(2 << 20, "fw-cfg-test");
    private readonly PortBus _bus = new();
    private readonly FwCfg _device;

    public FwCfgTests()
    {
        _device = new FwCfg(_memory);
        _device.Map(_bus);
    }

    public void Dispose() => _memory.Dispose();

    [Fact]
    public void SignatureAndFeatures()
    {
        Assert.Equal("QEMU", Encoding.ASCII.GetString(ReadItem(0, 4)));
        Assert.Equal([3, 0, 0, 0, 0], ReadItem(1, 5));
        byte[] dma = [.. Enumerable.Range(0, 8).Select(i => (byte)_bus.Read((ushort)(0x514 + i), AccessSize.Byte))];
        Assert.Equal("QEMU CFG", Encoding.ASCII.GetString(dma));
        Assert.Equal(0x554d_4551u, _bus.Read(0x514, AccessSize.Dword));
        Assert.Equal(0x4746_4320u, _bus.Read(0x518, AccessSize.Dword));
    }

    [Fact]
    public void DirectoryListsFilesByName()
    {
        ushort second = _device.AddFile("opt/z", [1, 2, 3]);
        ushort first = _device.AddFile("etc/a", Encoding.ASCII.GetBytes("hello"));
        byte[] directory = ReadItem(0x19, 4 + 128);
        Assert.Equal(2u, BinaryPrimitives.ReadUInt32BigEndian(directory));
        Assert.Equal(5u, BinaryPrimitives.ReadUInt32BigEndian(directory.AsSpan(4)));
        Assert.Equal(first, BinaryPrimitives.ReadUInt16BigEndian(directory.AsSpan(8)));
        Assert.Equal("etc/a", Encoding.ASCII.GetString(directory, 12, 56).TrimEnd('\0'));
        Assert.Equal(second, BinaryPrimitives.ReadUInt16BigEndian(directory.AsSpan(72)));
        Assert.Equal("hello\0", Encoding.ASCII.GetString(ReadItem(first, 6)));
        _device.AddFile("etc/a", [9]);
        Assert.Equal([9, 0], ReadItem(first, 2));
        Assert.Throws<ArgumentException>(() => _device.AddFile(new string('x', 56), []));
        Assert.Throws<ArgumentException>(() => _device.AddFile("", []));
    }

    [Fact]
    public void UnknownItemsReadAsZero()
    {
        Assert.Equal([0, 0], ReadItem(0x1234, 2));
        Assert.Equal([0, 0], ReadItem(0xffff, 2));
    }

    [Fact]
    public void DmaReadsSkipsAndSelects()
    {
        byte[] content = new byte[10_000];
        new Random(3).NextBytes(content);
        ushort key = _device.AddFile("etc/big", content);
        Assert.Equal(0u, Dma(DoSelect | DoSkip | (uint)key << 16, 100, 0));
        Assert.Equal(0u, Dma(DoRead, 5_000, 0x10_0000));
        Assert.Equal(content[100..5100], FromMemory(0x10_0000, 5_000));
        // Past the end there are zeros.
        Assert.Equal(0u, Dma(DoRead, 6_000, 0x11_0000));
        Assert.Equal([.. content[5100..], .. new byte[1100]], FromMemory(0x11_0000, 6_000));
    }

    [Fact]
    public void DmaWritesOnlyWhatIsWritable()
    {
        int seen = 0;
        byte[] content = new byte[8];
        ushort writable = _device.AddFile("etc/w", content, writable: true, written: c => seen = c.Length);
        ushort fixedKey = _device.AddFile("etc/r", new byte[8]);
        _memory.TryWrite(new Gpa(0x10_0000), "abcdefgh"u8);
        Assert.Equal(0u, Dma(DoSelect | DoWrite | (uint)writable << 16, 8, 0x10_0000));
        Assert.Equal("abcdefgh", Encoding.ASCII.GetString(content));
        Assert.Equal(8, seen);
        Assert.Single(_device.WritableItems);
        Assert.Equal(Error, Dma(DoWrite, 1, 0x10_0000));
        Assert.Equal(Error, Dma(DoSelect | DoWrite | (uint)fixedKey << 16, 8, 0x10_0000));
        Assert.Equal(Error, Dma(DoSelect | DoWrite | 0x7777u << 16, 8, 0x10_0000));
    }

    [Theory]
    [InlineData(0xffff_ffffu, 0x10_0000ul)]
    [InlineData(16u, 0xa_0000ul)]
    [InlineData(16u, 0xffff_ffff_ffff_fff8ul)]
    [InlineData(0x20_0000u, 0x10_0000ul)]
    public void HostileTransfersSetTheErrorBit(uint length, ulong address)
    {
        Assert.Equal(Error, Dma(DoRead | DoSelect, length, address));
    }

    [Fact]
    public void HostileDescriptorAddressesDoNothing()
    {
        foreach (ulong address in new[] { ulong.MaxValue, ulong.MaxValue - 15, 0xa_0000ul, 0x20_0000ul - 8, 1ul << 63 })
        {
            WriteDmaAddress(address);
            Assert.Equal("QEMU", Encoding.ASCII.GetString(ReadItem(0, 4)));
        }
        // Where the control field itself is in memory, the error is told.
        Assert.True(_memory.TryRead(new Gpa(0x20_0000 - 8), out uint control));
        Assert.Equal(Error, BinaryPrimitives.ReverseEndianness(control));
    }

    private byte[] ReadItem(ushort key, int length)
    {
        _bus.Write(0x510, AccessSize.Word, key);
        return [.. Enumerable.Range(0, length).Select(_ => (byte)_bus.Read(0x511, AccessSize.Byte))];
    }

    private byte[] FromMemory(ulong address, int length)
    {
        byte[] bytes = new byte[length];
        Assert.True(_memory.TryRead(new Gpa(address), bytes));
        return bytes;
    }

    private uint Dma(uint control, uint length, ulong address)
    {
        const ulong descriptor = 0x8000;
        byte[] fields = new byte[16];
        BinaryPrimitives.WriteUInt32BigEndian(fields, control);
        BinaryPrimitives.WriteUInt32BigEndian(fields.AsSpan(4), length);
        BinaryPrimitives.WriteUInt64BigEndian(fields.AsSpan(8), address);
        Assert.True(_memory.TryWrite(new Gpa(descriptor), fields));
        WriteDmaAddress(descriptor);
        Assert.True(_memory.TryRead(new Gpa(descriptor), fields));
        return BinaryPrimitives.ReadUInt32BigEndian(fields);
    }

    private void WriteDmaAddress(ulong address)
    {
        _bus.Write(0x514, AccessSize.Dword, BinaryPrimitives.ReverseEndianness((uint)(address >> 32)));
        _bus.Write(0x518, AccessSize.Dword, BinaryPrimitives.ReverseEndianness((uint)address));
    }
}
