using System;
using System.Collections.Generic;
using System.Text;
using Kvasir.Cli.Terminal;
using Kvasir.Machine;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class ConsoleMonitorTests
{
    private sealed class Machine : IMachineControl
    {
        public List<string> Calls { get; } = [];

        public VmState State { get; set; } = VmState.Running;

        public int VcpuCount => 2;

        public bool Listens { get; set; } = true;

        public void Pause() => Calls.Add("pause");

        public void Resume() => Calls.Add("resume");

        public void Reset() => Calls.Add("reset");

        public bool PressPowerButton()
        {
            Calls.Add("button");
            return Listens;
        }

        public void Stop() => Calls.Add("stop");
    }

    [Theory]
    [InlineData("stop", "pause")]
    [InlineData("cont", "resume")]
    [InlineData("system_reset", "reset")]
    [InlineData("  system_powerdown  ", "button")]
    [InlineData("quit", "stop")]
    public void ACommandReachesTheMachine(string line, string call)
    {
        Machine machine = new();
        Assert.Equal("", new ConsoleMonitor(machine, _ => { }).Execute(line));
        Assert.Equal([call], machine.Calls);
    }

    [Fact]
    public void StatusAndMistakesAreAnswered()
    {
        Machine machine = new() { State = VmState.Paused, Listens = false };
        ConsoleMonitor monitor = new(machine, _ => { });
        Assert.Equal("VM status: paused, 2 vCPU(s)\n", monitor.Execute("info status"));
        Assert.Equal("unknown command 'savevm'; 'help' lists what there is\n", monitor.Execute("savevm"));
        Assert.Equal("the guest does not listen for the power button\n", monitor.Execute("system_powerdown"));
        Assert.Equal("", monitor.Execute("   "));
        foreach (string command in new[] { "info status", "stop", "cont", "system_reset", "system_powerdown", "quit", "help" })
            Assert.Contains(command, monitor.Execute("help"), StringComparison.Ordinal);
    }

    [Fact]
    public void LinesAreEditedAsTyped()
    {
        Machine machine = new();
        StringBuilder screen = new();
        ConsoleMonitor monitor = new(machine, text => screen.Append(text));
        monitor.Toggle();
        Assert.True(monitor.IsOpen);
        Type(monitor, "stpo\u007f\u007fop\r");
        Assert.Equal(["pause"], machine.Calls);
        Type(monitor, "quit\u0003");
        Type(monitor, "\r");
        Assert.Equal(["pause"], machine.Calls);
        Type(monitor, new string('x', 10_000) + "\r");
        Type(monitor, "\u0004");
        Assert.False(monitor.IsOpen);
        Assert.Contains("(kvasir) ", screen.ToString(), StringComparison.Ordinal);
    }

    [Fact]
    public void EscapesAreFoundWhereverTheInputIsCut()
    {
        EscapeFilter filter = default;
        List<byte> guest = [];
        List<KeyMeaning> ours = [];
        foreach (byte typed in "a\u0001\u0001b\u0001ac\u0001x\u0001C\u0001h\u0001b\u0001zd"u8)
        {
            byte key = typed;
            KeyMeaning meaning = filter.Next(ref key);
            if (meaning == KeyMeaning.Byte)
                guest.Add(key);
            else if (meaning != KeyMeaning.Nothing)
                ours.Add(meaning);
        }
        Assert.Equal("a\u0001b\u0001cd"u8.ToArray(), guest);
        Assert.Equal([KeyMeaning.Quit, KeyMeaning.Monitor, KeyMeaning.Help, KeyMeaning.Break], ours);
    }

    private static void Type(ConsoleMonitor monitor, string keys)
    {
        foreach (char key in keys)
            monitor.Key((byte)key);
    }
}
