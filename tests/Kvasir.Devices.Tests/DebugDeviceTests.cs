using System.Linq;
using Kvasir.Core;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Serial;
using Xunit;

namespace Kvasir.Devices.Tests;

public sealed class DebugDeviceTests
{
    private readonly PortBus _ports = new();
    private readonly MmioBus _mmio = new();

    [Theory]
    [InlineData(0u, 1)]
    [InlineData(0x10u, 33)]
    [InlineData(0x31u, 99)]
    public void DebugExitGivesAnOddCode(uint value, int code)
    {
        ProbePower power = new();
        new IsaDebugExit(power, 0xf4, 4).Map(_ports);
        _ports.Write(0xf4, AccessSize.Dword, value);
        Assert.Equal(code, power.ExitCode);
    }

    [Fact]
    public void DebugConsoleLogs()
    {
        MemoryBackend log = new();
        new DebugConsole(log).Map(_ports);
        foreach (byte b in "ok\n"u8)
            _ports.Write(0xe9, AccessSize.Byte, b);
        Assert.Equal("ok\n", log.Text);
        Assert.Equal(0xe9u, _ports.Read(0xe9, AccessSize.Byte));
    }

    [Fact]
    public void LatchPortKeepsTheLastByte()
    {
        LatchPort post = new();
        _ports.Map(LatchPort.PostCode, 1, post);
        _ports.Write(0x80, AccessSize.Byte, 0x5c);
        Assert.Equal(0x5c, post.Value);
        Assert.Equal(0x5cu, _ports.Read(0x80, AccessSize.Byte));
        LatchPort other = new();
        other.Restore(post.Save());
        Assert.Equal(0x5c, other.Value);
        post.Reset();
        Assert.Equal(0, post.Value);
    }

    [Fact]
    public void TestDevice()
    {
        ProbeLine[] lines = [.. Enumerable.Range(0, 24).Select(_ => new ProbeLine())];
        PcTestDevice device = new(lines);
        device.Map(_ports, _mmio);
        _ports.Write(0xe0, AccessSize.Dword, 0x1234_5678);
        Assert.Equal(0x5678u, _ports.Read(0xe0, AccessSize.Word));
        Assert.Equal(0x34u, _ports.Read(0xe2, AccessSize.Byte) + _ports.Read(0xe1, AccessSize.Byte) - 0x56u);
        Assert.Equal(0x1234_5678u, _ports.Read(0xe8, AccessSize.Dword));
        _ports.Write(0xe9, AccessSize.Byte, 0xff);
        Assert.Equal(0x1234_ff78u, _ports.Read(0xe0, AccessSize.Dword));
        _ports.Write(0xe4, AccessSize.Dword, 0x1000);
        _ports.Write(0x200e, AccessSize.Byte, 1);
        Assert.True(lines[14].Level);
        _ports.Write(0x200e, AccessSize.Byte, 0);
        Assert.False(lines[14].Level);
        _mmio.Write(new Gpa(0xff00_0ff9), AccessSize.Qword, 0x1122_3344_5566_7788);
        Assert.Equal(0x1122_3344_5566_7788ul, _mmio.Read(new Gpa(0xff00_0ff9), AccessSize.Qword));
        Assert.Equal(0x66ul, _mmio.Read(new Gpa(0xff00_0ffb), AccessSize.Byte));
    }
}
