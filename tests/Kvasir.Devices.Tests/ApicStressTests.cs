using System;
using System.Linq;
using System.Threading;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Xunit;

namespace Kvasir.Devices.Tests;

/// <summary>Local APICs with a thread each, as vCPUs use them.</summary>
public sealed class ApicStressTests
{
    private const int Processors = 4;
    private const int Rounds = 4_000;
    private const int Patience = 120_000;

    /// <summary>
    /// Each of four threads sends every other one an interrupt and waits until all of its own were acknowledged: one that is
    /// lost, or two APICs that wait
    /// for each other, end the test at its time limit.
    /// </summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void NoInterruptIsLost(bool x2Apic)
    {
        using VmClock clock = new();
        ApicBus bus = new();
        LocalApic[] apics = [.. Enumerable.Range(0, Processors).Select(i => new LocalApic((uint)i, i == 0, bus, clock))];
        Waker[] wakers = [.. apics.Select(_ => new Waker())];
        int[] received = new int[Processors];
        // acknowledged[from, to]: the round up to which 'to' has seen interrupts of 'from'.
        int[] acknowledged = new int[Processors * Processors];
        for (int i = 0; i < Processors; i++)
        {
            apics[i].Connect(wakers[i]);
            if (x2Apic)
                Assert.True(apics[i].TryWriteMsr(0x1b, apics[i].Base | 1 << 10));
            if (x2Apic)
                Assert.True(apics[i].TryWriteMsr(0x80f, 0x1ff));
            else
                apics[i].Write(0xf0, AccessSize.Dword, 0x1ff);
        }
        using CountdownEvent done = new(Processors);
        Exception? failure = null;
        Thread[] threads = [.. Enumerable.Range(0, Processors).Select(i => new Thread(() =>
        {
            try
            {
                RunProcessor(i, apics[i], wakers, x2Apic, received, acknowledged, done);
            }
            catch (Exception e)
            {
                failure = e;
            }
        }))];
        foreach (Thread thread in threads)
            thread.Start();
        foreach (Thread thread in threads)
            thread.Join();
        Assert.Null(failure);
        Assert.All(received, n => Assert.Equal(Rounds * (Processors - 1), n));
    }

    /// <summary>A periodic timer on the real clock keeps its average while other threads load the APIC.</summary>
    [Fact]
    public void TimerKeepsItsRateUnderIpis()
    {
        using VmClock clock = new();
        ApicBus bus = new();
        LocalApic apic = new(0, true, bus, clock);
        Waker waker = new();
        apic.Connect(waker);
        apic.Write(0xf0, AccessSize.Dword, 0x1ff);
        apic.Write(0x3e0, AccessSize.Dword, 0b1011);
        apic.Write(0x320, AccessSize.Dword, 0x40 | 1 << 17);
        long start = clock.Now;
        // One a millisecond.
        apic.Write(0x380, AccessSize.Dword, 1_000_000);
        int timer = 0;
        int messages = 0;
        bool stop = false;
        Thread sender = new(() =>
        {
            while (!Volatile.Read(ref stop))
            {
                bus.Send(0xfee0_0000, 0x50);
                Thread.Yield();
            }
        });
        sender.Start();
        while (clock.Now - start < 300_000_000)
        {
            int vector = apic.Acknowledge();
            if (vector < 0)
            {
                waker.Wait();
                continue;
            }
            if (vector == 0x40)
                timer++;
            else
                messages++;
            apic.Write(0xb0, AccessSize.Dword, 0);
        }
        Volatile.Write(ref stop, true);
        sender.Join();
        // A loaded host comes late and merges some, but never gives more.
        Assert.InRange(timer, 50, 301);
        Assert.True(messages > 0);
    }

    /// <summary>
    /// Level-triggered interrupts from two threads, EOIs from a third: every assertion is seen, and none after the wire fell.
    /// </summary>
    [Fact]
    public void LevelsAndEoisFromDifferentThreads()
    {
        using VmClock clock = new();
        ApicBus bus = new();
        IoApic ioApic = new(bus);
        LocalApic apic = new(0, true, bus, clock);
        Waker waker = new();
        apic.Connect(waker);
        apic.Write(0xf0, AccessSize.Dword, 0x1ff);
        for (int pin = 0; pin < 2; pin++)
        {
            ioApic.Write(0, AccessSize.Dword, (ulong)(0x10 + pin * 2));
            ioApic.Write(0x10, AccessSize.Dword, (ulong)(0x50 + pin * 0x10) | 1 << 15);
        }
        const int rounds = 3_000;
        int[] requested = new int[2];
        int[] served = new int[2];
        Thread[] devices = [.. Enumerable.Range(0, 2).Select(pin => new Thread(() =>
        {
            for (int n = 1; n <= rounds; n++)
            {
                Volatile.Write(ref requested[pin], n);
                ioApic.Pin(pin).Set(true);
                if (!SpinWait.SpinUntil(() => Volatile.Read(ref served[pin]) == n, Patience))
                    return;
            }
        }))];
        foreach (Thread device in devices)
            device.Start();
        long deadline = clock.Now + Patience * 1_000_000L;
        while ((served[0] < rounds || served[1] < rounds) && clock.Now < deadline)
        {
            int vector = apic.Acknowledge();
            if (vector < 0)
            {
                waker.Wait();
                continue;
            }
            int pin = (vector - 0x50) >> 4;
            // The handler makes the device lower its wire, then ends the interrupt.
            ioApic.Pin(pin).Set(false);
            Volatile.Write(ref served[pin], Volatile.Read(ref requested[pin]));
            apic.Write(0xb0, AccessSize.Dword, 0);
        }
        foreach (Thread device in devices)
            device.Join();
        Assert.Equal([rounds, rounds], served);
    }

    private static void RunProcessor(
        int self, LocalApic apic, Waker[] wakers, bool x2Apic, int[] received, int[] acknowledged, CountdownEvent done)
    {
        int round = 0;
        bool counted = false;
        while (true)
        {
            int vector = apic.Acknowledge();
            if (vector >= 0)
            {
                int from = (vector - 0x40) >> 4;
                received[self]++;
                Interlocked.Increment(ref acknowledged[from * Processors + self]);
                End(apic, x2Apic);
                wakers[from].InterruptChanged();
                continue;
            }
            bool ready = Enumerable.Range(0, Processors)
                .All(to => to == self || Volatile.Read(ref acknowledged[self * Processors + to]) >= round);
            if (ready && round < Rounds)
            {
                round++;
                for (uint to = 0; to < Processors; to++)
                {
                    if (to != self)
                        Send(apic, x2Apic, to, (byte)(0x40 + self * 16));
                }
                continue;
            }
            if (ready && !counted)
            {
                counted = true;
                done.Signal();
                foreach (Waker other in wakers)
                    other.InterruptChanged();
            }
            if (done.IsSet)
                return;
            wakers[self].Wait();
        }
    }

    private static void Send(LocalApic apic, bool x2Apic, uint to, byte vector)
    {
        if (x2Apic)
        {
            apic.TryWriteMsr(0x830, (ulong)to << 32 | vector);
            return;
        }
        apic.Write(0x310, AccessSize.Dword, to << 24);
        apic.Write(0x300, AccessSize.Dword, vector);
    }

    private static void End(LocalApic apic, bool x2Apic)
    {
        if (x2Apic)
            apic.TryWriteMsr(0x80b, 0);
        else
            apic.Write(0xb0, AccessSize.Dword, 0);
    }

    /// <summary>A vCPU that sleeps until its pins change, and takes it for a lost wake-up when that lasts too long.</summary>
    private sealed class Waker : IVcpuSignals
    {
        private readonly object _monitor = new();
        private bool _woken;

        public void Wait()
        {
            lock (_monitor)
            {
                while (!_woken)
                {
                    if (!Monitor.Wait(_monitor, Patience))
                        throw new TimeoutException("nothing woke the vCPU");
                }
                _woken = false;
            }
        }

        public void InterruptChanged()
        {
            lock (_monitor)
            {
                _woken = true;
                Monitor.Pulse(_monitor);
            }
        }

        public void Nmi() => InterruptChanged();

        public void Init() => InterruptChanged();

        public void Sipi(byte vector) => InterruptChanged();

        public void Smi() => InterruptChanged();
    }
}
