using System.Collections.Generic;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

/// <summary>The board's interrupt controllers beside local APICs, or all of it, that are the accelerator's.</summary>
public class KernelInterruptsTests
{
    private const ulong Select = 0;
    private const ulong Window = 0x10;

    private readonly ApicBus _bus = new();
    private readonly Pic8259 _pic;
    private readonly IoApic _ioApic;

    public KernelInterruptsTests()
    {
        _pic = new Pic8259(_bus.Lint0);
        _bus.ConnectExternal(_pic);
        _ioApic = new IoApic(_bus);
    }

    [Fact]
    public void PinsSendMessagesAndEndsComeBack()
    {
        Recorder kernel = new(hasWires: false);
        _bus.Connect(kernel);
        // Pin 5: level, vector 61h, logical destination 3.
        Program(5, 0x8861, 0x0300_0000);
        Assert.Equal((0xfee0_3004ul, 0xc061u), kernel.Routes[5]);
        _ioApic.Pin(5).Set(true);
        Assert.Equal([(0xfee0_3004ul, 0xc061u)], kernel.Sent);
        _ioApic.Pin(5).Set(true);
        Assert.Single(kernel.Sent);
        kernel.Client!.EndOfInterrupt(0x61);
        Assert.Equal(2, kernel.Sent.Count);
        _ioApic.Pin(5).Set(false);
        kernel.Client.EndOfInterrupt(0x61);
        Assert.Equal(2, kernel.Sent.Count);
        Program(5, 0x1_8861, 0x0300_0000);
        Assert.Null(kernel.Routes[5]);
        // A device's own message, with a destination of more than eight bits.
        _bus.Send(0xfee0_1020, 0x41);
        Assert.Equal((0x100_fee0_1000ul, 0x41u), kernel.Sent[^1]);
    }

    [Fact]
    public void The8259sAskThroughLint0AndAreAcknowledged()
    {
        Recorder kernel = new(hasWires: false);
        _bus.Connect(kernel);
        PortBus ports = new();
        _pic.Map(ports);
        foreach ((ushort port, uint value) in (IEnumerable<(ushort, uint)>)[(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xf7)])
            ports.Write(port, AccessSize.Byte, value);
        _pic.Input(3).Set(true);
        Assert.True(kernel.External);
        Assert.Equal(0x23, kernel.Client!.AcknowledgeExternal());
        Assert.False(kernel.External);
        _bus.Lint1.Set(true);
        _bus.Lint1.Set(true);
        Assert.Equal(1, kernel.Nmis);
    }

    [Fact]
    public void WiresLeadToTheAccelerator()
    {
        Recorder kernel = new(hasWires: true);
        _bus.Connect(kernel);
        _pic.Connect(kernel);
        IsaIrqs irqs = new(_pic, _ioApic);
        irqs.Line(0).Set(true);
        irqs.Line(4).Set(true);
        irqs.Line(4).Set(false);
        Assert.Equal([("pic", 0, true), ("pin", 2, true), ("pic", 4, true), ("pin", 4, true), ("pic", 4, false), ("pin", 4, false)], kernel.Levels);
        Assert.Empty(kernel.Sent);
        Assert.False(kernel.External);
        // An APIC that stands in for one of the accelerator's ends what that had begun.
        LocalApic apic = new(0, bootProcessor: true, _bus, VmClock.CreateManual());
        LocalApic.State state = apic.Save();
        state.Spurious = 0x1ff;
        state.InService.Word1 = state.TriggerMode.Word1 = 1ul << 0x61 - 64;
        apic.Restore(state);
        apic.Registers.Write(0xb0, AccessSize.Dword, 0);
        Assert.Equal([0x61], kernel.Ended);
    }

    private void Program(int pin, uint low, uint high)
    {
        _ioApic.Write(Select, AccessSize.Dword, (ulong)(0x11 + pin * 2));
        _ioApic.Write(Window, AccessSize.Dword, high);
        _ioApic.Write(Select, AccessSize.Dword, (ulong)(0x10 + pin * 2));
        _ioApic.Write(Window, AccessSize.Dword, low);
    }

    private sealed class Recorder(bool hasWires) : IKernelInterrupts
    {
        public List<(ulong Address, uint Data)> Sent { get; } = [];

        public List<(string Chip, int Number, bool Level)> Levels { get; } = [];

        public Dictionary<int, (ulong Address, uint Data)?> Routes { get; } = [];

        public IKernelInterruptsClient? Client { get; private set; }

        public bool External { get; private set; }

        public int Nmis { get; private set; }

        public bool HasWires { get; } = hasWires;

        public void Connect(IKernelInterruptsClient client) => Client = client;

        public bool Send(ulong address, uint data)
        {
            Sent.Add((address, data));
            return true;
        }

        public void SetRoute(int pin, (ulong Address, uint Data)? message) => Routes[pin] = message;

        public void SetPin(int pin, bool asserted) => Levels.Add(("pin", pin, asserted));

        public void SetPicInput(int input, bool asserted) => Levels.Add(("pic", input, asserted));

        public List<byte> Ended { get; } = [];

        public void EndLevel(byte vector) => Ended.Add(vector);

        public void SetPitReplaced(bool replaced)
        {
        }

        public void SetExternal(bool asserted) => External = asserted;

        public void Nmi() => Nmis++;

        public void Reset()
        {
        }
    }
}
