using System;
using Iced.Intel;
using Kvasir.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Interpreter;

/// <summary>Locked instructions of vCPUs that run at the same time.</summary>
public abstract class SharedMemoryTests(bool translate)
{
    private const ulong Counter = LongModeMachine.Data;
    private const int Rounds = 100_000;

    /// <summary>Each way to add one atomically; R15 holds the operand's address.</summary>
    public static TheoryData<string> Ways => new("lock inc", "lock add", "lock xadd", "cmpxchg loop", "xchg lock", "bts lock", "lock inc byte carry", "cmpxchg16b", "device page");

    [Theory]
    [MemberData(nameof(Ways))]
    public void No_update_is_lost(string way)
    {
        ArgumentNullException.ThrowIfNull(way);
        using LongModeMachine machine = new(cpus: 2, translate: translate);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(r15, Counter);
            a.mov(r14d, Rounds);
            a.Label(ref again);
            a.nop();
            AddOne(a, way);
            a.dec(r14d);
            a.jne(again);
        });
        machine.Run(LongModeMachine.Program, LongModeMachine.Program);
        Assert.Equal(2ul * Rounds, machine.Read(Counter));
    }

    /// <summary>An operand across two pages is atomic too, against others like it and against plain locked ones inside a page.</summary>
    [Fact]
    public void A_locked_operand_across_pages_is_atomic()
    {
        const ulong crossing = LongModeMachine.Data + 0x1000 - 4;
        const int rounds = 3000;
        using LongModeMachine machine = new(cpus: 2, translate: translate);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(r15, crossing);
            a.mov(r14d, rounds);
            a.Label(ref again);
            a.@lock.add(__qword_ptr[r15], 1);
            a.dec(r14d);
            a.jne(again);
        });
        const ulong other = LongModeMachine.Program + 0x1000;
        machine.Assemble(other, a =>
        {
            // The upper half alone, which lies in the second page.
            Label again = a.CreateLabel();
            a.mov(r15, crossing + 4);
            a.mov(r14d, rounds);
            a.Label(ref again);
            a.@lock.add(__dword_ptr[r15], 1);
            a.dec(r14d);
            a.jne(again);
        });
        machine.Run(LongModeMachine.Program, other);
        Assert.Equal((ulong)rounds << 32 | rounds, machine.Read(crossing));
    }

    private static void AddOne(Assembler a, string way)
    {
        Label retry = a.CreateLabel();
        Label done = a.CreateLabel();
        switch (way)
        {
            case "lock inc":
                a.@lock.inc(__qword_ptr[r15]);
                break;
            case "lock add":
                a.@lock.add(__qword_ptr[r15], 1);
                break;
            case "lock xadd":
                a.mov(eax, 1);
                a.@lock.xadd(__qword_ptr[r15], rax);
                break;
            case "cmpxchg loop":
                a.Label(ref retry);
                a.mov(rax, __qword_ptr[r15]);
                a.lea(rbx, __[rax + 1]);
                a.@lock.cmpxchg(__qword_ptr[r15], rbx);
                a.jne(retry);
                break;
            case "xchg lock":
                // A spin lock beside the counter, taken by XCHG without a prefix.
                a.Label(ref retry);
                a.mov(eax, 1);
                a.xchg(__dword_ptr[r15 + 64], eax);
                a.test(eax, eax);
                a.je(done);
                a.pause();
                a.jmp(retry);
                a.Label(ref done);
                a.inc(__qword_ptr[r15]);
                a.mov(__dword_ptr[r15 + 64], 0);
                break;
            case "bts lock":
                a.Label(ref retry);
                a.@lock.bts(__dword_ptr[r15 + 64], 7);
                a.jae(done);
                a.pause();
                a.jmp(retry);
                a.Label(ref done);
                a.add(__qword_ptr[r15], 1);
                a.@lock.btr(__dword_ptr[r15 + 64], 7);
                break;
            case "lock inc byte carry":
                // A byte counts; its overflow is carried by whoever saw it become zero.
                a.@lock.inc(__byte_ptr[r15]);
                a.jne(done);
                a.@lock.add(__qword_ptr[r15], 256);
                a.Label(ref done);
                a.nop();
                break;
            case "cmpxchg16b":
                a.Label(ref retry);
                a.mov(rax, __qword_ptr[r15]);
                a.mov(rdx, __qword_ptr[r15 + 8]);
                a.lea(rbx, __[rax + 1]);
                a.mov(rcx, rdx);
                a.@lock.cmpxchg16b(__xmmword_ptr[r15]);
                a.jne(retry);
                break;
            default:
                // The same page holds code: every write takes the slow path.
                a.Label(ref retry);
                a.mov(rbx, Counter + 0x800);
                a.mov(__byte_ptr[rbx], 0xc3);
                a.call(rbx);
                a.@lock.inc(__qword_ptr[r15]);
                break;
        }
    }
}

public sealed class SharedMemoryInterpretedTests() : SharedMemoryTests(translate: false);

public sealed class SharedMemoryTranslatedTests() : SharedMemoryTests(translate: true);
