using Kvasir.Boot;
using Kvasir.Core;

namespace Kvasir.Machine.Boards;

/// <summary>The default machine: PCI Express behind a Q35 host bridge.</summary>
internal static class Q35Board
{
    public static IBoard Build(VmConfiguration configuration, BoardConnections connections, IPowerControl power)
    {
        BoardDescription description = BoardDescription.Q35(configuration.Cpus, configuration.Memory);
        BoardFrame board = new(configuration, connections.TscFrequency);
        return Boards.Complete(board, configuration, () => PciParts.Build(board, description.Pci!), () => description, connections, power);
    }
}
