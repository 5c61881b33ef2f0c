using System;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class DmaTests : IDisposable
{
    private readonly GuestMemory _memory = new(4 << 20, "dma-test");
    private readonly PortBus _bus = new();
    private readonly Dma8237 _dma;

    public DmaTests()
    {
        _dma = new Dma8237(_memory);
        _dma.Map(_bus);
    }

    public void Dispose() => _memory.Dispose();

    [Fact]
    public void RegistersReadBack()
    {
        Out(0x0c, 0);
        Out(0x04, 0x34);
        Out(0x04, 0x12);
        Out(0x05, 0xff);
        Out(0x05, 0x01);
        Out(0x0c, 0);
        Assert.Equal([0x34u, 0x12u, 0xffu, 0x01u], new[] { In(0x04), In(0x04), In(0x05), In(0x05) });
        Out(0xd8, 0);
        Out(0xc4, 0x78);
        Out(0xc4, 0x56);
        Out(0xd8, 0);
        Assert.Equal(0x78u, In(0xc4));
        Assert.Equal(0x56u, In(0xc5));
        for (ushort port = 0x81; port <= 0x8f; port++)
        {
            Out(port, (byte)(port ^ 0x55));
            Assert.Equal((uint)(port ^ 0x55), In(port));
        }
        Assert.Equal(0xffu, In(0x0f));
        Out(0x0e, 0);
        Assert.Equal(0xf0u, In(0x0f));
        Out(0x0a, 6);
        Assert.Equal(0xf4u, In(0x0f));
        Out(0x0d, 0);
        Assert.Equal(0xffu, In(0x0f));
    }

    [Fact]
    public void DeviceToMemoryOnAByteChannel()
    {
        Program(2, 0x01_8000, 511, 0x46);
        byte[] sector = new byte[600];
        new Random(1).NextBytes(sector);
        Assert.Equal(0, _dma.Transfer(2, sector, toMemory: false, out _));
        Assert.Equal(300, _dma.Transfer(2, sector.AsSpan(0, 300), toMemory: true, out bool terminal));
        Assert.False(terminal);
        Assert.Equal(212, _dma.Transfer(2, sector.AsSpan(300), toMemory: true, out terminal));
        Assert.True(terminal);
        byte[] got = new byte[513];
        Assert.True(_memory.TryRead(new Gpa(0x01_8000), got));
        Assert.Equal([.. sector[..512], 0], got);
        Assert.Equal(0x04u, In(0x08));
        Assert.Equal(0u, In(0x08));
        // The channel has masked itself.
        Assert.Equal(0, _dma.Transfer(2, sector, toMemory: true, out _));
    }

    [Fact]
    public void MemoryToDeviceWithAutoInitializeOnAWordChannel()
    {
        byte[] content = new byte[64];
        new Random(2).NextBytes(content);
        Assert.True(_memory.TryWrite(new Gpa(0x12_0000), content));
        Out(0x8b, 0x12);
        Out(0xd8, 0);
        Out(0xc4, 0);
        Out(0xc4, 0);
        Out(0xc6, 15);
        Out(0xc6, 0);
        Out(0xd6, 0x59);
        Out(0xd4, 1);
        byte[] got = new byte[48];
        Assert.Equal(32, _dma.Transfer(5, got, toMemory: false, out bool terminal));
        Assert.True(terminal);
        Assert.Equal(16, _dma.Transfer(5, got.AsSpan(32), toMemory: false, out terminal));
        Assert.False(terminal);
        Assert.Equal([.. content[..32], .. content[..16]], got);
    }

    [Fact]
    public void DecrementAndHostileAddresses()
    {
        Program(1, 0x00_0003, 3, 0x69);
        Assert.True(_memory.TryWrite(new Gpa(0), new byte[] { 1, 2, 3, 4 }));
        byte[] got = new byte[4];
        Assert.Equal(4, _dma.Transfer(1, got, toMemory: false, out _));
        Assert.Equal([4, 3, 2, 1], got);
        // Nothing is mapped at F0 0000h: ones are read, writes are lost.
        Program(1, 0xf0_0000, 3, 0x49);
        Assert.Equal(4, _dma.Transfer(1, got, toMemory: false, out _));
        Assert.Equal([255, 255, 255, 255], got);
        Program(1, 0xf0_0000, 3, 0x45);
        Assert.Equal(4, _dma.Transfer(1, got, toMemory: true, out bool terminal));
        Assert.True(terminal);
        Assert.Equal(0, _dma.Transfer(4, got, toMemory: true, out _));
    }

    private void Program(int channel, uint address, ushort count, byte mode)
    {
        Out(0x0a, (byte)(4 | channel));
        Out(0x0c, 0);
        Out((ushort)(channel * 2), (byte)address);
        Out((ushort)(channel * 2), (byte)(address >> 8));
        Out((ushort)(channel * 2 + 1), (byte)count);
        Out((ushort)(channel * 2 + 1), (byte)(count >> 8));
        Out(channel == 1 ? (ushort)0x83 : (ushort)0x81, (byte)(address >> 16));
        Out(0x0b, (byte)(mode & ~3 | channel));
        Out(0x0a, (byte)channel);
    }

    private void Out(ushort port, byte value) => _bus.Write(port, AccessSize.Byte, value);

    private uint In(ushort port) => _bus.Read(port, AccessSize.Byte);
}
