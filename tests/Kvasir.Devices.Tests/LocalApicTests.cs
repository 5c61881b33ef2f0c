using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class LocalApicTests
{
    private const uint Id = 0x20;
    private const uint Version = 0x30;
    private const uint Tpr = 0x80;
    private const uint Apr = 0x90;
    private const uint Ppr = 0xa0;
    private const uint Eoi = 0xb0;
    private const uint Ldr = 0xd0;
    private const uint Dfr = 0xe0;
    private const uint Svr = 0xf0;
    private const uint Esr = 0x280;
    private const uint IcrLow = 0x300;
    private const uint IcrHigh = 0x310;
    private const uint LvtTimer = 0x320;
    private const uint LvtPerf = 0x340;
    private const uint Lint0 = 0x350;
    private const uint Lint1 = 0x360;
    private const uint LvtError = 0x370;
    private const uint InitialCount = 0x380;
    private const uint CurrentCount = 0x390;
    private const uint Divide = 0x3e0;
    private const uint Masked = 1 << 16;

    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ApicBus _bus = new();
    private readonly LocalApic[] _apics;
    private readonly ProbeSignals[] _signals;

    public LocalApicTests()
    {
        _apics = [.. Enumerable.Range(0, 4).Select(i => new LocalApic((uint)i, i == 0, _bus, _clock))];
        _signals = [.. _apics.Select(_ => new ProbeSignals())];
        for (int i = 0; i < _apics.Length; i++)
        {
            _apics[i].Connect(_signals[i]);
            Write(i, Svr, 0x1ff);
        }
    }

    private LocalApic Apic => _apics[0];

    [Fact]
    public void RegistersAfterReset()
    {
        LocalApic apic = new(9, bootProcessor: true, new ApicBus(), _clock);
        Assert.Equal(0xfee0_0900ul, apic.Base);
        Assert.Equal(9u << 24, (uint)apic.Read(Id, AccessSize.Dword));
        Assert.Equal(0x0105_0014u, (uint)apic.Read(Version, AccessSize.Dword));
        Assert.Equal(0xffu, (uint)apic.Read(Svr, AccessSize.Dword));
        Assert.Equal(0xffff_ffffu, (uint)apic.Read(Dfr, AccessSize.Dword));
        Assert.Equal(0u, (uint)apic.Read(Ldr, AccessSize.Dword));
        foreach (uint lvt in new[] { LvtTimer, 0x330u, LvtPerf, Lint0, Lint1, LvtError })
            Assert.Equal(Masked, (uint)apic.Read(lvt, AccessSize.Dword));
        Assert.False(apic.HasInterrupt);
        Assert.Equal(-1, apic.Acknowledge());
    }

    [Fact]
    public void ServesByPriority()
    {
        SendSelf(0x41);
        SendSelf(0x85);
        SendSelf(0x83);
        Assert.True(Apic.HasInterrupt);
        Assert.Equal(0x85, Apic.Acknowledge());
        // 83h is of the same class and must wait; 41h is below.
        Assert.False(Apic.HasInterrupt);
        Assert.Equal(0x80u, Read(Ppr));
        SendSelf(0x91);
        Assert.Equal(0x91, Apic.Acknowledge());
        Assert.Equal(0x90u, Read(Ppr));
        Write(0, Eoi, 0);
        Assert.False(Apic.HasInterrupt);
        Write(0, Eoi, 0);
        Assert.Equal(0x83, Apic.Acknowledge());
        Write(0, Eoi, 0);
        Assert.Equal(0x41, Apic.Acknowledge());
        Write(0, Eoi, 0);
        Assert.Equal(0u, Read(Ppr));
        Assert.Equal(-1, Apic.Acknowledge());
    }

    [Fact]
    public void TaskPriorityHoldsInterruptsBack()
    {
        Write(0, Tpr, 0x50);
        SendSelf(0x5f);
        Assert.False(Apic.HasInterrupt);
        Assert.Equal(0x50u, Read(Ppr));
        Assert.Equal(-1, Apic.Acknowledge());
        Assert.Equal(5, Apic.TaskPriorityClass);
        int before = _signals[0].Interrupts;
        Apic.TaskPriorityClass = 4;
        Assert.Equal(before + 1, _signals[0].Interrupts);
        Assert.Equal(0x40u, Read(Tpr));
        Assert.Equal(0x5f, Apic.Acknowledge());
        Assert.Equal(0x50u, Read(Ppr));
        Write(0, Tpr, 0x57);
        Assert.Equal(0x57u, Read(Ppr));
        Assert.Equal(0x50u, Read(Apr));
    }

    [Fact]
    public void IrrIsrAndTmrShowVectors()
    {
        SendSelf(0x23);
        Assert.Equal(1u << 3, Read(0x200 + 0x10));
        Assert.Equal(0x23, Apic.Acknowledge());
        Assert.Equal(0u, Read(0x200 + 0x10));
        Assert.Equal(1u << 3, Read(0x100 + 0x10));
        Assert.Equal(0u, Read(0x180 + 0x10));
        SendSelf(0xff);
        Assert.Equal(1u << 31, Read(0x270));
    }

    [Theory]
    [InlineData(0u, new[] { 0, 0, 1, 0 })] // none: destination 2
    [InlineData(1u, new[] { 1, 0, 0, 0 })]
    [InlineData(2u, new[] { 1, 1, 1, 1 })]
    [InlineData(3u, new[] { 0, 1, 1, 1 })]
    public void Shorthands(uint shorthand, int[] expected)
    {
        Write(0, IcrHigh, 2u << 24);
        Write(0, IcrLow, 0x61 | shorthand << 18);
        Assert.Equal(expected, _apics.Select(a => a.Acknowledge() == 0x61 ? 1 : 0));
    }

    [Fact]
    public void PhysicalBroadcastReachesAll()
    {
        Write(1, IcrHigh, 0xffu << 24);
        Write(1, IcrLow, 0x61);
        Assert.All(_apics, a => Assert.Equal(0x61, a.Acknowledge()));
    }

    [Fact]
    public void FlatLogicalDestination()
    {
        for (int i = 0; i < 4; i++)
            Write(i, Ldr, 1u << (24 + i));
        Write(0, IcrHigh, 0b1010u << 24);
        Write(0, IcrLow, 0x61 | 1 << 11);
        Assert.Equal([-1, 0x61, -1, 0x61], _apics.Select(a => a.Acknowledge()));
    }

    [Fact]
    public void ClusterLogicalDestination()
    {
        uint[] ldr = [0x11, 0x12, 0x21, 0x22];
        for (int i = 0; i < 4; i++)
        {
            Write(i, Dfr, 0x0fff_ffff);
            Write(i, Ldr, ldr[i] << 24);
        }
        Write(0, IcrHigh, 0x23u << 24);
        Write(0, IcrLow, 0x61 | 1 << 11);
        Assert.Equal([-1, -1, 0x61, 0x61], _apics.Select(a => a.Acknowledge()));
        // All clusters.
        Write(0, IcrHigh, 0xf1u << 24);
        Write(0, IcrLow, 0x71 | 1 << 11);
        Assert.Equal([0x71, -1, 0x71, -1], _apics.Select(a => a.Acknowledge()));
    }

    [Fact]
    public void DeliveryModes()
    {
        Send(0, 1, 4 << 8);
        Send(0, 1, 2 << 8);
        Send(0, 1, 5 << 8 | 1 << 14);
        Send(0, 1, 6 << 8 | 0x9a);
        // The INIT level de-assert does nothing.
        Send(0, 1, 5 << 8 | 1 << 15);
        Assert.Equal(1, _signals[1].Nmis);
        Assert.Equal(1, _signals[1].Smis);
        Assert.Equal(1, _signals[1].Inits);
        Assert.Equal([0x9a], _signals[1].Sipis);
        Assert.Equal(0, _signals[0].Nmis + _signals[0].Inits + _signals[0].Smis);
        Assert.False(_apics[1].HasInterrupt);
    }

    [Fact]
    public void InitAndStartUpReachAnApicThatIsSoftwareDisabled()
    {
        Write(1, Svr, 0xff);
        Send(0, 1, 5 << 8 | 1 << 14);
        Send(0, 1, 6 << 8 | 8);
        Send(0, 1, 0x61);
        Assert.Equal(1, _signals[1].Inits);
        Assert.Equal([8], _signals[1].Sipis);
        Assert.False(_apics[1].HasInterrupt);
    }

    [Fact]
    public void LowestPriorityGoesToTheLeastBusy()
    {
        for (int i = 0; i < 4; i++)
        {
            Write(i, Ldr, 1u << (24 + i));
            Write(i, Tpr, i == 2 ? 0x10u : 0x40u);
        }
        for (int n = 0; n < 5; n++)
        {
            Write(0, IcrHigh, 0xfu << 24);
            Write(0, IcrLow, 0x61 | 1 << 8 | 1 << 11);
            Assert.Equal(0x61, _apics[2].Acknowledge());
            Write(2, Eoi, 0);
        }
    }

    [Fact]
    public void LowestPriorityTakesTurnsAmongEquals()
    {
        for (int i = 0; i < 4; i++)
            Write(i, Ldr, 1u << (24 + i));
        int[] taken = new int[4];
        for (int n = 0; n < 8; n++)
        {
            Write(0, IcrHigh, 0xfu << 24);
            Write(0, IcrLow, 0x61 | 1 << 8 | 1 << 11);
            int at = _apics.ToList().FindIndex(a => a.Acknowledge() == 0x61);
            taken[at]++;
            Write(at, Eoi, 0);
        }
        Assert.Equal([2, 2, 2, 2], taken);
    }

    [Fact]
    public void MsiIsDecoded()
    {
        _bus.Send(0xfee0_3000, 0x4055);
        Assert.Equal(0x55, _apics[3].Acknowledge());
        Write(2, Ldr, 4u << 24);
        _bus.Send(0xfee0_4004, 0x56);
        Assert.Equal(0x56, _apics[2].Acknowledge());
        _bus.Send(0xfee0_1000, 4 << 8);
        Assert.Equal(1, _signals[1].Nmis);
        // Not an interrupt address.
        _bus.Send(0xfed0_3000, 0x57);
        _bus.Send(0x1_fee0_3000, 0x57);
        Assert.Equal(-1, _apics[3].Acknowledge());
        // A level de-assert is no interrupt.
        _bus.Send(0xfee0_3000, 0x8057);
        Assert.Equal(-1, _apics[3].Acknowledge());
        _bus.Send(0xfeef_f000, 0x68);
        Assert.All(_apics, a => Assert.Equal(0x68, a.Acknowledge()));
    }

    [Fact]
    public void IllegalVectorsAndRegistersAreRecorded()
    {
        Write(0, LvtError, 0x40);
        Write(0, Esr, 0);
        Assert.Equal(0u, Read(Esr));
        SendSelf(5);
        Assert.Equal(0u, Read(Esr));
        Assert.Equal(0x40, Apic.Acknowledge());
        Write(0, Eoi, 0);
        Write(0, Esr, 0);
        Assert.Equal(1u << 5, Read(Esr));
        _ = Read(0x40);
        _bus.Send(0xfee0_0000, 3);
        Write(0, Esr, 0);
        Assert.Equal(1u << 6 | 1u << 7, Read(Esr));
        Write(0, Esr, 0);
        Assert.Equal(0u, Read(Esr));
    }

    [Fact]
    public void AnErrorInTheErrorVectorEndsThere()
    {
        Write(0, LvtError, 3);
        SendSelf(5);
        Write(0, Esr, 0);
        Assert.Equal(1u << 5 | 1u << 6, Read(Esr));
        Assert.False(Apic.HasInterrupt);
    }

    [Fact]
    public void SoftwareDisableMasksLocalVectorsAndKeepsPending()
    {
        Write(0, LvtTimer, 0x40);
        SendSelf(0x61);
        Write(0, Svr, 0xff);
        Assert.Equal(0x40 | Masked, Read(LvtTimer));
        Write(0, LvtTimer, 0x41);
        Assert.Equal(0x41 | Masked, Read(LvtTimer));
        SendSelf(0x62);
        Assert.Equal(0x61, Apic.Acknowledge());
        Assert.False(Apic.HasInterrupt);
        Write(0, Svr, 0x1ff);
        Assert.Equal(0x41 | Masked, Read(LvtTimer));
    }

    [Fact]
    public void OneShotTimer()
    {
        Write(0, LvtTimer, 0x40);
        Write(0, Divide, 0b1011);
        Write(0, InitialCount, 1_000_000);
        _clock.Advance(999_999);
        Assert.Equal(1u, Read(CurrentCount));
        Assert.False(Apic.HasInterrupt);
        _clock.Advance(1);
        Assert.Equal(0x40, Apic.Acknowledge());
        Assert.Equal(0u, Read(CurrentCount));
        Write(0, Eoi, 0);
        _clock.Advance(10_000_000);
        Assert.False(Apic.HasInterrupt);
    }

    [Theory]
    [InlineData(0b0000u, 2)]
    [InlineData(0b0001u, 4)]
    [InlineData(0b0010u, 8)]
    [InlineData(0b0011u, 16)]
    [InlineData(0b1000u, 32)]
    [InlineData(0b1001u, 64)]
    [InlineData(0b1010u, 128)]
    [InlineData(0b1011u, 1)]
    public void TimerDivides(uint code, int divisor)
    {
        Write(0, Divide, code);
        Assert.Equal(code, Read(Divide));
        Write(0, LvtTimer, 0x40);
        Write(0, InitialCount, 1000);
        _clock.Advance(300 * divisor);
        Assert.Equal(700u, Read(CurrentCount));
        _clock.Advance(700 * divisor - 1);
        Assert.False(Apic.HasInterrupt);
        _clock.Advance(1);
        Assert.True(Apic.HasInterrupt);
    }

    [Fact]
    public void DividerChangeKeepsTheCount()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40);
        Write(0, InitialCount, 1000);
        _clock.Advance(400);
        Write(0, Divide, 0b0000);
        Assert.Equal(600u, Read(CurrentCount));
        _clock.Advance(1199);
        Assert.False(Apic.HasInterrupt);
        _clock.Advance(1);
        Assert.True(Apic.HasInterrupt);
    }

    [Fact]
    public void PeriodicTimerDoesNotDrift()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40 | 1 << 17);
        Write(0, InitialCount, 100_003);
        int interrupts = 0;
        for (int n = 0; n < 1000; n++)
        {
            _clock.Advance(100_003);
            if (Apic.Acknowledge() == 0x40)
                interrupts++;
            Write(0, Eoi, 0);
        }
        Assert.Equal(1000, interrupts);
        Assert.Equal(100_003u, Read(CurrentCount));
        _clock.Advance(3);
        Assert.Equal(100_000u, Read(CurrentCount));
    }

    [Fact]
    public void FastPeriodicTimerIsMergedAndEnds()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40 | 1 << 17);
        Write(0, InitialCount, 1);
        _clock.Advance(1_000_000_000);
        Assert.Equal(0x40, Apic.Acknowledge());
        Write(0, InitialCount, 0);
        Write(0, Eoi, 0);
        Assert.Equal(0u, Read(CurrentCount));
        _clock.Advance(1_000_000);
        Assert.False(Apic.HasInterrupt);
    }

    [Fact]
    public void TimerInterruptsKeepTheirDistance()
    {
        LocalApic apic = new(9, true, new ApicBus(), _clock, new LocalApicFeatures(TimerSpacing: 1_000_000));
        apic.Write(Svr, AccessSize.Dword, 0x1ff);
        apic.Write(Divide, AccessSize.Dword, 0b1011);
        apic.Write(LvtTimer, AccessSize.Dword, 0x40);
        apic.Write(InitialCount, AccessSize.Dword, 1000);
        _clock.Advance(1000);
        Assert.Equal(0x40, apic.Acknowledge());
        apic.Write(Eoi, AccessSize.Dword, 0);
        apic.Write(InitialCount, AccessSize.Dword, 1000);
        _clock.Advance(999_000);
        Assert.False(apic.HasInterrupt);
        Assert.Equal(0u, (uint)apic.Read(CurrentCount, AccessSize.Dword));
        Assert.False(apic.HasInterrupt);
        _clock.Advance(1000);
        Assert.Equal(0x40, apic.Acknowledge());
    }

    [Fact]
    public void TimerCanBeRearmedFromItsHandler()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40);
        Write(0, InitialCount, 100_000);
        for (int n = 0; n < 100; n++)
        {
            _clock.Advance(100_000);
            Assert.Equal(0x40, Apic.Acknowledge());
            Write(0, InitialCount, 100_000);
            Write(0, Eoi, 0);
            Assert.False(Apic.HasInterrupt);
        }
    }

    [Fact]
    public void MaskedTimerCountsSilently()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40 | Masked);
        Write(0, InitialCount, 1000);
        _clock.Advance(500);
        Assert.Equal(500u, Read(CurrentCount));
        _clock.Advance(600);
        Write(0, LvtTimer, 0x40);
        Assert.False(Apic.HasInterrupt);
    }

    [Fact]
    public void TscDeadline()
    {
        Write(0, LvtTimer, 0x40 | 2 << 17);
        Assert.True(Apic.TryWriteMsr(0x6e0, 5_000));
        Assert.True(Apic.TryReadMsr(0x6e0, out ulong deadline));
        Assert.Equal(5_000ul, deadline);
        // The initial count has no effect in this mode.
        Write(0, InitialCount, 10);
        _clock.Advance(4_999);
        Assert.False(Apic.HasInterrupt);
        Assert.Equal(0u, Read(CurrentCount));
        _clock.Advance(1);
        Assert.Equal(0x40, Apic.Acknowledge());
        Write(0, Eoi, 0);
        Assert.True(Apic.TryReadMsr(0x6e0, out deadline));
        Assert.Equal(0ul, deadline);
        // In the past: at once.
        Assert.True(Apic.TryWriteMsr(0x6e0, 1));
        Assert.Equal(0x40, Apic.Acknowledge());
        Write(0, Eoi, 0);
        // Zero disarms, and the far future never comes.
        Assert.True(Apic.TryWriteMsr(0x6e0, 10_000));
        Assert.True(Apic.TryWriteMsr(0x6e0, 0));
        _clock.Advance(1_000_000);
        Assert.False(Apic.HasInterrupt);
        Assert.True(Apic.TryWriteMsr(0x6e0, ulong.MaxValue));
        _clock.Advance(1_000_000);
        Assert.False(Apic.HasInterrupt);
        // Leaving the mode disarms.
        Assert.True(Apic.TryWriteMsr(0x6e0, 3_000_000));
        Write(0, LvtTimer, 0x40);
        Assert.True(Apic.TryReadMsr(0x6e0, out deadline));
        Assert.Equal(0ul, deadline);
        _clock.Advance(10_000_000);
        Assert.False(Apic.HasInterrupt);
    }

    [Fact]
    public void TscDeadlineFollowsTheTscOffset()
    {
        Apic.TscOffset = 1_000_000;
        Write(0, LvtTimer, 0x40 | 2 << 17);
        Assert.True(Apic.TryWriteMsr(0x6e0, 1_005_000));
        _clock.Advance(4_999);
        Assert.False(Apic.HasInterrupt);
        // The guest sets its TSC back by 2,000 ticks.
        Apic.TscOffset = 998_000;
        _clock.Advance(2_000);
        Assert.False(Apic.HasInterrupt);
        _clock.Advance(1);
        Assert.True(Apic.HasInterrupt);
        Apic.Acknowledge();
        Write(0, Eoi, 0);
        Apic.TscOffset = -1_000_000;
        Assert.True(Apic.TryWriteMsr(0x6e0, 5));
        Assert.False(Apic.HasInterrupt);
        _clock.Advance(1_000_000);
        Assert.True(Apic.HasInterrupt);
    }

    [Fact]
    public void VirtualWireModePassesThe8259Through()
    {
        Pic8259 pic = new(_bus.Lint0);
        _bus.ConnectExternal(pic);
        PicTests.Initialize(pic, 0x30, 0x38);
        pic.Input(4).Set(true);
        Assert.False(Apic.HasInterrupt);
        Apic.ConfigureVirtualWire();
        Assert.True(Apic.HasInterrupt);
        Assert.False(_apics[1].HasInterrupt);
        Assert.Equal(0x34, Apic.Acknowledge());
        Assert.False(Apic.HasInterrupt);
        pic.WritePort(0x20, AccessSize.Byte, 0x20);
        // The level went away before the acknowledge: no interrupt, not even a spurious one, as long as the processor notices in time.
        pic.WritePort(0x4d0, AccessSize.Byte, 1 << 5);
        pic.Input(5).Set(true);
        Assert.True(Apic.HasInterrupt);
        pic.Input(5).Set(false);
        Assert.False(Apic.HasInterrupt);
        Assert.Equal(-1, Apic.Acknowledge());
        // Switched off, LINT0 is the processor's INTR pin.
        Assert.True(Apic.TryWriteMsr(0x1b, 0xfee0_0100));
        pic.Input(6).Set(true);
        Assert.Equal(0x36, Apic.Acknowledge());
    }

    [Fact]
    public void Lint1IsNmi()
    {
        _bus.Lint1.Set(true);
        Assert.Equal(0, _signals[0].Nmis);
        _bus.Lint1.Set(false);
        Apic.ConfigureVirtualWire();
        _bus.Lint1.Set(true);
        _bus.Lint1.Set(true);
        Assert.Equal(1, _signals[0].Nmis);
    }

    [Fact]
    public void LevelTriggeredPinIsDeliveredAgainAfterEoi()
    {
        Write(0, Lint0, 0x50 | 1 << 15);
        _bus.Lint0.Set(true);
        Assert.Equal(0x50 | 1u << 15 | 1u << 14, Read(Lint0));
        Assert.Equal(0x50, Apic.Acknowledge());
        Assert.False(Apic.HasInterrupt);
        Write(0, Eoi, 0);
        Assert.Equal(0x50, Apic.Acknowledge());
        _bus.Lint0.Set(false);
        Write(0, Eoi, 0);
        Assert.False(Apic.HasInterrupt);
        Assert.Equal(0x50 | 1u << 15, Read(Lint0));
    }

    [Fact]
    public void PerformanceInterruptMasksItself()
    {
        Write(0, LvtPerf, 4 << 8);
        Apic.Trigger(LocalVector.Performance);
        Apic.Trigger(LocalVector.Performance);
        Assert.Equal(1, _signals[0].Nmis);
        Assert.Equal(4u << 8 | Masked, Read(LvtPerf));
    }

    [Fact]
    public void X2ApicTransitions()
    {
        const ulong xapic = 0xfee0_0900;
        const ulong x2apic = 0xfee0_0d00;
        const ulong off = 0xfee0_0100;
        const ulong invalid = 0xfee0_0500;
        Assert.False(Apic.TryReadMsr(0x802, out _));
        Assert.False(Apic.TryWriteMsr(0x1b, invalid));
        Assert.False(Apic.TryWriteMsr(0x1b, xapic | 1));
        Assert.False(Apic.TryWriteMsr(0x1b, xapic | 1ul << 60));
        Write(0, Tpr, 0x30);
        Assert.True(Apic.TryWriteMsr(0x1b, x2apic));
        Assert.True(Apic.TryReadMsr(0x808, out ulong tpr));
        Assert.Equal(0x30ul, tpr);
        // Not back to xAPIC mode, and not to the invalid state; only off.
        Assert.False(Apic.TryWriteMsr(0x1b, xapic));
        Assert.False(Apic.TryWriteMsr(0x1b, invalid));
        Assert.True(Apic.TryWriteMsr(0x1b, off));
        Assert.False(Apic.TryReadMsr(0x808, out _));
        Assert.False(Apic.TryWriteMsr(0x1b, x2apic));
        Assert.True(Apic.TryWriteMsr(0x1b, xapic));
        Assert.Equal(0u, Read(Tpr));
        Assert.Equal(0xffu, Read(Svr));
        Assert.True(Apic.TryWriteMsr(0x1b, x2apic));
        // INIT keeps the mode.
        Apic.Init();
        Assert.Equal(x2apic, Apic.Base);
        Apic.Reset();
        Assert.Equal(xapic, Apic.Base);
    }

    [Fact]
    public void X2ApicIsRefusedWhereItIsNotOffered()
    {
        LocalApic apic = new(0, true, new ApicBus(), _clock, new LocalApicFeatures(X2Apic: false, TscDeadline: false));
        Assert.False(apic.TryWriteMsr(0x1b, 0xfee0_0d00));
        Assert.False(apic.TryReadMsr(0x6e0, out _));
        Assert.False(apic.TryWriteMsr(0x6e0, 1));
        Assert.False(apic.TryReadMsr(0x10, out _));
    }

    [Fact]
    public void X2ApicRegistersAndFaults()
    {
        foreach (LocalApic apic in _apics)
            Assert.True(apic.TryWriteMsr(0x1b, apic.Base | 1 << 10));
        LocalApic third = _apics[3];
        Assert.True(third.TryReadMsr(0x802, out ulong id));
        Assert.Equal(3ul, id);
        Assert.True(third.TryReadMsr(0x80d, out ulong ldr));
        Assert.Equal(8ul, ldr);
        uint[] readable =
        [
            0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f, .. Enumerable.Range(0x810, 24).Select(m => (uint)m), 0x828, 0x830, 0x832, 0x833, 0x834,
            0x835, 0x836, 0x837, 0x838, 0x839, 0x83e,
        ];
        uint[] writable = [0x808, 0x80b, 0x80f, 0x828, 0x830, 0x832, 0x833, 0x834, 0x835, 0x836, 0x837, 0x838, 0x83e, 0x83f];
        for (uint msr = 0x800; msr <= 0x8ff; msr++)
        {
            Assert.Equal(readable.Contains(msr), third.TryReadMsr(msr, out _));
            ulong value = msr is 0x830 or 0x83f ? 0x40u : 0u;
            Assert.Equal(writable.Contains(msr), third.TryWriteMsr(msr, value));
        }
        Assert.False(third.TryWriteMsr(0x80b, 1));
        Assert.False(third.TryWriteMsr(0x828, 1));
        Assert.False(third.TryWriteMsr(0x808, 0x100));
        Assert.False(third.TryWriteMsr(0x832, 1 << 20));
        Assert.False(third.TryWriteMsr(0x830, 1 << 13));
        Assert.False(third.TryWriteMsr(0x83f, 0x100));
    }

    [Fact]
    public void X2ApicIpis()
    {
        foreach (LocalApic apic in _apics)
        {
            Assert.True(apic.TryWriteMsr(0x1b, apic.Base | 1 << 10));
            Assert.True(apic.TryWriteMsr(0x80f, 0x1ff));
        }
        Assert.True(Apic.TryWriteMsr(0x830, 2ul << 32 | 0x61));
        Assert.Equal(0x61, _apics[2].Acknowledge());
        Assert.True(Apic.TryReadMsr(0x830, out ulong icr));
        Assert.Equal(2ul << 32 | 0x61, icr);
        // Cluster 0, processors 1 and 3.
        Assert.True(Apic.TryWriteMsr(0x830, 0b1010ul << 32 | 1 << 11 | 0x71));
        Assert.Equal([-1, 0x71, -1, 0x71], _apics.Select(a => a.Acknowledge()));
        // Cluster 1 is empty.
        Assert.True(Apic.TryWriteMsr(0x830, 0x1_000ful << 32 | 1 << 11 | 0x72));
        Assert.All(_apics, a => Assert.Equal(-1, a.Acknowledge()));
        Assert.True(Apic.TryWriteMsr(0x830, 0xffff_fffful << 32 | 0x81));
        Assert.All(_apics, a => Assert.Equal(0x81, a.Acknowledge()));
        Assert.True(Apic.TryWriteMsr(0x83f, 0x91));
        Assert.Equal(0x91, Apic.Acknowledge());
        Assert.True(Apic.TryReadMsr(0x830, out icr));
        Assert.Equal(0x81ul, icr & 0xff);
        // 8-bit destinations of MSIs and I/O APICs reach x2APICs too.
        _bus.Send(0xfee0_3000, 0xa1);
        Assert.Equal(0xa1, _apics[3].Acknowledge());
    }

    [Fact]
    public void WideIdsAreReachable()
    {
        LocalApic far = new(300, false, _bus, _clock);
        ProbeSignals signals = new();
        far.Connect(signals);
        Assert.True(Apic.TryWriteMsr(0x1b, Apic.Base | 1 << 10));
        Assert.True(Apic.TryWriteMsr(0x830, 300ul << 32 | 5 << 8 | 1 << 14));
        Assert.Equal(1, signals.Inits);
        Assert.True(far.TryWriteMsr(0x1b, far.Base | 1 << 10));
        Assert.True(far.TryWriteMsr(0x80f, 0x1ff));
        Assert.True(far.TryReadMsr(0x80d, out ulong ldr));
        Assert.Equal(18ul << 16 | 1 << 12, ldr);
        Assert.True(Apic.TryWriteMsr(0x830, ldr << 32 | 1 << 11 | 0x66));
        Assert.Equal(0x66, far.Acknowledge());
        // MSI with an extended destination: 300 = 12Ch.
        _bus.Send(0xfee0_0000 | 0x2c << 12 | 1 << 5, 0x77);
        Assert.Equal(0x77, far.Acknowledge());
    }

    [Fact]
    public void NarrowAndUnalignedAccesses()
    {
        Assert.Equal(0x05u, (uint)Apic.Read(Version + 2, AccessSize.Byte));
        Assert.Equal(0ul, Apic.Read(Version + 4, AccessSize.Dword));
        Apic.Write(Tpr, AccessSize.Byte, 0x70);
        Apic.Write(Tpr + 1, AccessSize.Dword, 0x70);
        Assert.Equal(0u, Read(Tpr));
        Apic.Write(Tpr, AccessSize.Qword, 0x70);
        Assert.Equal(0x70u, Read(Tpr));
    }

    [Fact]
    public void StateMovesToAnotherApic()
    {
        Write(0, Divide, 0b1011);
        Write(0, LvtTimer, 0x40 | 1 << 17);
        Write(0, InitialCount, 100_000);
        SendSelf(0x61);
        Apic.Acknowledge();
        SendSelf(0x55);
        _clock.Advance(30_000);
        LocalApic.State state = Apic.Save();
        LocalApic other = new(0, true, new ApicBus(), _clock);
        ProbeSignals signals = new();
        other.Connect(signals);
        other.Restore(state);
        Assert.Equal(state, other.Save());
        Assert.Equal(70_000ul, other.Read(CurrentCount, AccessSize.Dword));
        _clock.Advance(70_000);
        other.Write(Eoi, AccessSize.Dword, 0);
        Assert.Equal(0x55, other.Acknowledge());
        other.Write(Eoi, AccessSize.Dword, 0);
        Assert.Equal(0x40, other.Acknowledge());
        Assert.True(signals.Interrupts > 0);
    }

    private uint Read(uint offset) => (uint)Apic.Read(offset, AccessSize.Dword);

    private void Write(int apic, uint offset, uint value) => _apics[apic].Write(offset, AccessSize.Dword, value);

    private void Send(int from, uint to, uint command)
    {
        Write(from, IcrHigh, to << 24);
        Write(from, IcrLow, command);
    }

    private void SendSelf(byte vector) => Write(0, IcrLow, vector | 1u << 18);
}
