using System;
using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Firmware;
using Kvasir.Devices.Input;
using Kvasir.Devices.Serial;
using Xunit;

namespace Kvasir.Devices.Tests;

/// <summary>
/// Random register accesses, wires and time on every device: nothing throws or hangs, and a device restored from another one's
/// state then gives the same
/// answers, the same wire levels and the same state.
/// </summary>
public sealed class RegisterFuzzTests : IDisposable
{
    private const int Seeds = 12;
    private const int Steps = 400;

    private readonly VmClock _clock = VmClock.CreateManual(new DateTimeOffset(2026, 1, 31, 23, 59, 50, TimeSpan.Zero));
    private readonly GuestMemory _memory = new(2 << 20, "fuzz-test");

    public void Dispose() => _memory.Dispose();

    [Fact]
    public void Pic() => Run(() =>
    {
        ProbeLine output = new();
        Pic8259 pic = new(output);
        ushort[] ports = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];
        return Subject.Create(pic, (op, a, b) =>
        {
            switch (op % 4)
            {
                case 0:
                    pic.Input((int)(a % 16)).Set((b & 1) != 0);
                    return output.Level ? 1u : 0u;
                case 1:
                    return (ulong)pic.Acknowledge();
                default:
                    return Ports(pic, ports, op, a, b) | (output.Level ? 1ul << 32 : 0);
            }
        });
    });

    [Fact]
    public void Pit() => Run(() =>
    {
        ProbeLine irq = new();
        Pit8254 pit = new(_clock, irq);
        return Subject.Create(pit, (op, a, b) =>
        {
            if (op % 8 == 0)
                pit.SetGate2((a & 1) != 0);
            return Ports(pit, [0x40, 0x41, 0x42, 0x43], op, a, b) | (irq.Level ? 1ul << 32 : 0) | (pit.Output2 ? 1ul << 33 : 0);
        });
    });

    [Fact]
    public void Rtc() => Run(() =>
    {
        ProbeLine irq = new();
        CmosRtc rtc = new(_clock, irq);
        return Subject.Create(rtc, (op, a, b) =>
        {
            // The clock's registers most of the time.
            rtc.WritePort(0x70, AccessSize.Byte, (uint)(op % 8 == 0 ? a % 128 : a % 14));
            return Ports(rtc, [0x71], op, a, b) | (irq.Level ? 1ul << 32 : 0);
        });
    });

    [Fact]
    public void IoApicAndLocalApic() => Run(() =>
    {
        ApicBus bus = new();
        IoApic ioApic = new(bus);
        LocalApic apic = new(0, true, bus, _clock);
        ProbeSignals signals = new();
        apic.Connect(signals);
        // Without this nothing would be delivered in most runs.
        apic.Write(0xf0, AccessSize.Dword, 0x1ff);
        return Subject.Create(
            (op, a, b) =>
            {
                switch (op % 8)
                {
                    case 0:
                        ioApic.Pin((int)(a % 24)).Set((b & 1) != 0);
                        return 0;
                    case 1:
                        ioApic.Write(0, AccessSize.Dword, a % 0x48);
                        ioApic.Write(0x10, AccessSize.Dword, b & ~0xf00ul);
                        return ioApic.Read(0x10, AccessSize.Dword);
                    case 2:
                        bus.Send(0xfee0_0000 | (a & 0xfffff), (uint)b & 0xcfff);
                        return 0;
                    case 3:
                        return (ulong)apic.Acknowledge();
                    case 4:
                        apic.Write(0xb0, AccessSize.Dword, 0);
                        return apic.HasInterrupt ? 1u : 0u;
                    case 5:
                        ulong offset = a % 0x40 << 4;
                        // Local vectors with delivery modes fixed and NMI alone: fuzzed INITs change nothing here.
                        if ((b & 1) != 0 && offset != 0xf0)
                            apic.Write(offset, AccessSize.Dword, offset == 0x380 ? b % 10_000_000 : b);
                        return apic.Read(offset, AccessSize.Dword);
                    case 6:
                        bool fine = (b & 1) != 0
                            ? apic.TryWriteMsr((uint)(0x6e0 + a % 2), b >> 34)
                            : apic.TryReadMsr((uint)(0x800 + a % 64), out b);
                        return fine ? b : 0;
                    default:
                        bus.Lint0.Set((a & 1) != 0);
                        bus.Lint1.Set((b & 1) != 0);
                        return apic.HasInterrupt ? 1u : 0u;
                }
            },
            () => (ioApic.Save(), apic.Save()),
            s =>
            {
                (IoApic.State io, LocalApic.State local) = ((IoApic.State, LocalApic.State))s;
                ioApic.Restore(io);
                apic.Restore(local);
            });
    });

    [Fact]
    public void LocalApicModes() => Run(() =>
    {
        LocalApic apic = new(0, true, new ApicBus(), _clock);
        apic.Connect(new ProbeSignals());
        return Subject.Create(apic, (op, a, b) =>
        {
            switch (op % 4)
            {
                case 0:
                    return apic.TryWriteMsr(0x1b, 0xfee0_0100 | (a & 0xc00)) ? 1u : 0u;
                case 1:
                    return apic.TryWriteMsr(0x800 + (uint)(a % 0x40), b % 256) ? 1u : 0u;
                case 2:
                    apic.TaskPriorityClass = (byte)(a & 15);
                    apic.TscOffset = (int)b;
                    return apic.TaskPriorityClass;
                default:
                    return apic.TryReadMsr(0x800 + (uint)(a % 0x40), out ulong value) ? value : (ulong)apic.Acknowledge();
            }
        });
    });

    [Fact]
    public void Hpet() => Run(() =>
    {
        ProbeLine[] lines = [.. Enumerable.Range(0, 24).Select(_ => new ProbeLine())];
        Hpet hpet = new(_clock, lines[2], lines[8], lines, new ApicBus());
        ulong[] offsets = [0x00, 0x10, 0x20, 0xf0, 0x100, 0x108, 0x110, 0x120, 0x128, 0x140, 0x148, 0x150, 0x160, 0x3f8];
        return Subject.Create(hpet, (op, a, b) =>
        {
            ulong offset = offsets[a % (ulong)offsets.Length] + (a >> 32 & 4);
            AccessSize size = (offset & 4) == 0 && (op & 16) != 0 ? AccessSize.Qword : AccessSize.Dword;
            if (op % 8 == 0)
                hpet.PitIrq.Set((b & 1) != 0);
            else if (op % 8 < 4)
                hpet.Write(offset, size, op % 3 == 0 ? b % 64 : op % 3 == 1 ? hpet.Read(0xf0, AccessSize.Qword) + b % 10_000 : b);
            ulong levels = 0;
            for (int i = 0; i < 24; i++)
                levels |= lines[i].Level ? 1ul << i : 0;
            return hpet.Read(offset, size) ^ levels << 40;
        });
    });

    [Fact]
    public void AcpiPm() => Run(() =>
    {
        ProbeLine sci = new();
        AcpiPm pm = new(_clock, sci, new ProbePower());
        PortBus bus = new();
        pm.Map(bus);
        return Subject.Create(pm, (op, a, b) =>
        {
            ushort port = (ushort)(op % 6 == 0 ? 0xb2 + a % 2 : 0x600 + a % 48);
            AccessSize size = (AccessSize)(1 << (int)(a >> 40) % 3);
            if (op % 5 == 0)
                pm.PressPowerButton();
            if (op % 7 == 0)
                pm.RaiseGpe((int)(b % 70));
            if ((op & 1) != 0)
                bus.Write(port, size, (uint)b);
            return bus.Read(port, size) | (sci.Level ? 1ul << 32 : 0);
        });
    });

    [Fact]
    public void KeyboardController() => Run(() =>
    {
        ProbeLine irq1 = new();
        ProbeLine irq12 = new();
        A20Gate a20 = new(_ => { });
        I8042 controller = new(irq1, irq12, a20, new ProbePower(), _clock);
        PcKey[] keys = Enum.GetValues<PcKey>();
        return Subject.Create(
            (op, a, b) =>
            {
                switch (op % 8)
                {
                    case 0:
                        controller.Key(keys[a % (ulong)keys.Length], (b & 1) != 0);
                        break;
                    case 1:
                        controller.MoveMouse((sbyte)a * 10, (sbyte)b, (sbyte)(a >> 8) % 4);
                        controller.SetMouseButtons((byte)(b >> 8));
                        break;
                    case 2:
                        controller.WritePort(0x64, AccessSize.Byte, 0xd4);
                        controller.WritePort(0x60, AccessSize.Byte, (uint)(0xe0 + a % 32));
                        break;
                    default:
                        return Ports(controller, [0x60, 0x64], op, a, b) | (irq1.Level ? 1ul << 32 : 0) | (irq12.Level ? 1ul << 33 : 0);
                }
                return (irq1.Level ? 1ul << 32 : 0) | (irq12.Level ? 1ul << 33 : 0);
            },
            () => (controller.Save(), a20.Save()),
            s =>
            {
                (I8042.State state, A20Gate.State gate) = ((I8042.State, A20Gate.State))s;
                controller.Restore(state);
                a20.Restore(gate);
            });
    });

    [Fact]
    public void Uart() => Run(() =>
    {
        ProbeLine irq = new();
        Uart16550 uart = new(0x3f8, irq, new NullBackend(), _clock);
        return Subject.Create(uart, (op, a, b) =>
        {
            if (op % 4 == 0)
                uart.Receive([(byte)a, (byte)b, 3, 4]);
            if (op % 32 == 1)
                uart.ReceiveBreak();
            return Ports(uart, [0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff], op, a, b) | (irq.Level ? 1ul << 32 : 0);
        });
    });

    [Fact]
    public void FwCfg() => Run(() =>
    {
        FwCfg device = new(_memory);
        device.AddFile("etc/file", new byte[100], writable: true);
        PortBus bus = new();
        device.Map(bus);
        return Subject.Create(device, (op, a, b) =>
        {
            // A descriptor of random bytes, sometimes with sane fields, in low memory.
            if (op % 4 == 0)
            {
                Span<byte> fields = stackalloc byte[16];
                new Random((int)a).NextBytes(fields);
                if ((b & 1) != 0)
                    fields[..12].Clear();
                fields[3] = (byte)b;
                _memory.TryWrite(new Gpa(0x1000), fields);
                bus.Write(0x518, AccessSize.Dword, 0x0010_0000);
            }
            ushort port = (ushort)(0x510 + a % 12);
            AccessSize size = (AccessSize)(1 << (int)(a >> 40) % 3);
            if ((op & 2) != 0)
                bus.Write(port, size, op % 3 == 0 ? (uint)b : (uint)b % 64);
            return bus.Read(port, size);
        });
    });

    [Fact]
    public void Dma() => Run(() =>
    {
        Dma8237 dma = new(_memory);
        PortBus bus = new();
        dma.Map(bus);
        return Subject.Create(dma, (op, a, b) =>
        {
            ushort port = (ushort)((op % 3) switch
            {
                0 => a % 16,
                1 => 0x81 + a % 15,
                _ => 0xc0 + a % 32,
            });
            if (op % 7 == 0)
                return (ulong)dma.Transfer((int)(a % 8), new byte[b % 100], toMemory: false, out _);
            if ((op & 1) != 0)
                bus.Write(port, AccessSize.Byte, (byte)b);
            return bus.Read(port, AccessSize.Byte);
        });
    });

    [Fact]
    public void SmallPorts() => Run(() =>
    {
        ProbePower power = new();
        A20Gate a20 = new(_ => { });
        FastA20Port port92 = new(a20, power);
        ResetControlPort cf9 = new(power);
        Pit8254 pit = new(_clock, new ProbeLine());
        SpeakerGate speaker = new(_clock, pit);
        ProbeLine[] lines = [.. Enumerable.Range(0, 24).Select(_ => new ProbeLine())];
        PcTestDevice test = new(lines);
        LatchPort latch = new();
        return Subject.Create(
            (op, a, b) => (op % 5) switch
            {
                0 => Ports(port92, [0x92], op, a, b),
                1 => Ports(cf9, [0xcf9], op, a, b),
                2 => Ports(speaker, [0x61], op, a, b),
                3 => Ports(latch, [0x80], op, a, b),
                _ => Ports(test, [(ushort)(0xe0 + a % 12), (ushort)(0x2000 + b % 24)], op, a, b),
            },
            () => (a20.Save(), port92.Save(), cf9.Save(), pit.Save(), speaker.Save(), test.Save(), latch.Save()),
            s =>
            {
                (A20Gate.State s0, FastA20Port.State s1, ResetControlPort.State s2, Pit8254.State s3, SpeakerGate.State s4, PcTestDevice.State s5,
                    LatchPort.State s6) = ((A20Gate.State, FastA20Port.State, ResetControlPort.State, Pit8254.State, SpeakerGate.State,
                    PcTestDevice.State, LatchPort.State))s;
                a20.Restore(s0);
                port92.Restore(s1);
                cf9.Restore(s2);
                pit.Restore(s3);
                speaker.Restore(s4);
                test.Restore(s5);
                latch.Restore(s6);
            });
    });

    private static ulong Ports(IPortDevice device, ushort[] ports, int op, ulong a, ulong b)
    {
        ushort port = ports[a % (ulong)ports.Length];
        if ((op & 4) != 0)
            device.WritePort(port, AccessSize.Byte, (byte)b);
        return device.ReadPort(port, AccessSize.Byte);
    }

    private void Run(Func<Subject> create)
    {
        for (int seed = 1; seed <= Seeds; seed++)
        {
            Random random = new(seed);
            Subject one = create();
            for (int step = 0; step < Steps; step++)
                Step(random, one, null, seed, step);
            object saved = one.Save();
            Subject two = create();
            two.Restore(saved);
            Assert.True(saved.Equals(two.Save()), $"state differs after Restore, seed {seed}");
            for (int step = 0; step < Steps; step++)
                Step(random, one, two, seed, step);
            Assert.True(one.Save().Equals(two.Save()), $"state differs at the end, seed {seed}");
        }
    }

    private void Step(Random random, Subject one, Subject? two, int seed, int step)
    {
        int op = random.Next(1 << 16);
        ulong a = (ulong)random.NextInt64(long.MaxValue);
        ulong b = (ulong)random.NextInt64(long.MaxValue) << 1 | (uint)random.Next(2);
        if (random.Next(4) == 0)
            _clock.Advance(random.Next(50) == 0 ? random.NextInt64(500_000_000) : random.Next(200_000));
        ulong first = one.Act(op, a, b);
        if (two is null)
            return;
        ulong second = two.Act(op, a, b);
        Assert.True(first == second, $"seed {seed}, step {step}, op {op}: {first:x} and {second:x}");
    }

    private sealed record Subject(Func<int, ulong, ulong, ulong> Act, Func<object> Save, Action<object> Restore)
    {
        public static Subject Create<TState>(IStateful<TState> device, Func<int, ulong, ulong, ulong> act)
            where TState : struct => new(act, () => device.Save(), s => device.Restore((TState)s));

        public static Subject Create<TState>(Func<int, ulong, ulong, ulong> act, Func<TState> save, Action<object> restore)
            where TState : struct => new(act, () => save(), restore);
    }
}
