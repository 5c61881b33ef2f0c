using System;
using System.Runtime.ExceptionServices;
using System.Threading;
using Iced.Intel;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Interpreter;

/// <summary>What must cost nothing on the managed side: instructions, guest faults, port I/O.</summary>
public abstract class HotPathTests(bool translate)
{
    private const ulong Handler = 0x30_0000;

    [Fact]
    public void Instructions_faults_and_ports_allocate_nothing()
    {
        using LongModeMachine machine = new(translate: translate);
        Build(machine, 2000);
        // The first run decodes, compiles handlers and grows what grows once.
        for (int i = 0; i < 3; i++)
        {
            machine.Place(0, LongModeMachine.Program);
            machine.Vcpus[0].Run();
        }
        machine.Place(0, LongModeMachine.Program);
        long before = GC.GetAllocatedBytesForCurrentThread();
        machine.Vcpus[0].Run();
        long allocated = GC.GetAllocatedBytesForCurrentThread() - before;
        Assert.True(machine.Read(LongModeMachine.Data + 8) >= 2000, "the page faults did not happen");
        Assert.InRange(allocated, 0, 1024);
    }

    [Fact]
    public void A_guest_fault_throws_nothing()
    {
        using LongModeMachine machine = new(translate: translate);
        Build(machine, 2000);
        int thrown = 0;
        int thread = Environment.CurrentManagedThreadId;
        void Count(object? sender, FirstChanceExceptionEventArgs e)
        {
            if (Environment.CurrentManagedThreadId == thread)
                Interlocked.Increment(ref thrown);
        }

        AppDomain.CurrentDomain.FirstChanceException += Count;
        try
        {
            machine.Place(0, LongModeMachine.Program);
            machine.Vcpus[0].Run();
        }
        finally
        {
            AppDomain.CurrentDomain.FirstChanceException -= Count;
        }
        Assert.Equal(0, thrown);
        Assert.True(machine.Read(LongModeMachine.Data + 8) >= 2000, "the page faults did not happen");
    }

    /// <summary>A loop with arithmetic, memory, calls, a port write and, each time round, a page fault that its handler steps over.</summary>
    private static void Build(LongModeMachine machine, int rounds)
    {
        machine.Assemble(Handler, a =>
        {
            a.inc(__qword_ptr[LongModeMachine.Data + 8]);
            a.add(rsp, 8);
            // Past the two-byte load that faulted.
            a.add(__qword_ptr[rsp], 2);
            a.iretq();
        }, exit: false);
        machine.Gate(14, Handler);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            Label function = a.CreateLabel();
            Label end = a.CreateLabel();
            a.mov(ecx, rounds);
            a.mov(rsi, 0x7fff_0000_0000);
            a.mov(rbx, LongModeMachine.Data);
            a.Label(ref again);
            a.call(function);
            a.@out(0x80, al);
            // 8A 06: MOV AL, [RSI], of an address that is not mapped.
            a.mov(al, __byte_ptr[rsi]);
            a.dec(ecx);
            a.jne(again);
            a.jmp(end);
            a.Label(ref function);
            a.add(rax, rcx);
            a.mov(__qword_ptr[rbx + 64], rax);
            a.xor(rdx, __qword_ptr[rbx + 64]);
            a.imul(rdx, rax);
            a.ret();
            a.Label(ref end);
            a.nop();
        });
    }
}

public sealed class HotPathInterpretedTests() : HotPathTests(translate: false);

public sealed class HotPathTranslatedTests() : HotPathTests(translate: true);
