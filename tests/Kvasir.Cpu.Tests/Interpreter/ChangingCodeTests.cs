using System;
using System.Threading;
using System.Threading.Tasks;
using Iced.Intel;
using Kvasir.Core;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Interpreter;

/// <summary>Code that changes under the processor: by itself, by another one, by a device, by a new mapping, and a code cache that fills up.</summary>
public abstract class ChangingCodeTests(bool translate)
{
    private const ulong Function = 0x30_0000;
    private const ulong Flag = LongModeMachine.Data;
    private const ulong Answer = LongModeMachine.Data + 64;

    [Fact]
    public void An_instruction_sees_a_change_made_by_the_one_before_it()
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label patched = a.CreateLabel();
            Label again = a.CreateLabel();
            a.xor(ecx, ecx);
            a.xor(ebx, ebx);
            a.lea(rsi, __[patched]);
            a.Label(ref again);
            a.mov(__dword_ptr[rsi + 1], ecx);
            a.Label(ref patched);
            // B8 imm32: the immediate is what the store above has just written.
            a.mov(eax, 0x1234_5678);
            a.add(rbx, rax);
            a.inc(ecx);
            a.cmp(ecx, 1000);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rbx);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal(999ul * 1000 / 2, machine.Read(Answer));
        Assert.True(machine.Code.BlocksInvalidated >= 1000);
    }

    [Fact]
    public void A_string_move_into_code_is_seen()
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(Function, a => a.mov(eax, 1), exit: false);
        machine.Memory.TryWrite(new Gpa(Function + 5), (byte)0xc3);
        machine.Memory.TryWrite(new Gpa(LongModeMachine.Data + 0x1000), [0xb8, 2, 0, 0, 0, 0xc3]);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            a.mov(rbp, Function);
            a.call(rbp);
            a.mov(ebx, eax);
            a.mov(rsi, LongModeMachine.Data + 0x1000);
            a.mov(rdi, Function);
            a.mov(ecx, 6);
            a.rep.movsb();
            a.call(rbp);
            a.shl(rax, 32);
            a.or(rax, rbx);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal(2ul << 32 | 1, machine.Read(Answer));
    }

    [Fact]
    public async Task A_device_that_writes_code_is_seen()
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Assemble(Function, a => a.mov(eax, 1), exit: false);
        machine.Memory.TryWrite(new Gpa(Function + 5), (byte)0xc3);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            a.mov(rbp, Function);
            a.Label(ref again);
            a.call(rbp);
            a.mov(__qword_ptr[Flag], 1);
            a.cmp(eax, 2);
            a.jne(again);
        });
        Task run = Task.Run(() => machine.Run(LongModeMachine.Program), TestContext.Current.CancellationToken);
        while (machine.Read(Flag) == 0 && !run.IsCompleted)
            await Task.Delay(1, TestContext.Current.CancellationToken);
        machine.Memory.TryWrite(new Gpa(Function + 1), (byte)2);
        await run;
    }

    /// <summary>The protocol of the SDM ("Handling Self- and Cross-Modifying Code"): the other processor serialises before it executes the new code.</summary>
    [Fact]
    public void Another_processor_sees_changed_code_after_it_serialises()
    {
        const int rounds = 2000;
        using LongModeMachine machine = new(cpus: 2, translate: translate);
        machine.Assemble(Function, a => a.mov(eax, 0), exit: false);
        machine.Memory.TryWrite(new Gpa(Function + 5), (byte)0xc3);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            // The writer: changes the immediate, then says which round it is, then waits for the reader.
            Label again = a.CreateLabel();
            Label wait = a.CreateLabel();
            a.mov(rsi, Function + 1);
            a.mov(ecx, 1);
            a.Label(ref again);
            a.mov(__dword_ptr[rsi], ecx);
            a.mov(__dword_ptr[Flag], ecx);
            a.Label(ref wait);
            a.pause();
            a.cmp(__dword_ptr[Flag + 8], ecx);
            a.jne(wait);
            a.inc(ecx);
            a.cmp(ecx, rounds);
            a.jbe(again);
        });
        const ulong reader = LongModeMachine.Program + 0x4000;
        machine.Assemble(reader, a =>
        {
            Label again = a.CreateLabel();
            Label wait = a.CreateLabel();
            Label good = a.CreateLabel();
            a.mov(rbp, Function);
            a.mov(esi, 1);
            a.Label(ref again);
            a.nop();
            a.Label(ref wait);
            a.pause();
            a.cmp(__dword_ptr[Flag], esi);
            a.jne(wait);
            a.xor(eax, eax);
            a.cpuid();
            a.call(rbp);
            a.cmp(eax, esi);
            a.je(good);
            a.inc(__dword_ptr[Answer]);
            a.Label(ref good);
            a.mov(__dword_ptr[Flag + 8], esi);
            a.inc(esi);
            a.cmp(esi, rounds);
            a.jbe(again);
        });
        machine.Run(LongModeMachine.Program, reader);
        Assert.Equal(0ul, machine.Read(Answer));
    }

    [Fact]
    public void An_instruction_across_pages_follows_the_second_page()
    {
        using LongModeMachine machine = new(translate: translate);
        // mov eax, imm32 with its last two bytes in the next page; that page is then mapped to another frame.
        const ulong at = Function + 0x1000 - 3;
        machine.Memory.TryWrite(new Gpa(at), [0xb8, 0x11, 0x11, 0x22, 0x22, 0xc3]);
        machine.Memory.TryWrite(new Gpa(Function + 0x8000), [0x33, 0x33, 0xc3]);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            a.mov(rbp, at);
            a.call(rbp);
            a.mov(ebx, eax);
            a.mov(rdi, LongModeMachine.PageEntry(Function + 0x1000));
            a.mov(rsi, (Function + 0x8000) | 7);
            a.mov(__[rdi], rsi);
            a.mov(rsi, Function + 0x1000);
            a.invlpg(__[rsi]);
            a.call(rbp);
            a.shl(rax, 32);
            a.or(rax, rbx);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal(0x3333_1111_2222_1111ul, machine.Read(Answer));
    }

    [Fact]
    public void Code_at_an_address_follows_a_new_mapping()
    {
        using LongModeMachine machine = new(translate: translate);
        machine.Memory.TryWrite(new Gpa(Function), [0xb8, 1, 0, 0, 0, 0xc3]);
        machine.Memory.TryWrite(new Gpa(Function + 0x8000), [0xb8, 2, 0, 0, 0, 0xc3]);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            a.mov(rbp, Function);
            a.call(rbp);
            a.mov(ebx, eax);
            a.mov(rdi, LongModeMachine.PageEntry(Function));
            a.mov(rsi, (Function + 0x8000) | 7);
            a.mov(__[rdi], rsi);
            a.invlpg(__[rbp]);
            a.call(rbp);
            a.shl(rax, 32);
            a.or(rax, rbx);
            a.mov(__qword_ptr[Answer], rax);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal(2ul << 32 | 1, machine.Read(Answer));
    }

    /// <summary>Far more code than the cache holds, on several vCPUs at once: it is emptied again and again, and every sum is right.</summary>
    [Fact]
    public void A_full_code_cache_is_emptied_with_all_processors_running()
    {
        const int functions = 600;
        const int perFunction = 40;
        const int loops = 6;
        using LongModeMachine machine = new(cpus: 3, codeCapacity: 256 << 10, translate: translate);
        for (int f = 0; f < functions; f++)
        {
            machine.Assemble(Function + (ulong)f * 256, a =>
            {
                for (int i = 0; i < perFunction; i++)
                    a.add(rbx, 1);
                a.ret();
            }, exit: false);
        }
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label outer = a.CreateLabel();
            Label inner = a.CreateLabel();
            a.xor(ebx, ebx);
            a.mov(r12d, loops);
            a.Label(ref outer);
            a.mov(rbp, Function);
            a.mov(r13d, functions);
            a.Label(ref inner);
            a.call(rbp);
            a.add(rbp, 256);
            a.dec(r13d);
            a.jne(inner);
            a.dec(r12d);
            a.jne(outer);
            a.mov(__qword_ptr[rdi * 8 + (int)Answer], rbx);
        });
        machine.Run(LongModeMachine.Program, LongModeMachine.Program, LongModeMachine.Program);
        Assert.True(machine.Code.Epoch > 3);
        for (ulong i = 0; i < 3; i++)
            Assert.Equal((ulong)(functions * perFunction * loops), machine.Read(Answer + i * 8));
    }
}

public sealed class ChangingCodeInterpretedTests() : ChangingCodeTests(translate: false);

public sealed class ChangingCodeTranslatedTests() : ChangingCodeTests(translate: true);
