using System;
using System.Collections.Generic;

namespace Kvasir.Boot.Firmware;

/// <summary>
/// The multiprocessor table (Intel MultiProcessor Specification 1.4): what systems older than ACPI, or told to ignore it, learn processors and
/// interrupt wiring from.
/// </summary>
public static class MpTable
{
    /// <summary>Bytes of the floating pointer, which stands on a 16-byte boundary of the BIOS segment.</summary>
    public const int PointerSize = 16;

    private const byte Revision14 = 4;
    private const int EntryCountOffset = 34;
    private const byte AllApics = 0xff;
    private const byte IsaIrqs = 16;

    private enum Entry : byte
    {
        Processor = 0,
        Bus = 1,
        IoApic = 2,
        IoInterrupt = 3,
        LocalInterrupt = 4,
    }

    private enum InterruptType : byte
    {
        Vectored = 0,
        Nmi = 1,
        External = 3,
    }

    [Flags]
    private enum InterruptFlags : ushort
    {
        AsBus = 0,
        ActiveHigh = 1,
        LevelTriggered = 3 << 2,
    }

    /// <summary>The floating pointer to a table at <paramref name="table"/>.</summary>
    public static byte[] Pointer(uint table)
    {
        TableWriter w = new();
        w.Text("_MP_", 4).U32(table).U8(1).U8(Revision14).U8(0).Zero(5);
        w.PatchU8(10, TableWriter.Checksum(w.Written));
        return w.ToArray();
    }

    /// <summary>The configuration table. Processors whose APIC ID needs more than 8 bits cannot be named and are left out.</summary>
    public static byte[] Build(BoardDescription board)
    {
        const byte apicVersion = 0x14;
        const byte ioApicVersion = 0x20;
        const byte enabled = 1;
        const byte bootProcessor = 2;
        TableWriter w = new();
        w.Text("PCMP", 4).U16(0).U8(Revision14).U8(0).Text("KVASIR", 8).Text("VM", 12);
        w.U32(0).U16(0).U16(0).U32((uint)ChipsetAddresses.LocalApic).U16(0).U8(0).U8(0);
        int entries = 0;
        for (int i = 0; i < board.ApicIds.Count; i++)
        {
            if (board.ApicIds[i] >= AllApics)
                continue;
            byte flags = (byte)(enabled | (i == 0 ? bootProcessor : 0));
            w.U8((byte)Entry.Processor).U8((byte)board.ApicIds[i]).U8(apicVersion).U8(flags);
            w.U32(board.ProcessorSignature).U32(board.ProcessorFeatures).Zero(8);
            entries++;
        }
        // PCI buses are numbered from 0, so that ISA comes last.
        byte isaBus = 0;
        if (board.Pci is not null)
            entries += Bus(w, isaBus++, "PCI");
        entries += Bus(w, isaBus, "ISA");
        w.U8((byte)Entry.IoApic).U8(board.IoApicId).U8(ioApicVersion).U8(enabled).U32((uint)board.IoApicAddress);
        entries++;
        foreach ((byte bus, byte source, InterruptFlags flags, byte pin) in Interrupts(board, isaBus))
        {
            w.U8((byte)Entry.IoInterrupt).U8((byte)InterruptType.Vectored).U16((ushort)flags).U8(bus).U8(source).U8(board.IoApicId).U8(pin);
            entries++;
        }
        w.U8((byte)Entry.LocalInterrupt).U8((byte)InterruptType.External).U16(0).U8(isaBus).U8(0).U8((byte)board.ApicIds[0]).U8(0);
        w.U8((byte)Entry.LocalInterrupt).U8((byte)InterruptType.Nmi).U16(0).U8(isaBus).U8(0).U8(AllApics).U8(1);
        entries += 2;
        w.PatchU16(4, (ushort)w.Length);
        w.PatchU16(EntryCountOffset, (ushort)entries);
        w.PatchU8(7, TableWriter.Checksum(w.Written));
        return w.ToArray();
    }

    private static int Bus(TableWriter w, byte number, string type)
    {
        w.U8((byte)Entry.Bus).U8(number).Text(type, 6);
        return 1;
    }

    private static IEnumerable<(byte Bus, byte Source, InterruptFlags Flags, byte Pin)> Interrupts(BoardDescription board, byte isaBus)
    {
        const byte cascade = 2;
        for (byte irq = 0; irq < IsaIrqs; irq++)
        {
            if (irq == cascade)
                continue;
            InterruptFlags flags = irq == ChipsetAddresses.SciIrq ? InterruptFlags.ActiveHigh | InterruptFlags.LevelTriggered : InterruptFlags.AsBus;
            yield return (isaBus, irq, flags, irq == 0 ? ChipsetAddresses.TimerGsi : irq);
        }
        if (board.Pci is not PciDescription pci || !PciRouting.HasDirectInputs(pci))
            yield break;
        for (int slot = 0; slot < PciRouting.Slots; slot++)
        {
            for (int pin = 0; pin < PciRouting.Pins; pin++)
            {
                byte input = (byte)(ChipsetAddresses.FirstPciGsi + PciRouting.Pirq(pci, slot, pin));
                yield return (0, (byte)((slot << 2) | pin), InterruptFlags.AsBus, input);
            }
        }
    }
}
