using Kvasir.Boot;
using Kvasir.Core;

namespace Kvasir.Machine.Boards;

/// <summary>The smallest machine: no PCI, no keyboard controller, no DMA; virtio devices have registers in memory.</summary>
internal static class MicrovmBoard
{
    public static IBoard Build(VmConfiguration configuration, BoardConnections connections, IPowerControl power)
    {
        BoardFrame board = new(configuration, connections.TscFrequency);
        MmioPlaces places = new(board);
        return Boards.Complete(board, configuration, () => board.Virtio = places, () => Describe(configuration, places), connections, power);
    }

    private static BoardDescription Describe(VmConfiguration configuration, MmioPlaces places) => BoardDescription.Microvm(configuration.Cpus) with
    {
        HasHpet = false,
        HasKeyboardController = false,
        HasDma = false,
        HasFwCfg = false,
        VirtioMmio = places.Places,
    };
}
