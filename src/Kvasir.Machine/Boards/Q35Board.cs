using Kvasir.Boot;
using Kvasir.Core;
using Kvasir.Devices.Chipset;

namespace Kvasir.Machine.Boards;

/// <summary>The default machine. Its PCI Express root complex is not there yet, and its firmware tables do not claim it.</summary>
internal static class Q35Board
{
    public static IBoard Build(VmConfiguration configuration, BoardConnections connections, IPowerControl power)
    {
        BoardDescription description = BoardDescription.Q35(configuration.Cpus, configuration.Memory) with { Pci = null };
        return Boards.Complete(new BoardFrame(configuration, connections.TscFrequency), configuration, description, connections, power);
    }
}
