using Kvasir.Devices.Virtio;
using Kvasir.Sharing;

namespace Kvasir.Machine.Boards;

/// <summary>Puts shared folders into their places.</summary>
internal static class Shares
{
    /// <exception cref="MachineException">A folder cannot be opened, or there is no place for one.</exception>
    public static void Build(BoardFrame board, VmConfiguration configuration)
    {
        foreach (ShareConfiguration share in configuration.Shares)
        {
            try
            {
                FuseServer server = board.Own(new FuseServer(share.Folder, share.ReadOnly));
                board.Places(share.Tag).Add(new VirtioFs($"fs-{share.Tag}", board.Memory, server, share.Tag));
            }
            catch (SharingException e)
            {
                throw new MachineException($"--share: {e.Message}", e);
            }
        }
    }
}
