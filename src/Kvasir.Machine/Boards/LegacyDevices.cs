using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Chipset;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Serial;

namespace Kvasir.Machine.Boards;

/// <summary>The devices of the original PC and of ACPI, which all boards here carry: a parts list.</summary>
internal static class LegacyDevices
{
    /// <summary>Puts them on a board.</summary>
    /// <returns>The power management block, whose button the machine presses.</returns>
    public static AcpiPm Build(BoardFrame board, BoardDescription description, BoardConnections connections, IPowerControl power)
    {
        Pit8254 pit = board.Add(new Pit8254(board.Clock, board.Irqs.Line(0)));
        pit.Map(board.Ports);
        board.Ports.Map(SpeakerGate.Port, 1, board.Add(new SpeakerGate(board.Clock, pit)));

        CmosRtc rtc = board.Add(new CmosRtc(board.Clock, board.Irqs.Line(ChipsetAddresses.RtcIrq)));
        rtc.Map(board.Ports);

        AcpiPmLayout layout = new(
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
        AcpiPm pm = board.Add(new AcpiPm(board.Clock, board.Irqs.Line(ChipsetAddresses.SciIrq), power, layout));
        pm.Map(board.Ports);
        board.Ports.Map(ResetControlPort.Port, 1, board.Add(new ResetControlPort(power)));

        if (connections.Serial is { } serial)
        {
            foreach (SerialPortDescription port in description.SerialPorts)
                board.Add(new Uart16550(port.Port, board.Irqs.Line(port.Irq), serial, board.Clock)).Map(board.Ports);
        }

        board.Ports.Map(LatchPort.PostCode, 1, board.Add(new LatchPort()));
        board.Ports.Map(LatchPort.Delay, 1, board.Add(new LatchPort()));
        return pm;
    }
}
