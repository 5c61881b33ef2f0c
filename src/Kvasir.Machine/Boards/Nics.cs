namespace Kvasir.Machine.Boards;

/// <summary>Puts the VM's NICs into their places.</summary>
internal static class Nics
{
    /// <exception cref="MachineException">There is no place for one.</exception>
    public static void Build(BoardFrame board, BoardConnections connections)
    {
        foreach (NicConnection nic in connections.Nics)
        {
            nic.Device = new Kvasir.Devices.Virtio.VirtioNet(nic.Name, board.Memory, nic.Backend, nic.Settings);
            board.Places(nic.Name).Add(nic.Device);
            // What is owned last goes first: the threads that carry frames end before the device does.
            board.Own(nic.Backend);
            nic.Device.Connect();
        }
    }
}
