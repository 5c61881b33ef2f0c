using Kvasir.Boot;
using Kvasir.Core;

namespace Kvasir.Machine.Boards;

/// <summary>The smallest machine: no PCI, no keyboard controller, no DMA.</summary>
internal static class MicrovmBoard
{
    public static IBoard Build(VmConfiguration configuration, BoardConnections connections, IPowerControl power)
    {
        BoardDescription description = BoardDescription.Microvm(configuration.Cpus) with
        {
            HasHpet = false,
            HasKeyboardController = false,
            HasDma = false,
            HasFwCfg = false,
        };
        return Boards.Complete(new BoardFrame(configuration, connections.TscFrequency), configuration, description, connections, power);
    }
}
