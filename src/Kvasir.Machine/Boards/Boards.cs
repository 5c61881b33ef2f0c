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

    /// <summary>What follows a board's own parts: the legacy devices, the user's devices, the processors. On a fault everything is freed again.</summary>
    internal static IBoard Complete(
        BoardFrame board, VmConfiguration configuration, BoardDescription description, BoardConnections connections, IPowerControl power)
    {
        try
        {
            if (connections.Serial is null)
                description = description with { SerialPorts = [] };
            AcpiPm pm = LegacyDevices.Build(board, description, connections, power);
            AddedDevices.Build(board, configuration.Devices, connections, power);
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
