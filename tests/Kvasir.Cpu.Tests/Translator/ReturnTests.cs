using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Calls and returns that do not pair, which the return stack must see through; everything runs on both engines.</summary>
public sealed class ReturnTests
{
    private const ulong Function = 0x30_0000;
    private const ulong Answer = LongModeMachine.Data;
    private const int Rounds = 200;

    /// <summary>Deeper than the return stack: it is emptied on the way, and the way back finds its targets all the same.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Recursion_deeper_than_the_return_stack_comes_back(bool translate)
    {
        const int depth = 20_000;
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(Function, a =>
        {
            Label end = a.CreateLabel();
            Label self = a.CreateLabel();
            a.Label(ref self);
            a.test(ecx, ecx);
            a.je(end);
            a.push(rcx);
            a.dec(ecx);
            a.call(self);
            a.pop(rcx);
            a.add(rax, rcx);
            a.Label(ref end);
            a.ret();
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(ebx, 3);
            a.Label(ref again);
            a.xor(eax, eax);
            a.mov(ecx, depth);
            a.call(Function);
            a.dec(ebx);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal((ulong)depth * (depth + 1) / 2, machine.Read(Answer));
    }

    /// <summary>A call that only reads its own address, a retpoline, a stack pointer that drops several frames at once, and RET n.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Calls_without_a_return_and_returns_without_a_call(bool translate)
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(Function, a =>
        {
            // Deep: goes back to the caller's caller, as longjmp does.
            Label middle = a.CreateLabel();
            Label inner = a.CreateLabel();
            a.call(middle);
            a.ud2();
            a.Label(ref middle);
            a.call(inner);
            a.ud2();
            a.Label(ref inner);
            a.add(rax, 100);
            a.add(rsp, 16);
            a.ret();
        }, exit: false);
        machine.Assemble(Function + 0x1000, a =>
        {
            a.add(rax, __qword_ptr[rsp + 8]);
            a.ret(16);
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            Label here = a.CreateLabel();
            Label thunk = a.CreateLabel();
            Label capture = a.CreateLabel();
            Label target = a.CreateLabel();
            Label start = a.CreateLabel();
            a.jmp(start);

            // A retpoline of RDX.
            a.Label(ref thunk);
            a.call(capture);
            a.pause();
            a.ud2();
            a.Label(ref capture);
            a.mov(__qword_ptr[rsp], rdx);
            a.ret();

            a.Label(ref target);
            a.add(rax, 7);
            a.ret();

            a.Label(ref start);
            a.xor(eax, eax);
            a.mov(ebx, Rounds);
            a.lea(rdx, __[target]);
            a.Label(ref again);
            a.call(here);
            a.Label(ref here);
            a.pop(rcx);
            a.call(Function);
            a.call(thunk);
            a.push(1000);
            a.push(1);
            a.call(Function + 0x1000);
            a.dec(ebx);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rax);
            a.mov(__qword_ptr[Answer + 8], rsp);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal((ulong)Rounds * (100 + 7 + 1), machine.Read(Answer));
        Assert.Equal(0xf0_0000ul, machine.Read(Answer + 8));
    }

    /// <summary>A function puts another page under its caller: the return comes to what lies there now.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_return_into_a_page_that_was_exchanged_finds_the_new_code(bool translate)
    {
        const ulong caller = 0x40_0000;
        const ulong other = 0x50_0000;
        using LongModeMachine machine = new(translate: translate);
        void Caller(ulong at, int value) => machine.Assemble(at, a =>
        {
            a.call(rbp);
            a.add(rax, value);
            a.ret();
        }, exit: false);
        Caller(caller, 1);
        Caller(other, 1000);
        machine.Assemble(Function, a =>
        {
            // Exchanges the page of the caller, one to one at first, with the other's.
            a.mov(rdi, LongModeMachine.PageEntry(caller));
            a.xor(__qword_ptr[rdi], (int)(caller ^ other));
            a.mov(rsi, caller);
            a.invlpg(__byte_ptr[rsi]);
            a.ret();
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.xor(eax, eax);
            a.mov(ebp, (int)Function);
            a.mov(r12, caller);
            a.mov(ebx, Rounds);
            a.Label(ref again);
            a.call(r12);
            a.dec(ebx);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal((ulong)Rounds / 2 * 1001, machine.Read(Answer));
    }

    /// <summary>A function changes the code behind its call.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_return_to_code_that_was_changed_finds_the_new_code(bool translate)
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(Function, a =>
        {
            // The immediate of the ADD behind the call.
            a.mov(rdx, __qword_ptr[rsp]);
            a.mov(__dword_ptr[rdx + 2], ebx);
            a.ret();
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.xor(eax, eax);
            a.mov(ebx, Rounds);
            a.Label(ref again);
            a.call(Function);
            // 48 05 imm32.
            a.add(rax, 0x1234_5678);
            a.dec(ebx);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal((ulong)Rounds * (Rounds + 1) / 2, machine.Read(Answer));
    }

    /// <summary>The page of the stack is exchanged: what is pushed afterwards lies in the new one, and a page that may not be written any more faults.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void The_stack_follows_the_page_tables(bool translate)
    {
        const ulong stack = 0x60_0000;
        const ulong other = 0x70_0000;
        const ulong handler = 0x11_0000;
        using LongModeMachine machine = new(translate: translate);
        machine.Gate(14, handler);
        // On the stack below the page: makes the page writable again and counts.
        machine.Assemble(handler, a =>
        {
            a.add(rsp, 8);
            a.or(__qword_ptr[rdi], 2);
            a.inc(r13d);
            a.invlpg(__byte_ptr[rsi]);
            a.iretq();
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(r14, rsp);
            a.xor(r13d, r13d);
            a.mov(rdi, LongModeMachine.PageEntry(stack));
            a.mov(rsi, stack);
            a.mov(ebx, Rounds);
            a.Label(ref again);
            a.mov(rbp, stack + 0x800);
            a.mov(rsp, rbp);
            a.push(rbx);
            a.xor(__qword_ptr[rdi], (int)(stack ^ other));
            a.invlpg(__byte_ptr[rsi]);
            a.push(rbx);
            a.add(__qword_ptr[rsp + 8], 1);
            a.mov(rsp, r14);
            a.dec(ebx);
            a.jne(again);
            // Without the right to write: a store by RSP faults each time, a load does not.
            a.mov(ebx, Rounds);
            Label store = a.CreateLabel();
            a.Label(ref store);
            a.lea(rcx, __[rbp - 0x400]);
            a.xchg(rsp, rcx);
            a.mov(rax, __qword_ptr[rsp]);
            a.xchg(rsp, rcx);
            a.and(__qword_ptr[rdi], ~2);
            a.invlpg(__byte_ptr[rsi]);
            a.mov(rax, __qword_ptr[rcx]);
            a.mov(__qword_ptr[rcx], rbx);
            a.dec(ebx);
            a.jne(store);
            a.mov(__qword_ptr[Answer], r13);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal((ulong)Rounds, machine.Read(Answer));
        // Pushed before the exchange (rounds by turns), after it, and what the additions left.
        Assert.Equal(1ul, machine.Read(stack + 0x7f0));
        Assert.Equal(2ul, machine.Read(other + 0x7f0));
        Assert.Equal(1ul + 2, machine.Read(stack + 0x7f8));
    }
}
