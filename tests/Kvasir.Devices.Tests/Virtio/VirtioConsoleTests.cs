using System;
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

        public void Attach(ICharacterDevice device)
        {
        }

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
