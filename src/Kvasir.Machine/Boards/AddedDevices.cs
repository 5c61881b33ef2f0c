using System.Collections.Generic;
using System.Globalization;
using Kvasir.Core;
using Kvasir.Devices.Debug;
using Kvasir.Devices.Virtio;
using Kvasir.Network;
using Kvasir.Network.Vsock;

namespace Kvasir.Machine.Boards;

/// <summary>The devices that a user adds by name.</summary>
internal static class AddedDevices
{
    /// <exception cref="MachineException">A name is not known, or a port is taken.</exception>
    public static void Build(BoardFrame board, IReadOnlyList<DeviceSetting> devices, BoardConnections connections, IPowerControl power)
    {
        List<ConsolePort> ports = [];
        foreach (DeviceSetting device in devices)
        {
            if (device.Name is "virtio-console" or "virtio-port")
            {
                string name = device.Name == "virtio-port" ? device.Settings.GetValueOrDefault("name", "") : "";
                ports.Add(new ConsolePort(connections.DebugConsole(device), name));
                continue;
            }
            try
            {
                Add(board, device, connections, power);
            }
            catch (System.ArgumentException e)
            {
                throw new MachineException($"cannot add the device {device.Name}: {e.Message}", e);
            }
        }
        if (ports.Count > VirtioConsole.MaximumPorts)
            throw new MachineException($"{ports.Count} virtio consoles and ports are more than the {VirtioConsole.MaximumPorts} of a device");
        if (ports.Count > 0)
            board.Devices!.Add(new VirtioConsole("virtio-console", board.Memory, ports));
    }

    private static void Add(BoardFrame board, DeviceSetting device, BoardConnections connections, IPowerControl power)
    {
        switch (device.Name)
        {
            case "isa-debug-exit":
                new IsaDebugExit(power, (ushort)Number(device, "iobase", IsaDebugExit.DefaultPort), (int)Number(device, "iosize", IsaDebugExit.DefaultCount))
                    .Map(board.Ports);
                break;
            case "debugcon":
                new DebugConsole(connections.DebugConsole(device), (ushort)Number(device, "iobase", DebugConsole.DefaultPort)).Map(board.Ports);
                break;
            case "virtio-rng":
                board.Places(device.Name).Add(new VirtioRng("virtio-rng", board.Memory));
                break;
            case "virtio-vsock":
                AddVsock(board, device);
                break;
            case "virtio-balloon":
                board.Devices!.Add(new VirtioBalloon("virtio-balloon", board.Memory));
                break;
            case "virtio-scsi":
                board.Devices!.AddController();
                break;
            case "pc-testdev":
                IIrqLine[] lines = new IIrqLine[PcTestDevice.LineCount];
                for (int gsi = 0; gsi < lines.Length; gsi++)
                    lines[gsi] = board.IoApic.Pin(gsi);
                board.Add(new PcTestDevice(lines)).Map(board.Ports, board.Mmio);
                break;
            default:
                throw new MachineException($"this machine has no device {device.Name}");
        }
    }

    private static void AddVsock(BoardFrame board, DeviceSetting device)
    {
        VsockBridge bridge;
        try
        {
            bridge = new VsockBridge(device.Settings["socket"]);
        }
        catch (NetworkException e)
        {
            throw new MachineException($"{device.Name}: {e.Message}", e);
        }
        VirtioVsock vsock;
        try
        {
            vsock = new VirtioVsock("virtio-vsock", board.Memory, bridge, Number(device, "guest-cid", (uint)VirtioVsock.FirstCid));
            board.Places(device.Name).Add(vsock);
        }
        catch
        {
            bridge.Dispose();
            throw;
        }
        // What is owned last goes first: the thread that carries packets ends before the device does.
        board.Own(bridge);
        vsock.Connect();
    }

    private static uint Number(DeviceSetting device, string key, uint otherwise)
    {
        if (!device.Settings.TryGetValue(key, out string? text))
            return otherwise;
        bool valid = text.StartsWith("0x", System.StringComparison.OrdinalIgnoreCase)
            ? uint.TryParse(System.MemoryExtensions.AsSpan(text, 2), NumberStyles.AllowHexSpecifier, CultureInfo.InvariantCulture, out uint number)
            : uint.TryParse(text, NumberStyles.None, CultureInfo.InvariantCulture, out number);
        return valid ? number : throw new MachineException($"{device.Name}: {key}={text} is no number");
    }
}
