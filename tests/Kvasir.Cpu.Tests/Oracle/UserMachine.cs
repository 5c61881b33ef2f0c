using System;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>
/// The machine that a user program of the host sees, as guest memory and state: ring 3 in 64-bit mode, the same descriptors, the window mapped. Every exception
/// writes its vector's number to the port of that number.
/// </summary>
internal static unsafe class UserMachine
{
    public const ulong MemorySize = 2ul << 20;
    public const ulong KernelLinear = 0xffff_8000_0000_0000;
    public const ulong WindowPhysical = 0x10_0000;

    public const ulong Gdt = 0x8000;
    public const ulong Ldt = 0x9000;
    public const ulong Tss = 0xa000;
    public const ulong Idt = 0xb000;
    public const uint TssLimit = 0x67;

    /// <summary>Vectors that have a gate.</summary>
    public const int Vectors = 32;

    private const ulong Pml4 = 0x1000;
    private const ulong KernelPdpt = 0x2000;
    private const ulong KernelDirectory = 0x3000;
    private const ulong KernelTable = 0x4000;
    private const ulong UserPdpt = 0x5000;
    private const ulong UserDirectory = 0x6000;
    private const ulong UserTable = 0x7000;
    private const ulong Handlers = 0xc000;
    private const ulong StackEnd = 0xe000;
    private const ulong TssBitmapBase = 0x66;
    private const ulong TssRsp0 = 4;

    /// <summary>Linux's.</summary>
    private const ushort KernelCode = 0x10;

    /// <summary>Lays out a guest's memory.</summary>
    /// <param name="memory">Of <see cref="MemorySize"/> or more.</param>
    /// <param name="pristine">The window's contents.</param>
    public static void Fill(GuestMemory memory, byte* pristine)
    {
        byte* host = memory.Host;
        FillTables(host);
        foreach (ushort selector in Descriptors.Loadable)
        {
            SegmentState segment = Descriptors.Load(selector);
            if ((segment.Attributes & (uint)SegmentAttributes.Unusable) == 0)
                Put(host, ((selector & 4) != 0 ? Ldt : Gdt) + (selector & 0xfff8u), Descriptors.Encode(segment));
        }
        // The I/O permission bitmap lies beyond the limit: no port is allowed.
        *(ushort*)(host + Tss + TssBitmapBase) = (ushort)TssLimit + 1;
        byte* window = host + WindowPhysical;
        Buffer.MemoryCopy(pristine, window, Window.Size, Window.Size);
        new Span<byte>(window, 0x2000).Fill(0xcc);
    }

    /// <summary>Adds what takes exceptions: gates, handlers, a stack.</summary>
    public static void FillHandlers(GuestMemory memory)
    {
        byte* host = memory.Host;
        const ulong code64 = 0x00af_9b00_0000_ffff;
        Put(host, Gdt + KernelCode, code64);
        *(ulong*)(host + Tss + TssRsp0) = KernelLinear + StackEnd;
        for (uint vector = 0; vector < Vectors; vector++)
        {
            ulong handler = KernelLinear + Handlers + vector * 8;
            // INT3 and INTO come from ring 3.
            ulong type = vector is 3 or 4 ? 0xee00ul : 0x8e00;
            Put(host, Idt + vector * 16, handler & 0xffff | (ulong)KernelCode << 16 | type << 32 | (handler & 0xffff_0000) << 32);
            Put(host, Idt + vector * 16 + 8, handler >> 32);
            // out vector, al; jmp -2
            *(uint*)(host + Handlers + vector * 8) = 0xfeeb_00e6 | vector << 8;
        }
    }

    /// <summary>A program's state before registers are loaded.</summary>
    public static CpuState InitialState()
    {
        CpuState state = CpuState.AtReset();
        state.Rflags = 0x202;
        state.Cr0 = (ulong)(Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG);
        state.Cr3 = Pml4;
        state.Cr4 = (ulong)(Cr4.DE | Cr4.PSE | Cr4.PAE | Cr4.MCE | Cr4.PGE | Cr4.OSFXSR | Cr4.OSXMMEXCPT | Cr4.UMIP | Cr4.FSGSBASE | Cr4.OSXSAVE);
        state.Efer = (ulong)(Efer.SCE | Efer.LME | Efer.LMA | Efer.NXE);
        state.Xcr0 = 7;
        state.Cs = Descriptors.Load(Descriptors.Code64);
        state.Ss = Descriptors.Load(Descriptors.Data);
        state.Ds = state.Es = state.Fs = state.Gs = Descriptors.Load(0);
        // As Linux has it: 16 entries, and as many LDT entries as oracle.c makes.
        state.Gdtr = new TableState(KernelLinear + Gdt, 127);
        state.Ldtr = new SegmentState(0x68, KernelLinear + Ldt, 63, 0x82);
        state.Tr = new SegmentState(0x40, KernelLinear + Tss, TssLimit, 0x8b);
        state.Idtr = new TableState(KernelLinear + Idt, 0xfff);
        return state;
    }

    /// <summary>Where the jump back behind a case's code leads: relative in 64-bit code, far elsewhere.</summary>
    public static ulong LandingTarget(OracleRecord* record)
    {
        byte* landing = record->Code + record->CodeLength;
        if (record->Mode == 64)
            return record->In.Rip + record->CodeLength + record->LandingLength + (ulong)(long)*(int*)(landing + 1);
        return *(uint*)(landing + record->LandingLength - 6);
    }

    private static void FillTables(byte* host)
    {
        const ulong table = (ulong)(PageEntry.Present | PageEntry.Writable | PageEntry.Accessed);
        const ulong user = (ulong)PageEntry.User;
        Put(host, Pml4 + 256 * 8, KernelPdpt | table);
        Put(host, KernelPdpt, KernelDirectory | table);
        Put(host, KernelDirectory, KernelTable | table);
        for (ulong page = 0; page < 256; page++)
            Put(host, KernelTable + page * 8, page << 12 | table | (ulong)PageEntry.Dirty);
        Put(host, Pml4, UserPdpt | table | user);
        Put(host, UserPdpt, UserDirectory | table | user);
        Put(host, UserDirectory + (Window.Start >> 21) * 8, UserTable | table | user);
        for (uint page = 0; page < Window.Pages; page++)
        {
            if (!Window.IsMapped(page))
                continue;
            ulong entry = WindowPhysical + page * 4096 | (ulong)(PageEntry.Present | PageEntry.Accessed) | user;
            if (Window.IsWritable(page))
                entry |= (ulong)(PageEntry.Writable | PageEntry.Dirty);
            if (!Window.IsCode(page))
                entry |= (ulong)PageEntry.NoExecute;
            Put(host, UserTable + page * 8, entry);
        }
    }

    private static void Put(byte* host, ulong physical, ulong value) => *(ulong*)(host + physical) = value;
}
