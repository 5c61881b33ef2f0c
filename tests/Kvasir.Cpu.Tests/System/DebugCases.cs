using System.Collections.Generic;
using Iced.Intel;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Single step, breakpoints, shadows, and interrupts from outside.</summary>
internal static class DebugCases
{
    public static IEnumerable<SystemCase> All()
    {
        foreach (SystemCase test in Steps())
            yield return test;
        foreach (SystemCase test in Breakpoints())
            yield return test;
        foreach (SystemCase test in Interrupts())
            yield return test;
    }

    /// <summary>A #DB handler that counts in slot 0, keeps DR6 in slot 1 and the last RIP in slot 2, clears DR6 and goes on.</summary>
    private static SystemBuilder Counting()
    {
        SystemBuilder b = Long();
        b.Gate64(1, 0x9000, 0x8e, 0);
        b.Assemble(0x9000, a =>
        {
            a.push(rax);
            a.inc(__dword_ptr[Slot(0)]);
            a.mov(rax, dr6);
            a.mov(__qword_ptr[Slot(1)], rax);
            a.mov(rax, __qword_ptr[rsp + 8]);
            a.mov(__qword_ptr[Slot(2)], rax);
            a.xor(eax, eax);
            a.mov(dr6, rax);
            a.pop(rax);
            a.iretq();
        });
        return b;
    }

    private static void Trap(Assembler a, bool on)
    {
        a.pushfq();
        if (on)
            a.or(__qword_ptr[rsp], 0x100);
        else
            a.and(__qword_ptr[rsp], ~0x100);
        a.popfq();
    }

    private static IEnumerable<SystemCase> Steps()
    {
        SystemBuilder steps = Counting();
        steps.Assemble(Program, a => { Trap(a, true); a.nop(); a.nop(); a.nop(); Trap(a, false); Exit(a); });
        yield return steps.Expect("three NOPs, PUSHF, AND, POPF", Slot(0), 4, 6).Expect("DR6.BS", Slot(1), 4, 0xffff_4ff0).Build("debug: single step");

        SystemBuilder shadow = Counting();
        shadow.Assemble(Program, a => { a.mov(ecx, ss); Trap(a, true); a.mov(ss, ecx); a.nop(); Trap(a, false); Exit(a); });
        yield return shadow.Expect("MOV SS does not trap, the next one does", Slot(0), 4, 4).Build("debug: MOV SS holds off the trap");

        SystemBuilder repeat = Counting();
        repeat.Assemble(Program, a => { a.mov(ecx, 3); a.mov(edi, (int)Scratch); Trap(a, true); a.rep.stosb(); Trap(a, false); Exit(a); });
        yield return repeat.Expect("each iteration traps", Slot(0), 4, 6).Build("debug: single step through REP STOSB");

        SystemBuilder software = Counting();
        software.Gate64(0x20, 0x9400, 0x8e, 0);
        software.Assemble(0x9400, a => { a.pushfq(); a.pop(__qword_ptr[Slot(3)]); a.iretq(); });
        software.Assemble(Program, a => { Trap(a, true); a.@int(0x20); a.nop(); Trap(a, false); Exit(a); });
        yield return software.Expect("TF is clear inside", Slot(3), 8, 0x2).Expect("INT does not trap", Slot(0), 4, 4).Build("debug: INT n under TF");

        SystemBuilder syscall = Counting();
        syscall.State.Lstar = 0x9400;
        syscall.State.Fmask = 0x100;
        syscall.State.Star = (ulong)Code64 << 32;
        syscall.Assemble(Program, a => { Trap(a, true); a.syscall(); });
        syscall.Assemble(0x9400, a => { a.nop(); Exit(a); });
        yield return syscall.Expect("no trap", Slot(0), 4, 0).Build("debug: SYSCALL that masks TF");
    }

    private static IEnumerable<SystemCase> Breakpoints()
    {
        SystemBuilder code = Counting();
        code.Assemble(Program, a =>
        {
            a.mov(eax, 0x9600);
            a.mov(dr0, rax);
            a.mov(eax, 0x402);
            a.mov(dr7, rax);
            a.mov(rcx, 0x9600);
            a.jmp(rcx);
        });
        // The handler returns with RF set in its frame, as the processor pushed it clear: it sets it itself.
        code.Assemble(0x9000, a =>
        {
            a.push(rax);
            a.inc(__dword_ptr[Slot(0)]);
            a.mov(rax, dr6);
            a.mov(__qword_ptr[Slot(1)], rax);
            a.mov(rax, __qword_ptr[rsp + 8]);
            a.mov(__qword_ptr[Slot(2)], rax);
            a.mov(rax, __qword_ptr[rsp + 24]);
            a.mov(__qword_ptr[Slot(3)], rax);
            a.or(__qword_ptr[rsp + 24], 0x1_0000);
            a.pop(rax);
            a.iretq();
        });
        code.Assemble(0x9600, a => { a.inc(edx); a.mov(__dword_ptr[Slot(4)], edx); Exit(a); });
        yield return code.Expect("once", Slot(0), 4, 1).Expect("DR6.B0", Slot(1), 4, 0xffff_0ff1).Expect("before the instruction", Slot(2), 8, 0x9600).Expect("RF is clear in what is pushed", Slot(3), 8, 2)
            .Expect("the instruction ran", Slot(4), 4, 1).Build("debug: code breakpoint and RF");

        SystemBuilder data = Counting();
        data.Assemble(Program, a =>
        {
            a.mov(eax, (int)Scratch + 4);
            a.mov(dr1, rax);
            // Enable 1, write, 4 bytes.
            a.mov(eax, 0x00d0_0408);
            a.mov(dr7, rax);
            a.mov(ecx, __dword_ptr[Scratch + 4]);
            a.mov(__byte_ptr[Scratch + 7], 1);
            a.mov(__byte_ptr[Scratch + 8], 1);
            a.mov(__dword_ptr[Scratch], 1);
            a.mov(__qword_ptr[Scratch], rcx);
            Exit(a);
        });
        yield return data.Expect("two stores touch it", Slot(0), 4, 2).Expect("DR6.B1", Slot(1), 4, 0xffff_0ff2).Build("debug: write breakpoint");

        SystemBuilder access = Counting();
        access.Assemble(Program, a =>
        {
            a.mov(eax, (int)Scratch);
            a.mov(dr3, rax);
            // Enable 3, read or write, 8 bytes.
            a.mov(eax, unchecked((int)0xb000_0480));
            a.mov(dr7, rax);
            a.mov(ecx, __dword_ptr[Scratch + 4]);
            Exit(a);
        });
        yield return access.Expect("a read", Slot(0), 4, 1).Expect("DR6.B3", Slot(1), 4, 0xffff_0ff8).Build("debug: access breakpoint of 8 bytes");

        SystemBuilder ports = ExceptionCases.WithCr4(Counting(), Cr4.DE);
        ports.Assemble(Program, a =>
        {
            a.mov(eax, 0x80);
            a.mov(dr2, rax);
            a.mov(eax, 0x0200_0420);
            a.mov(dr7, rax);
            a.@out(0x80, al);
            a.nop();
            Exit(a);
        });
        yield return ports.Expect("once", Slot(0), 4, 1).Expect("DR6.B2", Slot(1), 4, 0xffff_0ff4).Build("debug: port breakpoint");

        SystemBuilder detect = Counting();
        detect.Assemble(Program, a => { a.mov(eax, 0x2400); a.mov(dr7, rax); a.mov(rcx, dr0); a.mov(rcx, dr7); a.mov(__qword_ptr[Slot(3)], rcx); Exit(a); });
        yield return detect.Expect("once", Slot(0), 4, 1).Expect("DR6.BD", Slot(1), 4, 0xffff_2ff0).Expect("GD is clear", Slot(3), 8, 0x400).Build("debug: general detect");
    }

    private static IEnumerable<SystemCase> Interrupts()
    {
        SystemBuilder sti = Long();
        sti.Assemble(Program, a => { a.mov(al, 0x22); a.@out(0x82, al); a.nop(); a.sti(); a.inc(ecx); a.inc(ecx); Exit(a); });
        yield return sti.Expect("vector", Slot(0), 4, 0x22).Expect("one instruction after STI", Slot(2), 8, Program + 8).Build("interrupts: STI's shadow");

        SystemBuilder halt = Long();
        halt.Assemble(Program, a => { a.mov(al, 0x22); a.@out(0x82, al); a.sti(); a.hlt(); Exit(a); });
        yield return halt.Expect("vector", Slot(0), 4, 0x22).Expect("after HLT", Slot(2), 8, Program + 6).Build("interrupts: STI and HLT");

        SystemBuilder priority = Long();
        priority.Assemble(Program, a =>
        {
            a.mov(eax, 5);
            a.mov(cr8, rax);
            a.sti();
            a.mov(al, 0x22);
            a.@out(0x82, al);
            a.mov(rcx, cr8);
            a.mov(__qword_ptr[Slot(10)], rcx);
            a.xor(eax, eax);
            a.mov(cr8, rax);
            a.nop();
            Exit(a);
        });
        yield return priority.Expect("vector", Slot(0), 4, 0x22).Expect("CR8", Slot(10), 8, 5).Build("interrupts: CR8 holds off and lets through");

        SystemBuilder nmi = Long();
        nmi.Gate64(2, 0x9000, 0x8e, 0);
        nmi.Assemble(0x9000, a =>
        {
            Label first = a.CreateLabel();
            a.inc(__dword_ptr[Slot(0)]);
            a.cmp(__dword_ptr[Slot(0)], 1);
            a.jne(first);
            // Another one while the first is handled waits for IRET.
            a.@out(0x83, al);
            a.nop();
            a.mov(eax, __dword_ptr[Slot(0)]);
            a.mov(__dword_ptr[Slot(1)], eax);
            a.Label(ref first);
            a.iretq();
        });
        nmi.Assemble(Program, a => { a.@out(0x83, al); a.nop(); a.nop(); a.jmp(0x8100); });
        nmi.Assemble(0x8100, a => { a.nop(); a.jmp(0x8200); });
        nmi.Assemble(0x8200, a => { a.nop(); Exit(a); });
        yield return nmi.Expect("two in all", Slot(0), 4, 2).Expect("one inside the first", Slot(1), 4, 1).Build("interrupts: an NMI blocks the next until IRET");

        SystemBuilder user = Long().InUserMode();
        user.State.Rflags |= (ulong)Rflags.IF;
        user.Assemble(UserCode, a => { a.mov(al, 0x22); a.@out(0x82, al); a.jmp(UserCode + 0x10); });
        user.Assemble(UserCode + 0x10, a => a.jmp(UserCode + 0x10));
        yield return user.Expect("vector", Slot(0), 4, 0x22).Expect("CS", Slot(3), 8, UserCode64).Expect("flags", Slot(4), 8, 0x202).Build("interrupts: in ring 3");
    }
}
