using System;
using System.Collections.Generic;
using System.IO;
using System.Runtime.CompilerServices;
using System.Text;
using Iced.Intel;
using Kvasir.Cpu.Tests.Interpreter;
using Xunit;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Translation;

/// <summary>
/// The host code of a few blocks, kept in Listings.txt so that a change in what the translator emits is seen in review. KVASIR_UPDATE_LISTINGS=1 writes the file anew.
/// </summary>
public sealed class ListingTests
{
    private static readonly (string Name, Action<Assembler> Build)[] Blocks =
    [
        ("moves and arithmetic", a =>
        {
            a.mov(rax, rbx);
            a.add(rax, 8);
            a.lea(r10, __[rax + rcx * 4 + 16]);
            a.imul(rdx, r10);
        }),
        ("a load and a store", a =>
        {
            a.mov(eax, __dword_ptr[rsi + 4]);
            a.mov(__qword_ptr[rdi + rcx * 8], rax);
        }),
        ("a group of fields", a =>
        {
            a.mov(rax, __qword_ptr[rsi]);
            a.mov(rcx, __qword_ptr[rsi + 8]);
            a.add(__qword_ptr[rsi + 16], rax);
            a.adc(__qword_ptr[rsi + 24], rcx);
        }),
        ("a frame", a =>
        {
            a.push(rbp);
            a.mov(rbp, rsp);
            a.push(rbx);
            a.sub(rsp, 24);
            a.mov(__dword_ptr[rbp - 20], edi);
            a.add(rsp, 24);
            a.pop(rbx);
            a.pop(rbp);
            a.ret();
        }),
        ("compare and branch", a =>
        {
            Label end = a.CreateLabel();
            a.cmp(rdi, 100);
            a.jae(end);
            a.inc(rdi);
            a.Label(ref end);
            a.setb(al);
        }),
        ("carry chain", a =>
        {
            a.mulx(r11, r10, __qword_ptr[rsi]);
            a.adcx(r8, r10);
            a.adox(r9, r11);
            a.adc(rax, __qword_ptr[rsi + 8]);
        }),
        ("a call", a => a.call(LongModeMachine.Program + 0x200)),
        ("scalar floating point", a =>
        {
            a.movsd(xmm0, __qword_ptr[rdi]);
            a.mulsd(xmm0, xmm1);
            a.addsd(xmm0, __qword_ptr[rsi]);
            a.movsd(__qword_ptr[rsi], xmm0);
        }),
        ("division", a => a.div(rcx)),
        ("interrupts off, flags saved", a =>
        {
            a.pushfq();
            a.cli();
            a.sti();
            a.nop();
        }),
    ];

    [Fact]
    public void Emitted_code_is_as_listed()
    {
        Assert.SkipUnless(System.Runtime.Intrinsics.X86.Avx2.IsSupported, "the host has no AVX2, and its code differs");
        string listing = List();
        string path = Source();
        if (Environment.GetEnvironmentVariable("KVASIR_UPDATE_LISTINGS") == "1")
            File.WriteAllText(path, listing);
        Assert.SkipUnless(File.Exists(path), "the sources are not here");
        Assert.Equal(File.ReadAllText(path), listing);
    }

    private static string List()
    {
        StringBuilder text = new();
        NasmFormatter formatter = new();
        formatter.Options.FirstOperandCharIndex = 8;
        foreach ((string name, Action<Assembler> build) in Blocks)
        {
            using LongModeMachine machine = new(translate: true);
            List<(ulong Place, byte[] Code)> made = [];
            machine.Code.Translator!.Listener = (place, code) => made.Add((place, code.ToArray()));
            machine.Assemble(
                LongModeMachine.Program,
                a =>
                {
                    build(a);
                    a.ud2();
                },
                exit: false);
            machine.Translate(LongModeMachine.Program);
            Assert.NotEmpty(made);
            text.Append("; ").Append(name).Append('\n');
            Append(text, formatter, made[0].Place, made[0].Code);
            text.Append('\n');
        }
        return text.ToString();
    }

    private static void Append(StringBuilder text, NasmFormatter formatter, ulong place, byte[] code)
    {
        Iced.Intel.Decoder decoder = Iced.Intel.Decoder.Create(64, code);
        // Only distances are the same in every process.
        decoder.IP = place;
        StringOutput output = new();
        while (decoder.IP < place + (ulong)code.Length)
        {
            decoder.Decode(out Instruction instruction);
            formatter.Format(in instruction, output);
            text.Append(System.Globalization.CultureInfo.InvariantCulture, $"{instruction.IP - place:x4}  {output.ToStringAndReset().TrimEnd()}\n");
        }
    }

    private static string Source([CallerFilePath] string path = "") => Path.Combine(Path.GetDirectoryName(path)!, "Listings.txt");
}
