using System.Collections.Generic;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Gates, far transfers, returns, system calls and task switches.</summary>
internal static class TransferCases
{
    public static IEnumerable<SystemCase> All()
    {
        foreach (SystemCase test in Gates())
            yield return test;
        foreach (SystemCase test in Returns())
            yield return test;
        foreach (SystemCase test in SystemCalls())
            yield return test;
        foreach (SystemCase test in Tasks())
            yield return test;
    }

    private static IEnumerable<SystemCase> Gates()
    {
        SystemBuilder gate = Protected().InUserMode();
        gate.GdtGate(CallGate, Code32, Scratch, 0xec, 2);
        gate.Assemble(UserCode, a => { a.push(0x11); a.push(0x22); a.call(CallGate | 3, 0); a.nop(); });
        gate.Assemble(Scratch, a =>
        {
            for (int i = 0; i < 6; i++)
                a.pop(__dword_ptr[Slot(i)]);
            Exit(a);
        });
        yield return gate.Expect("EIP", Slot(0), 4, UserCode + 11).Expect("CS", Slot(1), 4, UserCode32).Expect("last parameter", Slot(2), 4, 0x22)
            .Expect("first parameter", Slot(3), 4, 0x11).Expect("ESP", Slot(4), 4, UserStack - 8).Expect("SS", Slot(5), 4, UserData).Build("32: call gate to ring 0 with parameters");

        SystemBuilder back = Protected().InUserMode();
        back.GdtGate(CallGate, Code32, Scratch, 0xec, 1);
        back.Assemble(UserCode, a =>
        {
            a.push(0x33);
            a.call(CallGate | 3, 0);
            a.mov(__dword_ptr[Scratch + 0x800], esp);
            a.@int(0x21);
        });
        back.Gate32(0x21, Code32, (uint)(Handlers + 0x21 * 16), 0xee);
        back.Assemble(Scratch, a => a.retf(4));
        yield return back.Expect("vector", Slot(0), 4, 0x21).Expect("ESP without the parameter", Scratch + 0x800, 4, UserStack).Expect("CS", Slot(3), 4, UserCode32)
            .Build("32: RETF n to ring 3 drops parameters on both stacks");

        SystemBuilder dropped = Protected().InUserMode();
        dropped.GdtGate(CallGate, Code32, Scratch, 0xec);
        dropped.Gate32(0x21, Code32, (uint)Scratch + 0x100, 0xee);
        dropped.Assemble(UserCode, a => { a.call(CallGate | 3, 0); a.mov(eax, ds); a.@int(0x21); });
        dropped.Assemble(Scratch, a => { a.mov(eax, Data); a.mov(ds, eax); a.retf(); });
        dropped.Assemble(Scratch + 0x100, a => { a.mov(ecx, Data); a.mov(ds, ecx); a.mov(__dword_ptr[Results], eax); Exit(a); });
        yield return dropped.Expect("DS", Slot(0), 4, 0).Build("32: a ring 0 data segment becomes null in ring 3");

        SystemBuilder conforming = Protected().InUserMode();
        conforming.Gate32(0x21, Code32, (uint)(Handlers + 0x21 * 16), 0xee);
        conforming.Assemble(UserCode, a => a.call(Conforming, (uint)UserCode + 0x100));
        conforming.Assemble(UserCode + 0x100, a => a.@int(0x21));
        yield return conforming.Expect("CS keeps the privilege", Slot(3), 4, Conforming | 3).Build("32: far call to a conforming segment");

        SystemBuilder gate64 = Long().InUserMode();
        gate64.GdtGate(CallGate, Code64, Scratch, 0xec);
        gate64.Put(UserCode + 0x800, 0, 4);
        gate64.Put(UserCode + 0x804, CallGate | 3, 2);
        gate64.Assemble(UserCode, a => a.call(__fword_ptr[UserCode + 0x800]));
        gate64.Put(PageTableEntry(Scratch), Scratch | 3, 8);
        gate64.Assemble(Scratch, a =>
        {
            for (int i = 0; i < 4; i++)
                a.pop(__qword_ptr[Slot(i)]);
            a.mov(__qword_ptr[Slot(4)], rsp);
            Exit(a);
        });
        yield return gate64.Expect("RIP", Slot(0), 8, UserCode + 7).Expect("CS", Slot(1), 8, UserCode64).Expect("RSP", Slot(2), 8, UserStack).Expect("SS", Slot(3), 8, UserData)
            .Expect("RSP0", Slot(4), 8, Stack0).Build("long: call gate to ring 0");

        yield return ExceptionCases.Fault("32: #GP of a call gate that is too inner", WithGate(Protected().InUserMode(), 0x8c), _ => { }, a => a.call(CallGate | 3, 0), 13, CallGate);
        yield return ExceptionCases.Fault("32: #NP of an absent call gate", WithGate(Protected(), 0x0c), _ => { }, a => a.call(CallGate, 0), 11, CallGate);
        yield return ExceptionCases.Fault("long: #GP of a 32-bit TSS as a target", WithTarget(Long(), OtherTss), _ => { }, a => a.jmp(__fword_ptr[Scratch]), 13, OtherTss);

        SystemBuilder compat = Long();
        compat.Put(Scratch, Scratch + 0x100, 4);
        compat.Put(Scratch + 4, Code32, 2);
        compat.Assemble(Program, a => a.jmp(__fword_ptr[Scratch]));
        compat.Assemble(Scratch + 0x100, a =>
        {
            a.mov(eax, 0x7fff_ffff);
            a.inc(eax);
            a.mov(__dword_ptr[Results], eax);
            a.dec(ecx);
            a.mov(__dword_ptr[Results + 8], ecx);
            a.jmp(Code64, (uint)Scratch + 0x200);
        }, 32);
        compat.Assemble(Scratch + 0x200, a => { a.mov(__qword_ptr[Slot(2)], rcx); Exit(a); });
        yield return compat.Expect("EAX", Slot(0), 4, 0x8000_0000).Expect("ECX", Slot(1), 4, 0xffff_ffff).Expect("RCX", Slot(2), 8, 0xffff_ffff).Build("long: to compatibility mode and back");
    }

    private static SystemBuilder WithGate(SystemBuilder b, byte type)
    {
        b.GdtGate(CallGate, Code32, Scratch, type);
        return b;
    }

    private static SystemBuilder WithTarget(SystemBuilder b, ushort selector)
    {
        b.Descriptor(OtherTss, Tss2, 0x67, 0x89);
        b.Put(Scratch + 4, selector, 2);
        return b;
    }

    private static IEnumerable<SystemCase> Returns()
    {
        SystemBuilder iret = Long();
        iret.Assemble(Program, a =>
        {
            a.push(UserData);
            a.push(0x3_0f00);
            a.push(0x202);
            a.push(UserCode64);
            a.push((int)UserCode);
            a.iretq();
        });
        iret.Assemble(UserCode, a => a.hlt());
        yield return iret.Expect("vector", Slot(0), 4, 13).Expect("RIP", Slot(2), 8, UserCode).Expect("CS", Slot(3), 8, UserCode64).Expect("flags", Slot(4), 8, 0x1_0202)
            .Expect("RSP", Slot(5), 8, 0x3_0f00).Expect("SS", Slot(6), 8, UserData).Build("long: IRETQ to ring 3 and a fault back");

        SystemBuilder same = Long();
        same.Assemble(Program, a =>
        {
            a.push(0);
            a.push(0x5f00);
            a.push(0x2);
            a.push(Code64);
            a.push((int)Scratch);
            a.iretq();
        });
        same.Assemble(Scratch, a => { a.mov(__qword_ptr[Slot(0)], rsp); a.mov(eax, ss); a.mov(__dword_ptr[Slot(1)], eax); Exit(a); });
        yield return same.Expect("RSP", Slot(0), 8, 0x5f00).Expect("SS null", Slot(1), 4, 0).Build("long: IRETQ pops a null SS in ring 0");

        SystemBuilder compat = Long();
        compat.Assemble(Program, a =>
        {
            a.push(UserData);
            a.push(0x3_0f00);
            a.push(0x202);
            a.push(UserCode32);
            a.push((int)UserCode);
            a.iretq();
        });
        compat.Assemble(UserCode, a => { a.inc(eax); a.hlt(); }, 32);
        yield return compat.Expect("vector", Slot(0), 4, 13).Expect("RIP", Slot(2), 8, UserCode + 1).Expect("CS", Slot(3), 8, UserCode32).Build("long: IRETQ to compatibility mode");

        SystemBuilder nested = Long();
        nested.Gate64(0x20, Scratch, 0x8e, 0);
        nested.Assemble(Program, a => { a.sti(); a.@int(0x20); a.mov(__qword_ptr[Slot(1)], rsp); a.pushfq(); a.pop(__qword_ptr[Slot(2)]); Exit(a); });
        nested.Assemble(Scratch, a => { a.pushfq(); a.pop(__qword_ptr[Slot(0)]); a.iretq(); });
        yield return nested.Expect("flags inside", Slot(0), 8, 2).Expect("RSP", Slot(1), 8, Stack0).Expect("flags after", Slot(2), 8, 0x202).Build("long: INT and IRETQ at ring 0");

        SystemBuilder mask = Long().InUserMode();
        mask.Gate64(0x21, Handlers + 0x21 * 16, 0xee, 0);
        mask.Assemble(UserCode, a => { a.push(0x20_3202); a.popfq(); a.@int(0x21); });
        yield return mask.Expect("POPF in ring 3 changes neither IF nor IOPL", Slot(4), 8, 0x20_0002).Build("user: POPFQ");

        yield return ExceptionCases.Fault("32: #GP of IRET to an inner level", Protected().InUserMode(), a => { a.pushfd(); a.push(Code32); a.push(0); }, a => a.iretd(), 13, Code32);
        yield return ExceptionCases.Fault("32: #GP of RETF to a null selector", Protected(), a => { a.push(0); a.push(0); }, a => a.retf(), 13);
        yield return ExceptionCases.Fault("long: #GP of IRETQ to a non-canonical RIP", Long(), a =>
        {
            a.push(Data);
            a.push((int)Stack0);
            a.push(2);
            a.push(Code64);
            a.mov(rax, 0x8000_0000_0000);
            a.push(rax);
        }, a => a.iretq(), 13);
    }

    private static IEnumerable<SystemCase> SystemCalls()
    {
        SystemBuilder call = SyscallMachine();
        call.Assemble(UserCode, a => { a.mov(eax, 0x55); a.syscall(); a.mov(ebx, eax); a.hlt(); });
        call.Assemble(Scratch, a =>
        {
            a.mov(__qword_ptr[Slot(10)], rcx);
            a.mov(__qword_ptr[Slot(11)], r11);
            a.pushfq();
            a.pop(__qword_ptr[Slot(9)]);
            a.sysretq();
        });
        yield return call.Expect("RCX", Slot(10), 8, UserCode + 7).Expect("R11", Slot(11), 8, 0x246).Expect("masked flags", Slot(9), 8, 0x46).Expect("vector", Slot(0), 4, 13)
            .Expect("CS", Slot(3), 8, UserCode64).Expect("SS", Slot(6), 8, UserData).Expect("RIP", Slot(2), 8, UserCode + 9).Build("long: SYSCALL and SYSRETQ");

        SystemBuilder narrow = SyscallMachine();
        narrow.Assemble(UserCode, a => a.syscall());
        narrow.Assemble(Scratch, a => { a.mov(ecx, (int)UserCode + 0x100); a.sysret(); });
        narrow.Assemble(UserCode + 0x100, a => { a.inc(eax); a.hlt(); }, 32);
        yield return narrow.Expect("CS", Slot(3), 8, UserCode32).Expect("RIP", Slot(2), 8, UserCode + 0x101).Build("long: SYSRETD to compatibility mode");

        SystemBuilder off = SyscallMachine();
        off.State.Efer &= ~(ulong)Efer.SCE;
        yield return ExceptionCases.Fault("user: #UD of SYSCALL without EFER.SCE", off, _ => { }, a => a.syscall(), 6);

        SystemBuilder enter = Protected().InUserMode();
        enter.State.SysenterCs = 0x10;
        enter.State.SysenterEip = Scratch;
        enter.State.SysenterEsp = Stack0;
        enter.Assemble(UserCode, a => { a.mov(edx, (int)UserCode + 0x40); a.mov(ecx, (int)UserStack - 0x10); a.sysenter(); });
        enter.Assemble(Scratch, a => { a.mov(eax, cs); a.mov(__dword_ptr[Slot(9)], eax); a.mov(eax, ss); a.mov(__dword_ptr[Slot(10)], eax); a.mov(__dword_ptr[Slot(11)], esp); a.sysexit(); });
        enter.Assemble(UserCode + 0x40, a => a.hlt());
        yield return enter.Expect("CS inside", Slot(9), 4, 0x10).Expect("SS inside", Slot(10), 4, 0x18).Expect("ESP inside", Slot(11), 4, Stack0).Expect("vector", Slot(0), 4, 13)
            .Expect("CS after", Slot(3), 4, 0x23).Expect("ESP after", Slot(5), 4, UserStack - 0x10).Expect("EIP after", Slot(2), 4, UserCode + 0x40).Build("32: SYSENTER and SYSEXIT");

        yield return ExceptionCases.Fault("32: #GP of SYSENTER without a code segment", Protected(), _ => { }, a => a.sysenter(), 13);

        SystemBuilder swap = Long();
        swap.State.KernelGsBase = 0x1234_5678_9abc;
        swap.State.Gs.Base = 0x5000;
        swap.Assemble(Program, a =>
        {
            a.swapgs();
            a.mov(ecx, 0xc000_0101);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(__dword_ptr[Slot(0) + 4], edx);
            a.inc(ecx);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        });
        yield return swap.Expect("GS base", Slot(0), 8, 0x1234_5678_9abc).Expect("kernel GS base", Slot(1), 4, 0x5000).Build("long: SWAPGS");
    }

    private static SystemBuilder SyscallMachine()
    {
        SystemBuilder b = Long().InUserMode();
        b.State.Star = (ulong)(0x28 | 3) << 48 | (ulong)Code64 << 32;
        b.State.Lstar = Scratch;
        b.State.Fmask = (ulong)(Rflags.IF | Rflags.TF);
        b.State.Rflags = 0x246;
        b.Put(PageTableEntry(Scratch), Scratch | 3, 8);
        return b;
    }

    private static IEnumerable<SystemCase> Tasks()
    {
        SystemBuilder jump = WithTask(Protected());
        jump.Assemble(Program, a => { a.mov(ebx, 0x99); a.jmp(OtherTss, 0); });
        jump.Assemble(Scratch, a =>
        {
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(__dword_ptr[Slot(1)], esp);
            a.str(ax);
            a.mov(__word_ptr[Slot(2)], ax);
            a.pushfd();
            a.pop(__dword_ptr[Slot(3)]);
            a.smsw(eax);
            a.and(eax, 8);
            a.mov(__dword_ptr[Slot(4)], eax);
            Exit(a);
        });
        yield return jump.Expect("EAX of the new task", Slot(0), 4, 0x1111).Expect("ESP", Slot(1), 4, 0x5800).Expect("TR", Slot(2), 2, OtherTss).Expect("flags without NT", Slot(3), 4, 2)
            .Expect("CR0.TS", Slot(4), 4, 8).Expect("the new TSS is busy", Gdt + OtherTss + 5, 1, 0x8b).Expect("the old one is not", Gdt + TssSelector + 5, 1, 0x89)
            .Expect("saved EIP", Tss + 0x20, 4, Program + 12).Expect("saved EBX", Tss + 0x34, 4, 0x99).Expect("saved CS", Tss + 0x4c, 2, Code32).Build("32: task switch by JMP");

        SystemBuilder call = WithTask(Protected());
        call.Put(Gdt + TaskGate, (ulong)OtherTss << 16 | 0x85ul << 40, 8);
        call.Assemble(Program, a => { a.call(TaskGate, 0); a.mov(__dword_ptr[Slot(2)], ebx); a.str(ax); a.mov(__word_ptr[Slot(3)], ax); Exit(a); });
        call.State.Gpr[3] = 0x77;
        call.Assemble(Scratch, a => { a.mov(ebx, 0x88); a.pushfd(); a.pop(__dword_ptr[Slot(0)]); a.iretd(); });
        yield return call.Expect("NT inside", Slot(0), 4, 0x4002).Expect("EBX is the old task's", Slot(2), 4, 0x77).Expect("TR", Slot(3), 2, TssSelector)
            .Expect("back link", Tss2, 2, TssSelector).Expect("the old TSS is busy again", Gdt + TssSelector + 5, 1, 0x8b).Expect("the inner one is not", Gdt + OtherTss + 5, 1, 0x89)
            .Build("32: nested task through a task gate, and IRET");

        SystemBuilder interrupt = WithTask(Protected().InUserMode());
        interrupt.Gate32(13, OtherTss, 0, 0x85);
        interrupt.Assemble(UserCode, a => a.hlt());
        interrupt.Assemble(Scratch, a => { a.pop(__dword_ptr[Slot(0)]); a.mov(__dword_ptr[Slot(1)], esp); Exit(a); });
        yield return interrupt.Expect("error code", Slot(0), 4, 0).Expect("ESP", Slot(1), 4, 0x5800).Expect("saved EIP", Tss + 0x20, 4, UserCode).Expect("saved CS", Tss + 0x4c, 2, UserCode32)
            .Build("32: an exception through a task gate");

        SystemBuilder badStack = WithTask(Protected());
        badStack.Put(Tss2 + 0x50, ReadOnlyData, 2);
        badStack.Gate32(10, TaskGate, 0, 0x85);
        badStack.Descriptor(0xc8, 0x3400, 0x67, 0x89);
        FillTask(badStack, 0x3400, 0x9400);
        badStack.Gate32(10, 0xc8, 0, 0x85);
        badStack.Assemble(Program, a => a.jmp(OtherTss, 0));
        badStack.Assemble(0x9400, a => { a.pop(__dword_ptr[Slot(0)]); Exit(a); });
        yield return badStack.Expect("error: the selector", Slot(0), 4, ReadOnlyData).Expect("EIP of the new task", Tss2 + 0x20, 4, Scratch).Build("32: #TS in the new task, handled by a third");

        yield return ExceptionCases.Fault("32: #GP of a jump to a busy task", WithBusyTask(), _ => { }, a => a.jmp(OtherTss, 0), 13, OtherTss);
        SystemBuilder small = WithTask(Protected());
        small.Descriptor(OtherTss, Tss2, 0x66, 0x89);
        yield return ExceptionCases.Fault("32: #TS of a TSS that is too small", small, _ => { }, a => a.jmp(OtherTss, 0), 10, OtherTss);

        SystemBuilder trapped = WithTask(Protected());
        trapped.Put(Tss2 + 0x64, 1, 2);
        trapped.Assemble(Program, a => a.jmp(OtherTss, 0));
        trapped.Assemble(Scratch, a => a.nop());
        yield return trapped.Expect("vector", Slot(0), 4, 1).Expect("EIP", Slot(2), 4, Scratch).Build("32: the T flag of a TSS");

        SystemBuilder old = Protected();
        old.Descriptor(OtherTss, Tss2, 0x2b, 0x81);
        old.Put(Tss2 + 0x0e, 0x9400, 2);
        old.Put(Tss2 + 0x10, 2, 2);
        old.Put(Tss2 + 0x12, 0x4321, 2);
        old.Put(Tss2 + 0x1a, 0x5800, 2);
        old.Put(Tss2 + 0x22, Data, 2);
        old.Put(Tss2 + 0x24, Code16, 2);
        old.Put(Tss2 + 0x26, Data16, 2);
        old.Put(Tss2 + 0x28, Data, 2);
        old.Assemble(Program, a => a.jmp(OtherTss, 0));
        old.Assemble(0x9400, a => { a.mov(__word_ptr[(int)Results], ax); a.mov(__word_ptr[(int)Results + 8], sp); Exit(a); }, 16);
        yield return old.Expect("AX", Slot(0), 2, 0x4321).Expect("SP", Slot(1), 2, 0x5800).Build("32: task switch to a 16-bit TSS");
    }

    private static SystemBuilder WithBusyTask()
    {
        SystemBuilder b = WithTask(Protected());
        b.Descriptor(OtherTss, Tss2, 0x67, 0x8b);
        return b;
    }

    private static SystemBuilder WithTask(SystemBuilder b)
    {
        b.Descriptor(OtherTss, Tss2, 0x67, 0x89);
        FillTask(b, Tss2, Scratch);
        return b;
    }

    private static void FillTask(SystemBuilder b, ulong at, ulong eip)
    {
        b.Put(at + 0x20, eip, 4);
        b.Put(at + 0x24, 2, 4);
        b.Put(at + 0x28, 0x1111, 4);
        b.Put(at + 0x38, 0x5800, 4);
        b.Put(at + 0x60, 0, 8);
        ulong[] selectors = [Data, Code32, Data, Data, 0, 0];
        for (int i = 0; i < 6; i++)
            b.Put(at + 0x48 + (ulong)i * 4, selectors[i], 2);
    }
}
