using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class PicTests
{
    private readonly ProbeLine _int = new();
    private readonly Pic8259 _pic;

    public PicTests()
    {
        _pic = new Pic8259(_int);
        Initialize(_pic, 0x20, 0x28);
    }

    internal static void Initialize(Pic8259 pic, byte master, byte slave, byte icw4 = 1)
    {
        Out(pic, 0x20, 0x11);
        Out(pic, 0xa0, 0x11);
        Out(pic, 0x21, master);
        Out(pic, 0xa1, slave);
        Out(pic, 0x21, 4);
        Out(pic, 0xa1, 2);
        Out(pic, 0x21, icw4);
        Out(pic, 0xa1, 1);
    }

    [Fact]
    public void QuietUntilInitialized()
    {
        Pic8259 pic = new(_int);
        pic.Input(3).Set(true);
        Assert.False(_int.Level);
        Assert.Equal(0xffu, pic.ReadPort(0x21, AccessSize.Byte));
    }

    [Fact]
    public void FixedPriority()
    {
        foreach (int input in new[] { 7, 3, 5, 0 })
            Pulse(input);
        Assert.Equal(0xa9u, In(0x20));
        Assert.Equal(0x20, _pic.Acknowledge());
        Assert.False(_int.Level);
        Out(0x20, 0x20);
        Assert.True(_int.Level);
        Assert.Equal(0x23, _pic.Acknowledge());
        Pulse(1);
        Assert.Equal(0x21, _pic.Acknowledge());
        Out(0x20, 0x0b);
        Assert.Equal(0x0au, In(0x20));
        Out(0x20, 0x20);
        Out(0x20, 0x20);
        Assert.Equal(0x25, _pic.Acknowledge());
        Out(0x20, 0x20);
        Assert.Equal(0x27, _pic.Acknowledge());
        Out(0x20, 0x20);
        Assert.Equal(0u, In(0x20));
        Assert.False(_int.Level);
    }

    [Fact]
    public void MaskHoldsARequest()
    {
        Out(0x21, 0x08);
        Pulse(3);
        Assert.False(_int.Level);
        Assert.Equal(0x08u, In(0x20));
        Out(0x21, 0);
        Assert.True(_int.Level);
        Assert.Equal(0x23, _pic.Acknowledge());
    }

    [Fact]
    public void SlaveThroughTheCascade()
    {
        Pulse(9);
        Pulse(1);
        Pulse(8);
        Assert.Equal(0x21, _pic.Acknowledge());
        Out(0x20, 0x20);
        Assert.Equal(0x28, _pic.Acknowledge());
        // The slave's other request is of lower priority than what it serves.
        Out(0x20, 0x20);
        Assert.False(_int.Level);
        Out(0xa0, 0x20);
        Assert.True(_int.Level);
        Assert.Equal(0x29, _pic.Acknowledge());
    }

    [Fact]
    public void CascadeBlocksHigherSlaveInputUnlessSpecialFullyNested()
    {
        Pulse(12);
        Assert.Equal(0x2c, _pic.Acknowledge());
        Pulse(8);
        Assert.False(_int.Level);
        Initialize(_pic, 0x20, 0x28, icw4: 0x11);
        Pulse(12);
        Assert.Equal(0x2c, _pic.Acknowledge());
        Pulse(8);
        Assert.True(_int.Level);
        Assert.Equal(0x28, _pic.Acknowledge());
    }

    [Fact]
    public void SpuriousVectors()
    {
        Out(0x4d0, 1 << 3);
        _pic.Input(3).Set(true);
        Assert.True(_int.Level);
        _pic.Input(3).Set(false);
        Assert.False(_int.Level);
        Assert.Equal(0x27, _pic.Acknowledge());
        Out(0x20, 0x0b);
        // A spurious interrupt sets no in-service bit: handlers tell it by that.
        Assert.Equal(0u, In(0x20));
    }

    [Fact]
    public void LevelTriggeredInputAsksAgain()
    {
        Out(0x4d1, 0xff);
        Assert.Equal(0xdeu, In(0x4d1));
        Out(0x4d0, 0xff);
        Assert.Equal(0xf8u, In(0x4d0));
        _pic.Input(11).Set(true);
        Assert.Equal(0x2b, _pic.Acknowledge());
        Out(0xa0, 0x20);
        Out(0x20, 0x20);
        Assert.Equal(0x2b, _pic.Acknowledge());
        _pic.Input(11).Set(false);
        Out(0xa0, 0x20);
        Out(0x20, 0x20);
        Assert.False(_int.Level);
    }

    [Fact]
    public void EdgeIsSeenOnce()
    {
        _pic.Input(4).Set(true);
        Assert.Equal(0x24, _pic.Acknowledge());
        Out(0x20, 0x20);
        _pic.Input(4).Set(true);
        Assert.False(_int.Level);
        _pic.Input(4).Set(false);
        _pic.Input(4).Set(true);
        Assert.True(_int.Level);
    }

    [Fact]
    public void RotateOnEoi()
    {
        foreach (int input in new[] { 3, 4, 5 })
            Pulse(input);
        Assert.Equal(0x23, _pic.Acknowledge());
        // 3 becomes the lowest: 4 is the highest now.
        Out(0x20, 0xa0);
        Pulse(3);
        Pulse(0);
        Assert.Equal([0x24, 0x25, 0x20, 0x23], Enumerable.Range(0, 4).Select(_ =>
        {
            int vector = _pic.Acknowledge();
            Out(0x20, 0x20);
            return vector;
        }));
    }

    [Fact]
    public void SetPriorityAndRotateOnSpecificEoi()
    {
        Out(0x20, 0xc0 | 4);
        Pulse(4);
        Pulse(5);
        Assert.Equal(0x25, _pic.Acknowledge());
        Out(0x20, 0xe0 | 5);
        Pulse(6);
        Assert.Equal(0x26, _pic.Acknowledge());
        Out(0x20, 0x60 | 6);
        Assert.Equal(0x24, _pic.Acknowledge());
        Out(0x20, 0x0b);
        Assert.Equal(0x10u, In(0x20));
    }

    [Fact]
    public void AutomaticEoiWithRotation()
    {
        Initialize(_pic, 0x20, 0x28, icw4: 3);
        Out(0x20, 0x80);
        Pulse(2 + 1);
        Pulse(4);
        Assert.Equal(0x23, _pic.Acknowledge());
        Out(0x20, 0x0b);
        Assert.Equal(0u, In(0x20));
        Pulse(3);
        Assert.Equal(0x24, _pic.Acknowledge());
        Assert.Equal(0x23, _pic.Acknowledge());
    }

    [Fact]
    public void SpecialMaskModeLetsLowerInputsThrough()
    {
        Pulse(2 - 1);
        Assert.Equal(0x21, _pic.Acknowledge());
        Pulse(6);
        Assert.False(_int.Level);
        Out(0x21, 1 << 1);
        Out(0x20, 0x68);
        Assert.True(_int.Level);
        Assert.Equal(0x26, _pic.Acknowledge());
        // The non-specific EOI passes the masked level over.
        Out(0x20, 0x20);
        Out(0x20, 0x0b);
        Assert.Equal(0x02u, In(0x20));
        Out(0x20, 0x48);
        Out(0x20, 0x20);
        Assert.Equal(0u, In(0x20));
    }

    [Fact]
    public void Poll()
    {
        Pulse(5);
        Out(0x20, 0x0c);
        Assert.Equal(0x85u, In(0x20));
        Assert.False(_int.Level);
        Out(0x20, 0x0c);
        Assert.Equal(0u, In(0x20));
        Out(0x20, 0x0b);
        Assert.Equal(0x20u, In(0x20));
    }

    [Fact]
    public void InitializationForgetsEdges()
    {
        _pic.Input(4).Set(true);
        Out(0x21, 0x12);
        Initialize(_pic, 0x40, 0x48);
        Assert.Equal(0u, In(0x21));
        Assert.False(_int.Level);
        _pic.Input(4).Set(false);
        _pic.Input(4).Set(true);
        Assert.Equal(0x44, _pic.Acknowledge());
    }

    [Fact]
    public void StateMoves()
    {
        Pulse(3);
        Pulse(9);
        _pic.Acknowledge();
        ProbeLine line = new();
        Pic8259 other = new(line);
        other.Restore(_pic.Save());
        Assert.Equal(_pic.Save(), other.Save());
        Assert.Equal(_int.Level, line.Level);
        Out(0x20, 0x20);
        Out(other, 0x20, 0x20);
        Assert.Equal(_pic.Acknowledge(), other.Acknowledge());
    }

    private static void Out(Pic8259 pic, ushort port, byte value) => pic.WritePort(port, AccessSize.Byte, value);

    private void Out(ushort port, byte value) => Out(_pic, port, value);

    private uint In(ushort port) => _pic.ReadPort(port, AccessSize.Byte);

    private void Pulse(int input) => _pic.Input(input).Pulse();
}
