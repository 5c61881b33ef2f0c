using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Input;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class I8042Tests
{
    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ProbeLine _irq1 = new();
    private readonly ProbeLine _irq12 = new();
    private readonly ProbePower _power = new();
    private readonly A20Gate _a20 = new(_ => { });
    private readonly I8042 _controller;

    public I8042Tests() => _controller = new I8042(_irq1, _irq12, _a20, _power, _clock);

    /// <summary>What SeaBIOS does in its keyboard set-up.</summary>
    [Fact]
    public void SeaBiosSetUp()
    {
        Assert.Empty(Drain());
        Command(0xaa);
        Assert.Equal([0x55], Drain());
        Command(0xab);
        Assert.Equal([0x00], Drain());
        Command(0x60);
        Data(0x30);
        Data(0xff);
        Assert.Equal([0xfa, 0xaa], Drain());
        Data(0xf5);
        Assert.Equal([0xfa], Drain());
        Data(0xf0);
        Assert.Equal([0xfa], Drain());
        Data(0x02);
        Assert.Equal([0xfa], Drain());
        Command(0x60);
        Data(0x61);
        Data(0xf4);
        Assert.Equal([0xfa], Drain());
        Assert.Equal(0, _power.Resets);
    }

    /// <summary>
    /// What Linux's i8042 driver does: test, read and write the command byte, find the AUX port by its loop and its interrupt.
    /// </summary>
    [Fact]
    public void LinuxProbe()
    {
        Command(0xaa);
        Assert.Equal([0x55], Drain());
        Command(0x20);
        byte mode = Drain()[0];
        Assert.Equal(0x45, mode);
        // All off.
        WriteMode((byte)((mode | 0x30) & ~3));
        // AUX loop: the byte comes back marked as the mouse's.
        Command(0xd3);
        Data(0x5a);
        Assert.Equal(0x21, Status() & 0x21);
        Assert.Equal([0x5a], Drain());
        // No active multiplexing: the sequence comes back unchanged.
        foreach (byte b in new byte[] { 0xf0, 0x56, 0xa4 })
        {
            Command(0xd3);
            Data(b);
            Assert.Equal([b], Drain());
        }
        Command(0xa7);
        Command(0x20);
        Assert.Equal(0x20, Drain()[0] & 0x20);
        Command(0xa8);
        Command(0x20);
        Assert.Equal(0, Drain()[0] & 0x20);
        // The AUX interrupt.
        WriteMode(0x46);
        Command(0xd3);
        Data(0xa5);
        Assert.True(_irq12.Level);
        Assert.Equal([0xa5], Drain());
        Assert.False(_irq12.Level);
        // atkbd: identify, LEDs, reset.
        WriteMode(0x47);
        Data(0xf2);
        Assert.Equal([0xfa, 0xab, 0x41], Drain());
        Data(0xed);
        Data(0x07);
        Assert.Equal([0xfa, 0xfa], Drain());
        Assert.Equal(7, _controller.Leds);
        // psmouse: an IntelliMouse Explorer.
        Assert.Equal([0xfa, 0xaa, 0x00], Mouse(0xff));
        Assert.Equal([0xfa, 0x00], Mouse(0xf2));
        foreach (byte rate in new byte[] { 200, 100, 80 })
        {
            Assert.Equal([0xfa], Mouse(0xf3));
            Assert.Equal([0xfa], Mouse(rate));
        }
        Assert.Equal([0xfa, 0x03], Mouse(0xf2));
        foreach (byte rate in new byte[] { 200, 200, 80 })
        {
            Mouse(0xf3);
            Mouse(rate);
        }
        Assert.Equal([0xfa, 0x04], Mouse(0xf2));
        Assert.Equal([0xfa], Mouse(0xf4));
    }

    [Fact]
    public void KeysInTranslatedSet2()
    {
        _controller.Key(PcKey.A, true);
        Assert.True(_irq1.Level);
        _controller.Key(PcKey.A, false);
        _controller.Key(PcKey.Up, true);
        _controller.Key(PcKey.Up, false);
        _controller.Key(PcKey.F7, true);
        _controller.Key(PcKey.F7, false);
        Assert.Equal([0x1e, 0x9e, 0xe0, 0x48, 0xe0, 0xc8, 0x41, 0xc1], Drain());
        Assert.False(_irq1.Level);
        Assert.Equal(8, _irq1.Rises);
        _controller.Key(PcKey.Pause, true);
        _controller.Key(PcKey.Pause, false);
        Assert.Equal([0xe1, 0x1d, 0x45, 0xe1, 0x9d, 0xc5], Drain());
        _controller.Key(PcKey.PrintScreen, true);
        _controller.Key(PcKey.PrintScreen, false);
        Assert.Equal([0xe0, 0x2a, 0xe0, 0x37, 0xe0, 0xb7, 0xe0, 0xaa], Drain());
    }

    [Fact]
    public void KeysInPlainSets()
    {
        WriteMode(0x01);
        _controller.Key(PcKey.A, true);
        _controller.Key(PcKey.A, false);
        _controller.Key(PcKey.Delete, true);
        _controller.Key(PcKey.Delete, false);
        Assert.Equal([0x1c, 0xf0, 0x1c, 0xe0, 0x71, 0xe0, 0xf0, 0x71], Drain());
        Data(0xf0);
        Data(0x01);
        Assert.Equal([0xfa, 0xfa], Drain());
        Data(0xf0);
        Data(0x00);
        Assert.Equal([0xfa, 0xfa, 0x01], Drain());
        _controller.Key(PcKey.A, true);
        _controller.Key(PcKey.A, false);
        Assert.Equal([0x1e, 0x9e], Drain());
        Data(0xf0);
        Data(0x03);
        Assert.Equal([0xfa, 0xfe], Drain());
    }

    [Fact]
    public void EveryKeyRoundTripsThroughTheTranslation()
    {
        foreach (PcKey key in System.Enum.GetValues<PcKey>())
        {
            if (key is PcKey.None or PcKey.Pause or PcKey.PrintScreen)
                continue;
            _controller.Key(key, true);
            _controller.Key(key, false);
            byte code = (byte)key;
            List<byte> expected = (int)key >> 8 == 0xe0 ? [0xe0, code, 0xe0, (byte)(code | 0x80)] : [code, (byte)(code | 0x80)];
            Assert.Equal(expected, Drain());
        }
    }

    [Fact]
    public void HeldKeyRepeats()
    {
        _controller.Key(PcKey.B, true);
        Assert.Equal([0x30], Drain());
        _clock.Advance(499_000_000);
        Assert.Empty(Drain());
        _clock.Advance(1_000_000);
        Assert.Equal([0x30], Drain());
        _clock.Advance(1_000_000_000);
        Assert.InRange(Drain().Count, 9, 11);
        _controller.Key(PcKey.B, false);
        Assert.Equal([0xb0], Drain());
        _clock.Advance(5_000_000_000);
        Assert.Empty(Drain());
    }

    [Fact]
    public void DisabledKeyboardHoldsItsKeys()
    {
        Command(0xad);
        _controller.Key(PcKey.Enter, true);
        Assert.Empty(Drain());
        Assert.False(_irq1.Level);
        Command(0xae);
        Assert.Equal([0x1c], Drain());
        // Scanning disabled in the keyboard itself: keys are dropped.
        Data(0xf5);
        Drain();
        _controller.Key(PcKey.Enter, false);
        Assert.Empty(Drain());
    }

    [Fact]
    public void AFullQueueDropsWholeKeys()
    {
        for (int i = 0; i < 200; i++)
        {
            _controller.Key(PcKey.Left, true);
            _controller.Key(PcKey.Left, false);
        }
        List<byte> bytes = Drain();
        Assert.True(bytes.Count > 30);
        for (int i = 0; i + 1 < bytes.Count; i += 2)
        {
            Assert.Equal(0xe0, bytes[i]);
            Assert.Equal(0x4b, bytes[i + 1] & 0x7f);
        }
    }

    [Fact]
    public void MousePackets()
    {
        WriteMode(0x47);
        Mouse(0xf4);
        _controller.MoveMouse(5, -3);
        Assert.True(_irq12.Level);
        Assert.Equal([0x28, 0x05, 0xfd], Drain());
        _controller.SetMouseButtons(3);
        Assert.Equal([0x0b, 0x00, 0x00], Drain());
        // More than nine bits hold is spread over packets.
        _controller.MoveMouse(-600, 0);
        Assert.Equal([0x1b, 0x00, 0x00, 0x1b, 0x00, 0x00, 0x1b, 0xa8, 0x00], Drain());
        Assert.Equal([0xfa, 0x25, 0x02, 0x64], Mouse(0xe9));
        Mouse(0xf5);
        _controller.MoveMouse(1, 1);
        Assert.Empty(Drain());
    }

    [Fact]
    public void WheelAndRemoteMode()
    {
        foreach (byte b in new byte[] { 0xf3, 200, 0xf3, 100, 0xf3, 80, 0xf4 })
            Mouse(b);
        _controller.MoveMouse(0, 0, 1);
        Assert.Equal([0x08, 0x00, 0x00, 0x01], Drain());
        Mouse(0xf0);
        _controller.MoveMouse(2, 2, -1);
        Assert.Empty(Drain());
        Assert.Equal([0xfa, 0x08, 0x02, 0x02, 0xff], Mouse(0xeb));
        Assert.Equal([0xfa], Mouse(0xee));
        Assert.Equal([0x42], Mouse(0x42));
        Assert.Equal([0xfa], Mouse(0xec));
    }

    [Fact]
    public void OutputPortDrivesA20AndReset()
    {
        Command(0xd0);
        Assert.Equal(0x03, Drain()[0] & 0x03);
        Command(0xd1);
        Data(0xdd);
        Assert.False(_a20.Enabled);
        Command(0xdf);
        Assert.True(_a20.Enabled);
        Command(0xdd);
        Assert.False(_a20.Enabled);
        Command(0xd1);
        Data(0xfe);
        Assert.Equal(1, _power.Resets);
        Command(0xfe);
        Assert.Equal(2, _power.Resets);
        // HIMEM's null pulse.
        Command(0xff);
        Assert.Equal(2, _power.Resets);
    }

    [Fact]
    public void ControllerRam()
    {
        Command(0x7f);
        Data(0x12);
        Command(0x3f);
        Assert.Equal([0x12], Drain());
        Assert.Equal(0x08, Status() & 0x08);
        Data(0xee);
        Assert.Equal(0, Status() & 0x08);
        Assert.Equal([0xee], Drain());
        Command(0xa4);
        Assert.Equal([0xf1], Drain());
        Command(0xd2);
        Data(0x77);
        Assert.Equal(0x01, Status() & 0x21);
        Assert.Equal([0x77], Drain());
    }

    [Fact]
    public void StateMoves()
    {
        WriteMode(0x47);
        _controller.Key(PcKey.A, true);
        _controller.Key(PcKey.Up, true);
        Mouse(0xf4);
        _controller.MoveMouse(1, 2);
        ProbeLine irq1 = new();
        I8042 other = new(irq1, new ProbeLine(), _a20, _power, _clock);
        other.Restore(_controller.Save());
        Assert.Equal(_controller.Save(), other.Save());
        Assert.Equal(_irq1.Level, irq1.Level);
        while ((Status() & 1) != 0)
        {
            Assert.Equal((uint)Status(), other.ReadPort(0x64, AccessSize.Byte));
            Assert.Equal(_controller.ReadPort(0x60, AccessSize.Byte), other.ReadPort(0x60, AccessSize.Byte));
        }
        Assert.Equal(_controller.Save(), other.Save());
    }

    private int Status() => (int)_controller.ReadPort(0x64, AccessSize.Byte);

    private void Command(byte value) => _controller.WritePort(0x64, AccessSize.Byte, value);

    private void Data(byte value) => _controller.WritePort(0x60, AccessSize.Byte, value);

    private void WriteMode(byte mode)
    {
        Command(0x60);
        Data(mode);
    }

    private List<byte> Mouse(byte value)
    {
        Command(0xd4);
        Data(value);
        return Drain();
    }

    private List<byte> Drain()
    {
        List<byte> bytes = [];
        while ((Status() & 1) != 0)
            bytes.Add((byte)_controller.ReadPort(0x60, AccessSize.Byte));
        return bytes;
    }
}
