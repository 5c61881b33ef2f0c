using System;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>Loops of one block, which are translated several rounds at a time: ends after any number of rounds, accesses across pages, faults in any round.</summary>
public sealed class LoopTests
{
    private const ulong Source = 0x40_0000;
    private const ulong Target = 0x60_0000;
    private const ulong Answer = LongModeMachine.Data;
    private const ulong Handler = 0x11_0000;
    private const int PageFault = 14;
    private const int Page = 4096;
    private const int Span = 3 * Page;

    /// <summary>Copies and sums of 1 to 11 elements at every place around a page's end, for strides of 1, 2, 4 and 8 bytes, up and down.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void Copies_of_any_length_cross_pages(bool translate)
    {
        using LongModeMachine machine = new(translate: translate);
        byte[] bytes = new byte[Span];
        new Random(1).NextBytes(bytes);
        machine.Memory.TryWrite(new Gpa(Source), bytes);
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label places = a.CreateLabel();
            Label lengths = a.CreateLabel();
            a.mov(r8, Source + Page - 40);
            a.mov(r9, Target + Page - 37);
            a.xor(r13d, r13d);
            a.Label(ref places);
            a.mov(r12d, 1);
            a.Label(ref lengths);
            Copy(a, up: true, 1);
            Copy(a, up: true, 2);
            Copy(a, up: true, 4);
            Copy(a, up: true, 8);
            Copy(a, up: false, 8);
            a.inc(r12d);
            a.cmp(r12d, 12);
            a.jne(lengths);
            a.inc(r8);
            a.inc(r9);
            a.mov(r10, Source + Page + 8);
            a.cmp(r8, r10);
            a.jne(places);
            a.mov(__qword_ptr[Answer], r13);
        });
        machine.Run(LongModeMachine.Program);

        byte[] expected = new byte[Span];
        ulong sum = 0;
        for (int place = Page - 40; place < Page + 8; place++)
        {
            for (int length = 1; length < 12; length++)
            {
                foreach (int size in (ReadOnlySpan<int>)[1, 2, 4, 8, 8])
                {
                    for (int i = 0; i < length; i++)
                    {
                        ReadOnlySpan<byte> element = bytes.AsSpan(place + i * size, size);
                        element.CopyTo(expected.AsSpan(place + 3 + i * size));
                        ulong value = 0;
                        for (int k = 0; k < size; k++)
                            value |= (ulong)element[k] << k * 8;
                        sum += value;
                    }
                }
            }
        }
        byte[] got = new byte[Span];
        Assert.True(machine.Memory.TryRead(new Gpa(Target), got));
        Assert.Equal(sum, machine.Read(Answer));
        Assert.True(expected.AsSpan().SequenceEqual(got));
    }

    /// <summary>R12 elements from [R8] to [R9], added up in R13.</summary>
    private static void Copy(Assembler a, bool up, int size)
    {
        Label again = a.CreateLabel();
        Label end = a.CreateLabel();
        if (up)
            a.xor(ecx, ecx);
        else
            a.lea(rcx, __[r12 - 1]);
        a.nop();
        a.Label(ref again);
        switch (size)
        {
            case 1:
                a.movzx(eax, __byte_ptr[r8 + rcx]);
                a.mov(__byte_ptr[r9 + rcx], al);
                break;
            case 2:
                a.movzx(eax, __word_ptr[r8 + rcx * 2]);
                a.mov(__word_ptr[r9 + rcx * 2], ax);
                break;
            case 4:
                a.mov(eax, __dword_ptr[r8 + rcx * 4]);
                a.mov(__dword_ptr[r9 + rcx * 4], eax);
                break;
            default:
                a.mov(rax, __qword_ptr[r8 + rcx * 8]);
                a.mov(__qword_ptr[r9 + rcx * 8], rax);
                break;
        }
        a.add(r13, rax);
        if (up)
        {
            a.inc(rcx);
            a.cmp(rcx, r12);
            a.jne(again);
        }
        else
        {
            a.dec(rcx);
            a.jns(again);
        }
        // The block ends here: only so much of it is translated that rounds would not fit beside a long rest.
        a.jmp(end);
        a.Label(ref end);
        a.nop();
    }

    /// <summary>A loop that reads up to a page that is not there, from each of eight distances: the fault tells the address, and finds registers and flags of that round.</summary>
    [Theory]
    [InlineData(false)]
    [InlineData(true)]
    public void A_fault_finds_the_state_of_its_round(bool translate)
    {
        const ulong missing = Source + Page;
        using LongModeMachine machine = new(translate: translate);
        machine.Memory.TryWrite(new Gpa(LongModeMachine.PageEntry(missing)), 0ul);
        machine.Gate(PageFault, Handler);
        // [RDI]: RCX, RSI, CR2, RFLAGS at the fault; the return goes to R11.
        machine.Assemble(Handler, a =>
        {
            a.mov(__qword_ptr[rdi], rcx);
            a.mov(__qword_ptr[rdi + 8], rsi);
            a.mov(rax, cr2);
            a.mov(__qword_ptr[rdi + 16], rax);
            a.mov(rax, __qword_ptr[rsp + 24]);
            a.mov(__qword_ptr[rdi + 24], rax);
            a.add(rdi, 32);
            a.add(rsp, 8);
            a.mov(__qword_ptr[rsp], r11);
            a.iretq();
        }, exit: false);
        const int starts = 64;
        machine.Assemble(LongModeMachine.Program, a =>
        {
            Label next = a.CreateLabel();
            Label again = a.CreateLabel();
            Label after = a.CreateLabel();
            a.mov(rdi, Answer);
            a.mov(r12d, starts);
            a.lea(r11, __[after]);
            a.Label(ref next);
            a.mov(rsi, missing);
            a.sub(rsi, r12);
            a.xor(ecx, ecx);
            a.Label(ref again);
            a.mov(edx, __dword_ptr[rsi]);
            a.add(rsi, 1);
            a.sub(rcx, 1);
            a.cmp(rcx, -1000);
            a.jne(again);
            a.jmp(after);
            a.Label(ref after);
            a.dec(r12d);
            a.jne(next);
        });
        machine.Run(LongModeMachine.Program);
        for (int start = starts; start > 0; start--)
        {
            ulong record = Answer + (ulong)(starts - start) * 32;
            int rounds = Math.Max(start - 3, 0);
            Assert.Equal((ulong)-rounds, machine.Read(record));
            Assert.Equal(missing - (ulong)start + (ulong)rounds, machine.Read(record + 8));
            Assert.Equal(missing, machine.Read(record + 16));
            // CMP of a small negative number with -1000 before, or the XOR.
            ulong flags = machine.Read(record + 24) & 0x8d5;
            Assert.Equal(rounds == 0 ? 0x44u : FlagsOfCompare(-rounds, -1000), flags);
        }
    }

    /// <summary>CF, PF, AF, ZF, SF and OF of a comparison (Intel SDM vol. 1, "EFLAGS Register").</summary>
    private static ulong FlagsOfCompare(long a, long b)
    {
        long result = a - b;
        ulong flags = (ulong)a < (ulong)b ? 1u : 0;
        flags |= (System.Numerics.BitOperations.PopCount((byte)result) & 1) == 0 ? 4u : 0;
        flags |= (ulong)(a ^ b ^ result) & 0x10;
        flags |= result == 0 ? 0x40u : 0;
        flags |= result < 0 ? 0x80u : 0;
        flags |= ((a ^ b) & (a ^ result)) < 0 ? 0x800u : 0;
        return flags;
    }
}
