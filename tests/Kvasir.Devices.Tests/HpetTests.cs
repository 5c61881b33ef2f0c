using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class HpetTests
{
    private const ulong Config = 0x10;
    private const ulong IntStatus = 0x20;
    private const ulong Counter = 0xf0;
    private const ulong Periodic = 1 << 3;
    private const ulong SetValue = 1 << 6;
    private const ulong Enable = 1 << 2;
    private const ulong Level = 1 << 1;
    private const ulong Mode32 = 1 << 8;

    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ProbeLine _irq0 = new();
    private readonly ProbeLine _irq8 = new();
    private readonly ProbeLine[] _lines = [.. Enumerable.Range(0, 24).Select(_ => new ProbeLine())];
    private readonly ProbeMsi _msi = new();
    private readonly Hpet _hpet;

    public HpetTests()
    {
        IIrqLine?[] routes = new IIrqLine?[24];
        for (int i = 16; i < 24; i++)
            routes[i] = _lines[i];
        _hpet = new Hpet(_clock, _irq0, _irq8, routes, _msi);
    }

    [Fact]
    public void Capabilities()
    {
        Assert.Equal(0x0098_9680_8086_a201ul, _hpet.Read(0, AccessSize.Qword));
        Assert.Equal(0x0098_9680ul, _hpet.Read(4, AccessSize.Dword) & uint.MaxValue);
        Assert.Equal(0x00ff_0000_0000_8030ul, Read(0x100));
        Assert.Equal(ulong.MaxValue, Read(0x108));
    }

    [Fact]
    public void CounterRunsWhileEnabled()
    {
        _clock.Advance(1000);
        Assert.Equal(0ul, Read(Counter));
        Write(Config, 1);
        _clock.Advance(1_000_005);
        Assert.Equal(100_000ul, Read(Counter));
        // A running counter is not written.
        Write(Counter, 5);
        Assert.Equal(100_000ul, Read(Counter));
        Write(Config, 0);
        _clock.Advance(1_000_000);
        Assert.Equal(100_000ul, Read(Counter));
        _hpet.Write(Counter, AccessSize.Dword, 0xffff_fff0);
        _hpet.Write(Counter + 4, AccessSize.Dword, 1);
        Assert.Equal(0x1_ffff_fff0ul, Read(Counter));
        Write(Config, 1);
        _clock.Advance(200);
        Assert.Equal(0x2_0000_0004ul, Read(Counter));
        Assert.Equal(2ul, _hpet.Read(Counter + 4, AccessSize.Dword));
    }

    [Fact]
    public void OneShotEdge()
    {
        Write(0x120, Enable | 16 << 9);
        Write(0x128, 1000);
        Write(Config, 1);
        _clock.Advance(9_999);
        Assert.Equal(0, _lines[16].Rises);
        _clock.Advance(1);
        Assert.Equal(1, _lines[16].Rises);
        Assert.False(_lines[16].Level);
        Assert.Equal(0ul, Read(IntStatus));
        _clock.Advance(1_000_000);
        Assert.Equal(1, _lines[16].Rises);
        Write(0x128, Read(Counter) + 50);
        _clock.Advance(500);
        Assert.Equal(2, _lines[16].Rises);
    }

    [Fact]
    public void LevelIsHeldUntilItsStatusIsCleared()
    {
        Write(0x140, Enable | Level | 20 << 9);
        Write(0x148, 100);
        Write(Config, 1);
        _clock.Advance(1000);
        Assert.True(_lines[20].Level);
        Assert.Equal(4ul, Read(IntStatus));
        Write(IntStatus, 3);
        Assert.True(_lines[20].Level);
        // A new route moves the level.
        Write(0x140, Enable | Level | 21 << 9);
        Assert.False(_lines[20].Level);
        Assert.True(_lines[21].Level);
        Write(IntStatus, 4);
        Assert.False(_lines[21].Level);
        Assert.Equal(0ul, Read(IntStatus));
    }

    /// <summary>As Linux sets up the clock event device: value with SET_VALUE, then the period.</summary>
    [Fact]
    public void PeriodicInLegacyMode()
    {
        Write(Config, 3);
        ulong now = Read(Counter);
        _hpet.Write(0x100, AccessSize.Dword, Enable | Periodic | SetValue | Mode32);
        _hpet.Write(0x108, AccessSize.Dword, now + 100_000);
        _hpet.Write(0x108, AccessSize.Dword, 100_000);
        Assert.Equal(0ul, Read(0x100) & SetValue);
        _clock.Advance(1_000_000_000);
        Assert.Equal(1000, _irq0.Rises);
        Assert.Equal(now + 100_000 * 1001, Read(0x108));
        // 32-bit mode wraps after 42.9 s, and nothing is lost.
        _ = _irq0.TakeRises();
        _clock.Advance(60_000_000_000);
        Assert.Equal(60_000, _irq0.TakeRises());
    }

    [Fact]
    public void OneShotIn32BitModeComesAgainAfterTheWrap()
    {
        Write(Config, 1);
        Write(0x100, Enable | Mode32 | 17 << 9);
        Write(0x108, 5);
        _clock.Advance(50);
        Assert.Equal(1, _lines[17].TakeRises());
        _clock.Advance(42_949_672_960 - 1);
        Assert.Equal(0, _lines[17].TakeRises());
        _clock.Advance(1);
        Assert.Equal(1, _lines[17].TakeRises());
    }

    [Fact]
    public void LegacyReplacementTakesTheWiresAway()
    {
        _hpet.PitIrq.Set(true);
        Assert.True(_irq0.Level);
        Write(Config, 3);
        Assert.False(_irq0.Level);
        _hpet.PitIrq.Set(false);
        _hpet.PitIrq.Set(true);
        _hpet.RtcIrq.Set(true);
        Assert.False(_irq0.Level);
        Assert.False(_irq8.Level);
        Write(0x120, Enable);
        Write(0x128, Read(Counter) + 10);
        _clock.Advance(100);
        Assert.Equal(1, _irq8.Rises);
        Write(Config, 1);
        Assert.True(_irq0.Level);
        Assert.True(_irq8.Level);
    }

    [Fact]
    public void FsbInterrupts()
    {
        Write(0x110, 0xfee0_1000_0000_0055);
        Write(0x100, Enable | 1 << 14);
        Write(0x108, 10);
        Write(Config, 1);
        _clock.Advance(100);
        Assert.Equal((0xfee0_1000ul, 0x55u), _msi.Last);
        Hpet plain = new(_clock, _irq0, _irq8, []);
        plain.Write(0x100, AccessSize.Qword, 1 << 14);
        Assert.Equal(0x30ul, plain.Read(0x100, AccessSize.Qword));
    }

    [Fact]
    public void FastPeriodsAreMerged()
    {
        Write(0x100, Enable | Periodic | SetValue | 18 << 9);
        Write(0x108, 1);
        Write(Config, 1);
        _clock.Advance(100_000_000);
        Assert.InRange(_lines[18].Rises, 1000, 2002);
    }

    [Fact]
    public void StateMoves()
    {
        Write(0x100, Enable | Periodic | SetValue | 18 << 9);
        Write(0x108, 100_000);
        Write(0x120, Enable | Level | 20 << 9);
        Write(0x128, 50);
        Write(Config, 1);
        _clock.Advance(2_500_000);
        ProbeLine[] lines = [.. Enumerable.Range(0, 24).Select(_ => new ProbeLine())];
        Hpet other = new(_clock, new ProbeLine(), new ProbeLine(), lines, _msi);
        other.Restore(_hpet.Save());
        Assert.Equal(_hpet.Save(), other.Save());
        Assert.True(lines[20].Level);
        _clock.Advance(10_000_000);
        Assert.Equal(10, lines[18].Rises);
        Assert.Equal(_hpet.Save(), other.Save());
    }

    private ulong Read(ulong offset) => _hpet.Read(offset, AccessSize.Qword);

    private void Write(ulong offset, ulong value) => _hpet.Write(offset, AccessSize.Qword, value);

    private sealed class ProbeMsi : IMsiSink
    {
        public (ulong Address, uint Data) Last { get; private set; }

        public void Send(ulong address, uint data) => Last = (address, data);
    }
}
