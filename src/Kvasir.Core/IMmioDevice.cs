namespace Kvasir.Core;

/// <summary>
/// A device in the memory space; <c>offset</c> counts from the start of its region. Calls come from any vCPU's thread: a device locks itself.
/// The bus has split accesses to the sizes that the device was mapped with; an access never crosses the region's end.
/// </summary>
public interface IMmioDevice
{
    ulong Read(ulong offset, AccessSize size);

    void Write(ulong offset, AccessSize size, ulong value);
}
