using System;
using Kvasir.Core;

namespace Kvasir.Boot.Kernels;

/// <summary>Starts an operating system without firmware.</summary>
public static class KernelLoader
{
    /// <summary>Recognises a kernel file, loads it with its modules, its command line and the firmware tables of the board.</summary>
    /// <param name="memory">The VM's memory; on a restart the loader writes all that it needs anew.</param>
    /// <returns>The boot processor's state at the kernel's entry, and what lies where.</returns>
    /// <exception cref="BootException">The file is not one this loader knows, is damaged, or does not fit. Memory is then undefined.</exception>
    public static LoadedKernel Load(GuestMemory memory, BoardDescription board, BootRequest request)
    {
        BootMemory layout = new(memory);
        FirmwareTables tables = FirmwareTables.Place(memory, layout, board);
        return LinuxLoader.Load(layout, board, request, tables);
    }
}
