using System;

namespace Kvasir.Core;

/// <summary>A run of addresses that somebody claims.</summary>
public interface IAddressRegion
{
    ulong Start { get; }

    /// <summary>One past its last address.</summary>
    ulong End { get; }
}

/// <summary>Look-ups in tables of regions that are sorted and do not overlap.</summary>
public static class AddressRegions
{
    /// <summary>Finds the region that an address lies in, in logarithmic time.</summary>
    public static bool TryFind<TRegion>(ReadOnlySpan<TRegion> regions, ulong address, out TRegion region)
        where TRegion : struct, IAddressRegion
    {
        int low = 0;
        int high = regions.Length - 1;
        while (low <= high)
        {
            int middle = (low + high) / 2;
            ref readonly TRegion candidate = ref regions[middle];
            if (address < candidate.Start)
            {
                high = middle - 1;
            }
            else if (address >= candidate.End)
            {
                low = middle + 1;
            }
            else
            {
                region = candidate;
                return true;
            }
        }
        region = default;
        return false;
    }
}
