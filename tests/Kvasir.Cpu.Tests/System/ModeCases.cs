using System;
using System.Collections.Generic;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Switches between modes, virtual-8086 mode, and port I/O.</summary>
internal static class ModeCases
{
    private const ulong V86Code = 0x6_0000;

    public static IEnumerable<SystemCase> All()
    {
        foreach (SystemCase test in Switches())
            yield return test;
        foreach (SystemCase test in Virtual8086())
            yield return test;
        foreach (SystemCase test in Ports())
            yield return test;
        foreach (SystemCase test in Segments())
            yield return test;
    }

    private static void Table(SystemBuilder b, ulong at, ushort limit, ulong start)
    {
        b.Put(at, limit, 2);
        b.Put(at + 2, start, 8);
    }

    private static IEnumerable<SystemCase> Switches()
    {
        SystemBuilder up = Real();
        Table(up, 0x7000, GdtLimit, Gdt);
        up.Assemble(Program, a =>
        {
            a.lgdt(__[0x7000]);
            a.mov(eax, cr0);
            a.or(eax, 1);
            a.mov(cr0, eax);
            a.jmp(Code32, 0x9000);
        });
        up.Assemble(0x9000, a => { a.mov(eax, Data); a.mov(ds, eax); a.mov(__dword_ptr[0x1_2345], 0x1234_5678); Exit(a); }, 32);
        yield return up.Expect("a store above 64 KiB", 0x1_2345, 4, 0x1234_5678).Build("real to protected mode");

        SystemBuilder unreal = Real();
        Table(unreal, 0x7000, GdtLimit, Gdt);
        unreal.Assemble(Program, a =>
        {
            a.lgdt(__[0x7000]);
            a.mov(eax, cr0);
            a.inc(ax);
            a.mov(cr0, eax);
            a.mov(bx, Data);
            a.mov(ds, bx);
            a.dec(ax);
            a.mov(cr0, eax);
            a.xor(bx, bx);
            a.mov(ds, bx);
            a.mov(esi, 0x5_4320);
            a.mov(__dword_ptr[esi], 0x1122_3344);
            Exit(a);
        });
        yield return unreal.Expect("a store beyond 64 KiB of real mode", 0x5_4320, 4, 0x1122_3344).Build("unreal mode");

        SystemBuilder down = Protected();
        down.Assemble(Program, a => a.jmp(Code16, 0x9000));
        down.Assemble(0x9000, a =>
        {
            a.mov(ax, Data16);
            a.mov(ds, ax);
            a.mov(ss, ax);
            a.mov(eax, cr0);
            a.and(al, 0xfe);
            a.mov(cr0, eax);
            a.jmp(0x100, 0x8300);
        }, 16);
        down.Assemble(0x9300, a =>
        {
            a.mov(ax, 0x200);
            a.mov(ds, ax);
            a.mov(__word_ptr[0x4000], 0x4242);
            a.mov(ax, cs);
            a.mov(__word_ptr[0x4008], ax);
            Exit(a);
        }, 16);
        yield return down.Expect("DS is a shift", Slot(0), 2, 0x4242).Expect("CS", Slot(1), 2, 0x100).Build("protected to real mode");

        SystemBuilder full = Real();
        FillLongTables(full);
        Table(full, 0x7000, GdtLimit, Gdt);
        full.Assemble(Program, a =>
        {
            a.lgdt(__[0x7000]);
            a.mov(eax, 0x20);
            a.mov(cr4, eax);
            a.mov(eax, (int)Tables);
            a.mov(cr3, eax);
            a.mov(ecx, 0xc000_0080);
            a.rdmsr();
            a.or(eax, 0x100);
            a.wrmsr();
            a.mov(eax, cr0);
            a.or(eax, 0x8000_0001);
            a.mov(cr0, eax);
            a.jmp(Code64, 0x9000);
        });
        full.Assemble(0x9000, a =>
        {
            a.mov(rax, 0x1122_3344_5566_7788);
            a.mov(__qword_ptr[Results], rax);
            a.mov(ecx, 0xc000_0080);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        }, 64);
        yield return full.Expect("64-bit store", Slot(0), 8, 0x1122_3344_5566_7788).Expect("EFER.LMA", Slot(1), 4, 0x500).Build("real to long mode at once");

        SystemBuilder leave = Long();
        leave.Put(0x7000, 0x9000, 4);
        leave.Put(0x7004, Code32, 2);
        leave.Assemble(Program, a => a.jmp(__fword_ptr[0x7000]));
        leave.Assemble(0x9000, a =>
        {
            a.mov(eax, cr0);
            a.and(eax, 0x7fff_ffff);
            a.mov(cr0, eax);
            a.mov(ecx, 0xc000_0080);
            a.rdmsr();
            a.mov(__dword_ptr[Slot(0)], eax);
            a.and(eax, ~0x100);
            a.wrmsr();
            a.xor(eax, eax);
            a.mov(cr4, eax);
            a.mov(__dword_ptr[Slot(1)], 0x99);
            Exit(a);
        }, 32);
        yield return leave.Expect("LMA is clear, LME is not", Slot(0), 4, 0x901).Expect("and on", Slot(1), 4, 0x99).Build("long to protected mode");

        SystemBuilder lmsw = Real();
        lmsw.Assemble(Program, a =>
        {
            a.mov(ax, 9);
            a.lmsw(ax);
            a.mov(ax, 0);
            a.lmsw(ax);
            a.smsw(eax);
            a.mov(__dword_ptr[(int)Results], eax);
            Exit(a);
        });
        yield return lmsw.Expect("PE stays, TS went", Slot(0), 4, 0x6000_0011).Build("LMSW sets PE but does not clear it");
    }

    private static void FillLongTables(SystemBuilder b)
    {
        b.Put(Tables, (Tables + 0x1000) | 3, 8);
        b.Put(Tables + 0x1000, (Tables + 0x2000) | 3, 8);
        b.Put(Tables + 0x2000, 0x83, 8);
    }

    /// <summary>A virtual-8086 program at <see cref="V86Code"/>, entered by IRETD from ring 0.</summary>
    private static SystemBuilder V86(Action<Assembler> program, uint flags = 0x2_0202)
    {
        SystemBuilder b = Protected();
        b.Assemble(Program, a =>
        {
            a.push(0x1000);
            a.push(0x2000);
            a.push(0x3000);
            a.push(0x4000);
            a.push(0x6800);
            a.push(0x0ff0);
            a.push((int)flags);
            a.push(0x6000);
            a.push(0);
            a.iretd();
        });
        b.Assemble(V86Code, program, 16);
        return b;
    }

    private static IEnumerable<SystemCase> Virtual8086()
    {
        SystemBuilder enter = V86(a => { a.mov(ax, ds); a.mov(__word_ptr[0x100], ax); a.hlt(); });
        yield return enter.Expect("DS, stored through DS × 16", 0x3_0100, 2, 0x3000).Expect("vector", Slot(0), 4, 13).Expect("IP", Slot(2), 4, 5).Expect("CS", Slot(3), 4, 0x6000)
            .Expect("flags", Slot(4), 4, 0x3_0202).Expect("SP", Slot(5), 4, 0xff0).Expect("SS", Slot(6), 4, 0x6800).Expect("ESP", Slot(8), 4, Stack0 - 24).Build("v86: entry, and #GP of HLT");

        SystemBuilder frame = V86(a => a.ud2());
        frame.Gate32(6, Code32, (uint)Scratch, 0x8e);
        frame.Assemble(Scratch, a =>
        {
            a.mov(eax, ds);
            a.mov(edx, Data);
            a.mov(ds, edx);
            a.mov(__dword_ptr[Slot(10)], eax);
            for (int i = 0; i < 9; i++)
                a.pop(__dword_ptr[Slot(i)]);
            Exit(a);
        });
        yield return frame.Expect("ES", Slot(5), 4, 0x4000).Expect("DS", Slot(6), 4, 0x3000).Expect("FS", Slot(7), 4, 0x2000).Expect("GS", Slot(8), 4, 0x1000).Expect("DS in the handler", Slot(10), 4, 0)
            .Build("v86: the handler's frame holds the data segments");

        yield return V86(a => a.@int(0x21)).Expect("vector", Slot(0), 4, 13).Expect("error", Slot(1), 4, 0).Build("v86: #GP of INT n below IOPL 3");
        yield return V86(a => a.pushf()).Expect("vector", Slot(0), 4, 13).Build("v86: #GP of PUSHF below IOPL 3");
        yield return V86(a => a.cli()).Expect("vector", Slot(0), 4, 13).Build("v86: #GP of CLI below IOPL 3");
        yield return V86(a => a.lldt(ax)).Expect("vector", Slot(0), 4, 6).Build("v86: #UD of LLDT");
        yield return V86(a => { a.@in(al, 0x80); a.@in(al, 0xff); }).Expect("vector", Slot(0), 4, 13).Expect("IP", Slot(2), 4, 2).Build("v86: the I/O bitmap applies at any IOPL");

        SystemBuilder trusted = V86(a => { a.cli(); a.pushf(); a.pop(ax); a.mov(__word_ptr[0x100], ax); a.sti(); a.@int(0x21); }, 0x2_3202);
        trusted.Gate32(0x21, Code32, (uint)(Handlers + 0x21 * 16), 0xee);
        yield return trusted.Expect("flags", 0x3_0100, 2, 0x3002).Expect("vector", Slot(0), 4, 0x21).Build("v86: IOPL 3 owns IF and may INT");

        SystemBuilder vme = V86(a =>
        {
            a.pushf();
            a.pop(ax);
            a.mov(__word_ptr[0x100], ax);
            a.cli();
            a.pushf();
            a.pop(ax);
            a.mov(__word_ptr[0x102], ax);
            a.sti();
            a.@int(0x21);
            a.mov(__word_ptr[0x106], 0x1111);
            a.@int(0x22);
        });
        vme.State.Cr4 |= (ulong)Cr4.VME;
        // The redirection bitmap lies before the I/O bitmap, at 68h; vector 22h is not redirected.
        vme.Put(Tss + 0x68, 0, 8);
        vme.Put(Tss + 0x68 + 4, 1 << 2, 1);
        vme.Put(0x21 * 4, 0x6000_0400, 4);
        vme.Assemble(V86Code + 0x400, a => { a.pushf(); a.pop(ax); a.mov(__word_ptr[0x104], ax); a.iret(); }, 16);
        yield return vme.Expect("IF and IOPL as the program sees them", 0x3_0100, 2, 0x3002).Expect("after CLI", 0x3_0102, 2, 0x3002).Expect("inside INT", 0x3_0104, 2, 0x3002)
            .Expect("after IRET", 0x3_0106, 2, 0x1111).Expect("vector", Slot(0), 4, 13).Expect("VIF is set again", Slot(4), 4, 0xb_0202).Build("v86: VME");

        SystemBuilder wide = V86(a => a.mov(ax, __word_ptr[0xffff]));
        yield return wide.Expect("vector", Slot(0), 4, 13).Build("v86: #GP of a word at FFFFh");
    }

    private static IEnumerable<SystemCase> Ports()
    {
        SystemBuilder strings = Long();
        strings.Put(Scratch, 0x1122_3344, 4);
        strings.Assemble(Program, a =>
        {
            a.mov(edx, 0x80);
            a.mov(esi, (int)Scratch);
            a.outsd();
            a.mov(edi, (int)Scratch + 0x100);
            a.mov(ecx, 4);
            a.rep.insw();
            a.mov(__qword_ptr[Slot(0)], rdi);
            a.mov(__qword_ptr[Slot(1)], rcx);
            a.mov(__qword_ptr[Slot(2)], rsi);
            a.@in(eax, dx);
            a.mov(__dword_ptr[Slot(3)], eax);
            Exit(a);
        });
        yield return strings.Expect("memory", Scratch + 0x100, 8, 0x3344_3344_3344_3344).Expect("RDI", Slot(0), 8, Scratch + 0x108).Expect("RCX", Slot(1), 8, 0).Expect("RSI", Slot(2), 8, Scratch + 4)
            .Expect("IN", Slot(3), 4, 0x1122_3344).Build("ports: OUTSD, REP INSW, IN");

        SystemBuilder fault = Long();
        fault.Put(PageTableEntry(Scratch + 0x1000), 0, 8);
        fault.Assemble(Program, a => { a.mov(edx, 0x80); a.mov(edi, (int)Scratch + 0xffc); a.mov(ecx, 10); a.rep.insw(); });
        fault.Gate64(14, 0x9000, 0x8e, 0);
        fault.Assemble(0x9000, a => { a.mov(__qword_ptr[Slot(0)], rcx); a.mov(__qword_ptr[Slot(1)], rdi); Exit(a); });
        yield return fault.Expect("RCX", Slot(0), 8, 8).Expect("RDI", Slot(1), 8, Scratch + 0x1000).Build("ports: a page fault inside REP INSW is exact");

        SystemBuilder down = Protected();
        down.Put(Scratch, 0xaabb, 2);
        down.Assemble(Program, a => { a.std(); a.mov(edx, 0x80); a.mov(esi, (int)Scratch + 1); a.mov(ecx, 2); a.rep.outsb(); a.@in(al, 0x80); a.mov(__byte_ptr[Results], al); a.mov(__dword_ptr[Slot(1)], esi); Exit(a); });
        yield return down.Expect("the last byte", Slot(0), 1, 0xbb).Expect("ESI", Slot(1), 4, Scratch - 1).Build("ports: REP OUTSB downwards");
    }

    private static IEnumerable<SystemCase> Segments()
    {
        SystemBuilder examine = Protected();
        examine.Assemble(Program, a =>
        {
            a.mov(ecx, ReadOnlyData);
            a.lar(eax, ecx);
            a.mov(__dword_ptr[Slot(0)], eax);
            a.lsl(eax, ecx);
            a.mov(__dword_ptr[Slot(1)], eax);
            a.verr(cx);
            a.setz(__byte_ptr[Slot(2)]);
            a.verw(cx);
            a.setz(__byte_ptr[Slot(3)]);
            a.mov(ecx, ExecuteOnly);
            a.verr(cx);
            a.setz(__byte_ptr[Slot(4)]);
            a.mov(ecx, 0xfff8);
            a.lar(eax, ecx);
            a.setz(__byte_ptr[Slot(5)]);
            a.mov(ecx, TssSelector);
            a.lsl(eax, ecx);
            a.mov(__dword_ptr[Slot(6)], eax);
            Exit(a);
        });
        yield return examine.Expect("LAR", Slot(0), 4, 0x00cf_9100).Expect("LSL", Slot(1), 4, 0xffff_ffff).Expect("VERR", Slot(2), 1, 1).Expect("VERW of read-only data", Slot(3), 1, 0)
            .Expect("VERR of execute-only code", Slot(4), 1, 0).Expect("LAR beyond the table", Slot(5), 1, 0).Expect("LSL of the TSS", Slot(6), 4, 0x7ff).Build("32: LAR, LSL, VERR, VERW");

        SystemBuilder arpl = Protected();
        arpl.Assemble(Program, a =>
        {
            a.mov(eax, 0x100);
            a.mov(ecx, 3);
            a.arpl(ax, cx);
            a.setz(__byte_ptr[Slot(1)]);
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(ecx, 2);
            a.arpl(ax, cx);
            a.setz(__byte_ptr[Slot(2)]);
            Exit(a);
        });
        yield return arpl.Expect("RPL raised", Slot(0), 4, 0x103).Expect("ZF", Slot(1), 1, 1).Expect("not lowered", Slot(2), 1, 0).Build("32: ARPL");

        SystemBuilder accessed = Protected();
        accessed.Descriptor(0xc8, 0x1_0000, 0xfff, 0x4092);
        accessed.Assemble(Program, a => { a.mov(eax, 0xc8); a.mov(gs, eax); a.mov(__dword_ptr.gs[0x10], 0x55); Exit(a); });
        yield return accessed.Expect("store through the base", 0x1_0010, 4, 0x55).Expect("the accessed bit", Gdt + 0xc8 + 5, 1, 0x93).Build("32: loading a segment marks it accessed");

        SystemBuilder down = Protected();
        down.Descriptor(0xc8, 0, 0xfff, 0x4096);
        down.Assemble(Program, a => { a.mov(eax, 0xc8); a.mov(gs, eax); a.mov(__dword_ptr.gs[0x1000], 0x66); a.mov(__dword_ptr.gs[0xffd], 0x77); });
        yield return down.Expect("above the limit", 0x1000, 4, 0x66).Expect("vector", Slot(0), 4, 13).Build("32: an expand-down segment");

        SystemBuilder ldt = Long();
        ldt.Descriptor(LdtSelector, 0x7000, 0x1f, 0x82);
        ldt.Put(0x7008, ldt.Get(Gdt + Data, 8), 8);
        ldt.Assemble(Program, a =>
        {
            a.mov(eax, LdtSelector);
            a.lldt(ax);
            a.mov(eax, 0xc);
            a.mov(fs, eax);
            a.mov(ecx, fs);
            a.mov(__dword_ptr[Slot(0)], ecx);
            a.sldt(edx);
            a.mov(__dword_ptr[Slot(1)], edx);
            a.sgdt(__[Slot(2)]);
            a.str(eax);
            a.mov(__dword_ptr[Slot(4)], eax);
            Exit(a);
        });
        yield return ldt.Expect("FS", Slot(0), 4, 0xc).Expect("LDTR", Slot(1), 4, LdtSelector).Expect("GDT limit", Slot(2), 2, GdtLimit).Expect("GDT base", Slot(2) + 2, 8, Gdt).Expect("TR", Slot(4), 4, TssSelector)
            .Build("long: LLDT, SLDT, SGDT, STR");

        SystemBuilder bases = ExceptionCases.WithCr4(Long(), Cr4.FSGSBASE);
        bases.Assemble(Program, a =>
        {
            a.mov(rax, (long)Scratch);
            a.wrfsbase(rax);
            a.mov(__dword_ptr.fs[0x20], 0x77);
            a.rdfsbase(rcx);
            a.mov(__qword_ptr[Slot(0)], rcx);
            a.push(fs);
            a.pop(gs);
            a.mov(eax, gs);
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        });
        yield return bases.Expect("store through FS", Scratch + 0x20, 4, 0x77).Expect("FS base", Slot(0), 8, Scratch).Expect("GS", Slot(1), 4, Data).Build("long: WRFSBASE, RDFSBASE, PUSH and POP of segments");
    }
}
