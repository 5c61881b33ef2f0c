using System;
using Xunit;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Faults, software interrupts and system calls in great number: they allocate nothing, and their time is told.</summary>
public class DeliveryCostTests(ITestOutputHelper output)
{
    private const int Rounds = 30_000;

    [Fact]
    public void Delivery_allocates_nothing()
    {
        SystemBuilder b = Long();
        b.State.Star = (ulong)Code64 << 32;
        b.State.Lstar = 0x9600;
        // #PF: skips the two bytes of the load.
        b.Gate64(14, 0x9000, 0x8e, 1);
        b.Assemble(0x9000, a => { a.add(rsp, 8); a.add(__qword_ptr[rsp], 2); a.iretq(); });
        b.Gate64(0x20, 0x9100, 0x8e, 0);
        b.Assemble(0x9100, a => a.iretq());
        b.Assemble(0x9600, a => a.jmp(rcx));
        b.Assemble(Program, a =>
        {
            Iced.Intel.Label again = a.CreateLabel();
            a.mov(ebx, Rounds);
            a.mov(esi, 0x40_0000);
            a.Label(ref again);
            a.mov(eax, __dword_ptr[rsi]);
            a.@int(0x20);
            a.syscall();
            a.dec(ebx);
            a.jne(again);
            Exit(a);
        });
        SystemCase test = b.Build("delivery cost");
        using SystemRunner.Bench bench = new(test);
        Assert.True(bench.Run());
        long before = GC.GetAllocatedBytesForCurrentThread();
        TimeSpan start = Environment.CpuUsage.TotalTime;
        Assert.True(bench.Run());
        // Processor time: the machine may be busy with other things.
        TimeSpan time = Environment.CpuUsage.TotalTime - start;
        long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
        output.WriteLine($"{time.TotalNanoseconds / Rounds:f0} ns for #PF, INT, SYSCALL and two IRETQ");
        // What a run itself costs (a timer) is far below one byte for each delivery.
        Assert.InRange(allocated, 0, Rounds / 2);
    }
}
