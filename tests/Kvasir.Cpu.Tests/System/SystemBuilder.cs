using System;
using System.Collections.Generic;
using System.IO;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;
using static Iced.Intel.AssemblerRegisters;

namespace Kvasir.Cpu.Tests.Privileged;

/// <summary>
/// Lays out a small machine: descriptor tables, page tables, handlers that record what was delivered, and a program. Everything lies in the
/// first MiB, mapped one to one; user code and stack have pages of their own.
/// </summary>
internal sealed class SystemBuilder
{
    public const ulong Gdt = 0x1000;
    public const ulong Idt = 0x2000;
    public const ulong Tss = 0x3000;
    public const ulong Tss2 = 0x3800;
    public const ulong Results = 0x6000;
    public const ulong Stack0 = 0x5ff0;
    public const ulong Program = 0x8000;
    public const ulong Common = 0x9800;
    public const ulong Handlers = 0xa000;
    public const ulong Tables = 0x1_0000;
    public const ulong UserCode = 0x2_0000;
    public const ulong UserStack = 0x3_0ff0;
    public const ulong Ist1 = 0x4_0ff0;
    public const ulong Scratch = 0x5_0000;

    // Selectors.
    public const ushort Code64 = 0x08;
    public const ushort Data = 0x10;
    public const ushort Code32 = 0x18;
    public const ushort UserCode32 = 0x2b;
    public const ushort UserData = 0x33;
    public const ushort UserCode64 = 0x3b;
    public const ushort TssSelector = 0x40;
    public const ushort LdtSelector = 0x50;
    public const ushort Code16 = 0x60;
    public const ushort Data16 = 0x68;
    public const ushort CallGate = 0x70;
    public const ushort OtherTss = 0x80;
    public const ushort TaskGate = 0x90;
    public const ushort AbsentData = 0x98;
    public const ushort ReadOnlyData = 0xa0;
    public const ushort ExecuteOnly = 0xa8;
    public const ushort Conforming = 0xb0;
    public const ushort AbsentCode = 0xb8;
    public const ushort GdtLimit = 0xff;

    private readonly byte[] _memory = new byte[0x8_0000];
    private readonly List<MemoryExpectation> _expected = [];
    private readonly int _bits;

    private SystemBuilder(int bits) => _bits = bits;

    public CpuState State;

    /// <summary>Ring 0 of long mode.</summary>
    public static SystemBuilder Long()
    {
        SystemBuilder b = new(64);
        b.Descriptors();
        b.Descriptor(TssSelector, Tss, 0xfff, 0x8b);
        b.Put(Gdt + TssSelector + 8, 0, 8);
        b.Put(Tss + 4, Stack0, 8);
        b.Put(Tss + 36, Ist1, 8);
        b.Put(Tss + 0x66, 0x68, 2);
        for (ulong i = 0x87; i < 0x1000; i++)
            b.Put(Tss + i, 0xff, 1);
        b.IdentityMap();
        for (int v = 0; v < 48; v++)
            b.Gate64(v, Handlers + (ulong)v * 16, 0x8e, 0);
        b.StubHandlers();
        b.State = Base();
        b.State.Cr0 = (ulong)(Cr0.PE | Cr0.PG | Cr0.WP | Cr0.NE | Cr0.ET);
        b.State.Cr3 = Tables;
        b.State.Cr4 = (ulong)(Cr4.PAE | Cr4.PGE | Cr4.OSFXSR);
        b.State.Efer = (ulong)(Efer.LME | Efer.LMA | Efer.NXE | Efer.SCE);
        b.State.Cs = new SegmentState(Code64, 0, 0xffff_ffff, 0xa09b);
        b.State.Ss = new SegmentState(Data, 0, 0xffff_ffff, 0xc093);
        b.State.Ds = b.State.Es = b.State.Fs = b.State.Gs = b.State.Ss;
        b.State.Tr = new SegmentState(TssSelector, Tss, 0xfff, 0x8b);
        return b;
    }

    /// <summary>Ring 0 of 32-bit protected mode without paging.</summary>
    public static SystemBuilder Protected()
    {
        SystemBuilder b = new(32);
        b.Descriptors();
        b.Descriptor(TssSelector, Tss, 0x7ff, 0x8b);
        b.Put(Tss + 4, Stack0, 4);
        b.Put(Tss + 8, Data, 2);
        b.Put(Tss + 0x66, 0x88, 2);
        for (ulong i = 0xa7; i < 0x800; i++)
            b.Put(Tss + i, 0xff, 1);
        for (int v = 0; v < 48; v++)
            b.Gate32(v, Code32, (uint)(Handlers + (ulong)v * 16), 0x8e);
        b.StubHandlers();
        b.State = Base();
        b.State.Cr0 = (ulong)(Cr0.PE | Cr0.NE | Cr0.ET | Cr0.WP);
        b.State.Cs = new SegmentState(Code32, 0, 0xffff_ffff, 0xc09b);
        b.State.Ss = new SegmentState(Data, 0, 0xffff_ffff, 0xc093);
        b.State.Ds = b.State.Es = b.State.Fs = b.State.Gs = b.State.Ss;
        b.State.Tr = new SegmentState(TssSelector, Tss, 0x7ff, 0x8b);
        return b;
    }

    /// <summary>Real mode, segments at 0. Vectors 0-31 record at <see cref="Results"/> as the other modes' handlers do, with words.</summary>
    public static SystemBuilder Real()
    {
        SystemBuilder b = new(16);
        for (int v = 0; v < 48; v++)
            b.Put((ulong)v * 4, Handlers + (ulong)v * 16, 4);
        b.StubHandlers();
        b.Descriptors();
        b.State = CpuState.AtReset();
        b.State.Cs = new SegmentState(0, 0, 0xffff, 0x9b);
        b.State.Rip = Program;
        b.State.Gpr[4] = Stack0;
        b.State.Idtr = new TableState(0, 0x3ff);
        return b;
    }

    private static CpuState Base()
    {
        CpuState s = CpuState.AtReset();
        s.Rip = Program;
        s.Gpr[2] = 0;
        s.Gpr[4] = Stack0;
        s.Gdtr = new TableState(Gdt, GdtLimit);
        s.Idtr = new TableState(Idt, 0x2ff);
        s.Ldtr = new SegmentState(0, 0, 0, 0x1_0000);
        return s;
    }

    /// <summary>Goes on in ring 3 of the same kind of code, at <see cref="UserCode"/>.</summary>
    public SystemBuilder InUserMode()
    {
        State.Cs = _bits == 64 ? new SegmentState(UserCode64, 0, 0xffff_ffff, 0xa0fb) : new SegmentState(UserCode32, 0, 0xffff_ffff, 0xc0fb);
        State.Ss = new SegmentState(UserData, 0, 0xffff_ffff, 0xc0f3);
        State.Ds = State.Es = State.Fs = State.Gs = State.Ss;
        State.Rip = UserCode;
        State.Gpr[4] = UserStack;
        return this;
    }

    public void Put(ulong address, ulong value, int size)
    {
        for (int i = 0; i < size; i++)
            _memory[address + (ulong)i] = (byte)(value >> i * 8);
    }

    public ulong Get(ulong address, int size)
    {
        ulong value = 0;
        for (int i = 0; i < size; i++)
            value |= (ulong)_memory[address + (ulong)i] << i * 8;
        return value;
    }

    /// <summary>Writes a segment descriptor; attributes as in bits 8-23 of its upper half.</summary>
    public void Descriptor(ushort selector, ulong start, uint limit, uint attributes)
    {
        ulong raw = (limit & 0xffff) | (start & 0xff_ffff) << 16 | (ulong)(attributes & 0xf0ff) << 40 | (ulong)(limit & 0xf_0000) << 32 | (start >> 24 & 0xff) << 56;
        Put(Gdt + (selector & 0xfff8u), raw, 8);
    }

    public void Gate32(int vector, ushort selector, uint offset, byte type) => Put(Idt + (ulong)vector * 8, GateBits(selector, offset, type, 0), 8);

    public void Gate64(int vector, ulong offset, byte type, int ist, ushort selector = Code64)
    {
        Put(Idt + (ulong)vector * 16, GateBits(selector, (uint)offset, type, ist), 8);
        Put(Idt + (ulong)vector * 16 + 8, offset >> 32, 8);
    }

    /// <summary>A gate in the GDT.</summary>
    public void GdtGate(ushort at, ushort selector, ulong offset, byte type, int count = 0)
    {
        Put(Gdt + at, GateBits(selector, (uint)offset, type, count), 8);
        if (_bits == 64)
            Put(Gdt + at + 8u, offset >> 32, 8);
    }

    private static ulong GateBits(ushort selector, uint offset, byte type, int low) =>
        (offset & 0xffff) | (ulong)selector << 16 | (ulong)low << 32 | (ulong)type << 40 | (ulong)(offset >> 16) << 48;

    /// <summary>Assembles code somewhere and gives its length.</summary>
    public int Assemble(ulong address, Action<Assembler> program, int? bits = null)
    {
        Assembler assembler = new(bits ?? _bits);
        program(assembler);
        using MemoryStream stream = new();
        if (assembler.Instructions.Count > 0)
            assembler.Assemble(new StreamCodeWriter(stream), address);
        byte[] bytes = stream.ToArray();
        bytes.CopyTo(_memory, (long)address);
        return bytes.Length;
    }

    public SystemBuilder Expect(string what, ulong address, int size, ulong value)
    {
        _expected.Add(new MemoryExpectation(what, address, size, value));
        return this;
    }

    public SystemCase Build(string name, SystemEnd end = SystemEnd.Exit)
    {
        List<MemoryImage> images = [];
        for (int page = 0; page < _memory.Length; page += 4096)
        {
            byte[] bytes = _memory[page..(page + 4096)];
            if (bytes.AsSpan().ContainsAnyExcept((byte)0))
                images.Add(new MemoryImage((ulong)page, bytes));
        }
        return new SystemCase(name, State, images, end, [.. _expected]);
    }

    /// <summary>Ends the case; nothing after it runs.</summary>
    public static void Exit(Assembler a)
    {
        Label here = a.CreateLabel();
        a.@out((byte)SystemCase.ExitPort, al);
        a.Label(ref here);
        a.jmp(here);
    }

    /// <summary>Stores a register in a slot of the results.</summary>
    public static ulong Slot(int index) => Results + (ulong)index * 8;

    private void Descriptors()
    {
        Descriptor(Code64, 0, 0xf_ffff, 0xa09b);
        Descriptor(Data, 0, 0xf_ffff, 0xc093);
        Descriptor(Code32, 0, 0xf_ffff, 0xc09b);
        Descriptor(UserCode32, 0, 0xf_ffff, 0xc0fb);
        Descriptor(UserData, 0, 0xf_ffff, 0xc0f3);
        Descriptor(UserCode64, 0, 0xf_ffff, 0xa0fb);
        Descriptor(Code16, 0, 0xffff, 0x9b);
        Descriptor(Data16, 0, 0xffff, 0x93);
        Descriptor(AbsentData, 0, 0xf_ffff, 0xc013);
        Descriptor(ReadOnlyData, 0, 0xf_ffff, 0xc091);
        Descriptor(ExecuteOnly, 0, 0xf_ffff, 0xc099);
        Descriptor(Conforming, 0, 0xf_ffff, _bits == 64 ? 0xa09fu : 0xc09fu);
        Descriptor(AbsentCode, 0, 0xf_ffff, _bits == 64 ? 0xa01bu : 0xc01bu);
    }

    /// <summary>The first 2 MiB in 4 KiB pages: user code, user stack and scratch belong to ring 3.</summary>
    private void IdentityMap()
    {
        Put(Tables, (Tables + 0x1000) | 7, 8);
        Put(Tables + 0x1000, (Tables + 0x2000) | 7, 8);
        Put(Tables + 0x2000, (Tables + 0x3000) | 7, 8);
        for (ulong page = 0; page < 512; page++)
        {
            ulong address = page << 12;
            bool user = address is >= UserCode and < 0x4_0000 or >= Scratch and < 0x6_0000;
            Put(PageTableEntry(address), address | (user ? 7u : 3u), 8);
        }
    }

    /// <summary>Where the page-table entry of an address of the long-mode map lies.</summary>
    public static ulong PageTableEntry(ulong address) => Tables + 0x3000 + (address >> 12) * 8;

    private void StubHandlers()
    {
        for (int v = 0; v < 48; v++)
        {
            bool error = _bits != 16 && v is 8 or 10 or 11 or 12 or 13 or 14 or 17 or 21;
            int vector = v;
            Assemble(Handlers + (ulong)v * 16, a =>
            {
                if (!error || _bits == 16)
                    a.push(0);
                a.push(vector);
                a.jmp(Common);
            });
        }
        Assemble(Common, RecordAndExit);
    }

    /// <summary>Results: vector, error code, RIP, CS, RFLAGS, RSP, SS (of the outer level), CR2, then RSP of the handler.</summary>
    private void RecordAndExit(Assembler a)
    {
        switch (_bits)
        {
            case 64:
                for (int i = 0; i < 7; i++)
                    a.pop(__qword_ptr[Slot(i)]);
                a.mov(rax, cr2);
                a.mov(__qword_ptr[Slot(7)], rax);
                a.mov(__qword_ptr[Slot(8)], rsp);
                break;
            case 32:
                a.mov(ax, Data);
                a.mov(ds, ax);
                for (int i = 0; i < 5; i++)
                    a.pop(__dword_ptr[Slot(i)]);
                a.mov(__dword_ptr[Slot(8)], esp);
                for (int i = 5; i < 7; i++)
                    a.pop(__dword_ptr[Slot(i)]);
                a.mov(eax, cr2);
                a.mov(__dword_ptr[Slot(7)], eax);
                break;
            default:
                for (int i = 0; i < 5; i++)
                    a.pop(__word_ptr[Slot(i)]);
                a.mov(__word_ptr[Slot(8)], sp);
                break;
        }
        Exit(a);
    }
}
