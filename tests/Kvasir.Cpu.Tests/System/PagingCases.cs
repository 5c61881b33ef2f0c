using System;
using System.Collections.Generic;
using Iced.Intel;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;
using static Kvasir.Cpu.Tests.Privileged.SystemBuilder;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>Paging in its three forms, with all rights, and what invalidates translations.</summary>
internal static class PagingCases
{
    private const ulong Accessed = (ulong)PageEntry.Accessed;
    private const ulong Dirty = (ulong)PageEntry.Dirty;

    public static IEnumerable<SystemCase> All()
    {
        foreach (SystemCase test in Rights())
            yield return test;
        foreach (SystemCase test in Forms())
            yield return test;
        foreach (SystemCase test in Invalidation())
            yield return test;
    }

    private static SystemBuilder Page(SystemBuilder b, ulong address, ulong entry)
    {
        b.Put(PageTableEntry(address), entry, 8);
        return b;
    }

    private static void Nothing(Assembler a)
    {
    }

    private static IEnumerable<SystemCase> Rights()
    {
        SystemBuilder marks = Long();
        marks.Assemble(Program, a => { a.mov(eax, __dword_ptr[Scratch]); a.mov(__dword_ptr[Scratch + 0x1000], eax); Exit(a); });
        yield return marks.Expect("read: A", PageTableEntry(Scratch), 8, Scratch | 7 | Accessed).Expect("write: A and D", PageTableEntry(Scratch + 0x1000), 8, (Scratch + 0x1000) | 7 | Accessed | Dirty)
            .Expect("the directory: A", Tables + 0x2000, 8, (Tables + 0x3000) | 7 | Accessed).Build("paging: accessed and dirty bits");

        yield return ExceptionCases.Fault("paging: CR0.WP protects from ring 0", Page(Long(), Scratch, Scratch | 1), Nothing, a => a.mov(__dword_ptr[Scratch], eax), 14, 3);
        SystemBuilder free = Page(Long(), Scratch, Scratch | 1);
        free.State.Cr0 &= ~(ulong)Cr0.WP;
        free.Assemble(Program, a => { a.mov(__dword_ptr[Scratch], 0x55); Exit(a); });
        yield return free.Expect("written", Scratch, 4, 0x55).Build("paging: without CR0.WP ring 0 writes");
        yield return ExceptionCases.Fault("paging: a read-only page of ring 3", Page(Long().InUserMode(), Scratch, Scratch | 5), Nothing, a => a.mov(__dword_ptr[Scratch], eax), 14, 7);
        yield return ExceptionCases.Fault("paging: reserved bits", Page(Long(), Scratch, Scratch | 3 | 1ul << 51), Nothing, a => a.mov(eax, __dword_ptr[Scratch]), 14, 9);

        SystemBuilder nx = Page(Long(), Scratch, Scratch | 3 | 1ul << 63);
        nx.Assemble(Program, a => a.jmp(Scratch));
        yield return nx.Expect("vector", Slot(0), 4, 14).Expect("error", Slot(1), 4, 0x11).Expect("RIP", Slot(2), 8, Scratch).Build("paging: NX");

        SystemBuilder noNx = Page(Long(), Scratch, Scratch | 3 | 1ul << 63);
        noNx.State.Efer &= ~(ulong)Efer.NXE;
        yield return ExceptionCases.Fault("paging: NX is reserved without EFER.NXE", noNx, Nothing, a => a.mov(eax, __dword_ptr[Scratch]), 14, 9);

        SystemBuilder smep = ExceptionCases.WithCr4(Long(), Cr4.SMEP);
        smep.Assemble(Program, a => a.jmp(UserCode));
        yield return smep.Expect("vector", Slot(0), 4, 14).Expect("error", Slot(1), 4, 0x11).Expect("RIP", Slot(2), 8, UserCode).Build("paging: SMEP");

        yield return ExceptionCases.Fault("paging: SMAP", ExceptionCases.WithCr4(Long(), Cr4.SMAP), a => { a.stac(); a.mov(eax, __dword_ptr[Scratch]); a.clac(); }, a => a.mov(eax, __dword_ptr[Scratch]), 14, 1);
        yield return ExceptionCases.Fault("paging: SMAP, a write", ExceptionCases.WithCr4(Long(), Cr4.SMAP), Nothing, a => a.mov(__dword_ptr[Scratch], eax), 14, 3);
        yield return ExceptionCases.Fault("user: STAC is #UD in ring 3", ExceptionCases.WithCr4(Long().InUserMode(), Cr4.SMAP), Nothing, a => a.stac(), 6);

        SystemBuilder popf = ExceptionCases.WithCr4(Long(), Cr4.SMAP);
        popf.Assemble(Program, a => { a.push(0x4_0002); a.popfq(); a.mov(__dword_ptr[Scratch], 0x11); a.push(2); a.popfq(); a.mov(__dword_ptr[Scratch], 0x22); });
        yield return popf.Expect("the first store", Scratch, 4, 0x11).Expect("vector", Slot(0), 4, 14).Build("paging: POPF opens and closes user pages");

        SystemBuilder crossing = Page(Long(), Scratch + 0x1000, 0);
        crossing.Assemble(Program, a => { a.mov(rax, 0x1122_3344_5566_7788); a.mov(__qword_ptr[Scratch + 0xffc], rax); });
        yield return crossing.Expect("nothing was written", Scratch + 0xffc, 4, 0).Expect("CR2 is the second page", Slot(7), 8, Scratch + 0x1000).Build("paging: a store across pages faults whole");

        SystemBuilder push = Page(Long(), 0x5000, 0x5000);
        push.State.Gpr[4] = 0x6000;
        push.Gate64(14, 0x9000, 0x8e, 1);
        push.Assemble(Program, a => a.push(rax));
        push.Assemble(0x9000, a => { a.mov(rax, __qword_ptr[rsp + 32]); a.mov(__qword_ptr[Slot(0)], rax); Exit(a); });
        yield return push.Expect("RSP did not change", Slot(0), 8, 0x6000).Build("paging: PUSH that faults");
    }

    private static IEnumerable<SystemCase> Forms()
    {
        SystemBuilder two = Protected();
        two.Put(Tables, (Tables + 0x1000) | 7, 4);
        two.Put(Tables + 4, 0x87, 4);
        for (ulong page = 0; page < 1024; page++)
            two.Put(Tables + 0x1000 + page * 4, page << 12 | 7, 4);
        two.Assemble(Program, a =>
        {
            a.mov(eax, (int)Tables);
            a.mov(cr3, eax);
            a.mov(eax, 0x10);
            a.mov(cr4, eax);
            a.mov(eax, cr0);
            a.or(eax, 0x8000_0000);
            a.mov(cr0, eax);
            // 4 MiB page at 400000h shows address 0.
            a.mov(__dword_ptr[0x40_0000 + (int)Scratch], 0x77);
            a.mov(eax, __dword_ptr[0x80_0000]);
        });
        yield return two.Expect("through the large page", Scratch, 4, 0x77).Expect("its A and D", Tables + 4, 4, 0xe7).Expect("vector", Slot(0), 4, 14).Expect("CR2", Slot(7), 4, 0x80_0000).Build("paging: two levels, 4 MiB pages");

        SystemBuilder pae = Protected();
        pae.Put(Tables, (Tables + 0x1000) | 1, 8);
        pae.Put(Tables + 0x1000, 0x83, 8);
        pae.Put(Tables + 0x1008, (Tables + 0x2000) | 3, 8);
        pae.Put(Tables + 0x2000, Scratch | 3, 8);
        pae.Put(Tables + 0x2008, 1ul << 32 | Scratch | 3, 8);
        pae.Assemble(Program, a =>
        {
            a.mov(eax, (int)Tables);
            a.mov(cr3, eax);
            a.mov(eax, 0x20);
            a.mov(cr4, eax);
            a.mov(eax, cr0);
            a.or(eax, 0x8000_0000);
            a.mov(cr0, eax);
            a.mov(__dword_ptr[0x20_0010], 0x88);
            a.mov(eax, __dword_ptr[0x20_1010]);
            a.mov(__dword_ptr[0x20_0020], eax);
            a.mov(eax, __dword_ptr[0x4000_0000]);
        });
        yield return pae.Expect("through the small page", Scratch + 0x10, 4, 0x88).Expect("nothing above 4 GiB", Scratch + 0x20, 4, 0xffff_ffff).Expect("its A and D", Tables + 0x2000, 8, Scratch | 0x63).Expect("vector", Slot(0), 4, 14).Build("paging: PAE");

        SystemBuilder reserved = Protected();
        reserved.State.Cr4 = (ulong)Cr4.PAE;
        reserved.State.Cr3 = Tables;
        reserved.Put(Tables, (Tables + 0x1000) | 3, 8);
        yield return ExceptionCases.Fault("paging: #GP of a PDPTE with reserved bits", reserved, a => { a.mov(eax, cr0); a.or(eax, 0x8000_0000); }, a => a.mov(cr0, eax), 13);

        SystemBuilder huge = Long();
        huge.Put(Tables + 0x1000 + 8, 0x83, 8);
        huge.Put(Tables + 0x2000 + 8, 0x83, 8);
        huge.Assemble(Program, a =>
        {
            a.mov(__dword_ptr[0x4000_0000 + (int)Scratch], 0x99);
            a.mov(__dword_ptr[0x20_0000 + (int)Scratch + 4], 0xaa);
            Exit(a);
        });
        yield return huge.Expect("through 1 GiB", Scratch, 4, 0x99).Expect("through 2 MiB", Scratch + 4, 4, 0xaa).Expect("A and D", Tables + 0x1008, 8, 0xe3).Build("paging: 2 MiB and 1 GiB pages");

        SystemBuilder high = Long();
        high.Put(Tables + 511 * 8, (Tables + 0x1000) | 3, 8);
        high.Assemble(Program, a => { a.mov(rax, unchecked((long)0xffff_ff80_0000_0000 + (long)Scratch)); a.mov(__dword_ptr[rax], 0x12); Exit(a); });
        yield return high.Expect("through the upper half", Scratch, 4, 0x12).Build("paging: the upper half");
    }

    private static IEnumerable<SystemCase> Invalidation()
    {
        ulong entry = PageTableEntry(Scratch);
        const ulong other = 0x6_0000;

        SystemBuilder invlpg = Long();
        invlpg.Put(Scratch, 1, 4);
        invlpg.Put(other, 2, 4);
        invlpg.Assemble(Program, a =>
        {
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(__dword_ptr[entry], (int)other | 3);
            a.invlpg(__[Scratch]);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        });
        yield return invlpg.Expect("before", Slot(0), 4, 1).Expect("after", Slot(1), 4, 2).Build("paging: INVLPG");

        SystemBuilder reload = Long();
        reload.Put(Scratch, 1, 4);
        reload.Put(other, 2, 4);
        reload.Assemble(Program, a =>
        {
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[entry], (int)other | 3);
            a.mov(rcx, cr3);
            a.mov(cr3, rcx);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        });
        yield return reload.Expect("after", Slot(1), 4, 2).Build("paging: loading CR3 drops translations");

        SystemBuilder global = Long();
        global.Put(Scratch, 1, 4);
        global.Put(other, 2, 4);
        global.Put(entry, Scratch | 0x103, 8);
        global.Assemble(Program, a =>
        {
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[entry], (int)other | 0x103);
            a.mov(rcx, cr4);
            a.xor(cl, 0x80);
            a.mov(cr4, rcx);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(1)], eax);
            Exit(a);
        });
        yield return global.Expect("after", Slot(1), 4, 2).Build("paging: clearing CR4.PGE drops global translations");

        SystemBuilder pcid = ExceptionCases.WithCr4(Long(), Cr4.PCIDE);
        pcid.Put(Tables + 0x8000, (Tables + 0x9000) | 3, 8);
        pcid.Put(Tables + 0x9000, (Tables + 0xa000) | 3, 8);
        pcid.Put(Tables + 0xa000, (Tables + 0xb000) | 3, 8);
        for (ulong page = 0; page < 512; page++)
            pcid.Put(Tables + 0xb000 + page * 8, (page << 12 == Scratch ? other : page << 12) | 3, 8);
        pcid.Put(Scratch, 1, 4);
        pcid.Put(other, 2, 4);
        pcid.Assemble(Program, a =>
        {
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(0)], eax);
            a.mov(rcx, (long)(Tables + 0x8000) | 5);
            a.mov(cr3, rcx);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(1)], eax);
            a.mov(rcx, unchecked((long)(Tables | 1ul << 63)));
            a.mov(cr3, rcx);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(2)], eax);
            a.mov(rax, cr3);
            a.mov(__qword_ptr[Slot(3)], rax);
            // Type 1 drops PCID 5, type 3 the rest.
            a.mov(__qword_ptr[Scratch + 0x100], 5);
            a.mov(eax, 1);
            a.invpcid(rax, __xmmword_ptr[Scratch + 0x100]);
            a.mov(eax, 3);
            a.invpcid(rax, __xmmword_ptr[Scratch + 0x100]);
            a.mov(eax, __dword_ptr[Scratch]);
            a.mov(__dword_ptr[Slot(4)], eax);
            Exit(a);
        });
        yield return pcid.Expect("PCID 0", Slot(0), 4, 1).Expect("PCID 5", Slot(1), 4, 2).Expect("PCID 0 again", Slot(2), 4, 1).Expect("bit 63 does not stay", Slot(3), 8, Tables).Expect("after INVPCID", Slot(4), 4, 1)
            .Build("paging: PCIDs and INVPCID");
        yield return ExceptionCases.Fault("paging: #GP of INVPCID type 4", Long(), a => a.mov(eax, 4), a => a.invpcid(rax, __xmmword_ptr[Scratch]), 13);

        SystemBuilder selfModifying = Long();
        selfModifying.Assemble(Program, a =>
        {
            Label again = a.CreateLabel();
            a.xor(ecx, ecx);
            a.Label(ref again);
            a.call(0x9000);
            a.mov(__byte_ptr[0x9001], 0x22);
            a.inc(ecx);
            a.cmp(ecx, 2);
            a.jne(again);
            a.mov(__dword_ptr[Slot(0)], eax);
            Exit(a);
        });
        selfModifying.Assemble(0x9000, a => { a.mov(eax, 0x11); a.ret(); });
        yield return selfModifying.Expect("the second call's value", Slot(0), 4, 0x22).Build("paging: code that changes itself");
    }
}
