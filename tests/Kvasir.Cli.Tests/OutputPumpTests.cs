using System;
using System.Diagnostics;
using System.IO.Pipes;
using System.Threading;
using System.Threading.Tasks;
using Kvasir.Cli.Terminal;
using Xunit;

namespace Kvasir.Cli.Tests;

public sealed class OutputPumpTests
{
    private const int BrokenPipe = 32;

    [Fact]
    public async Task BytesArriveInOrderThroughAFullQueue()
    {
        using AnonymousPipeServerStream reader = new(PipeDirection.In);
        int room = 0;
        byte[] sent = new byte[1 << 20];
        new Random(1).NextBytes(sent);
        using SemaphoreSlim again = new(0);
        OutputPump pump = new((int)reader.ClientSafePipeHandle.DangerousGetHandle(), "test-out") { RoomAgain = () => again.Release(++room > 0 ? 1 : 0) };
        byte[] received = new byte[sent.Length];
        Task read = Task.Run(() => reader.ReadExactly(received), TestContext.Current.CancellationToken);
        int at = 0;
        Random sizes = new(2);
        while (at < sent.Length)
        {
            int length = Math.Min(sizes.Next(1, 100_000), sent.Length - at);
            int taken = pump.Write(sent.AsSpan(at, length));
            at += taken;
            if (taken < length)
                Assert.True(await again.WaitAsync(120_000, TestContext.Current.CancellationToken), "a refusal is followed by room");
        }
        Assert.True(pump.Flush(TimeSpan.FromSeconds(120)));
        await read.WaitAsync(TimeSpan.FromSeconds(120), TestContext.Current.CancellationToken);
        Assert.Equal(sent, received);
        Assert.True(room > 0, "a megabyte does not fit the queue");
        pump.Dispose();
        reader.DisposeLocalCopyOfClientHandle();
    }

    [Fact]
    public void AReaderThatLeftIsNoReasonToStop()
    {
        AnonymousPipeServerStream reader = new(PipeDirection.In);
        int fd = (int)reader.ClientSafePipeHandle.DangerousGetHandle();
        using OutputPump pump = new(fd, "test-out");
        reader.SafePipeHandle.Dispose();
        pump.Write("lost"u8);
        Assert.True(pump.Flush(TimeSpan.FromSeconds(120)));
        Assert.Equal(BrokenPipe, pump.Error);
        Assert.Equal(100_000, pump.Write(new byte[100_000]));
        reader.ClientSafePipeHandle.Dispose();
    }

    [Fact]
    public void AReaderThatTakesNothingDoesNotHoldTheEnd()
    {
        AnonymousPipeServerStream reader = new(PipeDirection.In);
        OutputPump pump = new((int)reader.ClientSafePipeHandle.DangerousGetHandle(), "test-out");
        // Until nothing moves any more: the pipe is full, the thread stands in the middle of a write, and the queue is full.
        Stopwatch still = Stopwatch.StartNew();
        while (still.ElapsedMilliseconds < 100)
        {
            if (pump.Write(new byte[1 << 10]) > 0)
                still.Restart();
        }
        Stopwatch watch = Stopwatch.StartNew();
        Assert.False(pump.Flush(TimeSpan.FromMilliseconds(200)));
        Assert.InRange(watch.ElapsedMilliseconds, 150, 60_000);
        // Lets the thread go before the descriptor is reused.
        reader.SafePipeHandle.Dispose();
        pump.Dispose();
        reader.ClientSafePipeHandle.Dispose();
    }
}
