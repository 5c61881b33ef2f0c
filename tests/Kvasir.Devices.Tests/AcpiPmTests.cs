using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class AcpiPmTests
{
    private const ushort Status = 0x600;
    private const ushort Enable = 0x602;
    private const ushort Control = 0x604;
    private const ushort Timer = 0x608;

    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ProbeLine _sci = new();
    private readonly ProbePower _power = new();
    private readonly PortBus _bus = new();
    private readonly AcpiPm _pm;

    public AcpiPmTests()
    {
        _pm = new AcpiPm(_clock, _sci, _power, new AcpiPmLayout(CanSuspend: true));
        _pm.Map(_bus);
    }

    [Fact]
    public void TimerCountsAt3579545Hertz()
    {
        Assert.Equal(0u, In32(Timer));
        _clock.Advance(1_000_000_000);
        Assert.Equal(3_579_545u, In32(Timer));
        _clock.Advance(4_000_000_000);
        Assert.Equal(5u * 3_579_545 - (1 << 24), In32(Timer));
        Assert.Equal((5u * 3_579_545 - (1 << 24)) >> 16, In16(Timer + 2));
        AcpiPm wide = new(_clock, _sci, _power, new AcpiPmLayout(WideTimer: true));
        Assert.Equal(5u * 3_579_545, wide.ReadPort(Timer, AccessSize.Dword));
    }

    [Fact]
    public void TimerStatusAndInterrupt()
    {
        Out16(Control, 1);
        Out16(Enable, 1);
        // Bit 23 changes every 2^23 ticks: 2.3435 s.
        _clock.Advance(2_343_000_000);
        Assert.False(_sci.Level);
        _clock.Advance(1_000_000);
        Assert.True(_sci.Level);
        Assert.Equal(1u, In16(Status));
        Out16(Status, 1);
        Assert.False(_sci.Level);
        _clock.Advance(2_344_000_000);
        Assert.True(_sci.Level);
        Assert.Equal(2, _sci.Rises);
    }

    [Fact]
    public void PowerButton()
    {
        Assert.False(_pm.PressPowerButton());
        Assert.Equal(0x100u, In16(Status));
        Assert.False(_sci.Level);
        Out16(Enable, 0x100);
        Assert.False(_sci.Level);
        Assert.Equal(0u, In16(Control));
        _bus.Write(0xb2, AccessSize.Byte, 2);
        Assert.Equal(1u, In16(Control));
        Assert.True(_sci.Level);
        Out16(Status, 0x100);
        Assert.False(_sci.Level);
        Assert.True(_pm.PressPowerButton());
        Assert.True(_sci.Level);
        _bus.Write(0xb2, AccessSize.Byte, 3);
        Assert.False(_sci.Level);
        Assert.Equal(0u, In16(Control));
        Assert.Equal(3u, _bus.Read(0xb2, AccessSize.Byte));
    }

    [Fact]
    public void SleepStates()
    {
        Out16(Control, 1 << 10 | 1);
        Assert.Equal(0, _power.Suspends);
        Out16(Control, 1 << 13 | 1 << 10 | 1);
        Assert.Equal(1, _power.Suspends);
        // SLP_EN reads as zero.
        Assert.Equal(1u << 10 | 1, In16(Control));
        _pm.Wake();
        Assert.Equal(0x8100u, In16(Status));
        Out16(Control, 1 << 13 | 3 << 10 | 1);
        Assert.Equal(0, _power.PowerOffs);
        Out16(Control, 1 << 13 | 0 << 10 | 1);
        Assert.Equal(1, _power.PowerOffs);
        // Byte writes do it too.
        _bus.Write(Control + 1, AccessSize.Byte, 1 << 5);
        Assert.Equal(2, _power.PowerOffs);
    }

    [Fact]
    public void SuspendIsIgnoredWhereItIsNotOffered()
    {
        AcpiPm pm = new(_clock, _sci, _power);
        pm.WritePort(Control, AccessSize.Word, 1 << 13 | 1 << 10);
        Assert.Equal(0, _power.Suspends);
    }

    [Fact]
    public void FirmwareFindsManagementModeSetUp()
    {
        _bus.Write(0x630, AccessSize.Dword, 0);
        Assert.Equal(0x20u, _bus.Read(0x630, AccessSize.Dword));
        Assert.Equal(0x20u, _bus.Read(0x630, AccessSize.Byte));
        Assert.Equal(0u, _bus.Read(0x631, AccessSize.Byte));
    }

    [Fact]
    public void GeneralPurposeEvents()
    {
        Out16(Control, 1);
        _pm.RaiseGpe(3);
        _pm.RaiseGpe(17);
        _pm.RaiseGpe(64);
        Assert.False(_sci.Level);
        Assert.Equal(8u, _bus.Read(0x620, AccessSize.Byte));
        Assert.Equal(2u, _bus.Read(0x622, AccessSize.Byte));
        _bus.Write(0x628, AccessSize.Byte, 8);
        Assert.True(_sci.Level);
        _bus.Write(0x620, AccessSize.Byte, 0xf7);
        Assert.True(_sci.Level);
        _bus.Write(0x620, AccessSize.Byte, 8);
        Assert.False(_sci.Level);
        Assert.Equal(8u, _bus.Read(0x628, AccessSize.Dword));
    }

    [Fact]
    public void DwordAccessCoversStatusAndEnable()
    {
        _bus.Write(Status, AccessSize.Dword, 0x0100_ffff);
        Assert.Equal(0x0100_0000u, In32(Status));
        Out16(Enable, 0xffff);
        Assert.Equal(0x0721u, In16(Enable));
    }

    [Fact]
    public void ResetAndStateMove()
    {
        Out16(Control, 1);
        Out16(Enable, 0x101);
        _pm.PressPowerButton();
        ProbeLine line = new();
        AcpiPm other = new(_clock, line, _power);
        other.Restore(_pm.Save());
        Assert.Equal(_pm.Save(), other.Save());
        Assert.True(line.Level);
        _pm.Reset();
        Assert.False(_sci.Level);
        Assert.Equal(0u, In32(Status));
    }

    [Fact]
    public void ResetControlPort()
    {
        ResetControlPort port = new(_power);
        port.WritePort(0xcf9, AccessSize.Byte, 2);
        Assert.Equal(0, _power.Resets);
        port.WritePort(0xcf9, AccessSize.Byte, 6);
        Assert.Equal(1, _power.Resets);
        port.WritePort(0xcf9, AccessSize.Byte, 6);
        Assert.Equal(1, _power.Resets);
        port.Reset();
        port.WritePort(0xcf9, AccessSize.Byte, 0x0e);
        Assert.Equal(2, _power.Resets);
        Assert.Equal(0x0eu, port.ReadPort(0xcf9, AccessSize.Byte));
    }

    [Fact]
    public void Port92()
    {
        bool a20 = true;
        A20Gate gate = new(enabled => a20 = enabled);
        FastA20Port port = new(gate, _power);
        Assert.Equal(2u, port.ReadPort(0x92, AccessSize.Byte));
        port.WritePort(0x92, AccessSize.Byte, 0);
        Assert.False(a20);
        Assert.Equal(0u, port.ReadPort(0x92, AccessSize.Byte));
        gate.Set(true);
        Assert.Equal(2u, port.ReadPort(0x92, AccessSize.Byte));
        port.WritePort(0x92, AccessSize.Byte, 3);
        Assert.Equal(1, _power.Resets);
        port.WritePort(0x92, AccessSize.Byte, 1);
        Assert.Equal(1, _power.Resets);
        Assert.False(a20);
        gate.Reset();
        Assert.True(a20);
    }

    private uint In16(ushort port) => _bus.Read(port, AccessSize.Word);

    private uint In32(ushort port) => _bus.Read(port, AccessSize.Dword);

    private void Out16(ushort port, uint value) => _bus.Write(port, AccessSize.Word, value);
}
