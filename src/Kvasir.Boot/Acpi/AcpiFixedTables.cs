using System;
using System.Linq;

namespace Kvasir.Boot.Acpi;

/// <summary>Tables of fixed layout (ACPI specification 5.0, ch. "ACPI Software Programming Model"; HPET 1.0a, 3.2.4; PCI Firmware 3.x, 4.1.2).</summary>
internal static class AcpiFixedTables
{
    private const byte FacsLength = 64;

    [Flags]
    private enum BootArchitecture : ushort
    {
        None = 0,
        LegacyDevices = 1 << 0,
        Has8042 = 1 << 1,
        NoVga = 1 << 2,
        NoRtc = 1 << 5,
    }

    [Flags]
    private enum FixedFeatures : uint
    {
        None = 0,
        Wbinvd = 1 << 0,
        ProcessorC1 = 1 << 2,
        NoSleepButton = 1 << 5,
        RtcWakeNotFixed = 1 << 6,
        Timer32Bit = 1 << 8,
        ResetRegister = 1 << 10,
        PlatformClock = 1 << 15,
    }

    [Flags]
    private enum InterruptFlags : ushort
    {
        AsBus = 0,
        ActiveHigh = 1,
        LevelTriggered = 3 << 2,
    }

    public static void WriteFacs(AcpiTableWriter tables)
    {
        // No checksum; version 2 has a 64-bit waking vector.
        tables.Bytes.Text("FACS", 4).U32(FacsLength).Zero(24).U8(2).Zero(FacsLength - 33);
    }

    /// <summary>Fixed ACPI Description Table, revision 5.</summary>
    public static int WriteFadt(AcpiTableWriter tables, BoardDescription board, int facs, int dsdt) => tables.Table("FACP", 5, w =>
    {
        const byte desktop = 1;
        const ushort noC2 = 0xfff;
        const byte alarmNone = 0;
        const byte centuryRegister = 0x32;

        BootArchitecture boot = BootArchitecture.LegacyDevices;
        if (board.HasKeyboardController)
            boot |= BootArchitecture.Has8042;
        if (!board.HasVga)
            boot |= BootArchitecture.NoVga;
        if (!board.HasRtc)
            boot |= BootArchitecture.NoRtc;
        FixedFeatures features = FixedFeatures.Wbinvd | FixedFeatures.ProcessorC1 | FixedFeatures.NoSleepButton | FixedFeatures.RtcWakeNotFixed
            | FixedFeatures.ResetRegister;
        if (board.PmTimer32Bit)
            features |= FixedFeatures.Timer32Bit;
        if (board.HasHpet)
            features |= FixedFeatures.PlatformClock;

        tables.Pointer(facs, 4);
        tables.Pointer(dsdt, 4);
        w.U8(0).U8(desktop).U16(ChipsetAddresses.SciIrq).U32(ChipsetAddresses.SmiCommand);
        w.U8(ChipsetAddresses.AcpiEnable).U8(ChipsetAddresses.AcpiDisable).U8(0).U8(0);
        w.U32(ChipsetAddresses.Pm1aEvent).U32(0).U32(ChipsetAddresses.Pm1aControl).U32(0).U32(0);
        w.U32(ChipsetAddresses.PmTimer).U32(ChipsetAddresses.Gpe0).U32(0);
        w.U8(4).U8(2).U8(0).U8(4).U8(ChipsetAddresses.Gpe0Size).U8(0).U8(0).U8(0);
        w.U16(noC2).U16(noC2).U16(0).U16(0).U8(0).U8(0);
        w.U8(alarmNone).U8(alarmNone).U8(board.HasRtc ? centuryRegister : (byte)0);
        w.U16((ushort)boot).U8(0).U32((uint)features);
        Port(w, ChipsetAddresses.ResetControl, 8).U8(ChipsetAddresses.ResetValue);
        w.U16(0).U8(0);
        // X_FIRMWARE_CTRL is zero where FIRMWARE_CTRL is used; X_DSDT repeats the 32-bit pointer.
        w.U64(0);
        tables.Pointer(dsdt, 8);
        Port(w, ChipsetAddresses.Pm1aEvent, 32);
        w.Zero(12);
        Port(w, ChipsetAddresses.Pm1aControl, 16);
        w.Zero(12);
        w.Zero(12);
        Port(w, ChipsetAddresses.PmTimer, 32);
        Port(w, ChipsetAddresses.Gpe0, ChipsetAddresses.Gpe0Size * 8);
        w.Zero(12);
        w.Zero(24);
    });

    /// <summary>Multiple APIC Description Table: processors, IOAPIC, what ISA interrupts differ from their inputs, NMI.</summary>
    public static int WriteMadt(AcpiTableWriter tables, BoardDescription board) => tables.Table("APIC", 3, w =>
    {
        const uint dual8259 = 1;
        const uint enabled = 1;
        const byte allProcessors = 0xff;
        const byte nmiPin = 1;
        const uint firstX2ApicId = 255;

        w.U32((uint)ChipsetAddresses.LocalApic).U32(dual8259);
        for (int i = 0; i < board.ApicIds.Count; i++)
        {
            uint id = board.ApicIds[i];
            // The processor's number is one byte in the short form, too.
            if (id < firstX2ApicId && i < byte.MaxValue)
                w.U8(0).U8(8).U8((byte)i).U8((byte)id).U32(enabled);
            else
                w.U8(9).U8(16).U16(0).U32(id).U32(enabled).U32((uint)i);
        }
        w.U8(1).U8(12).U8(board.IoApicId).U8(0).U32((uint)board.IoApicAddress).U32(0);
        Override(w, 0, ChipsetAddresses.TimerGsi, InterruptFlags.AsBus);
        Override(w, ChipsetAddresses.SciIrq, ChipsetAddresses.SciIrq, InterruptFlags.ActiveHigh | InterruptFlags.LevelTriggered);
        if (board.Pci is { PirqCount: <= 4 })
        {
            // The PIIX3 routes PCI interrupts to these ISA ones.
            foreach (byte irq in (ReadOnlySpan<byte>)[5, 10, 11])
                Override(w, irq, irq, InterruptFlags.ActiveHigh | InterruptFlags.LevelTriggered);
        }
        w.U8(4).U8(6).U8(allProcessors).U16(0).U8(nmiPin);
        if (board.ApicIds.Any(id => id >= firstX2ApicId))
            w.U8(0x0a).U8(12).U16(0).U32(uint.MaxValue).U8(nmiPin).Zero(3);
    });

    public static int WriteHpet(AcpiTableWriter tables, BoardDescription board) => tables.Table("HPET", 1, w =>
    {
        const uint intelVendor = 0x8086u << 16;
        const uint legacyReplacement = 1 << 15;
        const uint counter64 = 1 << 13;
        const uint revision = 1;
        const ushort minimumTick = 0x80;
        w.U32(intelVendor | legacyReplacement | counter64 | ((uint)(board.HpetComparators - 1) << 8) | revision);
        w.U8(0).U8(64).U8(0).U8(0).U64(ChipsetAddresses.Hpet);
        w.U8(0).U16(minimumTick).U8(0);
    });

    /// <summary>Enhanced configuration space.</summary>
    public static int WriteMcfg(AcpiTableWriter tables, ulong ecam, int buses) => tables.Table("MCFG", 1, w =>
        w.Zero(8).U64(ecam).U16(0).U8(0).U8((byte)(buses - 1)).Zero(4));

    private static void Override(TableWriter w, byte irq, uint gsi, InterruptFlags flags) =>
        w.U8(2).U8(10).U8(0).U8(irq).U32(gsi).U16((ushort)flags);

    /// <summary>A generic address structure of an I/O port. Access size is left undefined where the block is wider than one access.</summary>
    private static TableWriter Port(TableWriter w, ushort port, int bits)
    {
        const byte systemIo = 1;
        byte access = bits switch { 8 => 1, 16 => 2, _ => 0 };
        return w.U8(systemIo).U8((byte)bits).U8(0).U8(access).U64(port);
    }
}
