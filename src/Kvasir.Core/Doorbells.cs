using System.Collections.Generic;
using Kvasir.Linux;

namespace Kvasir.Core;

/// <summary>A place in a region of memory where a guest's write only says that there is work.</summary>
/// <param name="Offset">In the region.</param>
/// <param name="Size">Bytes of the writes that count; 0: all.</param>
/// <param name="Match">The value that counts; null: all.</param>
/// <param name="Bell">Signalled in place of the write. The device keeps it.</param>
public readonly record struct Doorbell(ulong Offset, uint Size, ulong? Match, EventFd Bell);

/// <summary>A device's region with doorbells. Writes that come to the device all the same do what they say.</summary>
public interface IDoorbellRegion
{
    /// <summary>Asked for when the region is placed; the same each time.</summary>
    IReadOnlyList<Doorbell> Doorbells { get; }
}

/// <summary>An accelerator that signals doorbells without leaving the guest for it. Any thread.</summary>
public interface IDoorbellTaker
{
    /// <summary>A region is at an address from now on. Doorbells that cannot be taken are left to the device.</summary>
    void Place(IDoorbellRegion region, ulong start);

    /// <summary>It is there no longer.</summary>
    void Remove(IDoorbellRegion region, ulong start);
}
