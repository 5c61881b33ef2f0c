using System;
using Iced.Intel;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Translation.Engines;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Ways out of translated code and back: what the code itself does not keep (flags, a register at hand, the place to go on) comes from beside it. Both engines must agree.</summary>
public sealed class WayOutTests
{
    private const ulong Function = 0x30_0000;
    private const ulong Source = 0x40_0000;
    private const int Page = 4096;
    private const int Rounds = 300;

    public static TheoryData<string> Setters => ["cmp", "cmp immediate", "cmp dword", "test", "test immediate", "and", "add", "sub", "neg", "inc", "dec", "shl", "sar", "adc", "bt"];

    /// <summary>Two pages that call each other, deeper than the return stack.</summary>
    [Fact]
    public void Recursion_across_pages_comes_back()
    {
        const int depth = 20_000;
        AgreeOn(machine =>
        {
            machine.Assemble(Function, a =>
            {
                Label end = a.CreateLabel();
                a.test(ecx, ecx);
                a.je(end);
                a.push(rcx);
                a.dec(ecx);
                a.call(Function + Page);
                a.pop(rcx);
                a.add(rax, rcx);
                a.Label(ref end);
                a.ret();
            }, exit: false);
            machine.Assemble(Function + Page, a =>
            {
                a.call(Function);
                a.inc(rdx);
                a.ret();
            }, exit: false);
            machine.Assemble(LongModeMachine.Program, a =>
            {
                a.xor(eax, eax);
                a.xor(edx, edx);
                a.mov(ecx, depth);
                a.call(Function);
                a.mov(__qword_ptr[Answer], rax);
                a.mov(__qword_ptr[Answer + 8], rdx);
                a.mov(__qword_ptr[Answer + 16], rsp);
            });
        });
    }

    /// <summary>An access across pages is its handler's: the flags before it and the register that it loads are there afterwards.</summary>
    [Theory]
    [MemberData(nameof(Setters))]
    public void Flags_survive_an_access_across_pages(string setter)
    {
        AgreeOn(machine =>
        {
            for (ulong i = 0; i < 64; i++)
                machine.Write(Source + Page - 32 + i * 8, 0x0123_4567_89ab_cdef * (i + 1));
            machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Begin(a);
                a.Label(ref again);
                // Every second access lies across the page's end, and no two are neighbours.
                a.xor(rsi, 4);
                Set(a, setter);
                a.mov(r10, __qword_ptr[rsi]);
                a.lea(r12, __[r12 + r10]);
                a.pushfq();
                a.pop(rdx);
                a.and(edx, 0x8d5);
                a.lea(r12, __[r12 + rdx * 8]);
                a.rol(r12, 7);
                Next(a, again);
            });
        });
    }

    /// <summary>An operation on memory across pages sets flags that what follows reads from the host's.</summary>
    [Theory]
    [InlineData("add")]
    [InlineData("cmp")]
    [InlineData("adc")]
    [InlineData("imul")]
    [InlineData("dec")]
    public void Flags_come_from_an_access_across_pages(string operation)
    {
        AgreeOn(machine =>
        {
            for (ulong i = 0; i < 64; i++)
                machine.Write(Source + Page - 32 + i * 8, 0x0123_4567_89ab_cdef * (i + 1));
            machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label carry = a.CreateLabel();
                Begin(a);
                a.Label(ref again);
                a.xor(rsi, 4);
                a.cmp(rdi, rcx);
                switch (operation)
                {
                    case "add":
                        a.add(__qword_ptr[rsi], rdi);
                        break;
                    case "cmp":
                        a.cmp(rcx, __qword_ptr[rsi]);
                        break;
                    case "adc":
                        a.adc(__dword_ptr[rsi + 2], ecx);
                        break;
                    case "imul":
                        a.imul(rbp, __qword_ptr[rsi]);
                        break;
                    default:
                        a.dec(__qword_ptr[rsi]);
                        break;
                }
                a.adc(r12, 0);
                a.rol(r12, 7);
                a.jc(carry);
                a.add(r12, 3);
                a.Label(ref carry);
                Next(a, again);
            });
        });
    }

    /// <summary>A branch that is taken leaves its flags to the target, on the same page and on another, also when the target's code is changed now and then.</summary>
    [Theory]
    [MemberData(nameof(Setters))]
    public void Flags_survive_a_taken_branch(string setter)
    {
        AgreeOn(machine =>
        {
            machine.Assemble(Function, a =>
            {
                a.pushfq();
                a.pop(rdx);
                a.and(edx, 0x8d5);
                a.add(r12, rdx);
                a.ret();
            }, exit: false);
            machine.Assemble(LongModeMachine.Program, a =>
            {
                Label again = a.CreateLabel();
                Label near = a.CreateLabel();
                Label patched = a.CreateLabel();
                Label done = a.CreateLabel();
                Label far = a.CreateLabel();
                Label keep = a.CreateLabel();
                Begin(a);
                a.lea(rsi, __[patched]);
                a.Label(ref again);
                Set(a, setter);
                a.jp(near);
                a.lea(r12, __[r12 + 5]);
                Set(a, setter);
                a.Label(ref near);
                a.mov(r13d, 1);
                a.Label(ref patched);
                // 41 BD imm32: the constant changes.
                a.mov(r13d, 0x1234);
                a.pushfq();
                a.pop(rdx);
                a.and(edx, 0x8d5);
                a.add(r12, r13);
                a.rol(r12, 3);
                a.add(r12, rdx);
                a.test(ebx, 31);
                a.jne(keep);
                a.mov(__dword_ptr[rsi + 2], ebx);
                a.Label(ref keep);
                a.call(far);
                Next(a, again);
                a.jmp(done);
                // A conditional branch to another page, whose RET comes back for it.
                a.Label(ref far);
                Set(a, setter);
                a.js(Function);
                a.jno(Function);
                a.ret();
                a.Label(ref done);
            });
        });
    }

    /// <summary>Runs of PUSH and POP with the stack pointer among their operands, at every place around a page's end.</summary>
    [Fact]
    public void Runs_of_pushes_and_pops_move_the_stack_pointer_once()
    {
        AgreeOn(machine => machine.Assemble(LongModeMachine.Program, a =>
        {
            Label places = a.CreateLabel();
            Label again = a.CreateLabel();
            a.mov(r9, rsp);
            a.mov(r8, Source + Page - 64);
            a.xor(r12d, r12d);
            a.Label(ref places);
            a.mov(ebx, 60);
            a.Label(ref again);
            a.mov(rsp, r8);
            a.push(rbx);
            a.push(r8);
            a.push(rsp);
            a.push(r12);
            a.push(0x55);
            a.add(r12, rsp);
            a.push(r14);
            a.push(rbx);
            a.pop(rax);
            a.pop(r14);
            a.pop(rdx);
            a.pop(rcx);
            a.mov(rbp, rsp);
            a.pop(rsp);
            a.add(r12, rsp);
            a.mov(rsp, rbp);
            a.pop(rsi);
            a.pop(rdi);
            a.pop(r10);
            a.add(r12, rax);
            a.add(r12, rdx);
            a.add(r12, rcx);
            a.add(r12, rsi);
            a.sub(r12, rdi);
            a.xor(r12, r10);
            a.add(r12, rsp);
            a.rol(r12, 5);
            a.dec(ebx);
            a.jne(again);
            a.add(r8, 4);
            a.mov(rax, Source + Page + 68);
            a.cmp(r8, rax);
            a.jb(places);
            a.mov(rsp, r9);
            a.mov(__qword_ptr[Answer], r12);
        }));
    }

    private static void Begin(Assembler a)
    {
        a.mov(rsi, Source + Page - 8);
        a.xor(r12d, r12d);
        a.mov(rdi, 0x8000_0000_0000_0003);
        a.mov(rcx, 0x7fff_fff1_0f0f_1234);
        a.mov(ebx, Rounds);
        a.xor(r8d, r8d);
    }

    private static void Next(Assembler a, Label again)
    {
        a.mov(rax, 0x9e37_79b9_7f4a_7c15);
        a.imul(rdi, rax);
        a.ror(rcx, 11);
        a.add(rcx, rbx);
        a.dec(ebx);
        a.jne(again);
        a.mov(__qword_ptr[Answer], r12);
        a.mov(__qword_ptr[Answer + 8], r10);
    }

    /// <summary>Sets flags from RDI and RCX, which change from round to round; what it writes is RBP, which nothing reads before the flags.</summary>
    private static void Set(Assembler a, string setter)
    {
        a.mov(rbp, rdi);
        switch (setter)
        {
            case "cmp":
                a.cmp(rbp, rcx);
                break;
            case "cmp immediate":
                a.cmp(rbp, -77);
                break;
            case "cmp dword":
                a.cmp(edi, ecx);
                break;
            case "test":
                a.test(rcx, rbp);
                break;
            case "test immediate":
                a.test(edi, 0x1248);
                break;
            case "and":
                a.and(rbp, rcx);
                break;
            case "add":
                a.add(rbp, rcx);
                break;
            case "sub":
                a.sub(ebp, ecx);
                break;
            case "neg":
                a.neg(rbp);
                break;
            case "inc":
                a.cmp(rbp, rcx);
                a.inc(rbp);
                break;
            case "dec":
                a.add(ecx, ecx);
                a.dec(ebp);
                break;
            case "shl":
                a.shl(rbp, 3);
                break;
            case "sar":
                a.sar(ebp, cl);
                break;
            case "adc":
                a.cmp(rbp, rcx);
                a.adc(rbp, rcx);
                break;
            case "bt":
                a.cmp(rbp, rcx);
                a.bt(rcx, 5);
                break;
            default:
                throw new ArgumentException("not a setter", nameof(setter));
        }
    }
}
