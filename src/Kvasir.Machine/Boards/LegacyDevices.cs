using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Firmware;
using Kvasir.Devices.Input;
using Kvasir.Devices.Serial;

namespace Kvasir.Machine.Boards;

/// <summary>The devices of the original PC and of ACPI: a parts list. What a board's description does not have is left out.</summary>
internal static class LegacyDevices
{
    /// <summary>I/O APIC inputs that HPET comparators can be routed to, as on ICH9 (datasheet 316972, "Timer Configuration and Capabilities").</summary>
    private const int FirstHpetPin = 20;

    /// <summary>Puts them on a board.</summary>
    /// <returns>The power management block, whose button the machine presses.</returns>
    public static AcpiPm Build(BoardFrame board, BoardDescription description, BoardConnections connections, IPowerControl power)
    {
        IIrqLine pitIrq = board.Irqs.Line(0);
        IIrqLine rtcIrq = board.Irqs.Line(ChipsetAddresses.RtcIrq);
        if (description.HasHpet)
        {
            // In legacy replacement mode the HPET takes these two wires away from the PIT and the RTC.
            IIrqLine?[] pins = new IIrqLine?[IoApic.PinCount];
            for (int pin = FirstHpetPin; pin < IoApic.PinCount; pin++)
                pins[pin] = board.SharedPin(pin);
            Hpet hpet = board.Add(new Hpet(board.Clock, pitIrq, rtcIrq, pins, board.Apics) { LegacyChanged = replaced => TellPit(board, replaced) });
            board.Mmio.Map(new Gpa(ChipsetAddresses.Hpet), Hpet.RegionSize, hpet, AccessSize.Byte, AccessSize.Qword);
            pitIrq = hpet.PitIrq;
            rtcIrq = hpet.RtcIrq;
        }
        Pit8254 pit = board.Add(new Pit8254(board.Clock, pitIrq));
        pit.Map(board.Ports);
        board.Ports.Map(SpeakerGate.Port, 1, board.Add(new SpeakerGate(board.Clock, pit)));
        if (description.HasRtc)
        {
            board.Rtc = board.Add(new CmosRtc(board.Clock, rtcIrq));
            board.Rtc.Map(board.Ports);
        }

        AcpiPm pm = board.Add(new AcpiPm(board.Clock, board.Irqs.Line(ChipsetAddresses.SciIrq), power, PowerManagement(description)));
        pm.Map(board.Ports);
        board.Ports.Map(ResetControlPort.Port, 1, board.Add(new ResetControlPort(power)));
        if (description.HasKeyboardController)
        {
            // The software CPU passes address bit 20 always, as every system since DOS 5 wants it: the gate keeps what was asked for.
            A20Gate a20 = board.Add(new A20Gate(_ => { }));
            board.Add(new I8042(
                board.Irqs.Line(ChipsetAddresses.KeyboardIrq), board.Irqs.Line(ChipsetAddresses.MouseIrq), a20, power, board.Clock)).Map(board.Ports);
            board.Ports.Map(FastA20Port.Port, 1, board.Add(new FastA20Port(a20, power)));
        }
        if (description.HasDma)
            board.Add(new Dma8237(board.Memory)).Map(board.Ports);
        if (description.HasFwCfg)
        {
            board.FwCfg = board.Add(new FwCfg(board.Memory));
            board.FwCfg.Map(board.Ports);
        }
        if (connections.Serial is { } serial)
        {
            foreach (SerialPortDescription port in description.SerialPorts)
                board.Add(new Uart16550(port.Port, board.Irqs.Line(port.Irq), serial, board.Clock)).Map(board.Ports);
        }

        // The delay port comes first where a DMA controller has 80h among its page registers.
        board.Ports.Map(LatchPort.Delay, 1, board.Add(new LatchPort()));
        if (!description.HasDma)
            board.Ports.Map(LatchPort.PostCode, 1, board.Add(new LatchPort()));
        return pm;
    }

    /// <summary>A PIT that is the accelerator's drives interrupt request 0 past the HPET.</summary>
    private static void TellPit(BoardFrame board, bool replaced)
    {
        if (board.Apics.Kernel is { HasWires: true } kernel)
            kernel.SetPitReplaced(replaced);
    }

    private static AcpiPmLayout PowerManagement(BoardDescription description) => new(
        Base: ChipsetAddresses.PmBase,
        Gpe: ChipsetAddresses.Gpe0,
        GpeSize: ChipsetAddresses.Gpe0Size,
        SmiCommand: ChipsetAddresses.SmiCommand,
        AcpiEnable: ChipsetAddresses.AcpiEnable,
        AcpiDisable: ChipsetAddresses.AcpiDisable,
        SleepTypeS3: ChipsetAddresses.SleepTypeS3,
        SleepTypeS5: ChipsetAddresses.SleepTypeS5,
        WideTimer: description.PmTimer32Bit,
        CanSuspend: description.HasS3);
}
