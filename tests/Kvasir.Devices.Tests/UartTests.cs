using System;
using System.IO;
using System.Linq;
using System.Text;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Serial;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class UartTests
{
    private const ushort Data = 0x3f8;
    private const ushort Ier = 0x3f9;
    private const ushort Iir = 0x3fa;
    private const ushort Lcr = 0x3fb;
    private const ushort Mcr = 0x3fc;
    private const ushort Lsr = 0x3fd;
    private const ushort Msr = 0x3fe;
    private const ushort Scr = 0x3ff;

    private readonly VmClock _clock = VmClock.CreateManual();
    private readonly ProbeLine _irq = new();
    private readonly MemoryBackend _host = new();
    private readonly Uart16550 _uart;

    public UartTests()
    {
        _uart = new Uart16550(0x3f8, _irq, _host, _clock);
        Out(Mcr, 0x0b);
    }

    [Fact]
    public void RegistersAfterReset()
    {
        Uart16550 uart = new(0x3f8, _irq, new NullBackend(), _clock);
        uint Read(ushort port) => uart.ReadPort(port, AccessSize.Byte);
        Assert.Equal(0u, Read(Ier));
        Assert.Equal(0x01u, Read(Iir));
        Assert.Equal(0u, Read(Mcr));
        Assert.Equal(0x60u, Read(Lsr));
        Assert.Equal(0xb0u, Read(Msr));
    }

    /// <summary>
    /// Linux's 8250 driver: IER holds four bits, loop-back shows MCR in MSR, FIFOs show in IIR, the scratch register keeps.
    /// </summary>
    [Fact]
    public void LinuxFindsA16550A()
    {
        Out(Ier, 0);
        Assert.Equal(0u, In(Ier));
        Out(Ier, 0x0f);
        Assert.Equal(0x0fu, In(Ier));
        Out(Ier, 0);
        Out(Mcr, 0x1a);
        Assert.Equal(0x90u, In(Msr) & 0xf0);
        Out(Mcr, 0x08);
        Out(Lcr, 0xbf);
        Out(Lcr, 0);
        Out(Iir, 1);
        Assert.Equal(0xc0u, In(Iir) & 0xe0);
        Out(Scr, 0x5a);
        Assert.Equal(0x5au, In(Scr));
    }

    [Fact]
    public void DivisorLatchHidesDataAndInterruptEnable()
    {
        Out(Ier, 5);
        Out(Lcr, 0x83);
        Out(Data, 0x0c);
        Out(Ier, 0x34);
        Assert.Equal(0x0cu, In(Data));
        Assert.Equal(0x34u, In(Ier));
        Out(Lcr, 3);
        Assert.Equal(5u, In(Ier));
        Assert.Equal("", _host.Text);
    }

    [Fact]
    public void OutputGoesToTheHost()
    {
        foreach (byte b in "Hello\n"u8)
            Out(Data, b);
        Assert.Equal("Hello\n", _host.Text);
        Assert.Equal(0x60u, In(Lsr));
    }

    [Fact]
    public void TransmitterInterrupt()
    {
        Out(Ier, 2);
        Assert.True(_irq.Level);
        Assert.Equal(0x02u, In(Iir));
        Assert.False(_irq.Level);
        Assert.Equal(0x01u, In(Iir));
        Out(Data, 'x');
        Assert.True(_irq.Level);
        Out(Ier, 0);
        Assert.False(_irq.Level);
        Out(Ier, 2);
        Assert.Equal(0x02u, In(Iir));
    }

    [Fact]
    public void FullHostDelaysTheTransmitterWithoutLoss()
    {
        MemoryBackend host = new(capacity: 3);
        Uart16550 uart = new(0x3f8, _irq, host, _clock);
        uart.WritePort(Mcr, AccessSize.Byte, 0x0b);
        uart.WritePort(Iir, AccessSize.Byte, 1);
        uart.WritePort(Ier, AccessSize.Byte, 2);
        StringBuilder sent = new();
        StringBuilder received = new();
        for (int i = 0; i < 200; i++)
        {
            if ((uart.ReadPort(Lsr, AccessSize.Byte) & 0x20) != 0)
            {
                // The guest fills the FIFO whenever THRE is set.
                for (int n = 0; n < 16; n++)
                {
                    char c = (char)('a' + sent.Length % 26);
                    sent.Append(c);
                    uart.WritePort(Data, AccessSize.Byte, c);
                }
                Assert.False(_irq.Level);
                Assert.Equal(0u, uart.ReadPort(Lsr, AccessSize.Byte) & 0x60);
            }
            received.Append(Encoding.ASCII.GetString(host.Take()));
        }
        while (received.Length < sent.Length)
            received.Append(Encoding.ASCII.GetString(host.Take()));
        Assert.True(_irq.Level);
        Assert.True(received.Length > 400);
        Assert.Equal(sent.ToString(), received.ToString());
    }

    [Fact]
    public void ReceiverWithoutFifoTakesOneAtATime()
    {
        Out(Ier, 1);
        _host.Send("abc");
        Assert.True(_irq.Level);
        Assert.Equal(0x04u, In(Iir));
        Assert.Equal(2, _host.PendingInput);
        Assert.Equal(0x61u, In(Lsr));
        Assert.Equal((uint)'a', In(Data));
        Assert.Equal((uint)'b', In(Data));
        Assert.True(_irq.Level);
        Assert.Equal((uint)'c', In(Data));
        Assert.False(_irq.Level);
        Assert.Equal(0x60u, In(Lsr));
    }

    [Theory]
    [InlineData(0x01, 1)]
    [InlineData(0x41, 4)]
    [InlineData(0x81, 8)]
    [InlineData(0xc1, 14)]
    public void TriggerLevels(byte fcr, int level)
    {
        Out(Iir, fcr);
        Out(Ier, 1);
        for (int i = 1; i < level; i++)
        {
            _host.Send("x");
            Assert.False(_irq.Level);
        }
        _host.Send("x");
        Assert.True(_irq.Level);
        Assert.Equal(0xc4u, In(Iir));
        In(Data);
        Assert.Equal(0xc1u, In(Iir));
    }

    [Fact]
    public void TimeoutAfterFourCharacterTimes()
    {
        // 9600 baud, 8N1: 10 bits, 4.17 ms for four characters.
        Out(Lcr, 0x83);
        Out(Data, 12);
        Out(Ier, 0);
        Out(Lcr, 0x03);
        Out(Iir, 0xc1);
        Out(Ier, 1);
        _host.Send("ab");
        _clock.Advance(4_100_000);
        Assert.False(_irq.Level);
        _clock.Advance(100_000);
        Assert.True(_irq.Level);
        Assert.Equal(0xccu, In(Iir));
        // Reading restarts the time.
        Assert.Equal((uint)'a', In(Data));
        Assert.False(_irq.Level);
        _clock.Advance(4_200_000);
        Assert.Equal(0xccu, In(Iir));
        Assert.Equal((uint)'b', In(Data));
        _clock.Advance(100_000_000);
        Assert.False(_irq.Level);
    }

    /// <summary>The datasheet: an announced time-out is cleared by reading a character, not by one that comes.</summary>
    [Fact]
    public void ATimeoutOutlastsFurtherCharacters()
    {
        Out(Iir, 0xc1);
        Out(Ier, 1);
        _host.Send("a");
        _clock.Advance(10_000_000);
        Assert.True(_irq.Level);
        int rises = _irq.Rises;
        _host.Send("b");
        Assert.True(_irq.Level);
        Assert.Equal(rises, _irq.Rises);
        Assert.Equal(0xccu, In(Iir));
        Assert.Equal((uint)'a', In(Data));
        Assert.False(_irq.Level);
        _clock.Advance(10_000_000);
        Assert.True(_irq.Level);
        Assert.Equal((uint)'b', In(Data));
    }

    [Fact]
    public void LongInputIsPacedIntoTheFifo()
    {
        Out(Iir, 0x81);
        Out(Ier, 1);
        string text = string.Concat(Enumerable.Range(0, 5000).Select(i => (char)(' ' + i % 90)));
        _host.Send(text);
        StringBuilder got = new();
        while (got.Length < text.Length)
        {
            if (!_irq.Level)
                _clock.Advance(1_000_000);
            Assert.True(_irq.Level);
            while ((In(Lsr) & 1) != 0)
                got.Append((char)In(Data));
        }
        Assert.Equal(text, got.ToString());
    }

    [Fact]
    public void InterruptPriority()
    {
        Out(Iir, 0x41);
        _host.Send("abcd");
        _uart.SetConnected(false);
        _uart.ReceiveBreak();
        Out(Ier, 0x0f);
        // The break is behind four characters and shows when it is at the head.
        Assert.Equal(0xc4u, In(Iir));
        for (int i = 0; i < 4; i++)
            In(Data);
        Assert.Equal(0xc6u, In(Iir));
        Assert.Equal(0x10u | 0x01 | 0x60 | 0x80, In(Lsr));
        Assert.Equal(0xc2u, In(Iir));
        Assert.Equal(0xc0u, In(Iir));
        Assert.Equal(0x0bu, In(Msr));
        Assert.Equal(0xc1u, In(Iir));
        Assert.Equal(0u, In(Data));
    }

    [Fact]
    public void LoopBack()
    {
        Out(Mcr, 0x1f);
        Out(Ier, 1);
        Out(Data, 0x5a);
        Assert.Equal("", _host.Text);
        // The pins are inactive in loop mode, and OUT2 with them.
        Assert.False(_irq.Level);
        Assert.Equal(0x04u, In(Iir));
        Assert.Equal(0x5au, In(Data));
        Assert.Equal(0xf0u, In(Msr) & 0xf0);
        Out(Mcr, 0x1b);
        Assert.Equal(0xb4u, In(Msr));
        Out(Data, 1);
        Out(Data, 2);
        Assert.Equal(0x63u, In(Lsr));
        Assert.Equal(1u, In(Data));
        _host.Send("x");
        Assert.Equal(1, _host.PendingInput);
        Out(Mcr, 0x0b);
        Assert.Equal((uint)'x', In(Data));
    }

    [Fact]
    public void Out2GatesTheLine()
    {
        Out(Mcr, 0x03);
        Out(Ier, 2);
        Assert.False(_irq.Level);
        Out(Mcr, 0x0b);
        Assert.True(_irq.Level);
    }

    [Fact]
    public void FlowControlHoldsInputBack()
    {
        MemoryBackend host = new();
        Uart16550 uart = new(0x3f8, _irq, host, _clock, flowControl: true);
        uart.WritePort(Iir, AccessSize.Byte, 1);
        host.Send("ab");
        Assert.Equal(2, host.PendingInput);
        uart.WritePort(Mcr, AccessSize.Byte, 2);
        Assert.Equal(0, host.PendingInput);
        Assert.Equal((uint)'a', uart.ReadPort(Data, AccessSize.Byte));
    }

    [Fact]
    public void FifoResets()
    {
        Out(Iir, 1);
        _host.Send("abc");
        Out(Iir, 3);
        Assert.Equal(0x60u, In(Lsr));
        _host.Send("d");
        Assert.Equal((uint)'d', In(Data));
        // Without the enable bit the FIFO control register takes nothing else.
        Out(Iir, 0xc0);
        Assert.Equal(0x01u, In(Iir));
    }

    [Fact]
    public void ShortWordsAreMasked()
    {
        Out(Lcr, 2);
        Out(Data, 0xe1);
        Assert.Equal("a", _host.Text);
    }

    [Fact]
    public void StateMoves()
    {
        Out(Iir, 0xc1);
        Out(Ier, 3);
        _host.Send("abc");
        ProbeLine line = new();
        Uart16550 other = new(0x3f8, line, new MemoryBackend(), _clock);
        other.Restore(_uart.Save());
        Assert.Equal(_uart.Save(), other.Save());
        Assert.Equal(_irq.Level, line.Level);
        Assert.Equal(In(Iir), other.ReadPort(Iir, AccessSize.Byte));
        _clock.Advance(10_000_000);
        Assert.Equal(0xccu, other.ReadPort(Iir, AccessSize.Byte));
        Assert.Equal((uint)'a', other.ReadPort(Data, AccessSize.Byte));
    }

    [Fact]
    public void FileBackEndKeepsEverythingInOrder()
    {
        string path = Path.Combine(Path.GetTempPath(), Path.GetRandomFileName());
        try
        {
            byte[] sent = new byte[300_000];
            new Random(7).NextBytes(sent);
            using (StreamBackend backend = StreamBackend.CreateFile(path))
            {
                Uart16550 uart = new(0x3f8, _irq, backend, _clock);
                uart.WritePort(Iir, AccessSize.Byte, 1);
                foreach (byte b in sent)
                {
                    SpinWait.SpinUntil(() => (uart.ReadPort(Lsr, AccessSize.Byte) & 0x20) != 0, 120_000);
                    uart.WritePort(Data, AccessSize.Byte, b);
                }
                SpinWait.SpinUntil(() => (uart.ReadPort(Lsr, AccessSize.Byte) & 0x40) != 0, 120_000);
            }
            Assert.Equal(sent, File.ReadAllBytes(path));
        }
        finally
        {
            File.Delete(path);
        }
    }

    [Fact]
    public void AFailedStreamSaysWhyAndDoesNotBlockTheGuest()
    {
        using StreamBackend backend = new(new FileStream("/dev/full", FileMode.Open, FileAccess.Write, FileShare.Write, 0));
        Uart16550 uart = new(0x3f8, _irq, backend, _clock);
        uart.WritePort(Iir, AccessSize.Byte, 1);
        for (int i = 0; i < 200_000; i++)
        {
            Assert.True(SpinWait.SpinUntil(() => (uart.ReadPort(Lsr, AccessSize.Byte) & 0x20) != 0, 120_000));
            uart.WritePort(Data, AccessSize.Byte, 'x');
        }
        Assert.True(SpinWait.SpinUntil(() => backend.Failure is not null, 120_000));
    }

    private void Out(ushort port, uint value) => _uart.WritePort(port, AccessSize.Byte, value);

    private uint In(ushort port) => _uart.ReadPort(port, AccessSize.Byte);
}
