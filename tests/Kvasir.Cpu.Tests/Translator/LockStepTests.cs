using System;
using System.Reflection;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Interpreter;
using Kvasir.Linux;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Both engines on each block of a program, which must come out as it does on one.</summary>
public sealed class LockStepTests
{
    private const ulong Table = LongModeMachine.Data;
    private const ulong Answer = LongModeMachine.Data + 0x8000;
    private const ulong Function = 0x30_0000;
    private const int Rounds = 3000;

    [Fact]
    public void A_program_runs_as_it_does_on_one_engine()
    {
        ulong[] answers = new ulong[3];
        for (int engine = 0; engine < answers.Length; engine++)
        {
            using LongModeMachine machine = new(translate: engine == 1, lockStep: engine == 2);
            Build(machine);
            machine.Run(LongModeMachine.Program);
            answers[engine] = machine.Read(Answer);
            if (engine != 2)
                continue;
            LockStep check = machine.Code.Translator!.LockStep!;
            Assert.True(check.Compared > Rounds, check.Report());
            Assert.Equal(0ul, check.Races);
        }
        Assert.NotEqual(0ul, answers[0]);
        Assert.Equal(answers[0], answers[1]);
        Assert.Equal(answers[0], answers[2]);
    }

    /// <summary>A block that writes to a page with code is executed once.</summary>
    [Fact]
    public void Code_that_changes_itself_is_not_changed_twice()
    {
        using LongModeMachine machine = new(lockStep: true);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            Label patched = a.CreateLabel();
            a.lea(rsi, __[patched]);
            a.xor(ebx, ebx);
            a.mov(ecx, 200);
            a.Label(ref again);
            a.add(__dword_ptr[rsi + 1], 3);
            a.Label(ref patched);
            // B8 imm32.
            a.mov(eax, 0);
            a.add(rbx, rax);
            a.dec(ecx);
            a.jne(again);
            a.mov(__qword_ptr[Answer], rbx);
        });
        machine.Run(LongModeMachine.Program);
        Assert.Equal(3ul * 200 * 201 / 2, machine.Read(Answer));
    }

    /// <summary>A translation with a wrong constant: the report names the register and shows both codes.</summary>
    [Fact]
    public void A_wrong_translation_is_found()
    {
        using LongModeMachine machine = new(lockStep: true);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            Label end = a.CreateLabel();
            a.mov(ecx, Rounds);
            a.Label(ref again);
            a.mov(ebx, 0x1122_3344);
            a.dec(ecx);
            a.jne(again);
            // What ends the program is a handler's: a block of its own.
            a.jmp(end);
            a.Label(ref end);
        });
        Translator translator = machine.Code.Translator!;
        ExecutableMemory memory = (ExecutableMemory)typeof(Translator).GetField("_memory", BindingFlags.Instance | BindingFlags.NonPublic)!.GetValue(translator)!;
        translator.Listener = (place, code) =>
        {
            int constant = code.IndexOf((ReadOnlySpan<byte>)[0x44, 0x33, 0x22, 0x11]);
            if (constant >= 0)
                memory.Write(place + (ulong)constant, [0x45]);
        };
        machine.Place(0, LongModeMachine.Program);
        InvalidOperationException found = Assert.Throws<InvalidOperationException>(() => machine.Vcpus[0].Run());
        Assert.Contains("differ: register 3", found.Message, StringComparison.Ordinal);
        Assert.Contains("interpreter 0000000011223344, translation 0000000011223345 <", found.Message, StringComparison.Ordinal);
        Assert.Contains("mov ebx,11223345h", found.Message, StringComparison.Ordinal);
    }

    private static void Build(LongModeMachine machine)
    {
        machine.Assemble(Function, a =>
        {
            a.push(rbx);
            a.imul(rax, rcx);
            a.mov(rbx, rax);
            a.shr(rbx, 29);
            a.xor(rax, rbx);
            a.pop(rbx);
            a.ret();
        }, exit: false);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label again = a.CreateLabel();
            Label sum = a.CreateLabel();
            Label odd = a.CreateLabel();
            a.mov(r14, 0x9e37_79b9_7f4a_7c15);
            a.mov(r15d, Rounds);
            a.mov(eax, 1);
            a.Label(ref again);
            a.mov(rcx, r14);
            a.call(Function);
            a.mov(edi, eax);
            a.and(edi, 0xff);
            a.add(__dword_ptr[rdi * 8 + (int)Table], edi);
            a.adc(__dword_ptr[rdi * 8 + (int)Table + 4], 0);
            a.test(al, 1);
            a.jne(odd);
            a.@lock.xadd(__qword_ptr[Table + 0x1000], rax);
            a.ror(rax, 7);
            a.Label(ref odd);
            a.movq(xmm0, rax);
            a.paddq(xmm1, xmm0);
            a.dec(r15d);
            a.jne(again);
            a.movq(rax, xmm1);
            a.xor(ecx, ecx);
            a.Label(ref sum);
            a.add(rax, __qword_ptr[rcx + (int)Table]);
            a.add(rcx, 8);
            a.cmp(rcx, 0x1008);
            a.jne(sum);
            a.mov(__qword_ptr[Answer], rax);
        });
    }
}
