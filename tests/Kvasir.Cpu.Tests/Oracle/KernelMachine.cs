using System;
using Iced.Intel;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Cpu.Tests.Oracle;

/// <summary>Where a guest runs a case.</summary>
public enum CasePlace
{
    /// <summary>As a user program under a 64-bit kernel.</summary>
    Ring3,

    /// <summary>In the kernel, 64-bit mode.</summary>
    Long,

    /// <summary>In the kernel, 32-bit or 16-bit segments without 64-bit mode.</summary>
    Protected,

    /// <summary>In real mode, with the bases and limits that the segments have elsewhere.</summary>
    Real,
}

/// <summary>
/// Machines like <see cref="UserMachine"/> that run a user program's cases at privilege level 0. Outside 64-bit mode exceptions push their frames onto the case's
/// own stack, so a case that ends there as it should ends by a write to <see cref="EndPort"/>.
/// </summary>
internal static unsafe class KernelMachine
{
    public const byte EndPort = 0x40;

    /// <summary>Window and everything below it: without paging the window lies where its linear addresses say.</summary>
    public const ulong FlatMemorySize = Window.End;

    private const ulong Handlers = 0xc000;
    private const ulong Stack = 0xe000;
    private const ulong Directory = 0xf000;
    private const ulong LowTable = 0x1_0000;
    private const ulong WindowTable = 0x1_1000;
    private const ushort KernelCode = 0x10;
    private const ushort KernelData = 0x18;
    private const ulong TssIst1 = 0x24;
    private const uint DescriptorPrivilege = 0x60;

    /// <summary>What is no user program's business, or depends on the privilege level or the mode without a fault in ring 3.</summary>
    public static bool Runs(CasePlace place, Form form)
    {
        if (place == CasePlace.Ring3 || form.IsBlock)
            return true;
        OpCodeInfo info = form.Code.ToOpCode();
        for (int i = 0; i < info.OpCount; i++)
        {
            if (info.GetOpKind(i) == OpCodeOperandKind.seg_reg)
                return false;
        }
        switch (form.Code.Mnemonic())
        {
            case Mnemonic.Clac or Mnemonic.Stac or Mnemonic.Lar or Mnemonic.Lsl or Mnemonic.Verr or Mnemonic.Verw or Mnemonic.Lss:
                return false;
            case Mnemonic.Lds or Mnemonic.Les or Mnemonic.Lfs or Mnemonic.Lgs or Mnemonic.Arpl:
            case Mnemonic.Fnstenv or Mnemonic.Fstenv or Mnemonic.Fldenv or Mnemonic.Fnsave or Mnemonic.Fsave or Mnemonic.Frstor:
                return place != CasePlace.Real;
        }
        // PUSH and POP of a named segment register have no operand kind of their own in every encoding.
        if (form.Code.ToString() is { } name && (name.StartsWith("Pushw_", StringComparison.Ordinal) || name.StartsWith("Pushd_", StringComparison.Ordinal)
            || name.StartsWith("Pushq_", StringComparison.Ordinal) || name.StartsWith("Popw_", StringComparison.Ordinal) || name.StartsWith("Popd_", StringComparison.Ordinal)
            || name.StartsWith("Popq_", StringComparison.Ordinal)) && name[^1] == 'S')
            return false;
        return place != CasePlace.Real || info.Encoding == EncodingKind.Legacy;
    }

    /// <summary>Completes a guest's memory that <see cref="UserMachine.Fill"/> and <see cref="UserMachine.FillHandlers"/> laid out.</summary>
    /// <param name="memory">Of <see cref="UserMachine.MemorySize"/>, or of <see cref="FlatMemorySize"/> where there is no paging.</param>
    /// <param name="place">Where the cases run.</param>
    public static void Fill(GuestMemory memory, CasePlace place)
    {
        byte* host = memory.Host;
        switch (place)
        {
            case CasePlace.Long:
                // All exceptions change stacks.
                *(ulong*)(host + UserMachine.Tss + TssIst1) = UserMachine.KernelLinear + Stack;
                for (uint vector = 0; vector < UserMachine.Vectors; vector++)
                    host[UserMachine.Idt + vector * 16 + 4] = 1;
                break;
            case CasePlace.Protected:
                Put(host, UserMachine.Gdt + KernelCode, 0x00cf_9b00_0000_ffff);
                Put(host, UserMachine.Gdt + KernelData, 0x00cf_9300_0000_ffff);
                for (uint vector = 0; vector < UserMachine.Vectors; vector++)
                {
                    ulong handler = Handlers + vector * 8;
                    Put(host, UserMachine.Idt + vector * 8, handler & 0xffff | (ulong)KernelCode << 16 | 0x8e00ul << 32 | (handler & 0xffff_0000) << 32);
                }
                FillTables(host);
                break;
            case CasePlace.Real:
                for (uint vector = 0; vector < UserMachine.Vectors; vector++)
                    *(uint*)(host + vector * 4) = (uint)(Handlers >> 4 << 16) + vector * 8;
                break;
        }
    }

    /// <summary>The state before a case's registers are loaded.</summary>
    /// <param name="place">Where the cases run.</param>
    /// <param name="paging">Protected mode has paging, so that what is not the window's faults.</param>
    public static CpuState InitialState(CasePlace place, bool paging)
    {
        CpuState state = UserMachine.InitialState();
        if (place is CasePlace.Ring3 or CasePlace.Long)
            return state;
        state.Efer = 0;
        state.Cr3 = paging ? Directory : 0;
        state.Cr4 &= ~(ulong)Cr4.PAE;
        if (!paging)
            state.Cr0 &= ~(ulong)Cr0.PG;
        if (place == CasePlace.Real)
        {
            state.Cr0 &= ~(ulong)(Cr0.PE | Cr0.PG | Cr0.WP | Cr0.AM);
            state.Cr3 = 0;
            state.Gdtr = new TableState(0, 0xffff);
            state.Idtr = new TableState(0, 0x3ff);
            state.Ldtr = new SegmentState(0, 0, 0xffff, 0x82);
            state.Tr = new SegmentState(0, 0, 0xffff, 0x8b);
            return state;
        }
        state.Gdtr = new TableState(UserMachine.Gdt, 127);
        state.Idtr = new TableState(UserMachine.Idt, UserMachine.Vectors * 8 - 1);
        state.Ldtr = new SegmentState(0x68, UserMachine.Ldt, 63, 0x82);
        state.Tr = new SegmentState(0x40, UserMachine.Tss, UserMachine.TssLimit, 0x8b);
        return state;
    }

    /// <summary>A case's segment, as it is in a place.</summary>
    /// <param name="place">Where the case runs.</param>
    /// <param name="number">The register, in encoding order.</param>
    /// <param name="segment">As a user program has it.</param>
    public static SegmentState Segment(CasePlace place, int number, SegmentState segment)
    {
        bool code = number == 1;
        bool stack = number == 2;
        if (place == CasePlace.Ring3)
            return segment;
        if (place == CasePlace.Real)
        {
            // Accesses through what a null selector left fault in ring 3, and are no cases here.
            if ((segment.Attributes & (uint)SegmentAttributes.Unusable) != 0)
                return new SegmentState(segment.Selector, segment.Base, 0xffff, 0x93);
            return segment with { Attributes = segment.Attributes & 0xc000 | (code ? 0x9bu : 0x93) };
        }
        if (place == CasePlace.Long && code)
            return segment with { Selector = KernelCode, Attributes = segment.Attributes & ~DescriptorPrivilege };
        if (place == CasePlace.Long && stack)
            return new SegmentState(0, 0, 0, (uint)SegmentAttributes.Unusable);
        if (code || stack)
            return segment with { Selector = (ushort)(segment.Selector & ~3), Attributes = segment.Attributes & ~DescriptorPrivilege };
        return segment;
    }

    /// <summary>32-bit page tables: the first MiB for the kernel, and the window with the rights that a user program has.</summary>
    private static void FillTables(byte* host)
    {
        const uint table = (uint)(PageEntry.Present | PageEntry.Writable | PageEntry.Accessed);
        *(uint*)(host + Directory) = (uint)LowTable | table;
        *(uint*)(host + Directory + (Window.Start >> 22) * 4) = (uint)WindowTable | table;
        for (uint page = 0; page < 256; page++)
            *(uint*)(host + LowTable + page * 4) = page << 12 | table | (uint)PageEntry.Dirty;
        for (uint page = 0; page < Window.Pages; page++)
        {
            if (!Window.IsMapped(page))
                continue;
            uint entry = (uint)UserMachine.WindowPhysical + page * 4096 | (uint)(PageEntry.Present | PageEntry.Accessed);
            if (Window.IsWritable(page))
                entry |= (uint)(PageEntry.Writable | PageEntry.Dirty);
            *(uint*)(host + WindowTable + ((Window.Start >> 12 & 0x3ff) + page) * 4) = entry;
        }
    }

    private static void Put(byte* host, ulong physical, ulong value) => *(ulong*)(host + physical) = value;
}
