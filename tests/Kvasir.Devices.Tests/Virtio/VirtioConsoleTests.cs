using System;
using System.Linq;
using System.Text;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Serial;
using Kvasir.Devices.Virtio;
using Xunit;

namespace Kvasir.Devices.Tests.Virtio;

/// <summary>The console's device side; the rest is for guests to show.</summary>
public sealed class VirtioConsoleTests : IDisposable
{
    private const ulong Rings = 0x10_0000;
    private const ulong Buffers = 0xa0_0000;
    private const ulong Plain = ulong.MaxValue & ~(1ul << 1);

    private readonly GuestMemory _memory = new(32ul << 20);

    public void Dispose() => _memory.Dispose();

    /// <summary>A buffer of which the host had taken a part when the device was saved is sent to its end by the next one, once.</summary>
    [Theory]
    [InlineData(ulong.MaxValue & ~ModelDriver.RingPacked)]
    [InlineData(ulong.MaxValue)]
    public void HalfSentOutputGoesOnInARestoredDevice(ulong rings)
    {
        const string text = "what the guest says in one piece";
        NarrowBackend narrow = new() { Room = 9 };
        using VirtioConsole device = new("console", _memory, [new ConsolePort(narrow)]);
        ModelDriver driver = new(device, _memory);
        ModelQueue[] queues = driver.Start(Plain & rings, 16, Rings);
        byte[] bytes = Encoding.ASCII.GetBytes(text);
        _memory.TryWrite(new Gpa(Buffers), bytes);
        Assert.True(queues[1].TryAdd([new Part(Buffers, (uint)bytes.Length, false)], indirect: false) >= 0);
        driver.Kick(1);
        Assert.True(SpinWait.SpinUntil(() => narrow.Text.Length == 9, 120_000));
        device.Pause();
        VirtioDevice.State saved = device.Save();
        Assert.Equal(9, Assert.Single(saved.Held).Progress);
        NarrowBackend wide = new() { Room = 1000 };
        using VirtioConsole second = new("second", _memory, [new ConsolePort(wide)]);
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        second.Resume();
        other.Wait(queues[1]);
        Assert.Equal(text, narrow.Text + wide.Text);
    }

    /// <summary>Input that waited, an open port and messages that waited are as they were; the terminal's size and who is at the other side are the new host's.</summary>
    [Theory]
    [InlineData(ulong.MaxValue & ~ModelDriver.RingPacked)]
    [InlineData(ulong.MaxValue)]
    public void WhatWaitsForTheGuestWaitsInARestoredDeviceToo(ulong rings)
    {
        NarrowBackend console = new() { Room = 100 };
        NarrowBackend channel = new() { Room = 100 };
        using VirtioConsole device = new("console", _memory, [new ConsolePort(console), new ConsolePort(channel, "channel")]);
        ModelDriver driver = new(device, _memory);
        ModelQueue[] queues = driver.Start(rings, 16, Rings);
        Control(driver, queues, 0, 0, 1);
        Control(driver, queues, 0, 3, 1);
        Control(driver, queues, 1, 3, 1);
        Assert.Equal(2, console.Device!.Receive("hi"u8));
        Assert.Equal(7, channel.Device!.Receive("channel"u8));
        device.Pause();
        VirtioDevice.State saved = device.Save();
        VirtioConsole.ConsoleState state = Assert.IsType<VirtioConsole.ConsoleState>(saved.Model);
        Assert.Equal(["hi"u8.ToArray(), "channel"u8.ToArray()], [.. state.Ports.Select(port => port.Input)]);
        NarrowBackend newConsole = new() { Room = 100 };
        NarrowBackend newChannel = new() { Room = 100 };
        using VirtioConsole second = new("second", _memory, [new ConsolePort(newConsole), new ConsolePort(newChannel, "channel")]);
        second.Resize(132, 50);
        newChannel.Device!.SetConnected(false);
        Assert.Equal(6, newConsole.Device!.Receive("before"u8));
        ModelDriver other = new(second, _memory);
        second.Pause();
        second.Restore(saved);
        Assert.Equal(132u | 50u << 16, other[0x100]);
        second.Resume();
        Assert.Equal("hi", Input(other, queues[0]));
        // 0/1: added; a console, its size, open; a name, open. Then what is otherwise here.
        (uint Port, int Kind, int Value)[] expected = [(0, 1, 1), (1, 1, 1), (0, 4, 1), (0, 5, 0), (0, 6, 1), (1, 7, 1), (1, 6, 1), (1, 6, 0), (0, 5, 0)];
        foreach ((uint Port, int Kind, int Value) message in expected)
        {
            byte[] bytes = Take(other, queues[2]);
            Assert.Equal(message, (BitConverter.ToUInt32(bytes), BitConverter.ToUInt16(bytes, 4), BitConverter.ToUInt16(bytes, 6)));
            if (message.Kind == 5)
                Assert.Contains(bytes[8..], new byte[][] { [80, 0, 25, 0], [132, 0, 50, 0] });
        }
        // No program had the channel open.
        second.Pause();
        Assert.False(queues[4].TryTake(out _, out _));
        second.Resume();
        Control(other, queues, 1, 6, 1);
        Assert.Equal("channel", Input(other, queues[4]));
        Assert.Equal(4, newConsole.Device.Receive("more"u8));
        Assert.Equal("more", Input(other, queues[0]));
        // A program has it open now, and rings are not where they began.
        newConsole.Device.Receive("wait"u8);
        newChannel.Device.Receive("here"u8);
        second.Pause();
        VirtioConsole.ConsoleState now = (VirtioConsole.ConsoleState)second.Save().Model!;
        second.Restore(second.Save() with { Model = now with { Ports = [now.Ports[0] with { Input = [.. now.Ports[0].Input, .. "ed"u8] }, now.Ports[1]] } });
        second.Resume();
        Assert.Equal("waited", Input(other, queues[0]));
        Assert.Equal("here", Input(other, queues[4]));
        // After a reset the guest hears of the other side when it is ready, and not before.
        queues = other.Start(rings, 16, Rings);
        newChannel.Device.SetConnected(true);
        Control(other, queues, 0, 0, 1);
        Assert.Equal([0, 0, 0, 0, 1, 0, 1, 0], Take(other, queues[2]));
        Assert.Equal([1, 0, 0, 0, 1, 0, 1, 0], Take(other, queues[2]));
        Control(other, queues, 1, 3, 1);
        Assert.Equal(7, Take(other, queues[2])[4]);
        Assert.Equal([1, 0, 0, 0, 6, 0, 1, 0], Take(other, queues[2]));
    }

    private void Control(ModelDriver driver, ModelQueue[] queues, uint port, ushort kind, ushort value)
    {
        _memory.TryWrite(new Gpa(Buffers), (ulong)port | (ulong)kind << 32 | (ulong)value << 48);
        Assert.True(queues[3].TryAdd([new Part(Buffers, 8, false)], indirect: false) >= 0);
        driver.Kick(3);
        driver.Wait(queues[3]);
    }

    private byte[] Take(ModelDriver driver, ModelQueue queue)
    {
        Assert.True(queue.TryAdd([new Part(Buffers + 0x1000, 64, true)], indirect: false) >= 0);
        driver.Kick(queue.Index);
        byte[] bytes = new byte[driver.Wait(queue).Written];
        Assert.True(_memory.TryRead(new Gpa(Buffers + 0x1000), bytes));
        return bytes;
    }

    private string Input(ModelDriver driver, ModelQueue queue) => Encoding.ASCII.GetString(Take(driver, queue));

    /// <summary>Takes so many bytes and no more.</summary>
    private sealed class NarrowBackend : ICharacterBackend
    {
        private readonly Lock _lock = new();
        private readonly StringBuilder _text = new();

        public int Room { get; init; }

        public string Text
        {
            get
            {
                lock (_lock)
                    return _text.ToString();
            }
        }

        public ICharacterDevice? Device { get; private set; }

        public void Attach(ICharacterDevice device) => Device = device;

        public int Write(ReadOnlySpan<byte> bytes)
        {
            lock (_lock)
            {
                int taken = Math.Min(bytes.Length, Room - _text.Length);
                _text.Append(Encoding.ASCII.GetString(bytes[..taken]));
                return taken;
            }
        }

        public void ResumeInput()
        {
        }
    }
}
