using System;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class RtcTests
{
    private const long Second = 1_000_000_000;

    private readonly VmClock _clock = VmClock.CreateManual(new DateTimeOffset(2024, 2, 28, 23, 59, 58, TimeSpan.Zero).AddMilliseconds(250));
    private readonly ProbeLine _irq = new();
    private readonly CmosRtc _rtc;

    public RtcTests() => _rtc = new CmosRtc(_clock, _irq);

    [Fact]
    public void ShowsTheWallClock()
    {
        Assert.Equal([0x24, 0x02, 0x28, 0x23, 0x59, 0x58], Time());
        Assert.Equal(0x20u, Read(0x32));
        // 28 February 2024 was a Wednesday: day 4.
        Assert.Equal(4u, Read(6));
        Assert.Equal(0x26u, Read(0x0a));
        Assert.Equal(0x02u, Read(0x0b));
        Assert.Equal(0x80u, Read(0x0d));
        _clock.Advance(Second * 3 / 4 - 1);
        Assert.Equal(0x58u, Read(0));
        _clock.Advance(1);
        Assert.Equal(0x59u, Read(0));
        _clock.Advance(Second);
        // A leap year.
        Assert.Equal([0x24, 0x02, 0x29, 0x00, 0x00, 0x00], Time());
        Assert.Equal(5u, Read(6));
        _clock.Advance(86_400 * Second);
        Assert.Equal([0x24, 0x03, 0x01, 0x00, 0x00, 0x00], Time());
    }

    [Theory]
    [InlineData(2023, 2, 28, 2023, 3, 1)]
    [InlineData(2000, 2, 28, 2000, 2, 29)]
    [InlineData(2100, 2, 28, 2100, 3, 1)]
    [InlineData(2023, 4, 30, 2023, 5, 1)]
    [InlineData(2023, 12, 31, 2024, 1, 1)]
    [InlineData(1999, 12, 31, 2000, 1, 1)]
    public void RollsOverAtMidnight(int year, int month, int day, int nextYear, int nextMonth, int nextDay)
    {
        SetTime(new DateTime(year, month, day, 23, 59, 59), binary: false);
        _clock.Advance(2 * Second);
        Assert.Equal([Bcd(nextYear % 100), Bcd(nextMonth), Bcd(nextDay), 0], Time()[..4]);
        Assert.Equal((uint)Bcd(nextYear / 100), Read(0x32));
    }

    [Fact]
    public void BinaryMode()
    {
        SetTime(new DateTime(1999, 12, 31, 23, 59, 59), binary: true);
        _clock.Advance(2 * Second);
        Assert.Equal([0, 1, 1, 0, 0], Time()[..5]);
        Assert.Equal(20u, Read(0x32));
    }

    [Fact]
    public void TwelveHourMode()
    {
        Write(0x0b, 0x80);
        foreach ((byte index, byte value) in new (byte, byte)[] { (0, 0x59), (2, 0x59), (4, 0x11), (7, 0x30), (8, 0x09), (9, 0x22) })
            Write(index, value);
        Write(0x0b, 0x00);
        _clock.Advance(Second);
        // 12:00:00 in the afternoon.
        Assert.Equal([0x22, 0x09, 0x30, 0x92, 0x00, 0x00], Time());
        _clock.Advance(3600 * Second);
        Assert.Equal(0x81u, Read(4));
        _clock.Advance(11 * 3600 * Second);
        // Midnight.
        Assert.Equal([0x22, 0x10, 0x01, 0x12, 0x00, 0x00], Time());
    }

    [Fact]
    public void SetStopsUpdates()
    {
        Write(0x0b, 0x82);
        _clock.Advance(10 * Second);
        Assert.Equal(0x58u, Read(0));
        Assert.Equal(0u, Read(0x0a) & 0x80);
        Write(0x0b, 0x02);
        _clock.Advance(Second);
        Assert.Equal(0x59u, Read(0));
    }

    [Fact]
    public void DividerResetStartsAfterHalfASecond()
    {
        Write(0x0a, 0x76);
        _clock.Advance(5 * Second);
        Assert.Equal(0x58u, Read(0));
        Write(0x0a, 0x26);
        _clock.Advance(Second / 2 - 1);
        Assert.Equal(0x58u, Read(0));
        _clock.Advance(1);
        Assert.Equal(0x59u, Read(0));
    }

    [Fact]
    public void UpdateInProgressIsSetBeforeTheUpdate()
    {
        // The next update ends at 750 ms.
        _clock.Advance(750_000_000 - 2_228_001);
        Assert.Equal(0u, Read(0x0a) & 0x80);
        _clock.Advance(1);
        Assert.Equal(0x80u, Read(0x0a) & 0x80);
        _clock.Advance(2_227_999);
        Assert.Equal(0x80u, Read(0x0a) & 0x80);
        Assert.Equal(0x58u, Read(0));
        _clock.Advance(1);
        Assert.Equal(0u, Read(0x0a) & 0x80);
        Assert.Equal(0x59u, Read(0));
    }

    [Fact]
    public void PeriodicInterrupt()
    {
        Write(0x0b, 0x42);
        int interrupts = 0;
        for (int i = 0; i < 2000; i++)
        {
            _clock.Advance(500_000);
            if (!_irq.Level)
                continue;
            interrupts++;
            Assert.Equal(0xc0u, Read(0x0c) & 0xc0);
            Assert.False(_irq.Level);
            Assert.Equal(0u, Read(0x0c) & 0x40);
        }
        Assert.Equal(1024, interrupts);
        // 8,192 Hz and 2 Hz.
        Write(0x0a, 0x23);
        _ = _irq.TakeRises();
        for (int i = 0; i < 10_000; i++)
        {
            _clock.Advance(10_000);
            Read(0x0c);
        }
        Assert.InRange(_irq.TakeRises(), 819, 820);
        Write(0x0a, 0x2f);
        for (int i = 0; i < 100; i++)
        {
            _clock.Advance(100_000_000);
            Read(0x0c);
        }
        Assert.Equal(20, _irq.TakeRises());
    }

    [Fact]
    public void UpdateEndedInterrupt()
    {
        Write(0x0b, 0x12);
        _clock.Advance(750_000_000 - 1);
        Assert.False(_irq.Level);
        _clock.Advance(1);
        Assert.True(_irq.Level);
        Assert.Equal(0x90u, Read(0x0c) & 0xb0);
        Assert.False(_irq.Level);
        _clock.Advance(Second);
        Assert.True(_irq.Level);
    }

    [Fact]
    public void AlarmMatchesWithDontCares()
    {
        Write(1, 0x05);
        Write(3, 0x01);
        Write(5, 0xff);
        Write(0x0b, 0x22);
        // 23:59:58.25: the next hh:01:05 is 66.75 s away.
        _clock.Advance(66_750_000_000 - 1);
        Assert.False(_irq.Level);
        _clock.Advance(1);
        Assert.True(_irq.Level);
        Assert.Equal(0xa0u, Read(0x0c) & 0xa0);
        _clock.Advance(3600 * Second);
        Assert.True(_irq.Level);
        // Without the enable bit the flag is set all the same, and found later.
        Write(0x0b, 0x02);
        Read(0x0c);
        _clock.Advance(3600 * Second);
        Assert.False(_irq.Level);
        Assert.Equal(0x20u, Read(0x0c) & 0xa0);
    }

    [Fact]
    public void FlagsWithoutEnablesGiveNoInterrupt()
    {
        _clock.Advance(Second);
        Assert.False(_irq.Level);
        Assert.Equal(0x50u, Read(0x0c));
        Assert.Equal(0u, Read(0x0c));
    }

    [Fact]
    public void LongSleepIsMadeUpFor()
    {
        _clock.Advance(3000L * 86_400 * Second);
        DateTime expected = new DateTime(2024, 2, 28, 23, 59, 58).AddDays(3000);
        Assert.Equal([Bcd(expected.Year % 100), Bcd(expected.Month), Bcd(expected.Day), 0x23, 0x59, 0x58], Time());
        Assert.Equal((uint)expected.DayOfWeek + 1, Read(6));
    }

    [Fact]
    public void NonsenseKeepsRunning()
    {
        for (byte i = 0; i < 10; i++)
            Write(i, 0xff);
        Write(0x32, 0xff);
        _clock.Advance(100 * 86_400 * Second);
        Assert.InRange(Read(8), 1u, 0x12u);
    }

    [Fact]
    public void MemoryKeepsAndTheBoardSetsIt()
    {
        _rtc.SetMemory(0x34, 0x56);
        Assert.Equal(0x56u, Read(0x34));
        Write(0x7f, 0xa5);
        Assert.Equal(0xa5, _rtc.GetMemory(0x7f));
        Assert.Throws<ArgumentOutOfRangeException>(() => _rtc.SetMemory(0x0d, 0));
        // Bit 7 of the index is the NMI mask.
        _rtc.WritePort(0x70, AccessSize.Byte, 0xb4);
        Assert.Equal(0x56u, _rtc.ReadPort(0x71, AccessSize.Byte));
        _rtc.Reset();
        Assert.Equal(0xa5u, Read(0x7f));
    }

    [Fact]
    public void StateMoves()
    {
        Write(0x0b, 0x72);
        _clock.Advance(3 * Second + 1);
        ProbeLine line = new();
        CmosRtc other = new(_clock, line);
        other.Restore(_rtc.Save());
        Assert.Equal(_rtc.Save(), other.Save());
        Assert.Equal(_irq.Level, line.Level);
        Read(0x0c);
        other.WritePort(0x70, AccessSize.Byte, 0x0c);
        other.ReadPort(0x71, AccessSize.Byte);
        _clock.Advance(Second);
        Assert.True(line.Level);
        Assert.Equal(_rtc.Save(), other.Save());
    }

    private static byte Bcd(int value) => (byte)(value / 10 << 4 | value % 10);

    private void SetTime(DateTime time, bool binary)
    {
        byte Code(int value) => binary ? (byte)value : Bcd(value);
        Write(0x0b, (byte)(0x82 | (binary ? 4 : 0)));
        Write(0, Code(time.Second));
        Write(2, Code(time.Minute));
        Write(4, Code(time.Hour));
        Write(7, Code(time.Day));
        Write(8, Code(time.Month));
        Write(9, Code(time.Year % 100));
        Write(0x32, Code(time.Year / 100));
        Write(0x0b, (byte)(0x02 | (binary ? 4 : 0)));
    }

    /// <summary>Year, month, day, hour, minute, second as the registers show them.</summary>
    private byte[] Time() => [(byte)Read(9), (byte)Read(8), (byte)Read(7), (byte)Read(4), (byte)Read(2), (byte)Read(0)];

    private uint Read(byte index)
    {
        _rtc.WritePort(0x70, AccessSize.Byte, index);
        return _rtc.ReadPort(0x71, AccessSize.Byte);
    }

    private void Write(byte index, byte value)
    {
        _rtc.WritePort(0x70, AccessSize.Byte, index);
        _rtc.WritePort(0x71, AccessSize.Byte, value);
    }
}
