namespace Kvasir.Core;

/// <summary>
/// A device in the port I/O space. Ports keep their architectural numbers. Calls come from any vCPU's thread: a device locks itself.
/// Reads give zero-extended values; what is not implemented gives all ones of the size.
/// </summary>
public interface IPortDevice
{
    uint ReadPort(ushort port, AccessSize size);

    void WritePort(ushort port, AccessSize size, uint value);
}
