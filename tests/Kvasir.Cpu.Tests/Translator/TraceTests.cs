using Iced.Intel;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Translation.Engines;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Translations that follow taken branches into further blocks: their addresses, faults and changes of code are those blocks'.</summary>
public sealed class TraceTests
{
    private const ulong Source = 0x40_0000;
    private const int Page = 4096;
    private const ulong Handler = 0x31_0000;
    private const ulong Function = 0x30_0000;
    private const int Rounds = 2000;

    /// <summary>A branch that is taken seven times of eight, jumps, RIP-relative data, and neighbouring accesses across pages, and a call that looks at its return address, all in one trace.</summary>
    [Fact]
    public void Addresses_are_those_of_the_block_that_follows()
    {
        AgreeOn(machine =>
        {
            machine.Assemble(Function, a =>
            {
                a.add(r12, __qword_ptr[rsp]);
                a.ret();
            }, exit: false);
            machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label often = a.CreateLabel();
                Label over = a.CreateLabel();
                Label constant = a.CreateLabel();
                Label second = a.CreateLabel();
                Label calls = a.CreateLabel();
                Label start = a.CreateLabel();
                // Away from the page's start, before which there is another page.
                a.jmp(start);
                for (int i = 0; i < 64; i++)
                    a.dq(0);
                a.Label(ref start);
                a.mov(r9, Source + Page - 8);
                a.xor(r12d, r12d);
                a.mov(ebx, Rounds);
                a.Label(ref again);
                a.add(r12, __qword_ptr[constant]);
                a.test(ebx, 7);
                a.jne(often);
                a.rol(r12, 3);
                a.xor(r12, rbx);
                a.Label(ref often);
                a.adc(r12, 1);
                a.jmp(over);
                a.Label(ref constant);
                a.dq(0x1234_5678_9abc_def1);
                a.Label(ref second);
                a.dq(0x1111_2222_3333_4444);
                a.Label(ref over);
                a.add(r12, __qword_ptr[constant]);
                a.xor(r12, __qword_ptr[second]);
                a.lea(rdx, __[over]);
                a.add(r12, rdx);
                a.mov(__qword_ptr[r9], r12);
                a.add(r12, __qword_ptr[r9 + 4]);
                a.jmp(calls);
                a.ud2();
                a.Label(ref calls);
                a.call(Function);
                a.rol(r12, 1);
                a.dec(ebx);
                a.jne(again);
                a.mov(__qword_ptr[Answer], r12);
            });
        }, translator => Assert.True(translator.BlocksJoined > 0));
    }

    /// <summary>A division by zero in the second and in the third block of a trace: the handler finds its address, and the registers and flags before it.</summary>
    [Fact]
    public void Faults_are_those_of_the_block_that_follows()
    {
        AgreeOn(machine =>
        {
            machine.Gate(0, Handler);
            machine.Assemble(Handler, a =>
            {
                // DIV r32 with a REX prefix has three bytes.
                a.add(r12, __qword_ptr[rsp]);
                a.add(r12, rax);
                a.add(r12, __qword_ptr[rsp + 16]);
                a.rol(r12, 9);
                a.add(__qword_ptr[rsp], 3);
                a.iretq();
            }, exit: false);
            machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label second = a.CreateLabel();
                Label third = a.CreateLabel();
                a.xor(r12d, r12d);
                a.mov(ebx, Rounds);
                a.Label(ref again);
                a.mov(eax, ebx);
                a.xor(edx, edx);
                a.mov(r8d, ebx);
                a.and(r8d, 15);
                a.cmp(ebx, 77);
                a.jne(second);
                a.inc(r12);
                a.Label(ref second);
                a.sub(rax, 3);
                a.div(r8d);
                a.add(r12, rax);
                a.xor(edx, edx);
                a.jmp(third);
                a.int3();
                a.Label(ref third);
                a.mov(r9d, ebx);
                a.shr(r9d, 1);
                a.and(r9d, 31);
                a.div(r9d);
                a.add(r12, rax);
                a.dec(ebx);
                a.jne(again);
                a.mov(__qword_ptr[Answer], r12);
            });
        }, translator => Assert.True(translator.BlocksJoined > 0));
    }

    /// <summary>The second block of a trace, and data between the two, are written to while the trace is hot.</summary>
    [Theory]
    [InlineData(1)]
    [InlineData(256)]
    public void Changes_of_the_block_that_follows_are_seen_at_once(int every)
    {
        AgreeOn(
            machine => machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label second = a.CreateLabel();
                Label data = a.CreateLabel();
                Label keep = a.CreateLabel();
                a.xor(r12d, r12d);
                a.mov(ebx, Rounds);
                a.lea(rsi, __[second]);
                a.lea(rdi, __[data]);
                a.Label(ref again);
                a.add(r12, 3);
                a.jmp(second);
                a.Label(ref data);
                a.dq(0);
                a.Label(ref second);
                // 41 BD imm32: the constant changes.
                a.mov(r13d, 0x1234);
                a.add(r12, r13);
                a.rol(r12, 3);
                a.add(r12, __qword_ptr[rdi]);
                a.test(ebx, every - 1);
                a.jne(keep);
                a.mov(__dword_ptr[rsi + 2], ebx);
                a.add(__qword_ptr[rdi], rbx);
                a.Label(ref keep);
                a.dec(ebx);
                a.jne(again);
                a.mov(__qword_ptr[Answer], r12);
            }),
            translator => Assert.True(every == 1 || translator.BlocksJoined > 0));
    }

    /// <summary>A branch that changes its mind once the trace is made.</summary>
    [Fact]
    public void A_branch_that_is_not_taken_any_more_leaves_the_trace()
    {
        AgreeOn(
            machine => machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label second = a.CreateLabel();
                Label join = a.CreateLabel();
                a.xor(r12d, r12d);
                a.mov(ebx, Rounds);
                a.Label(ref again);
                a.lea(rax, __[rbx + rbx * 2]);
                a.cmp(ebx, Rounds / 2);
                a.ja(second);
                a.adc(r12, 7);
                a.rol(r12, 5);
                a.jmp(join);
                a.nop();
                a.Label(ref second);
                a.sbb(r12, rax);
                a.rol(r12, 2);
                a.Label(ref join);
                a.dec(ebx);
                a.jne(again);
                a.mov(__qword_ptr[Answer], r12);
            }),
            translator => Assert.True(translator.BlocksJoined > 0));
    }
}
