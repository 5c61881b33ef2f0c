using Kvasir.Core;
using Kvasir.Devices.Serial;

namespace Kvasir.Devices.Debug;

/// <summary>
/// The debug console that firmware logs to (as in Bochs): bytes written to its port go to a back end; reads tell that it is
/// there. What a full back
/// end does not take is lost. It has no state.
/// </summary>
/// <param name="backend">Takes the bytes.</param>
/// <param name="port">E9h by custom; 402h for SeaBIOS and OVMF.</param>
/// <param name="readBack">What reads give.</param>
public sealed class DebugConsole(ICharacterBackend backend, ushort port = DebugConsole.DefaultPort, byte readBack = 0xe9) : IPortDevice
{
    public const ushort DefaultPort = 0xe9;

    /// <summary>Claims its port.</summary>
    public void Map(PortBus bus) => bus.Map(port, 1, this);

    public uint ReadPort(ushort port, AccessSize size) => readBack;

    public void WritePort(ushort port, AccessSize size, uint value) => backend.Write([(byte)value]);
}
