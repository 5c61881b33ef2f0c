using System;
using System.Collections.Generic;
using Iced.Intel;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Every exception vector, with its error code, saved RIP and saved privilege.</summary>
internal static class ExceptionCases
{
    public static IEnumerable<SystemCase> All()
    {
        foreach (SystemCase test in LongMode())
            yield return test;
        foreach (SystemCase test in Legacy())
            yield return test;
        foreach (SystemCase test in RealMode())
            yield return test;
    }

    /// <summary>A case whose last instruction faults: the handler must see its address.</summary>
    public static SystemCase Fault(string name, SystemBuilder b, Action<Assembler> prefix, Action<Assembler> faulting, int vector, uint error = 0, int? bits = null)
    {
        ulong start = b.State.Cs.Base + b.State.Rip;
        int length = b.Assemble(start, prefix, bits);
        b.Assemble(start + (ulong)length, a =>
        {
            faulting(a);
            Exit(a);
        }, bits);
        return b.Expect("vector", Slot(0), 4, (ulong)vector)
            .Expect("error code", Slot(1), 4, error)
            .Expect("saved RIP", Slot(2), 4, b.State.Rip + (ulong)length)
            .Build(name);
    }

    private static void None(Assembler a)
    {
    }

    private static IEnumerable<SystemCase> LongMode()
    {
        yield return Fault("long: #DE", Long(), a => a.xor(ecx, ecx), a => a.div(ecx), 0);
        yield return Fault("long: #UD", Long(), None, a => a.ud2(), 6);
        yield return Fault("long: #UD of VMCALL", Long(), None, a => a.vmcall(), 6);
        yield return Fault("long: #UD of RSM", Long(), None, a => a.rsm(), 6);
        yield return Fault("long: #GP of a selector", Long(), a => a.mov(eax, 0x1235), a => a.mov(ds, eax), 13, 0x1234);
        yield return Fault("long: #GP of a selector in the LDT", Long(), a => a.mov(eax, 0x17), a => a.mov(ds, eax), 13, 0x14);
        yield return Fault("long: #NP", Long(), a => a.mov(eax, AbsentData), a => a.mov(es, eax), 11, AbsentData);
        yield return Fault("long: #SS of an absent stack", Long(), a => a.mov(eax, AbsentData), a => a.mov(ss, eax), 12, AbsentData);
        yield return Fault("long: #GP of a read-only stack", Long(), a => a.mov(eax, ReadOnlyData), a => a.mov(ss, eax), 13, ReadOnlyData);
        yield return Fault("long: #GP of an execute-only segment", Long(), a => a.mov(eax, ExecuteOnly), a => a.mov(fs, eax), 13, ExecuteOnly);
        yield return Fault("long: #GP of a non-canonical address", Long(), a => a.mov(rax, 0x8000_0000_0000ul), a => a.mov(rbx, __qword_ptr[rax]), 13);
        yield return Fault("long: #SS of a non-canonical stack", Long(), a => a.mov(rbp, 0x8000_0000_0000ul), a => a.mov(rbx, __qword_ptr[rbp]), 12);
        yield return Fault("long: #PF not present", Long(), a => a.mov(rax, 0x40_0010ul), a => a.mov(rbx, __qword_ptr[rax]), 14, 0);
        yield return Fault("long: #PF write", Long(), a => a.mov(rax, 0x40_0010ul), a => a.mov(__qword_ptr[rax], rbx), 14, 2);
        yield return Fault("long: #GP of CR4's reserved bits", Long(), a => a.mov(rax, 1ul << 30), a => a.mov(cr4, rax), 13);
        yield return Fault("long: #GP of CR0.PG without PE", Long(), a => a.mov(eax, 0x8000_0010), a => a.mov(cr0, rax), 13);
        yield return Fault("long: #GP of clearing CR4.PAE", Long(), a => a.mov(eax, 0), a => a.mov(cr4, rax), 13);
        yield return Fault("long: #GP of clearing CR0.PG in 64-bit code", Long(), a => a.mov(eax, 0x11), a => a.mov(cr0, rax), 13);
        yield return Fault("long: #GP of CR3's reserved bits", Long(), a => a.mov(rax, 1ul << 60), a => a.mov(cr3, rax), 13);
        yield return Fault("long: #GP of an unknown MSR", Long(), a => a.mov(ecx, 0x1234_5678), a => a.rdmsr(), 13);
        yield return Fault("long: #GP of a non-canonical LSTAR", Long(), a => { a.mov(ecx, 0xc000_0082); a.mov(edx, 0x8000); }, a => a.wrmsr(), 13);
        yield return Fault("long: #GP of EFER.LME while paging", Long(), a => { a.mov(ecx, 0xc000_0080); a.xor(edx, edx); a.mov(eax, 1); }, a => a.wrmsr(), 13);
        yield return Fault("long: #GP of PAT type 2", Long(), a => { a.mov(ecx, 0x277); a.xor(edx, edx); a.mov(eax, 2); }, a => a.wrmsr(), 13);
        yield return Fault("long: #GP of INT with a gate beyond the IDT", Long(), None, a => a.@int(0x80), 13, 0x80 * 8 + 2);
        yield return Fault("long: #UD of MOV DR4 with CR4.DE", WithCr4(Long(), Cr4.DE), None, a => a.mov(rax, dr4), 6);
        yield return Fault("long: #GP of a DR7 above 32 bits", Long(), a => a.mov(rax, 1ul << 32), a => a.mov(dr7, rax), 13);
        yield return Fault("long: #GP of IRETQ with NT", Long(), a => { a.pushfq(); a.or(__qword_ptr[rsp], 0x4000); a.popfq(); }, a => a.iretq(), 13);
        yield return Fault("long: #NM is the vector unit's, not CLTS's: CR0.TS", Long(), a => { a.mov(rax, cr0); a.or(rax, 8); a.mov(cr0, rax); a.clts(); a.smsw(eax); a.test(eax, 8); }, a => a.ud2(), 6);

        yield return Fault("user: #GP of HLT", Long().InUserMode(), None, a => a.hlt(), 13);
        yield return Fault("user: #GP of CLI", Long().InUserMode(), None, a => a.cli(), 13);
        yield return Fault("user: #GP of MOV CR", Long().InUserMode(), None, a => a.mov(rax, cr0), 13);
        yield return Fault("user: #GP of WRMSR", Long().InUserMode(), None, a => a.wrmsr(), 13);
        yield return Fault("user: #GP of a port the bitmap forbids", Long().InUserMode(), a => a.@out(0x80, al), a => a.@in(al, 0xff), 13);
        yield return Fault("user: #GP of INT through a ring 0 gate", Long().InUserMode(), None, a => a.@int(0x20), 13, 0x20 * 8 + 2);
        yield return Fault("user: #PF of a supervisor page", Long().InUserMode(), None, a => a.mov(eax, __dword_ptr[0x6000]), 14, 5);
        yield return Fault("user: #GP of SGDT with UMIP", WithCr4(Long(), Cr4.UMIP).InUserMode(), None, a => a.sgdt(__[0x5_0000]), 13);
        yield return Fault("user: #GP of RDTSC with TSD", WithCr4(Long(), Cr4.TSD).InUserMode(), None, a => a.rdtsc(), 13);
        yield return Fault("user: #UD of RDFSBASE without FSGSBASE", Long().InUserMode(), None, a => a.rdfsbase(rax), 6);
        yield return Fault("user: #GP of a ring 0 data segment", Long().InUserMode(), a => a.mov(eax, Data), a => a.mov(ds, eax), 13, Data);

        SystemBuilder alignment = Long().InUserMode();
        alignment.State.Cr0 |= (ulong)Cr0.AM;
        alignment.State.Rflags |= (ulong)Rflags.AC;
        yield return Fault("user: #AC", alignment, None, a => a.mov(eax, __dword_ptr[0x5_0001]), 17);

        SystemBuilder traps = Long();
        traps.Assemble(Program, a => { a.int3(); Exit(a); });
        yield return traps.Expect("vector", Slot(0), 4, 3).Expect("RIP after INT3", Slot(2), 4, Program + 1).Build("long: #BP is a trap");

        SystemBuilder icebp = Long();
        icebp.Assemble(Program, a => { a.int1(); Exit(a); });
        yield return icebp.Expect("vector", Slot(0), 4, 1).Expect("RIP after INT1", Slot(2), 4, Program + 1).Build("long: INT1");

        SystemBuilder userBreak = Long().InUserMode();
        userBreak.Gate64(3, Handlers + 3 * 16, 0xee, 0);
        userBreak.Assemble(UserCode, a => a.int3());
        yield return userBreak.Expect("vector", Slot(0), 4, 3).Expect("CS", Slot(3), 4, UserCode64).Expect("RSP", Slot(5), 4, UserStack).Expect("SS", Slot(6), 4, UserData)
            .Expect("RSP0 less five slots and two words of the stub", Slot(8), 4, Stack0).Build("user: INT3 through a ring 3 gate");

        SystemBuilder ist = Long();
        ist.Gate64(6, Handlers + 6 * 16, 0x8e, 1);
        ist.Assemble(Program, a => a.ud2());
        yield return ist.Expect("vector", Slot(0), 4, 6).Expect("saved RSP", Slot(5), 4, Stack0).Expect("RSP on the IST", Slot(8), 4, Ist1).Build("long: IST");

        SystemBuilder aligned = Long();
        aligned.State.Gpr[4] = Stack0 - 3;
        aligned.Assemble(Program, a => a.ud2());
        yield return aligned.Expect("saved RSP", Slot(5), 4, Stack0 - 3).Expect("RSP was aligned", Slot(8), 4, Stack0 - 16).Build("long: the stack is aligned before it is pushed");

        SystemBuilder resume = Long();
        resume.Assemble(Program, a => a.ud2());
        yield return resume.Expect("RF is set in what a fault pushes", Slot(4), 4, 0x1_0002).Build("long: RF");

        SystemBuilder cr2 = Long();
        cr2.Assemble(Program, a => { a.mov(rax, 0x40_0010ul); a.mov(ebx, __dword_ptr[rax]); });
        yield return cr2.Expect("CR2", Slot(7), 8, 0x40_0010).Build("long: CR2");

        SystemBuilder noCode = Long();
        noCode.Assemble(Program, a => { a.mov(rax, 0x40_0010ul); a.jmp(rax); });
        yield return noCode.Expect("vector", Slot(0), 4, 14).Expect("RIP", Slot(2), 8, 0x40_0010).Expect("error: a fetch, told because NXE is on", Slot(1), 4, 0x10)
            .Build("long: #PF of a fetch");

        SystemBuilder doubleFault = Long();
        doubleFault.Put(Idt + 14 * 16 + 5, 0, 1);
        doubleFault.Assemble(Program, a => a.mov(eax, __dword_ptr[0x40_0000]));
        yield return doubleFault.Expect("vector", Slot(0), 4, 8).Expect("error", Slot(1), 4, 0).Expect("RIP", Slot(2), 4, Program).Build("long: #PF whose gate is absent makes #DF");

        SystemBuilder serial = Long();
        serial.Put(Idt + 6 * 16 + 5, 0x0e, 1);
        serial.Assemble(Program, a => a.ud2());
        yield return serial.Expect("vector", Slot(0), 4, 11).Expect("error: IDT and EXT", Slot(1), 4, 6 * 8 + 3).Build("long: #UD whose gate is absent gives #NP");

        SystemBuilder badStack = Long();
        badStack.State.Gpr[4] = 0x40_0000;
        badStack.Gate64(8, Handlers + 8 * 16, 0x8e, 1);
        badStack.Assemble(Program, a => a.ud2());
        yield return badStack.Expect("vector", Slot(0), 4, 8).Expect("CR2", Slot(7), 8, 0x3f_fff8).Build("long: no stack: #PF, then #DF on its own stack");

        SystemBuilder triple = Long();
        triple.State.Gpr[4] = 0x40_0000;
        triple.Assemble(Program, a => a.ud2());
        yield return triple.Build("long: no stack at all: triple fault", SystemEnd.TripleFault);

        SystemBuilder noIdt = Long();
        noIdt.State.Idtr = new Kvasir.Core.TableState(0, 0);
        noIdt.Assemble(Program, a => a.ud2());
        yield return noIdt.Build("long: no IDT: triple fault", SystemEnd.TripleFault);
    }

    public static SystemBuilder WithCr4(SystemBuilder b, Cr4 bits)
    {
        b.State.Cr4 |= (ulong)bits;
        return b;
    }

    private static IEnumerable<SystemCase> Legacy()
    {
        yield return Fault("32: #DE", Protected(), a => a.xor(ecx, ecx), a => a.div(ecx), 0);
        yield return Fault("32: #BR", Protected(), a => { a.mov(__dword_ptr[0x5_0000], 2); a.mov(__dword_ptr[0x5_0004], 5); a.mov(eax, 6); }, a => a.bound(eax, __[0x5_0000]), 5);
        yield return Fault("32: #GP of a data limit", Protected(), a => { a.mov(eax, Data16); a.mov(es, eax); }, a => a.mov(eax, __dword_ptr.es[0x1_0000]), 13);
        yield return Fault("32: #GP of a write to read-only data", Protected(), a => { a.mov(eax, ReadOnlyData); a.mov(es, eax); }, a => a.mov(__dword_ptr.es[0x100], eax), 13);
        yield return Fault("32: #GP of a null segment", Protected(), a => { a.xor(eax, eax); a.mov(es, eax); }, a => a.mov(eax, __dword_ptr.es[0x100]), 13);
        yield return Fault("32: #GP of SS null", Protected(), a => a.xor(eax, eax), a => a.mov(ss, eax), 13);
        yield return Fault("32: #NP of a far jump", Protected(), None, a => a.jmp(AbsentCode, 0x100), 11, AbsentCode);
        yield return Fault("32: #GP of a far jump to data", Protected(), None, a => a.jmp(Data, 0x100), 13, Data);
        yield return Fault("32: #GP of LTR of a busy TSS", Protected(), a => a.mov(eax, TssSelector), a => a.ltr(ax), 13, TssSelector);
        yield return Fault("32: #GP of LLDT of a data segment", Protected(), a => a.mov(eax, Data), a => a.lldt(ax), 13, Data);

        SystemBuilder overflow = Protected();
        overflow.Assemble(Program, a => { a.mov(al, 0x7f); a.add(al, 1); a.into(); });
        yield return overflow.Expect("vector", Slot(0), 4, 4).Expect("RIP after INTO", Slot(2), 4, Program + 5).Build("32: #OF is a trap");

        SystemBuilder noOverflow = Protected();
        noOverflow.Assemble(Program, a => { a.xor(eax, eax); a.into(); a.mov(__dword_ptr[Results], 0x77); Exit(a); });
        yield return noOverflow.Expect("INTO passed", Slot(0), 4, 0x77).Build("32: INTO without overflow");

        SystemBuilder user = Protected().InUserMode();
        user.Assemble(UserCode, a => a.hlt());
        yield return user.Expect("vector", Slot(0), 4, 13).Expect("CS", Slot(3), 4, UserCode32).Expect("ESP", Slot(5), 4, UserStack).Expect("SS", Slot(6), 4, UserData)
            .Build("32: a fault in ring 3 switches stacks");

        SystemBuilder badSs = Protected().InUserMode();
        badSs.Put(Tss + 8, ReadOnlyData, 2);
        badSs.Gate32(10, TaskGate, 0, 0x85);
        badSs.Assemble(UserCode, a => a.hlt());
        yield return badSs.Build("32: a bad stack in the TSS is #TS, whose handler has no stack either: triple fault", SystemEnd.TripleFault);

        SystemBuilder small = Protected();
        small.Gate32(6, Code32, 0x9000, 0x86);
        small.Assemble(Program, a => a.ud2());
        small.Assemble(0x9000, a => { a.mov(eax, __dword_ptr[esp]); a.mov(__dword_ptr[Results], eax); a.mov(__dword_ptr[Results + 8], esp); Exit(a); });
        yield return small.Expect("IP and CS", Slot(0), 4, (Code32 << 16) | Program).Expect("three words", Slot(1), 4, Stack0 - 6).Build("32: a 16-bit interrupt gate");

        SystemBuilder trap = Protected();
        trap.State.Rflags |= (ulong)Rflags.IF;
        trap.Gate32(6, Code32, (uint)Scratch, 0x8f);
        trap.Assemble(Program, a => a.ud2());
        trap.Assemble(Scratch, a => { a.pushfd(); a.pop(__dword_ptr[Results]); Exit(a); });
        yield return trap.Expect("IF stays", Slot(0), 4, 0x202).Build("32: a trap gate keeps IF");
    }

    private static IEnumerable<SystemCase> RealMode()
    {
        yield return Fault("real: #DE", Real(), a => a.xor(cx, cx), a => a.div(cx), 0);
        yield return Fault("real: #UD", Real(), None, a => a.ud2(), 6);
        yield return Fault("real: #UD of LLDT", Real(), None, a => a.lldt(ax), 6);
        yield return Fault("real: #UD of VERR", Real(), None, a => a.verr(ax), 6);

        SystemBuilder soft = Real();
        soft.State.Rflags |= (ulong)Rflags.IF;
        soft.Assemble(Program, a => { a.@int(0x21); Exit(a); });
        yield return soft.Expect("vector", Slot(0), 2, 0x21).Expect("IP after INT", Slot(2), 2, Program + 2).Expect("flags with IF", Slot(4), 2, 0x202).Build("real: INT n");

        SystemBuilder back = Real();
        back.Put(0x40 * 4, Scratch >> 4 << 16, 4);
        back.State.Idtr = new Kvasir.Core.TableState(0, 0x3ff);
        back.Assemble(Program, a => { a.@int(0x40); a.mov(__word_ptr[Results], ax); a.mov(__word_ptr[Results + 8], sp); Exit(a); });
        back.Assemble(Scratch, a => { a.mov(ax, 0x1234); a.iret(); });
        yield return back.Expect("AX", Slot(0), 2, 0x1234).Expect("SP", Slot(1), 2, Stack0).Build("real: INT and IRET");

        SystemBuilder shut = Real();
        shut.State.Idtr = new Kvasir.Core.TableState(0, 3);
        shut.Assemble(Program, a => a.ud2());
        yield return shut.Build("real: an IDT without vectors: triple fault", SystemEnd.TripleFault);
    }
}
