using System;
using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Chipset;

namespace Kvasir.Machine.Boards;

/// <summary>Builds the board that a configuration asks for.</summary>
public static class Boards
{
    /// <exception cref="MachineException">It cannot be built as configured.</exception>
    /// <exception cref="Kvasir.Linux.LinuxException">The host has no room for it.</exception>
    public static IBoard Build(VmConfiguration configuration, BoardConnections connections, IPowerControl power) => configuration.Machine switch
    {
        MachineKind.Q35 => Q35Board.Build(configuration, connections, power),
        MachineKind.Microvm => MicrovmBoard.Build(configuration, connections, power),
        _ => throw new MachineException($"there is no board for the machine {configuration.Machine}"),
    };

    /// <summary>
    /// What every board goes through: its own parts, the user's devices and disks, the legacy devices, the processors. On a fault everything is freed again.
    /// </summary>
    /// <param name="parts">Builds the board's own parts.</param>
    /// <param name="describe">Describes the board, with all devices in their places.</param>
    internal static IBoard Complete(
        BoardFrame board, VmConfiguration configuration, Action parts, Func<BoardDescription> describe, BoardConnections connections, IPowerControl power)
    {
        try
        {
            board.Devices = new BoardDevices(board, configuration.Cpus, power.Pause);
            parts();
            foreach (DiskConfiguration disk in configuration.Disks)
                board.Devices.AddAtStart(disk);
            foreach (NicConnection nic in connections.Nics)
                board.Devices.AddAtStart(nic);
            Shares.Build(board, configuration);
            AddedDevices.Build(board, configuration.Devices, connections, power);
            BoardDescription description = describe();
            if (connections.Serial is null)
                description = description with { SerialPorts = [] };
            AcpiPm pm = LegacyDevices.Build(board, description, connections, power);
            board.Finish(connections.Processors, description, pm.PressPowerButton);
            return board;
        }
        catch
        {
            board.Dispose();
            throw;
        }
    }
}
