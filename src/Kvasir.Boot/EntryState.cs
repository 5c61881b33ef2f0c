using System;
using System.Buffers.Binary;
using Kvasir.Core;
using Kvasir.X86;

namespace Kvasir.Boot;

/// <summary>
/// The processor as boot protocols want it at a kernel's entry, and what firmware would have left behind. Selectors are those of the Linux boot
/// protocol (code 10h, data 18h), which suit the others too.
/// </summary>
public static class EntryState
{
    /// <summary>Bytes of <see cref="WriteGdt"/>: null, unused, code, data, TSS (two slots in long mode).</summary>
    internal const int GdtSize = 6 * 8;

    /// <summary>Page tables that map the first 4 GiB to themselves in 2 MiB pages: one PML4, one PDPT, four directories.</summary>
    internal const int IdentityTablesSize = 6 * GuestMemory.PageSize;

    private const ushort CodeSelector = 0x10;
    private const ushort DataSelector = 0x18;
    private const ushort TaskSelector = 0x20;
    private const uint TaskLimit = 0x67;
    private const ulong Flat32Code = 0x00cf_9b00_0000_ffff;
    private const ulong Flat64Code = 0x00af_9b00_0000_ffff;
    private const ulong FlatData = 0x00cf_9300_0000_ffff;
    private const ulong Task = 0x0000_8b00_0000_0067;

    private const uint Code32Attributes = 0xc09b;
    private const uint Code64Attributes = 0xa09b;
    private const uint DataAttributes = 0xc093;
    private const uint BusyTaskAttributes = 0x8b;

    // IA32_MTRR_DEF_TYPE: enable, fixed ranges enable, default type write-back (Intel SDM vol. 3, "Memory Type Range Registers").
    private const ulong MtrrWriteBack = 0x0c06;
    private const ulong FixedWriteBack = 0x0606_0606_0606_0606;
    private const ulong MtrrMaskValid = 1ul << 11;

    /// <summary>Index of IA32_MTRR_FIX16K_A0000 among the fixed ranges.</summary>
    private const int FixedVideo = 2;
    private const int FixedCount = 11;

    /// <summary>
    /// Sets memory types as firmware does before it starts a system: everything write-back but the video hole and what lies between the top of low RAM
    /// and 4 GiB. Every processor needs it, as all must agree.
    /// </summary>
    public static void SetMemoryTypes(ref CpuState state, int physicalAddressBits)
    {
        // The PCI window and the chipset above it are the top GiB; ECAM below it takes 256 MiB.
        ulong addressMask = (1ul << physicalAddressBits) - 1;
        state.MtrrDefType = MtrrWriteBack;
        for (int i = 0; i < FixedCount; i++)
            state.MtrrFixed[i] = i == FixedVideo ? 0 : FixedWriteBack;
        SetUncached(ref state, 0, ChipsetAddresses.PciWindow, ChipsetAddresses.FourGiB - ChipsetAddresses.PciWindow, addressMask);
        SetUncached(ref state, 1, ChipsetAddresses.Ecam, ChipsetAddresses.EcamSize, addressMask);
    }

    /// <summary>32-bit protected mode without paging: flat code and data, interrupts off.</summary>
    internal static CpuState Protected32(uint entry, ulong gdt, BoardDescription board)
    {
        CpuState state = Flat(gdt, board, Code32Attributes);
        state.Rip = entry;
        state.Cr0 = (ulong)(Cr0.PE | Cr0.ET);
        return state;
    }

    /// <summary>64-bit mode with the first 4 GiB mapped to themselves, interrupts off.</summary>
    internal static CpuState Long64(ulong entry, ulong gdt, ulong pageTables, BoardDescription board)
    {
        CpuState state = Flat(gdt, board, Code64Attributes);
        state.Rip = entry;
        state.Cr0 = (ulong)(Cr0.PE | Cr0.ET | Cr0.NE | Cr0.PG);
        state.Cr3 = pageTables;
        state.Cr4 = (ulong)Cr4.PAE;
        state.Efer = (ulong)(Efer.LME | Efer.LMA);
        return state;
    }

    internal static byte[] WriteGdt(bool long64)
    {
        byte[] gdt = new byte[GdtSize];
        BinaryPrimitives.WriteUInt64LittleEndian(gdt.AsSpan(CodeSelector), long64 ? Flat64Code : Flat32Code);
        BinaryPrimitives.WriteUInt64LittleEndian(gdt.AsSpan(DataSelector), FlatData);
        BinaryPrimitives.WriteUInt64LittleEndian(gdt.AsSpan(TaskSelector), Task);
        return gdt;
    }

    /// <summary>Page tables for <see cref="Long64"/> that stand at <paramref name="address"/>.</summary>
    internal static byte[] WriteIdentityTables(ulong address)
    {
        const int entries = 512;
        const int directories = 4;
        const ulong table = (ulong)(PageEntry.Present | PageEntry.Writable);
        const ulong leaf = table | (ulong)PageEntry.Large;
        byte[] tables = new byte[IdentityTablesSize];
        BinaryPrimitives.WriteUInt64LittleEndian(tables, (address + GuestMemory.PageSize) | table);
        for (int i = 0; i < directories; i++)
        {
            ulong directory = address + (ulong)((2 + i) * GuestMemory.PageSize);
            BinaryPrimitives.WriteUInt64LittleEndian(tables.AsSpan(GuestMemory.PageSize + i * 8), directory | table);
        }
        for (int i = 0; i < directories * entries; i++)
            BinaryPrimitives.WriteUInt64LittleEndian(tables.AsSpan(2 * GuestMemory.PageSize + i * 8), ((ulong)i << 21) | leaf);
        return tables;
    }

    private static CpuState Flat(ulong gdt, BoardDescription board, uint codeAttributes)
    {
        CpuState state = CpuState.AtReset();
        state.Rflags = (ulong)Rflags.Fixed1;
        state.Cs = new SegmentState(CodeSelector, 0, uint.MaxValue, codeAttributes);
        state.Ds = state.Es = state.Ss = state.Fs = state.Gs = new SegmentState(DataSelector, 0, uint.MaxValue, DataAttributes);
        state.Tr = new SegmentState(TaskSelector, 0, TaskLimit, BusyTaskAttributes);
        state.Gdtr = new TableState(gdt, GdtSize - 1);
        state.Idtr = new TableState(0, 0);
        SetMemoryTypes(ref state, board.PhysicalAddressBits);
        return state;
    }

    private static void SetUncached(ref CpuState state, int range, ulong start, ulong size, ulong addressMask)
    {
        state.MtrrVariable[range * 2] = start;
        state.MtrrVariable[range * 2 + 1] = (~(size - 1) & addressMask) | MtrrMaskValid;
    }
}
