using System;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class PitTests
{
    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ProbeLine _irq = new();
    private readonly Pit8254 _pit;
    private readonly SpeakerGate _gate;
    private long _tick;

    public PitTests()
    {
        _pit = new Pit8254(_clock, _irq);
        _gate = new SpeakerGate(_clock, _pit);
    }

    /// <summary>All modes, byte orders, BCD and gate changes on counter 2, pulse by pulse against a model that really counts.</summary>
    [Theory]
    [InlineData(0)]
    [InlineData(1)]
    [InlineData(2)]
    [InlineData(3)]
    [InlineData(4)]
    [InlineData(5)]
    public void CountsLikeTheDatasheet(int mode)
    {
        for (int seed = 1; seed <= 40; seed++)
        {
            Random random = new(seed * 100 + mode);
            bool bcd = random.Next(4) == 0;
            int access = random.Next(1, 4);
            CountingModel model = new() { Mode = mode, Bcd = bcd, Gate = random.Next(4) != 0 };
            SetGate(model.Gate);
            Out(0x43, (byte)(0x80 | access << 4 | mode << 1 | (bcd ? 1 : 0)));
            model.Program();
            for (int step = 0; step < 300; step++)
            {
                int what = random.Next(40);
                if (what == 0 || step == 0)
                {
                    int count = random.Next(3, access == 1 ? 60 : 400);
                    int raw = bcd ? ToBcd(count) : count;
                    if (access == 2)
                        raw &= 0xff00;
                    if (access == 1)
                        raw &= 0xff;
                    if (access != 2)
                        Out(0x42, (byte)raw);
                    if (access != 1)
                        Out(0x42, (byte)(raw >> 8));
                    int decoded = bcd ? FromBcd(raw) : raw;
                    model.Write(decoded == 0 ? (bcd ? 10_000 : 65_536) : decoded);
                }
                else if (what == 1)
                {
                    model.SetGate(!model.Gate);
                    SetGate(model.Gate);
                }
                Step();
                model.Clock();
                Assert.True(model.Out == _pit.Output2, $"OUT, mode {mode}, seed {seed}, step {step}");
                if (model.Ce >= 0)
                {
                    bool same = (model.Value & ByteMask(access)) == Latch2(access);
                    Assert.True(same, $"count, mode {mode}, seed {seed}, step {step}: {model.Value:x} expected");
                }
            }
        }
    }

    [Fact]
    public void RateGeneratorInterruptsWithoutDrift()
    {
        Out(0x43, 0x34);
        Out(0x40, 11932 & 0xff);
        Out(0x40, 11932 >> 8);
        Assert.True(_irq.Level);
        _clock.Advance(10_000_000_000);
        // 11,932 pulses of 1.193182 MHz: 99.998 Hz.
        Assert.Equal(999, _irq.TakeRises() - 1);
        _clock.Advance(10_000_000_000);
        Assert.Equal(1000, _irq.TakeRises());
    }

    [Fact]
    public void SquareWaveInterruptsOnceAPeriod()
    {
        Out(0x43, 0x36);
        Out(0x40, 0);
        Out(0x40, 0);
        _ = _irq.TakeRises();
        _clock.Advance(1_000_000_000);
        Assert.Equal(18, _irq.TakeRises());
    }

    [Fact]
    public void OneShotInterruptsOnce()
    {
        Out(0x43, 0x30);
        Out(0x40, 0xe8);
        Out(0x40, 0x03);
        Assert.False(_irq.Level);
        AdvanceTo(1000);
        Assert.False(_irq.Level);
        // One pulse loads, a thousand count.
        AdvanceTo(1001);
        Assert.True(_irq.Level);
        _clock.Advance(1_000_000_000);
        Assert.Equal(1, _irq.Rises);
        Out(0x43, 0x30);
        Assert.False(_irq.Level);
    }

    [Fact]
    public void HalvedPeriodTakesEffectAfterTheCycle()
    {
        Out(0x43, 0x34);
        Out(0x40, 0x00);
        Out(0x40, 0x10);
        AdvanceTo(0x800);
        _ = _irq.TakeRises();
        Out(0x40, 0x00);
        Out(0x40, 0x08);
        AdvanceTo(0x1001);
        Assert.Equal(1, _irq.TakeRises());
        AdvanceTo(0x1801);
        Assert.Equal(1, _irq.TakeRises());
        AdvanceTo(0x2001);
        Assert.Equal(1, _irq.TakeRises());
    }

    [Fact]
    public void VeryFastPeriodsAreMerged()
    {
        Out(0x43, 0x14);
        Out(0x40, 2);
        _clock.Advance(100_000_000);
        Assert.InRange(_irq.TakeRises(), 100, 2001);
    }

    [Fact]
    public void ReadBackLatchesStatusAndCounts()
    {
        Out(0x43, 0x34);
        // Status of counter 0: OUT high, null count, low then high byte, mode 2.
        Out(0x43, 0xe2);
        Assert.Equal(0xf4u, In(0x40));
        Out(0x40, 100);
        Out(0x40, 0);
        AdvanceTo(11);
        Out(0x43, 0xc2);
        AdvanceTo(21);
        // A second latch command before the first was read is ignored.
        Out(0x43, 0x00);
        Assert.Equal(0xb4u, In(0x40));
        Assert.Equal(90u, In(0x40));
        Assert.Equal(0u, In(0x40));
        Assert.Equal(80u, In(0x40));
        Assert.Equal(0u, In(0x40));
    }

    [Fact]
    public void LatchesOfSeveralCounters()
    {
        for (int i = 0; i < 3; i++)
        {
            Out(0x43, (byte)(i << 6 | 0x10));
            Out((ushort)(0x40 + i), (byte)(50 + i));
        }
        SetGate(true);
        AdvanceTo(11);
        Out(0x43, 0xde);
        AdvanceTo(31);
        Assert.Equal([40u, 41u, 42u], new[] { In(0x40), In(0x41), In(0x42) });
    }

    /// <summary>How Linux measures the TSC: mode 0 on counter 2, then the high byte in a loop.</summary>
    [Fact]
    public void SpeakerPortGatesCounter2()
    {
        _gate.WritePort(0x61, AccessSize.Byte, 0);
        Out(0x43, 0xb0);
        Out(0x42, 0x9c);
        Out(0x42, 0x2e);
        AdvanceTo(100);
        Assert.Equal(0u, _gate.ReadPort(0x61, AccessSize.Byte) & 0x20);
        _gate.WritePort(0x61, AccessSize.Byte, 1);
        Assert.Equal(1u, _gate.ReadPort(0x61, AccessSize.Byte) & 0xf);
        AdvanceTo(100 + 0x2e9c - 1);
        Assert.Equal(0u, _gate.ReadPort(0x61, AccessSize.Byte) & 0x20);
        AdvanceTo(100 + 0x2e9c);
        Assert.Equal(0x20u, _gate.ReadPort(0x61, AccessSize.Byte) & 0x20);
    }

    [Fact]
    public void RefreshToggles()
    {
        int changes = 0;
        uint last = _gate.ReadPort(0x61, AccessSize.Byte) & 0x10;
        for (int i = 0; i < 1000; i++)
        {
            _clock.Advance(1_000);
            uint now = _gate.ReadPort(0x61, AccessSize.Byte) & 0x10;
            changes += now != last ? 1 : 0;
            last = now;
        }
        Assert.InRange(changes, 65, 67);
    }

    [Fact]
    public void StateMoves()
    {
        Out(0x43, 0x34);
        Out(0x40, 0x00);
        Out(0x40, 0x10);
        Out(0x43, 0xb6);
        Out(0x42, 0x55);
        _clock.Advance(5_000_000);
        ProbeLine line = new();
        Pit8254 other = new(_clock, line);
        other.Restore(_pit.Save());
        Assert.Equal(_pit.Save(), other.Save());
        _ = line.TakeRises();
        _ = _irq.TakeRises();
        _clock.Advance(100_000_000);
        Assert.Equal(_irq.TakeRises(), line.TakeRises());
        Assert.Equal(In(0x40), other.ReadPort(0x40, AccessSize.Byte));
    }

    private static int ToBcd(int value) => value / 1000 << 12 | value / 100 % 10 << 8 | value / 10 % 10 << 4 | value % 10;

    private static int FromBcd(int raw) => (raw >> 12) * 1000 + (raw >> 8 & 15) * 100 + (raw >> 4 & 15) * 10 + (raw & 15);

    private int Latch2(int access)
    {
        Out(0x43, 0x80);
        return access switch
        {
            1 => (int)In(0x42),
            2 => (int)In(0x42) << 8,
            _ => (int)(In(0x42) | In(0x42) << 8),
        };
    }

    /// <summary>The bytes of a count that an access mode reads.</summary>
    private static int ByteMask(int access) => access switch
    {
        1 => 0xff,
        2 => 0xff00,
        _ => 0xffff,
    };

    private void SetGate(bool gate) => _gate.WritePort(0x61, AccessSize.Byte, gate ? 1u : 0u);

    private void Step() => AdvanceTo(_tick + 1);

    private void AdvanceTo(long tick)
    {
        _tick = tick;
        _clock.Advance(VmClock.ToNanoseconds((ulong)tick, Pit8254.Frequency) - _clock.Now);
    }

    private void Out(ushort port, byte value) => _pit.WritePort(port, AccessSize.Byte, value);

    private uint In(ushort port) => _pit.ReadPort(port, AccessSize.Byte);

    /// <summary>An 8254 counter that counts one pulse at a time, written from the datasheet's mode descriptions alone.</summary>
    private sealed class CountingModel
    {
        private int _register;
        private bool _load;
        private bool _counting;
        private bool _strobe;
        private bool _armed;
        private int _current;

        public int Mode { get; init; }

        public bool Bcd { get; init; }

        public bool Gate { get; set; }

        public bool Out { get; private set; }

        public int Ce { get; private set; } = -1;

        public int Value
        {
            get
            {
                int value = Ce % Modulus;
                return Bcd ? ToBcd(value) : value;
            }
        }

        private int Modulus => Bcd ? 10_000 : 65_536;

        public void Program() => Out = Mode != 0;

        public void Write(int count)
        {
            _register = count;
            switch (Mode)
            {
                case 0:
                    Out = false;
                    _load = true;
                    break;
                case 4:
                    Out = true;
                    _strobe = false;
                    _load = true;
                    break;
                case 2 or 3:
                    if (!_counting && Gate)
                        _load = true;
                    break;
                default:
                    break;
            }
        }

        public void SetGate(bool gate)
        {
            Gate = gate;
            if ((Mode is 2 or 3) && !gate)
            {
                Out = true;
                _load = false;
            }
            if ((Mode is 1 or 2 or 3 or 5) && gate && _register != 0)
                _load = true;
        }

        public void Clock()
        {
            if (_load)
            {
                _load = false;
                _counting = true;
                _strobe = false;
                Ce = _register;
                if (Mode == 1)
                    Out = false;
                if (Mode is 2 or 3 or 5)
                    Out = true;
                if (Mode == 3)
                {
                    _current = _register;
                    Ce &= ~1;
                }
                _armed = true;
                return;
            }
            if (_strobe)
            {
                _strobe = false;
                Out = true;
            }
            if (!_counting || (!Gate && (Mode is 0 or 2 or 3 or 4)))
                return;
            switch (Mode)
            {
                case 2:
                    Ce = Ce == 1 ? _register : Ce - 1;
                    Out = Ce != 1;
                    break;
                case 3:
                    // An odd count has one pulse more in its high half.
                    bool ends = Out && (_current & 1) != 0 ? Ce == 0 : Ce == 2;
                    if (ends)
                    {
                        Out = !Out;
                        _current = _register;
                        Ce = _register & ~1;
                    }
                    else
                    {
                        Ce -= 2;
                    }
                    break;
                default:
                    Ce = Ce == 0 ? Modulus - 1 : Ce - 1;
                    if (Ce == 0 && _armed)
                    {
                        _armed = false;
                        Out = Mode is 0 or 1;
                        _strobe = Mode is 4 or 5;
                    }
                    break;
            }
        }

    }
}
