using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class IoApicTests
{
    private const uint Level = 1 << 15;
    private const uint RemoteIrr = 1 << 14;
    private const uint Masked = 1 << 16;

    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ApicBus _bus = new();
    private readonly IoApic _ioApic;
    private readonly LocalApic[] _apics;
    private readonly ProbeSignals[] _signals;

    public IoApicTests()
    {
        _ioApic = new IoApic(_bus, id: 2);
        _apics = [.. Enumerable.Range(0, 2).Select(i => new LocalApic((uint)i, i == 0, _bus, _clock))];
        _signals = [.. _apics.Select(_ => new ProbeSignals())];
        for (int i = 0; i < 2; i++)
        {
            _apics[i].Connect(_signals[i]);
            _apics[i].Write(0xf0, AccessSize.Dword, 0x1ff);
        }
    }

    [Fact]
    public void RegistersAfterReset()
    {
        Assert.Equal(2u << 24, Read(0));
        Assert.Equal(0x0017_0020u, Read(1));
        Assert.Equal(2u << 24, Read(2));
        for (byte pin = 0; pin < 24; pin++)
        {
            Assert.Equal(Masked, Read((byte)(0x10 + pin * 2)));
            Assert.Equal(0u, Read((byte)(0x11 + pin * 2)));
        }
        Assert.Equal(0u, Read(0x40));
        Assert.Equal(0u, Read(0xff));
        Write(0, 0xffff_ffff);
        Assert.Equal(0x0f00_0000u, Read(0));
        // Delivery status, remote IRR and reserved bits are not written.
        Write(0x10, 0xffff_ffff & ~Level);
        Assert.Equal(0x0001_2fffu, Read(0x10));
    }

    [Fact]
    public void EdgeIsDeliveredOnceARise()
    {
        SetEntry(4, 0x44, destination: 1);
        _ioApic.Pin(4).Set(true);
        _ioApic.Pin(4).Set(true);
        Assert.Equal(0x44, _apics[1].Acknowledge());
        Eoi(1);
        Assert.False(_apics[1].HasInterrupt);
        _ioApic.Pin(4).Set(false);
        Assert.False(_apics[1].HasInterrupt);
        _ioApic.Pin(4).Set(true);
        Assert.True(_apics[1].HasInterrupt);
        Assert.False(_apics[0].HasInterrupt);
    }

    [Fact]
    public void EdgeOnAMaskedPinIsLost()
    {
        SetEntry(4, 0x44 | Masked);
        _ioApic.Pin(4).Set(true);
        SetEntry(4, 0x44);
        Assert.False(_apics[0].HasInterrupt);
        _ioApic.Pin(4).Set(false);
        _ioApic.Pin(4).Set(true);
        Assert.True(_apics[0].HasInterrupt);
    }

    [Fact]
    public void LevelIsDeliveredAgainOnEoi()
    {
        SetEntry(9, 0x49 | Level);
        _ioApic.Pin(9).Set(true);
        Assert.Equal(0x49 | Level | RemoteIrr, Read(0x10 + 18));
        Assert.Equal(0x49, _apics[0].Acknowledge());
        Assert.Equal(1u << 9, (uint)_apics[0].Read(0x180 + 0x20, AccessSize.Dword));
        // Nothing new while remote IRR is set.
        _ioApic.Pin(9).Set(false);
        _ioApic.Pin(9).Set(true);
        Assert.False(_apics[0].HasInterrupt);
        Eoi(0);
        Assert.Equal(0x49, _apics[0].Acknowledge());
        _ioApic.Pin(9).Set(false);
        Eoi(0);
        Assert.False(_apics[0].HasInterrupt);
        Assert.Equal(0x49 | Level, Read(0x10 + 18));
    }

    [Fact]
    public void MaskedLevelIsDeliveredWhenUnmasked()
    {
        SetEntry(9, 0x49 | Level | Masked);
        _ioApic.Pin(9).Set(true);
        Assert.False(_apics[0].HasInterrupt);
        SetEntry(9, 0x49 | Level);
        Assert.True(_apics[0].HasInterrupt);
    }

    [Fact]
    public void EoiRegisterAndSuppressedBroadcast()
    {
        _apics[0].Write(0xf0, AccessSize.Dword, 0x11ff);
        SetEntry(9, 0x49 | Level);
        _ioApic.Pin(9).Set(true);
        Assert.Equal(0x49, _apics[0].Acknowledge());
        Eoi(0);
        Assert.False(_apics[0].HasInterrupt);
        Assert.Equal(RemoteIrr, Read(0x10 + 18) & RemoteIrr);
        _ioApic.Write(0x40, AccessSize.Dword, 0x48);
        Assert.False(_apics[0].HasInterrupt);
        _ioApic.Write(0x40, AccessSize.Dword, 0x49);
        Assert.True(_apics[0].HasInterrupt);
    }

    [Fact]
    public void EdgeModeClearsRemoteIrr()
    {
        SetEntry(9, 0x49 | Level);
        _ioApic.Pin(9).Set(true);
        SetEntry(9, 0x49 | Masked);
        Assert.Equal(0u, Read(0x10 + 18) & RemoteIrr);
    }

    [Fact]
    public void LevelWaitsForAnApicToBeEnabled()
    {
        _apics[0].Write(0xf0, AccessSize.Dword, 0xff);
        SetEntry(9, 0x49 | Level);
        _ioApic.Pin(9).Set(true);
        Assert.Equal(0u, Read(0x10 + 18) & RemoteIrr);
        _apics[0].Write(0xf0, AccessSize.Dword, 0x1ff);
        Assert.Equal(0x49, _apics[0].Acknowledge());
    }

    [Fact]
    public void OtherDeliveryModes()
    {
        SetEntry(5, 4 << 8 | Level, destination: 1);
        _ioApic.Pin(5).Set(true);
        Assert.Equal(1, _signals[1].Nmis);
        Assert.Equal(0u, Read(0x10 + 10) & RemoteIrr);
        SetEntry(6, 2 << 8);
        _ioApic.Pin(6).Set(true);
        Assert.Equal(1, _signals[0].Smis);
        SetEntry(7, 5 << 8);
        _ioApic.Pin(7).Set(true);
        Assert.Equal(1, _signals[0].Inits);
        // Logical, lowest priority: the one whose task priority is lower.
        for (int i = 0; i < 2; i++)
            _apics[i].Write(0xd0, AccessSize.Dword, 1u << (24 + i));
        _apics[0].Write(0x80, AccessSize.Dword, 0x30);
        SetEntry(8, 0x68 | 1 << 8 | 1 << 11, destination: 3);
        _ioApic.Pin(8).Set(true);
        Assert.Equal(0x68, _apics[1].Acknowledge());
    }

    [Fact]
    public void ExtIntFetchesTheVectorFromThe8259()
    {
        Pic8259 pic = new(_ioApic.Pin(0));
        _bus.ConnectExternal(pic);
        PicTests.Initialize(pic, 0x30, 0x38);
        SetEntry(0, 7 << 8, destination: 1);
        pic.Input(3).Set(true);
        Assert.True(_apics[1].HasInterrupt);
        Assert.Equal(0x33, _apics[1].Acknowledge());
        Assert.False(_apics[1].HasInterrupt);
    }

    [Fact]
    public void IsaInterruptsDriveBothControllers()
    {
        ProbeLine output = new();
        Pic8259 pic = new(output);
        PicTests.Initialize(pic, 0x20, 0x28);
        IsaIrqs isa = new(pic, _ioApic);
        SetEntry(2, 0x42);
        SetEntry(4, 0x44);
        isa.Line(0).Set(true);
        Assert.Equal(0x42, _apics[0].Acknowledge());
        Assert.Equal(0x20, pic.Acknowledge());
        isa.Line(4).Set(true);
        Eoi(0);
        Assert.Equal(0x44, _apics[0].Acknowledge());
        pic.WritePort(0x20, AccessSize.Byte, 0x20);
        Assert.Equal(0x24, pic.Acknowledge());
    }

    [Fact]
    public void OrGateHoldsTheWireUntilAllLetGo()
    {
        ProbeLine line = new();
        OrGate gate = new(line);
        IIrqLine a = gate.AddInput();
        IIrqLine b = gate.AddInput();
        a.Set(true);
        b.Set(true);
        a.Set(false);
        Assert.True(line.Level);
        b.Set(false);
        Assert.False(line.Level);
    }

    [Fact]
    public void StateMoves()
    {
        SetEntry(9, 0x49 | Level);
        _ioApic.Pin(9).Set(true);
        ApicBus bus = new();
        IoApic other = new(bus);
        LocalApic apic = new(0, true, bus, _clock);
        other.Restore(_ioApic.Save());
        apic.Restore(_apics[0].Save());
        Assert.Equal(_ioApic.Save(), other.Save());
        Assert.Equal(0x49, apic.Acknowledge());
        apic.Write(0xb0, AccessSize.Dword, 0);
        Assert.True(apic.HasInterrupt);
    }

    private uint Read(byte index)
    {
        _ioApic.Write(0, AccessSize.Dword, index);
        Assert.Equal(index, (byte)_ioApic.Read(0, AccessSize.Dword));
        return (uint)_ioApic.Read(0x10, AccessSize.Dword);
    }

    private void Write(byte index, uint value)
    {
        _ioApic.Write(0, AccessSize.Dword, index);
        _ioApic.Write(0x10, AccessSize.Dword, value);
    }

    private void SetEntry(int pin, uint low, byte destination = 0)
    {
        Write((byte)(0x11 + pin * 2), (uint)destination << 24);
        Write((byte)(0x10 + pin * 2), low);
    }

    private void Eoi(int apic) => _apics[apic].Write(0xb0, AccessSize.Dword, 0);
}
