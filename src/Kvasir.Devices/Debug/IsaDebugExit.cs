using Kvasir.Core;

namespace Kvasir.Devices.Debug;

/// <summary>The isa-debug-exit port of test guests: a write of V ends the VM with the exit code (V shl 1) | 1. It has no state.</summary>
/// <param name="power">Ends the VM.</param>
/// <param name="first">iobase: the first port.</param>
/// <param name="count">iosize: how many ports; a write of that many bytes gives a code that wide.</param>
public sealed class IsaDebugExit(IPowerControl power, ushort first = IsaDebugExit.DefaultPort, int count = IsaDebugExit.DefaultCount)
    : IPortDevice
{
    public const ushort DefaultPort = 0x501;
    public const int DefaultCount = 2;

    /// <summary>Claims its ports.</summary>
    public void Map(PortBus bus) => bus.Map(first, count, this, AccessSize.Dword);

    public uint ReadPort(ushort port, AccessSize size) => 0;

    public void WritePort(ushort port, AccessSize size, uint value) => power.Exit((int)(value << 1 | 1));
}
