using System;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Input;
using Kvasir.Devices.Serial;
using Xunit;

namespace Kvasir.Devices.Tests;

/// <summary>Register accesses and interrupts allocate nothing once they are warm.</summary>
public sealed class AllocationTests
{
    private readonly VmClock _clock = VmClock.CreateManual();

    [Fact]
    public void InterruptPath()
    {
        ApicBus bus = new();
        IoApic ioApic = new(bus);
        Pic8259 pic = new(bus.Lint0);
        bus.ConnectExternal(pic);
        IsaIrqs isa = new(pic, ioApic);
        LocalApic apic = new(0, true, bus, _clock);
        LocalApic other = new(1, false, bus, _clock);
        apic.Connect(new ProbeSignals());
        other.Connect(new ProbeSignals());
        apic.Write(0xf0, AccessSize.Dword, 0x1ff);
        other.Write(0xf0, AccessSize.Dword, 0x1ff);
        ioApic.Write(0, AccessSize.Dword, 0x18);
        ioApic.Write(0x10, AccessSize.Dword, 0x44 | 1 << 15);
        IIrqLine line = isa.Line(4);
        Check(() =>
        {
            line.Set(true);
            apic.Acknowledge();
            line.Set(false);
            apic.Write(0xb0, AccessSize.Dword, 0);
            apic.Write(0x310, AccessSize.Dword, 1 << 24);
            apic.Write(0x300, AccessSize.Dword, 0x50);
            other.Acknowledge();
            other.Write(0xb0, AccessSize.Dword, 0);
            apic.Write(0x320, AccessSize.Dword, 0x60);
            apic.Write(0x380, AccessSize.Dword, 1000);
            apic.Read(0x390, AccessSize.Dword);
            _clock.Advance(3000);
            apic.Acknowledge();
            apic.Write(0xb0, AccessSize.Dword, 0);
            apic.TaskPriorityClass = 3;
            apic.TaskPriorityClass = 0;
            bus.Send(0xfee0_1000, 0x70);
            other.Acknowledge();
            other.Write(0xb0, AccessSize.Dword, 0);
        });
    }

    [Fact]
    public void TimersAndPorts()
    {
        Pit8254 pit = new(_clock, IrqLine.None);
        SpeakerGate gate = new(_clock, pit);
        CmosRtc rtc = new(_clock, IrqLine.None);
        AcpiPm pm = new(_clock, IrqLine.None, new ProbePower());
        Hpet hpet = new(_clock, IrqLine.None, IrqLine.None, []);
        Uart16550 uart = new(0x3f8, IrqLine.None, new NullBackend(), _clock);
        DebugConsole console = new(new NullBackend());
        I8042 keyboard = new(IrqLine.None, IrqLine.None, new A20Gate(_ => { }), new ProbePower(), _clock);
        hpet.Write(0x10, AccessSize.Qword, 1);
        Check(() =>
        {
            pit.WritePort(0x43, AccessSize.Byte, 0x34);
            pit.WritePort(0x40, AccessSize.Byte, 0);
            pit.WritePort(0x40, AccessSize.Byte, 0x10);
            pit.ReadPort(0x40, AccessSize.Byte);
            gate.ReadPort(0x61, AccessSize.Byte);
            rtc.WritePort(0x70, AccessSize.Byte, 0x0c);
            rtc.ReadPort(0x71, AccessSize.Byte);
            pm.ReadPort(0x608, AccessSize.Dword);
            hpet.Read(0xf0, AccessSize.Qword);
            hpet.Write(0x108, AccessSize.Qword, 1000);
            uart.ReadPort(0x3fd, AccessSize.Byte);
            uart.WritePort(0x3f8, AccessSize.Byte, 'x');
            console.WritePort(0xe9, AccessSize.Byte, 'x');
            keyboard.Key(PcKey.A, true);
            keyboard.Key(PcKey.A, false);
            keyboard.ReadPort(0x60, AccessSize.Byte);
            keyboard.ReadPort(0x60, AccessSize.Byte);
            _clock.Advance(5_000_000);
        });
    }

    private static void Check(Action action)
    {
        for (int i = 0; i < 200; i++)
            action();
        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 1000; i++)
            action();
        Assert.Equal(before, GC.GetAllocatedBytesForCurrentThread());
    }
}
